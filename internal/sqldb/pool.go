package sqldb

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

// pool keeps SQLite's connections below database/sql, whose own pool waits
// without a bound, and has them take turns to write.
type pool struct {
	driver.Connector
	path      string
	max       int
	timeout   time.Duration // for a connection or a turn
	statement time.Duration // 0: unbounded
	slots     *semaphore.Weighted
	writers   *gate
	group     *group // nil where there is one connection only

	mu     sync.Mutex
	idle   []*conn
	closed bool
}

func newPool(c driver.Connector, path string, o Options) *pool {
	p := &pool{
		Connector: c, path: path, max: o.MaxConns,
		timeout: o.PoolTimeout, statement: o.StatementTimeout,
		slots: semaphore.NewWeighted(int64(o.MaxConns)), writers: gateFor(path),
	}
	if path != memory {
		p.group = &group{timeout: o.PoolTimeout, window: groupWindow}
	}
	return p
}

// Driver implements driver.Connector, and leads from a *sql.DB to its pool.
func (p *pool) Driver() driver.Driver { return p }

// Open implements driver.Driver.
func (p *pool) Open(string) (driver.Conn, error) { return p.Connect(context.Background()) }

// Connect implements driver.Connector: an idle connection or a new one.
func (p *pool) Connect(ctx context.Context) (driver.Conn, error) {
	if ctx.Value(forGroup{}) != nil { // beside the others
		return p.dial(ctx, true)
	}
	if err := acquire(ctx, p.slots, p.timeout); err != nil {
		if errors.Is(err, ErrPoolTimeout) {
			err = fmt.Errorf("%w: all %d connections are in use", err, p.max)
		}
		return nil, err
	}
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		p.slots.Release(1)
		return nil, errors.New("sqldb: database is closed")
	}
	if n := len(p.idle); n > 0 {
		c := p.idle[n-1]
		p.idle = p.idle[:n-1]
		p.mu.Unlock()
		return c, nil
	}
	p.mu.Unlock()
	c, err := p.dial(ctx, false)
	if err != nil {
		p.slots.Release(1)
	}
	return c, err
}

func (p *pool) dial(ctx context.Context, grouped bool) (driver.Conn, error) {
	dc, err := p.Connector.Connect(ctx)
	if err != nil {
		return nil, classifySQLite(err, p.path)
	}
	return &conn{sqliteConn: dc.(sqliteConn), pool: p, grouped: grouped}, nil
}

// put takes a connection back from database/sql.
func (p *pool) put(c *conn) error {
	if c.grouped {
		c.forget()
		return c.sqliteConn.Close()
	}
	defer p.slots.Release(1)
	p.mu.Lock()
	if !p.closed && c.IsValid() {
		p.idle = append(p.idle, c)
		p.mu.Unlock()
		return nil
	}
	p.mu.Unlock()
	c.forget()
	return c.sqliteConn.Close()
}

// Close implements io.Closer; sql.DB.Close calls it. Connections in use are
// closed when they come back.
func (p *pool) Close() error {
	p.mu.Lock()
	idle := p.idle
	again := p.closed
	p.idle, p.closed = nil, true
	p.mu.Unlock()
	var errs []error
	if p.group != nil {
		errs = append(errs, p.group.close())
	}
	for _, c := range idle {
		c.forget()
		errs = append(errs, c.sqliteConn.Close())
	}
	if !again {
		p.writers.leave()
	}
	return errors.Join(errs...)
}

var _ io.Closer = (*pool)(nil)

// acquire takes one of s's tokens, in order of arrival.
func acquire(ctx context.Context, s *semaphore.Weighted, timeout time.Duration) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.TryAcquire(1) { // only when nobody waits
		return nil
	}
	wctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := s.Acquire(wctx, 1); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%w within %v", ErrPoolTimeout, timeout)
	}
	return nil
}

// gate lets one writer at a time into a database file, in order of arrival,
// over all pools of this process that opened it. Without it writers poll for
// SQLite's lock, and some starve.
type gate struct {
	*semaphore.Weighted
	path  string
	users int
}

// gates has to be global because file locks are: what it orders is this
// process's access to a file.
var gates = struct {
	sync.Mutex
	m map[string]*gate
}{m: map[string]*gate{}}

func gateFor(path string) *gate {
	gates.Lock()
	defer gates.Unlock()
	g := gates.m[path]
	if g == nil || path == memory {
		g = &gate{Weighted: semaphore.NewWeighted(1), path: path}
		if path != memory {
			gates.m[path] = g
		}
	}
	g.users++
	return g
}

func (g *gate) leave() {
	gates.Lock()
	defer gates.Unlock()
	if g.users--; g.users == 0 && gates.m[g.path] == g {
		delete(gates.m, g.path)
	}
}
