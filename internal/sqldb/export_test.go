package sqldb

import (
	"context"
	"time"

	"github.com/uptrace/bun"
)

// TryTx is one try of InTx.
func TryTx(ctx context.Context, db *bun.DB, fn txFunc) error { return tryTx(ctx, db, fn, false) }

// Waiting counts the transactions that wait to join the one under way.
func Waiting(db *bun.DB) int {
	g := groupOf(db)
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.waiting)
}

// SetWindow replaces for how long a transaction lets others join.
func SetWindow(db *bun.DB, d time.Duration) { groupOf(db).window = d }
