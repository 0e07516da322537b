package filelog

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logstream/internal/record"
)

// chunkBytes is the most a follower gets at once.
const chunkBytes = 256 << 10

// Tail implements logstream.Store.
func (s *Store) Tail(ctx context.Context, name string, from int64) iter.Seq2[logstream.Chunk, error] {
	return func(yield func(logstream.Chunk, error) bool) {
		if err := s.follow(ctx, name, from, func(c logstream.Chunk) bool { return yield(c, nil) }); err != nil {
			yield(logstream.Chunk{}, err)
		}
	}
}

func (s *Store) follow(ctx context.Context, name string, pos int64, yield func(logstream.Chunk) bool) error {
	if err := logstream.ValidateStream(name); err != nil {
		return err
	}
	if pos < 0 {
		return fmt.Errorf("%w: %s: offset %d", logstream.ErrInvalid, name, pos)
	}
	end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	st := s.acquire(name)
	err = s.load(st)
	end()
	defer s.release(st)
	if err != nil {
		return err
	}
	var r reader
	defer r.close()
	for {
		cur, deleted, changed := st.look()
		switch {
		case deleted:
			return fmt.Errorf("%w: %s was deleted", logstream.ErrNotFound, name)
		case ctx.Err() != nil:
			return ctx.Err()
		case pos < cur.size:
			c, err := r.read(s.root, st.path, pos, cur)
			if err != nil {
				return s.readError(st, err)
			}
			if !yield(c) {
				return nil
			}
			pos += int64(len(c.Data))
			continue
		case cur.sealed && pos > cur.size:
			return &logstream.OffsetError{Stream: name, Want: cur.size, Got: pos}
		case cur.sealed:
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-s.closed:
			return logstream.ErrClosed
		}
	}
}

// readError explains why a follower could not read.
func (s *Store) readError(st *stream, err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, os.ErrClosed) {
		select {
		case <-s.closed:
			return logstream.ErrClosed
		default:
		}
		if st.isDeleted() || errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w: %s was deleted", logstream.ErrNotFound, st.name)
		}
	}
	return fmt.Errorf("filelog: stream %s: %w", st.name, err)
}

// reader is one follower's place in the two files.
type reader struct {
	data, index *os.File
	indexAt     int64            // what was read of the index
	marks       []logstream.Mark // the one in force and those behind it
}

func (r *reader) close() {
	for _, f := range []*os.File{r.data, r.index} {
		if f != nil {
			f.Close()
		}
	}
}

func (r *reader) read(root *os.Root, path string, pos int64, cur state) (c logstream.Chunk, err error) {
	if r.data == nil {
		if r.data, err = root.Open(path + dataSuffix); err != nil {
			r.data = nil
			return c, err
		}
		if r.index, err = root.Open(path + indexSuffix); err != nil {
			r.index = nil
			return c, err
		}
	}
	data := make([]byte, min(cur.size-pos, chunkBytes))
	if _, err := r.data.ReadAt(data, pos); err != nil {
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("%w: file is shorter than %d bytes", logstream.ErrCorrupt, cur.size)
		}
		return c, err
	}
	to := pos + int64(len(data))
	if err := r.readMarks(to, pos, cur.indexSize); err != nil {
		return c, err
	}
	return logstream.Chunk{Offset: pos, Data: data, Marks: record.Within(r.marks, pos, to), Durable: true}, nil
}

// readMarks reads the index on until it has the marks of bytes before to, and
// forgets those that ended before pos.
func (r *reader) readMarks(to, pos, indexSize int64) error {
	if len(r.marks) > 0 && r.marks[len(r.marks)-1].Offset >= to || r.indexAt == indexSize {
		r.drop(pos)
		return nil
	}
	records := record.NewReader(bufio.NewReaderSize(io.NewSectionReader(r.index, r.indexAt, indexSize-r.indexAt), 16<<10), maxIndexBytes)
	for r.indexAt < indexSize && (len(r.marks) == 0 || r.marks[len(r.marks)-1].Offset < to) {
		payload, err := records.Next()
		if err != nil {
			return fmt.Errorf("%w: index: %w", logstream.ErrCorrupt, err)
		}
		r.indexAt += int64(record.HeaderSize + len(payload))
		if payload[0] != kindMarks {
			continue
		}
		marks, err := record.ParseMarks(payload[1:])
		if err != nil {
			return err
		}
		r.drop(pos)
		r.marks = append(r.marks, marks...)
	}
	r.drop(pos)
	return nil
}

func (r *reader) drop(pos int64) {
	i := 0
	for i+1 < len(r.marks) && r.marks[i+1].Offset <= pos {
		i++
	}
	if i > 0 {
		r.marks = append([]logstream.Mark(nil), r.marks[i:]...) // chunks share the old array
	}
}
