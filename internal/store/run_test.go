package store_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

func TestInsertRunOnce(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		ctx := t.Context()
		mk := func(delivery, key, path string) *store.Run {
			return &store.Run{ID: r.id("run"), State: store.RunQueued, Forge: "f", RepoKey: "f/a", Delivery: delivery, IdempotencyKey: key, WorkflowPath: path}
		}
		first := mk("d1", "", "a.yaml")
		must(t, r.InsertRun(ctx, first, []*store.Job{{ID: "j1", State: store.JobQueued}}))
		wantErr(t, r.InsertRun(ctx, mk("d1", "", "a.yaml"), []*store.Job{{ID: "j2", State: store.JobQueued}}), store.ErrDuplicate)
		if _, err := r.Job(ctx, "j2"); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("a duplicate left a job: %v", err)
		}
		must(t, r.InsertRun(ctx, mk("d1", "", "b.yaml"), nil))
		must(t, r.InsertRun(ctx, mk("", "", "a.yaml"), nil))
		must(t, r.InsertRun(ctx, mk("", "", "a.yaml"), nil))
		keyed := mk("", "k", "a.yaml")
		must(t, r.InsertRun(ctx, keyed, nil))
		wantErr(t, r.InsertRun(ctx, mk("", "k", "a.yaml"), nil), store.ErrDuplicate)
		got, err := r.RunByKey(ctx, "f", "d1", "", "a.yaml")
		must(t, err)
		eq(t, "by delivery", got.ID, first.ID)
		got, err = r.RunByKey(ctx, "f", "", "k", "a.yaml")
		must(t, err)
		eq(t, "by key", got.ID, keyed.ID)
		_, err = r.RunByKey(ctx, "f", "", "", "a.yaml")
		wantErr(t, err, store.ErrNotFound)
		j := r.job("j1")
		if j.QueuedAt == 0 || j.RunID != first.ID || j.Version != 1 {
			t.Errorf("job as inserted: %+v", j)
		}
	})
}

func TestRunsArePaged(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		var ids []string
		for i := range 5 {
			run, _ := r.runOf([]string{"a", "b"}[i%2], nil)
			ids = append(ids, run.ID)
		}
		for _, c := range []struct {
			f    store.RunFilter
			want []int
		}{
			{store.RunFilter{}, []int{4, 3, 2, 1, 0}},
			{store.RunFilter{Limit: 2}, []int{4, 3}},
			{store.RunFilter{Limit: 2, Before: ids[3]}, []int{2, 1}},
			{store.RunFilter{Repo: "b"}, []int{3, 1}},
			{store.RunFilter{Repo: "a", States: []store.RunState{store.RunQueued, store.RunFailed}}, []int{4, 2, 0}},
			{store.RunFilter{States: []store.RunState{store.RunFailed}}, nil},
		} {
			got, err := r.Runs(t.Context(), c.f)
			must(t, err)
			var have, want []string
			for _, run := range got {
				have = append(have, run.ID)
			}
			for _, i := range c.want {
				want = append(want, ids[i])
			}
			eq(t, fmt.Sprint(c.f), strings.Join(have, " "), strings.Join(want, " "))
		}
	})
}

func TestLifeOfAJob(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		run, jobs := r.run(nil, waiting)
		c, ref := r.attached()
		eq(t, "epoch after attaching", ref.Epoch, 2)
		eq(t, "machine", r.machine(c.Machine.ID).State, store.MachineBound)
		must(t, r.start(c, ref))
		must(t, r.start(c, ref)) // a repeat
		eq(t, "run", r.runState(run.ID), store.RunRunning)
		a := r.attempt(ref.ID)
		eq(t, "attempt", a.State, store.AttemptRunning)
		eq(t, "deadline", a.DeadlineAt, a.StartedAt+3600e6)

		must(t, r.Progress(t.Context(), ref, 3, 100, []*store.Step{{Idx: 0, Name: "build", StartedAt: 5}}))
		wantErr(t, r.Progress(t.Context(), ref, 3, 100, nil), store.ErrStale)
		wantErr(t, r.Progress(t.Context(), store.AttemptRef{ID: ref.ID, Epoch: 1}, 9, 100, nil), store.ErrStale)
		must(t, r.Progress(t.Context(), ref, 4, 120, []*store.Step{{Idx: 0, Result: "failed", ExitCode: 2, FinishedAt: 9, Outputs: json.RawMessage(`{"x":"y"}`)}}))
		steps, err := r.Steps(t.Context(), ref.ID)
		must(t, err)
		if len(steps) != 1 || steps[0].Name != "build" || steps[0].StartedAt != 5 || steps[0].ExitCode != 2 || string(steps[0].Outputs) != `{"x":"y"}` {
			t.Errorf("merged steps: %+v", steps)
		}

		fin := store.Finish{State: store.JobSucceeded, Outputs: json.RawMessage(`{"o":"1"}`), AckedSeq: 7, LogSize: 200}
		change, err := r.in(run.ID, func(ctx context.Context, tx *store.RunTx) error {
			if err := tx.FinishAttempt(ctx, ref, fin); err != nil {
				return err
			}
			return tx.QueueJob(ctx, tx.Jobs[1])
		})
		must(t, err)
		eq(t, "changed jobs", len(change.Jobs), 2)
		eq(t, "labels", strings.Join(change.Labels, " "), "linux")
		must(t, r.finish(c, ref, fin)) // the reply was lost
		other := fin
		other.AckedSeq++
		wantErr(t, r.finish(c, ref, other), store.ErrStale)
		j := r.job(jobs[0].ID)
		eq(t, "job", j.State, store.JobSucceeded)
		eq(t, "outputs", string(j.Outputs), `{"o":"1"}`)
		eq(t, "machine", r.machine(c.Machine.ID).State, store.MachineDestroying)
		a = r.attempt(ref.ID)
		eq(t, "acked", a.AckedSeq, 7)
		eq(t, "result", a.Result, "succeeded")
		_, _, _, _, err = r.Attach(t.Context(), c.Machine.ID, "o1", time.Minute)
		wantErr(t, err, store.ErrOver)
		eq(t, "run", r.runState(run.ID), store.RunRunning)

		c2, ref2 := r.attached()
		must(t, r.start(c2, ref2))
		must(t, r.finish(c2, ref2, store.Finish{State: store.JobFailed, Class: "user", AckedSeq: 1}))
		got, err := r.Run(t.Context(), run.ID)
		must(t, err)
		eq(t, "run", got.State, store.RunFailed)
		if got.FinishedAt == 0 || got.StartedAt == 0 || got.Version < 4 {
			t.Errorf("run at its end: %+v", got)
		}
	})
}

// What was acknowledged is never taken back.
func TestAcknowledgedStays(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		run, _ := r.run(nil)
		c, ref := r.attached()
		must(t, r.Progress(t.Context(), ref, 5, 100, nil))
		wantErr(t, r.Progress(t.Context(), ref, 6, 99, nil), store.ErrStale)
		for what, f := range map[string]store.Finish{
			"journal": {State: store.JobSucceeded, AckedSeq: 4, LogSize: 100},
			"log":     {State: store.JobSucceeded, AckedSeq: 6, LogSize: 99},
		} {
			if err := r.finish(c, ref, f); !errors.Is(err, store.ErrStale) {
				t.Errorf("a shorter %s: %v, want ErrStale", what, err)
			}
			_, err := r.in(run.ID, func(ctx context.Context, tx *store.RunTx) error { return tx.RetryAttempt(ctx, ref, f) })
			wantErr(t, err, store.ErrStale)
		}
		must(t, r.finish(c, ref, store.Finish{State: store.JobSucceeded, AckedSeq: 6, LogSize: 100}))
		a := r.attempt(ref.ID)
		eq(t, "acknowledged", a.AckedSeq, 6)
		eq(t, "log", a.LogSize, 100)
	})
}

// Nothing changes what is over.
func TestTerminalStatesStay(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		run, jobs := r.run(nil)
		c, ref := r.attached()
		must(t, r.finish(c, ref, store.Finish{State: store.JobSucceeded, AckedSeq: 1}))
		before, err := r.Run(t.Context(), run.ID)
		must(t, err)
		for what, f := range map[string]func(context.Context, *store.RunTx) error{
			"start": func(ctx context.Context, tx *store.RunTx) error { return tx.StartAttempt(ctx, ref, time.Hour) },
			"lose": func(ctx context.Context, tx *store.RunTx) error {
				return tx.LoseAttempt(ctx, ref, store.Loss{JobState: store.JobErrored})
			},
			"retry": func(ctx context.Context, tx *store.RunTx) error {
				return tx.RetryAttempt(ctx, ref, store.Finish{AckedSeq: 2})
			},
			"end": func(ctx context.Context, tx *store.RunTx) error {
				return tx.EndJob(ctx, tx.Jobs[0], store.JobErrored, "", "", nil)
			},
			"queue":     func(ctx context.Context, tx *store.RunTx) error { return tx.QueueJob(ctx, tx.Jobs[0]) },
			"run state": func(ctx context.Context, tx *store.RunTx) error { return tx.SetRun(ctx, store.RunErrored, "x") },
		} {
			if _, err := r.in(run.ID, f); !errors.Is(err, store.ErrStale) {
				t.Errorf("%s: %v, want ErrStale", what, err)
			}
		}
		_, err = r.in(run.ID, func(ctx context.Context, tx *store.RunTx) error { return tx.CancelAttempt(ctx, ref.ID, "late") })
		must(t, err)
		wantErr(t, r.Progress(t.Context(), ref, 99, 1, nil), store.ErrStale)
		after, err := r.Run(t.Context(), run.ID)
		must(t, err)
		eq(t, "version", after.Version, before.Version)
		eq(t, "job", r.job(jobs[0].ID).State, store.JobSucceeded)
		eq(t, "cancel", r.attempt(ref.ID).CancelReason, "")
	})
}

func TestTakeOverFences(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		r.run(nil)
		c, old := r.attached()
		must(t, r.start(c, old))
		m, a, j, run, err := r.Attach(t.Context(), c.Machine.ID, "o2", time.Minute)
		must(t, err)
		eq(t, "epoch", a.Epoch, old.Epoch+1)
		eq(t, "owner", a.Owner, "o2")
		eq(t, "machine's owner", m.Owner, "o2")
		eq(t, "job", j.ID, c.Job.ID)
		eq(t, "run", run.ID, c.Run.ID)
		wantErr(t, r.Progress(t.Context(), old, 1, 1, nil), store.ErrStale)
		wantErr(t, r.finish(c, old, store.Finish{State: store.JobFailed, AckedSeq: 1}), store.ErrStale)
		wantErr(t, r.lose(c, old, store.Loss{JobState: store.JobErrored}), store.ErrStale)
		ref := store.AttemptRef{ID: a.ID, Epoch: a.Epoch}
		must(t, r.start(c, ref)) // is running already
		must(t, r.Progress(t.Context(), ref, 1, 1, nil))
		still, _, err := r.Renew(t.Context(), "o1", time.Minute, nil, nil)
		must(t, err)
		eq(t, "the old owner's", len(still), 0)
	})
}

func TestRetryWaitsForTheMachine(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		run, jobs := r.run(nil)
		c, ref := r.attached()
		must(t, r.lose(c, ref, store.Loss{Class: "agent_lost", Reason: "silent", Retry: true}))
		a, j := r.attempt(ref.ID), r.job(jobs[0].ID)
		eq(t, "attempt", a.State, store.AttemptLost)
		eq(t, "epoch", a.Epoch, ref.Epoch+1)
		eq(t, "log lost", a.LogLost, true)
		eq(t, "job", j.State, store.JobQueued)
		eq(t, "hold", j.HoldID, c.Machine.ID)
		eq(t, "retries", string(j.Retries), `{"agent_lost":1}`)
		eq(t, "claim while held", len(r.claim(r.request("o1"))), 0)
		eq(t, "run", r.runState(run.ID), store.RunRunning)
		labels, err := r.ReleaseHolds(t.Context(), time.Hour)
		must(t, err)
		eq(t, "too early", len(labels), 0)
		labels, err = r.MachineGone(t.Context(), c.Machine.ID)
		must(t, err)
		eq(t, "labels", strings.Join(labels, " "), "linux")
		labels, err = r.MachineGone(t.Context(), c.Machine.ID)
		must(t, err)
		eq(t, "labels of a repeat", len(labels), 0)

		c, ref = r.attached()
		eq(t, "number", c.Attempt.Number, 2)
		_, err = r.in(run.ID, func(ctx context.Context, tx *store.RunTx) error {
			return tx.RetryAttempt(ctx, ref, store.Finish{Class: "infra", AckedSeq: 2})
		})
		must(t, err)
		eq(t, "retries", string(r.job(jobs[0].ID).Retries), `{"agent_lost":1,"infra":1}`)
		r.pass(2 * time.Hour)
		labels, err = r.ReleaseHolds(t.Context(), time.Hour)
		must(t, err)
		eq(t, "by time alone", strings.Join(labels, " "), "linux")

		c, ref = r.attached()
		_, err = r.MachineGone(t.Context(), c.Machine.ID) // before the loss is noticed
		must(t, err)
		change, err := r.in(run.ID, func(ctx context.Context, tx *store.RunTx) error {
			return tx.LoseAttempt(ctx, ref, store.Loss{Class: "agent_lost", Retry: true})
		})
		must(t, err)
		eq(t, "hold of a machine that is gone", r.job(jobs[0].ID).HoldID, "")
		eq(t, "labels", strings.Join(change.Labels, " "), "linux")
	})
}

func TestRunStateFromJobs(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		for _, c := range []struct {
			jobs []store.JobState
			want store.RunState
		}{
			{[]store.JobState{"waiting", "queued"}, store.RunRunning}, // the third job's end is a beginning
			{[]store.JobState{"skipped", "queued"}, store.RunRunning},
			{[]store.JobState{"failed", "queued"}, store.RunRunning},
			{[]store.JobState{"succeeded", "skipped"}, store.RunSucceeded},
			{[]store.JobState{"skipped", "skipped"}, store.RunSkipped},
			{[]store.JobState{"succeeded", "cancelled"}, store.RunCancelled},
			{[]store.JobState{"failed", "cancelled"}, store.RunFailed},
			{[]store.JobState{"timed_out", "succeeded"}, store.RunFailed},
			{[]store.JobState{"errored", "failed"}, store.RunErrored},
		} {
			run, _ := r.run(func(j *store.Job) { j.State = c.jobs[0] }, func(j *store.Job) { j.State = c.jobs[1] }, waiting)
			_, err := r.in(run.ID, func(ctx context.Context, tx *store.RunTx) error {
				return tx.EndJob(ctx, tx.Jobs[2], store.JobSkipped, "", "", nil)
			})
			must(t, err)
			eq(t, fmt.Sprint(c.jobs), r.runState(run.ID), c.want)
		}
		run, _ := r.run(nil, waiting)
		_, err := r.in(run.ID, func(ctx context.Context, tx *store.RunTx) error { return tx.QueueJob(ctx, tx.Jobs[1]) })
		must(t, err)
		eq(t, "queued only", r.runState(run.ID), store.RunQueued)
		_, err = r.in(run.ID, func(ctx context.Context, tx *store.RunTx) error {
			return tx.SetRun(ctx, store.RunAwaitingApproval, "fork")
		})
		must(t, err)
		eq(t, "as set", r.runState(run.ID), store.RunAwaitingApproval)
		_, err = r.in(run.ID, func(ctx context.Context, tx *store.RunTx) error {
			for _, j := range tx.Jobs {
				if err := tx.EndJob(ctx, j, store.JobCancelled, "cancelled", "no", nil); err != nil {
					return err
				}
			}
			return nil
		})
		must(t, err)
		eq(t, "cancelled while awaiting", r.runState(run.ID), store.RunCancelled)
	})
}

func TestCancel(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		run, _ := r.run(nil)
		c, ref := r.attached()
		for _, reason := range []string{"first", "second"} {
			_, err := r.in(run.ID, func(ctx context.Context, tx *store.RunTx) error {
				if tx.Run.CancelReason == "" {
					tx.Run.CancelReason = reason
				}
				if err := tx.SetRun(ctx, tx.Run.State, reason); err != nil {
					return err
				}
				return tx.CancelAttempt(ctx, ref.ID, reason)
			})
			must(t, err)
		}
		a := r.attempt(ref.ID)
		eq(t, "reason", a.CancelReason, "first")
		if a.CancelAt == 0 {
			t.Error("no time of cancelling")
		}
		got, err := r.Run(t.Context(), run.ID)
		must(t, err)
		eq(t, "run's reason", got.CancelReason, "first")
		must(t, r.finish(c, ref, store.Finish{State: store.JobCancelled, Class: "cancelled", AckedSeq: 1}))
		eq(t, "run", r.runState(run.ID), store.RunCancelled)
	})
}

// A transition and its messages commit together, or not at all.
func TestTransitionsAreAtomic(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		calls := 0
		r := newRig(t, url, func(run *store.Run, jobs, _ []*store.Job) []store.OutboxMessage {
			calls++
			return []store.OutboxMessage{{Key: run.ID, Topic: "t", Body: []byte{0, 1, 0xff, byte(len(jobs))}}}
		})
		run, jobs := r.run(nil)
		c, ref := r.attached() // the claim is a change, the attaching is not
		boom := errors.New("boom")
		_, err := r.in(run.ID, func(ctx context.Context, tx *store.RunTx) error {
			return errors.Join(tx.FinishAttempt(ctx, ref, store.Finish{State: store.JobFailed, AckedSeq: 1}), boom)
		})
		wantErr(t, err, boom)
		eq(t, "job", r.job(jobs[0].ID).State, store.JobAssigned)
		eq(t, "attempt", r.attempt(ref.ID).State, store.AttemptAssigned)
		eq(t, "machine", r.machine(c.Machine.ID).State, store.MachineBound)
		must(t, r.start(c, ref))
		eq(t, "calls", calls, 3)
		_, err = r.in(run.ID, func(context.Context, *store.RunTx) error { return nil })
		must(t, err)
		eq(t, "calls after nothing", calls, 3)
		msgs, err := r.OutboxClaim(t.Context(), "o", 10, time.Minute)
		must(t, err)
		eq(t, "messages", len(msgs), 3)
		for _, m := range msgs {
			if len(m.Body) != 4 || m.Body[2] != 0xff || m.Body[3] != 1 {
				t.Errorf("body came back as %v", m.Body)
			}
		}
	})
}

// Everybody wants to end the same attempt; one does, and the rest are refused.
func TestOneResultHoweverManyWant(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		for range 5 {
			run, jobs := r.run(nil)
			c, ref := r.attached()
			var wg sync.WaitGroup
			var mu sync.Mutex
			won := map[string]int{}
			try := func(name string, f func() error) {
				wg.Go(func() {
					err := f()
					mu.Lock()
					defer mu.Unlock()
					if err == nil {
						won[name]++
					} else if !errors.Is(err, store.ErrStale) && !errors.Is(err, store.ErrOver) {
						t.Errorf("%s: %v", name, err)
					}
				})
			}
			for i := range 3 {
				try("finish", func() error { return r.finish(c, ref, store.Finish{State: store.JobSucceeded, AckedSeq: int64(i)}) })
				try("lose", func() error { return r.lose(c, ref, store.Loss{JobState: store.JobErrored}) })
				try("retry", func() error { return r.lose(c, ref, store.Loss{Class: "infra", Retry: true}) })
				try("attach", func() error {
					_, _, _, _, err := r.Attach(t.Context(), c.Machine.ID, "o2", time.Minute)
					return err
				})
				try("start", func() error { return r.start(c, ref) })
			}
			wg.Wait()
			a, j := r.attempt(ref.ID), r.job(jobs[0].ID)
			ends := won["finish"] + won["lose"] + won["retry"]
			over := a.State == store.AttemptFinished || a.State == store.AttemptLost
			if ends > 1 || (ends == 1) != over {
				t.Errorf("%v: attempt %s, job %s", won, a.State, j.State)
			}
			agree := map[string]store.JobState{"finish": store.JobSucceeded, "lose": store.JobErrored, "retry": store.JobQueued}
			for name, want := range agree {
				if won[name] == 1 {
					eq(t, name, j.State, want)
				}
			}
			if ends == 0 { // attaching took it from all of them
				must(t, r.lose(c, store.AttemptRef{ID: a.ID, Epoch: a.Epoch}, store.Loss{JobState: store.JobErrored}))
			}
			_, err := r.MachineGone(t.Context(), c.Machine.ID)
			must(t, err)
			_, err = r.in(run.ID, func(ctx context.Context, tx *store.RunTx) error {
				if tx.Jobs[0].State.Terminal() {
					return nil
				}
				return tx.EndJob(ctx, tx.Jobs[0], store.JobCancelled, "", "", nil)
			})
			must(t, err)
		}
	})
}
