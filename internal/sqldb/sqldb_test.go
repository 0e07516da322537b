package sqldb_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/uptrace/bun"
	"go.uber.org/goleak"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, url string, o sqldb.Options) *bun.DB {
	t.Helper()
	db, err := sqldb.Open(t.Context(), url, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return db
}

func exec(t *testing.T, db bun.IDB, q string, args ...any) {
	t.Helper()
	if _, err := db.NewRaw(q, args...).Exec(t.Context()); err != nil {
		t.Fatalf("%s: %v", q, err)
	}
}

func scan[T any](t *testing.T, db bun.IDB, q string, args ...any) T {
	t.Helper()
	var v T
	if err := db.NewRaw(q, args...).Scan(t.Context(), &v); err != nil {
		t.Fatalf("%s: %v", q, err)
	}
	return v
}

func TestURLErrorsHoldNoPassword(t *testing.T) {
	for _, url := range []string{
		"", "mysql://root:s3cret@h/db", "sqlite:",
		"postgres://u:s3cret@h:99999999/db", "postgres://u:s3cr%zzet@h/db", "postgres://u:s3cret@/db",
		"postgres://:s3cret@h/db", "postgres://u:s3cret@h/", "postgres://u:s3cret@h/db?sslmode=maybe",
		"postgres://u:s3cret@h/db?service=x", "postgres://u:s3cret@h/db?servicefile=/x",
		"postgres://u:s3cret@h/db?sslrootcert=/does/not/exist",
	} {
		db, err := sqldb.Open(t.Context(), url, sqldb.Options{})
		if !errors.Is(err, sqldb.ErrURL) {
			t.Errorf("%q: %v, want ErrURL", url, err)
		}
		if err == nil {
			db.Close()
		} else if strings.Contains(err.Error(), "s3cret") || strings.Contains(err.Error(), "s3cr%zzet") {
			t.Errorf("%q: the error tells the password: %v", url, err)
		}
	}
}

func TestPragmas(t *testing.T) {
	db := open(t, testenv.SQLite(t), sqldb.Options{})
	for pragma, want := range map[string]string{
		"journal_mode": "wal", "synchronous": "2", "foreign_keys": "1", "busy_timeout": "5000",
	} {
		if got := scan[string](t, db, "PRAGMA "+pragma); got != want {
			t.Errorf("%s is %s, want %s", pragma, got, want)
		}
	}
	if _, err := db.ExecContext(t.Context(), `SELECT "mistyped"`); err == nil {
		t.Error("an unknown name in double quotes is taken for a string")
	}
}

func TestSQLiteFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "odd ?#% näme.db")
	db := open(t, "sqlite:"+path, sqldb.Options{})
	exec(t, db, "CREATE TABLE t (x INTEGER)")
	for _, suffix := range []string{"", "-wal"} {
		fi, err := os.Stat(path + suffix)
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode().Perm() != 0o600 {
			t.Errorf("%s%s has mode %v", path, suffix, fi.Mode())
		}
	}
	if _, err := sqldb.Open(t.Context(), "sqlite:"+filepath.Join(dir, "no", "such", "dir.db"), sqldb.Options{}); !errors.Is(err, sqldb.ErrFile) {
		t.Errorf("missing directory: %v, want ErrFile", err)
	}
	junk := filepath.Join(dir, "junk.db")
	if err := os.WriteFile(junk, []byte(strings.Repeat("this is no database ", 100)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := sqldb.Open(t.Context(), "sqlite:"+junk, sqldb.Options{}); !errors.Is(err, sqldb.ErrFile) {
		t.Errorf("not a database: %v, want ErrFile", err)
	}
}

func TestMemoryIsPrivate(t *testing.T) {
	a, b := open(t, "sqlite::memory:", sqldb.Options{}), open(t, "sqlite::memory:", sqldb.Options{})
	exec(t, a, "CREATE TABLE t (x INTEGER)")
	exec(t, b, "CREATE TABLE t (x INTEGER)")
	exec(t, a, "INSERT INTO t VALUES (1)")
	if n := scan[int](t, b, "SELECT count(*) FROM t"); n != 0 {
		t.Errorf("the other database has %d rows", n)
	}
}

// Two pools of one process and of one file share the gate.
func TestWritersTakeTurns(t *testing.T) {
	url := testenv.SQLite(t)
	a, b := open(t, url, sqldb.Options{PoolTimeout: time.Minute}), open(t, url, sqldb.Options{PoolTimeout: time.Minute})
	exec(t, a, "CREATE TABLE t (x INTEGER)")
	exec(t, a, "INSERT INTO t VALUES (0)")
	exec(t, a, "PRAGMA busy_timeout = 0") // one connection of sixteen: its turns must never collide
	var wg sync.WaitGroup
	const writers, each = 20, 10
	for i := range writers {
		db := a
		if i%2 == 1 {
			db = b
		}
		wg.Go(func() {
			for range each {
				err := sqldb.InTx(t.Context(), db, func(ctx context.Context, tx bun.Tx) error {
					x := 0
					if err := tx.NewRaw("SELECT x FROM t").Scan(ctx, &x); err != nil {
						return err
					}
					_, err := tx.NewRaw("UPDATE t SET x = ?", x+1).Exec(ctx)
					return err
				})
				if err != nil {
					t.Error(err)
				}
				if _, err := db.ExecContext(t.Context(), "UPDATE t SET x = x + 1"); err != nil {
					t.Error(err)
				}
				var x int
				if err := db.NewRaw("UPDATE t SET x = x + 1 RETURNING x").Scan(t.Context(), &x); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if x := scan[int](t, a, "SELECT x FROM t"); x != 3*writers*each {
		t.Errorf("%d increments, want %d", x, 3*writers*each)
	}
	if s := scan[string](t, a, "PRAGMA integrity_check"); s != "ok" {
		t.Error(s)
	}
}

func TestWaitForTurn(t *testing.T) {
	db := open(t, testenv.SQLite(t), sqldb.Options{PoolTimeout: 20 * time.Millisecond})
	exec(t, db, "CREATE TABLE t (x INTEGER)")
	tx, err := db.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	exec(t, tx, "INSERT INTO t VALUES (1)")

	if n := scan[int](t, db, "SELECT count(*) FROM t"); n != 0 { // readers do not wait, nor see it
		t.Errorf("a reader sees %d uncommitted rows", n)
	}
	ro, err := db.BeginTx(t.Context(), sqlReadOnly)
	if err != nil {
		t.Fatalf("a read-only transaction waits for the writer: %v", err)
	}
	if _, err := ro.ExecContext(t.Context(), "DELETE FROM t"); err == nil {
		t.Error("a read-only transaction writes")
	}
	if err := ro.Rollback(); err != nil {
		t.Error(err)
	}
	_, err = db.ExecContext(t.Context(), "INSERT INTO t VALUES (2)")
	if !errors.Is(err, sqldb.ErrPoolTimeout) || !sqldb.IsRetryable(err) {
		t.Errorf("waiting for the turn: %v, want ErrPoolTimeout", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := db.BeginTx(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("waiting for the turn with a dead context: %v", err)
	}
	if err := tx.Commit(); err != nil {
		t.Fatal(err)
	}
	exec(t, db, "INSERT INTO t VALUES (3)")
}

func TestPoolTimeout(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		db := open(t, url, sqldb.Options{MaxConns: 2, PoolTimeout: 3 * time.Second})
		var held []bun.Conn
		for range 2 {
			c, err := db.Conn(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, c)
		}
		err := db.PingContext(t.Context())
		if !errors.Is(err, sqldb.ErrPoolTimeout) || !strings.Contains(err.Error(), "all 2") {
			t.Errorf("exhausted pool: %v, want ErrPoolTimeout", err)
		}
		for _, c := range held {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}
		if err := db.PingContext(t.Context()); err != nil {
			t.Errorf("after connections came back: %v", err)
		}
	})
}

func TestStatementTimeout(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		db := open(t, url, sqldb.Options{StatementTimeout: time.Second})
		var n int64
		err := db.NewRaw("WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM r WHERE i < 1000000000) SELECT count(*) FROM r").Scan(t.Context(), &n)
		if err == nil {
			t.Fatal("counted to a billion")
		}
		if err := db.PingContext(t.Context()); err != nil {
			t.Errorf("after a timeout: %v", err)
		}
	})
}

func TestInTx(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		db := open(t, url, sqldb.Options{})
		exec(t, db, "CREATE TABLE t (x INTEGER PRIMARY KEY)")
		insert := func(x int) func(context.Context, bun.Tx) error {
			return func(ctx context.Context, tx bun.Tx) error {
				_, err := tx.NewRaw("INSERT INTO t VALUES (?)", x).Exec(ctx)
				return err
			}
		}
		if err := sqldb.InTx(t.Context(), db, insert(1)); err != nil {
			t.Fatal(err)
		}
		err := sqldb.InTx(t.Context(), db, insert(1))
		if !sqldb.IsUnique(err) || sqldb.IsRetryable(err) {
			t.Errorf("a second 1: %v, want unique, not retryable", err)
		}
		boom := errors.New("boom")
		err = sqldb.InTx(t.Context(), db, func(ctx context.Context, tx bun.Tx) error {
			return errors.Join(insert(2)(ctx, tx), boom)
		})
		if !errors.Is(err, boom) {
			t.Errorf("fn's error: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		err = sqldb.InTx(ctx, db, func(ctx context.Context, tx bun.Tx) error {
			defer cancel()
			return insert(3)(ctx, tx)
		})
		if !errors.Is(err, context.Canceled) || errors.Is(err, sqldb.ErrCommitUnknown) {
			t.Errorf("cancelled before the commit: %v", err)
		}
		func() {
			defer func() { _ = recover() }()
			_ = sqldb.InTx(t.Context(), db, func(ctx context.Context, tx bun.Tx) error {
				_ = insert(4)(ctx, tx)
				panic("boom")
			})
		}()
		if n := scan[int](t, db, "SELECT count(*) FROM t"); n != 1 {
			t.Errorf("%d rows, want only the committed one", n)
		}
		if err := sqldb.InTx(t.Context(), db, insert(5)); err != nil {
			t.Errorf("after a panic: %v", err)
		}
	})
}

func TestInTxRetriesDeadlocks(t *testing.T) {
	db := open(t, testenv.Postgres(t), sqldb.Options{})
	exec(t, db, "CREATE TABLE t (id INTEGER PRIMARY KEY, x INTEGER)")
	exec(t, db, "INSERT INTO t VALUES (1, 0), (2, 0)")
	var both sync.WaitGroup // each has its first row before either takes its second
	both.Add(2)
	tries := make([]int, 2)
	var wg sync.WaitGroup
	for i := range 2 {
		wg.Go(func() {
			err := sqldb.InTx(t.Context(), db, func(ctx context.Context, tx bun.Tx) error {
				tries[i]++
				for _, id := range []int{1 + i, 2 - i} {
					if _, err := tx.NewRaw("UPDATE t SET x = x + 1 WHERE id = ?", id).Exec(ctx); err != nil {
						return err
					}
					if id == 1+i && tries[i] == 1 {
						both.Done()
						both.Wait()
					}
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if tries[0]+tries[1] < 3 {
		t.Errorf("no deadlock happened: %v", tries)
	}
	if x := scan[int](t, db, "SELECT sum(x) FROM t"); x != 4 {
		t.Errorf("sum %d, want 4", x)
	}
}

func TestBusyAcrossProcessesIsRetried(t *testing.T) {
	// A connection that did not come through Open stands for another process.
	url := testenv.SQLite(t)
	db := open(t, url, sqldb.Options{PoolTimeout: time.Millisecond})
	exec(t, db, "CREATE TABLE t (x INTEGER)")
	other := foreignSQLite(t, strings.TrimPrefix(url, "sqlite:"))
	exec(t, other, "BEGIN IMMEDIATE")
	err := sqldb.InTx(t.Context(), db, func(context.Context, bun.Tx) error { return nil })
	if !sqldb.IsRetryable(err) {
		t.Errorf("while another process writes: %v, want something retryable", err)
	}
	exec(t, other, "COMMIT")
	if err := sqldb.InTx(t.Context(), db, func(context.Context, bun.Tx) error { return nil }); err != nil {
		t.Error(err)
	}
}

func TestConcurrentOpenOfNewFile(t *testing.T) {
	for i := range 5 {
		url := "sqlite:" + filepath.Join(t.TempDir(), fmt.Sprint(i))
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				db, err := sqldb.Open(t.Context(), url, sqldb.Options{})
				if err != nil {
					t.Error(err)
					return
				}
				db.Close()
			})
		}
		wg.Wait()
	}
}
