package store

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
)

// ClockOptions are for tests; the zero value is the real time.
type ClockOptions struct {
	// Offset is added to every time given out.
	Offset func() time.Duration
	// Wall and Elapsed replace the process's two clocks, on SQLite only: the
	// time of day, and the time since some fixed moment.
	Wall    func() time.Time
	Elapsed func() time.Duration
}

// NewClock returns the clock for a database. On PostgreSQL it is the server's
// clock_timestamp(), the same for all processes.
//
// On SQLite it is the process's: it starts at the later of the time of day and
// the mark that its predecessors left in the database, and goes on
// monotonically from there, so that the time of day may jump either way without
// effect. Transactions move the mark, at least once for every second.
func NewClock(db bun.IDB, o ClockOptions) Clock {
	if o.Offset == nil {
		o.Offset = func() time.Duration { return 0 }
	}
	if sqldb.IsPostgres(db) {
		return &serverClock{offset: o.Offset}
	}
	if o.Wall == nil {
		o.Wall = time.Now
	}
	if o.Elapsed == nil {
		start := time.Now()
		o.Elapsed = func() time.Duration { return time.Since(start) }
	}
	return &processClock{o: o}
}

type serverClock struct{ offset func() time.Duration }

// Now implements Clock.
func (c *serverClock) Now(ctx context.Context, db bun.IDB) (int64, error) {
	var us int64
	if err := db.NewRaw("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint").Scan(ctx, &us); err != nil {
		return 0, fmt.Errorf("store: clock: %w", err)
	}
	return us + c.offset().Microseconds(), nil
}

// markEvery is how far the clock may be ahead of its mark.
const markEvery = int64(time.Second / time.Microsecond)

type processClock struct {
	o ClockOptions

	mu      sync.Mutex
	started bool
	base    int64 // time when elapsed was 0
	mark    int64 // last read
}

// Now implements Clock.
func (c *processClock) Now(ctx context.Context, db bun.IDB) (int64, error) {
	c.mu.Lock()
	started := c.started
	now := c.now()
	due := now-c.mark >= markEvery
	c.mu.Unlock()
	_, writable := db.(bun.Tx)
	if started && (!due || !writable) {
		return now, nil
	}
	var text string
	if err := db.NewRaw("SELECT value FROM meta WHERE key = 'clock'").Scan(ctx, &text); err != nil {
		return 0, fmt.Errorf("store: clock: %w", err)
	}
	mark, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("store: clock: %w", err)
	}
	c.mu.Lock()
	if !c.started {
		c.started = true
		c.base = c.o.Wall().UnixMicro() - c.o.Elapsed().Microseconds()
	}
	// Another process may be ahead, after a jump of the time of day.
	c.base = max(c.base, mark-c.o.Offset().Microseconds()-c.o.Elapsed().Microseconds())
	now = c.now()
	c.mu.Unlock()
	if writable && now-mark >= markEvery {
		if _, err := db.NewRaw("UPDATE meta SET value = ? WHERE key = 'clock'", strconv.FormatInt(now, 10)).Exec(ctx); err != nil {
			return 0, fmt.Errorf("store: clock: %w", err)
		}
	}
	c.mu.Lock()
	c.mark = max(c.mark, mark) // as read: what was written may be rolled back
	c.mu.Unlock()
	return now, nil
}

func (c *processClock) now() int64 {
	return c.base + (c.o.Elapsed() + c.o.Offset()).Microseconds()
}
