package solstice

import (
	"encoding/json"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

// RunState says where a run is.
type RunState string

// States of a run. The last five are terminal: they never change.
const (
	RunPlanning         RunState = "planning"
	RunAwaitingApproval RunState = "awaiting_approval"
	RunQueued           RunState = "queued"  // no job has started yet
	RunRunning          RunState = "running" // a job has started, not all are over
	RunSucceeded        RunState = "succeeded"
	RunFailed           RunState = "failed"
	RunCancelled        RunState = "cancelled"
	RunErrored          RunState = "errored" // Solstice's failure, or a workflow that cannot be planned
	RunSkipped          RunState = "skipped"
)

// Terminal reports whether the state is final.
func (s RunState) Terminal() bool { return store.RunState(s).Terminal() }

// JobState says where a job is.
type JobState string

// States of a job. The last six are terminal: they never change.
const (
	JobWaiting   JobState = "waiting" // for the jobs it needs
	JobQueued    JobState = "queued"
	JobAssigned  JobState = "assigned" // its machine boots, or its agent has not confirmed yet
	JobRunning   JobState = "running"
	JobSucceeded JobState = "succeeded"
	JobFailed    JobState = "failed"
	JobCancelled JobState = "cancelled"
	JobTimedOut  JobState = "timed_out"
	JobErrored   JobState = "errored"
	JobSkipped   JobState = "skipped"
)

// Terminal reports whether the state is final.
func (s JobState) Terminal() bool { return store.JobState(s).Terminal() }

// AttemptState says where one execution of a job is.
type AttemptState string

// States of an attempt.
const (
	AttemptAssigned AttemptState = "assigned"
	AttemptRunning  AttemptState = "running"
	AttemptFinished AttemptState = "finished" // its journal came to an end
	AttemptLost     AttemptState = "lost"     // it never will
)

// Terminal reports whether the state is final.
func (s AttemptState) Terminal() bool { return s == AttemptFinished || s == AttemptLost }

// Class says what kind of failure ended an attempt, and so what becomes of the
// job: user → failed, timeout → timed_out, cancelled → cancelled; boot,
// agent_lost, infra, capacity and no_answer are retried within [Config.Retries],
// then the job is errored.
type Class string

// Failure classes.
const (
	ClassUser      Class = "user"
	ClassTimeout   Class = "timeout"
	ClassCancelled Class = "cancelled"
	ClassBoot      Class = "boot"       // the machine ran but its agent never attached
	ClassAgentLost Class = "agent_lost" // the agent was not heard of for its deadline, or its machine is gone
	ClassInfra     Class = "infra"      // the machine could not be made, or the agent could not do its part
	ClassCapacity  Class = "capacity"   // the host had no room; retried without limit
	ClassNoAnswer  Class = "no_answer"  // a warm machine did not take the job; retried beside the limits, the fourth time as agent_lost
)

// Run is one workflow file at one commit for one event.
type Run struct {
	ID           string                `json:"id"` // sorts by creation
	State        RunState              `json:"state"`
	Forge        string                `json:"forge"`
	Repo         forge.Repo            `json:"repo"`
	Commit       string                `json:"commit"`         // what is tested
	Head         string                `json:"head,omitempty"` // of a pull request: beside it statuses stand, and it is what is approved
	Ref          string                `json:"ref,omitempty"`
	Workflow     string                `json:"workflow"` // its name
	WorkflowPath string                `json:"workflow_path"`
	Event        forge.Kind            `json:"event"` // of a rerun, the first run's
	RerunOf      string                `json:"rerun_of,omitempty"`
	Reason       string                `json:"reason,omitempty"` // for people
	Note         string                `json:"note,omitempty"`   // what people should know besides, one line
	Diagnostics  []workflow.Diagnostic `json:"diagnostics,omitempty"`
	CreatedAt    time.Time             `json:"created_at"`
	StartedAt    time.Time             `json:"started_at,omitzero"`
	FinishedAt   time.Time             `json:"finished_at,omitzero"`
	LogsRemoved  bool                  `json:"logs_removed,omitempty"` // by retention
	Jobs         []Job                 `json:"jobs,omitempty"`         // in the plan's order; only where a method says so
}

// Job is one node of a run's plan; a matrix makes several.
type Job struct {
	ID         string            `json:"id"`
	RunID      string            `json:"run_id"`
	Key        string            `json:"key"`   // its id in the workflow
	Name       string            `json:"name"`  // with matrix values, unique in the run
	Label      string            `json:"label"` // runs-on
	State      JobState          `json:"state"`
	Needs      []string          `json:"needs,omitempty"`
	Class      Class             `json:"class,omitempty"`
	Reason     string            `json:"reason,omitempty"`
	Outputs    map[string]string `json:"outputs,omitempty"`
	Attempts   int               `json:"attempts"`
	AttemptID  string            `json:"attempt_id,omitempty"`  // the current or last one
	CopiedFrom string            `json:"copied_from,omitempty"` // job whose result a rerun kept
	QueuedAt   time.Time         `json:"queued_at,omitzero"`
	StartedAt  time.Time         `json:"started_at,omitzero"`
	FinishedAt time.Time         `json:"finished_at,omitzero"`
}

// Attempt is one execution of a job on one machine.
type Attempt struct {
	ID         string       `json:"id"`
	JobID      string       `json:"job_id"`
	RunID      string       `json:"run_id"`
	Number     int          `json:"number"` // from 1
	State      AttemptState `json:"state"`
	MachineID  string       `json:"machine_id"`
	Class      Class        `json:"class,omitempty"`
	Reason     string       `json:"reason,omitempty"`
	Console    string       `json:"console,omitempty"`  // of the machine, its end, where it stopped by itself
	LogSize    int64        `json:"log_size"`           // durable bytes
	LogLost    bool         `json:"log_lost,omitempty"` // the end of the log never arrived
	CreatedAt  time.Time    `json:"created_at"`
	StartedAt  time.Time    `json:"started_at,omitzero"`
	FinishedAt time.Time    `json:"finished_at,omitzero"`
}

// Step is one step of an attempt; times are the agent's.
type Step struct {
	Index      int       `json:"index"`
	Name       string    `json:"name"`
	Result     string    `json:"result,omitempty"` // succeeded, failed, cancelled, timed_out, skipped; empty: running
	ExitCode   int       `json:"exit_code"`
	Signal     string    `json:"signal,omitempty"`
	Reason     string    `json:"reason,omitempty"`
	Continued  bool      `json:"continued,omitempty"` // failed, and the job went on as it was told to
	StartedAt  time.Time `json:"started_at,omitzero"`
	FinishedAt time.Time `json:"finished_at,omitzero"`
}

func timeOf(micros int64) time.Time {
	if micros == 0 {
		return time.Time{}
	}
	return time.UnixMicro(micros).UTC()
}

// decode reads JSON that the engine itself wrote; what is not there stays zero.
func decode[T any](raw json.RawMessage) (v T) {
	if len(raw) > 0 {
		_ = json.Unmarshal(raw, &v)
	}
	return v
}

func encode(v any) json.RawMessage {
	b, err := json.Marshal(v)
	if err != nil {
		panic("solstice: plain data does not marshal: " + err.Error())
	}
	return b
}

func publicRun(r *store.Run, jobs []*store.Job) Run {
	out := Run{
		ID: r.ID, State: RunState(r.State), Forge: r.Forge, Repo: decode[forge.Repo](r.Repo),
		Commit: r.Commit, Head: r.Head, Note: r.Note, Ref: r.Ref, Workflow: r.WorkflowName, WorkflowPath: r.WorkflowPath,
		Event: decode[forge.Event](r.Event).Kind, RerunOf: r.RerunOf,
		Reason: r.Reason, Diagnostics: decode[[]workflow.Diagnostic](r.Diagnostics),
		CreatedAt: timeOf(r.CreatedAt), StartedAt: timeOf(r.StartedAt), FinishedAt: timeOf(r.FinishedAt),
		LogsRemoved: !r.Retention.HasLogs(),
	}
	for _, j := range jobs {
		out.Jobs = append(out.Jobs, publicJob(j))
	}
	return out
}

func publicJob(j *store.Job) Job {
	return Job{
		ID: j.ID, RunID: j.RunID, Key: j.Key, Name: j.Name, Label: j.Label, State: JobState(j.State),
		Needs: decode[[]string](j.Needs), Class: Class(j.Class), Reason: j.Reason,
		Outputs: decode[map[string]string](j.Outputs), Attempts: j.Attempts, AttemptID: j.AttemptID, CopiedFrom: j.CopiedFrom,
		QueuedAt: timeOf(j.QueuedAt), StartedAt: timeOf(j.StartedAt), FinishedAt: timeOf(j.FinishedAt),
	}
}

func publicAttempt(a *store.Attempt) Attempt {
	return Attempt{
		ID: a.ID, JobID: a.JobID, RunID: a.RunID, Number: a.Number, State: AttemptState(a.State), MachineID: a.MachineID,
		Class: Class(a.Class), Reason: a.Reason, Console: a.Console, LogSize: a.LogSize, LogLost: a.LogLost,
		CreatedAt: timeOf(a.CreatedAt), StartedAt: timeOf(a.StartedAt), FinishedAt: timeOf(a.FinishedAt),
	}
}

func publicStep(s *store.Step) Step {
	return Step{
		Index: s.Idx, Name: s.Name, Result: s.Result, ExitCode: s.ExitCode, Signal: s.Signal, Reason: s.Reason,
		Continued: s.Continued, StartedAt: timeOf(s.StartedAt), FinishedAt: timeOf(s.FinishedAt),
	}
}
