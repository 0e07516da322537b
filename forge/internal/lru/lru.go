// Package lru is a bounded memory: what was not used for longest goes first.
package lru

import (
	"container/list"
	"sync"
)

// Cache holds values whose costs add up to Max at most. Max is set before use;
// it is safe for concurrent use.
type Cache[K comparable, V any] struct {
	Max int

	mu    sync.Mutex
	byKey map[K]*list.Element
	used  list.List // of *entry[K, V], the last used first
	sum   int
}

type entry[K comparable, V any] struct {
	key   K
	value V
	cost  int
}

// Get gives the value of a key, which counts as a use.
func (c *Cache[K, V]) Get(key K) (value V, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.byKey[key]
	if e == nil {
		return value, false
	}
	c.used.MoveToFront(e)
	return e.Value.(*entry[K, V]).value, true
}

// Put sets the value of a key, and makes room for its cost; one that costs more
// than Max is not kept.
func (c *Cache[K, V]) Put(key K, value V, cost int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.byKey[key]; e != nil {
		c.remove(e)
	}
	if cost > c.Max {
		return
	}
	if c.byKey == nil {
		c.byKey = map[K]*list.Element{}
	}
	c.byKey[key] = c.used.PushFront(&entry[K, V]{key, value, cost})
	for c.sum += cost; c.sum > c.Max; {
		c.remove(c.used.Back())
	}
}

// Delete forgets a key.
func (c *Cache[K, V]) Delete(key K) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.byKey[key]; e != nil {
		c.remove(e)
	}
}

// Len is how many keys there are.
func (c *Cache[K, V]) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.used.Len()
}

func (c *Cache[K, V]) remove(e *list.Element) {
	gone := c.used.Remove(e).(*entry[K, V])
	delete(c.byKey, gone.key)
	c.sum -= gone.cost
}
