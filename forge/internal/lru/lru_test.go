package lru

import (
	"sync"
	"testing"
)

func TestCache(t *testing.T) {
	c := Cache[string, int]{Max: 10}
	want := func(key string, value int, there bool) {
		t.Helper()
		if got, ok := c.Get(key); got != value || ok != there {
			t.Errorf("%s is %d, %v, want %d, %v", key, got, ok, value, there)
		}
	}
	c.Put("a", 1, 4)
	c.Put("b", 2, 4)
	want("a", 1, true) // so b goes first
	c.Put("c", 3, 4)
	want("a", 1, true)
	want("b", 0, false)
	c.Put("a", 5, 6)
	want("a", 5, true)
	want("c", 3, true)
	c.Put("big", 6, 11)
	want("big", 0, false)
	want("a", 5, true)
	c.Put("a", 7, 11) // the old one is not true any more
	want("a", 0, false)
	c.Delete("c")
	c.Delete("c")
	if c.Len() != 0 || c.sum != 0 || len(c.byKey) != 0 {
		t.Errorf("%d are left, of cost %d", c.Len(), c.sum)
	}
}

func TestConcurrent(t *testing.T) {
	c := Cache[int, int]{Max: 8}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 200 {
				c.Put(j%16, i, 1)
				_, _ = c.Get(j % 5)
				c.Delete(j % 3)
			}
		})
	}
	wg.Wait()
	if c.Len() > 8 {
		t.Errorf("%d are kept", c.Len())
	}
}
