package solstice

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

// decision is what becomes of a waiting job once its needs are over.
type decision struct {
	job    *store.Job
	state  store.JobState // queued, skipped or errored
	class  Class
	reason string
}

// decide looks at one plan as it stands and says which waiting jobs can go on.
// Deciding one job may make the next decidable, so callers apply the decisions
// and ask again until there are none. No job of a run that awaits approval, or its
// turn in a concurrency group, can.
func decide(run *store.Run, jobs []*store.Job) []decision {
	if run.State == store.RunAwaitingApproval || run.State == store.RunPlanning {
		return nil
	}
	byKey := map[string][]*store.Job{}
	for _, j := range jobs {
		byKey[j.Key] = append(byKey[j.Key], j)
	}
	var out []decision
	for _, j := range jobs {
		if j.State != store.JobWaiting {
			continue
		}
		needs, over := needsOf(j, byKey)
		if !over {
			continue
		}
		spec := decode[workflow.PlannedJob](j.Spec)
		cx := contextsOf(run, &spec, needs)
		ok, err := cx.Condition(spec.If)
		d := decision{job: j, state: store.JobQueued}
		switch {
		case err != nil:
			d.state, d.class, d.reason = store.JobErrored, ClassUser, fmt.Sprintf("its condition cannot be evaluated: %v", err)
		case !ok && spec.If == "":
			d.state, d.reason = store.JobSkipped, "a job that it needs did not succeed"
		case !ok:
			d.state, d.reason = store.JobSkipped, whySkipped(cx, spec.If)
		}
		out = append(out, d)
	}
	return out
}

// whySkipped says why a condition does not hold: one that reads as true may
// still ask for success() without a word.
func whySkipped(cx workflow.Contexts, cond string) string {
	if cx.Status != "" && cx.Status != workflow.StatusSuccess {
		cx.Status = workflow.StatusSuccess
		if held, err := cx.Condition(cond); err == nil && held {
			return "a job that it needs did not succeed, and a condition without failure(), cancelled() or always() asks for success(): " + cond
		}
	}
	return "its condition is false: " + cond
}

// needsOf gives the results that a job needs; false while any is open.
func needsOf(j *store.Job, byKey map[string][]*store.Job) (map[string]workflow.Need, bool) {
	needs := map[string]workflow.Need{}
	for _, key := range decode[[]string](j.Needs) {
		n := workflow.Need{Outputs: map[string]string{}}
		var results []string
		for _, dep := range byKey[key] {
			if !dep.State.Terminal() {
				return nil, false
			}
			results = append(results, resultOf(dep.State))
			for k, v := range decode[map[string]string](dep.Outputs) {
				if v != "" || n.Outputs[k] == "" {
					n.Outputs[k] = v
				}
			}
		}
		n.Result = worst(results)
		needs[key] = n
	}
	return needs, true
}

func resultOf(s store.JobState) string {
	switch s {
	case store.JobSucceeded:
		return workflow.StatusSuccess
	case store.JobSkipped:
		return workflow.StatusSkipped
	case store.JobCancelled:
		return workflow.StatusCancelled
	}
	return workflow.StatusFailure
}

// worst is the result of several: failure before cancelled before success;
// skipped only when all were.
func worst(results []string) string {
	for _, r := range []string{workflow.StatusFailure, workflow.StatusCancelled, workflow.StatusSuccess} {
		if slices.Contains(results, r) {
			return r
		}
	}
	return workflow.StatusSkipped
}

// contextsOf gives what expressions of a job see before it runs.
func contextsOf(run *store.Run, spec *workflow.PlannedJob, needs map[string]workflow.Need) workflow.Contexts {
	cx := runContexts(run)
	cx.Matrix = spec.Matrix
	cx.Needs = needs
	cx.Status = workflow.StatusSuccess
	results := []string{workflow.StatusSuccess}
	for _, n := range needs {
		results = append(results, n.Result)
	}
	// A skipped need is no success, and no failure either.
	for _, r := range []string{workflow.StatusSkipped, workflow.StatusCancelled, workflow.StatusFailure} {
		if slices.Contains(results, r) {
			cx.Status = r
		}
	}
	return cx
}

func runContexts(run *store.Run) workflow.Contexts {
	return workflow.Contexts{
		Event:  eventValues(run.Event),
		Inputs: decode[workflow.Values](run.Inputs),
		Ref:    run.Ref,
		SHA:    run.Commit,
		Repo:   repoName(run.Repo),
	}
}

func eventValues(raw json.RawMessage) workflow.Values { return decode[workflow.Values](raw) }

// withRun runs a transition under the run's lock, lets what it made possible
// go on, and after the commit wakes whom it concerns.
func (e *Engine) withRun(ctx context.Context, runID string, fn func(ctx context.Context, t *store.RunTx) error) error {
	change, err := e.store.WithRun(ctx, runID, func(ctx context.Context, t *store.RunTx) error {
		if err := fn(ctx, t); err != nil {
			return err
		}
		return advance(ctx, t)
	})
	if err != nil {
		return err
	}
	e.changed(change)
	return nil
}

func advance(ctx context.Context, t *store.RunTx) error {
	for {
		ds := decide(t.Run, t.Jobs)
		if len(ds) == 0 {
			return nil
		}
		for _, d := range ds {
			var err error
			if d.state == store.JobQueued {
				err = t.QueueJob(ctx, d.job)
			} else {
				err = t.EndJob(ctx, d.job, d.state, string(d.class), d.reason, nil)
			}
			if err != nil {
				return err
			}
		}
	}
}

// changed passes a committed change on to followers, dispatchers and the relay.
func (e *Engine) changed(c store.Change) {
	if c.Run != nil {
		e.hub.notify(c.Run.ID)
	}
	for _, j := range c.Jobs {
		e.hub.notify(j.ID)
		if j.State.Terminal() {
			e.metrics.jobOver(j)
			e.traceJob(c.Run, j)
		}
	}
	if len(c.Labels) > 0 {
		e.wake(c.Labels)
	}
	if c.Run != nil && c.Run.Concurrency != "" {
		e.groupKick.set()
	}
	e.relayKick.set()
}
