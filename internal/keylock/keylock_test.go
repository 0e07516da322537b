package keylock

import (
	"context"
	"errors"
	"sync"
	"testing"
)

func TestLock(t *testing.T) {
	var l Locks
	n := map[string]int{"a": 0, "b": 0}
	var wg sync.WaitGroup
	for range 50 {
		for name := range n {
			wg.Go(func() {
				unlock, err := l.Lock(t.Context(), name)
				if err != nil {
					t.Error(err)
					return
				}
				defer unlock()
				if name == "a" { // the map itself is for one at a time
					other, err := l.Lock(t.Context(), "map")
					if err != nil {
						t.Error(err)
						return
					}
					defer other()
					n[name]++
				}
			})
		}
	}
	wg.Wait()
	if n["a"] != 50 || len(l.held) != 0 {
		t.Errorf("%d, %d locks are left", n["a"], len(l.held))
	}
}

func TestLockContext(t *testing.T) {
	var l Locks
	unlock, err := l.Lock(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.Lock(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("a lock that is held, with an ended context: %v", err)
	}
	unlock()
	if unlock, err = l.Lock(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	unlock()
}
