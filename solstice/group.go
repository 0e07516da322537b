package solstice

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

// pullGroup begins the groups of pull requests whose workflow names none.
const pullGroup = "pull_request/"

// groupOf is the concurrency group of a run, and whether it ends the older ones:
// what the workflow says, and of a pull request else its runs of that workflow.
func groupOf(r RunRequest, path string, c *workflow.Concurrency) (group string, cancel bool) {
	pr := r.Event.PullRequest
	switch {
	case c != nil:
		return "group/" + c.Group, c.CancelInProgress
	case r.Event.Kind == forge.KindPullRequest && pr != nil:
		return pullGroup + strconv.Itoa(pr.Number) + "/" + path, true
	}
	return "", false
}

// waitsForGroup is why a run whose turn has not come waits.
const waitsForGroup = "Waits for another run of its concurrency group"

// enterGroup has a run that is not in the store yet wait for its turn.
func enterGroup(run *store.Run) {
	if run.Concurrency != "" && !run.State.Terminal() && run.State != store.RunAwaitingApproval {
		run.State, run.Reason = store.RunPlanning, waitsForGroup
	}
}

// supersede ends the older runs of a run's group: those that wait, and where
// cancel is set those that are under way.
func (e *Engine) supersede(ctx context.Context, run *store.Run, cancel bool) error {
	group, err := e.store.Group(ctx, run.RepoKey, run.Concurrency)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range group {
		if r.ID < run.ID && (cancel || r.State == store.RunPlanning) {
			errs = append(errs, e.Cancel(ctx, r.ID, "superseded by run "+run.ID))
		}
	}
	return errors.Join(errs...)
}

// groupLoop lets runs go on whose turn has come: when one of this engine is over or
// came, and on a slow tick, since another engine may have died in between.
func (e *Engine) groupLoop(ctx context.Context) {
	tick := time.NewTicker(e.cfg.Timing.Tick)
	defer tick.Stop()
	for {
		if err := e.releaseGroups(ctx); err != nil && ctx.Err() == nil {
			e.log.WarnContext(ctx, "concurrency groups not looked at", "error", e.noted(err))
		}
		select {
		case <-ctx.Done():
			return
		case <-e.groupKick.c:
		case <-tick.C:
		}
	}
}

func (e *Engine) releaseGroups(ctx context.Context) error {
	const many = 1000 // of those that are further behind the turn comes later
	waiting, err := e.store.Waiting(ctx, many)
	if err != nil {
		return err
	}
	seen := map[string]bool{}
	var errs []error
	for _, r := range waiting {
		key := r.RepoKey + "\n" + r.Concurrency
		if seen[key] { // behind another
			continue
		}
		seen[key] = true
		errs = append(errs, e.begin(ctx, r.ID))
	}
	return errors.Join(errs...)
}

// begin lets a run go on if its turn has come.
func (e *Engine) begin(ctx context.Context, runID string) error {
	return e.withRun(ctx, runID, func(ctx context.Context, t *store.RunTx) error {
		if t.Run.State != store.RunPlanning {
			return nil
		}
		may, err := t.MayBegin(ctx)
		if err != nil || !may {
			return err
		}
		return t.SetRun(ctx, store.RunQueued, "")
	})
}
