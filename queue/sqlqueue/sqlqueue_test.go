package sqlqueue_test

import (
	"context"
	"database/sql"
	"slices"
	"strings"
	"testing"

	"github.com/uptrace/bun"
	"github.com/uptrace/bun/dialect/sqlitedialect"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/queuetest"
	"github.com/solstice-ci/solstice-go/queue/sqlqueue"
)

// open opens a database that is closed after everything that tb cleans up
// later.
func open(tb queuetest.TB, url string) *bun.DB {
	db, err := sqldb.Open(context.Background(), url, sqldb.Options{})
	if err != nil {
		tb.Fatalf("open: %v", err)
	}
	tb.Cleanup(func() { _ = db.Close() })
	return db
}

func newQueue(tb queuetest.TB, db *bun.DB, o sqlqueue.Options) *sqlqueue.Queue {
	q, err := sqlqueue.New(context.Background(), db, o)
	if err != nil {
		tb.Fatalf("New: %v", err)
	}
	return q
}

// harness runs the suite on databases that url makes.
func harness(url func(t testing.TB) string, open func(tb queuetest.TB, url string) *bun.DB) queuetest.Harness {
	urls := map[queue.Queue]string{}
	at := func(tb queuetest.TB, url string) queue.Queue {
		q := newQueue(tb, open(tb, url), sqlqueue.Options{})
		urls[q] = url
		return q
	}
	again := func(tb queuetest.TB, q queue.Queue) queue.Queue { return at(tb, urls[q]) }
	return queuetest.Harness{
		New:    func(tb queuetest.TB) queue.Queue { return at(tb, url(tb.(testing.TB))) },
		Reopen: again,
		Second: again,
	}
}

func TestConformance(t *testing.T) {
	t.Run("sqlite", func(t *testing.T) { queuetest.Run(t, harness(testenv.SQLite, open)) })
	t.Run("postgres", func(t *testing.T) { queuetest.Run(t, harness(testenv.Postgres, open)) })
	t.Run("stranger's sqlite", func(t *testing.T) { queuetest.Run(t, harness(testenv.SQLite, openPlain)) })
}

// openPlain opens a file as a program without sqldb would: no gate, deferred
// transactions.
func openPlain(tb queuetest.TB, url string) *bun.DB {
	db, err := sql.Open("sqlite", strings.TrimPrefix(url, "sqlite:")+"?_pragma=busy_timeout(5000)&_pragma=journal_mode(wal)")
	if err != nil {
		tb.Fatalf("open: %v", err)
	}
	db.SetMaxOpenConns(4)
	tb.Cleanup(func() { _ = db.Close() })
	return bun.NewDB(db, sqlitedialect.New())
}

// TestUnmigrate: the tables go, and come again, empty.
func TestUnmigrate(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		ctx := t.Context()
		db := open(t, url)
		tables := func() (names []string) {
			t.Helper()
			query := "SELECT name FROM sqlite_master WHERE name LIKE 'queue%' AND name NOT LIKE 'queue_migration%' ORDER BY name"
			if sqldb.IsPostgres(db) {
				query = "SELECT relname FROM pg_class WHERE relname LIKE 'queue%' AND relname NOT LIKE 'queue_migration%' ORDER BY relname"
			}
			if err := db.NewRaw(query).Scan(ctx, &names); err != nil {
				t.Fatal(err)
			}
			return names
		}
		if err := sqlqueue.Unmigrate(ctx, db); err != nil {
			t.Errorf("of an empty database: %v", err)
		}
		var before []string
		for range 2 {
			q := newQueue(t, db, sqlqueue.Options{})
			publish(t, q, "1")
			if err := q.Close(); err != nil {
				t.Error(err)
			}
			if now := tables(); before != nil && !slices.Equal(now, before) || len(now) == 0 {
				t.Errorf("tables %v, before %v", now, before)
			}
			var n int
			if err := db.NewRaw("SELECT count(*) FROM queue_messages").Scan(ctx, &n); err != nil || n != 1 {
				t.Errorf("%d messages, %v, want 1", n, err)
			}
			before = tables()
			for range 2 {
				if err := sqlqueue.Unmigrate(ctx, db); err != nil {
					t.Fatal(err)
				}
				if left := tables(); len(left) > 0 {
					t.Errorf("left: %v", left)
				}
			}
		}
	})
}
