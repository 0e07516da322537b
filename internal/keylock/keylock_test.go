package keylock

import (
	"context"
	"errors"
	"sync"
	"testing"
)

func TestLock(t *testing.T) {
	var l Locks
	names := []string{"a", "b"}
	n := make([]int, len(names))
	var wg sync.WaitGroup
	for range 50 {
		for i, name := range names {
			wg.Go(func() {
				unlock, err := l.Lock(t.Context(), name)
				if err != nil {
					t.Error(err)
					return
				}
				defer unlock()
				n[i]++ // the race detector looks on
			})
		}
	}
	wg.Wait()
	if n[0] != 50 || n[1] != 50 || l.InUse() != 0 {
		t.Errorf("%v, %d locks are left", n, l.InUse())
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
