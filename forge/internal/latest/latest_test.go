package latest

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"sync"
	"testing"
)

func TestDo(t *testing.T) {
	l := New()
	var done []int64
	do := func(version int64, err error) error {
		return l.Do(t.Context(), "k", version, func() error { done = append(done, version); return err })
	}
	broken := errors.New("broken")
	for _, s := range []struct {
		version int64
		err     error
	}{{3, nil}, {3, nil}, {2, nil}, {4, broken}, {4, nil}, {1, nil}} {
		if err := do(s.version, s.err); !errors.Is(err, s.err) {
			t.Errorf("version %d: %v", s.version, err)
		}
	}
	if want := []int64{3, 4, 4}; !slices.Equal(done, want) {
		t.Errorf("reported %v, want %v", done, want)
	}
}

func TestOneAtATime(t *testing.T) {
	l := New()
	var busy, highest int64
	var wg sync.WaitGroup
	for v := range int64(50) {
		wg.Go(func() {
			err := l.Do(t.Context(), "k", v+1, func() error {
				busy++ // the race detector looks on
				highest = max(highest, v+1)
				if busy--; busy != 0 || highest != v+1 {
					t.Errorf("version %d after %d, %d others at it", v+1, highest, busy)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if last, ok := l.last.Get("k"); !ok || last != 50 {
		t.Errorf("the last is %d, %v", last, ok)
	}
}

func TestContext(t *testing.T) {
	l := New()
	err := l.Do(t.Context(), "k", 1, func() error {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		return l.Do(ctx, "k", 2, func() error { return nil })
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestBound(t *testing.T) {
	l := New()
	for i := range Max + 10 {
		if err := l.Do(t.Context(), strconv.Itoa(i), 1, func() error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if l.last.Len() != Max || l.locks.InUse() != 0 {
		t.Errorf("%d keys, %d locks", l.last.Len(), l.locks.InUse())
	}
}
