package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
)

// InsertRun adds a run and its jobs with the states they have. CreatedAt,
// Version, QueuedAt of queued jobs and FinishedAt of a run that is over are
// filled in. A delivery or idempotency key that was used for the same workflow
// before returns ErrDuplicate and changes nothing, as does a run ID; a rerun
// of a run that is being removed returns ErrRemoved.
func (s *Store) InsertRun(ctx context.Context, run *Run, jobs []*Job) error {
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		run.CreatedAt, run.Version = now, 1
		if run.State.Terminal() {
			run.FinishedAt = now
		}
		for _, j := range jobs {
			j.RunID, j.Version = run.ID, 1
			if j.State == JobQueued && j.QueuedAt == 0 {
				j.QueuedAt = now
			}
			if j.State.Terminal() && j.FinishedAt == 0 {
				j.FinishedAt = now
			}
		}
		if err := lockOrigins(ctx, tx, run, jobs); err != nil {
			return err
		}
		if _, err := tx.NewInsert().Model(run).Exec(ctx); err != nil {
			if sqldb.IsUnique(err) {
				return fmt.Errorf("%w: %w", ErrDuplicate, err)
			}
			return err
		}
		if len(jobs) > 0 {
			if _, err := tx.NewInsert().Model(&jobs).Exec(ctx); err != nil {
				return err
			}
		}
		return s.emit(ctx, tx, now, run, jobs, jobs)
	})
	err = sqldb.Settle(ctx, err, settlePatience, func(ctx context.Context) error {
		_, err := s.Run(ctx, run.ID) // the ID is ours alone
		return err
	})
	if err != nil {
		return fmt.Errorf("store: insert run: %w", err)
	}
	return nil
}

// settlePatience is how long the outcome of a commit is asked for while the
// database is away.
const settlePatience = 30 * time.Second

// Change is what a transaction did to a run.
type Change struct {
	Run    *Run     // as it is now
	Jobs   []*Job   // that changed, in the plan's order
	Labels []string // that have newly claimable jobs
}

// staleTries bounds how often WithRun begins again after ErrStale.
const staleTries = 3

// WithRun runs fn under the lock of a run with all its jobs loaded, derives the
// run's state from its jobs, counts up the versions of what changed, asks
// Options.Changed for messages, and commits. fn may run several times, after a
// serialization failure or ErrStale, and sees a fresh RunTx each time. An error
// of fn changes nothing.
//
// The run's state: while it is planning or awaits approval, as set. All jobs
// over: errored, failed (also for a job that timed out), cancelled, whichever
// comes first in this list; skipped when all were; else succeeded. Else running
// once a job is beyond queued, also when a retry queues it again, and queued
// before. A run that is over stays as
// it is.
func (s *Store) WithRun(ctx context.Context, runID string, fn func(ctx context.Context, t *RunTx) error) (Change, error) {
	for try := 1; ; try++ {
		var c Change
		err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
			t, err := s.lockRun(ctx, tx, now, runID)
			if err != nil {
				return err
			}
			if err := fn(ctx, t); err != nil {
				return err
			}
			c, err = t.settle(ctx)
			return err
		})
		if err == nil {
			return c, nil
		}
		if !errors.Is(err, ErrStale) || try == staleTries {
			return Change{}, err
		}
	}
}

// RunTx is a run under its lock. The loaded rows are what the methods compare
// with; they keep them up to date. Callers change Run through SetRun, except
// for CancelReason, Awaits and Diagnostics, which they may set before it.
type RunTx struct {
	Run  *Run
	Jobs []*Job
	Now  int64

	s      *Store
	tx     bun.Tx
	before RunState
	runSet bool
	dirty  map[string]bool
	labels []string
}

// lockRun loads a run for changing. Whoever changes a job's state holds this
// lock.
func (s *Store) lockRun(ctx context.Context, tx bun.Tx, now int64, id string) (*RunTx, error) {
	t := &RunTx{Run: new(Run), Now: now, s: s, tx: tx, dirty: map[string]bool{}}
	if err := lockRow(tx, tx.NewSelect().Model(t.Run).Where("id = ?", id)).Scan(ctx); err != nil {
		return nil, found(err, "run", id)
	}
	t.before = t.Run.State
	return t, tx.NewSelect().Model(&t.Jobs).Where("run_id = ?", id).OrderBy("idx", bun.OrderAsc).Scan(ctx)
}

func (t *RunTx) job(id string) *Job {
	i := slices.IndexFunc(t.Jobs, func(j *Job) bool { return j.ID == id })
	if i < 0 {
		return nil
	}
	return t.Jobs[i]
}

// setJob changes a job, which must still be in the state it was loaded in.
func (t *RunTx) setJob(ctx context.Context, j *Job, set func(*Job)) error {
	from, next := j.State, *j
	set(&next)
	next.Version++
	ok, err := changed(t.tx.NewUpdate().Model(&next).
		Column("state", "class", "reason", "outputs", "retries", "attempts", "attempt_id", "hold_id", "version", "queued_at", "started_at", "finished_at").
		Where("id = ? AND state = ? AND version = ?", j.ID, from, j.Version).Exec(ctx))
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("%w: job %s is not %s any more", ErrStale, j.ID, from)
	}
	*j = next
	t.dirty[j.ID] = true
	if j.State == JobQueued && j.HoldID == "" && !slices.Contains(t.labels, j.Label) {
		t.labels = append(t.labels, j.Label)
	}
	return nil
}

func wrongState(what, id string, state any) error {
	return fmt.Errorf("%w: %s %s is %v", ErrStale, what, id, state)
}

// QueueJob makes a waiting job claimable.
func (t *RunTx) QueueJob(ctx context.Context, j *Job) error {
	if j.State != JobWaiting {
		return wrongState("job", j.ID, j.State)
	}
	return t.setJob(ctx, j, func(j *Job) { j.State, j.QueuedAt = JobQueued, t.Now })
}

// EndJob ends a job that was not claimed.
func (t *RunTx) EndJob(ctx context.Context, j *Job, state JobState, class, reason string, outputs json.RawMessage) error {
	if j.State != JobWaiting && j.State != JobQueued || !state.Terminal() {
		return wrongState("job", j.ID, j.State)
	}
	return t.setJob(ctx, j, func(j *Job) {
		j.State, j.Class, j.Reason, j.Outputs, j.HoldID, j.FinishedAt = state, class, reason, outputs, "", t.Now
	})
}

// Attempt reads an attempt of this run and keeps it from changing hands until
// the commit.
func (t *RunTx) Attempt(ctx context.Context, id string) (*Attempt, error) {
	a := new(Attempt)
	err := lockRow(t.tx, t.tx.NewSelect().Model(a).Where("id = ? AND run_id = ?", id, t.Run.ID)).Scan(ctx)
	return a, found(err, "attempt", id)
}

// SetRun sets the run's state and why; the state of a run that is over stays.
func (t *RunTx) SetRun(_ context.Context, state RunState, reason string) error {
	if t.before.Terminal() && state != t.before {
		return wrongState("run", t.Run.ID, t.before)
	}
	t.Run.State, t.Run.Reason, t.runSet = state, reason, true
	return nil
}

// settle derives the run's state and writes what changed.
func (t *RunTx) settle(ctx context.Context) (Change, error) {
	c := Change{Run: t.Run, Labels: t.labels}
	for _, j := range t.Jobs {
		if t.dirty[j.ID] {
			c.Jobs = append(c.Jobs, j)
		}
	}
	if t.before.Terminal() { // reached with jobs still live, or set: it stays
		t.Run.State = t.before
	} else {
		t.derive()
	}
	if len(c.Jobs) == 0 && !t.runSet && t.Run.State == t.before {
		return c, nil
	}
	if t.Run.State.Terminal() && t.Run.FinishedAt == 0 {
		t.Run.FinishedAt = t.Now
	}
	version := t.Run.Version
	t.Run.Version++
	ok, err := changed(t.tx.NewUpdate().Model(t.Run).
		Column("state", "reason", "diagnostics", "cancel_reason", "awaits", "version", "started_at", "finished_at").
		Where("id = ? AND version = ?", t.Run.ID, version).Exec(ctx))
	if err != nil {
		return c, err
	}
	if !ok {
		return c, wrongState("run", t.Run.ID, "changed")
	}
	return c, t.s.emit(ctx, t.tx, t.Now, t.Run, c.Jobs, t.Jobs)
}

// summary says what became of the jobs of a run that is over: of those that did not
// do well how many there are, and the first by name.
func summary(jobs []*Job) string {
	const shown = 3
	for _, c := range []struct {
		what   string
		states []JobState
	}{{"errored", []JobState{JobErrored}}, {"failed", []JobState{JobFailed, JobTimedOut}}, {"cancelled", []JobState{JobCancelled}}} {
		var names []string
		for _, j := range jobs {
			if slices.Contains(c.states, j.State) {
				names = append(names, j.Name)
			}
		}
		if n := len(names); n > 0 {
			text := fmt.Sprintf("%d of %d jobs %s: %s", n, len(jobs), c.what, strings.Join(names[:min(n, shown)], ", "))
			if n > shown {
				text += fmt.Sprintf(" and %d more", n-shown)
			}
			return text
		}
	}
	return ""
}

func (t *RunTx) derive() {
	r, n := t.Run, map[JobState]int{}
	begun, over := false, 0
	for _, j := range t.Jobs {
		n[j.State]++
		if j.State.Terminal() {
			over++
		}
		if j.State == JobRunning && r.StartedAt == 0 {
			r.StartedAt = t.Now
		}
		begun = begun || j.CopiedFrom == "" && j.State != JobWaiting && j.State != JobQueued
	}
	switch {
	case len(t.Jobs) == 0:
	case over == len(t.Jobs):
		switch {
		case n[JobErrored] > 0:
			r.State = RunErrored
		case n[JobFailed]+n[JobTimedOut] > 0:
			r.State = RunFailed
		case n[JobCancelled] > 0:
			r.State = RunCancelled
		case n[JobSkipped] == over:
			r.State = RunSkipped
		default:
			r.State = RunSucceeded
		}
		if !t.runSet {
			r.Reason = summary(t.Jobs)
		}
	case r.State == RunPlanning, r.State == RunAwaitingApproval, r.State.Terminal():
	case begun || r.State == RunRunning:
		r.State = RunRunning
	default:
		r.State = RunQueued
	}
}
