package sqlqueue

import (
	"context"
	"fmt"
	"strings"

	"github.com/uptrace/bun"
	"github.com/uptrace/bun/dialect"
	"github.com/uptrace/bun/migrate"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
)

// Kinds of rows in queue_groups.
const (
	kindGroup     = 0 // a group of competing consumers, for ever
	kindKeeping   = 1 // keeps messages for the group that comes first, which takes this row over
	kindKept      = 2 // the same, closed: a broadcast reader came first
	kindBroadcast = 3 // the broadcast readers of one process, gone with it
	kindGone      = 4 // a former broadcast row, until its messages are deleted
)

// schema, with {id} and {blob} standing for what the databases name
// differently. Every statement can be repeated, so that two processes which
// migrate at once do no harm. A message is one row per group: with one group
// per topic, which is the rule, that is the least to write.
var schema = []string{
	// Processes that read; beat moves while they live.
	`CREATE TABLE IF NOT EXISTS queue_readers (
		id TEXT PRIMARY KEY,
		beat BIGINT NOT NULL)`,
	`CREATE TABLE IF NOT EXISTS queue_groups (
		id {id},
		topic TEXT NOT NULL,
		name TEXT NOT NULL,
		kind SMALLINT NOT NULL,
		reader TEXT,
		UNIQUE (topic, name))`,
	// state: 0 ready, 1 delayed, 2 claimed, 3 dead; plain numbers in every
	// statement, so that the partial indexes below serve prepared ones too.
	// due: when a delayed message becomes ready, when a dead one died, in
	// microseconds since 1970. reader: who claimed it.
	`CREATE TABLE IF NOT EXISTS queue_messages (
		id {id},
		gid BIGINT NOT NULL,
		state SMALLINT NOT NULL,
		attempt INTEGER NOT NULL DEFAULT 0,
		due BIGINT NOT NULL DEFAULT 0,
		reader TEXT,
		reason TEXT,
		message_id TEXT NOT NULL,
		content_type TEXT NOT NULL,
		attributes TEXT NOT NULL,
		body {blob} NOT NULL)`,
	`CREATE INDEX IF NOT EXISTS queue_messages_ready ON queue_messages (gid, id) WHERE state = 0`,
	`CREATE INDEX IF NOT EXISTS queue_messages_delayed ON queue_messages (due) WHERE state = 1`,
	`CREATE INDEX IF NOT EXISTS queue_messages_claimed ON queue_messages (reader) WHERE state = 2`,
	`CREATE INDEX IF NOT EXISTS queue_messages_dead ON queue_messages (gid, due, id) WHERE state = 3`,
}

// lockKey is the advisory lock that PostgreSQL holds while groups are
// registered and while the schema changes: "solstice" as a number.
const lockKey = 0x736f6c7374696365

func isPostgres(db *bun.DB) bool { return db.Dialect().Name() == dialect.PG }

// Migrate creates or updates the queue's tables, whose names begin with
// queue_. Any number of processes may call it at once. New does it too unless
// told otherwise.
func Migrate(ctx context.Context, db *bun.DB) error {
	m, total := migrations(db)
	if applied, err := m.AppliedMigrations(ctx); err == nil && len(applied) == total {
		return nil // the usual case takes no lock and writes nothing
	}
	return alone(ctx, db, "migrate", func() error {
		if err := m.Init(ctx); err != nil {
			return err
		}
		_, err := m.Migrate(ctx)
		return err
	})
}

// Unmigrate removes what Migrate made, and with it all messages. No queue may be
// open on the database, in whichever process.
func Unmigrate(ctx context.Context, db *bun.DB) error {
	m, _ := migrations(db)
	return alone(ctx, db, "remove the tables", func() error {
		if err := m.Init(ctx); err != nil {
			return err
		}
		for {
			group, err := m.Rollback(ctx)
			if err != nil || group.IsZero() {
				return err
			}
		}
	})
}

func migrations(db *bun.DB) (m *migrate.Migrator, total int) {
	ms := migrate.NewMigrations()
	ms.Add(migrate.Migration{
		Name: "20261101000000", Comment: "queue",
		Up: func(ctx context.Context, m *migrate.Migrator, _ *migrate.Migration) error {
			return sqldb.InTx(ctx, m.DB(), createTables)
		},
		Down: func(ctx context.Context, m *migrate.Migrator, _ *migrate.Migration) error {
			return sqldb.InTx(ctx, m.DB(), dropTables)
		},
	})
	return migrate.NewMigrator(db, ms, migrate.WithTableName("queue_migrations"),
		migrate.WithLocksTableName("queue_migration_locks"), migrate.WithMarkAppliedOnSuccess(true), migrate.WithUpsert(true)), len(ms.Sorted())
}

// alone changes the schema while nobody else does. bun's own lock is a row that
// a killed process would leave behind. SQLite needs none: what two processes
// repeat changes nothing.
func alone(ctx context.Context, db *bun.DB, what string, change func() error) error {
	unlock, err := lockSchema(ctx, db)
	if err != nil {
		return err
	}
	defer unlock()
	if err := retryBusy(ctx, change); err != nil {
		return fmt.Errorf("sqlqueue: %s: %w", what, err)
	}
	return nil
}

func dropTables(ctx context.Context, tx bun.Tx) error {
	for _, table := range []string{"queue_messages", "queue_groups", "queue_readers"} {
		if _, err := tx.Tx.ExecContext(ctx, "DROP TABLE IF EXISTS "+table); err != nil {
			return err
		}
	}
	return nil
}

func createTables(ctx context.Context, tx bun.Tx) error {
	r := strings.NewReplacer("{id}", "INTEGER PRIMARY KEY AUTOINCREMENT", "{blob}", "BLOB")
	if tx.Dialect().Name() == dialect.PG {
		r = strings.NewReplacer("{id}", "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY", "{blob}", "BYTEA")
	}
	for _, s := range schema {
		if _, err := tx.Tx.ExecContext(ctx, r.Replace(s)); err != nil {
			return err
		}
	}
	return nil
}

// lockSchema lets one process at a time change the schema on PostgreSQL, where
// two CREATE TABLE IF NOT EXISTS at once can fail.
func lockSchema(ctx context.Context, db *bun.DB) (unlock func(), err error) {
	if !isPostgres(db) {
		return func() {}, nil
	}
	tx, err := db.DB.BeginTx(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("sqlqueue: migrate: %w", err)
	}
	if _, err := tx.ExecContext(ctx, "SELECT pg_advisory_xact_lock($1)", int64(lockKey)); err != nil {
		_ = tx.Rollback() // the first error counts
		return nil, fmt.Errorf("sqlqueue: migrate: %w", err)
	}
	return func() { _ = tx.Rollback() }, nil // it changed nothing
}

// retryBusy repeats f while SQLite says that somebody else is writing.
func retryBusy(ctx context.Context, f func() error) error {
	for try := 0; ; try++ {
		err := f()
		if err == nil || try == 20 || !sqldb.IsRetryable(err) {
			return err
		}
		if !sleep(ctx.Done(), backoff(try)) {
			return err
		}
	}
}
