package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/solstice-ci/solstice-go/solstice"
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/orchestrator/client"
)

// exitWith ends with a status of its own.
func exitWith(code int, err error) error { return &daemon.ExitError{Code: code, Err: err} }

// withRun dials, finds a run by the beginning of its ID, and does something that
// may fail.
func (c *connection) withRun(ctx context.Context, id, what string, do func(remote, solstice.Run) error) error {
	return c.with(ctx, what, func(cl *client.Client) error {
		eng := remote{cl}
		run, err := eng.run(ctx, id)
		if err != nil {
			return err
		}
		return do(eng, run)
	})
}

// explainOnce leaves alone what is explained already.
func (c *connection) explainOnce(what string, err error) error {
	if _, ok := errors.AsType[*daemon.ExitError](err); ok {
		return err
	}
	return c.explain(what, err)
}

// show prints a run that was changed.
func (o output) show(run solstice.Run) error {
	if o.JSON {
		return document(run)
	}
	o.screen().printf("%s  %s  %s", run.ID, words(string(run.State)), plain(run.Workflow)+prefixed(": ", plain(run.Reason)))
	return nil
}

type cancelCmd struct {
	ID     string `arg:"" name:"run" help:"Run to cancel: its ID, or the beginning of it."`
	Reason string `placeholder:"TEXT" help:"Why, for those who look at the run."`

	output
	connection
}

// Help is kong's.
func (cancelCmd) Help() string {
	return `Jobs that run get SIGTERM, 10 seconds later SIGKILL, then their clean-up steps run: solstice status --watch RUN waits for that. A run that is over is not changed, and that is no error.`
}

// Run is kong's.
func (c *cancelCmd) Run(e *env) error {
	return c.withRun(e.ctx, c.ID, "cannot cancel the run", func(eng remote, run solstice.Run) error {
		if run.State.Terminal() {
			note("the run is over already")
			return c.show(run)
		}
		if _, err := eng.c.CancelRun(e.ctx, &pb.CancelRunRequest{RunId: run.ID, Reason: c.Reason}); err != nil {
			return err
		}
		run, err := eng.run(e.ctx, run.ID)
		if err != nil {
			return err
		}
		return c.show(run)
	})
}

type rerunCmd struct {
	ID             string `arg:"" name:"run" help:"Run to repeat: its ID, or the beginning of it."`
	Failed         bool   `help:"Keep the results of jobs that succeeded."`
	IdempotencyKey string `placeholder:"KEY" help:"A repeat with the same key gives the run of the first time."`
	Follow         bool   `short:"f" help:"Print what happens until all is over; the exit status is then that of enqueue --follow."`

	output
	connection
}

// Help is kong's.
func (rerunCmd) Help() string {
	return `Makes a new run of one that is over: the same commit, the same plan.`
}

// Run is kong's.
func (c *rerunCmd) Run(e *env) error {
	return c.withRun(e.ctx, c.ID, "cannot run it again", func(eng remote, run solstice.Run) error {
		resp, err := eng.c.RerunRun(e.ctx, &pb.RerunRunRequest{RunId: run.ID, Failed: c.Failed, IdempotencyKey: c.IdempotencyKey})
		if err != nil {
			return err
		}
		run = runOf(resp.GetRun())
		if c.Follow {
			return c.follow(e.ctx, eng, []solstice.Run{run}, c.output)
		}
		return c.show(run)
	})
}

type approveCmd struct {
	ID     string `arg:"" name:"run" help:"Run that awaits approval: its ID, or the beginning of it."`
	Commit string `arg:"" help:"The commit that you looked at: its ID, or at least 7 characters of it."`

	output
	connection
}

// Help is kong's.
func (approveCmd) Help() string {
	return `The commit has to be the run's: what was pushed since you looked is not let in.`
}

// Run is kong's.
func (c *approveCmd) Run(e *env) error {
	return c.withRun(e.ctx, c.ID, "cannot approve the run", func(eng remote, run solstice.Run) error {
		commit := strings.ToLower(c.Commit)
		if len(commit) < 7 {
			return unable(fmt.Sprintf("%q is too short for a commit", c.Commit), nil, "give at least 7 characters of the commit that you looked at")
		}
		head := cmp.Or(run.Head, run.Commit)
		if !strings.HasPrefix(head, commit) {
			return exitWith(exitFailed, problem("the run is of another commit: "+head, nil, "look at that one"))
		}
		resp, err := eng.c.ApproveRun(e.ctx, &pb.ApproveRunRequest{RunId: run.ID, Commit: head})
		if err != nil {
			return err
		}
		return c.show(runOf(resp.GetRun()))
	})
}
