package main

import (
	"context"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/daemon/show"
	"github.com/solstice-ci/solstice-go/solstice/logtext"
)

const (
	quietTick = 250 * time.Millisecond // how often to look for steps that say nothing,
	askTick   = time.Second            // and to ask an orchestrator for them
	rowTick   = 10 * time.Millisecond  // how often to look for the row of a step that speaks,
	rowTries  = 100                    // and how many times
)

// engine is what follow needs of one: [solstice.Engine] here, or an
// orchestrator's elsewhere.
type engine interface {
	Watch(ctx context.Context, runID string) iter.Seq2[solstice.Run, error]
	FollowJob(ctx context.Context, jobID string) iter.Seq2[solstice.JobChunk, error]
	Steps(ctx context.Context, attemptID string) ([]solstice.Step, error)
	Attempts(ctx context.Context, jobID string) ([]solstice.Attempt, error)
}

// naming gives the name that a job is shown under.
type naming func(solstice.Run, solstice.Job) string

// screenOf is a screen for the jobs of runs, and their names on it.
func screenOf(o output, runs []solstice.Run) (*screen, naming) {
	name := func(_ solstice.Run, j solstice.Job) string { return plain(j.Name) }
	if len(runs) > 1 {
		name = func(r solstice.Run, j solstice.Job) string { return plain(r.Workflow) + ": " + plain(j.Name) }
	}
	var names []string
	for _, r := range runs {
		for _, j := range r.Jobs {
			names = append(names, name(r, j))
		}
	}
	return o.screen(names...), name
}

// follow prints what happens until all runs are over; an interrupt, the end of
// ctx, cancels them. watch ends with the engine.
func (c *runCmd) follow(ctx, watch context.Context, eng *solstice.Engine, runs []solstice.Run) (int, error) {
	out, name := screenOf(output{show.Output{Plain: c.Plain, NoColor: c.NoColor}}, runs)
	cancelled := make(chan struct{})
	uninterrupted := context.AfterFunc(ctx, func() {
		defer close(cancelled)
		out.printf("%s", out.bold("interrupted: cancelling the jobs; interrupt again to leave at once"))
		for _, r := range runs {
			if err := eng.Cancel(watch, r.ID, "interrupted"); err != nil {
				slog.Error("run not cancelled", "run_id", r.ID, "error", err)
			}
		}
	})
	defer func() {
		if !uninterrupted() {
			<-cancelled
		}
	}()
	return follow(watch, out, name, eng, quietTick, runs)
}

// follow prints what happens until all runs are over, and gives the exit status
// that is due then. Each tick it asks for steps that say nothing.
func follow(ctx context.Context, out *screen, name naming, eng engine, tick time.Duration, runs []solstice.Run) (code int, err error) {
	var (
		wg       sync.WaitGroup
		mu       sync.Mutex
		failures = map[string]failure{}
	)
	ctx, cancel := context.WithCancel(ctx)
	defer wg.Wait()
	defer cancel()
	for _, r := range runs {
		out.printf("%s %s", out.bold(plain(r.Workflow)), out.faint(fmt.Sprintf("(%s at %.12s)", plain(r.WorkflowPath), r.Commit)))
	}
	for _, r := range runs {
		for _, j := range r.Jobs {
			v := &jobView{ctx: ctx, eng: eng, tick: tick, job: j.ID, w: out.job(name(r, j))}
			wg.Go(func() {
				f := v.follow()
				mu.Lock()
				defer mu.Unlock()
				failures[j.ID] = f
			})
		}
	}
	ended := make([]solstice.Run, len(runs))
	for i, r := range runs {
		for now, err := range eng.Watch(ctx, r.ID) {
			if err != nil {
				return 0, fmt.Errorf("cannot follow run %s: %w", r.ID, err)
			}
			ended[i] = now
		}
	}
	wg.Wait()
	for _, r := range ended {
		out.summary(r, name, failures)
		code = worse(code, r)
	}
	return code, nil
}

// jobView prints one job: its log, and a line of our own where a step begins or
// ends.
type jobView struct {
	ctx  context.Context
	eng  engine
	tick time.Duration
	job  string
	w    *jobWriter

	attempt string
	printed int64 // offset in the attempt's log
	begun   int   // steps whose beginning was printed
	ended   int
	failure failure
}

func (v *jobView) follow() failure {
	chunks := make(chan solstice.JobChunk)
	var broken error
	go func() {
		defer close(chunks)
		for c, err := range v.eng.FollowJob(v.ctx, v.job) {
			if err != nil {
				broken = err
				return
			}
			chunks <- c
		}
	}()
	tick := time.NewTicker(v.tick)
	defer tick.Stop()
	for {
		select {
		case c, ok := <-chunks:
			if ok {
				v.chunk(c)
				continue
			}
			v.finish()
			if broken != nil && v.ctx.Err() == nil {
				v.w.note("log not readable: %v", broken)
			}
			return v.failure
		case <-tick.C:
			v.quiet()
		}
	}
}

func (v *jobView) chunk(c solstice.JobChunk) {
	if c.Begin {
		v.finish()
		*v = jobView{ctx: v.ctx, eng: v.eng, tick: v.tick, job: v.job, w: v.w, attempt: c.Attempt.ID}
		if c.Attempt.Number > 1 {
			v.w.note("attempt %d", c.Attempt.Number)
		}
		return
	}
	// Marks cut the chunk where another step begins to speak.
	data, off := c.Chunk.Data, c.Chunk.Offset
	for i, m := range c.Chunk.Marks {
		v.speaks(m.Step)
		end := off + int64(len(data))
		if i+1 < len(c.Chunk.Marks) {
			end = c.Chunk.Marks[i+1].Offset
		}
		n := min(max(end-off, 0), int64(len(data)))
		_, _ = v.w.Write(data[:n])
		data, off = data[n:], off+n
	}
	_, _ = v.w.Write(data)
	v.printed = off + int64(len(data))
}

// speaks says that output of step i follows. The step's row is written just
// after its output was passed on, so it may be waited for.
func (v *jobView) speaks(i int) {
	if i < v.begun {
		return
	}
	v.w.end()
	for range rowTries {
		steps, err := v.eng.Steps(v.ctx, v.attempt)
		if err == nil && slices.ContainsFunc(steps, func(s solstice.Step) bool { return s.Index >= i }) {
			v.show(steps, i)
			return
		}
		select {
		case <-v.ctx.Done():
			return
		case <-time.After(rowTick):
		}
	}
}

// quiet shows steps that have begun, or ended, and said nothing since.
func (v *jobView) quiet() {
	if v.attempt == "" {
		return
	}
	steps, err := v.eng.Steps(v.ctx, v.attempt)
	if err != nil || len(steps) == 0 || len(steps) <= v.begun && (steps[len(steps)-1].Result == "" || len(steps) <= v.ended) {
		return // nothing new, or next time
	}
	attempts, err := v.eng.Attempts(v.ctx, v.job)
	// The size of the log is stored together with the steps: only when all of it
	// is printed, nothing of an earlier step is still to come.
	if err == nil && slices.ContainsFunc(attempts, func(a solstice.Attempt) bool { return a.ID == v.attempt && a.LogSize <= v.printed }) {
		v.w.end()
		v.show(steps, len(steps))
	}
}

// finish prints the end of an attempt.
func (v *jobView) finish() {
	v.w.end()
	if v.attempt == "" {
		return
	}
	steps, err := v.eng.Steps(v.ctx, v.attempt)
	if err != nil {
		v.w.note("steps not readable: %v", err)
	}
	v.show(steps, len(steps))
	if v.failure.what == "" {
		v.failure.lines = slices.Clone(v.w.last)
	}
	attempts, err := v.eng.Attempts(v.ctx, v.job)
	if err != nil {
		return
	}
	for _, a := range attempts {
		if a.ID != v.attempt {
			continue
		}
		if a.LogLost {
			v.w.note("the end of the log is lost: %s", plain(a.Reason))
		}
		if a.Console != "" {
			v.failure.lines = []string{"the machine's console ended with:"}
			for l := range strings.SplitSeq(strings.TrimRight(a.Console, "\n"), "\n") {
				v.failure.lines = append(v.failure.lines, logtext.Line(l, false))
			}
		}
	}
}

// show prints what is new about the steps up to the one that is about to
// speak: of that one only its beginning.
func (v *jobView) show(steps []solstice.Step, speaking int) {
	for _, st := range steps {
		if st.Index > speaking {
			return
		}
		if st.Index >= v.begun {
			v.begun = st.Index + 1
			if st.Result != string(solstice.JobSkipped) {
				v.w.put(v.w.s.bold("▸ " + plain(st.Name)))
			}
			v.w.last = nil
		}
		if st.Index >= v.ended && st.Index < speaking && st.Result != "" {
			v.ended = st.Index + 1
			v.end(st)
		}
	}
}

func (v *jobView) end(st solstice.Step) {
	if st.Result == string(solstice.JobSkipped) {
		v.w.note("%s skipped", plain(st.Name))
		return
	}
	line := fmt.Sprintf("%s %s in %s", plain(st.Name), words(st.Result), duration(st.StartedAt, st.FinishedAt)) + prefixed(", ", because(st))
	switch {
	case st.Result == string(solstice.JobSucceeded):
		v.w.note("%s", line)
	case st.Continued:
		v.w.note("%s; the job goes on", line)
	default:
		v.w.put(v.w.s.paint("· "+line, marks[st.Result].colour))
		if v.failure.what == "" {
			v.failure.what = fmt.Sprintf("step %q %s", plain(st.Name), words(st.Result)) + prefixed(", ", because(st))
			v.failure.lines = slices.Clone(v.w.last)
		}
	}
}

// because says why a step did not succeed, where that is known.
func because(st solstice.Step) string {
	switch {
	case st.Result == string(solstice.JobSucceeded), st.Result == string(solstice.JobCancelled):
		return ""
	case st.Reason != "":
		return plain(st.Reason)
	case st.Signal != "":
		return "killed by " + plain(st.Signal)
	case st.ExitCode > 0:
		return fmt.Sprintf("exit status %d", st.ExitCode)
	}
	return ""
}
