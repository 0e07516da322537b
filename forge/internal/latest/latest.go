// Package latest keeps reports about one thing in order: one at a time, and
// none that is older than what was reported.
package latest

import (
	"context"

	"github.com/solstice-ci/solstice-go/forge/internal/lru"
	"github.com/solstice-ci/solstice-go/internal/keylock"
)

// Max is how many keys are remembered; those that were not used for longest are
// forgotten.
const Max = 4096

// Latest remembers the last version reported under each key.
type Latest struct {
	locks keylock.Locks
	last  lru.Cache[string, int64]
}

// New makes one that remembers nothing yet.
func New() *Latest { return &Latest{last: lru.Cache[string, int64]{Max: Max}} }

// Do calls report unless a report of the same or a higher version has
// succeeded under the key. There is one at a time under a key; a wait for its
// turn ends with ctx, whose error it returns. What failed is not remembered.
func (l *Latest) Do(ctx context.Context, key string, version int64, report func() error) error {
	unlock, err := l.locks.Lock(ctx, key)
	if err != nil {
		return err
	}
	defer unlock()
	if last, ok := l.last.Get(key); ok && version <= last {
		return nil
	}
	if err := report(); err != nil {
		return err
	}
	l.last.Put(key, version, 1)
	return nil
}
