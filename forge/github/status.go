package github

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	gh "github.com/google/go-github/v88/github"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

const (
	maxDescription = 140    // characters of a commit status
	maxTitle       = 255    // characters of a check run's title
	maxSummary     = 60_000 // bytes; GitHub takes 65,535 characters
	maxBatch       = 50     // annotations in one request
	maxMessageText = 32_000 // bytes of an annotation; GitHub takes 64 KB
	maxAnnotations = 1_000  // of one status
)

// ReportStatus implements forge.Forge: a check run as an App, which has the
// version in its external ID, else a commit status.
func (f *Forge) ReportStatus(ctx context.Context, r forge.Repo, commit string, s forge.Status) error {
	if err := s.Validate(); err != nil {
		return err
	}
	if err := gitcmd.CheckObject(commit); err != nil {
		return fmt.Errorf("%w: %w", forge.ErrInvalid, err)
	}
	repo, err := f.open(ctx, r)
	if err != nil {
		return err
	}
	report, name := f.reportStatus, strings.ToLower(s.Key)
	if f.app != nil {
		report, name = f.reportCheck, s.Key
	}
	key := repo.key() + " " + commit + " " + name
	return f.reports.Do(ctx, key, s.Version, func() error {
		err := report(ctx, repo, commit, key, s)
		if err == nil {
			return nil
		}
		what := fmt.Sprintf("report %q of %s in %s", s.Key, commit, r.FullName())
		// An absent commit and a bad argument have the same code.
		if _, absent := repo.tree(ctx, commit); isNotFound(absent) {
			return fail(ctx, absent, "%s", what)
		}
		return fail(ctx, err, "%s", what)
	})
}

// reportStatus makes a commit status.
func (f *Forge) reportStatus(ctx context.Context, r repository, commit, _ string, s forge.Status) error {
	status := gh.RepoStatus{State: gh.Ptr(shownState(s.State)), Context: &s.Key}
	if s.Description != "" {
		status.Description = gh.Ptr(firstLine(s.Description, maxDescription))
	}
	if s.TargetURL != "" {
		status.TargetURL = &s.TargetURL
	}
	_, _, err := r.Repositories.CreateStatus(ctx, r.owner, r.name, commit, status)
	return err
}

func shownState(s forge.StatusState) string {
	switch s {
	case forge.StatusPending, forge.StatusRunning:
		return "pending"
	case forge.StatusSuccess, forge.StatusSkipped:
		return "success"
	case forge.StatusFailure:
		return "failure"
	default: // also cancelled: what did not run must not look as if it had passed
		return "error"
	}
}

// checkRun is what is known of the latest one.
type checkRun struct {
	id        int64
	version   int64
	completed bool
	annotated int
}

// checkRunRequest creates or updates one. The library's request for updates has
// no started_at, and none can take buttons away.
type checkRunRequest struct {
	Name        string               `json:"name"`
	HeadSHA     string               `json:"head_sha,omitempty"` // of a new one
	DetailsURL  string               `json:"details_url,omitempty"`
	ExternalID  string               `json:"external_id"`
	Status      string               `json:"status"`
	Conclusion  string               `json:"conclusion,omitempty"`
	StartedAt   *time.Time           `json:"started_at,omitempty"`
	CompletedAt *time.Time           `json:"completed_at,omitempty"`
	Output      checkOutput          `json:"output"`
	Actions     []*gh.CheckRunAction `json:"actions"`
}

type checkOutput struct {
	Title       string       `json:"title"`
	Summary     string       `json:"summary"`
	Annotations []annotation `json:"annotations,omitempty"`
}

// annotation is comparable, so that those that are there can be told.
type annotation struct {
	Path        string `json:"path"`
	StartLine   int    `json:"start_line"`
	EndLine     int    `json:"end_line"`
	StartColumn int    `json:"start_column,omitempty"`
	EndColumn   int    `json:"end_column,omitempty"`
	Level       string `json:"annotation_level"`
	Message     string `json:"message"`
}

// reportCheck makes the latest check run of that name say s. Annotations only
// ever come on top, so one that starts again is a new check run; where more than
// one request is needed the last one brings the version and the conclusion, so
// that a report that broke off is made again, without what is there already.
func (f *Forge) reportCheck(ctx context.Context, r repository, commit, key string, s forge.Status) (err error) {
	last, known := f.checks.Get(key)
	if !known {
		if last, err = f.lastCheck(ctx, r, commit, s.Key); err != nil {
			return err
		}
	}
	if last.id != 0 && last.version >= s.Version {
		return nil
	}
	final := request(s)
	if last.completed && final.Status != "completed" {
		last = checkRun{}
	}
	f.checks.Delete(key) // until it is known how this ends
	left := annotations(s.Annotations)
	if last.annotated > 0 && len(left) > 0 {
		there, err := f.annotations(ctx, r, last.id)
		if err != nil {
			return err
		}
		left = slices.DeleteFunc(left, func(a annotation) bool { return there[a] })
	}
	for last.annotated += len(left); len(left) > maxBatch; left = left[maxBatch:] {
		more := final
		more.ExternalID = joinExternalID(last.version, s.ExternalID)
		more.Status, more.Conclusion, more.CompletedAt = "in_progress", "", nil
		more.Output.Annotations = left[:maxBatch]
		if last.id, err = r.send(ctx, commit, last.id, more); err != nil {
			return err
		}
	}
	final.Output.Annotations = left
	if last.id, err = r.send(ctx, commit, last.id, final); err != nil {
		return err
	}
	last.version, last.completed = s.Version, final.Status == "completed"
	f.checks.Put(key, last, 1)
	return nil
}

// send creates a check run, or updates the one with the ID, and gives its ID.
func (r repository) send(ctx context.Context, commit string, id int64, body checkRunRequest) (int64, error) {
	method, path := http.MethodPatch, fmt.Sprintf("repos/%s/%s/check-runs/%d", r.owner, r.name, id)
	if id == 0 {
		method, path, body.HeadSHA = http.MethodPost, fmt.Sprintf("repos/%s/%s/check-runs", r.owner, r.name), commit
	}
	req, err := r.NewRequest(ctx, method, path, body)
	if err != nil {
		return 0, err
	}
	var made gh.CheckRun
	if _, err := r.Do(req, &made); err != nil {
		return 0, err
	}
	if made.GetID() <= 0 {
		return 0, fmt.Errorf("%w: a check run without an ID", forge.ErrUnavailable)
	}
	return made.GetID(), nil
}

// lastCheck asks for the latest check run of that name; the zero one where there
// is none.
func (f *Forge) lastCheck(ctx context.Context, r repository, commit, name string) (checkRun, error) {
	found, _, err := r.Checks.ListCheckRunsForRef(ctx, r.owner, r.name, commit, &gh.ListCheckRunsOptions{
		CheckName: &name, AppID: &f.app.ID, Filter: gh.Ptr("latest"), ListOptions: gh.ListOptions{PerPage: perPage},
	})
	if err != nil {
		return checkRun{}, err
	}
	var last checkRun
	for _, c := range found.CheckRuns {
		if c.GetName() == name && c.GetApp().GetID() == f.app.ID && c.GetID() > last.id {
			version, _ := splitExternalID(c.GetExternalID())
			last = checkRun{c.GetID(), version, c.GetStatus() == "completed", c.GetOutput().GetAnnotationsCount()}
		}
	}
	return last, nil
}

// annotations are those that a check run has.
func (f *Forge) annotations(ctx context.Context, r repository, id int64) (map[annotation]bool, error) {
	there := map[annotation]bool{}
	err := pages(func(o gh.ListOptions) (*gh.Response, error) {
		list, resp, err := r.Checks.ListCheckRunAnnotations(ctx, r.owner, r.name, id, &o)
		for _, a := range list {
			there[annotation{
				a.GetPath(), a.GetStartLine(), a.GetEndLine(), a.GetStartColumn(), a.GetEndColumn(), a.GetAnnotationLevel(), a.GetMessage(),
			}] = true
		}
		return resp, err
	})
	return there, err
}

// request is all of a status but its annotations.
func request(s forge.Status) checkRunRequest {
	c := checkRunRequest{
		Name: s.Key, DetailsURL: s.TargetURL, ExternalID: joinExternalID(s.Version, s.ExternalID), Actions: []*gh.CheckRunAction{},
		Output: checkOutput{Title: firstLine(s.Description, maxTitle), Summary: cut(s.Summary, maxSummary)},
	}
	if c.Output.Title == "" {
		c.Output.Title = string(s.State)
	}
	if c.Output.Summary == "" {
		c.Output.Summary = c.Output.Title
	}
	if !s.StartedAt.IsZero() {
		c.StartedAt = gh.Ptr(s.StartedAt.UTC().Truncate(time.Second))
	}
	c.Status = "completed"
	switch {
	case s.State == forge.StatusPending && slices.Contains(s.Actions, forge.ActionApprove):
		c.Conclusion = "action_required" // only then is it certain that the button is shown
	case s.State == forge.StatusPending:
		c.Status = "queued"
	case s.State == forge.StatusRunning:
		c.Status = "in_progress"
	case s.State == forge.StatusError:
		c.Conclusion = "failure" // GitHub has no word for it that holds up a merge and asks nobody to act
	default:
		c.Conclusion = string(s.State) // success, failure, cancelled and skipped are GitHub's own words
	}
	if s.State.Terminal() && !s.FinishedAt.IsZero() {
		c.CompletedAt = gh.Ptr(s.FinishedAt.UTC().Truncate(time.Second))
	}
	for _, a := range s.Actions {
		switch a {
		case forge.ActionCancel:
			c.Actions = append(c.Actions, &gh.CheckRunAction{Label: "Cancel", Description: "Stop this now", Identifier: string(a)})
		case forge.ActionApprove:
			c.Actions = append(c.Actions, &gh.CheckRunAction{Label: "Approve", Description: "Let this commit's code run", Identifier: string(a)})
		}
	}
	return c
}

// annotations are what GitHub shows of them, each once.
func annotations(all []forge.Annotation) []annotation {
	var out []annotation
	seen := map[annotation]bool{}
	for _, a := range all {
		line := max(a.Line, 1)
		level := string(a.Level)
		if level != "notice" && level != "warning" {
			level = "failure"
		}
		message := cut(strings.TrimSpace(a.Message), maxMessageText)
		if message == "" {
			message = level
		}
		to := annotation{a.Path, line, line, max(a.Column, 0), max(a.Column, 0), level, message}
		if a.Path != "" && !seen[to] && len(out) < maxAnnotations {
			seen[to] = true
			out = append(out, to)
		}
	}
	return out
}

func joinExternalID(version int64, id string) string {
	return strconv.FormatInt(version, 10) + ":" + id
}

// splitExternalID reads what joinExternalID wrote; version 0: somebody else did.
func splitExternalID(s string) (version int64, id string) {
	number, id, ok := strings.Cut(s, ":")
	version, err := strconv.ParseInt(number, 10, 64)
	if !ok || err != nil || version < 0 {
		return 0, ""
	}
	return version, id
}

// firstLine is at most n characters of the first line.
func firstLine(s string, n int) string {
	s, _, _ = strings.Cut(strings.ToValidUTF8(strings.TrimSpace(s), ""), "\n")
	if utf8.RuneCountInString(s) > n {
		s = string([]rune(s)[:n-1]) + "…"
	}
	return s
}
