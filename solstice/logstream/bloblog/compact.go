package bloblog

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

// compactLater compacts in the background, one stream at a time.
func (s *Store) compactLater(name string) {
	if s.o.NoCompaction {
		return
	}
	s.background.Go(func() { // the caller's call is counted: Close waits
		select {
		case s.compacting <- struct{}{}:
			defer func() { <-s.compacting }()
		case <-s.ctx.Done():
			return
		}
		if err := s.compact(s.ctx, name); err != nil && s.ctx.Err() == nil {
			s.o.Logger.Warn("log not compacted", "stream", name, "error", err)
		}
	})
}

// Compact turns a sealed stream into one compressed object; one that is
// compacted, empty or absent needs nothing. Sealing does it in the background;
// this is for what that left over.
func (s *Store) Compact(ctx context.Context, name string) error {
	if err := logstream.ValidateStream(name); err != nil {
		return err
	}
	end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	return s.compact(ctx, name)
}

func (s *Store) compact(ctx context.Context, name string) error {
	cur, err := s.index.Stat(ctx, name)
	switch {
	case errors.Is(err, logstream.ErrNotFound):
		return nil
	case err != nil:
		return fmt.Errorf("bloblog: index: %w", err)
	case !cur.Sealed:
		return fmt.Errorf("%w: %s is not sealed", logstream.ErrConflict, name)
	case cur.Size == 0:
		return nil
	}
	if first, err := s.index.List(ctx, name, 0, 1); err != nil || len(first) == 0 || first[0].Compacted {
		return err
	}
	e := Entry{Epoch: cur.Epoch, Length: cur.Size, Key: s.key(name, cur.Epoch, 0), Compacted: true}

	// Bytes flow from the chunks through the compressor to the blob store.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	pr, pw := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := s.compress(ctx, name, cur, pw)
		pw.CloseWithError(err)
		done <- err
	}()
	_, err = s.blobs.Put(ctx, e.Key, pr, blobstore.PutOptions{ContentType: "application/zstd"})
	pr.CloseWithError(errors.New("bloblog: the blob store stopped reading"))
	if cerr := <-done; err == nil {
		err = cerr
	}
	if err != nil {
		return blobError(name, err)
	}
	old, err := s.index.Replace(ctx, name, e)
	switch {
	case errors.Is(err, logstream.ErrConflict) || errors.Is(err, logstream.ErrNotFound):
		s.discard(ctx, e.Key) // another process was faster, or deleted it
		return nil
	case err != nil:
		return fmt.Errorf("bloblog: index: %w", err)
	}
	for _, o := range old {
		s.discard(ctx, o.Key)
	}
	return nil
}

// compress writes the stream in the compacted form, and fails when it is not
// what was sealed.
func (s *Store) compress(ctx context.Context, name string, cur State, w io.Writer) error {
	z, err := newBlockWriter(w)
	if err != nil {
		return err
	}
	defer z.release()
	sum := sha256.New()
	err = s.copyAll(ctx, name, cur.Size, func(c *logstream.Chunk) error {
		sum.Write(c.Data)
		return z.write(c)
	})
	if err != nil {
		return err
	}
	if !bytes.Equal(sum.Sum(nil), cur.SHA256) {
		return fmt.Errorf("bloblog: %s: %w: SHA-256 is %x, sealed with %x", name, logstream.ErrCorrupt, sum.Sum(nil), cur.SHA256)
	}
	return z.close()
}

// Sweep removes objects older than minAge that no entry lists: what crashes
// and fenced writers left. An object is stored before it is listed, so minAge
// must be well above Options.StoreTimeout; an hour is a good choice. One
// process of a fleet sweeping now and then is enough. It returns how many it
// removed.
func (s *Store) Sweep(ctx context.Context, minAge time.Duration) (removed int, err error) {
	end, err := s.begin(ctx)
	if err != nil {
		return 0, err
	}
	defer end()
	before := time.Now().Add(-max(minAge, s.o.StoreTimeout))
	var listed map[string]bool // of the stream whose objects come now
	current := ""
	for info, err := range s.blobs.List(ctx, blobstore.ListOptions{Prefix: s.o.Prefix}) {
		if err != nil {
			return removed, fmt.Errorf("bloblog: sweep: %w", err)
		}
		i := strings.LastIndex(info.Key, "/=")
		if i < len(s.o.Prefix) || !info.ModTime.Before(before) {
			continue
		}
		if name := info.Key[len(s.o.Prefix):i]; name != current || listed == nil {
			if listed, err = s.listedKeys(ctx, name); err != nil {
				return removed, err
			}
			current = name
		}
		if listed[info.Key] {
			continue
		}
		if err := s.blobs.Delete(ctx, info.Key, blobstore.DeleteOptions{}); err != nil {
			return removed, fmt.Errorf("bloblog: sweep: %w", err)
		}
		removed++
	}
	return removed, nil
}

func (s *Store) listedKeys(ctx context.Context, name string) (map[string]bool, error) {
	keys := map[string]bool{}
	for from := int64(0); ; {
		entries, err := s.index.List(ctx, name, from, 1000)
		if err != nil {
			return nil, fmt.Errorf("bloblog: index: %w", err)
		}
		for _, e := range entries {
			keys[e.Key] = true
			from = e.Offset + e.Length
		}
		if len(entries) == 0 {
			return keys, nil
		}
	}
}
