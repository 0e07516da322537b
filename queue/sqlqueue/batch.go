package sqlqueue

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/queue"
)

// publication is one Publish call.
type publication struct {
	topic string
	msgs  []queue.Message
	bytes int
}

// verdict is what becomes of a claimed message.
type verdict int

const (
	ack       verdict = iota // deleted
	retry                    // ready again, after a delay perhaps
	unclaimed                // ready again, as if it had not been claimed
	bury                     // dead
)

// settlement is the verdict on one claimed message.
type settlement struct {
	id      int64
	gid     int64
	reader  string // who claimed it
	verdict verdict
	delay   time.Duration
	reason  string
	unsure  bool // an earlier try may have been applied
}

// want is a claim for n waiting readers of a group.
type want struct {
	g *group
	n int
}

// claimed is a message as the database returns it.
type claimed struct {
	id      int64
	attempt int
	msg     queue.Message
}

// batch is what goes into one transaction: callers' ops, then messages that
// became due, then claims. The claims see what the same transaction published,
// so that an idle reader costs no second one.
type batch struct {
	q   *Queue
	ops []*op

	task      *op
	publishes []*publication
	settles   []*op
	wants     []want
	promote   bool

	now    int64
	reader string              // this process, as the claims were made
	got    [][]claimed         // by index of wants
	woken  map[int64]struct{}  // groups whose messages became ready
	next   time.Duration       // until the next delayed message; < 0: none
	delays bool                // a message was delayed, other processes want to know
	topics map[string]struct{} // published to
}

// sort puts the ops where execute expects them.
func (b *batch) sort() {
	b.reader = b.q.readerID()
	b.now = b.q.now().UnixMicro()
	b.woken, b.topics = map[int64]struct{}{}, map[string]struct{}{}
	for _, o := range b.ops {
		switch {
		case o.task != nil:
			b.task = o
		case o.publish != nil:
			b.publishes = append(b.publishes, o.publish)
			b.topics[o.publish.topic] = struct{}{}
		case o.settle != nil:
			b.settles = append(b.settles, o)
		}
	}
}

// want adds the claims of readers that wait where there may be messages.
func (b *batch) want() {
	b.promote = b.q.alarm.rung.Swap(false)
	b.wants = b.q.wants(b.topics)
	b.got = make([][]claimed, len(b.wants))
}

func (b *batch) empty() bool { return len(b.ops) == 0 && len(b.wants) == 0 && !b.promote }

// execute runs the batch in one transaction. An error means that nothing was
// written, unless it wraps sqldb.ErrCommitUnknown.
func (b *batch) execute(ctx context.Context) error {
	if b.q.pg && b.task == nil && b.single() {
		return unknownIfLost(b.steps(ctx, b.q.db.DB)) // one round trip instead of three
	}
	conn, err := b.q.db.DB.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	if !b.q.pg && len(b.ops) == 0 {
		// What a crash of the machine undoes here is a claim, which it would
		// release anyway: no need to wait for the disk.
		restore, err := relax(ctx, conn)
		if err != nil {
			return err
		}
		defer restore()
	}
	tx, err := conn.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	if err := b.steps(ctx, tx); err != nil {
		_ = tx.Rollback() // the first error counts
		return err
	}
	return sqldb.Commit(tx.Commit())
}

// unknownIfLost marks the failure of a single statement that may have been
// applied.
func unknownIfLost(err error) error {
	if err == nil || definite(err) {
		return err
	}
	return fmt.Errorf("%w: %w", sqldb.ErrCommitUnknown, err)
}

// definite reports whether a failed statement certainly left nothing behind.
func definite(err error) bool {
	if errors.Is(err, sql.ErrTxDone) || errors.Is(err, driver.ErrBadConn) || errors.Is(err, sql.ErrConnDone) || pgconn.SafeToRetry(err) {
		return true
	}
	for _, unsent := range []error{sqldb.ErrRefused, sqldb.ErrUnreachable, sqldb.ErrHostNotFound, sqldb.ErrPoolTimeout, sqldb.ErrAuth, sqldb.ErrTLS, sqldb.ErrNoDatabase} {
		if errors.Is(err, unsent) {
			return true // there was no connection
		}
	}
	if pe, ok := errors.AsType[*pgconn.PgError](err); ok {
		// A session that is being ended (class 57) may have committed before.
		return !strings.HasPrefix(pe.Code, "57") && !strings.HasPrefix(pe.Code, "08")
	}
	if se, ok := errors.AsType[*sqlite.Error](err); ok {
		return se.Code()&0xff != sqlite3.SQLITE_IOERR
	}
	return false
}

// single reports whether steps certainly are one statement.
func (b *batch) single() bool {
	n, rows := len(b.wants), 0
	if b.promote {
		n += 2
	}
	for _, p := range b.publishes {
		rows += len(p.msgs)
	}
	n += (rows + maxRows - 1) / maxRows
	acks := 0
	for _, o := range b.settles {
		if o.settle.verdict == ack {
			acks = 1
		} else {
			n += 2
		}
	}
	return n+acks <= 1
}

// relax lets the connection commit without waiting for the disk until restore.
func relax(ctx context.Context, conn *sql.Conn) (restore func(), err error) {
	var was int
	if err := conn.QueryRowContext(ctx, "PRAGMA synchronous").Scan(&was); err != nil {
		return nil, err
	}
	if was <= 1 {
		return func() {}, nil
	}
	if _, err := conn.ExecContext(ctx, "PRAGMA synchronous = NORMAL"); err != nil {
		return nil, err
	}
	return func() {
		if _, err := conn.ExecContext(context.WithoutCancel(ctx), fmt.Sprintf("PRAGMA synchronous = %d", was)); err != nil {
			// Nobody may get this connection while it is less durable.
			_ = conn.Raw(func(any) error { return driver.ErrBadConn })
		}
	}, nil
}

func (b *batch) steps(ctx context.Context, tx execer) error {
	if b.task != nil {
		return b.task.task(ctx, tx)
	}
	if err := b.insert(ctx, tx); err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	if err := b.settle(ctx, tx); err != nil {
		return fmt.Errorf("settle: %w", err)
	}
	if b.promote {
		if err := b.ripen(ctx, tx); err != nil {
			return fmt.Errorf("delayed messages: %w", err)
		}
	}
	for i, w := range b.wants {
		var err error
		if b.got[i], err = b.claim(ctx, tx, w); err != nil {
			return fmt.Errorf("claim: %w", err)
		}
		slices.SortFunc(b.got[i], func(x, y claimed) int { return cmp.Compare(x.id, y.id) })
	}
	return nil
}

// committed hands out what was claimed and wakes whom the batch concerns.
func (b *batch) committed() {
	q := b.q
	for i, w := range b.wants {
		q.deliver(w, b.got[i], b.reader)
	}
	if b.promote {
		q.alarm.set(b.next)
	}
	for _, p := range b.publishes {
		q.announce(p, b.now)
	}
	for _, o := range b.settles {
		if o.settle.delay > 0 && o.settle.verdict == retry {
			q.alarm.set(o.settle.delay)
		}
	}
	q.stir(b.woken)
}

// failed takes back what want took.
func (b *batch) failed() {
	if b.promote {
		b.q.alarm.rung.Store(true)
	}
	woken := map[int64]struct{}{}
	for _, w := range b.wants {
		woken[w.g.id] = struct{}{}
	}
	b.q.stir(woken)
}
