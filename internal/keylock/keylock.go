// Package keylock has locks by name, of which there are as many as are in use.
package keylock

import (
	"context"
	"sync"
)

// Locks serialises what is done under one name. The zero value is ready.
type Locks struct {
	mu   sync.Mutex
	held map[string]*lock
}

type lock struct {
	token chan struct{} // holds one while locked
	refs  int
}

// Lock waits until nobody has the name, or for the end of ctx, whose error it
// returns. unlock is called once.
func (l *Locks) Lock(ctx context.Context, name string) (unlock func(), err error) {
	l.mu.Lock()
	if l.held == nil {
		l.held = map[string]*lock{}
	}
	k := l.held[name]
	if k == nil {
		k = &lock{token: make(chan struct{}, 1)}
		l.held[name] = k
	}
	k.refs++
	l.mu.Unlock()
	release := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if k.refs--; k.refs == 0 {
			delete(l.held, name)
		}
	}
	select {
	case k.token <- struct{}{}:
		return func() { <-k.token; release() }, nil
	case <-ctx.Done():
		release()
		return nil, ctx.Err()
	}
}

// InUse is how many names are held or waited for.
func (l *Locks) InUse() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.held)
}
