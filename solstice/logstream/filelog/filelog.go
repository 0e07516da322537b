// Package filelog stores log streams as append-only files on one machine, for
// one orchestrator with SQLite.
//
// A stream is a file of the bytes as printed (NAME~log) and a side index of
// its marks, epochs and seal (NAME~idx); uppercase letters of NAME are written
// "+x", so that file systems that fold case keep streams apart. What makes an
// append durable is neither file but one journal for all streams: concurrent
// appends share a write and an fsync there (group commit), and the streams'
// own files are written behind it without waiting for the disk. Once a journal
// file has grown to Options.JournalBytes the streams it names are synced and
// it is removed (checkpoint). Open redoes what the journal holds, physically,
// byte for byte at its offset, which also cuts off whatever a crash tore.
//
// Followers get only durable bytes: they are woken when a commit is done and
// read from the file, so that a slow one costs the writer nothing.
//
// One process at a time may have a directory open.
package filelog

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"os"
	"sync"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logstream/internal/record"
)

// Options tunes a store; the zero value is the default.
type Options struct {
	// JournalBytes is how much the journal holds before a checkpoint. Disk
	// use beyond the logs themselves is about twice that. Default 64 MiB.
	JournalBytes int64
	// MaxOpenStreams bounds the streams whose files are kept open for writing.
	// Default 64.
	MaxOpenStreams int
	// NoSync omits every fsync: for tests and benchmarks. What was appended
	// may be lost when the machine crashes.
	NoSync bool
	// Logger gets what goes wrong in the background. Default: discarded.
	Logger *slog.Logger
}

// ErrLocked is returned by Open for a directory that is open already, here or
// in another process.
var ErrLocked = errors.New("filelog: the directory is in use")

// Store is a logstream.Store on a directory. Make one with Open.
type Store struct {
	o       Options
	root    *os.Root
	lock    *os.File
	journal *journal

	mu      sync.Mutex
	streams map[string]*stream
	calls   sync.WaitGroup // Appends, Seals, Deletes and Stats under way
	closing bool
	closed  chan struct{} // followers end
}

var _ logstream.Store = (*Store)(nil)

// Open opens the store in dir, which is created if need be, and redoes what
// its journal holds.
func Open(dir string, o Options) (*Store, error) {
	if o.JournalBytes <= 0 {
		o.JournalBytes = 64 << 20
	}
	if o.MaxOpenStreams <= 0 {
		o.MaxOpenStreams = 64
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("filelog: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("filelog: %w", err)
	}
	s := &Store{o: o, root: root, streams: map[string]*stream{}, closed: make(chan struct{})}
	if err := s.start(); err != nil {
		if s.lock != nil {
			s.lock.Close()
		}
		root.Close()
		return nil, fmt.Errorf("filelog: %s: %w", dir, err)
	}
	return s, nil
}

func (s *Store) start() (err error) {
	if s.lock, err = s.root.OpenFile("lock", os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	if err := lockFile(s.lock); err != nil {
		return err
	}
	s.journal, err = openJournal(&files{root: s.root, noSync: s.o.NoSync, max: s.o.MaxOpenStreams}, s.o)
	return err
}

// Close implements logstream.Store.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		<-s.closed
		return nil
	}
	s.closing = true
	s.mu.Unlock()
	s.calls.Wait()
	err := s.journal.close()
	close(s.closed)
	return errors.Join(err, s.root.Close(), s.lock.Close())
}

// begin guards a call against Close.
func (s *Store) begin(ctx context.Context) (end func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return nil, logstream.ErrClosed
	}
	s.calls.Add(1)
	return s.calls.Done, nil
}

// Append implements logstream.Store.
func (s *Store) Append(ctx context.Context, name string, o logstream.AppendOptions, off int64, p []byte) (int64, error) {
	if err := logstream.ValidateAppend(name, o, off, p); err != nil {
		return 0, err
	}
	err := s.change(ctx, name, func(st *stream) (*commit, error) {
		cur := st.state
		if o.Epoch < cur.epoch {
			return nil, fmt.Errorf("%w: %s is at epoch %d, not %d", logstream.ErrFenced, name, cur.epoch, o.Epoch)
		}
		if off > cur.size && !cur.sealed {
			return nil, &logstream.OffsetError{Stream: name, Want: cur.size, Got: off}
		}
		stored := min(max(cur.size-off, 0), int64(len(p)))
		if err := s.compare(st, off, p[:stored]); err != nil {
			return nil, err
		}
		fresh := p[stored:]
		switch {
		case cur.sealed && (len(fresh) > 0 || off > cur.size):
			return nil, fmt.Errorf("%w: %s has %d bytes", logstream.ErrSealed, name, cur.size)
		case cur.sealed, cur.exists && len(fresh) == 0 && o.Epoch == cur.epoch:
			return nil, nil
		}
		c := st.newCommit(o.Epoch)
		if len(fresh) > 0 {
			if marks := record.Trim(o.Marks, cur.size); len(marks) > 0 {
				c.index(marksPayload(marks))
			}
			c.data = fresh
			c.next.size += int64(len(fresh))
			if st.sum != nil {
				c.sum = cloneHash(st.sum)
			}
		}
		return c, nil
	})
	if err != nil {
		return 0, err
	}
	return off + int64(len(p)), nil
}

// Seal implements logstream.Store.
func (s *Store) Seal(ctx context.Context, name string, o logstream.SealOptions) error {
	if err := logstream.ValidateSeal(name, o); err != nil {
		return err
	}
	return s.change(ctx, name, func(st *stream) (*commit, error) {
		cur := st.state
		if o.Epoch < cur.epoch {
			return nil, fmt.Errorf("%w: %s is at epoch %d, not %d", logstream.ErrFenced, name, cur.epoch, o.Epoch)
		}
		if o.Size >= 0 && o.Size != cur.size {
			return nil, fmt.Errorf("%w: %s has %d bytes, not %d", logstream.ErrConflict, name, cur.size, o.Size)
		}
		sum := cur.sha256
		if !cur.sealed {
			var err error
			if sum, err = s.sum(ctx, st); err != nil {
				return nil, err
			}
		}
		if o.SHA256 != nil && !bytes.Equal(o.SHA256, sum) {
			return nil, fmt.Errorf("%w: %s has SHA-256 %x, not %x", logstream.ErrConflict, name, sum, o.SHA256)
		}
		if cur.sealed {
			return nil, nil
		}
		c := st.newCommit(o.Epoch)
		c.index(sealPayload(cur.size, sum))
		c.next.sealed, c.next.sha256 = true, sum
		return c, nil
	})
}

// Delete implements logstream.Store.
func (s *Store) Delete(ctx context.Context, name string) error {
	if err := logstream.ValidateStream(name); err != nil {
		return err
	}
	return s.change(ctx, name, func(st *stream) (*commit, error) {
		if !st.state.exists {
			return nil, nil
		}
		return &commit{st: st, remove: true}, nil
	})
}

// change lets decide look at a stream that nobody else changes meanwhile and
// commits what it returns.
func (s *Store) change(ctx context.Context, name string, decide func(*stream) (*commit, error)) error {
	end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	for {
		st := s.acquire(name)
		done, err := s.tryChange(ctx, st, decide)
		s.release(st)
		if done || err != nil {
			return err
		}
	}
}

// tryChange returns false without an error when it has to be tried again.
func (s *Store) tryChange(ctx context.Context, st *stream, decide func(*stream) (*commit, error)) (done bool, err error) {
	select {
	case st.turn <- struct{}{}:
	case <-ctx.Done():
		return false, ctx.Err()
	}
	var c *commit
	again := false
	switch {
	case st.isDeleted(): // while we waited: look the name up again
		again = true
	case len(st.unapplied) > 0:
		c, again = &commit{st: st, retry: true}, true
	default:
		if err = s.load(st); err == nil {
			c, err = decide(st)
		}
	}
	if c == nil {
		<-st.turn
		return !again, err
	}
	c.store = s
	if !c.retry {
		c.encode()
	}
	c.done, c.hashed = make(chan struct{}), make(chan struct{})
	s.retain(st)
	data := c.redo.data
	s.journal.submit(c) // gives the turn back
	if c.sum != nil && len(data) > 0 {
		c.sum.Write(data) // while the disk works; the record is kept until then
	}
	close(c.hashed)
	select {
	case <-c.done:
		return !again, c.err
	case <-ctx.Done():
		return false, ctx.Err()
	}
}

// Stat implements logstream.Store.
func (s *Store) Stat(ctx context.Context, name string) (logstream.Info, error) {
	if err := logstream.ValidateStream(name); err != nil {
		return logstream.Info{}, err
	}
	end, err := s.begin(ctx)
	if err != nil {
		return logstream.Info{}, err
	}
	defer end()
	st := s.acquire(name)
	defer s.release(st)
	if err := s.load(st); err != nil {
		return logstream.Info{}, err
	}
	cur, _, _ := st.look()
	if !cur.exists {
		return logstream.Info{}, fmt.Errorf("%w: %s", logstream.ErrNotFound, name)
	}
	return logstream.Info{Stream: name, Size: cur.size, Epoch: cur.epoch, Sealed: cur.sealed, SHA256: bytes.Clone(cur.sha256)}, nil
}

// compare checks that the stream holds p at off.
func (s *Store) compare(st *stream, off int64, p []byte) error {
	if len(p) == 0 {
		return nil
	}
	f, err := s.root.Open(st.path + dataSuffix)
	if err != nil {
		return fmt.Errorf("filelog: %w", err)
	}
	defer f.Close()
	buf := make([]byte, min(len(p), 256<<10))
	for len(p) > 0 {
		n := min(len(p), len(buf))
		if _, err := f.ReadAt(buf[:n], off); err != nil {
			return fmt.Errorf("filelog: %w", err)
		}
		if !bytes.Equal(buf[:n], p[:n]) {
			return fmt.Errorf("%w: %s between %d and %d", logstream.ErrConflict, st.name, off, off+int64(n))
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// sum is the SHA-256 of the stream so far: kept while it is appended to, read
// from the file after a restart. The caller has the turn.
func (s *Store) sum(ctx context.Context, st *stream) ([]byte, error) {
	if st.sum == nil {
		h := sha256.New()
		if st.state.size > 0 {
			f, err := s.root.Open(st.path + dataSuffix)
			if err != nil {
				return nil, fmt.Errorf("filelog: %w", err)
			}
			defer f.Close()
			n, err := io.Copy(h, ctxReader{ctx, io.LimitReader(f, st.state.size)})
			if err != nil {
				return nil, fmt.Errorf("filelog: %w", err)
			}
			if n != st.state.size {
				return nil, fmt.Errorf("filelog: %s: %w: %d bytes of %d", st.name, logstream.ErrCorrupt, n, st.state.size)
			}
		}
		st.sum = h
	}
	return st.sum.Sum(nil), nil
}

type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

func cloneHash(h hash.Hash) hash.Hash {
	c, err := h.(hash.Cloner).Clone()
	if err != nil { // crypto/sha256 clones always
		return nil
	}
	return c
}
