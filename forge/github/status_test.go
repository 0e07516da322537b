package github_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/forgetest"
	"github.com/solstice-ci/solstice-go/forge/github"
	"github.com/solstice-ci/solstice-go/internal/fakeforge"
	fake "github.com/solstice-ci/solstice-go/internal/fakeforge/github"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

const checkName = "solstice/test (go 1.26)"

// committed makes a repository with one commit.
func (r rig) committed(t *testing.T) (forge.Repo, string) {
	repo := r.repo(t, "repo")
	return repo, r.commit(t, repo, "main", map[string]forgetest.File{"a": {Content: "1"}})
}

// again is a driver that remembers nothing, as after a restart.
func (r rig) again(t *testing.T) *github.Forge {
	key, err := fake.AppKey()
	if err != nil {
		t.Fatal(err)
	}
	c := github.Config{URL: r.url, App: &github.App{ID: fake.AppID, Key: key}}
	if !r.app {
		c.App, c.Token = nil, fake.Token
	}
	f, err := github.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func annotations(n int) (all []forge.Annotation) {
	for i := range n {
		all = append(all, forge.Annotation{
			Path: fmt.Sprintf("dir/%d.go", i), Line: i + 1, Column: i % 3, Level: []forge.Level{forge.LevelNotice, forge.LevelWarning, forge.LevelFailure}[i%3],
			Message: fmt.Sprintf("remark %d", i),
		})
	}
	return all
}

// wantCheck checks that there is one check run of the name, or as many as said,
// and gives the last.
func (r rig) wantCheck(t *testing.T, repo forge.Repo, commit string, runs int, status, conclusion, externalID string, remarks int) fake.CheckRun {
	t.Helper()
	all := r.CheckRuns(repo.FullName(), commit, false)
	if len(all) != runs {
		t.Fatalf("%d check runs, want %d: %+v", len(all), runs, all)
	}
	got := all[len(all)-1]
	said := ""
	if got.Conclusion != nil {
		said = *got.Conclusion
	}
	if got.Status != status || said != conclusion || got.ExternalID != externalID || len(got.Annotations) != remarks {
		t.Errorf("check run is %s %q, external ID %q, with %d annotations; want %s %q, %q, %d",
			got.Status, said, got.ExternalID, len(got.Annotations), status, conclusion, externalID, remarks)
	}
	return got
}

func TestCheckRun(t *testing.T) {
	r := start(t, true, nil)
	repo, commit := r.committed(t)
	begin := time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC)
	s := forge.Status{Key: checkName, Version: 1, State: forge.StatusPending, ExternalID: "run:1/job", Actions: []forge.Action{forge.ActionApprove}}
	report := func(f *github.Forge, change func()) {
		t.Helper()
		change()
		if err := f.ReportStatus(t.Context(), repo, commit, s); err != nil {
			t.Fatal(err)
		}
	}
	report(r.Forge, func() {})
	if c := r.wantCheck(t, repo, commit, 1, "completed", "action_required", "1:run:1/job", 0); len(c.Actions) != 1 || c.Actions[0].Identifier != "approve" {
		t.Errorf("buttons: %+v", c.Actions)
	}
	report(r.Forge, func() { s.Version = 2; s.Description = "waits for team" })
	r.wantCheck(t, repo, commit, 1, "completed", "action_required", "2:run:1/job", 0)
	report(r.Forge, func() {
		s.Version, s.State, s.StartedAt, s.Actions = 3, forge.StatusRunning, begin, []forge.Action{forge.ActionCancel}
		s.Summary = "# Summary"
	})
	if c := r.wantCheck(t, repo, commit, 2, "in_progress", "", "3:run:1/job", 0); *c.StartedAt != "2026-01-02T03:04:05Z" || *c.Output.Summary != "# Summary" || c.Actions[0].Identifier != "cancel" {
		t.Errorf("check run is %+v, began at %s", c, *c.StartedAt)
	}
	report(r.Forge, func() {
		s.Version, s.State, s.FinishedAt, s.Actions, s.Annotations = 4, forge.StatusFailure, begin.Add(time.Minute), nil, annotations(130)
	})
	if c := r.wantCheck(t, repo, commit, 2, "completed", "failure", "4:run:1/job", 130); *c.CompletedAt != "2026-01-02T03:05:05Z" || len(c.Actions) != 0 ||
		c.Annotations[129].Path != "dir/129.go" || c.Annotations[129].StartLine != 130 || c.Annotations[1].AnnotationLevel != "warning" {
		t.Errorf("check run is %+v", c)
	}

	// After a restart GitHub itself knows which version is the last.
	restarted := r.again(t)
	report(restarted, func() { s.Version = 3; s.State = forge.StatusRunning })
	r.wantCheck(t, repo, commit, 2, "completed", "failure", "4:run:1/job", 130)
	report(restarted, func() { s.Version, s.State, s.Annotations = 5, forge.StatusError, annotations(131) })
	r.wantCheck(t, repo, commit, 2, "completed", "failure", "5:run:1/job", 131)
	report(restarted, func() { s.Version, s.State, s.Annotations = 6, forge.StatusPending, nil })
	r.wantCheck(t, repo, commit, 3, "queued", "", "6:run:1/job", 0)
}

// A report that breaks off at any request, before or after it was carried out, is
// made again with nothing twice.
func TestCheckRunBreaksOff(t *testing.T) {
	const requests = 3 // one creates it, two more bring annotations
	for name, fault := range map[string]fakeforge.Fault{
		"refused": {Path: "/check-runs", Status: http.StatusBadGateway},
		"lost":    {Path: "/check-runs", Lose: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := start(t, true, func(c *github.Config) { c.Timeout = time.Second })
			repo := r.repo(t, "repo")
			for i := range requests {
				commit := r.commit(t, repo, "main", map[string]forgetest.File{"a": {Content: fmt.Sprint(i)}})
				methods := []string{http.MethodPost, http.MethodPatch, http.MethodPatch}
				fault.Method = methods[i]
				if i == 2 { // let the first of the updates pass
					r.Faults.Add(fakeforge.Fault{Method: http.MethodPatch, Path: "/check-runs", Status: http.StatusBadGateway})
				}
				r.Faults.Add(fault)
				s := forge.Status{Key: checkName, Version: 7, State: forge.StatusFailure, ExternalID: "x", Annotations: annotations(120)}
				failures := 0
				for ; ; failures++ {
					err := r.ReportStatus(t.Context(), repo, commit, s)
					if err == nil {
						break
					}
					if !errors.Is(err, forge.ErrUnavailable) {
						t.Fatal(err)
					}
				}
				if failures == 0 || r.Faults.Pending() != 0 {
					t.Errorf("request %d: %d failures, %d are to come", i, failures, r.Faults.Pending())
				}
				r.wantCheck(t, repo, commit, 1, "completed", "failure", "7:x", 120)
			}
		})
	}
}

func TestCommitStatus(t *testing.T) {
	r := start(t, false, nil)
	repo, commit := r.committed(t)
	s := forge.Status{Key: checkName, Version: 1, State: forge.StatusFailure, Description: strings.Repeat("ä", 200) + "\nsecond line"}
	if err := r.ReportStatus(t.Context(), repo, commit, s); err != nil {
		t.Fatal(err)
	}
	if got := r.Statuses(repo.FullName(), commit); len(got) != 1 || got[0].Description != strings.Repeat("ä", 139)+"…" {
		t.Errorf("%+v", got)
	}
	// Keys that GitHub does not tell apart are in order, too.
	s.Key, s.State = strings.ToUpper(s.Key), forge.StatusPending
	if err := r.ReportStatus(t.Context(), repo, commit, s); err != nil || r.StatusCount(repo.FullName(), commit) != 1 {
		t.Errorf("%v, %d statuses", err, r.StatusCount(repo.FullName(), commit))
	}
}

// description is the part of an OpenAPI document that tests need.
type description struct {
	Paths      map[string]map[string]json.RawMessage `json:"paths"`
	Components struct {
		Schemas map[string]json.RawMessage `json:"schemas"`
	} `json:"components"`
}

var (
	github23 description // read once: it is large
	readOnce sync.Once
)

// openAPI is GitHub's.
func openAPI(t *testing.T) description {
	t.Helper()
	data := testenv.Fixture(t, "github-openapi-23.0.2/generated/api.github.com.json")
	readOnce.Do(func() {
		if err := json.Unmarshal(data, &github23); err != nil {
			t.Error(err)
		}
	})
	return github23
}

// Every request that makes or changes something is as GitHub describes it, with
// no field that GitHub does not know.
func TestRequestsMatchOpenAPI(t *testing.T) {
	api := openAPI(t)
	schema := func(method, path string) (any, *jsonschema.Schema) {
		t.Helper()
		var operation struct {
			RequestBody struct {
				Content map[string]struct {
					Schema json.RawMessage `json:"schema"`
				} `json:"content"`
			} `json:"requestBody"`
		}
		if err := json.Unmarshal(api.Paths[path][strings.ToLower(method)], &operation); err != nil {
			t.Fatalf("%s %s: %v", method, path, err)
		}
		doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(operation.RequestBody.Content["application/json"].Schema))
		if err != nil {
			t.Fatalf("%s %s: %v", method, path, err)
		}
		permissions, err := jsonschema.UnmarshalJSON(bytes.NewReader(api.Components.Schemas["app-permissions"]))
		if err != nil { // the only one that is referred to
			t.Fatal(err)
		}
		doc.(map[string]any)["components"] = map[string]any{"schemas": map[string]any{"app-permissions": permissions}}
		c := jsonschema.NewCompiler()
		c.AssertFormat()
		if err := c.AddResource("body.json", doc); err != nil {
			t.Fatal(err)
		}
		s, err := c.Compile("body.json")
		if err != nil {
			t.Fatalf("%s %s: %v", method, path, err)
		}
		return doc, s
	}
	// The fake's names of path parameters, and GitHub's.
	names := map[string]string{
		"POST /repos/{owner}/{repo}/check-runs":               "/repos/{owner}/{repo}/check-runs",
		"PATCH /repos/{owner}/{repo}/check-runs/{id}":         "/repos/{owner}/{repo}/check-runs/{check_run_id}",
		"POST /repos/{owner}/{repo}/statuses/{sha}":           "/repos/{owner}/{repo}/statuses/{sha}",
		"POST /repos/{owner}/{repo}/issues/{number}/comments": "/repos/{owner}/{repo}/issues/{issue_number}/comments",
		"PATCH /repos/{owner}/{repo}/issues/comments/{id}":    "/repos/{owner}/{repo}/issues/comments/{comment_id}",
		"POST /app/installations/{id}/access_tokens":          "/app/installations/{installation_id}/access_tokens",
	}
	seen := map[string][][]byte{}
	for _, app := range []bool{true, false} {
		r := start(t, app, nil)
		r.Observe = func(_, pattern string, body []byte) { seen[pattern] = append(seen[pattern], body) }
		repo, commit := r.committed(t)
		s := forge.Status{
			Key: checkName, TargetURL: "https://ci.example.org/1", ExternalID: "x", StartedAt: time.Now(), FinishedAt: time.Now(),
			Annotations: annotations(60), Actions: []forge.Action{forge.ActionCancel, forge.ActionApprove},
		}
		for i, state := range []forge.StatusState{
			forge.StatusPending, forge.StatusRunning, forge.StatusSuccess, forge.StatusFailure, forge.StatusError, forge.StatusCancelled, forge.StatusSkipped,
		} {
			s.Version, s.State, s.Summary = int64(i+1), state, strings.Repeat("ä", i*10_000)
			if err := r.ReportStatus(t.Context(), repo, commit, s); err != nil {
				t.Fatal(err)
			}
			s.Description, s.Actions = strings.Repeat("long ", 100), nil
		}
		pr := r.pull(t, repo, map[string]forgetest.File{"a": {Content: "2"}})
		for _, text := range []string{"one", "two"} {
			if err := r.Comment(t.Context(), repo, pr.Number, "k", text); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := r.CloneInfo(t.Context(), repo, forge.CloneOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if len(seen) != len(names) {
		t.Errorf("%d kinds of requests, want %d", len(seen), len(names))
	}
	for pattern, bodies := range seen {
		method, _, _ := strings.Cut(pattern, " ")
		doc, s := schema(method, names[pattern])
		for _, body := range bodies {
			instance, err := jsonschema.UnmarshalJSON(bytes.NewReader(body))
			if err == nil {
				err = errors.Join(s.Validate(instance), unknown(doc, instance))
			}
			if err != nil {
				t.Errorf("%s: %v\n%.2000s", pattern, err, body)
			}
		}
	}
}

// unknown tells fields that a schema does not list.
func unknown(schema, instance any) error {
	s, _ := schema.(map[string]any)
	switch v := instance.(type) {
	case map[string]any:
		properties, _ := s["properties"].(map[string]any)
		for name, inner := range v {
			known, ok := properties[name]
			if !ok && properties != nil {
				return fmt.Errorf("GitHub knows no field %q", name)
			}
			if err := unknown(known, inner); err != nil {
				return err
			}
		}
	case []any:
		for _, inner := range v {
			if err := unknown(s["items"], inner); err != nil {
				return err
			}
		}
	}
	return nil
}

// Payloads of GitHub's own documentation and of deliveries that were recorded.
func TestPayloads(t *testing.T) {
	f := start(t, true, nil)
	secret := []byte("secret")
	counts := map[string]int{}
	for _, dir := range []string{"api.github.com", "ghes-31", "ghes-32", "ghes-33", "ghes-34", "ghes-35"} {
		var events []struct {
			Name     string            `json:"name"`
			Examples []json.RawMessage `json:"examples"`
		}
		if err := json.Unmarshal(testenv.Fixture(t, "github-webhooks-7.6.1/"+dir+"/index.json"), &events); err != nil {
			t.Fatal(err)
		}
		for _, e := range events {
			for i, body := range e.Examples {
				got, err := parse(t, f, e.Name, body, secret)
				kind := string(got.Kind)
				switch {
				case errors.Is(err, forge.ErrIgnored):
					kind = "ignored"
				case errors.Is(err, forge.ErrInvalid):
					kind = "invalid"
					t.Logf("%s: %s %d: %v", dir, e.Name, i, err)
				case err != nil:
					kind = "error"
					t.Errorf("%s: %s %d: %v", dir, e.Name, i, err)
				default:
					if err := got.Validate(); err != nil {
						t.Errorf("%s: %s %d: %v", dir, e.Name, i, err)
					}
				}
				if got.Action != "" {
					kind += " " + got.Action
				}
				counts[kind]++
			}
		}
	}
	want := map[string]int{
		"ignored": 664, "installation added": 13, "installation removed": 12, "ping": 11, "push": 2, "tag": 6,
		"pull_request opened": 11, "pull_request synchronized": 1, "pull_request reopened": 2, "pull_request closed": 4,
	}
	if !maps.Equal(counts, want) {
		t.Errorf("the payloads are %v,\nwant %v", counts, want)
	}
}

// The buttons of recorded payloads, made ours.
func TestRecordedButtons(t *testing.T) {
	r := start(t, true, nil)
	var events []struct {
		Name     string            `json:"name"`
		Examples []json.RawMessage `json:"examples"`
	}
	if err := json.Unmarshal(testenv.Fixture(t, "github-webhooks-7.6.1/api.github.com/index.json"), &events); err != nil {
		t.Fatal(err)
	}
	got := map[string]int{}
	for _, e := range events {
		if !strings.HasPrefix(e.Name, "check_") {
			continue
		}
		for _, example := range e.Examples {
			var p map[string]any
			if err := json.Unmarshal(example, &p); err != nil {
				t.Fatal(err)
			}
			check, ok := p[e.Name].(map[string]any)
			if !ok {
				t.Fatalf("%s without one", e.Name)
			}
			check["external_id"] = "3:run/job"
			check["app"].(map[string]any)["id"] = fake.AppID
			if p["requested_action"] != nil {
				p["requested_action"] = map[string]any{"identifier": "approve"}
			}
			body, err := json.Marshal(p)
			if err != nil {
				t.Fatal(err)
			}
			event, err := parse(t, r, e.Name, body, []byte("secret"))
			if errors.Is(err, forge.ErrIgnored) {
				continue
			}
			if err != nil || event.Commit != check["head_sha"] || event.Sender.ID == "" {
				t.Errorf("%s %v: %+v, %v", e.Name, p["action"], event, err)
			}
			got[string(event.Kind)+" "+event.ExternalID]++
		}
	}
	if want := map[string]int{"rerun run/job": 2, "rerun ": 2, "approve run/job": 1}; !maps.Equal(got, want) {
		t.Errorf("the events are %v, want %v", got, want)
	}
}

func parse(tb forgetest.TB, r rig, event string, body, secret []byte) (forge.Event, error) {
	return r.ParseWebhook(tb.Context(), webhook(tb, event, body, secret), secretOf(secret))
}
