// Package bloblog stores log streams as objects in any blobstore.Store, listed
// in an Index that all orchestrators of a fleet share, so that a log survives
// the one that wrote it.
//
// Appends gather in memory for a moment and become one chunk object, then one
// entry in the Index; then they are durable. Appends to one stream that come
// while a chunk is being stored share the next one. An object that was stored
// but never listed (a crash, a fenced writer) is garbage for [Store.Sweep]. A
// sealed stream is compacted into one object of zstd frames, which `zstd -d`
// also reads as a whole, with an index of frames and marks; it takes the place
// of the chunks in one step, and readers in the middle go on.
//
// In the process that writes, followers get bytes at once, before they are
// durable (Chunk.Durable). Elsewhere they learn of new chunks through an Index
// that is a [Watcher], and look every Options.Poll otherwise.
package bloblog

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logstream/internal/record"
)

// Options tunes a store; the zero value is the default.
type Options struct {
	// Prefix of the keys, at most 40 bytes; keys are
	// <Prefix><stream>/=<epoch>-<offset>-<random>. Default "logs/".
	Prefix string
	// ChunkBytes is when a chunk is stored without waiting for more. Default
	// 1 MiB. A stream's writer holds up to four times that in memory.
	ChunkBytes int
	// Linger is how long an append waits for others to share its chunk.
	// Default 20 ms; negative: not at all.
	Linger time.Duration
	// Poll is how often a follower looks for bytes that other processes
	// wrote. Default 1 s; fifteen times that where the Index is a Watcher.
	Poll time.Duration
	// StoreTimeout bounds the storing of one chunk. Default 1 minute.
	StoreTimeout time.Duration
	// NoCompaction leaves sealed streams as chunks until Compact is called.
	NoCompaction bool
	// Logger gets what goes wrong in the background. Default: discarded.
	Logger *slog.Logger
}

// Store is a logstream.Store on a blob store and an Index. Make one with New.
type Store struct {
	blobs blobstore.Store
	index Index
	o     Options

	ctx        context.Context // ends with Close, after the appends
	cancel     context.CancelFunc
	closed     chan struct{} // followers end
	compacting chan struct{} // held by the one compaction under way

	mu         sync.Mutex
	streams    map[string]*stream
	closing    bool
	calls      sync.WaitGroup // calls and flushes under way
	background sync.WaitGroup // compactions
}

var _ logstream.Store = (*Store)(nil)

// New returns a store. Close does not close blobs.
func New(blobs blobstore.Store, index Index, o Options) (*Store, error) {
	if o.Prefix == "" {
		o.Prefix = "logs/"
	}
	if o.ChunkBytes <= 0 {
		o.ChunkBytes = 1 << 20
	}
	if o.Linger == 0 {
		o.Linger = 20 * time.Millisecond
	}
	if o.Poll <= 0 {
		o.Poll = time.Second
	}
	if o.StoreTimeout <= 0 {
		o.StoreTimeout = time.Minute
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if err := blobstore.ValidateKey(o.Prefix + "x"); err != nil || len(o.Prefix) > 40 {
		return nil, fmt.Errorf("%w: bloblog: prefix %q", logstream.ErrInvalid, o.Prefix)
	}
	s := &Store{blobs: blobs, index: index, o: o, closed: make(chan struct{}), compacting: make(chan struct{}, 1), streams: map[string]*stream{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

// Close implements logstream.Store; compactions under way are given up, to be
// done by the next Seal or Compact.
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
	s.cancel()
	s.background.Wait()
	close(s.closed)
	return nil
}

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

// with calls f with the turn of a stream that is not being deleted.
func (s *Store) with(ctx context.Context, name string, f func(*stream) error) error {
	end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	for {
		st := s.acquire(name)
		again, err := func() (bool, error) {
			defer s.release(st)
			select {
			case st.turn <- struct{}{}:
			case <-ctx.Done():
				return false, ctx.Err()
			}
			defer func() { <-st.turn }()
			if st.isDeleted() { // while we waited
				return true, nil
			}
			return false, f(st)
		}()
		if !again {
			return err
		}
	}
}

// Append implements logstream.Store.
func (s *Store) Append(ctx context.Context, name string, o logstream.AppendOptions, off int64, p []byte) (int64, error) {
	if err := logstream.ValidateAppend(name, o, off, p); err != nil {
		return 0, err
	}
	var b *batch
	err := s.with(ctx, name, func(st *stream) (err error) {
		b, err = s.admit(ctx, st, o, off, p)
		return err
	})
	if err != nil {
		return 0, err
	}
	if b != nil {
		select {
		case <-b.done:
			err = b.err
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err != nil {
		return 0, err
	}
	return off + int64(len(p)), nil
}

// admit takes an append into memory and returns the batch it becomes durable
// with, nil when it is. The caller has the turn.
func (s *Store) admit(ctx context.Context, st *stream, o logstream.AppendOptions, off int64, p []byte) (*batch, error) {
	end := off + int64(len(p))
	// What would be refused, or add nothing, is decided by the index: another
	// process may have taken over since we looked last.
	if owned, epoch := st.owner(); !owned || epoch != o.Epoch || end <= st.stored() || off > st.end() {
		done, err := s.own(ctx, st, o, off, p)
		if done || err != nil {
			return nil, err
		}
	}
	for { // bounded memory
		wait := st.full(4 * s.o.ChunkBytes)
		if wait == nil {
			break
		}
		select {
		case <-wait.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	stored := st.stored()
	if n := min(stored, end) - off; n > 0 {
		if err := s.compare(ctx, st, off, p[:n]); err != nil {
			return nil, err
		}
	}
	b, start, err := st.add(o, off, p)
	if errors.Is(err, logstream.ErrConflict) {
		if _, oerr := s.own(ctx, st, o, off, p); oerr != nil {
			err = oerr
		}
	}
	if start {
		s.mu.Lock()
		s.calls.Add(1) // our own call is still counted: Close waits
		st.refs++
		s.mu.Unlock()
		go s.flush(st)
	}
	return b, err
}

// own makes this process the writer of a stream by o.Epoch, if the append is
// not to be refused; done says that there is nothing to add.
func (s *Store) own(ctx context.Context, st *stream, o logstream.AppendOptions, off int64, p []byte) (done bool, err error) {
	if err := st.drain(ctx); err != nil {
		return false, err
	}
	for {
		cur, err := s.index.Stat(ctx, st.name)
		exists := err == nil
		if err != nil && !errors.Is(err, logstream.ErrNotFound) {
			return false, fmt.Errorf("bloblog: index: %w", err)
		}
		if _, epoch := st.owner(); cur.Sealed || cur.Epoch > epoch {
			st.disown() // what is in memory may be out of date
		}
		if o.Epoch < cur.Epoch {
			return false, fmt.Errorf("%w: %s is at epoch %d, not %d", logstream.ErrFenced, st.name, cur.Epoch, o.Epoch)
		}
		if off > cur.Size && !cur.Sealed {
			return false, &logstream.OffsetError{Stream: st.name, Want: cur.Size, Got: off}
		}
		n := min(max(cur.Size-off, 0), int64(len(p)))
		if err := s.compare(ctx, st, off, p[:n]); err != nil {
			return false, err
		}
		fresh := int64(len(p)) > n
		switch {
		case cur.Sealed && (fresh || off > cur.Size):
			return false, fmt.Errorf("%w: %s has %d bytes", logstream.ErrSealed, st.name, cur.Size)
		case cur.Sealed, exists && !fresh && o.Epoch == cur.Epoch:
			return true, nil
		}
		fenced, err := s.index.Fence(ctx, st.name, o.Epoch)
		if err != nil {
			return false, fmt.Errorf("bloblog: index: %w", err)
		}
		if fenced.Size != cur.Size || fenced.Sealed {
			continue // somebody was faster: look again
		}
		last, err := s.lastMark(ctx, st, cur.Size)
		if err != nil {
			return false, err
		}
		st.take(o.Epoch, cur.Size, last)
		return !fresh, nil
	}
}

// compare checks that the stored stream holds p at off.
func (s *Store) compare(ctx context.Context, st *stream, off int64, p []byte) error {
	r := reader{s: s, stream: st.name}
	for len(p) > 0 {
		c, err := r.next(ctx, off)
		if err != nil {
			return err
		}
		if c == nil {
			return fmt.Errorf("bloblog: %s: %w: no entry holds offset %d", st.name, logstream.ErrCorrupt, off)
		}
		n := min(len(p), len(c.Data))
		if !bytes.Equal(c.Data[:n], p[:n]) {
			return fmt.Errorf("%w: %s between %d and %d", logstream.ErrConflict, st.name, off, off+int64(n))
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// lastMark is the mark in force at the end of a stream, nil without one.
func (s *Store) lastMark(ctx context.Context, st *stream, size int64) (*logstream.Mark, error) {
	if size == 0 {
		return nil, nil
	}
	r := reader{s: s, stream: st.name}
	c, err := r.next(ctx, size-1)
	if err != nil || c == nil || len(c.Marks) == 0 {
		return nil, err
	}
	return &c.Marks[len(c.Marks)-1], nil
}

// flush stores what gathers until nothing does. One runs per stream at most.
func (s *Store) flush(st *stream) {
	defer s.calls.Done()
	defer s.release(st)
	for {
		b := st.gather(s.o.Linger, s.o.ChunkBytes)
		if b == nil {
			return
		}
		ctx, cancel := context.WithTimeout(s.ctx, s.o.StoreTimeout)
		err := s.store(ctx, st.name, b)
		cancel()
		if err != nil {
			s.o.Logger.Warn("log chunk not stored", "stream", st.name, "offset", b.off, "bytes", len(b.data), "error", err)
		}
		if st.finish(b, err) {
			return
		}
	}
}

// store makes one batch durable.
func (s *Store) store(ctx context.Context, name string, b *batch) error {
	object := record.Append(b.data[:len(b.data):len(b.data)], record.AppendMarks(nil, b.marks))
	sum := sha256.Sum256(object)
	e := Entry{Epoch: b.epoch, Offset: b.off, Length: int64(len(b.data)), Key: s.key(name, b.epoch, b.off), SHA256: sum[:]}
	if _, err := s.blobs.Put(ctx, e.Key, bytes.NewReader(object), blobstore.PutOptions{Size: int64(len(object)), SHA256: e.SHA256}); err != nil {
		return blobError(name, err)
	}
	err := s.index.Add(ctx, name, e)
	if err == nil {
		return nil
	}
	var gap *logstream.OffsetError
	if errors.As(err, &gap) {
		// Not the caller's gap: another process changed the stream. Repeating
		// the append settles it.
		err = fmt.Errorf("bloblog: %s: index: %d bytes, not %d", name, gap.Want, gap.Got)
		s.discard(ctx, e.Key)
	} else if errors.Is(err, logstream.ErrFenced) || errors.Is(err, logstream.ErrSealed) || errors.Is(err, logstream.ErrConflict) || errors.Is(err, logstream.ErrNotFound) {
		s.discard(ctx, e.Key) // refused for sure; after other errors it may be listed
	}
	return fmt.Errorf("bloblog: index: %w", err)
}

// discard removes an object that nothing lists; Sweep does what it cannot.
func (s *Store) discard(ctx context.Context, key string) {
	if err := s.blobs.Delete(ctx, key, blobstore.DeleteOptions{}); err != nil {
		s.o.Logger.Warn("unlisted log object not removed", "key", key, "error", err)
	}
}

// key of a new object. No stream element has a "=", so the key tells stream
// and object apart.
func (s *Store) key(name string, epoch, off int64) string {
	return fmt.Sprintf("%s%s/=%d-%d-%s", s.o.Prefix, name, epoch, off, strings.ToLower(rand.Text()[:10]))
}

func blobError(name string, err error) error {
	if errors.Is(err, blobstore.ErrNoSpace) {
		return fmt.Errorf("bloblog: %s: %w: %w", name, logstream.ErrNoSpace, err)
	}
	return fmt.Errorf("bloblog: %s: %w", name, err)
}

// Seal implements logstream.Store.
func (s *Store) Seal(ctx context.Context, name string, o logstream.SealOptions) error {
	if err := logstream.ValidateSeal(name, o); err != nil {
		return err
	}
	return s.with(ctx, name, func(st *stream) error {
		if err := st.drain(ctx); err != nil {
			return err
		}
		for {
			again, err := s.seal(ctx, st, o)
			if !again {
				return err
			}
		}
	})
}

func (s *Store) seal(ctx context.Context, st *stream, o logstream.SealOptions) (again bool, err error) {
	cur, err := s.index.Stat(ctx, st.name)
	exists := err == nil
	if err != nil && !errors.Is(err, logstream.ErrNotFound) {
		return false, fmt.Errorf("bloblog: index: %w", err)
	}
	if o.Epoch < cur.Epoch {
		return false, fmt.Errorf("%w: %s is at epoch %d, not %d", logstream.ErrFenced, st.name, cur.Epoch, o.Epoch)
	}
	if o.Size >= 0 && o.Size != cur.Size {
		return false, fmt.Errorf("%w: %s has %d bytes, not %d", logstream.ErrConflict, st.name, cur.Size, o.Size)
	}
	sum := cur.SHA256
	if !cur.Sealed {
		if sum = st.sumOf(cur); sum == nil {
			if sum, err = s.readSum(ctx, st.name, cur.Size); err != nil {
				return false, err
			}
		}
	}
	if o.SHA256 != nil && !bytes.Equal(o.SHA256, sum) {
		return false, fmt.Errorf("%w: %s has SHA-256 %x, not %x", logstream.ErrConflict, st.name, sum, o.SHA256)
	}
	if !cur.Sealed {
		if !exists {
			if _, err := s.index.Fence(ctx, st.name, o.Epoch); err != nil {
				return false, fmt.Errorf("bloblog: index: %w", err)
			}
		}
		err := s.index.Seal(ctx, st.name, State{Epoch: o.Epoch, Size: cur.Size, Sealed: true, SHA256: sum})
		if errors.Is(err, logstream.ErrConflict) || errors.Is(err, logstream.ErrSealed) {
			return true, nil // the stream changed since we looked
		}
		if err != nil {
			return false, fmt.Errorf("bloblog: index: %w", err)
		}
	}
	st.disown()
	s.compactLater(st.name)
	return false, nil
}

func (s *Store) readSum(ctx context.Context, name string, size int64) ([]byte, error) {
	h := sha256.New()
	if err := s.copyAll(ctx, name, size, func(c *logstream.Chunk) error { h.Write(c.Data); return nil }); err != nil {
		return nil, err
	}
	return h.Sum(nil), nil
}

// copyAll gives the first size bytes of what is stored to f, in order.
func (s *Store) copyAll(ctx context.Context, name string, size int64, f func(*logstream.Chunk) error) error {
	r := reader{s: s, stream: name}
	for pos := int64(0); pos < size; {
		c, err := r.next(ctx, pos)
		if err != nil {
			return err
		}
		if c == nil {
			return fmt.Errorf("bloblog: %s: %w: no entry holds offset %d", name, logstream.ErrCorrupt, pos)
		}
		if err := f(c); err != nil {
			return err
		}
		pos += int64(len(c.Data))
	}
	return nil
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
	cur, err := s.index.Stat(ctx, name)
	if err != nil {
		return logstream.Info{}, fmt.Errorf("bloblog: index: %w", err)
	}
	return logstream.Info{Stream: name, Size: cur.Size, Epoch: cur.Epoch, Sealed: cur.Sealed, SHA256: cur.SHA256}, nil
}

// Delete implements logstream.Store. The objects are found by their names as
// well as in the index, so a repeat also removes what was left when an earlier
// call, or a writer, was interrupted.
func (s *Store) Delete(ctx context.Context, name string) error {
	if err := logstream.ValidateStream(name); err != nil {
		return err
	}
	return s.with(ctx, name, func(st *stream) error {
		if err := st.drain(ctx); err != nil {
			return err
		}
		// Before the index forgets the stream: what is stored later may be
		// another's of the same name.
		keys := map[string]bool{}
		for info, err := range s.blobs.List(ctx, blobstore.ListOptions{Prefix: s.o.Prefix + name + "/="}) {
			if err != nil {
				return fmt.Errorf("bloblog: %s: %w", name, err)
			}
			keys[info.Key] = true
		}
		_, err := s.index.Stat(ctx, name)
		if err == nil {
			var entries []Entry
			if entries, err = s.index.Delete(ctx, name); err == nil {
				s.forget(st)
			}
			for _, e := range entries {
				keys[e.Key] = true
			}
		}
		if err != nil && !errors.Is(err, logstream.ErrNotFound) {
			return fmt.Errorf("bloblog: index: %w", err)
		}
		var errs []error
		for key := range keys {
			if err := s.blobs.Delete(ctx, key, blobstore.DeleteOptions{}); err != nil {
				errs = append(errs, fmt.Errorf("bloblog: %s: %w", name, err))
			}
		}
		return errors.Join(errs...)
	})
}
