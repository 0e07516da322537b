package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

func openDB(t *testing.T, url string) *bun.DB {
	t.Helper()
	db, err := sqldb.Open(t.Context(), url, sqldb.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// tables lists what a schema consists of, beside the table of migrations.
func tables(t *testing.T, db *bun.DB) []string {
	t.Helper()
	q := "SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' AND name NOT LIKE 'solstice_migrations%' ORDER BY name"
	if sqldb.IsPostgres(db) {
		q = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relname NOT LIKE 'solstice_migrations%' ORDER BY relname"
	}
	var out []string
	if err := db.NewRaw(q).Scan(t.Context(), &out); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestMigrateUpDownUp(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		ctx := t.Context()
		db := openDB(t, url)
		if _, err := New(ctx, db, Options{}); !errors.Is(err, ErrSchema) {
			t.Fatalf("an empty database: %v, want ErrSchema", err)
		}
		if err := Migrate(ctx, db); err != nil {
			t.Fatal(err)
		}
		up := tables(t, db)
		s, err := New(ctx, db, Options{})
		if err != nil {
			t.Fatal(err)
		}
		first := s.Installation()
		if len(first) != 36 {
			t.Errorf("installation %q", first)
		}
		if err := Migrate(ctx, db); err != nil { // again
			t.Fatal(err)
		}
		if s, err = New(ctx, db, Options{}); err != nil || s.Installation() != first {
			t.Errorf("installation changed from %s to %s: %v", first, s.Installation(), err)
		}
		m, err := NewMigrations(db)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.Reset(ctx); err != nil {
			t.Fatal(err)
		}
		if left := tables(t, db); len(left) > 0 {
			t.Errorf("left after rolling back: %v", left)
		}
		st, err := m.Status(ctx)
		if err != nil || len(st) == 0 || st[0].Applied {
			t.Errorf("status %v, %v", st, err)
		}
		if err := Migrate(ctx, db); err != nil {
			t.Fatal(err)
		}
		if again := tables(t, db); fmt.Sprint(again) != fmt.Sprint(up) {
			t.Errorf("second time up: %v, first %v", again, up)
		}
	})
}

func TestMigrateAtOnce(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		var mu sync.Mutex
		ids := map[string]bool{}
		var wg sync.WaitGroup
		for range 6 {
			db := openDB(t, url) // a pool each, as processes have
			wg.Go(func() {
				if err := Migrate(t.Context(), db); err != nil {
					t.Error(err)
					return
				}
				s, err := New(t.Context(), db, Options{})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				ids[s.Installation()] = true
			})
		}
		wg.Wait()
		if len(ids) != 1 {
			t.Errorf("installations %v, want one", ids)
		}
	})
}

// later is the embedded set and one more migration.
func later(t *testing.T, up string) fstest.MapFS {
	t.Helper()
	files := fstest.MapFS{
		"migrations/29990101000000_later.up.sql":   {Data: []byte(up)},
		"migrations/29990101000000_later.down.sql": {Data: []byte("ALTER TABLE runs DROP COLUMN extra;")},
	}
	names, err := fs.Glob(embedded, "migrations/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		b, err := fs.ReadFile(embedded, n)
		if err != nil {
			t.Fatal(err)
		}
		files[n] = &fstest.MapFile{Data: b}
	}
	return files
}

func TestOlderAndNewerSchema(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		ctx := t.Context()
		db := openDB(t, url)
		if err := Migrate(ctx, db); err != nil {
			t.Fatal(err)
		}
		sc, err := newSchema(db, later(t, "ALTER TABLE runs ADD COLUMN extra {{text}};"))
		if err != nil {
			t.Fatal(err)
		}
		if err := sc.check(ctx); !errors.Is(err, ErrSchema) || !strings.Contains(err.Error(), "lacks") {
			t.Errorf("an older schema: %v", err)
		}
		if _, err := sc.up(ctx); err != nil {
			t.Fatal(err)
		}
		if err := sc.check(ctx); err != nil {
			t.Error(err)
		}
		if _, err := New(ctx, db, Options{}); !errors.Is(err, ErrSchema) || !strings.Contains(err.Error(), "newer") {
			t.Errorf("a newer schema: %v", err)
		}
		if err := Migrate(ctx, db); !errors.Is(err, ErrSchema) {
			t.Errorf("migrating a newer schema: %v", err)
		}
		path, isFile := strings.CutPrefix(url, "sqlite:")
		if !isFile {
			return
		}
		backup := path + "." + sc.names[len(sc.names)-2] + ".bak"
		if fi, err := os.Stat(backup); err != nil || fi.Mode().Perm() != 0o600 {
			t.Fatalf("copy of the older file: %v, %v", fi, err)
		}
		if _, err := New(ctx, openDB(t, "sqlite:"+backup), Options{}); err != nil {
			t.Errorf("the copy has another schema: %v", err)
		}
	})
}

// TestDown: only the newest group is reversed, and only if all of it can be.
func TestDown(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		ctx := t.Context()
		db := openDB(t, url)
		first, err := NewMigrations(db)
		if err != nil {
			t.Fatal(err)
		}
		if undone, err := first.Down(ctx); err != nil || len(undone) > 0 {
			t.Errorf("down of an empty database: %v, %v", undone, err)
		}
		if err := first.Init(ctx); err != nil {
			t.Fatal(err)
		}
		st, err := first.Status(ctx)
		if err != nil || len(st) == 0 || st[0].Applied || len(tables(t, db)) > 0 {
			t.Fatalf("after init: %v, %v", st, err)
		}
		if up, err := first.Up(ctx); err != nil || len(up) != len(st) || up[0] != st[0].Name {
			t.Fatalf("up: %v, %v", up, err)
		}
		if up, err := first.Up(ctx); err != nil || len(up) > 0 {
			t.Errorf("up again: %v, %v", up, err)
		}
		before := tables(t, db)

		const name = "29990101000000_later"
		files := later(t, "CREATE TABLE extra (x INTEGER);")
		down := files["migrations/"+name+".down.sql"]
		down.Data = []byte("-- nothing yet\n\n")
		stuck, err := newSchema(db, files)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stuck.up(ctx); err != nil {
			t.Fatal(err)
		}
		with := tables(t, db)
		for _, all := range []bool{false, true} {
			if _, err := stuck.down(ctx, all); !errors.Is(err, ErrIrreversible) || !strings.Contains(err.Error(), name) {
				t.Errorf("down of what has no way back: %v", err)
			}
		}
		if _, err := first.Down(ctx); !errors.Is(err, ErrSchema) {
			t.Errorf("down of a newer schema: %v", err)
		}
		if got := tables(t, db); fmt.Sprint(got) != fmt.Sprint(with) {
			t.Errorf("what was refused changed the tables to %v", got)
		}

		down.Data = []byte("DROP TABLE extra;")
		two, err := newSchema(db, files)
		if err != nil {
			t.Fatal(err)
		}
		st, err = two.status(ctx)
		last := st[len(st)-1]
		if err != nil || last.Group != 2 || last.AppliedAt.IsZero() || st[0].Group != 1 {
			t.Errorf("groups: %+v, %v", st, err)
		}
		if undone, err := two.down(ctx, false); err != nil || fmt.Sprint(undone) != "["+name+"]" {
			t.Errorf("down: %v, %v", undone, err)
		}
		if got := tables(t, db); fmt.Sprint(got) != fmt.Sprint(before) {
			t.Errorf("after down: %v, want %v", got, before)
		}
		if path, isFile := strings.CutPrefix(url, "sqlite:"); isFile {
			if got := tables(t, openDB(t, "sqlite:"+path+"."+name+".bak")); fmt.Sprint(got) != fmt.Sprint(with) {
				t.Errorf("the copy has %v, want %v", got, with)
			}
		}
		if undone, err := two.down(ctx, false); err != nil || len(undone) != len(st)-1 || undone[0] != st[len(st)-2].Name {
			t.Errorf("down to nothing: %v, %v", undone, err)
		}
		if left := tables(t, db); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
}

func TestFailedMigrationLeavesNothing(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		ctx := t.Context()
		db := openDB(t, url)
		if err := Migrate(ctx, db); err != nil {
			t.Fatal(err)
		}
		before := tables(t, db)
		sc, err := newSchema(db, later(t, "CREATE TABLE half (x INTEGER); ALTER TABLE nonsense ADD COLUMN x INTEGER;"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := sc.up(ctx); err == nil {
			t.Fatal("a broken migration succeeded")
		}
		if after := tables(t, db); fmt.Sprint(after) != fmt.Sprint(before) {
			t.Errorf("half a migration is left: %v", after)
		}
		if _, err := New(ctx, db, Options{}); err != nil {
			t.Error(err)
		}
	})
}

// Queries whose cost must not grow with queued or finished jobs may touch the
// large tables through an index only.
func TestPlans(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		ctx := t.Context()
		db := openDB(t, url)
		if err := Migrate(ctx, db); err != nil {
			t.Fatal(err)
		}
		fill(t, db)
		var runs []*Run
		var attempts []*Attempt
		var outbox []*OutboxMessage
		var machines []*Machine
		for _, c := range []struct {
			name, query string
			index       string
		}{
			{"claim", bestQueued(db, []string{"l1", "l2"}).String(), "jobs_queue"},
			{"labels", queuedLabels(db).String(), "jobs_queue"},
			{"capacity", machineCounts(db, ClaimRequest{Host: "h", Pool: "p"}).String(), "machines_"},
			{"live attempts", liveAttempts(db, &attempts).String(), "attempts_live"},
			{"runs", runsQuery(db, RunFilter{Limit: 50}, "", &runs).String(), "runs"},
			{"runs before", runsQuery(db, RunFilter{Limit: 50, Before: "r5"}, "", &runs).String(), "runs"},
			{"runs of a forge", runsQuery(db, RunFilter{Limit: 50, Forge: "f1"}, "", &runs).String(), "runs_forge"},
			{"runs of a repository", runsQuery(db, RunFilter{Limit: 50, Repo: "a1"}, "", &runs).String(), "runs_repo"},
			{"stuck runs", stuckRuns(db, RunQueued, "r5", 100).String(), "runs_state"},
			{"runs of a state", runsQuery(db, RunFilter{Limit: 50}, RunFailed, &runs).String(), "runs_state"},
			{"runs of a commit", runsQuery(db, RunFilter{Limit: 50, Commit: "c77"}, "", &runs).String(), "runs_commit"},
			{"runs of a ref", runsQuery(db, RunFilter{Limit: 50, Repo: "a1", Ref: "refs/heads/b7"}, "", &runs).String(), "runs_repo_ref"},
			{"runs by prefix", byPrefix(db, (*Run)(nil), "r0012", 2).String(), "runs"},
			{"jobs by prefix", byPrefix(db, (*Job)(nil), "jr0012", 2).String(), "jobs"},
			{"attempts by prefix", byPrefix(db, (*Attempt)(nil), "tr0012", 2).String(), "attempts"},
			{"queued jobs", queuedJobs(db, "l1").String(), "jobs_queue"},
			{"rivals", rivals(db, &Job{ID: "x", Label: "l1", QueuedAt: 7}).String(), "jobs_queue"},
			{"machines", machinesQuery(db, "p", "m", 50, &machines).String(), "machines_"},
			{"outbox", unclaimed(db, 1, 100, &outbox).String(), "outbox"},
		} {
			plan, err := queryPlan(ctx, db, c.query)
			if err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			text := strings.Join(plan, "\n")
			if !strings.Contains(text, c.index) {
				t.Errorf("%s does not use %s:\n%s", c.name, c.index, text)
			}
			for _, line := range plan {
				if scansAll(line) {
					t.Errorf("%s reads a whole table (%s):\n%s", c.name, strings.TrimSpace(line), text)
				}
			}
		}
	})
}

// queryPlan gives the lines of the plan that the database makes for a query.
func queryPlan(ctx context.Context, db *bun.DB, query string) (plan []string, err error) {
	explain := "EXPLAIN QUERY PLAN "
	if sqldb.IsPostgres(db) {
		explain = "EXPLAIN (COSTS OFF) "
	}
	rows, err := db.QueryContext(ctx, explain+query)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var line string
		if sqldb.IsPostgres(db) {
			err = rows.Scan(&line)
		} else {
			var a, b, d int
			err = rows.Scan(&a, &b, &d, &line)
		}
		if err != nil {
			return nil, err
		}
		plan = append(plan, line)
	}
	return plan, rows.Err()
}

func scansAll(line string) bool {
	for _, table := range []string{"jobs", "runs", "attempts", "machines"} {
		if strings.Contains(line, "Seq Scan on "+table) ||
			strings.Contains(line, "SCAN "+table) && !strings.Contains(line, "USING") {
			return true
		}
	}
	return false
}

// fill makes the tables large enough for a planner to care.
func fill(t *testing.T, db *bun.DB) {
	t.Helper()
	err := sqldb.InTx(t.Context(), db, func(ctx context.Context, tx bun.Tx) error {
		var runs []*Run
		var jobs []*Job
		var attempts []*Attempt
		var machines []*Machine
		for i := range 2000 {
			id := fmt.Sprintf("r%05d", i)
			state, js := RunSucceeded, JobSucceeded
			if i%4 == 0 {
				state, js = RunQueued, JobQueued
			}
			if i%100 == 1 {
				state = RunFailed
			}
			repo := fmt.Sprintf("a%d", i%50)
			runs = append(runs, &Run{
				ID: id, State: state, RepoKey: repo, Forge: fmt.Sprintf("f%d", i%20), Commit: fmt.Sprintf("c%d", i),
				Ref: fmt.Sprintf("refs/heads/b%d", i%200), FinishedAt: int64(i),
			})
			jobs = append(jobs, &Job{ID: "j" + id, RunID: id, State: js, Label: fmt.Sprintf("l%d", i%3), RepoKey: repo, QueuedAt: int64(i)})
			attempts = append(attempts, &Attempt{ID: "t" + id, JobID: "j" + id, RunID: id, State: AttemptFinished})
			machines = append(machines, &Machine{ID: "m" + id, Host: "h", Pool: "p", State: MachineGone})
		}
		for _, rows := range []any{&runs, &jobs, &attempts, &machines} {
			if _, err := tx.NewInsert().Model(rows).Exec(ctx); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.ExecContext(t.Context(), "ANALYZE"); err != nil {
		t.Fatal(err)
	}
}
