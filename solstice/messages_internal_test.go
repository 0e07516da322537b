package solstice

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

// statusOfRun is what the forge is told of a run as a whole.
func statusOfRun(t *testing.T, e *Engine, run *store.Run, jobs []*store.Job) forge.Status {
	t.Helper()
	out := e.statuses(run, nil, jobs)
	var s messages.Status
	if err := json.Unmarshal(out[len(out)-1].Body, &s); err != nil {
		t.Fatal(err)
	}
	return s.Status
}

func TestSummary(t *testing.T) {
	e := &Engine{cfg: Config{StatusPrefix: "solstice", TargetURL: func(_, job string) string { return "https://ci.example.org/" + job }}}
	jobs := []*store.Job{
		{ID: "1", RunID: "r", Name: "build", State: store.JobSucceeded, StartedAt: 1e6, FinishedAt: 13e6},
		{ID: "2", RunID: "r", Name: "test (os a|b)", State: store.JobTimedOut, Reason: "<b>step 1</b>\nmore", StartedAt: 1e6, FinishedAt: 4e6},
	}
	run := &store.Run{
		ID: "r", WorkflowName: "ci", State: store.RunRunning, Forge: "f", Commit: strings.Repeat("a", 40), Version: 1, CreatedAt: 1e15,
		Repo: encode(forge.Repo{Name: "repo"}),
	}
	if s := statusOfRun(t, e, run, jobs); s.Summary != "" {
		t.Errorf("before its end: %q", s.Summary)
	}
	run.State = store.RunFailed
	want := `| job | state | ran for | |
| --- | --- | --- | --- |
| [test \(os a\|b\)](https://ci.example.org/2) | timed out | 3s | \<b\>step 1\</b\> |
| [build](https://ci.example.org/1) | succeeded | 12s |  |
`
	if s := statusOfRun(t, e, run, jobs); s.Summary != want {
		t.Errorf("got\n%s\nwant\n%s", s.Summary, want)
	}
	run.State, run.Diagnostics = store.RunErrored, encode(workflow.Diagnostics{{Path: "w.yaml", Line: 3, Column: 2, Severity: workflow.SeverityError, Message: "unknown key *x*"}})
	s := statusOfRun(t, e, run, nil)
	if s.Summary != "- w.yaml:3: unknown key \\*x\\*\n" || len(s.Annotations) != 1 {
		t.Errorf("a broken workflow: %+v", s)
	}
	for range 300 {
		jobs = append(jobs, jobs[0])
	}
	run.Diagnostics = nil
	if s := statusOfRun(t, e, run, jobs); !strings.HasSuffix(s.Summary, "\nand 102 more\n") || strings.Count(s.Summary, "\n| ") > maxRows+2 {
		t.Errorf("many jobs end %q", s.Summary[len(s.Summary)-60:])
	}
	for i := range jobs { // the rows are long before they are many
		jobs[i] = &store.Job{ID: "3", RunID: "r", Name: strings.Repeat("<", 500), State: store.JobFailed, Reason: strings.Repeat("|", 500)}
	}
	if s := statusOfRun(t, e, run, jobs); len(s.Summary) > maxSummary+100 || !strings.HasSuffix(s.Summary, " more\n") || !strings.Contains(s.Summary, "failed") {
		t.Errorf("long rows: %d bytes", len(s.Summary))
	}
	if got := markdown(strings.Repeat("ü", 300)); got != strings.Repeat("ü", 250) {
		t.Errorf("a long name: %d", len(got))
	}
}
