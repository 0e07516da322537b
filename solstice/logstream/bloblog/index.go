package bloblog

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

// State is what an Index knows of a stream as a whole.
type State struct {
	Epoch  int64
	Size   int64 // where the entries end
	Sealed bool
	SHA256 []byte // of all bytes, once sealed
}

// Entry lists one object of a stream.
type Entry struct {
	Epoch     int64
	Offset    int64
	Length    int64  // log bytes, not the object's size; at least 1
	Key       string // in the blob store
	SHA256    []byte // of the object; nil for a compacted one, which has its own checksums
	Compacted bool   // one compressed object for the whole sealed stream
}

// Index lists the chunks of streams. It is the truth: an object that is not
// listed is garbage. Every method is atomic, so that on SQL each is one
// transaction around an UPDATE of the stream's row with the conditions below,
// and safe for concurrent use by any number of processes.
//
// Errors wrap logstream's sentinels; what is refused changes nothing.
type Index interface {
	// Stat returns a stream's state, or ErrNotFound.
	Stat(ctx context.Context, stream string) (State, error)
	// Fence creates a stream that does not exist and raises its epoch to the
	// given one, and returns its state afterwards. ErrFenced when its epoch is
	// higher. A sealed stream stays as it is.
	Fence(ctx context.Context, stream string, epoch int64) (State, error)
	// Add lists an entry at the end of a stream, growing its size by
	// Entry.Length and raising its epoch to Entry.Epoch. In this order:
	// ErrNotFound; ErrFenced when the stream's epoch is higher; ErrSealed;
	// ErrConflict when its size is beyond Entry.Offset, *OffsetError when it
	// is below.
	Add(ctx context.Context, stream string, e Entry) error
	// List returns at most limit entries, ascending, beginning with the one
	// that holds the byte at from; none when there is none, or no stream.
	List(ctx context.Context, stream string, from int64, limit int) ([]Entry, error)
	// Seal ends a stream at s.Size with s.SHA256 by the epoch s.Epoch.
	// ErrNotFound; ErrFenced when the stream's epoch is higher; ErrSealed when
	// it is sealed already; ErrConflict when it has another size.
	Seal(ctx context.Context, stream string, s State) error
	// Replace puts one entry for all bytes in the place of all entries of a
	// sealed stream and returns those. ErrNotFound; ErrConflict when the
	// stream is not sealed, has another size, or is compacted already.
	Replace(ctx context.Context, stream string, e Entry) ([]Entry, error)
	// Delete removes a stream and returns the entries it had; absent is no
	// error.
	Delete(ctx context.Context, stream string) ([]Entry, error)
}

// Watcher is implemented by an Index that can tell of changes made by others.
type Watcher interface {
	// Watch returns a channel that gets a value, at least one for any number
	// of changes, after an Add, Seal or Delete of the stream; it may get
	// values for no reason. stop releases it.
	Watch(stream string) (changes <-chan struct{}, stop func())
}

// MemIndex is an Index in memory, for tests and single processes that need no
// durability. Its zero value is empty and ready.
type MemIndex struct {
	mu       sync.Mutex
	streams  map[string]*memStream
	watchers map[string]map[chan struct{}]bool
}

type memStream struct {
	State
	entries []Entry
}

var (
	_ Index   = (*MemIndex)(nil)
	_ Watcher = (*MemIndex)(nil)
)

// get returns a stream; the caller holds the lock.
func (x *MemIndex) get(ctx context.Context, stream string) (*memStream, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if st := x.streams[stream]; st != nil {
		return st, nil
	}
	return nil, fmt.Errorf("%w: %s", logstream.ErrNotFound, stream)
}

func (st *memStream) fenced(stream string, epoch int64) error {
	if epoch < st.Epoch {
		return fmt.Errorf("%w: %s is at epoch %d, not %d", logstream.ErrFenced, stream, st.Epoch, epoch)
	}
	return nil
}

// Stat implements Index.
func (x *MemIndex) Stat(ctx context.Context, stream string) (State, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	st, err := x.get(ctx, stream)
	if err != nil {
		return State{}, err
	}
	return st.State, nil
}

// Fence implements Index.
func (x *MemIndex) Fence(ctx context.Context, stream string, epoch int64) (State, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return State{}, err
	}
	st := x.streams[stream]
	if st == nil {
		if x.streams == nil {
			x.streams = map[string]*memStream{}
		}
		st = &memStream{}
		x.streams[stream] = st
	}
	if err := st.fenced(stream, epoch); err != nil {
		return State{}, err
	}
	if !st.Sealed {
		st.Epoch = epoch
	}
	return st.State, nil
}

// Add implements Index.
func (x *MemIndex) Add(ctx context.Context, stream string, e Entry) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	st, err := x.get(ctx, stream)
	if err != nil {
		return err
	}
	switch err := st.fenced(stream, e.Epoch); {
	case err != nil:
		return err
	case st.Sealed:
		return fmt.Errorf("%w: %s", logstream.ErrSealed, stream)
	case e.Offset < st.Size:
		return fmt.Errorf("%w: %s has %d bytes, entry at %d", logstream.ErrConflict, stream, st.Size, e.Offset)
	case e.Offset > st.Size:
		return &logstream.OffsetError{Stream: stream, Want: st.Size, Got: e.Offset}
	}
	st.entries = append(st.entries, e)
	st.Size += e.Length
	st.Epoch = e.Epoch
	x.notify(stream)
	return nil
}

// List implements Index.
func (x *MemIndex) List(ctx context.Context, stream string, from int64, limit int) ([]Entry, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	st := x.streams[stream]
	if st == nil {
		return nil, nil
	}
	i, _ := slices.BinarySearchFunc(st.entries, from, func(e Entry, from int64) int {
		if e.Offset+e.Length <= from {
			return -1
		}
		return 1
	})
	return slices.Clone(st.entries[i:min(i+limit, len(st.entries))]), nil
}

// Seal implements Index.
func (x *MemIndex) Seal(ctx context.Context, stream string, s State) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	st, err := x.get(ctx, stream)
	if err != nil {
		return err
	}
	switch err := st.fenced(stream, s.Epoch); {
	case err != nil:
		return err
	case st.Sealed:
		return fmt.Errorf("%w: %s", logstream.ErrSealed, stream)
	case st.Size != s.Size:
		return fmt.Errorf("%w: %s has %d bytes, not %d", logstream.ErrConflict, stream, st.Size, s.Size)
	}
	st.State = State{Epoch: s.Epoch, Size: s.Size, Sealed: true, SHA256: slices.Clone(s.SHA256)}
	x.notify(stream)
	return nil
}

// Replace implements Index.
func (x *MemIndex) Replace(ctx context.Context, stream string, e Entry) ([]Entry, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	st, err := x.get(ctx, stream)
	if err != nil {
		return nil, err
	}
	if !st.Sealed || e.Offset != 0 || e.Length != st.Size || len(st.entries) > 0 && st.entries[0].Compacted {
		return nil, fmt.Errorf("%w: %s is not to be compacted", logstream.ErrConflict, stream)
	}
	old := st.entries
	st.entries = []Entry{e}
	return old, nil
}

// Delete implements Index.
func (x *MemIndex) Delete(ctx context.Context, stream string) ([]Entry, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	st := x.streams[stream]
	if st == nil {
		return nil, nil
	}
	delete(x.streams, stream)
	x.notify(stream)
	return st.entries, nil
}

// Watch implements Watcher.
func (x *MemIndex) Watch(stream string) (<-chan struct{}, func()) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.watchers == nil {
		x.watchers = map[string]map[chan struct{}]bool{}
	}
	if x.watchers[stream] == nil {
		x.watchers[stream] = map[chan struct{}]bool{}
	}
	ch := make(chan struct{}, 1)
	x.watchers[stream][ch] = true
	return ch, func() {
		x.mu.Lock()
		defer x.mu.Unlock()
		if delete(x.watchers[stream], ch); len(x.watchers[stream]) == 0 {
			delete(x.watchers, stream)
		}
	}
}

func (x *MemIndex) notify(stream string) {
	for ch := range x.watchers[stream] {
		select {
		case ch <- struct{}{}:
		default:
		}
	}
}
