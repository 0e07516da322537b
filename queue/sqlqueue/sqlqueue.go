// Package sqlqueue is a durable queue.Queue in the tables of a SQLite or
// PostgreSQL database, for programs that have one anyway and want no broker.
// Any number of processes may share the database.
//
// A published message is one row per group of its topic. A reader claims rows
// by marking them with the ID of its process, which moves a counter (its beat)
// in the database while it lives; when the beat stands still for a lease, as
// other processes observe it, the claims of that process are released. No
// clock takes part in that. A broadcast is a row per process that has
// broadcast readers, deleted as it is read.
//
// What concurrent callers want written goes into one transaction (group
// commit), so throughput grows with concurrency. Wake-ups within a process are
// immediate; other processes learn by LISTEN/NOTIFY on PostgreSQL, and on
// SQLite by watching PRAGMA data_version every few milliseconds.
//
// Acks and publications are as durable as the database is configured: use
// synchronous=FULL on SQLite. PostgreSQL needs the driver pgx
// (github.com/jackc/pgx/v5/stdlib). The pool has to allow at least four
// connections; a private in-memory SQLite database cannot be used.
package sqlqueue

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/stdlib"
	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/queue"
)

const (
	// claimMax is how many messages one group gets in one transaction.
	claimMax = 256
	// minConns is what the queue may need at once: its lanes and its watch.
	minConns = 4
	// closeTimeout bounds Close.
	closeTimeout = 5 * time.Second
)

// Options for New. The zero value is the default.
type Options struct {
	// Lease is how long the beat of a process has to stand still before its
	// claims are released; 0 means 15 s. All processes should agree.
	Lease time.Duration
	// Poll is how often a process looks for messages that no wake-up told it
	// of; 0 means 2 s.
	Poll time.Duration
	// SkipMigrate leaves the schema alone; see Migrate.
	SkipMigrate bool
	// Now is the clock for delays on SQLite; nil means time.Now. On PostgreSQL
	// the server's clock decides.
	Now func() time.Time
	// Logger: nil discards.
	Logger *slog.Logger
}

// Queue is a queue in a database. Make it with New.
type Queue struct {
	db  *bun.DB
	pg  bool
	o   Options
	now func() time.Time
	log *slog.Logger

	publishing, settling, claiming *lane // on SQLite all the same
	alarm                          *alarm

	closing   chan struct{} // closed by Close
	work      context.Context
	stopWork  context.CancelFunc // ends transactions that outlive Close's patience
	watching  context.Context    // ends with closing
	stopWatch context.CancelFunc
	wg        sync.WaitGroup
	closeErr  error
	closed    chan struct{} // Close is complete

	mu      sync.Mutex
	reader  string // this process in queue_readers
	started bool   // it is registered there; the background work runs
	known   map[string]bool
	groups  map[int64]*group
	hearers map[string]*hearers
	held    map[int64]struct{} // claims that are known here and not yet settled
}

// New returns a queue in db, which stays open when the queue is closed and
// must not be closed before it. It creates or updates its tables.
func New(ctx context.Context, db *bun.DB, o Options) (*Queue, error) {
	if o.Lease <= 0 {
		o.Lease = 15 * time.Second
	}
	if o.Poll <= 0 {
		o.Poll = 2 * time.Second
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if err := usable(ctx, db); err != nil {
		return nil, err
	}
	if !o.SkipMigrate {
		if err := Migrate(ctx, db); err != nil {
			return nil, err
		}
	}
	q := &Queue{
		db: db, pg: isPostgres(db), o: o, now: o.Now, log: o.Logger,
		closing: make(chan struct{}), closed: make(chan struct{}),
		reader: rand.Text(), known: map[string]bool{}, groups: map[int64]*group{},
		hearers: map[string]*hearers{}, held: map[int64]struct{}{},
	}
	q.work, q.stopWork = context.WithCancel(context.Background())
	q.watching, q.stopWatch = context.WithCancel(context.Background())
	q.claiming = newLane(q)
	q.claiming.claims = true
	q.publishing, q.settling = q.claiming, q.claiming
	lanes := []*lane{q.claiming}
	if q.pg {
		q.publishing, q.settling = newLane(q), newLane(q)
		lanes = append(lanes, q.publishing, q.settling)
	}
	q.alarm = newAlarm(q.claiming.wake)
	for _, l := range lanes {
		q.wg.Go(l.run)
	}
	return q, nil
}

// usable refuses databases that cannot work.
func usable(ctx context.Context, db *bun.DB) error {
	if n := db.Stats().MaxOpenConnections; n > 0 && n < minConns {
		return fmt.Errorf("sqlqueue: the pool allows %d connections, at least %d are needed", n, minConns)
	}
	if !isPostgres(db) {
		var file string
		row := db.DB.QueryRowContext(ctx, "SELECT file FROM pragma_database_list WHERE name = 'main'")
		if err := row.Scan(&file); err != nil {
			return fmt.Errorf("sqlqueue: %w", err)
		}
		if file == "" {
			return fmt.Errorf("sqlqueue: %w: in-memory SQLite database (see memqueue)", errors.ErrUnsupported)
		}
		return nil
	}
	conn, err := db.DB.Conn(ctx)
	if err != nil {
		return fmt.Errorf("sqlqueue: %w", err)
	}
	defer conn.Close()
	return conn.Raw(func(c any) error {
		if _, ok := c.(*stdlib.Conn); !ok {
			return fmt.Errorf("sqlqueue: %w: PostgreSQL driver connection %T, want pgx's stdlib", errors.ErrUnsupported, c)
		}
		return nil
	})
}

// Capabilities implements queue.Queue.
func (q *Queue) Capabilities() queue.Capabilities {
	return queue.Capabilities{Durable: true, MultiProcess: true, Delay: 20 * time.Millisecond, DeadLetters: true}
}

// Publish implements queue.Queue. All messages of one call are published, or
// none.
func (q *Queue) Publish(ctx context.Context, topic string, msgs []queue.Message, _ queue.PublishOptions) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if q.isClosed() {
		return queue.ErrClosed
	}
	msgs, err := queue.Prepare(topic, msgs)
	if err != nil || len(msgs) == 0 {
		return err
	}
	if err := q.know(ctx, topic); err != nil {
		return err
	}
	p := &publication{topic: topic, msgs: msgs}
	for i := range msgs {
		p.bytes += len(msgs[i].Body)
	}
	return q.publishing.do(ctx, &op{publish: p})
}

// know makes sure that the topic has a row that takes its messages, or says
// that nobody wants them.
func (q *Queue) know(ctx context.Context, topic string) error {
	q.mu.Lock()
	known := q.known[topic]
	q.mu.Unlock()
	if known {
		return nil
	}
	err := q.settling.do(ctx, &op{task: func(ctx context.Context, tx execer) error {
		if err := q.lockGroups(ctx, tx); err != nil {
			return err
		}
		return q.placeholder(ctx, tx, topic, kindKeeping)
	}})
	if err != nil {
		return fmt.Errorf("topic %s: %w", topic, err)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.known[topic] = true
	return nil
}

// lockGroups lets one process at a time register groups; SQLite's transactions
// do so by themselves.
func (q *Queue) lockGroups(ctx context.Context, tx execer) error {
	if !q.pg {
		return nil
	}
	s := newQuery(true)
	s.WriteString(`SELECT pg_advisory_xact_lock(` + s.arg(int64(lockKey)) + `)`)
	_, err := s.exec(ctx, tx)
	return err
}

// placeholder adds the row of a topic without groups.
func (q *Queue) placeholder(ctx context.Context, tx execer, topic string, kind int) error {
	s := newQuery(q.pg)
	s.WriteString(`INSERT INTO queue_groups (topic, name, kind) SELECT CAST(` + s.arg(topic) + ` AS TEXT), '', CAST(` + s.arg(kind) + ` AS SMALLINT)
		WHERE NOT EXISTS (SELECT 1 FROM queue_groups WHERE topic = ` + s.arg(topic) + ` AND kind IN (0, 1, 2))`)
	_, err := s.exec(ctx, tx)
	return err
}

func (q *Queue) readerID() string {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.reader
}

func (q *Queue) isClosed() bool {
	select {
	case <-q.closing:
		return true
	default:
		return false
	}
}

// Close implements queue.Queue. It waits at most a few seconds for transactions
// under way; when the database does not answer, the messages in hand are
// released after the lease and the error says why.
func (q *Queue) Close() error {
	q.mu.Lock()
	if q.isClosed() {
		q.mu.Unlock()
		<-q.closed
		return q.closeErr
	}
	close(q.closing)
	for _, g := range q.groups {
		for s := range g.subs {
			s.shut()
		}
	}
	for _, h := range q.hearers {
		for s := range h.subs {
			s.shut()
		}
	}
	started := q.started
	q.mu.Unlock()

	q.alarm.stop()
	q.stopWatch()
	patience := time.AfterFunc(closeTimeout, q.stopWork)
	q.wg.Wait()
	if started {
		q.closeErr = q.deregister()
	}
	patience.Stop()
	q.stopWork()
	close(q.closed)
	return q.closeErr
}

// deregister gives back everything this process holds.
func (q *Queue) deregister() error {
	b := &batch{q: q}
	b.task = &op{task: func(ctx context.Context, tx execer) error {
		return q.forget(ctx, tx, q.reader)
	}}
	err := retryBusy(q.work, func() error { return b.execute(q.work) })
	if err != nil {
		return fmt.Errorf("sqlqueue: close: %w", err)
	}
	return nil
}

var (
	_ queue.Queue        = (*Queue)(nil)
	_ queue.DeadLetterer = (*Queue)(nil)
)
