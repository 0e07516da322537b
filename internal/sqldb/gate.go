package sqldb

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"reflect"
	"strings"
)

// sqliteConn is what a connection of modernc.org/sqlite can do and
// database/sql makes use of.
type sqliteConn interface {
	driver.Conn
	driver.ConnPrepareContext
	driver.ExecerContext
	driver.QueryerContext
	driver.ConnBeginTx
	driver.Pinger
	driver.SessionResetter
	driver.Validator
}

var errReadOnlyTx = errors.New("sqldb: write in a read-only transaction")

// txMode says which transaction a connection is in.
type txMode int

const (
	noTx txMode = iota
	readTx
	writeTx
)

// conn takes the turn to write around transactions, and around single
// statements outside of them. Like every driver.Conn it is used by one
// goroutine at a time.
type conn struct {
	sqliteConn
	pool     *pool
	grouped  bool // the group's
	mode     txMode
	prepared map[string]*prepared // by text
}

// Close gives the connection back to the pool.
func (c *conn) Close() error { return c.pool.put(c) }

// turn waits until this connection may write.
func (c *conn) turn(ctx context.Context) (done func(), err error) {
	if err := acquire(ctx, c.pool.writers.Weighted, c.pool.timeout); err != nil {
		if errors.Is(err, ErrPoolTimeout) {
			err = fmt.Errorf("%w: other transactions are writing", err)
		}
		return nil, err
	}
	return func() { c.pool.writers.Release(1) }, nil
}

// BeginTx implements driver.ConnBeginTx. A read-only transaction does not wait
// for writers.
func (c *conn) BeginTx(ctx context.Context, o driver.TxOptions) (driver.Tx, error) {
	done := func() {}
	mode := readTx
	if !o.ReadOnly {
		mode = writeTx
		var err error
		if done, err = c.turn(ctx); err != nil {
			return nil, err
		}
	}
	t, err := c.sqliteConn.BeginTx(ctx, o)
	if err != nil {
		done()
		return nil, err
	}
	c.mode = mode
	return &tx{Tx: t, conn: c, done: done}, nil
}

type tx struct {
	driver.Tx
	conn *conn
	done func()
}

// Commit implements driver.Tx.
func (t *tx) Commit() error {
	defer t.end()
	return t.Tx.Commit()
}

// Rollback implements driver.Tx.
func (t *tx) Rollback() error {
	defer t.end()
	return t.Tx.Rollback()
}

func (t *tx) end() {
	t.conn.mode = noTx
	t.done()
}

// enter prepares for one statement; leave ends it.
func (c *conn) enter(ctx context.Context, query string) (_ context.Context, leave func(), err error) {
	done := func() {}
	if c.grouped { // interrupting one's statement would undo what others did
		ctx = context.WithoutCancel(ctx)
	}
	if !isRead(query) {
		switch c.mode {
		case readTx:
			return nil, nil, errReadOnlyTx
		case noTx:
			if done, err = c.turn(ctx); err != nil {
				return nil, nil, err
			}
		}
	}
	if c.pool.statement <= 0 {
		return ctx, done, nil
	}
	ctx, cancel := context.WithTimeout(ctx, c.pool.statement)
	return ctx, func() { cancel(); done() }, nil
}

// ExecContext implements driver.ExecerContext.
func (c *conn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	ctx, leave, err := c.enter(ctx, query)
	if err != nil {
		return nil, err
	}
	defer leave()
	if p, values, done := c.prepare(ctx, query, args); p != nil {
		defer done()
		return p.Stmt.(driver.StmtExecContext).ExecContext(ctx, values)
	}
	return c.sqliteConn.ExecContext(ctx, query, args)
}

// QueryContext implements driver.QueryerContext.
func (c *conn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	ctx, leave, err := c.enter(ctx, query)
	if err != nil {
		return nil, err
	}
	var r driver.Rows
	if p, values, done := c.prepare(ctx, query, args); p != nil {
		before := leave
		leave = func() { done(); before() }
		r, err = p.Stmt.(driver.StmtQueryContext).QueryContext(ctx, values)
	} else {
		r, err = c.sqliteConn.QueryContext(ctx, query, args)
	}
	if err != nil {
		leave()
		return nil, err
	}
	return &rows{Rows: r, leave: leave}, nil
}

// PrepareContext implements driver.ConnPrepareContext.
func (c *conn) PrepareContext(ctx context.Context, query string) (driver.Stmt, error) {
	s, err := c.sqliteConn.PrepareContext(ctx, query)
	if err != nil {
		return nil, err
	}
	return &stmt{Stmt: s, conn: c, query: query}, nil
}

// stmt is a prepared statement; each of its executions takes its turn.
type stmt struct {
	driver.Stmt
	conn  *conn
	query string
}

// ExecContext implements driver.StmtExecContext.
func (s *stmt) ExecContext(ctx context.Context, args []driver.NamedValue) (driver.Result, error) {
	ctx, leave, err := s.conn.enter(ctx, s.query)
	if err != nil {
		return nil, err
	}
	defer leave()
	return s.Stmt.(driver.StmtExecContext).ExecContext(ctx, args)
}

// QueryContext implements driver.StmtQueryContext.
func (s *stmt) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	ctx, leave, err := s.conn.enter(ctx, s.query)
	if err != nil {
		return nil, err
	}
	r, err := s.Stmt.(driver.StmtQueryContext).QueryContext(ctx, args)
	if err != nil {
		leave()
		return nil, err
	}
	return &rows{Rows: r, leave: leave}, nil
}

// rows keeps the turn until they are closed: a statement that writes and
// returns rows holds SQLite's lock until then.
type rows struct {
	driver.Rows
	leave func()
}

// Close implements driver.Rows; database/sql calls it once.
func (r *rows) Close() error {
	defer r.leave()
	return r.Rows.Close()
}

// ColumnTypeDatabaseTypeName implements driver.RowsColumnTypeDatabaseTypeName.
func (r *rows) ColumnTypeDatabaseTypeName(i int) string {
	return r.Rows.(driver.RowsColumnTypeDatabaseTypeName).ColumnTypeDatabaseTypeName(i)
}

// ColumnTypeScanType implements driver.RowsColumnTypeScanType.
func (r *rows) ColumnTypeScanType(i int) reflect.Type {
	return r.Rows.(driver.RowsColumnTypeScanType).ColumnTypeScanType(i)
}

// isRead reports whether a statement certainly writes nothing. A doubtful one
// counts as a write, which costs it a turn.
func isRead(query string) bool {
	q := strings.TrimLeft(query, " \t\r\n(")
	word := q
	if i := strings.IndexFunc(q, func(r rune) bool { return r < 'A' || r > 'z' }); i >= 0 {
		word = q[:i]
	}
	if i := strings.IndexByte(q, ';'); i >= 0 && strings.TrimSpace(q[i+1:]) != "" {
		return false // more than one statement, or a semicolon in a string
	}
	switch strings.ToUpper(word) {
	case "SELECT", "VALUES", "EXPLAIN", "PRAGMA":
		return true
	case "SAVEPOINT", "RELEASE", "ROLLBACK": // nested transactions
		return true
	case "WITH":
		q = strings.ToUpper(q)
		for _, w := range []string{"INSERT", "UPDATE", "DELETE", "REPLACE"} {
			if strings.Contains(q, w) {
				return false
			}
		}
		return true
	}
	return false
}
