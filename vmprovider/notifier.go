package vmprovider

import (
	"context"
	"fmt"
	"iter"
	"sync"
)

// Notifier helps a driver to be a Watcher: the driver publishes what changed,
// and Watch gives every watcher its own view of it. The zero value is ready.
type Notifier struct {
	mu     sync.Mutex
	subs   map[*subscriber]struct{}
	closed bool
}

// subscriber holds what its watcher has yet to see: the latest of each machine,
// so a slow watcher costs at most one snapshot per machine.
type subscriber struct {
	pending map[string]Instance
	order   []string // IDs in pending, the longest waiting first
	wake    chan struct{}
}

// Publish tells all watchers of a machine's new state; it never blocks.
func (n *Notifier) Publish(inst Instance) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for s := range n.subs {
		if _, waits := s.pending[inst.ID]; !waits {
			s.order = append(s.order, inst.ID)
		}
		s.pending[inst.ID] = inst
		s.signal()
	}
}

// Close ends all watches with ErrClosed; a repeat does nothing.
func (n *Notifier) Close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	for s := range n.subs {
		s.signal()
	}
}

func (s *subscriber) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Watch is a whole Watcher.Watch, list being the driver's List of everything.
func (n *Notifier) Watch(ctx context.Context, list func(context.Context, ListOptions) iter.Seq2[Instance, error]) iter.Seq2[Instance, error] {
	return func(yield func(Instance, error) bool) {
		// Subscribed before the list is read, so that nothing falls between.
		s := &subscriber{pending: map[string]Instance{}, wake: make(chan struct{}, 1)}
		if !n.subscribe(s) {
			yield(Instance{}, fmt.Errorf("watch: %w", ErrClosed))
			return
		}
		defer n.unsubscribe(s)
		last := map[string]Instance{}
		for inst, err := range list(ctx, ListOptions{}) {
			if !yield(inst, err) || err != nil {
				return
			}
			last[inst.ID] = inst
		}
		if !yield(Instance{}, nil) {
			return
		}
		for {
			changed, closed := n.take(s)
			for _, inst := range changed {
				if prev, known := last[inst.ID]; known && prev == inst {
					continue
				}
				if !yield(inst, nil) {
					return
				}
				if last[inst.ID] = inst; inst.State == StateGone {
					delete(last, inst.ID)
				}
			}
			if closed {
				yield(Instance{}, fmt.Errorf("watch: %w", ErrClosed))
				return
			}
			select {
			case <-ctx.Done():
				yield(Instance{}, ctx.Err())
				return
			case <-s.wake:
			}
		}
	}
}

func (n *Notifier) subscribe(s *subscriber) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return false
	}
	if n.subs == nil {
		n.subs = map[*subscriber]struct{}{}
	}
	n.subs[s] = struct{}{}
	return true
}

func (n *Notifier) unsubscribe(s *subscriber) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.subs, s)
}

func (n *Notifier) take(s *subscriber) (changed []Instance, closed bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, id := range s.order {
		changed = append(changed, s.pending[id])
	}
	clear(s.pending)
	s.order = s.order[:0]
	return changed, n.closed
}
