package store_test

import (
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

// copies inserts n rows that are like the one row of a model, except for the
// columns of set, whose values are SQL over i, from 1 to n.
func copies(b *testing.B, db *bun.DB, row any, n int, set map[string]string) {
	b.Helper()
	if _, err := db.NewInsert().Model(row).Exec(b.Context()); err != nil {
		b.Fatal(err)
	}
	table := db.Table(reflect.TypeOf(row).Elem())
	var columns, values []string
	for _, f := range table.Fields {
		columns = append(columns, string(f.SQLName))
		if v, ok := set[f.Name]; ok {
			values = append(values, v)
		} else {
			values = append(values, "t."+string(f.SQLName))
		}
	}
	err := sqldb.InTx(b.Context(), db, func(ctx context.Context, tx bun.Tx) error {
		_, err := tx.ExecContext(ctx, fmt.Sprintf(
			"INSERT INTO %s (%s) WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < %d) SELECT %s FROM n, %s AS t WHERE t.id = 'template'",
			table.SQLName, strings.Join(columns, ", "), n, strings.Join(values, ", "), table.SQLName))
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
}

// BenchmarkScale shows what claiming a job and listing runs cost beside
// different numbers of jobs that are over, and of jobs that wait. With -short
// it leaves the large numbers out.
func BenchmarkScale(b *testing.B) {
	const repos = 50
	type scale struct{ finished, queued int }
	scales := []scale{{1e3, 0}, {1e6, 0}, {1e3, 1e5}}
	if testing.Short() {
		scales = []scale{{1e3, 0}, {1e4, 0}, {1e3, 1e3}}
	}
	for _, kind := range []string{"sqlite", "postgres"} {
		for _, sc := range scales {
			b.Run(fmt.Sprintf("%s/finished=%d/queued=%d", kind, sc.finished, sc.queued), func(b *testing.B) {
				url := testenv.SQLite(b)
				if kind == "postgres" {
					url = testenv.Postgres(b)
				}
				db, err := sqldb.Open(b.Context(), url, sqldb.Options{PoolTimeout: time.Minute})
				if err != nil {
					b.Fatal(err)
				}
				b.Cleanup(func() { _ = db.Close() })
				if err := store.Migrate(b.Context(), db); err != nil {
					b.Fatal(err)
				}
				seed(b, db, "old", sc.finished, repos, store.RunSucceeded, store.JobSucceeded)
				seed(b, db, "now", sc.queued, repos, store.RunQueued, store.JobQueued)
				if _, err := db.ExecContext(b.Context(), "ANALYZE"); err != nil {
					b.Fatal(err)
				}
				s, err := store.New(b.Context(), db, store.Options{})
				if err != nil {
					b.Fatal(err)
				}
				measureScale(b, s)
			})
		}
	}
}

// seed makes n runs of one job each, in one state.
func seed(b *testing.B, db *bun.DB, prefix string, n, repos int, run store.RunState, job store.JobState) {
	b.Helper()
	if n == 0 {
		return
	}
	number := "CASE WHEN i < 10 THEN '0000000' WHEN i < 100 THEN '000000' WHEN i < 1000 THEN '00000' WHEN i < 10000 THEN '0000' WHEN i < 100000 THEN '000' ELSE '00' END || i"
	id := func(kind string) string { return "'" + kind + "-" + prefix + "-' || " + number }
	repo := fmt.Sprintf("'forge/r' || (i %% %d)", repos)
	r := &store.Run{
		ID: "template", State: run, Forge: "forge", RepoKey: "forge/template", Commit: strings.Repeat("c", 40), Ref: "refs/heads/main",
		WorkflowPath: ".solstice/workflow.yaml", WorkflowName: "check", Event: json.RawMessage(`{}`), Version: 3, CreatedAt: 1, FinishedAt: 1,
	}
	j := &store.Job{
		ID: "template", RunID: "template", Key: "a", Name: "a", Label: "linux", State: job, RepoKey: "forge/template", Needs: json.RawMessage(`[]`),
		Spec: json.RawMessage(`{"id":"a","timeout":3600000000000}`), Version: 3, QueuedAt: 1,
	}
	copies(b, db, r, n, map[string]string{"id": id("0"), "repo_key": repo})
	copies(b, db, j, n, map[string]string{"id": id("j"), "run_id": id("0"), "repo_key": repo, "queued_at": "i"})
	for _, m := range []any{j, r} {
		if _, err := db.NewDelete().Model(m).WherePK().Exec(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

func measureScale(b *testing.B, s *store.Store) {
	ctx := b.Context()
	var claim, list, filtered time.Duration
	n := 0
	for b.Loop() {
		n++
		run := &store.Run{
			ID: fmt.Sprintf("run-%08d", n), State: store.RunQueued, Forge: "forge", RepoKey: "forge/new", WorkflowPath: "w.yaml", Event: json.RawMessage(`{}`),
		}
		job := &store.Job{ID: fmt.Sprintf("job-%08d", n), Key: "a", Name: "a", Label: "linux", State: store.JobQueued, RepoKey: run.RepoKey, Needs: json.RawMessage(`[]`)}
		if err := s.InsertRun(ctx, run, []*store.Job{job}); err != nil {
			b.Fatal(err)
		}
		start := time.Now()
		claimed, err := s.Claim(ctx, store.ClaimRequest{
			Owner: "o", Lease: time.Minute, Labels: []string{"linux"}, Pool: "p", PoolCapacity: 1 << 30, Host: "h", HostCapacity: 1 << 30, Max: 1,
			NewMachine: func() *store.Machine { return &store.Machine{ID: run.ID, TokenHash: run.ID} },
			Boot:       time.Minute, Expire: func(*store.Job) time.Duration { return time.Hour },
		})
		claim += time.Since(start)
		if err != nil || len(claimed) != 1 {
			b.Fatalf("%d claims, %v", len(claimed), err)
		}
		// It is over, so that the next round finds the same.
		ref := store.AttemptRef{ID: claimed[0].Attempt.ID, Epoch: claimed[0].Attempt.Epoch}
		if _, err := s.WithRun(ctx, claimed[0].Run.ID, func(ctx context.Context, t *store.RunTx) error {
			return t.FinishAttempt(ctx, ref, store.Finish{State: store.JobSucceeded})
		}); err != nil {
			b.Fatal(err)
		}
		if _, err := s.MachineGone(ctx, claimed[0].Machine.ID); err != nil {
			b.Fatal(err)
		}
		start = time.Now()
		if runs, err := s.Runs(ctx, store.RunFilter{Limit: 50}); err != nil || len(runs) == 0 {
			b.Fatal(len(runs), err)
		}
		list += time.Since(start)
		start = time.Now()
		if runs, err := s.Runs(ctx, store.RunFilter{Repo: "forge/r7", States: []store.RunState{store.RunSucceeded}, Limit: 50}); err != nil || len(runs) == 0 {
			b.Fatal(len(runs), err)
		}
		filtered += time.Since(start)
	}
	report := func(what string, d time.Duration) {
		b.ReportMetric(float64(d.Microseconds())/float64(n), what+"-µs")
	}
	report("claim", claim)
	report("list", list)
	report("list-filtered", filtered)
}
