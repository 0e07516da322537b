package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	"github.com/solstice-ci/solstice-go/solstice"
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/orchestrator/client"
	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

type enqueueCmd struct {
	Dir            string            `short:"C" default:"." type:"existingdir" placeholder:"DIR" help:"Directory in the work tree of the repository (${default})."`
	Repo           string            `placeholder:"NAME" help:"Repository as the forge names it (OWNER/NAME), or its absolute path on the orchestrator's machine. Default: the one of --dir, on the same machine."`
	Forge          string            `placeholder:"NAME" help:"Forge that has the repository. Default: local; of --repo, the only one that the orchestrator has."`
	Ref            string            `placeholder:"REF" help:"Branch, tag or commit to run. Default: HEAD; of --repo, the default branch."`
	Workflow       string            `placeholder:"NAME" help:"Workflow to run, by path or name. Default: all that a manual start, or else a push, concerns."`
	Job            []string          `placeholder:"ID" help:"Run this job and what it needs; may be repeated."`
	Input          map[string]string `placeholder:"K=V" mapsep:"none" help:"Input of a manual start; may be repeated."`
	Priority       int32             `placeholder:"N" help:"Higher ones run first; -1000 to 1000, 0 if not given."`
	IdempotencyKey string            `placeholder:"KEY" help:"A repeat with the same key gives the runs of the first time."`
	Follow         bool              `short:"f" help:"Print what happens until all is over."`

	output
	connection
}

// Help is kong's.
func (enqueueCmd) Help() string {
	return `Only what is committed is run. The exit status is 0 when the runs were accepted, 2 when they could not be; with --follow it is 1 when one did not succeed. An interrupt of --follow leaves the runs alone: its status is 130.`
}

// Run is kong's.
func (c *enqueueCmd) Run(e *env) error {
	req := &pb.SubmitRequest{
		IdempotencyKey: c.IdempotencyKey, Forge: c.Forge, Workflow: c.Workflow, Jobs: c.Job, Inputs: c.Input, Priority: c.Priority,
	}
	if err := c.find(e.ctx, req); err != nil {
		return err
	}
	cl, err := c.dial()
	if err != nil {
		return err
	}
	defer func() { _ = cl.Close() }()
	resp, err := cl.Submit(e.ctx, req)
	if err != nil {
		return c.notAccepted(e.ctx, req, err)
	}
	var runs []solstice.Run
	for _, r := range resp.GetRuns() {
		runs = append(runs, runOf(r))
	}
	if len(runs) == 0 {
		return unable("no workflow is concerned by a manual start, or a push to "+firstOf(plain(req.GetRef()), "the commit"), nil, "name one with --workflow")
	}
	if err := refused(runs); err != nil {
		return couldNot(err)
	}
	if c.Follow {
		return c.follow(e.ctx, remote{cl}, runs, c.output)
	}
	if c.JSON {
		return document(struct {
			Runs []solstice.Run `json:"runs"`
		}{runs})
	}
	for _, r := range runs {
		c.screen().printf("%s  %s  %s", r.ID, words(string(r.State)), plain(r.Workflow))
	}
	return nil
}

func firstOf(a ...string) string {
	for _, s := range a {
		if s != "" {
			return s
		}
	}
	return ""
}

var objectName = regexp.MustCompile(`^([0-9a-f]{40}|[0-9a-f]{64})$`)

// find says what is to be run.
func (c *enqueueCmd) find(ctx context.Context, req *pb.SubmitRequest) error {
	if c.Repo != "" {
		req.Repo = repoNamed(c.Repo)
		if objectName.MatchString(c.Ref) {
			req.Commit = c.Ref
		} else {
			req.Ref = c.Ref
		}
		return nil
	}
	l, err := localgit.Locate(ctx, c.Dir)
	switch {
	case errors.Is(err, localgit.ErrNoCommits):
		return unable("there is nothing to run yet", err, "commit the workflow")
	case err != nil:
		return unable("cannot read the repository", err, "run this in a git repository, or give --repo NAME")
	}
	req.Forge, req.Repo = firstOf(c.Forge, "local"), repoNamed(l.Path)
	req.Repo.Url, req.Commit, req.Ref = l.Origin, l.Commit, l.Ref
	if c.Ref == "" {
		return nil
	}
	here := runCmd{Dir: c.Dir, Ref: c.Ref}
	if req.Commit, req.Ref, err = here.find(ctx, forge.Repo{Name: l.Name}); err != nil {
		return unable("cannot find "+c.Ref, err, "give a branch, a tag or a commit of this repository")
	}
	return nil
}

// repoNamed splits the name of a repository; that of one on disk is its path.
func repoNamed(name string) *pb.Repo {
	name = strings.Trim(filepath.ToSlash(name), "/")
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		return &pb.Repo{Owner: name[:i], Name: name[i+1:]}
	}
	return &pb.Repo{Name: name}
}

// notAccepted knows more than the general words.
func (c *enqueueCmd) notAccepted(ctx context.Context, req *pb.SubmitRequest, err error) error {
	const what = "the orchestrator did not accept it"
	switch {
	case errors.Is(err, client.ErrState):
		return unable("there is nothing to run", err, "write a workflow file, see docs/workflows.md, and commit it")
	case errors.Is(err, client.ErrNotFound) && c.Repo == "":
		return unable(what, err, "the repository has to be below the --repo-root of an orchestrator on this machine; otherwise give --repo, as its forge has it")
	case errors.Is(err, client.ErrNotFound):
		return unable(what, err, "check --repo and --ref, and that the orchestrator may read them")
	case errors.Is(err, client.ErrInvalid):
		return unable(what, err, "")
	case ctx.Err() != nil:
		return interrupted()
	}
	return c.explain(what, err)
}

// interrupted ends a command by the person's wish.
func interrupted() error { return &daemon.ExitError{Code: exitInterrupted} }

// follow prints what happens to runs; an interrupt leaves them alone.
func (c *connection) follow(ctx context.Context, eng remote, runs []solstice.Run, o output) error {
	if o.JSON {
		return c.followJSON(ctx, eng, runs)
	}
	out, name := screenOf(o, runs)
	code, err := follow(ctx, out, name, eng, askTick, runs)
	if ctx.Err() != nil {
		for _, r := range runs {
			note("the run goes on; to end it: solstice cancel %s", r.ID)
		}
		return interrupted()
	}
	if err != nil {
		return c.explain("cannot follow", err)
	}
	return exit(code)
}

// exit ends with a status, and says nothing.
func exit(code int) error {
	if code == 0 {
		return nil
	}
	return &daemon.ExitError{Code: code}
}

// followJSON prints a line for each change of each run.
func (c *connection) followJSON(ctx context.Context, eng remote, runs []solstice.Run) error {
	type change struct {
		run solstice.Run
		err error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	changes := make(chan change)
	for _, r := range runs {
		go func() {
			for run, err := range eng.Watch(ctx, r.ID) {
				select {
				case changes <- change{run, err}:
				case <-ctx.Done():
					return
				}
			}
		}()
	}
	code := 0
	for left := len(runs); left > 0; {
		var ch change
		select {
		case ch = <-changes:
		case <-ctx.Done():
			return interrupted()
		}
		if ch.err != nil && ctx.Err() == nil {
			return c.explain("cannot follow", ch.err)
		}
		if ch.err != nil {
			return interrupted()
		}
		if err := line(ch.run); err != nil {
			return err
		}
		if ch.run.State.Terminal() {
			left--
			code = worse(code, ch.run)
		}
	}
	return exit(code)
}

// worse is the exit status with one more run that ended.
func worse(code int, r solstice.Run) int {
	switch r.State {
	case solstice.RunSucceeded, solstice.RunSkipped:
		return code
	case solstice.RunErrored:
		return exitCouldNotRun
	default:
		return max(code, exitFailed)
	}
}

// refused shows what there is to say about the workflow files, and is an error
// when one of them cannot be run.
func refused(runs []solstice.Run) error {
	bad := false
	for _, r := range runs {
		fmt.Fprint(os.Stderr, workflow.Diagnostics(r.Diagnostics))
		bad = bad || r.State == solstice.RunErrored
	}
	if !bad {
		return nil
	}
	return problem("nothing was run, because of the errors above", nil, "correct the workflow file, or the flags; see docs/workflows.md")
}
