package store_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

// endedRun inserts a run of one job that ends after an attempt, and lets an
// hour pass.
func (r *rig) endedRun(repo string) (*store.Run, *store.Attempt) {
	r.t.Helper()
	run, _ := r.runOf(repo, nil)
	c, ref := r.attached()
	must(r.t, r.start(c, ref))
	must(r.t, r.finish(c, ref, store.Finish{State: store.JobSucceeded, AckedSeq: 1, Steps: []*store.Step{{Name: "s", Result: "succeeded"}}}))
	_, err := r.MachineGone(r.t.Context(), c.Machine.ID)
	must(r.t, err)
	r.pass(time.Hour)
	return run, c.Attempt
}

// ago is the time that was d ago.
func (r *rig) ago(d time.Duration) int64 {
	r.t.Helper()
	now, err := r.Now(r.t.Context())
	must(r.t, err)
	return now - d.Microseconds()
}

func (r *rig) kept(runID string) store.Retention {
	r.t.Helper()
	k, err := r.RunRetention(r.t.Context(), runID)
	must(r.t, err)
	return k
}

func TestRules(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		const day = 24 * time.Hour
		for i, c := range []struct {
			what string
			age  time.Duration // of Before; 0: none
			most int
			new  int
			safe time.Duration // no older than that: never
			left int           // of the six runs that ended 6 h to 1 h ago
		}{
			{"nothing", 0, -1, 0, 0, 6},
			{"all are too old", time.Minute, -1, 0, 0, 0},
			{"some are", 3*time.Hour + time.Minute, -1, 0, 0, 3},
			{"none is", day, -1, 0, 0, 6},
			{"more than may be", 0, 4, 0, 0, 4},
			{"as many as may be", 0, 6, 0, 0, 6},
			{"none may be", 0, 0, 0, 0, 0},
			{"old, but among the newest", time.Minute, -1, 2, 0, 2},
			{"too many, though among the newest", 0, 1, 2, 0, 1},
			{"too many, and old ones among the newest", time.Minute, 4, 2, 0, 2},
			{"too many and too old, of which more", 3*time.Hour + time.Minute, 2, 0, 0, 2},
			{"too old and too many, of which more", 2*time.Hour + time.Minute, 4, 0, 0, 2},
			{"more newest than there are", time.Minute, -1, 7, 0, 6},
			{"none may be, but not so soon", 0, 0, 0, 2*time.Hour + time.Minute, 2},
			{"old, but not so soon", time.Minute, -1, 0, 4*time.Hour + time.Minute, 4},
			{"old, of which more are among the newest than so soon", time.Minute, -1, 3, 2*time.Hour + time.Minute, 3},
		} {
			repo := fmt.Sprintf("forge/rule%d", i)
			var runs []*store.Run
			for range 6 {
				run, _ := r.endedRun(repo)
				runs = append(runs, run)
			}
			live, _ := r.runOf(repo, waiting) // never goes
			rule := store.Rule{Most: c.most, Newest: c.new}
			if c.age > 0 {
				rule.Before = r.ago(c.age)
			}
			if c.safe > 0 {
				rule.Until = r.ago(c.safe)
			}
			for what, mark := range map[string]func(context.Context, string, store.Rule, int) (int, error){"logs": r.MarkLogs, "runs": r.MarkRuns} {
				n := 0
				for { // in batches
					some, err := mark(t.Context(), repo, rule, 2)
					must(t, err)
					if n += some; some == 0 {
						break
					}
				}
				if n != 6-c.left && what == "runs" || what == "logs" && n > 6-c.left {
					t.Errorf("%s: %d %s marked, want %d", c.what, n, what, 6-c.left)
				}
			}
			for j, run := range runs { // those that ended first
				if going := r.kept(run.ID) == store.RunGoing; going != (j < 6-c.left) {
					t.Errorf("%s: run %d is %q", c.what, j, r.kept(run.ID))
				}
			}
			eq(t, c.what+": the live run", r.kept(live.ID), store.KeptAll)
		}
	})
}

func TestReposEnded(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		begin := r.ago(0)
		r.endedRun("forge/b")
		between := r.ago(time.Minute)
		r.endedRun("forge/a")
		r.endedRun("forge/a")
		r.runOf("forge/c", nil) // not over
		now := r.ago(0)
		for _, c := range []struct {
			from, to int64
			want     []string
		}{{begin, now, []string{"forge/a", "forge/b"}}, {between, now, []string{"forge/a"}}, {begin, between, []string{"forge/b"}}, {now, now, nil}, {now, begin, nil}} {
			got, err := r.ReposEnded(t.Context(), c.from, c.to)
			must(t, err)
			slices.Sort(got)
			if !slices.Equal(got, c.want) {
				t.Errorf("ended in (%d, %d]: %v, want %v", c.from, c.to, got, c.want)
			}
		}
		for after, want := range map[string][]string{"": {"forge/a", "forge/b"}, "forge/a": {"forge/b"}, "forge/b": nil} {
			got, err := r.EndedRepos(t.Context(), after, 10)
			must(t, err)
			if !slices.Equal(got, want) {
				t.Errorf("beyond %q: %v, want %v", after, got, want)
			}
		}
		one, err := r.EndedRepos(t.Context(), "", 1)
		must(t, err)
		eq(t, "bounded", len(one), 1)
	})
}

func TestMarkedRunIsNotShownAndItsKeysAreFree(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		submit := func(id string) error {
			return r.InsertRun(t.Context(), &store.Run{
				ID: id, State: store.RunErrored, Forge: "forge", RepoKey: "forge/a", WorkflowPath: "w.yaml", Delivery: "d", IdempotencyKey: "k",
			}, nil)
		}
		must(t, submit("run-1"))
		wantErr(t, submit("run-2"), store.ErrDuplicate)
		r.pass(time.Hour)
		n, err := r.MarkRuns(t.Context(), "forge/a", store.Rule{Most: 0}, 10)
		must(t, err)
		eq(t, "marked", n, 1)
		runs, err := r.Runs(t.Context(), store.RunFilter{})
		must(t, err)
		ids, err := r.RunsByPrefix(t.Context(), "run-", 10)
		must(t, err)
		eq(t, "shown", len(runs)+len(ids), 0)
		must(t, submit("run-2"))
		must(t, r.DeleteRun(t.Context(), "run-1"))
		must(t, r.DeleteRun(t.Context(), "run-2")) // not marked
		_, err = r.Run(t.Context(), "run-1")
		wantErr(t, err, store.ErrNotFound)
		_, err = r.Run(t.Context(), "run-2")
		must(t, err)
	})
}

// rerun inserts one of a run that keeps the result of its job.
func (r *rig) rerun(of *store.Run, kept string) (*store.Run, error) {
	run := &store.Run{ID: r.id("run"), State: store.RunQueued, Forge: "forge", RepoKey: of.RepoKey, WorkflowPath: "w.yaml", RerunOf: of.ID}
	return run, r.InsertRun(r.t.Context(), run, []*store.Job{
		{ID: r.id("job"), Idx: 0, Key: "k", Name: "kept", Label: "linux", State: store.JobSucceeded, CopiedFrom: kept, RepoKey: of.RepoKey},
		{ID: r.id("job"), Idx: 1, Key: "l", Name: "again", Label: "linux", State: store.JobQueued, RepoKey: of.RepoKey, Needs: json.RawMessage(`[]`)},
	})
}

func TestRunThatALiveRerunCopiesFromStays(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		first, a := r.endedRun("forge/a")
		second, err := r.rerun(first, a.JobID)
		must(t, err)
		c, ref := r.attached()
		must(t, r.start(c, ref))
		must(t, r.finish(c, ref, store.Finish{State: store.JobFailed, AckedSeq: 1}))
		// The second is over, so the first might go; the third copies from the first.
		third, err := r.rerun(second, a.JobID)
		must(t, err)
		r.pass(time.Hour)
		mark := func(want int) {
			t.Helper()
			n, err := r.MarkRuns(t.Context(), "forge/a", store.Rule{Most: 0}, 10)
			must(t, err)
			eq(t, "marked", n, want)
		}
		mark(1)
		eq(t, "the second", r.kept(second.ID), store.RunGoing)
		eq(t, "the first", r.kept(first.ID), store.KeptAll)
		if n, err := r.MarkLogs(t.Context(), "forge/a", store.Rule{Most: 0}, 10); err != nil || n != 1 {
			t.Errorf("logs of %d runs marked, %v", n, err)
		}
		if _, err := r.rerun(second, a.JobID); !errors.Is(err, store.ErrRemoved) || !errors.Is(err, store.ErrNotFound) {
			t.Errorf("a rerun of what goes: %v", err)
		}
		c, ref = r.attached()
		must(t, r.start(c, ref))
		must(t, r.finish(c, ref, store.Finish{State: store.JobSucceeded, AckedSeq: 1}))
		eq(t, "the third", r.runState(third.ID), store.RunSucceeded)
		mark(2)
	})
}

// TestRerunAndRemovalAtOnce: either the rerun is refused or the run stays.
func TestRerunAndRemovalAtOnce(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		for range 20 {
			run, a := r.endedRun("forge/a")
			var rerun *store.Run
			done := make(chan error, 1)
			go func() {
				var err error
				rerun, err = r.rerun(run, a.JobID)
				done <- err
			}()
			_, merr := r.MarkRuns(t.Context(), "forge/a", store.Rule{Most: 0}, 10)
			err := <-done
			must(t, merr)
			going := r.kept(run.ID) == store.RunGoing
			switch {
			case going != errors.Is(err, store.ErrRemoved):
				t.Fatalf("the run goes: %v, the rerun: %v", going, err)
			case err == nil:
				_, err := r.in(rerun.ID, func(ctx context.Context, tx *store.RunTx) error {
					return tx.EndJob(ctx, tx.Jobs[1], store.JobCancelled, "cancelled", "", nil)
				})
				must(t, err)
			}
		}
	})
}

func TestDeleteMarkedRun(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		ctx := t.Context()
		run, a := r.endedRun("forge/a")
		other, _ := r.endedRun("forge/b")
		jobs, err := r.JobStreams(ctx, run.ID, -1, 10)
		must(t, err)
		if len(jobs) != 1 || !slices.Equal(jobs[0].Streams, []string{a.LogStream}) {
			t.Fatalf("streams %+v", jobs)
		}
		must(t, r.DeleteJobs(ctx, run.ID, []string{a.JobID})) // not marked yet
		must(t, r.DeleteRun(ctx, run.ID))
		r.job(a.JobID)
		_, err = r.MarkLogs(ctx, "forge/a", store.Rule{Most: 0}, 10)
		must(t, err)
		leaving, err := r.Leaving(ctx, "", 10)
		must(t, err)
		if len(leaving) != 1 || leaving[0].ID != run.ID {
			t.Fatalf("leaving %+v", leaving)
		}
		must(t, r.LogsDeleted(ctx, run.ID))
		eq(t, "logs", r.kept(run.ID), store.LogsGone)
		leaving, err = r.Leaving(ctx, "", 10)
		must(t, err)
		eq(t, "leaving", len(leaving), 0)
		_, err = r.MarkRuns(ctx, "forge/a", store.Rule{Most: 0}, 10)
		must(t, err)
		must(t, r.DeleteRun(ctx, run.ID)) // has jobs
		eq(t, "run", r.kept(run.ID), store.RunGoing)
		must(t, r.DeleteJobs(ctx, run.ID, []string{a.JobID}))
		must(t, r.DeleteRun(ctx, run.ID))
		for _, table := range []string{"runs", "jobs", "attempts", "steps"} {
			var n int
			must(t, r.db.NewSelect().Table(table).ColumnExpr("count(*)").Scan(ctx, &n))
			eq(t, "left in "+table, n, 1) // of the other run
		}
		eq(t, "the other run", r.kept(other.ID), store.KeptAll)
	})
}

func TestLogOfRemovedRunIsNotMadeAgain(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		run, a := r.endedRun("forge/a")
		x := r.LogIndex()
		_, err := x.Fence(t.Context(), a.LogStream, 2)
		must(t, err)
		_, err = r.MarkLogs(t.Context(), "forge/a", store.Rule{Most: 0}, 10)
		must(t, err)
		_, err = x.Delete(t.Context(), a.LogStream)
		must(t, err)
		for _, after := range []func(){
			func() {}, // marked
			func() { must(t, r.LogsDeleted(t.Context(), run.ID)) },
			func() {
				_, err := r.MarkRuns(t.Context(), "forge/a", store.Rule{Most: 0}, 10)
				must(t, err)
				must(t, r.DeleteJobs(t.Context(), run.ID, []string{a.JobID}))
				must(t, r.DeleteRun(t.Context(), run.ID))
			},
		} {
			after()
			_, err = x.Fence(t.Context(), a.LogStream, 3)
			wantErr(t, err, logstream.ErrNotFound)
			_, err = x.Stat(t.Context(), a.LogStream)
			wantErr(t, err, logstream.ErrNotFound)
		}
	})
}

func TestLeftovers(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		ctx := t.Context()
		r.endedRun("forge/a") // its machine is gone
		r.runOf("forge/a", nil)
		c, _ := r.attached()
		must(t, r.Beat(ctx, store.Orchestrator{ID: "old"}, time.Minute))
		_, err := r.Lease(ctx, "old", "o", time.Minute)
		must(t, err)
		_, err = r.InsertToken(ctx, "old", "h1", "read", time.Minute)
		must(t, err)
		_, err = r.InsertToken(ctx, "ever", "h2", "read", 0)
		must(t, err)
		msg := store.OutboxMessage{Key: "k", Topic: "t", Body: []byte("x"), CreatedAt: r.ago(0)}
		_, err = r.db.NewInsert().Model(&msg).Exec(ctx)
		must(t, err)
		must(t, r.WatchNamed(ctx, []store.Watched{{Forge: "f", Name: "a/b"}}))
		rules := store.Leftovers{Records: 24 * time.Hour, Tokens: 24 * time.Hour, Undelivered: 24 * time.Hour}
		look := func(want store.Removed) {
			t.Helper()
			got, err := r.RemoveLeftovers(ctx, rules, 10)
			must(t, err)
			eq(t, "removed", got, want)
		}
		look(store.Removed{})
		r.pass(25 * time.Hour)
		must(t, r.Beat(ctx, store.Orchestrator{ID: "new"}, time.Minute))
		_, err = r.Lease(ctx, "new", "o", time.Minute)
		must(t, err)
		look(store.Removed{Machines: 1, Undelivered: 1, Others: 4})
		look(store.Removed{})
		r.machine(c.Machine.ID)
		for table, want := range map[string]int{"machines": 1, "leases": 1, "orchestrators": 1, "tokens": 1, "outbox": 0, "watched": 0} {
			var n int
			must(t, r.db.NewSelect().Table(table).ColumnExpr("count(*)").Scan(ctx, &n))
			eq(t, table, n, want)
		}
		rules.Undelivered = -1
		_, err = r.db.NewInsert().Model(&store.OutboxMessage{Key: "k", Topic: "t", Body: []byte("x"), CreatedAt: 1}).Exec(ctx)
		must(t, err)
		look(store.Removed{})
	})
}

func TestUnlease(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		take := func(owner string, want bool) {
			t.Helper()
			mine, err := r.Lease(t.Context(), "l", owner, time.Hour)
			must(t, err)
			eq(t, owner, mine, want)
		}
		take("a", true)
		must(t, r.Unlease(t.Context(), "l", "b"))
		take("b", false)
		must(t, r.Unlease(t.Context(), "l", "a"))
		take("b", true)
	})
}

func TestLastOfCommit(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		add := func(id, repo string) *store.Run {
			run := &store.Run{ID: id, State: store.RunErrored, Forge: "forge", RepoKey: repo, Commit: "c", WorkflowPath: "w"}
			must(t, r.InsertRun(t.Context(), run, nil))
			return run
		}
		a, b := add("a", "forge/a"), add("b", "forge/b")
		last := func(run *store.Run, want bool) {
			t.Helper()
			got, err := r.LastOfCommit(t.Context(), run)
			must(t, err)
			eq(t, run.ID, got, want)
		}
		last(a, true)
		second := add("c", "forge/a")
		last(a, false)
		last(b, true)
		r.pass(time.Hour)
		n, err := r.MarkRuns(t.Context(), "forge/a", store.Rule{Most: 1}, 10)
		must(t, err)
		eq(t, "marked", n, 1)
		last(second, true)
	})
}
