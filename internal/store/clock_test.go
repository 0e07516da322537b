package store_test

import (
	"context"
	"testing"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

// twoClocks are a process's clocks in the hands of a test.
type twoClocks struct {
	wall    time.Time
	elapsed time.Duration
}

func (c *twoClocks) run(d time.Duration) { c.wall, c.elapsed = c.wall.Add(d), c.elapsed+d }

func (c *twoClocks) process(db *bun.DB) store.Clock {
	return store.NewClock(db, store.ClockOptions{Wall: func() time.Time { return c.wall }, Elapsed: func() time.Duration { return c.elapsed }})
}

func TestProcessClock(t *testing.T) {
	db := open(t, testenv.SQLite(t))
	must(t, store.Migrate(t.Context(), db))
	c := &twoClocks{wall: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), elapsed: time.Hour}
	start := c.wall
	clock := c.process(db)
	read := func(clock store.Clock) time.Duration { // since start, through a transaction
		t.Helper()
		var now int64
		must(t, sqldb.InTx(t.Context(), db, func(ctx context.Context, tx bun.Tx) (err error) {
			now, err = clock.Now(ctx, tx)
			return err
		}))
		return time.UnixMicro(now).Sub(start)
	}
	eq(t, "at first the time of day", read(clock), 0)
	c.run(time.Minute)
	eq(t, "goes on", read(clock), time.Minute)
	c.wall = c.wall.Add(-24 * time.Hour)
	c.run(time.Minute)
	eq(t, "a jump back", read(clock), 2*time.Minute)
	c.wall = c.wall.Add(72 * time.Hour)
	c.run(time.Minute)
	eq(t, "a jump forward", read(clock), 3*time.Minute)

	// A process that starts during the jump takes it for the time, and takes
	// the others along; none goes back when it is corrected.
	jumped := c.process(db)
	ahead := read(jumped)
	if ahead < 47*time.Hour {
		t.Fatalf("a new process at %v", ahead)
	}
	c.run(2 * time.Second)
	eq(t, "the other process is at the mark", read(clock), ahead)
	c.wall = c.wall.Add(-48 * time.Hour)
	c.run(time.Minute)
	eq(t, "corrected", read(jumped), ahead+time.Minute+2*time.Second)
	restarted := c.process(db)
	eq(t, "restarted, behind the mark", read(restarted), ahead+time.Minute+2*time.Second)
	c.run(time.Minute)
	eq(t, "and goes on", read(restarted), ahead+2*time.Minute+2*time.Second)
	now, err := restarted.Now(t.Context(), db)
	must(t, err)
	eq(t, "outside a transaction", time.UnixMicro(now).Sub(start), ahead+2*time.Minute+2*time.Second)
}

// A transaction that is rolled back does not move the mark; the next one does.
func TestProcessClockAfterARollback(t *testing.T) {
	db := open(t, testenv.SQLite(t))
	must(t, store.Migrate(t.Context(), db))
	c := &twoClocks{wall: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	clock := c.process(db)
	read := func(result error) int64 {
		t.Helper()
		var now int64
		err := sqldb.InTx(t.Context(), db, func(ctx context.Context, tx bun.Tx) (err error) {
			if now, err = clock.Now(ctx, tx); err != nil {
				return err
			}
			return result
		})
		wantErr(t, err, result)
		return now
	}
	read(nil)
	c.run(time.Hour)
	read(store.ErrStale)
	last := read(nil)
	c.wall = c.wall.Add(-24 * time.Hour)
	clock = c.process(db)
	if again := read(nil); again < last-1e6 {
		t.Errorf("a new process is %v behind the last commit", time.Duration(last-again)*time.Microsecond)
	}
}

func TestOffsetAndProgress(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		last, err := r.Now(t.Context())
		must(t, err)
		r.pass(24 * time.Hour)
		now, err := r.Now(t.Context())
		must(t, err)
		if now-last < 86400e6 {
			t.Errorf("%d µs after a day", now-last)
		}
	})
}
