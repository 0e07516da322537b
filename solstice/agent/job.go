package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

// defaultGrace is between SIGTERM and SIGKILL where nobody says.
const defaultGrace = 10 * time.Second

// assigned takes an Assign: it starts the job the first time. It returns nil
// for what is not this agent's, since a machine serves one job.
func (a *agent) assigned(m *agentv1.Assign) (*attempt, error) {
	if m.GetAttemptId() == "" || m.GetJobSpec() == nil {
		return nil, fmt.Errorf("%w: an assignment without attempt or job", errRefused)
	}
	att := a.attemptOf(m)
	if att.id != m.GetAttemptId() {
		a.log.Warn("assignment ignored: the agent has a job", "attempt", att.id, "offered", m.GetAttemptId())
		return nil, nil
	}
	return att, a.newEpoch(att, m.GetEpoch())
}

// attemptOf gives the agent's one attempt, which begins with the first Assign.
func (a *agent) attemptOf(m *agentv1.Assign) *attempt {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.att == nil {
		a.att = a.begin(m)
	}
	return a.att
}

// begin starts the job; a.mu is held. The job's goroutine lives until
// killJob or its own end.
func (a *agent) begin(m *agentv1.Assign) *attempt {
	att := &attempt{
		id: m.GetAttemptId(), epoch: m.GetEpoch(),
		cancel: make(chan cancelRequest, 1), ended: make(chan struct{}),
	}
	ctx, broken := context.WithCancelCause(a.jobCtx)
	att.journal = newJournal(a.cfg.spoolDir(), a.cfg.spoolMemory, a.maxBatch, m.GetJobSpec().GetLimits().GetLogBytes(),
		func(err error) { broken(&infraError{err}) })
	j := &job{
		a: a, spec: m.GetJobSpec(), journal: att.journal, cancel: att.cancel, trace: m.GetTraceContext(),
		log: a.log.With("attempt", m.GetAttemptId(), "run_id", m.GetJobSpec().GetRunId(), "job_id", m.GetJobSpec().GetJobId()),
	}
	j.procs = newProcesses(a, j.log)
	go func() {
		defer close(att.ended)
		defer broken(nil)
		_ = a.guard(func() error { j.run(ctx); return nil })
		att.left = j.procs.left
	}()
	return att
}

// cancelJob passes a Cancel on; the first one counts.
func (a *agent) cancelJob(m *agentv1.Cancel) {
	a.mu.Lock()
	att := a.att
	a.mu.Unlock()
	if att == nil || att.id != m.GetAttemptId() {
		return
	}
	select {
	case att.cancel <- cancelRequest{m.GetGrace().AsDuration(), m.GetReason()}:
	default:
	}
}

// infraError marks what is not the job's fault.
type infraError struct{ err error }

func (e *infraError) Error() string { return e.err.Error() }
func (e *infraError) Unwrap() error { return e.err }

func infra(err error) error {
	if err == nil {
		return nil
	}
	return &infraError{err}
}

func isInfra(err error) bool {
	var i *infraError
	return errors.As(err, &i)
}

// A job runs the steps of an attempt, in one goroutine.
type job struct {
	a       *agent
	spec    *agentv1.JobSpec
	journal *journal
	log     *slog.Logger
	cancel  <-chan cancelRequest
	trace   map[string]string
	env     map[string]string // of every step, so far
	path    []string          // additions to PATH, the last one first
	cx      workflow.Contexts
	grace   time.Duration
	procs   *processes

	verdict  agentv1.JobFinished // the first thing that went wrong, or zero
	stopping stopKind
	stopWhy  string
}

// stopKind is why a job is being ended from outside.
type stopKind int

const (
	notStopping stopKind = iota
	stopCancel           // asked for
	stopTimeout          // of the job
	stopBroken           // journal broken: no use going on
	stopKill             // Run ends: nobody listens any more
)

// run is the whole life of the job. When ctx ends the job is killed; with an
// infraError as the cause the end is still reported.
func (j *job) run(ctx context.Context) {
	j.log.Info("job starts", "steps", len(j.spec.GetSteps()))
	j.grace = orDefault(j.spec.GetLimits().GetCancelGrace().AsDuration(), defaultGrace)

	w := j.watch(ctx)
	outputs := map[string]string{}
	func() {
		defer j.procs.killAll() // when a panic passes, too
		defer w.close()
		if err := j.prepare(); err != nil {
			j.blame(err)
			return
		}
		j.a.cfg.failpoint("job")
		j.steps(ctx, w)
		outputs = j.outputs()
	}()

	f := &j.verdict
	if f.GetResult() == agentv1.Result_RESULT_UNSPECIFIED {
		f.Result = agentv1.Result_RESULT_SUCCEEDED
	}
	f.Outputs = outputs
	f.Reason = clean(f.GetReason())
	j.log.Info("job ends", "result", f.GetResult(), "reason", f.GetReason())
	j.journal.finish(f)
}

// prepare makes the base environment, the contexts and the directories.
func (j *job) prepare() error {
	s := j.spec
	if len(s.GetContexts()) > 0 {
		if err := json.Unmarshal(s.GetContexts(), &j.cx); err != nil {
			return infra(fmt.Errorf("contexts of the job: %w", err))
		}
	}
	j.cx.Status = workflow.StatusSuccess
	j.cx.Steps = map[string]workflow.StepState{}
	j.env = maps.Clone(j.a.cfg.Env)
	if j.env == nil {
		j.env = map[string]string{}
	}
	j.env["CI"] = "true"
	j.cx.Env = map[string]string{}
	env, err := j.cx.InterpolateEnv(pairs(s.GetEnv()))
	if err != nil {
		return fmt.Errorf("environment of the job: %w", err)
	}
	for _, kv := range env {
		j.env[kv.Name], j.cx.Env[kv.Name] = kv.Value, kv.Value
	}
	if err := removeTree(j.a.cfg.stepsDir()); err != nil {
		return infra(err)
	}
	return infra(os.MkdirAll(j.a.cfg.stepsDir(), 0o700))
}

func pairs(env []*agentv1.EnvVar) []workflow.KV {
	out := make([]workflow.KV, len(env))
	for i, e := range env {
		out[i] = workflow.KV{Name: e.GetName(), Value: e.GetValue()}
	}
	return out
}

// steps runs the steps in order, those after a failure or a stop only where
// their condition says so.
func (j *job) steps(ctx context.Context, w *watch) {
	for i, st := range j.spec.GetSteps() {
		if j.stopping == notStopping {
			j.stop(w.poll())
		}
		if j.stopping >= stopBroken {
			j.skip(i, st, j.stopWhy)
			continue
		}
		cond, err := j.cx.Condition(st.GetCondition())
		if err != nil {
			j.conclude(i, st, failed(fmt.Errorf("condition: %w", err)))
			continue
		}
		if !cond {
			j.skip(i, st, "")
			continue
		}
		if j.stopping != notStopping && w.cleanupOver() {
			j.skip(i, st, fmt.Sprintf("no time left after the job was stopped (%s)", j.grace))
			continue
		}
		j.journal.event(&agentv1.Event{Event: &agentv1.Event_StepStarted{
			StepStarted: &agentv1.StepStarted{Step: int32(i)},
		}})
		j.conclude(i, st, j.step(ctx, w, i, st))
	}
	if j.stopping == notStopping {
		j.stop(w.poll())
	}
}

// stop takes note that the job has to end.
func (j *job) stop(s stopped) {
	if s.kind <= j.stopping {
		return
	}
	j.stopping, j.stopWhy = s.kind, s.reason
	j.cx.Status = workflow.StatusCancelled
	v := &j.verdict
	if v.GetResult() != agentv1.Result_RESULT_UNSPECIFIED && s.kind != stopBroken {
		return // it had failed before
	}
	v.Reason = s.reason
	switch s.kind {
	case stopTimeout:
		v.Result, v.Class = agentv1.Result_RESULT_TIMED_OUT, agentv1.FailureClass_FAILURE_CLASS_TIMEOUT
	case stopBroken:
		v.Result, v.Class = agentv1.Result_RESULT_FAILED, agentv1.FailureClass_FAILURE_CLASS_INFRA
	default:
		v.Result, v.Class = agentv1.Result_RESULT_CANCELLED, agentv1.FailureClass_FAILURE_CLASS_CANCELLED
	}
}

// blame records a failure of the job itself.
func (j *job) blame(err error) {
	if j.cx.Status == workflow.StatusSuccess || j.cx.Status == "" {
		j.cx.Status = workflow.StatusFailure
	}
	v := &j.verdict
	if v.GetResult() != agentv1.Result_RESULT_UNSPECIFIED {
		return
	}
	v.Result, v.Class, v.Reason = agentv1.Result_RESULT_FAILED, agentv1.FailureClass_FAILURE_CLASS_USER, err.Error()
	var t *stepTimeout
	switch {
	case isInfra(err):
		v.Class = agentv1.FailureClass_FAILURE_CLASS_INFRA
	case errors.As(err, &t):
		v.Result, v.Class = agentv1.Result_RESULT_TIMED_OUT, agentv1.FailureClass_FAILURE_CLASS_TIMEOUT
	}
}

func (j *job) skip(i int, st *agentv1.Step, why string) {
	j.conclude(i, st, outcome{result: agentv1.Result_RESULT_SKIPPED, exit: -1, reason: why})
}

// conclude journals what became of a step and lets later steps see it.
func (j *job) conclude(i int, st *agentv1.Step, o outcome) {
	state := workflow.StepState{Outcome: workflow.StatusSuccess, Outputs: o.outputs}
	continued := false
	switch o.result {
	case agentv1.Result_RESULT_SUCCEEDED:
	case agentv1.Result_RESULT_SKIPPED:
		state.Outcome = workflow.StatusSkipped
	case agentv1.Result_RESULT_CANCELLED:
		state.Outcome = workflow.StatusCancelled
	default:
		state.Outcome = workflow.StatusFailure
		continued = st.GetContinueOnError() && j.stopping == notStopping && !isInfra(o.err)
	}
	state.Conclusion = state.Outcome
	if continued {
		state.Conclusion = workflow.StatusSuccess
	}
	if id := st.GetId(); id != "" {
		j.cx.Steps[id] = state
	}
	j.journal.event(&agentv1.Event{Event: &agentv1.Event_StepFinished{StepFinished: &agentv1.StepFinished{
		Step: int32(i), Result: o.result, ExitCode: int32(o.exit), Signal: o.signal, Reason: clean(o.reason),
		Outputs: o.outputs, Continued: continued,
	}}})
	j.log.Debug("step ends", "step", i, "result", o.result, "exit", o.exit, "signal", o.signal, "reason", o.reason)
	if o.result == agentv1.Result_RESULT_FAILED || o.result == agentv1.Result_RESULT_TIMED_OUT {
		if !continued {
			j.blame(fmt.Errorf("step %s: %w", stepName(i, st), o.err))
		}
	}
}

func stepName(i int, st *agentv1.Step) string {
	switch {
	case st.GetId() != "":
		return st.GetId()
	case st.GetName() != "":
		return fmt.Sprintf("%q", st.GetName())
	}
	return fmt.Sprintf("%d", i+1)
}

// outputs evaluates the job's outputs; a mistake in one fails a job that had
// succeeded.
func (j *job) outputs() map[string]string {
	out := map[string]string{}
	size := 0
	for _, o := range j.spec.GetOutputs() {
		v, err := j.cx.Interpolate(o.GetValue())
		if err != nil {
			j.blame(fmt.Errorf("output %s: %w", o.GetName(), err))
			continue
		}
		v = strings.ToValidUTF8(v, "\uFFFD")
		size += len(o.GetName()) + len(v) + 16
		if size > j.journal.eventRoom() {
			j.blame(fmt.Errorf("outputs of the job are larger than %d bytes", j.journal.eventRoom()))
			return map[string]string{}
		}
		out[o.GetName()] = v
	}
	return out
}

// clean makes a reason fit for the wire.
func clean(s string) string {
	const most = 2 << 10
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}
