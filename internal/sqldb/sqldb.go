// Package sqldb opens the databases that Solstice keeps its state in, SQLite
// and PostgreSQL, as one kind of *bun.DB, and hides how they differ: pooling
// with a bounded wait, fair queueing of SQLite's writers, transactions that
// retry what a retry cures, and errors that a daemon can turn into advice.
package sqldb

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/uptrace/bun"
	"github.com/uptrace/bun/dialect"
	"go.opentelemetry.io/otel/trace"
)

// Options for Open. The zero value is the default.
type Options struct {
	// MaxConns is the size of the pool; 0 means 16. A private in-memory
	// database always has one connection.
	MaxConns int
	// PoolTimeout bounds the wait for a connection, and on SQLite the wait for
	// the turn to write; beyond it statements fail with ErrPoolTimeout. 0 means
	// 5 s.
	PoolTimeout time.Duration
	// StatementTimeout bounds each statement; 0 means no bound.
	StatementTimeout time.Duration
	// ConnectTimeout bounds connecting to a server; 0 means 3 s.
	ConnectTimeout time.Duration
	// Name is what PostgreSQL shows as application_name; empty means solstice.
	Name string
	// Logger gets statements at debug level, sampled; nil discards.
	Logger *slog.Logger
	// TracerProvider makes a span per statement below spans that are recorded;
	// nil traces nothing.
	TracerProvider trace.TracerProvider
}

func (o Options) withDefaults() Options {
	if o.MaxConns <= 0 {
		o.MaxConns = 16
	}
	if o.PoolTimeout <= 0 {
		o.PoolTimeout = 5 * time.Second
	}
	if o.ConnectTimeout <= 0 {
		o.ConnectTimeout = 3 * time.Second
	}
	if o.Name == "" {
		o.Name = "solstice"
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}

// Open connects to a database and returns once it answered. The URL is one of
//
//	sqlite:PATH                           a file, made with mode 0600 when absent
//	sqlite::memory:                       private, gone with Close
//	postgres://USER[:PW]@HOST[:PORT]/DB   query parameters as in libpq (sslmode, sslrootcert, …)
//
// User, host and database have to be named: nothing comes from PG* variables,
// service files or the account. HOST may be empty when ?host= names a socket
// directory or several hosts. TLS is as the URL's sslmode says (libpq's default
// is prefer).
//
// Errors wrap ErrURL, ErrHostNotFound, ErrRefused, ErrUnreachable, ErrAuth,
// ErrNoDatabase, ErrTLS, ErrFile or ErrVersion where one of them applies; they
// hold no password.
func Open(ctx context.Context, url string, o Options) (*bun.DB, error) {
	o = o.withDefaults()
	var db *bun.DB
	var err error
	switch {
	case strings.HasPrefix(url, "sqlite:"):
		db, err = openSQLite(strings.TrimPrefix(url, "sqlite:"), o)
	case strings.HasPrefix(url, "postgres://"), strings.HasPrefix(url, "postgresql://"):
		db, err = openPostgres(url, o)
	default:
		return nil, fmt.Errorf("%w: it begins with neither sqlite: nor postgres://", ErrURL)
	}
	if err != nil {
		return nil, err
	}
	if err := firstContact(ctx, db, o); err != nil {
		_ = db.Close() // the first error says what is wrong
		return nil, err
	}
	return db.WithQueryHook(newHook(o, IsPostgres(db))), nil
}

// firstContact pings, and waits where another process is just creating the
// same SQLite file: switching to WAL reports busy without waiting.
func firstContact(ctx context.Context, db *bun.DB, o Options) error {
	deadline := time.Now().Add(o.PoolTimeout)
	for {
		err := db.PingContext(ctx)
		if err == nil && !IsPostgres(db) {
			err = checkSQLiteVersion(ctx, db)
		}
		if err == nil || !isSQLiteBusy(err) || time.Now().After(deadline) {
			return err
		}
		if err := pause(ctx, 1); err != nil {
			return err
		}
	}
}

// IsPostgres reports which of the two databases db, a transaction or a
// connection belongs to.
func IsPostgres(db bun.IDB) bool { return db.Dialect().Name() == dialect.PG }

// maxTries bounds how often InTx runs its function. With pause's delays that
// is about three seconds.
const maxTries = 12

// commitTimeout bounds a COMMIT, which no context of the caller interrupts.
const commitTimeout = 30 * time.Second

// InTx runs fn in a transaction and commits. On SQLite it waits for its turn to
// write before fn begins, and transactions that wait at the same time share
// a commit; fn sees what those before it wrote, and its statements are not
// interrupted by ctx. On PostgreSQL it is read committed.
//
// fn runs again, after a jittered pause and at most twelve times in all, when
// it or the commit failed in a way that IsRetryable says a repeat may cure; it
// must not leave traces outside the transaction, must return the errors it gets
// from tx, and must not use db itself while it runs.
//
// A ctx that ends before the commit rolls back. The commit itself is not
// interrupted by it. An error that wraps ErrCommitUnknown means that the
// connection was lost while committing: the caller has to read again, under an
// idempotency key or a version of its own, what became of it.
func InTx(ctx context.Context, db *bun.DB, fn func(ctx context.Context, tx bun.Tx) error) error {
	alone := false
	for try := 1; ; try++ {
		err := tryTx(ctx, db, fn, alone)
		alone = errors.Is(err, errGroup)
		if err == nil || try == maxTries || !IsRetryable(err) || ctx.Err() != nil {
			return err
		}
		if pause(ctx, try) != nil {
			return err
		}
	}
}

func tryTx(ctx context.Context, db *bun.DB, fn txFunc, alone bool) error {
	// The transaction's context ends with ctx only until the commit begins, so
	// that "cancelled" always means "not committed".
	if g := groupOf(db); g != nil {
		return g.tx(ctx, db, fn, alone)
	}
	txctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := context.AfterFunc(ctx, cancel)
	defer stop()

	tx, err := db.BeginTx(txctx, nil)
	if err != nil {
		if cerr := ctx.Err(); cerr != nil {
			return cerr
		}
		return fmt.Errorf("begin: %w", err)
	}
	finished := false
	defer func() {
		if !finished { // fn failed or panicked
			_ = tx.Rollback() // its failure breaks the connection, which rolls back too
		}
	}()
	if err := fn(ctx, tx); err != nil {
		return err
	}
	if !stop() {
		return ctx.Err()
	}
	timer := time.AfterFunc(commitTimeout, cancel)
	defer timer.Stop()
	finished = true
	return commit(tx)
}

func commit(tx bun.Tx) error {
	return Commit(tx.Commit())
}

// Commit says of the error of a COMMIT whether the transaction may have
// happened: it wraps ErrCommitUnknown then.
func Commit(err error) error {
	switch {
	case err == nil:
		return nil
	case isDefinite(err):
		return fmt.Errorf("commit: %w", err)
	}
	return fmt.Errorf("%w: %w", ErrCommitUnknown, err)
}

// Settle finds out what became of a transaction whose InTx failed with err.
// Where that wraps ErrCommitUnknown it has read look for what the transaction
// wrote, and look again while the database cannot be reached, for at most
// patience; nil means that it is there. read may be a transaction. Otherwise err is
// returned: what found nothing without waiting for the transaction's locks does
// not say that the commit is not under way.
func Settle(ctx context.Context, err error, patience time.Duration, read func(ctx context.Context) error) error {
	if !errors.Is(err, ErrCommitUnknown) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for try := 1; ; try++ {
		rerr := read(ctx)
		if rerr == nil {
			return nil
		}
		if !IsRetryable(rerr) && !errors.Is(rerr, ErrCommitUnknown) || pause(ctx, try) != nil {
			return err
		}
	}
}

// pause waits before the next try: 2 ms doubled per try up to 500 ms, of which
// a random half is left out.
func pause(ctx context.Context, try int) error {
	d := min(time.Millisecond<<min(try, 9), 500*time.Millisecond)
	t := time.NewTimer(d/2 + rand.N(d/2))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// errorsIsAny reports whether err is one of targets.
func errorsIsAny(err error, targets ...error) bool {
	for _, t := range targets {
		if errors.Is(err, t) {
			return true
		}
	}
	return false
}
