package filelog

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logstream/internal/record"
)

// Snapshot gives the files of a store's directory to each, one after the other,
// by their names relative to it; files with these contents are a store that
// Open takes. The directory may be in use by another process: a stream then has
// at least what Append had acknowledged before the call, if nobody deletes it
// meanwhile. A directory whose process was killed is to be opened and closed
// first. The reader that each gets gives exactly size bytes, and is not used
// after it returned.
//
// The journal is no part of it: what is acknowledged is in the streams' files,
// though perhaps not on the disk yet.
func Snapshot(ctx context.Context, dir string, each func(name string, size int64, r io.Reader) error) error {
	root, err := os.OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("filelog: snapshot: %w", err)
	}
	defer root.Close()
	err = fs.WalkDir(root.FS(), streamsDir, func(name string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // deleted, or there are no streams yet
		}
		path, isIndex := strings.CutSuffix(name, indexSuffix)
		if err != nil || d.IsDir() || !isIndex {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		return snapshotStream(ctx, root, path, each)
	})
	if err != nil {
		return fmt.Errorf("filelog: snapshot: %w", err)
	}
	return nil
}

// snapshotStream reads the index first: the bytes that it speaks of are there
// by then.
func snapshotStream(ctx context.Context, root *os.Root, path string, each func(name string, size int64, r io.Reader) error) error {
	idx, err := root.Open(path + indexSuffix)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer idx.Close()
	indexSize, size, err := wholeIndex(ctx, idx)
	if err != nil || indexSize == 0 { // it begins to exist just now
		return err
	}
	data, err := root.Open(path + dataSuffix)
	if err == nil {
		defer data.Close()
		if size < 0 {
			info, err := data.Stat()
			if err != nil {
				return err
			}
			size = info.Size()
		}
		if err := each(path+dataSuffix, size, io.NewSectionReader(data, 0, size)); err != nil {
			return err
		}
	} else if !errors.Is(err, fs.ErrNotExist) { // no bytes, no file
		return err
	}
	return each(path+indexSuffix, indexSize, io.NewSectionReader(idx, 0, indexSize))
}

// wholeIndex is the size of an index without a record that is being written, and
// the size that the stream was sealed with, -1 for one that is not.
func wholeIndex(ctx context.Context, idx *os.File) (indexSize, sealed int64, err error) {
	const tries = 20
	for try := 1; ; try++ {
		info, err := idx.Stat()
		if err != nil {
			return 0, 0, err
		}
		whole, sealed := int64(0), int64(-1)
		records := record.NewReader(bufio.NewReaderSize(io.NewSectionReader(idx, 0, info.Size()), 64<<10), maxIndexBytes)
		for {
			payload, err := records.Next()
			if errors.Is(err, io.EOF) {
				return whole, sealed, nil
			}
			if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, logstream.ErrCorrupt) {
				return 0, 0, err
			}
			if err != nil {
				break
			}
			whole += int64(record.HeaderSize + len(payload))
			if payload[0] == kindSeal {
				if size, n := binary.Uvarint(payload[1:]); n > 0 {
					sealed = int64(size)
				}
			}
		}
		if try == tries {
			// A record is written in moments: this one is damaged, and the copy is
			// as good as the original.
			return info.Size(), sealed, nil
		}
		select {
		case <-ctx.Done():
			return 0, 0, ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}
