// Package store is the engine's state: runs, jobs, attempts, machines and the
// outbox, in SQLite or PostgreSQL through bun, and the transitions between
// their states as small transactions.
//
// The rules: every transition is one transaction that compares state (and, for
// an attempt, epoch and owner) before it sets; a terminal state never changes;
// what a transition causes (messages) commits with it. Row locks are always
// taken in the order capacity, run, job, attempt, machine; a claim also locks the
// ready machine it binds before the run, which no other transition wants then.
//
// Times are Unix microseconds of the store's [Clock]; zero is "not yet".
package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/uptrace/bun"
)

// Errors that the engine acts on.
var (
	// ErrNotFound: no such row.
	ErrNotFound = errors.New("store: not found")
	// ErrStale: the compare of a compare-and-set failed; the caller lost a race
	// or its epoch, and has to stop or read again.
	ErrStale = errors.New("store: state changed meanwhile")
	// ErrOver: the attempt is finished, lost or another machine's.
	ErrOver = errors.New("store: attempt is over")
	// ErrGone: the machine is being destroyed or gone.
	ErrGone = errors.New("store: machine is gone")
	// ErrToken: the enrolment token is unknown, expired, or used with another nonce.
	ErrToken = errors.New("store: enrolment token not valid")
	// ErrDuplicate: a run for this delivery or idempotency key and workflow exists.
	ErrDuplicate = errors.New("store: duplicate run")
	// ErrRemoved: retention has removed it, or is about to.
	ErrRemoved = fmt.Errorf("%w, removed by retention", ErrNotFound)
)

// RunState of a run.
type RunState string

// States of a run.
const (
	RunPlanning         RunState = "planning"
	RunAwaitingApproval RunState = "awaiting_approval"
	RunQueued           RunState = "queued"  // no job has started
	RunRunning          RunState = "running" // a job has started, not all are over
	RunSucceeded        RunState = "succeeded"
	RunFailed           RunState = "failed"
	RunCancelled        RunState = "cancelled"
	RunErrored          RunState = "errored"
	RunSkipped          RunState = "skipped"
)

// Terminal reports whether the state is final.
func (s RunState) Terminal() bool {
	switch s {
	case RunSucceeded, RunFailed, RunCancelled, RunErrored, RunSkipped:
		return true
	}
	return false
}

// JobState of a job.
type JobState string

// States of a job.
const (
	JobWaiting   JobState = "waiting" // for its needs
	JobQueued    JobState = "queued"
	JobAssigned  JobState = "assigned" // claimed; its machine boots or its agent has not confirmed
	JobRunning   JobState = "running"
	JobSucceeded JobState = "succeeded"
	JobFailed    JobState = "failed"
	JobCancelled JobState = "cancelled"
	JobTimedOut  JobState = "timed_out"
	JobErrored   JobState = "errored"
	JobSkipped   JobState = "skipped"
)

// Terminal reports whether the state is final.
func (s JobState) Terminal() bool {
	switch s {
	case JobSucceeded, JobFailed, JobCancelled, JobTimedOut, JobErrored, JobSkipped:
		return true
	}
	return false
}

// AttemptState of an attempt.
type AttemptState string

// States of an attempt.
const (
	AttemptAssigned AttemptState = "assigned"
	AttemptRunning  AttemptState = "running"
	AttemptFinished AttemptState = "finished" // its journal came to an end
	AttemptLost     AttemptState = "lost"     // it never will
)

// MachineState of a machine.
type MachineState string

// States of a machine.
const (
	MachineProvisioning MachineState = "provisioning" // intent written; being created or booting
	MachineReady        MachineState = "ready"        // enrolled, no attempt
	MachineBound        MachineState = "bound"        // has an attempt
	MachineDestroying   MachineState = "destroying"
	MachineGone         MachineState = "gone"
)

// Run is one workflow file at one commit for one event.
type Run struct {
	bun.BaseModel `bun:"table:runs,alias:run"`

	ID             string `bun:",pk"` // sorts by creation
	State          RunState
	Forge          string          // instance name in the engine's configuration
	Repo           json.RawMessage // forge.Repo
	RepoKey        string          // forge + "/" + full name: fairness and filters
	Commit         string
	Ref            string
	Event          json.RawMessage // forge.Event
	Inputs         json.RawMessage // as submitted: map[string]string
	Delivery       string          // with Forge and WorkflowPath unique where not empty
	IdempotencyKey string          // with WorkflowPath unique where not empty
	WorkflowPath   string
	WorkflowName   string
	Priority       int
	RerunOf        string
	Reason         string          // for people: why it is in its state
	Diagnostics    json.RawMessage // workflow errors
	CancelReason   string          // not empty: cancel was asked for
	Trace          string          // W3C traceparent of the run's root span
	Awaits         string          // not empty: why it needs an approval that it has not got
	Retention      Retention       // how much of it is kept
	Head           string          // the commit beside which statuses stand; empty: Commit
	Note           string          // for people, one line; empty: nothing
	Concurrency    string          // of the runs of a repository with this group one is under way; empty: none
	Version        int64           // grows with every change
	CreatedAt      int64
	StartedAt      int64
	FinishedAt     int64
}

// Job is one node of a run's plan.
type Job struct {
	bun.BaseModel `bun:"table:jobs,alias:job"`

	ID         string `bun:",pk"`
	RunID      string
	Idx        int    // order in the plan
	Key        string // the id in the workflow; combinations of a matrix share it
	Name       string // display name, unique in the run
	Label      string // runs-on
	State      JobState
	Needs      json.RawMessage // []string of keys
	Spec       json.RawMessage // workflow.PlannedJob
	Outputs    json.RawMessage // map[string]string
	Class      string          // of the failure: user, timeout, cancelled, boot, agent_lost, infra
	Reason     string
	Priority   int
	RepoKey    string
	Retries    json.RawMessage // map[class]int used so far
	Attempts   int             // how many there were
	AttemptID  string          // the current or last one
	HoldID     string          // machine of a lost attempt that must be gone first
	CopiedFrom string          // job of the run this one is a rerun of, whose result it keeps
	Version    int64
	QueuedAt   int64
	StartedAt  int64
	FinishedAt int64
}

// Attempt is one execution of a job.
type Attempt struct {
	bun.BaseModel `bun:"table:attempts,alias:attempt"`

	ID           string `bun:",pk"`
	JobID        string
	RunID        string
	Number       int // from 1
	State        AttemptState
	Epoch        int64  // grows with every change of hands
	Owner        string // orchestrator; empty: released
	LeaseUntil   int64
	ContactAt    int64 // last proof of life of its agent; 0: none yet
	MachineID    string
	AckedSeq     int64
	LogStream    string
	LogSize      int64
	LogLost      bool   // the end of the log never arrived
	CancelReason string // not empty: cancel was asked for
	CancelAt     int64
	DeadlineAt   int64 // when the server gives up on the job's own timeout; 0: not running
	Class        string
	Reason       string
	Console      string // its end, for class boot
	Result       string // succeeded, failed, ... once finished
	CreatedAt    int64
	StartedAt    int64
	FinishedAt   int64
}

// Step of an attempt. Rows are made with the attempt's first journal entry
// about them.
type Step struct {
	bun.BaseModel `bun:"table:steps,alias:step"`

	AttemptID  string `bun:",pk"`
	Idx        int    `bun:",pk"`
	Name       string
	Result     string // empty: running
	ExitCode   int
	Signal     string
	Reason     string
	Outputs    json.RawMessage
	Continued  bool
	StartedAt  int64 // by the agent's clock
	FinishedAt int64
}

// Machine is one throw-away machine; it serves one attempt, ever.
type Machine struct {
	bun.BaseModel `bun:"table:machines,alias:machine"`

	ID           string `bun:",pk"` // also the provider's ID
	Pool         string
	Host         string
	State        MachineState
	Owner        string // orchestrator that creates it or has its agent; empty: released
	LeaseUntil   int64
	AttemptID    string // intended or bound
	TokenHash    string // hex SHA-256 of the enrolment token, unique
	TokenExpires int64
	NonceHash    string // of the agent that used the token
	CredHash     string // hex SHA-256 of the session credential, unique where set
	OS           string
	Arch         string
	AgentVersion string
	Protocol     int
	HasGit       bool
	Recipe       string // what it was made from, in its pool's words
	ContactAt    int64
	BootBy       int64 // not attached by then: class boot
	ExpiresAt    int64
	Reason       string // why it is being destroyed
	CreatedAt    int64
	ReadyAt      int64
	DestroyingAt int64
	GoneAt       int64
}

// OutboxMessage is a message that commits with the change that causes it.
type OutboxMessage struct {
	bun.BaseModel `bun:"table:outbox,alias:outbox"`

	ID           int64  `bun:",pk,autoincrement"`
	Key          string // order is kept per key; with Coalesce the newest of a key wins
	Topic        string
	ContentType  string
	Body         []byte
	Attributes   json.RawMessage // map[string]string
	Coalesce     bool
	CreatedAt    int64
	ClaimedBy    string
	ClaimedUntil int64
}

// Options for New.
type Options struct {
	// Changed, when not nil, is asked inside every transaction that changed a
	// run or its jobs for the messages this causes; they go to the outbox. It
	// must only look at its arguments. jobs are those that changed, of all.
	Changed func(run *Run, jobs, all []*Job) []OutboxMessage
	// Clock replaces the default one, for tests.
	Clock Clock
}

// Clock gives the time that leases are measured by, in Unix microseconds. It
// never goes back for one store. See NewClock.
type Clock interface {
	Now(ctx context.Context, db bun.IDB) (int64, error)
}

// Store is safe for concurrent use.
type Store struct {
	db    *bun.DB
	o     Options
	clock Clock
	// installation is this database's UUID, made by the first migration.
	installation string
}

// ClaimRequest asks for work.
type ClaimRequest struct {
	Owner        string
	Lease        time.Duration
	Labels       []string // that the pool serves
	Pool         string
	PoolCapacity int
	Host         string // machines are counted per host, over all its pools
	HostCapacity int
	HostBoots    int             // of them, how many may boot at once; 0: any number
	Max          int             // claims at most
	Ready        []string        // ready machines of this pool attached to the caller
	Warm         int             // machines of the recipe that are to wait for a job, after the claims
	Recipe       string          // what the pool's machines are made from
	Others       []PoolRoom      // the host's other pools: their jobs have precedence over Warm
	NewMachine   func() *Machine // fills ID and TokenHash
	Boot         time.Duration
	// Expire says how long a machine for the job may exist; nil job: a warm one.
	Expire func(j *Job) time.Duration
}

// Claimed is one result of Claim. Warm machines come without job and attempt.
type Claimed struct {
	Run     *Run
	Job     *Job
	Attempt *Attempt
	Machine *Machine
	Fresh   bool // the machine has to be created; otherwise it is one of Ready
}

// AttemptRef fences a write.
type AttemptRef struct {
	ID    string
	Epoch int64
}
