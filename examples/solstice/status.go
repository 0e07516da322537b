package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/solstice"
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
)

type statusCmd struct {
	ID     string   `arg:"" name:"run" optional:"" help:"Run to show with its jobs: its ID, or the beginning of it. Default: a list of runs."`
	Repo   string   `group:"List" placeholder:"NAME" help:"Only runs of this repository, named as for enqueue."`
	Forge  string   `group:"List" placeholder:"NAME" help:"Only runs of this forge."`
	Ref    string   `group:"List" placeholder:"REF" help:"Only runs of this full ref; needs --repo."`
	Commit string   `group:"List" placeholder:"ID" help:"Only runs of this commit."`
	State  []string `group:"List" placeholder:"STATE" enum:"planning,awaiting_approval,queued,running,succeeded,failed,cancelled,errored,skipped" help:"Only runs in one of these states: ${enum}."`
	Limit  int32    `group:"List" short:"n" default:"20" placeholder:"N" help:"How many, at most 500 (${default})."`
	Page   string   `group:"List" placeholder:"ID" help:"Go on with the runs older than this one: what the list before ended with."`
	Watch  bool     `short:"w" help:"Go on, with every change: of a run until it is over, of a list until interrupted."`

	output
	connection
}

// Help is kong's.
func (statusCmd) Help() string {
	return `Shows why a job waits, and of attempts that failed the class of the failure, why, and the end of the machine's console.

The exit status is 0, 1 when there is no such run, 2 when the orchestrator could not be asked, 130 after an interrupt. With --watch and a run it is 1 when the run did not succeed and 2 when it was errored.`
}

// Run is kong's.
func (c *statusCmd) Run(e *env) error {
	cl, err := c.dial()
	if err != nil {
		return err
	}
	defer func() { _ = cl.Close() }()
	eng := remote{cl}
	switch {
	case c.ID == "" && c.Watch:
		err = c.watchList(e.ctx, eng)
	case c.ID == "":
		err = c.showList(e.ctx, eng)
	case c.Repo != "" || c.Forge != "" || c.Ref != "" || c.Commit != "" || len(c.State) > 0 || c.Page != "":
		return unable("filters are for the list of runs", nil, "leave the run away, or the filters")
	default:
		err = c.showRun(e.ctx, eng)
	}
	if e.ctx.Err() != nil {
		return interrupted()
	}
	return err
}

func (c *statusCmd) list(ctx context.Context, eng remote) ([]solstice.Run, string, error) {
	req := &pb.ListRunsRequest{PageSize: c.Limit, PageToken: c.Page, Forge: c.Forge, Commit: c.Commit, Ref: c.Ref}
	if c.Limit < 1 {
		return nil, "", unable(fmt.Sprintf("--limit is %d", c.Limit), nil, "give how many runs to list")
	}
	if c.Repo != "" {
		req.Repo = repoNamed(c.Repo)
	}
	for _, s := range c.State {
		req.States = append(req.States, pb.RunState(pb.RunState_value["RUN_STATE_"+strings.ToUpper(s)]))
	}
	resp, err := eng.c.ListRuns(ctx, req)
	if err != nil {
		return nil, "", c.explain("cannot list runs", err)
	}
	runs := make([]solstice.Run, 0, len(resp.GetRuns()))
	for _, r := range resp.GetRuns() {
		runs = append(runs, runOf(r))
	}
	return runs, resp.GetNextPageToken(), nil
}

func (c *statusCmd) showList(ctx context.Context, eng remote) error {
	runs, next, err := c.list(ctx, eng)
	if err != nil {
		return err
	}
	if c.JSON {
		return document(struct {
			Runs []solstice.Run `json:"runs"`
			Next string         `json:"next_page,omitempty"`
		}{runs, next})
	}
	out := c.screen()
	printRuns(out, runs, true)
	if next != "" {
		note("there may be more: --page %s", next)
	}
	return nil
}

func printRuns(out *screen, runs []solstice.Run, header bool) {
	if len(runs) == 0 {
		out.printf("no runs")
		return
	}
	var ids []string
	for _, r := range runs {
		ids = append(ids, r.ID)
	}
	id := short(ids...)
	var t table
	if header {
		out.header(&t, "RUN", "STATE", "WORKFLOW", "REPOSITORY", "COMMIT", "REF", "AGE", "TOOK")
	}
	now := time.Now()
	for _, r := range runs {
		t.row(id[r.ID], out.state(string(r.State)), plain(r.Workflow), plain(r.Repo.FullName()), fmt.Sprintf("%.12s", r.Commit),
			plain(strings.TrimPrefix(r.Ref, "refs/heads/")), age(r.CreatedAt, now), duration(r.CreatedAt, r.FinishedAt))
	}
	t.print(out, "")
}

// listEvery is how often a watched list is asked for.
const listEvery = time.Second

// watchList shows the list anew on a terminal, and else what changes in it.
func (c *statusCmd) watchList(ctx context.Context, eng remote) error {
	out := c.screen()
	var seen map[string]solstice.RunState // as it was listed last; nil: it was not
	var away time.Time
	for {
		runs, _, err := c.list(ctx, eng)
		switch {
		case err == nil:
			away = time.Time{}
		case seen == nil, ctx.Err() != nil, !transient(err):
			return err
		case away.IsZero():
			away = time.Now()
		case time.Since(away) > c.RetryFor:
			return err
		}
		var changed []solstice.Run
		now := map[string]solstice.RunState{}
		for _, r := range slices.Backward(runs) {
			if seen[r.ID] != r.State {
				changed = append(changed, r)
			}
			now[r.ID] = r.State
		}
		if err == nil {
			seen = now
		}
		switch {
		case err != nil:
		case c.JSON:
			for _, r := range changed {
				if err := line(r); err != nil {
					return err
				}
			}
		case isTerminal():
			out.clear()
			printRuns(out, runs, true)
		case len(changed) > 0:
			printRuns(out, changed, false)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(listEvery):
		}
	}
}

func (c *statusCmd) showRun(ctx context.Context, eng remote) error {
	run, err := eng.run(ctx, c.ID)
	if err != nil {
		return c.explain("cannot show the run", err)
	}
	if !c.Watch {
		return c.show(ctx, eng, run)
	}
	return c.watchRun(ctx, eng, run)
}

func (c *statusCmd) show(ctx context.Context, eng remote, run solstice.Run) error {
	detailed, err := details(ctx, eng, run)
	if err != nil {
		return c.explain("cannot show the jobs of the run", err)
	}
	if c.JSON {
		return document(detailed)
	}
	out := c.screen()
	detailed.print(out)
	return nil
}

func (c *statusCmd) watchRun(ctx context.Context, eng remote, run solstice.Run) error {
	out, was, code := c.screen(), map[string]solstice.JobState{}, 0
	for now, err := range eng.Watch(ctx, run.ID) {
		if err != nil {
			return c.explain("cannot watch the run", err)
		}
		switch {
		case c.JSON:
			err = line(now)
		case isTerminal():
			out.clear()
			err = c.show(ctx, eng, now)
			if err != nil && transient(err) {
				err = nil // the next change shows it
			}
		default:
			for _, j := range now.Jobs {
				if was[j.ID] != j.State {
					out.printf("%s  %s  %s", time.Now().UTC().Format(time.TimeOnly), plain(j.Name), words(string(j.State))+prefixed(": ", plain(j.Reason)))
				}
				was[j.ID] = j.State
			}
			if now.State.Terminal() {
				out.printf("%s %s", plain(now.Workflow), words(string(now.State))+prefixed(": ", plain(now.Reason)))
			}
		}
		if err != nil {
			return err
		}
		if now.State.Terminal() {
			code = worse(0, now)
		}
	}
	return exit(code)
}
