package sqldb

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/uptrace/bun"
)

// group has transactions of one SQLite database share commits: what waits for
// its turn to write joins the transaction that has it, each below a savepoint
// of its own, and the wait for the disk is one for all. They run one after the
// other, so each sees what those before it did; where the commit fails, each is
// tried again alone. One connection does it all, since SQLite drops what a
// connection has cached when another one writes.
type group struct {
	timeout time.Duration // for the turn
	window  time.Duration // a group takes nobody in after that

	mu      sync.Mutex
	led     bool // somebody is in a transaction, or about to be
	waiting []*member
	conn    *bun.Conn // the leader's
	closed  bool
}

const (
	maxGroup    = 64
	groupWindow = 5 * time.Millisecond
)

// errGroup: nothing was written, which may be another transaction's fault.
var errGroup = errors.New("sqldb: the transaction was undone with others that shared its commit")

// member is a transaction that waits for its turn.
type member struct {
	alone  bool           // shares with nobody
	turn   chan bun.Tx    // the transaction to join
	lead   chan struct{}  // to begin one
	ran    chan runResult // buffered
	result chan error     // of the commit; buffered
}

type runResult int

const (
	undone runResult = iota // its part is undone
	joined                  // its part waits for the commit
	broken                  // the whole transaction is
)

// forGroup in a context asks the pool for the group's connection.
type forGroup struct{}

// groupOf gives the group of a database, or nil.
func groupOf(db *bun.DB) *group {
	p, ok := db.Driver().(*pool)
	if !ok {
		return nil
	}
	return p.group
}

type txFunc = func(ctx context.Context, tx bun.Tx) error

// tx is tryTx for a database with a group.
func (g *group) tx(ctx context.Context, db *bun.DB, fn txFunc, alone bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	g.mu.Lock()
	if !g.led {
		g.led = true
		g.mu.Unlock()
		return g.lead(ctx, db, fn, alone)
	}
	m := &member{alone: alone, turn: make(chan bun.Tx), lead: make(chan struct{}), ran: make(chan runResult, 1), result: make(chan error, 1)}
	g.waiting = append(g.waiting, m)
	g.mu.Unlock()
	late := time.NewTimer(g.timeout)
	defer late.Stop()
	select {
	case tx := <-m.turn:
		return m.join(ctx, tx, fn)
	case <-m.lead:
		return g.lead(ctx, db, fn, alone)
	case <-ctx.Done():
	case <-late.C:
	}
	g.mu.Lock()
	i := slices.Index(g.waiting, m)
	if i >= 0 {
		g.waiting = slices.Delete(g.waiting, i, i+1)
	}
	g.mu.Unlock()
	if i < 0 { // its turn came meanwhile
		select {
		case tx := <-m.turn:
			return m.join(ctx, tx, fn)
		case <-m.lead:
			return g.lead(ctx, db, fn, alone)
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return fmt.Errorf("begin: %w within %v: other transactions are writing", ErrPoolTimeout, g.timeout)
}

// next takes the first that waits, if it may join.
func (g *group) next() *member {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.waiting) == 0 || g.waiting[0].alone {
		return nil
	}
	m := g.waiting[0]
	g.waiting = slices.Delete(g.waiting, 0, 1)
	return m
}

// pass lets the first that waits begin the next transaction.
func (g *group) pass() {
	g.mu.Lock()
	if len(g.waiting) == 0 {
		g.led = false
		g.mu.Unlock()
		return
	}
	m := g.waiting[0]
	g.waiting = slices.Delete(g.waiting, 0, 1)
	g.mu.Unlock()
	m.lead <- struct{}{}
}

// lead runs fn in a transaction, has those that wait join it, and commits.
func (g *group) lead(ctx context.Context, db *bun.DB, fn txFunc, alone bool) error {
	defer g.pass()
	conn, err := g.connection(ctx, db)
	if err != nil {
		return err
	}
	// ctx ends the wait for the turn, and nothing after it: what others do in
	// the transaction does not depend on it. For statements see conn.enter.
	txctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := context.AfterFunc(ctx, cancel)
	tx, err := conn.BeginTx(txctx, nil)
	if err != nil {
		if cerr := ctx.Err(); cerr != nil {
			return cerr
		}
		return fmt.Errorf("begin: %w", err)
	}
	began, finished := time.Now(), false
	defer func() {
		if !finished && tx.Rollback() != nil { // fn failed or panicked
			g.drop()
		}
	}()
	if !stop() {
		return ctx.Err()
	}
	if err := fn(ctx, tx); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	var members []*member
	for !alone && len(members) < maxGroup && time.Since(began) < g.window {
		m := g.next()
		if m == nil {
			break
		}
		m.turn <- tx
		switch <-m.ran {
		case joined:
			members = append(members, m)
		case undone:
		case broken:
			for _, m := range members {
				m.result <- errGroup
			}
			return errGroup
		}
	}
	finished = true
	timer := time.AfterFunc(commitTimeout, cancel)
	defer timer.Stop()
	err = commit(tx)
	if err != nil && len(members) > 0 && !errors.Is(err, ErrCommitUnknown) {
		err = fmt.Errorf("%w: %w", errGroup, err)
	}
	for _, m := range members {
		m.result <- err
	}
	return err
}

// join runs fn below a savepoint of the leader's transaction, and waits for its
// commit.
func (m *member) join(ctx context.Context, tx bun.Tx, fn txFunc) error {
	err := m.run(ctx, tx, fn)
	if err != nil {
		return err
	}
	return <-m.result
}

func (m *member) run(ctx context.Context, tx bun.Tx, fn txFunc) (err error) {
	exec := func(sql string) error {
		_, err := tx.Tx.ExecContext(context.WithoutCancel(ctx), sql)
		return err
	}
	outcome := broken
	defer func() { m.ran <- outcome }()
	if err := ctx.Err(); err != nil {
		outcome = undone
		return err
	}
	if exec("SAVEPOINT member") != nil {
		return errGroup
	}
	defer func() {
		if outcome == joined {
			return
		}
		// fn failed or panicked. What undoes it may fail because SQLite has undone
		// the whole transaction already.
		if exec("ROLLBACK TO member") == nil && exec("RELEASE member") == nil {
			outcome = undone
		}
	}()
	if err := fn(ctx, tx); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if exec("RELEASE member") != nil {
		return errGroup
	}
	outcome = joined
	return nil
}

// connection is the leader's to call.
func (g *group) connection(ctx context.Context, db *bun.DB) (*bun.Conn, error) {
	g.mu.Lock()
	conn := g.conn
	g.mu.Unlock()
	if conn != nil {
		return conn, nil
	}
	c, err := db.Conn(context.WithValue(ctx, forGroup{}, true))
	if err != nil {
		return nil, fmt.Errorf("begin: %w", err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		_ = c.Close()
		return nil, fmt.Errorf("begin: %w", sql.ErrConnDone)
	}
	g.conn = &c
	return g.conn, nil
}

// drop has the next leader take a new connection.
func (g *group) drop() {
	g.mu.Lock()
	conn := g.conn
	g.conn = nil
	g.mu.Unlock()
	if conn != nil {
		_ = conn.Raw(func(any) error { return driver.ErrBadConn }) // so that nobody gets it
		_ = conn.Close()
	}
}

// close ends the group; a transaction that is under way is brought to its end.
func (g *group) close() error {
	g.mu.Lock()
	conn := g.conn
	g.conn, g.closed = nil, true
	g.mu.Unlock()
	if conn == nil {
		return nil
	}
	return conn.Close()
}
