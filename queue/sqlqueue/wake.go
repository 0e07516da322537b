package sqlqueue

import (
	"context"
	"database/sql"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/stdlib"
)

// filePeriod is how often a SQLite file is checked for commits of other
// processes; those of this one need no check.
const filePeriod = 20 * time.Millisecond

// maxAlarm bounds the wait for a delayed message, so that a changed clock is
// noticed.
const maxAlarm = time.Minute

// alarm has delayed messages made ready when they are due.
type alarm struct {
	wake func()
	rung atomic.Bool // due: taken by the next batch that claims

	mu      sync.Mutex
	timer   *time.Timer
	at      time.Time // when it rings; zero: not set
	stopped bool
}

func newAlarm(wake func()) *alarm { return &alarm{wake: wake} }

// set has the alarm ring after d, unless it rings earlier anyway. A negative d
// is ignored.
func (a *alarm) set(d time.Duration) {
	if d < 0 {
		return
	}
	d = min(d, maxAlarm)
	a.mu.Lock()
	defer a.mu.Unlock()
	at := time.Now().Add(d)
	if a.stopped || !a.at.IsZero() && !at.Before(a.at) {
		return
	}
	if a.timer != nil {
		a.timer.Stop()
	}
	a.at = at
	a.timer = time.AfterFunc(d, a.ring)
}

func (a *alarm) ring() {
	a.mu.Lock()
	a.at = time.Time{}
	stopped := a.stopped
	a.mu.Unlock()
	if !stopped {
		a.rung.Store(true)
		a.wake()
	}
}

func (a *alarm) stop() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stopped = true
	if a.timer != nil {
		a.timer.Stop()
	}
}

// watched lists the groups where readers wait although nothing is known to be
// ready, or broadcasts are heard.
func (q *Queue) watched() (ids []int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for id, g := range q.groups {
		if !g.dirty && (g.name == "" || len(g.waiters) > 0) {
			ids = append(ids, id)
		}
	}
	return ids
}

// look finds, without writing, what wake-ups may have missed.
func (q *Queue) look(ctx context.Context, on execer) error {
	if ids := q.watched(); len(ids) > 0 {
		s := newQuery(q.pg)
		s.WriteString(`SELECT g.id FROM queue_groups g WHERE ` + s.in("g.id", ids) +
			` AND EXISTS (SELECT 1 FROM queue_messages m WHERE m.gid = g.id AND m.state = 0)`)
		ready, err := s.ints(ctx, on)
		if err != nil {
			return err
		}
		woken := map[int64]struct{}{}
		for _, id := range ready {
			woken[id] = struct{}{}
		}
		q.stir(woken)
	}
	return q.lookDue(ctx, on)
}

func (q *Queue) lookDue(ctx context.Context, on execer) error {
	next, err := nextDue(ctx, on, q.pg, q.now().UnixMicro())
	if err == nil {
		q.alarm.set(next)
	}
	return err
}

// keep runs watch on a connection of its own until the queue is closed.
func (q *Queue) keep(what string, watch func(ctx context.Context, conn *sql.Conn) error) {
	ctx := q.watching
	for fails := 0; ctx.Err() == nil; fails++ {
		conn, err := q.db.DB.Conn(ctx)
		if err == nil {
			start := time.Now()
			err = watch(ctx, conn)
			_ = conn.Close() // the watch's error counts
			if time.Since(start) > maxAlarm {
				fails = 0
			}
		}
		if ctx.Err() == nil {
			q.log.Warn("queue: lost the watch for other processes, trying again", "watch", what, "error", err)
			sleep(ctx.Done(), backoff(fails+4))
		}
	}
}

// watchFile sees commits of other processes, and of this one, by a counter that
// SQLite keeps per connection (https://www.sqlite.org/pragma.html#pragma_data_version).
func (q *Queue) watchFile() {
	q.keep("data_version", func(ctx context.Context, conn *sql.Conn) error {
		tick := time.NewTicker(filePeriod)
		defer tick.Stop()
		last, looked := int64(-1), time.Time{}
		stmt, err := conn.PrepareContext(ctx, "PRAGMA data_version")
		if err != nil {
			return err
		}
		defer stmt.Close()
		for {
			var version int64
			if err := stmt.QueryRowContext(ctx).Scan(&version); err != nil {
				return err
			}
			if version != last || time.Since(looked) > q.o.Poll {
				if err := q.look(ctx, conn); err != nil {
					return err
				}
				last, looked = version, time.Now()
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	})
}

// listen hears notifications of other processes.
func (q *Queue) listen() {
	q.keep("LISTEN", func(ctx context.Context, conn *sql.Conn) error {
		return conn.Raw(func(c any) error {
			pc := c.(*stdlib.Conn).Conn() // checked by New
			if _, err := pc.Exec(ctx, "LISTEN "+channel); err != nil {
				return err
			}
			q.mu.Lock()
			q.dirtyAll() // what came while nobody listened
			q.mu.Unlock()
			q.alarm.set(0)
			for {
				wctx, cancel := context.WithTimeout(ctx, q.o.Poll)
				n, err := pc.WaitForNotification(wctx)
				cancel()
				switch {
				case err == nil:
					err = q.notified(ctx, n.Payload)
				case ctx.Err() != nil:
					// The connection must not go on listening in the pool.
					_ = pc.Close(context.WithoutCancel(ctx))
					return ctx.Err()
				case wctx.Err() != nil:
					err = q.look(ctx, q.db.DB)
				}
				if err != nil {
					_ = pc.Close(context.WithoutCancel(ctx))
					return err
				}
			}
		})
	})
}

// notified reads a payload; channel says what it is.
func (q *Queue) notified(ctx context.Context, payload string) error {
	f := strings.Split(payload, " ")
	if len(f) < 2 || f[0] == q.readerID() {
		return nil
	}
	if len(f) == 3 && f[2] == "d" {
		if err := q.lookDue(ctx, q.db.DB); err != nil {
			return err
		}
	}
	if f[1] == "*" {
		q.mu.Lock()
		q.dirtyAll()
		q.mu.Unlock()
		return nil
	}
	woken := map[int64]struct{}{}
	for s := range strings.SplitSeq(f[1], ",") {
		if id, err := strconv.ParseInt(s, 10, 64); err == nil {
			woken[id] = struct{}{}
		} else if s != "" {
			return fmt.Errorf("notification %q: %w", payload, err)
		}
	}
	q.stir(woken)
	return nil
}
