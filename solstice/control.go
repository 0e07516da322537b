package solstice

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

// Cancel ends a run: jobs that have not begun are cancelled at once, those
// that run are told to stop (SIGTERM, the grace, SIGKILL, then their steps
// whose condition asks for it) and end as cancelled. It returns when the wish is
// durable; a run that is over is not changed and is no error.
func (e *Engine) Cancel(ctx context.Context, runID, reason string) error {
	reason = firstOf(reason, "cancelled")
	var live []*store.Attempt
	err := e.withRun(ctx, runID, func(ctx context.Context, t *store.RunTx) error {
		live = live[:0]
		if t.Run.State.Terminal() {
			return nil
		}
		if t.Run.CancelReason == "" {
			t.Run.CancelReason = reason
			if err := t.SetRun(ctx, t.Run.State, reason); err != nil {
				return err
			}
		}
		for _, j := range t.Jobs {
			switch j.State {
			case store.JobWaiting, store.JobQueued:
				if err := t.EndJob(ctx, j, store.JobCancelled, string(ClassCancelled), reason, nil); err != nil {
					return err
				}
			case store.JobAssigned, store.JobRunning:
				if err := t.CancelAttempt(ctx, j.AttemptID, reason); err != nil {
					return err
				}
				a, err := t.Attempt(ctx, j.AttemptID)
				if err != nil {
					return err
				}
				live = append(live, a)
			}
		}
		return nil
	})
	if err != nil {
		return e.publicError("run "+runID, err)
	}
	for _, a := range live {
		if a.ContactAt == 0 { // no agent to tell: the machine just goes
			e.lose(ctx, a, ClassCancelled, reason, "")
			continue
		}
		e.cancelAttempt(a.MachineID, reason)
	}
	return nil
}

// Approve lets a run begin that awaits approval. commit is what was looked at: of a
// pull request its head. Another one than the run's wraps ErrInvalid, so that nothing else is let in.
// A run that does not await approval (any more) wraps ErrOver.
func (e *Engine) Approve(ctx context.Context, runID, commit string) (Run, error) {
	err := e.withRun(ctx, runID, func(ctx context.Context, t *store.RunTx) error {
		if t.Run.State != store.RunAwaitingApproval {
			return fmt.Errorf("%w: run %s is %s, it does not await approval", ErrOver, runID, t.Run.State)
		}
		if head := firstOf(t.Run.Head, t.Run.Commit); commit != head {
			return fmt.Errorf("%w: run %s is of commit %s, not %s", ErrInvalid, runID, head, firstOf(commit, "an empty one"))
		}
		t.Run.Awaits = ""
		may, err := t.MayBegin(ctx)
		switch {
		case err != nil:
			return err
		case !may:
			return t.SetRun(ctx, store.RunPlanning, waitsForGroup)
		}
		return t.SetRun(ctx, store.RunQueued, "")
	})
	if err != nil {
		return Run{}, e.publicError("run "+runID, err)
	}
	return e.GetRun(ctx, runID)
}

// RerunOptions qualifies a rerun; the zero value runs everything again.
type RerunOptions struct {
	// Failed keeps the results of jobs that succeeded or were skipped for a
	// false condition, and runs the others and what needs them.
	Failed bool
	// IdempotencyKey makes a repeat return the rerun of the first time.
	IdempotencyKey string
}

// Rerun makes a new run of a terminal one: the same commit and plan. A run that
// is not over, or that never had a plan, wraps ErrOver; a full disk ErrNoSpace.
func (e *Engine) Rerun(ctx context.Context, runID string, o RerunOptions) (Run, error) {
	if err := e.space.err(); err != nil {
		return Run{}, err
	}
	old, err := e.store.Run(ctx, runID)
	if err != nil {
		return Run{}, e.publicError("run "+runID, err)
	}
	if old.Retention == store.RunGoing {
		return Run{}, e.publicError("run "+runID, store.ErrRemoved)
	}
	if !old.State.Terminal() {
		return Run{}, fmt.Errorf("%w: run %s is %s: cancel it first", ErrOver, runID, old.State)
	}
	oldJobs, err := e.store.Jobs(ctx, runID)
	if err != nil {
		return Run{}, err
	}
	if len(oldJobs) == 0 {
		return Run{}, fmt.Errorf("%w: run %s has no jobs (%s)", ErrOver, runID, old.Reason)
	}
	run := &store.Run{
		ID: newID(), State: store.RunQueued, Forge: old.Forge, Repo: old.Repo, RepoKey: old.RepoKey, Commit: old.Commit, Ref: old.Ref,
		Event: old.Event, Inputs: old.Inputs, WorkflowPath: old.WorkflowPath, WorkflowName: old.WorkflowName, Priority: old.Priority,
		RerunOf: old.ID, IdempotencyKey: o.IdempotencyKey, Trace: traceParent(ctx),
		Head: old.Head, Note: old.Note, Concurrency: old.Concurrency,
	}
	awaitApproval(run, old.Awaits) // to cancel is not to approve
	again := map[string]bool{}     // by key: all combinations share the fate of what needs them
	if o.Failed {
		for _, j := range oldJobs {
			if j.State != store.JobSucceeded && j.State != store.JobSkipped {
				again[j.Key] = true
			}
		}
		if len(again) == 0 {
			return Run{}, fmt.Errorf("%w: no job of run %s failed", ErrOver, runID)
		}
		for grew := true; grew; {
			grew = false
			for _, j := range oldJobs {
				if !again[j.Key] && slices.ContainsFunc(decode[[]string](j.Needs), func(n string) bool { return again[n] }) {
					again[j.Key], grew = true, true
				}
			}
		}
	}
	var jobs []*store.Job
	for _, j := range oldJobs {
		n := &store.Job{
			ID: newID(), RunID: run.ID, Idx: j.Idx, Key: j.Key, Name: j.Name, Label: j.Label, State: store.JobWaiting,
			Needs: j.Needs, Spec: j.Spec, Priority: j.Priority, RepoKey: j.RepoKey,
		}
		if keep := o.Failed && (!again[j.Key] || j.State == store.JobSucceeded && !dependsOn(j, again)); keep {
			n.State, n.Outputs, n.Class, n.Reason = j.State, j.Outputs, j.Class, j.Reason
			n.CopiedFrom, n.AttemptID = firstOf(j.CopiedFrom, j.ID), j.AttemptID
			n.QueuedAt, n.StartedAt, n.FinishedAt = j.QueuedAt, j.StartedAt, j.FinishedAt
		}
		jobs = append(jobs, n)
	}
	enterGroup(run)
	applyDecisions(run, jobs)
	err = e.store.InsertRun(ctx, run, jobs)
	if errors.Is(err, store.ErrDuplicate) {
		first, err := e.store.RunByKey(ctx, run.Forge, "", run.IdempotencyKey, run.WorkflowPath)
		if err != nil {
			return Run{}, err
		}
		return e.GetRun(ctx, first.ID)
	}
	if errors.Is(err, store.ErrRemoved) {
		return Run{}, e.publicError("run "+runID, err)
	}
	if err != nil {
		return Run{}, e.noted(fmt.Errorf("solstice: accept rerun: %w", err))
	}
	e.changed(store.Change{Run: run, Jobs: jobs, Labels: queuedLabels(jobs)})
	return publicRun(run, jobs), nil
}

// dependsOn reports whether a job needs one that runs again, so that its own
// old success says nothing any more.
func dependsOn(j *store.Job, again map[string]bool) bool {
	return slices.ContainsFunc(decode[workflow.PlannedJob](j.Spec).Needs, func(n string) bool { return again[n] })
}

// applyDecisions moves jobs on that are not in the store yet.
func applyDecisions(run *store.Run, jobs []*store.Job) {
	for {
		ds := decide(run, jobs)
		if len(ds) == 0 {
			return
		}
		for _, d := range ds {
			d.job.State, d.job.Class, d.job.Reason = d.state, string(d.class), d.reason
		}
	}
}

// GetRun gives a run with its jobs; unknown wraps ErrNotFound.
func (e *Engine) GetRun(ctx context.Context, runID string) (Run, error) {
	r, err := e.store.Run(ctx, runID)
	if err == nil && r.Retention == store.RunGoing {
		err = store.ErrRemoved
	}
	if err != nil {
		return Run{}, e.publicError("run "+runID, err)
	}
	jobs, err := e.store.Jobs(ctx, runID)
	if err != nil {
		return Run{}, err
	}
	return publicRun(r, jobs), nil
}

// RunFilter selects runs; its zero value selects the newest 50.
type RunFilter struct {
	Forge  string     // instance name
	Repo   string     // its full name; needs Forge where there are several
	States []RunState // any of them
	Commit string     // full object name
	Ref    string     // full; needs Repo
	Limit  int        // 0: 50, at most 500
	Before string     // run ID: only older ones, for paging
}

// Runs lists runs without their jobs, newest first. A filter that lacks what
// it needs wraps ErrInvalid.
func (e *Engine) Runs(ctx context.Context, f RunFilter) ([]Run, error) {
	if f.Repo != "" && f.Forge == "" && len(e.cfg.Forges) == 1 {
		f.Forge = slices.Collect(maps.Keys(e.cfg.Forges))[0]
	}
	if f.Repo != "" && f.Forge == "" || f.Ref != "" && f.Repo == "" {
		return nil, fmt.Errorf("%w: runs of a repository need its forge, and runs of a ref the repository", ErrInvalid)
	}
	limit := f.Limit
	if limit <= 0 {
		limit = 50
	}
	q := store.RunFilter{Forge: f.Forge, Commit: f.Commit, Ref: f.Ref, Limit: min(limit, 500), Before: f.Before}
	if f.Repo != "" {
		q.Repo = f.Forge + "/" + f.Repo
	}
	for _, s := range f.States {
		q.States = append(q.States, store.RunState(s))
	}
	rows, err := e.store.Runs(ctx, q)
	if err != nil {
		return nil, err
	}
	out := make([]Run, 0, len(rows))
	for _, r := range rows {
		out = append(out, publicRun(r, nil))
	}
	return out, nil
}

// minPrefix is the shortest prefix of an ID that is looked for.
const minPrefix = 8

// FindRun gives the ID of the one run whose ID begins with prefix, which has
// at least 8 characters. None wraps ErrNotFound; several, or a shorter prefix,
// ErrInvalid.
func (e *Engine) FindRun(ctx context.Context, prefix string) (string, error) {
	return e.find(ctx, "run", prefix, e.store.RunsByPrefix)
}

// FindJob is FindRun for a job.
func (e *Engine) FindJob(ctx context.Context, prefix string) (string, error) {
	return e.find(ctx, "job", prefix, e.store.JobsByPrefix)
}

// FindAttempt is FindRun for an attempt.
func (e *Engine) FindAttempt(ctx context.Context, prefix string) (string, error) {
	return e.find(ctx, "attempt", prefix, e.store.AttemptsByPrefix)
}

func (e *Engine) find(ctx context.Context, what, prefix string, lookUp func(context.Context, string, int) ([]string, error)) (string, error) {
	if len(prefix) < minPrefix {
		return "", fmt.Errorf("%w: %q is too short for a %s: give at least %d characters of its ID", ErrInvalid, prefix, what, minPrefix)
	}
	ids, err := lookUp(ctx, prefix, 2)
	switch {
	case err != nil:
		return "", e.publicError(what+" "+prefix, err)
	case len(ids) == 0:
		return "", e.publicError(what+" "+prefix, store.ErrNotFound)
	case len(ids) > 1 && ids[0] != prefix:
		return "", fmt.Errorf("%w: several %ss begin with %q: give more of the ID", ErrInvalid, what, prefix)
	}
	return ids[0], nil
}

// Job gives one job; unknown wraps ErrNotFound.
func (e *Engine) Job(ctx context.Context, jobID string) (Job, error) {
	j, err := e.store.Job(ctx, jobID)
	if err != nil {
		return Job{}, e.publicError("job "+jobID, err)
	}
	return publicJob(j), nil
}

// Attempts lists the attempts of a job, first one first.
func (e *Engine) Attempts(ctx context.Context, jobID string) ([]Attempt, error) {
	rows, err := e.store.Attempts(ctx, jobID)
	if err != nil {
		return nil, e.publicError("job "+jobID, err)
	}
	out := make([]Attempt, 0, len(rows))
	for _, a := range rows {
		out = append(out, publicAttempt(a))
	}
	return out, nil
}

// LogAttempts lists the attempts whose logs are a job's, first one first: its
// own, or, where it keeps the result of an earlier run's job, that one's. Those
// that went with the earlier run wrap ErrRemoved.
func (e *Engine) LogAttempts(ctx context.Context, jobID string) ([]Attempt, error) {
	j, err := e.store.Job(ctx, jobID)
	if err != nil {
		return nil, e.publicError("job "+jobID, err)
	}
	return e.logAttempts(ctx, j)
}

func (e *Engine) logAttempts(ctx context.Context, j *store.Job) ([]Attempt, error) {
	attempts, err := e.Attempts(ctx, firstOf(j.CopiedFrom, j.ID))
	if err == nil && len(attempts) == 0 && j.CopiedFrom != "" && j.AttemptID != "" {
		err = e.publicError("log of job "+j.ID+", made by job "+j.CopiedFrom+" of an earlier run", store.ErrRemoved)
	}
	return attempts, err
}

// Attempt gives one attempt; unknown wraps ErrNotFound.
func (e *Engine) Attempt(ctx context.Context, attemptID string) (Attempt, error) {
	a, err := e.store.Attempt(ctx, attemptID)
	if err != nil {
		return Attempt{}, e.publicError("attempt "+attemptID, err)
	}
	return publicAttempt(a), nil
}

// Steps lists the steps of an attempt that have begun, in order.
func (e *Engine) Steps(ctx context.Context, attemptID string) ([]Step, error) {
	rows, err := e.store.Steps(ctx, attemptID)
	if err != nil {
		return nil, e.publicError("attempt "+attemptID, err)
	}
	out := make([]Step, 0, len(rows))
	for _, s := range rows {
		out = append(out, publicStep(s))
	}
	return out, nil
}

func (e *Engine) publicError(what string, err error) error {
	switch {
	case errors.Is(err, store.ErrRemoved):
		return fmt.Errorf("%w: %s", ErrRemoved, what)
	case errors.Is(err, store.ErrNotFound):
		return fmt.Errorf("%w: %s", ErrNotFound, what)
	case errors.Is(err, ErrOver), errors.Is(err, ErrInvalid): // said in full already
		return err
	}
	return fmt.Errorf("solstice: %s: %w", what, err)
}
