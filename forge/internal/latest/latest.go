// Package latest keeps reports about one thing in order: one at a time, and
// none that is older than what was reported.
package latest

import (
	"container/list"
	"context"
	"sync"

	"github.com/solstice-ci/solstice-go/internal/keylock"
)

// Max is how many keys are remembered; those that were not used for longest are
// forgotten.
const Max = 4096

// Latest remembers the last version reported under each key. The zero value is
// ready.
type Latest struct {
	locks keylock.Locks
	mu    sync.Mutex
	byKey map[string]*list.Element
	used  list.List // of *entry, the last used first
}

type entry struct {
	key     string
	version int64
}

// Do calls report unless a report of the same or a higher version has
// succeeded under the key. There is one at a time under a key; a wait for its
// turn ends with ctx, whose error it returns. What failed is not remembered.
func (l *Latest) Do(ctx context.Context, key string, version int64, report func() error) error {
	unlock, err := l.locks.Lock(ctx, key)
	if err != nil {
		return err
	}
	defer unlock()
	if last, ok := l.Last(key); ok && version <= last {
		return nil
	}
	if err := report(); err != nil {
		return err
	}
	l.remember(key, version)
	return nil
}

// Last is the version that was last reported under the key, if it is remembered.
func (l *Latest) Last(key string) (version int64, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.byKey[key]
	if e == nil {
		return 0, false
	}
	l.used.MoveToFront(e)
	return e.Value.(*entry).version, true
}

func (l *Latest) remember(key string, version int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e := l.byKey[key]; e != nil {
		e.Value.(*entry).version = version
		l.used.MoveToFront(e)
		return
	}
	if l.byKey == nil {
		l.byKey = map[string]*list.Element{}
	}
	l.byKey[key] = l.used.PushFront(&entry{key, version})
	if len(l.byKey) > Max {
		delete(l.byKey, l.used.Remove(l.used.Back()).(*entry).key)
	}
}
