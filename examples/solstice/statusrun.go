package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/solstice"
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
	"github.com/solstice-ci/solstice-go/solstice/logtext"
	"github.com/solstice-ci/solstice-go/solstice/orchestrator/client"
)

// runDetails is a run with what one asks a run for.
type runDetails struct {
	solstice.Run
	Jobs []jobDetails `json:"jobs"`
}

// jobDetails is a job, why it waits, and its attempts.
type jobDetails struct {
	solstice.Job
	Waiting     *solstice.Waiting `json:"waiting,omitempty"`
	AttemptList []attemptDetails  `json:"attempt_list,omitempty"`
}

type attemptDetails struct {
	solstice.Attempt
	Steps []solstice.Step `json:"steps,omitempty"`
}

// details asks for each job that has more to say than the run does.
func details(ctx context.Context, eng remote, run solstice.Run) (runDetails, error) {
	out := runDetails{Run: run, Jobs: make([]jobDetails, 0, len(run.Jobs))}
	for _, j := range run.Jobs {
		resp, err := eng.c.GetJob(ctx, &pb.GetJobRequest{JobId: j.ID})
		if err != nil {
			return runDetails{}, err
		}
		d := jobDetails{Job: jobOf(resp.GetJob()), Waiting: waitingOf(resp.GetWaiting())}
		for _, a := range resp.GetAttempts() {
			d.AttemptList = append(d.AttemptList, attemptDetails{attemptOf(a), stepsOf(a)})
		}
		out.Jobs = append(out.Jobs, d)
	}
	return out, nil
}

func (r runDetails) print(out *screen) {
	ids := []string{r.ID}
	for _, j := range r.Jobs {
		ids = append(ids, j.ID)
	}
	id := short(ids...)
	took := duration(r.CreatedAt, r.FinishedAt)
	if took == "" {
		took = age(r.CreatedAt, time.Now())
	}
	out.printf("%s %s %s %s", out.mark(string(r.State)), out.bold(plain(r.Workflow)), words(string(r.State)), out.faint("in "+took))
	about := table{}
	about.row(out.faint("run"), r.ID+prefixed(", again after ", r.RerunOf))
	about.row(out.faint("of"), plain(r.Repo.FullName())+" at "+fmt.Sprintf("%.12s", r.Commit)+prefixed(", ", plain(r.Ref)))
	about.row(out.faint("workflow"), plain(r.WorkflowPath)+", "+plain(string(r.Event)))
	if r.Reason != "" {
		about.row(out.faint("because"), plain(r.Reason))
	}
	if r.Note != "" {
		about.row(out.faint("note"), plain(r.Note))
	}
	if r.LogsRemoved {
		about.row(out.faint("logs"), "removed by retention")
	}
	about.print(out, "  ")
	for _, d := range r.Diagnostics {
		for l := range strings.Lines(d.String()) {
			out.printf("  %s", logtext.Line(strings.TrimSuffix(l, "\n"), false))
		}
	}
	if len(r.Jobs) == 0 {
		return
	}
	out.printf("")
	t := table{}
	out.header(&t, "", "JOB", "STATE", "TOOK", "ID", "")
	for _, j := range r.Jobs {
		t.row(out.mark(string(j.State)), plain(j.Name), out.state(string(j.State)), j.took(), id[j.ID], j.why())
	}
	t.print(out, "  ")
	for _, j := range r.Jobs {
		j.failures(out)
	}
}

// took is how long a job runs, or did.
func (j jobDetails) took() string {
	if j.FinishedAt.IsZero() && !j.StartedAt.IsZero() {
		return age(j.StartedAt, time.Now())
	}
	return duration(j.StartedAt, j.FinishedAt)
}

// why is a job's reason to wait, or to be in its state.
func (j jobDetails) why() string {
	switch {
	case j.Waiting != nil:
		return plain(j.Waiting.Message)
	case j.CopiedFrom != "":
		return "kept from the run before"
	case j.State.Terminal():
		return plain(j.Reason)
	}
	return ""
}

// failures prints the attempts that failed: class, reason (for a step that
// failed: which), and the end of the machine's console.
func (j jobDetails) failures(out *screen) {
	for _, a := range j.AttemptList {
		if a.Class == "" && !a.LogLost {
			continue
		}
		out.printf("")
		head := fmt.Sprintf("%s, attempt %d:", plain(j.Name), a.Number)
		out.printf("  %s %s", out.bold(head), out.paint(words(string(a.Class)), marks["failed"].colour)+prefixed(": ", plain(a.Reason)))
		if a.LogLost {
			out.printf("    the end of its log is lost")
		}
		if a.Console != "" {
			out.printf("    the machine's console ended with:")
			for l := range strings.SplitSeq(strings.TrimRight(a.Console, "\n"), "\n") {
				out.printf("      %s", logtext.Line(l, false))
			}
		}
	}
}

// transient reports whether a failed call may do better soon.
func transient(err error) bool {
	return errors.Is(err, client.ErrUnavailable) || errors.Is(err, client.ErrTimeout)
}
