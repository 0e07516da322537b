package bloblog

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"iter"
	"time"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logstream/internal/record"
)

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
	end()
	defer s.release(st)
	poll := s.o.Poll
	var watch <-chan struct{}
	if w, ok := s.index.(Watcher); ok {
		var stop func()
		watch, stop = w.Watch(name)
		defer stop()
		poll *= 15
	}
	timer := time.NewTimer(poll)
	defer timer.Stop()

	r := reader{s: s, stream: name}
	seen := false // the stream exists
	// The index is asked at first and after every sign from elsewhere even if
	// this process writes the stream and has nothing more: another one may
	// have taken over.
	for ask := true; ; {
		c, deleted, current, changed := st.look(pos)
		switch {
		case deleted:
			return fmt.Errorf("%w: %s was deleted", logstream.ErrNotFound, name)
		case ctx.Err() != nil:
			return ctx.Err()
		case c == nil && (ask || !current):
			var over bool
			if c, over, err = s.stored(ctx, &r, pos, &seen); over || err != nil {
				return err
			}
			ask = c != nil // asked once it has no more
		}
		if c != nil {
			if !yield(*c) {
				return nil
			}
			pos += int64(len(c.Data))
			continue
		}
		select {
		case <-changed:
		case <-watch:
			ask = true
		case <-timer.C:
			ask = true
			timer.Reset(poll)
		case <-ctx.Done():
			return ctx.Err()
		case <-s.closed:
			return logstream.ErrClosed
		}
	}
}

// stored returns what the index lists at pos, nil when that is nothing yet, or
// over when the stream ends there.
func (s *Store) stored(ctx context.Context, r *reader, pos int64, seen *bool) (c *logstream.Chunk, over bool, err error) {
	// The state first: what it counts is listed by now.
	cur, err := s.index.Stat(ctx, r.stream)
	switch {
	case errors.Is(err, logstream.ErrNotFound) && !*seen:
		return nil, false, nil
	case err != nil:
		return nil, false, fmt.Errorf("bloblog: index: %w", err)
	}
	*seen = true
	switch {
	case pos < cur.Size:
		if c, err = r.next(ctx, pos); err == nil && c == nil {
			err = fmt.Errorf("bloblog: %s: %w: no entry holds offset %d", r.stream, logstream.ErrCorrupt, pos)
			if _, serr := s.index.Stat(ctx, r.stream); serr != nil {
				err = fmt.Errorf("bloblog: index: %w", serr) // deleted in between
			}
		}
		return c, false, err
	case cur.Sealed && pos > cur.Size:
		return nil, true, &logstream.OffsetError{Stream: r.stream, Want: cur.Size, Got: pos}
	}
	return nil, cur.Sealed, nil
}

// reader reads what is stored of a stream, best in ascending order.
type reader struct {
	s       *Store
	stream  string
	entries []Entry // listed ahead

	table *table // of the compacted object
	key   string // its key
}

// listAhead is how many entries a reader asks for at once.
const listAhead = 64

// next returns bytes from pos on, nil when no entry holds pos.
func (r *reader) next(ctx context.Context, pos int64) (*logstream.Chunk, error) {
	for try := 0; ; try++ {
		for len(r.entries) > 0 && r.entries[0].Offset+r.entries[0].Length <= pos {
			r.entries = r.entries[1:]
		}
		if len(r.entries) == 0 || r.entries[0].Offset > pos {
			entries, err := r.s.index.List(ctx, r.stream, pos, listAhead)
			if err != nil {
				return nil, fmt.Errorf("bloblog: index: %w", err)
			}
			if len(entries) == 0 || entries[0].Offset > pos {
				return nil, nil
			}
			r.entries = entries
		}
		e := r.entries[0]
		c, err := r.read(ctx, e, pos)
		if errors.Is(err, blobstore.ErrNotFound) && try < 3 {
			r.entries = nil // compacted or deleted since it was listed
			continue
		}
		return c, err
	}
}

func (r *reader) read(ctx context.Context, e Entry, pos int64) (*logstream.Chunk, error) {
	var data []byte
	var marks []logstream.Mark
	off := e.Offset
	var err error
	if e.Compacted {
		data, marks, off, err = r.readBlock(ctx, e, pos)
	} else {
		data, marks, err = r.readChunk(ctx, e)
	}
	if err != nil {
		return nil, fmt.Errorf("bloblog: %s: %s: %w", r.stream, e.Key, err)
	}
	end := off + int64(len(data))
	return &logstream.Chunk{Offset: pos, Data: data[pos-off:], Marks: record.Within(marks, pos, end), Durable: true}, nil
}

// maxMarksBytes bounds the marks of a chunk or block.
const maxMarksBytes = 256 << 20

func (r *reader) readChunk(ctx context.Context, e Entry) ([]byte, []logstream.Mark, error) {
	object, err := r.get(ctx, e.Key, blobstore.GetOptions{})
	if err != nil {
		return nil, nil, err
	}
	if sum := sha256.Sum256(object); !bytes.Equal(sum[:], e.SHA256) || int64(len(object)) < e.Length {
		return nil, nil, fmt.Errorf("%w: SHA-256 of a chunk", logstream.ErrCorrupt)
	}
	payload, rest, err := record.Parse(object[e.Length:], maxMarksBytes)
	if err != nil || len(rest) > 0 {
		return nil, nil, fmt.Errorf("%w: marks of a chunk", logstream.ErrCorrupt)
	}
	marks, err := record.ParseMarks(payload)
	return object[:e.Length:e.Length], marks, err
}

func (r *reader) get(ctx context.Context, key string, o blobstore.GetOptions) ([]byte, error) {
	body, _, err := r.s.blobs.Get(ctx, key, o)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return io.ReadAll(body)
}
