package sqldb_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

// grouped runs one transaction for each fn such that the first one is under way
// until all others wait, so that they join it, in their order.
func grouped(t *testing.T, db *bun.DB, fns ...func(ctx context.Context, tx bun.Tx) error) []error {
	t.Helper()
	sqldb.SetWindow(db, time.Hour) // on a busy machine the usual one ends before all have come
	errs := make([]error, len(fns))
	began, ready := make(chan struct{}), make(chan struct{})
	var once sync.Once
	var wg sync.WaitGroup
	wg.Go(func() {
		errs[0] = sqldb.InTx(t.Context(), db, func(ctx context.Context, tx bun.Tx) error {
			once.Do(func() { close(began) })
			<-ready
			return fns[0](ctx, tx)
		})
	})
	<-began
	for i, fn := range fns[1:] {
		wg.Go(func() {
			defer func() {
				if p := recover(); p != nil {
					errs[i+1] = fmt.Errorf("panic: %v", p)
				}
			}()
			errs[i+1] = sqldb.InTx(t.Context(), db, fn)
		})
		for deadline := time.Now().Add(time.Minute); sqldb.Waiting(db) != i+1; {
			if time.Now().After(deadline) {
				t.Fatal("it does not wait")
			}
			time.Sleep(time.Millisecond)
		}
	}
	close(ready)
	wg.Wait()
	return errs
}

func add(x int) func(context.Context, bun.Tx) error {
	return func(ctx context.Context, tx bun.Tx) error {
		_, err := tx.NewRaw("INSERT INTO t VALUES (?)", x).Exec(ctx)
		return err
	}
}

func TestGroup(t *testing.T) {
	db := open(t, testenv.SQLite(t), sqldb.Options{PoolTimeout: time.Minute})
	exec(t, db, "CREATE TABLE t (x INTEGER PRIMARY KEY)")
	boom := errors.New("boom")
	dead, cancel := context.WithCancel(t.Context())
	errs := grouped(t, db,
		add(1),
		add(2),
		func(ctx context.Context, tx bun.Tx) error { return errors.Join(add(3)(ctx, tx), boom) },
		func(ctx context.Context, tx bun.Tx) error { _ = add(4)(ctx, tx); panic("boom") },
		func(ctx context.Context, tx bun.Tx) error { // sees the others', and refuses a second 1
			var n int
			if err := tx.NewRaw("SELECT sum(x) FROM t").Scan(ctx, &n); err != nil || n != 3 {
				return fmt.Errorf("sum %d, %w", n, err)
			}
			return add(1)(ctx, tx)
		},
		func(ctx context.Context, tx bun.Tx) error {
			cancel() // of a context that is nobody's here
			return add(5)(ctx, tx)
		},
		func(ctx context.Context, tx bun.Tx) error { // a dead context of a statement undoes nothing of others
			_ = add(6)(dead, tx)
			return add(7)(ctx, tx)
		},
	)
	for i, want := range []string{"", "", "boom", "panic: boom", "unique", "", ""} {
		switch {
		case want == "" && errs[i] != nil, want == "boom" && !errors.Is(errs[i], boom), want == "unique" && !sqldb.IsUnique(errs[i]),
			want == "panic: boom" && (errs[i] == nil || errs[i].Error() != want):
			t.Errorf("transaction %d: %v, want %q", i, errs[i], want)
		}
	}
	if s := scan[string](t, db, "SELECT group_concat(x) FROM (SELECT x FROM t WHERE x <> 6 ORDER BY x)"); s != "1,2,5,7" {
		t.Errorf("the table has %s", s)
	}
}

// A commit that fails does so only for the transaction that is to blame.
func TestGroupFails(t *testing.T) {
	db := open(t, testenv.SQLite(t), sqldb.Options{PoolTimeout: time.Minute})
	exec(t, db, "CREATE TABLE p (id INTEGER PRIMARY KEY)")
	exec(t, db, "CREATE TABLE t (x INTEGER PRIMARY KEY, p INTEGER REFERENCES p (id) DEFERRABLE INITIALLY DEFERRED)")
	insert := func(x, p int) func(context.Context, bun.Tx) error {
		return func(ctx context.Context, tx bun.Tx) error {
			_, err := tx.NewRaw("INSERT INTO t VALUES (?, ?)", x, p).Exec(ctx)
			return err
		}
	}
	exec(t, db, "INSERT INTO p VALUES (1)")
	for i, err := range grouped(t, db, insert(1, 1), insert(2, 99), insert(3, 1)) {
		if (i == 1) != (err != nil) || errors.Is(err, sqldb.ErrCommitUnknown) {
			t.Errorf("transaction %d: %v", i, err)
		}
	}
	if s := scan[string](t, db, "SELECT group_concat(x) FROM (SELECT x FROM t ORDER BY x)"); s != "1,3" {
		t.Errorf("the table has %s", s)
	}
}

// A transaction that ends the whole one, as SQLite does on some errors, has the
// others run again.
func TestGroupBroken(t *testing.T) {
	db := open(t, testenv.SQLite(t), sqldb.Options{PoolTimeout: time.Minute})
	exec(t, db, "CREATE TABLE t (x INTEGER PRIMARY KEY)")
	var tries atomic.Int32
	errs := grouped(t, db,
		func(ctx context.Context, tx bun.Tx) error { tries.Add(1); return add(1)(ctx, tx) },
		func(ctx context.Context, tx bun.Tx) error { tries.Add(1); return add(2)(ctx, tx) },
		func(ctx context.Context, tx bun.Tx) error {
			_, err := tx.NewRaw("INSERT OR ROLLBACK INTO t VALUES (1)").Exec(ctx)
			return err
		},
		func(ctx context.Context, tx bun.Tx) error { tries.Add(1); return add(3)(ctx, tx) },
	)
	for i, err := range errs {
		if (i == 2) != (err != nil) {
			t.Errorf("transaction %d: %v", i, err)
		}
	}
	if s := scan[string](t, db, "SELECT group_concat(x) FROM (SELECT x FROM t ORDER BY x)"); s != "1,2,3" {
		t.Errorf("the table has %s", s)
	}
	if tries.Load() < 5 {
		t.Errorf("%d tries: nothing ran again", tries.Load())
	}
}

// Whoever stops waiting for a turn is not run, and holds up nobody.
func TestGroupGivesUp(t *testing.T) {
	db := open(t, testenv.SQLite(t), sqldb.Options{PoolTimeout: 500 * time.Millisecond})
	exec(t, db, "CREATE TABLE t (x INTEGER PRIMARY KEY)")
	ctx, cancel := context.WithCancel(t.Context())
	err := sqldb.InTx(t.Context(), db, func(outer context.Context, tx bun.Tx) error {
		time.AfterFunc(20*time.Millisecond, cancel)
		if err := sqldb.InTx(ctx, db, add(1)); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled while it waits: %v", err)
		}
		if err := sqldb.TryTx(t.Context(), db, add(2)); !errors.Is(err, sqldb.ErrPoolTimeout) {
			t.Errorf("late: %v", err)
		}
		return add(3)(outer, tx)
	})
	if err != nil {
		t.Error(err)
	}
	if s := scan[string](t, db, "SELECT group_concat(x) FROM t"); s != "3" {
		t.Errorf("the table has %s", s)
	}
}
