package solstice

import (
	"context"
	"errors"
	"fmt"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/queue"
)

// pressed does what somebody asked for by a button on the forge. Who it was is the
// forge's to know; only to approve takes more than to press.
func (e *Engine) pressed(ctx context.Context, r RunRequest) error {
	f, err := e.forgeOf(&r)
	if err != nil {
		return queue.Discard(err)
	}
	runs, err := e.meant(ctx, r)
	if err != nil {
		return err
	}
	who := firstOf(r.Event.Sender.Login, "somebody")
	log := e.log.With("repo", r.Repo.FullName(), "event", r.Event.Kind, "by", who)
	if len(runs) == 0 {
		log.InfoContext(ctx, "the button of a run that is not there", "external_id", r.Event.ExternalID, "commit", r.Event.Commit)
		return nil
	}
	for _, run := range runs {
		switch r.Event.Kind {
		case forge.KindCancel:
			err = e.Cancel(ctx, run.ID, "cancelled by "+who)
		case forge.KindApprove:
			var may bool
			if may, err = mayApprove(ctx, f, r.Repo, r.Event.Sender); err == nil && !may {
				log.WarnContext(ctx, "not approved: who pressed the button may not", "run_id", run.ID)
				continue
			}
			if err == nil {
				_, err = e.Approve(ctx, run.ID, r.Event.Commit)
			}
		default:
			_, err = e.Rerun(ctx, run.ID, RerunOptions{Failed: run.State != store.RunSucceeded && run.State != store.RunSkipped, IdempotencyKey: "button/" + firstOf(r.Event.Delivery, r.IdempotencyKey) + "/" + run.ID})
		}
		switch {
		case errors.Is(err, ErrOver), errors.Is(err, ErrInvalid), errors.Is(err, ErrNotFound): // too late, or looked at something else
			log.InfoContext(ctx, "a button without effect", "run_id", run.ID, "why", err)
		case err != nil:
			return fmt.Errorf("solstice: %s of run %s: %w", r.Event.Kind, run.ID, err)
		}
	}
	return nil
}

// meant are the runs that a button is about: of a status its run, of a commit the
// newest run of each workflow.
func (e *Engine) meant(ctx context.Context, r RunRequest) ([]*store.Run, error) {
	key := r.Forge + "/" + r.Repo.FullName()
	if id := r.Event.ExternalID; id != "" {
		run, err := e.store.Run(ctx, id)
		if errors.Is(err, store.ErrNotFound) {
			var j *store.Job
			if j, err = e.store.Job(ctx, id); err == nil {
				run, err = e.store.Run(ctx, j.RunID)
			}
		}
		switch {
		case errors.Is(err, store.ErrNotFound):
			return nil, nil
		case err != nil:
			return nil, err
		case run.RepoKey != key: // another repository's IDs are none of its business
			return nil, nil
		}
		return []*store.Run{run}, nil
	}
	all, err := e.store.RunsAt(ctx, key, r.Event.Commit)
	if err != nil {
		return nil, err
	}
	newest := map[string]bool{}
	var out []*store.Run
	for _, run := range all {
		if !newest[run.WorkflowPath] {
			newest[run.WorkflowPath] = true
			out = append(out, run)
		}
	}
	return out, nil
}
