package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/solstice"
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logtext"
	"github.com/solstice-ci/solstice-go/solstice/orchestrator/client"
)

type logsCmd struct {
	ID         string `arg:"" help:"Run, job or attempt: its ID, or the beginning of it."`
	Job        string `arg:"" optional:"" help:"Of a run: the job's name, with its matrix values or without."`
	Follow     bool   `short:"f" help:"Go on until the job is over."`
	From       int64  `placeholder:"BYTES" help:"Begin at this offset in the log; of a job: of its first attempt, or that of --attempt."`
	Attempt    int32  `placeholder:"N" help:"Begin with this attempt of the job, by its number."`
	Timestamps bool   `short:"t" help:"Begin each line with the time it was printed at, UTC by the machine's clock."`
	Raw        bool   `help:"Print the bytes as they are on a terminal too: a job's output can then do to it what it likes."`

	output
	connection
}

// Help is kong's.
func (logsCmd) Help() string {
	return `One job's log goes to a pipe or a file exactly as it was printed, all attempts one after the other. On a terminal it is shown line by line, without what could harm the terminal. The logs of several jobs (a run's, or a matrix's) are printed line by line behind the jobs' names.

With --json each piece is a line of JSON, its bytes in base64. The exit status is 0, 1 when there is no such log, 2 when it could not be read, 130 after an interrupt.`
}

// Run is kong's.
func (c *logsCmd) Run(e *env) error {
	if c.From < 0 || c.Attempt < 0 {
		return unable("--from or --attempt is negative", nil, "give an offset in bytes, and the number of an attempt")
	}
	cl, err := c.dial()
	if err != nil {
		return err
	}
	defer func() { _ = cl.Close() }()
	eng := remote{cl}
	jobs, attempt, err := c.find(e.ctx, eng)
	switch {
	case err != nil:
	case len(jobs) > 1 && (c.From > 0 || c.Attempt > 0 || c.Raw || c.Timestamps):
		return unable(fmt.Sprintf("%d jobs are meant", len(jobs)), nil, "--from, --attempt, --raw and --timestamps are for one: name it, as in: solstice logs RUN JOB")
	case len(jobs) > 1:
		err = c.several(e.ctx, eng, jobs)
	default:
		err = c.one(e.ctx, eng, jobs[0], attempt)
	}
	if e.ctx.Err() != nil {
		return interrupted()
	}
	return err
}

// find says whose logs are meant: jobs, or an attempt of the one job.
func (c *logsCmd) find(ctx context.Context, eng remote) (jobs []solstice.Job, attempt string, err error) {
	const what = "cannot find the log"
	run, err := eng.run(ctx, c.ID)
	if err == nil {
		jobs, err = c.jobsOf(run)
		return jobs, "", err
	}
	if !errors.Is(err, client.ErrNotFound) {
		return nil, "", c.explain(what, err)
	}
	if c.Job != "" {
		return nil, "", c.explain(what, err) // only a run has jobs with names
	}
	resp, err := eng.c.GetJob(ctx, &pb.GetJobRequest{JobId: c.ID})
	if err == nil {
		return []solstice.Job{jobOf(resp.GetJob())}, "", nil
	}
	if errors.Is(err, client.ErrNotFound) {
		resp, err = eng.c.GetJob(ctx, &pb.GetJobRequest{AttemptId: c.ID})
	}
	if errors.Is(err, client.ErrNotFound) {
		return nil, "", exitWith(exitFailed, problem("there is no run, job or attempt "+c.ID, nil, "solstice status lists runs"))
	}
	if err != nil {
		return nil, "", c.explain(what, err)
	}
	for _, a := range resp.GetAttempts() {
		if strings.HasPrefix(a.GetId(), c.ID) {
			attempt = a.GetId()
		}
	}
	return []solstice.Job{jobOf(resp.GetJob())}, attempt, nil
}

func (c *logsCmd) jobsOf(run solstice.Run) ([]solstice.Job, error) {
	jobs := run.Jobs
	if c.Job != "" {
		named := func(is func(solstice.Job) string) []solstice.Job {
			return slices.DeleteFunc(slices.Clone(run.Jobs), func(j solstice.Job) bool { return is(j) != c.Job })
		}
		jobs = named(func(j solstice.Job) string { return j.Name })
		if len(jobs) == 0 {
			jobs = named(func(j solstice.Job) string { return j.Key })
		}
	}
	if len(jobs) > 0 {
		return jobs, nil
	}
	var names []string
	for _, j := range run.Jobs {
		names = append(names, plain(j.Name))
	}
	if c.Job == "" {
		return nil, exitWith(exitFailed, problem("the run has no jobs", errors.New(firstOf(plain(run.Reason), "its workflow could not be planned")), ""))
	}
	return nil, exitWith(exitFailed, problem(fmt.Sprintf("the run has no job %q", c.Job), nil, "it has: "+strings.Join(names, ", ")))
}

// one prints one job's log, or an attempt's.
func (c *logsCmd) one(ctx context.Context, eng remote, job solstice.Job, attempt string) error {
	req := &pb.TailLogRequest{Of: &pb.TailLogRequest_JobId{JobId: job.ID}, From: c.From, Attempt: c.Attempt, Follow: c.Follow}
	if attempt != "" {
		req.Of, req.Attempt = &pb.TailLogRequest_AttemptId{AttemptId: attempt}, 0
	}
	var w io.WriteCloser = nothingToClose{os.Stdout}
	if isTerminal() && !c.Raw {
		w = logtext.NewWriter(os.Stdout, c.screen().colour != nil)
	}
	stamps := &stamper{w: w}
	first, begun := true, attempt != ""
	for p, err := range eng.tail(ctx, req) {
		switch {
		case errors.Is(err, client.ErrInvalid):
			return exitWith(exitFailed, problem("cannot read the log", err, "give a smaller --from"))
		case err != nil:
			return c.explain("cannot read the log", err)
		case c.JSON:
			err = lineOfLog(p, job, attempt)
		case p.Begin:
			begun = true
			if !first {
				note("%s: attempt %d", plain(job.Name), p.Attempt.Number)
			}
			first = false
		case c.Timestamps:
			err = stamps.write(p.Chunk)
		default:
			_, err = w.Write(p.Chunk.Data)
		}
		if err != nil {
			return printed(err)
		}
	}
	if err := w.Close(); err != nil {
		return printed(err)
	}
	return c.afterwards(ctx, eng, job, begun)
}

// afterwards says what the log itself does not.
func (c *logsCmd) afterwards(ctx context.Context, eng remote, job solstice.Job, begun bool) error {
	resp, err := eng.c.GetJob(ctx, &pb.GetJobRequest{JobId: job.ID})
	if err != nil {
		return c.explain("cannot tell whether the log is whole", err)
	}
	if now := jobOf(resp.GetJob()); !begun && now.Attempts == 0 && now.CopiedFrom == "" {
		why := firstOf(resp.GetWaiting().GetMessage(), now.Reason)
		note("%s has no log: it is %s", plain(now.Name), words(string(now.State))+prefixed(", ", plain(why)))
	}
	for _, a := range resp.GetAttempts() {
		if a.GetLogLost() {
			note("the end of the log of attempt %d is lost: %s", a.GetNumber(), plain(a.GetReason()))
		}
	}
	return nil
}

// lineOfLog prints a piece as JSON.
func lineOfLog(p solstice.JobChunk, job solstice.Job, attempt string) error {
	type piece struct {
		Job     string    `json:"job_id"`
		Attempt string    `json:"attempt_id"`
		Offset  int64     `json:"offset"`
		Time    time.Time `json:"time,omitzero"`
		Step    int       `json:"step"`
		FD      int       `json:"fd"`
		Data    []byte    `json:"data"`
	}
	for m, data := range marked(p.Chunk) {
		if err := line(piece{job.ID, firstOf(p.Attempt.ID, attempt), m.Offset, m.Time, m.Step, m.FD, data}); err != nil {
			return err
		}
	}
	return nil
}

// marked cuts a chunk where its marks do.
func marked(c logstream.Chunk) func(yield func(logstream.Mark, []byte) bool) {
	return func(yield func(logstream.Mark, []byte) bool) {
		data, off, now := c.Data, c.Offset, logstream.Mark{Offset: c.Offset}
		for i := 0; len(data) > 0; i++ {
			end := off + int64(len(data))
			if i < len(c.Marks) {
				end = min(max(c.Marks[i].Offset, off), end)
			}
			if n := end - off; n > 0 {
				if !yield(now, data[:n]) {
					return
				}
				data, off = data[n:], end
			}
			if i < len(c.Marks) {
				now = c.Marks[i]
				now.Offset = max(now.Offset, off)
			}
		}
	}
}

// stamper begins lines with their times.
type stamper struct {
	w      io.Writer
	inLine bool
}

func (s *stamper) write(c logstream.Chunk) error {
	var out bytes.Buffer
	for m, data := range marked(c) {
		for l := range bytes.Lines(data) {
			if !s.inLine {
				out.WriteString(m.Time.UTC().Format("2006-01-02T15:04:05.000Z "))
			}
			out.Write(l)
			s.inLine = l[len(l)-1] != '\n'
		}
	}
	_, err := s.w.Write(out.Bytes())
	return err
}

type nothingToClose struct{ io.Writer }

func (nothingToClose) Close() error { return nil }

// several prints the logs of jobs, following them at once, and else one after
// the other.
func (c *logsCmd) several(ctx context.Context, eng remote, jobs []solstice.Job) error {
	var names []string
	for _, j := range jobs {
		names = append(names, plain(j.Name))
	}
	out := c.screen(names...)
	var wg sync.WaitGroup
	defer wg.Wait()
	errs := make([]error, len(jobs))
	for i, j := range jobs {
		w := out.job(names[i])
		show := func() {
			for p, err := range eng.tail(ctx, &pb.TailLogRequest{Of: &pb.TailLogRequest_JobId{JobId: j.ID}, Follow: c.Follow}) {
				switch {
				case err != nil:
					errs[i] = err
				case c.JSON:
					out.mu.Lock()
					errs[i] = lineOfLog(p, j, "")
					out.mu.Unlock()
				case p.Begin && p.Attempt.Number > 1:
					w.end()
					w.note("attempt %d", p.Attempt.Number)
				default:
					_, errs[i] = w.Write(p.Chunk.Data)
				}
				if errs[i] != nil {
					return
				}
			}
			w.end()
		}
		if c.Follow {
			wg.Go(show)
		} else {
			show()
		}
	}
	wg.Wait()
	return c.explainOnce("cannot read the log", errors.Join(errs...))
}
