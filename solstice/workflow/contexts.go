package workflow

import (
	"bytes"
	"encoding/json"
)

// Values is a mapping of plain data: nil, bool, string, json.Number, []any and
// map[string]any. Numbers keep the spelling of their source (1.20 stays 1.20),
// which is why they are json.Number; so they do through JSON.
type Values map[string]any

// UnmarshalJSON keeps numbers as written.
func (v *Values) UnmarshalJSON(b []byte) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var m map[string]any
	if err := d.Decode(&m); err != nil {
		return err
	}
	*v = m
	return nil
}

// Status of a job so far, or of what it needs, for success() and its sisters.
const (
	StatusSuccess   = "success"
	StatusFailure   = "failure"
	StatusCancelled = "cancelled"
	StatusSkipped   = "skipped" // neither success() nor failure() nor cancelled()
)

// Contexts is what expressions see. It is plain data and survives a JSON round
// trip; fields that are not known yet are left empty.
type Contexts struct {
	Event  Values `json:"event,omitempty"`
	Inputs Values `json:"inputs,omitempty"` // typed; Plan.Inputs
	Matrix Values `json:"matrix,omitempty"` // PlannedJob.Matrix
	Ref    string `json:"ref,omitempty"`    // full: refs/heads/main
	SHA    string `json:"sha,omitempty"`
	Repo   string `json:"repo,omitempty"` // owner/name
	// Needs by job ID, of the jobs that this one needs.
	Needs map[string]Need `json:"needs,omitempty"`
	// Steps by step ID, of the steps that have finished.
	Steps map[string]StepState `json:"steps,omitempty"`
	Env   map[string]string    `json:"env,omitempty"`
	// Status is StatusSuccess, StatusFailure or StatusCancelled, or
	// StatusSkipped for a job when what it needs was skipped and nothing failed.
	// Empty means StatusSuccess.
	Status string `json:"status,omitempty"`
}

// Need is the result of a job that another needs. For a matrix job Result is
// that of the whole (failure before cancelled before success; skipped only when
// all were), and Outputs merges the combinations in plan order: of each output
// the last combination that set it to something wins.
type Need struct {
	Result  string            `json:"result"` // success, failure, cancelled, skipped
	Outputs map[string]string `json:"outputs,omitempty"`
}

// StepState is what became of a step.
type StepState struct {
	Outcome    string            `json:"outcome"`    // success, failure, cancelled, skipped
	Conclusion string            `json:"conclusion"` // the outcome, or success where continue-on-error forgave a failure
	Outputs    map[string]string `json:"outputs,omitempty"`
}
