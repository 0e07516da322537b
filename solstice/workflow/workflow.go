// Package workflow reads workflow files, checks them, and turns them into
// plans that an engine schedules and an agent runs.
//
// [Parse] reads a file and reports everything that is wrong with it at once,
// each with its place. [Workflow.Match] says whether an event concerns it, and
// [Workflow.Plan] expands it into jobs: typed inputs, one job per matrix
// combination, positions kept. A [Plan] is plain data that survives JSON.
// Expressions are CEL, evaluated over [Contexts], without input or output and
// under a cost limit; the engine evaluates what is known before a machine
// exists, the agent the rest with the same package.
//
// [Schema] is the JSON Schema of the file format for editors. It comes from the
// same table of definitions that drives the parser.
package workflow

import (
	"errors"
	"fmt"
	"path"
	"strings"
	"time"
)

// Where workflow files live in a repository.
const (
	// File is the single workflow file.
	File = ".solstice/workflow.yaml"
	// Dir holds any number of workflow files, *.yaml or *.yml, without
	// subdirectories. A repository may use both.
	Dir = ".solstice/workflows"
)

// IsFile reports whether a repository path (slash-separated, from the root) is
// that of a workflow file.
func IsFile(p string) bool {
	if p == File {
		return true
	}
	ext := path.Ext(p)
	return path.Dir(p) == Dir && (ext == ".yaml" || ext == ".yml") && !strings.HasPrefix(path.Base(p), ".")
}

// Limits on what a workflow file may ask for. Beyond them it is refused.
const (
	MaxFileSize     = 512 << 10 // bytes
	MaxDepth        = 32        // nested mappings and sequences
	MaxNodes        = 50_000    // YAML values, those behind aliases counted each time
	MaxScalar       = 64 << 10  // bytes of one string
	MaxJobs         = 512       // of a plan, after matrix expansion
	MaxCombinations = 256       // of one matrix
	MaxSteps        = 256       // of one job
	MaxTimeout      = 7 * 24 * time.Hour
)

// DefaultTimeout is how long a job may take that does not say.
const DefaultTimeout = 60 * time.Minute

// ErrInvalid is wrapped by the errors of this package that say a workflow, an
// input or an expression is wrong, rather than something around it.
var ErrInvalid = errors.New("workflow: invalid")

// Position is a place in the workflow file, both counted from 1; a column is a
// character (a Unicode code point, a tab is one).
type Position struct {
	Line   int `json:"line"`
	Column int `json:"column"`
}

func (p Position) String() string { return fmt.Sprintf("%d:%d", p.Line, p.Column) }

// KV is one entry of a mapping whose order matters. The value is as written,
// with its ${{ }}.
type KV struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Workflow is a parsed file. It is immutable and safe for concurrent use.
type Workflow struct {
	Path     string
	Name     string // as declared, else the file's base name without extension
	On       Triggers
	Env      []KV
	Defaults Defaults
	Checkout Checkout
	// Concurrency is nil where the file does not say.
	Concurrency *Concurrency
	Jobs        []Job // in the file's order

	source  *source
	broken  bool                // Parse reported errors
	inputAt map[string]Position // of the inputs, for Plan to point at
	groupAt Position            // of concurrency's group
}

// Concurrency has at most one run of a group under way in a repository. Of those
// that wait only the newest stays.
type Concurrency struct {
	Group            string `json:"group"`                        // as written, of a plan: evaluated
	CancelInProgress bool   `json:"cancel_in_progress,omitempty"` // a new run ends the older ones
}

// Defaults hold for every job and step that does not say otherwise.
type Defaults struct {
	RunsOn  string
	Shell   string
	Workdir string
	Timeout time.Duration // of jobs; 0: DefaultTimeout
}

// Checkout says how the commit comes into the work tree.
type Checkout struct {
	Disabled   bool `json:"disabled,omitempty"`
	Depth      int  `json:"depth,omitempty"` // commits of history; 0: all
	Submodules bool `json:"submodules,omitempty"`
	LFS        bool `json:"lfs,omitempty"`
}

// Job is one entry under jobs, as declared.
type Job struct {
	ID       string
	Name     string // "" when absent
	RunsOn   string // as written, "" when absent
	Needs    []string
	If       string // as written
	Matrix   *Matrix
	Env      []KV
	Timeout  time.Duration // 0: the default
	Checkout *Checkout     // nil: the workflow's
	Setup    string
	Steps    []Step
	Outputs  []KV
	Position Position // of its key

	at map[string]Position // of its runs-on, name and matrix, for Plan to point at
}

// Step is one entry under steps.
type Step struct {
	ID              string        `json:"id,omitempty"`
	Name            string        `json:"name"` // as declared, else the first line of Run; in a plan with ${{ }} evaluated if all is known
	Run             string        `json:"run"`  // as written
	Shell           string        `json:"shell,omitempty"`
	Workdir         string        `json:"workdir,omitempty"` // relative to the work tree
	Env             []KV          `json:"env,omitempty"`
	If              string        `json:"if,omitempty"`      // as written; see Contexts.Condition
	Timeout         time.Duration `json:"timeout,omitempty"` // nanoseconds; 0: the job's
	ContinueOnError bool          `json:"continue_on_error,omitempty"`
	Position        Position      `json:"position"`
}

// Plan is what a workflow comes to for one event: the jobs to schedule. It is
// plain data and survives a JSON round trip unchanged.
type Plan struct {
	Name   string `json:"name"`
	Path   string `json:"path"`
	Inputs Values `json:"inputs,omitempty"` // typed, with defaults: for Contexts.Inputs
	// Concurrency is nil where the workflow does not say.
	Concurrency *Concurrency `json:"concurrency,omitempty"`
	Jobs        []PlannedJob `json:"jobs"` // in the file's order, combinations in declared order
}

// PlannedJob is a job, or one combination of its matrix.
type PlannedJob struct {
	ID       string        `json:"id"`   // the key under jobs; all combinations share it
	Name     string        `json:"name"` // for people, unique in the plan: "test (go 1.26, os linux)"
	Matrix   Values        `json:"matrix,omitempty"`
	Needs    []string      `json:"needs,omitempty"`   // IDs; means all combinations of each
	If       string        `json:"if,omitempty"`      // as written; see Contexts.Condition
	RunsOn   string        `json:"runs_on,omitempty"` // resolved; "" when absent
	Timeout  time.Duration `json:"timeout"`           // nanoseconds, never 0
	Env      []KV          `json:"env,omitempty"`     // the workflow's, then the job's; values as written
	Checkout Checkout      `json:"checkout"`
	Setup    string        `json:"setup,omitempty"` // as written: path of a script in the work tree, run before the steps
	Steps    []Step        `json:"steps"`
	Outputs  []KV          `json:"outputs,omitempty"` // values as written
	Position Position      `json:"position"`
}

// PlanOptions say what is known when a workflow is planned.
type PlanOptions struct {
	// Inputs as a person gave them; Plan types and validates them.
	Inputs map[string]string
	// Trigger Manual, or any input given, means that a person started the run:
	// then required inputs must be there. Otherwise inputs without a default
	// are "", false, 0, or the first option of a choice.
	Trigger TriggerKind
	// Contexts: Event, Ref, SHA and Repo are used, the rest is ignored.
	Contexts Contexts
	// Jobs selects these IDs and what they need, transitively. Empty: all.
	Jobs []string
}
