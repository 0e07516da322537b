package bloblog

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logstream/internal/record"
)

// batch is what becomes one chunk.
type batch struct {
	epoch int64
	off   int64
	data  []byte
	marks []logstream.Mark // the one in force at off first
	done  chan struct{}
	err   error // after done
}

func (b *batch) end() int64 { return b.off + int64(len(b.data)) }

// stream is what this process knows of a stream it writes or follows.
type stream struct {
	name string
	refs int           // guarded by Store.mu
	turn chan struct{} // held while an append, seal or delete is decided

	mu       sync.Mutex
	deleted  bool
	owned    bool // this process writes it, by epoch
	epoch    int64
	size     int64           // durable bytes, while owned
	sum      hash.Hash       // of the durable bytes and those in memory; nil: not known
	last     *logstream.Mark // in force at the end
	recent   *batch          // stored last, kept for followers
	flushing *batch          // being stored
	next     *batch          // gathering
	running  bool            // the flush goroutine
	hurry    chan struct{}   // a token: do not linger
	changed  chan struct{}   // closed and replaced with every change
}

func (s *Store) acquire(name string) *stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.streams[name]
	if st == nil {
		st = &stream{name: name, turn: make(chan struct{}, 1), hurry: make(chan struct{}, 1), changed: make(chan struct{})}
		s.streams[name] = st
	}
	st.refs++
	return st
}

// maxIdle is how many streams are remembered that nobody uses at the moment.
const maxIdle = 256

func (s *Store) release(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st.refs--; st.refs > 0 || s.streams[st.name] != st {
		return
	}
	if owned, _ := st.owner(); !owned || len(s.streams) > maxIdle {
		delete(s.streams, st.name)
	}
}

// forget ends followers and makes the name free for another stream.
func (s *Store) forget(st *stream) {
	s.mu.Lock()
	if s.streams[st.name] == st {
		delete(s.streams, st.name)
	}
	s.mu.Unlock()
	st.mu.Lock()
	defer st.mu.Unlock()
	st.deleted = true
	st.disownLocked()
}

func (st *stream) isDeleted() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.deleted
}

func (st *stream) owner() (owned bool, epoch int64) {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.owned, st.epoch
}

// stored is the durable size as far as the owner knows it.
func (st *stream) stored() int64 {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.size
}

// take makes this process the writer from size on.
func (st *stream) take(epoch, size int64, last *logstream.Mark) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if !st.owned || st.size != size {
		st.sum = nil
		if size == 0 {
			st.sum = sha256.New()
		}
	}
	st.owned, st.epoch, st.size, st.last = true, epoch, size, last
}

func (st *stream) disown() {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.disownLocked()
}

func (st *stream) disownLocked() {
	st.owned, st.sum, st.recent = false, nil, nil
	st.broadcast()
}

func (st *stream) broadcast() {
	close(st.changed)
	st.changed = make(chan struct{})
}

// sumOf returns the SHA-256 of the stream in the given state, if it is known.
func (st *stream) sumOf(cur State) []byte {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.owned && st.sum != nil && st.epoch == cur.Epoch && st.size == cur.Size && st.flushing == nil && st.next == nil {
		return st.sum.Sum(nil)
	}
	return nil
}

// end is where the next append has to begin.
func (st *stream) end() int64 {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.accepted()
}

// accepted is where the next append has to begin.
func (st *stream) accepted() int64 {
	switch {
	case st.next != nil:
		return st.next.end()
	case st.flushing != nil:
		return st.flushing.end()
	}
	return st.size
}

// full returns a batch to wait for when more than limit bytes are in memory.
func (st *stream) full(limit int) *batch {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.accepted()-st.size <= int64(limit) {
		return nil
	}
	if st.flushing != nil {
		return st.flushing
	}
	return st.next
}

// add takes what is new of an append into memory. It returns the batch with
// which all of p is durable (nil: it is already), and whether to start flush.
func (st *stream) add(o logstream.AppendOptions, off int64, p []byte) (b *batch, start bool, err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if !st.owned { // a flush failed meanwhile
		return nil, false, fmt.Errorf("bloblog: %s: an append before this one failed, repeat both", st.name)
	}
	end, accepted := off+int64(len(p)), st.accepted()
	if off > accepted {
		return nil, false, &logstream.OffsetError{Stream: st.name, Want: accepted, Got: off}
	}
	for _, held := range []*batch{st.flushing, st.next} {
		if held == nil {
			continue
		}
		from, to := max(off, held.off), min(end, held.end())
		if from < to {
			if !bytes.Equal(held.data[from-held.off:to-held.off], p[from-off:to-off]) {
				return nil, false, fmt.Errorf("%w: %s between %d and %d", logstream.ErrConflict, st.name, from, to)
			}
			b = held
		}
	}
	if end <= accepted {
		return b, false, nil
	}
	if st.next == nil {
		st.next = &batch{epoch: st.epoch, off: accepted, done: make(chan struct{})}
		if st.last != nil {
			st.next.marks = append(st.next.marks, *st.last)
		}
	}
	b = st.next
	fresh := p[accepted-off:]
	b.data = append(b.data, fresh...)
	if marks := record.Trim(o.Marks, accepted); len(marks) > 0 {
		b.marks = append(b.marks, marks...)
		if len(b.marks) > 1 && b.marks[1].Offset == b.off { // nothing of the inherited one is left
			b.marks = b.marks[1:]
		}
		last := marks[len(marks)-1]
		st.last = &last
	}
	if st.sum != nil {
		st.sum.Write(fresh)
	}
	st.broadcast()
	start = !st.running
	st.running = true
	return b, start, nil
}

// gather waits for company and makes the gathered batch the one being stored.
func (st *stream) gather(linger time.Duration, enough int) *batch {
	st.mu.Lock()
	defer st.mu.Unlock()
	if linger > 0 {
		timer := time.NewTimer(linger)
		defer timer.Stop()
		for late := false; !late && st.next != nil && len(st.next.data) < enough; {
			changed := st.changed
			st.mu.Unlock()
			select {
			case <-changed:
			case <-st.hurry:
				late = true
			case <-timer.C:
				late = true
			}
			st.mu.Lock()
		}
	}
	st.flushing, st.next = st.next, nil
	if st.flushing == nil {
		st.running = false
	}
	return st.flushing
}

// finish tells those who wait for a batch. After a failure all behind it fail
// as well, and the stream has to be owned anew.
func (st *stream) finish(b *batch, err error) (stop bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.flushing = nil
	b.err = err
	close(b.done)
	if err == nil {
		st.size, st.recent = b.end(), b
	} else {
		if st.next != nil {
			st.next.err = err
			close(st.next.done)
			st.next = nil
		}
		st.disownLocked()
	}
	stop = st.next == nil
	st.running = !stop
	st.broadcast()
	return stop
}

// drain waits until nothing is in memory. The caller has the turn, so nothing
// comes in meanwhile. How the batches end is told to those who sent them.
func (st *stream) drain(ctx context.Context) error {
	for {
		st.mu.Lock()
		b := st.flushing
		if b == nil {
			b = st.next
		}
		st.mu.Unlock()
		if b == nil {
			return nil
		}
		select {
		case st.hurry <- struct{}{}:
		default:
		}
		select {
		case <-b.done:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// look returns what is in memory at pos. Without it, current says that
// the stream ends at pos as far as the writer, this process, knows.
func (st *stream) look(pos int64) (c *logstream.Chunk, deleted, current bool, changed <-chan struct{}) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for _, b := range []*batch{st.recent, st.flushing, st.next} {
		if b != nil && pos >= b.off && pos < b.end() {
			end := b.end()
			c = &logstream.Chunk{Offset: pos, Data: b.data[pos-b.off : end-b.off : end-b.off], Durable: b == st.recent}
			c.Marks = append(c.Marks, record.Within(b.marks, pos, end)...)
			break
		}
	}
	return c, st.deleted, st.owned && pos == st.accepted(), st.changed
}
