package github_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/forgetest"
	"github.com/solstice-ci/solstice-go/forge/github"
	fake "github.com/solstice-ci/solstice-go/internal/fakeforge/github"
	fakerig "github.com/solstice-ci/solstice-go/internal/fakeforge/rig"
)

var _ = flag.Bool("update", false, "write the golden events")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a fake GitHub and the driver for it.
type rig struct {
	*fake.Server
	*github.Forge
	url string
	app bool
}

func start(tb forgetest.TB, app bool, change func(*github.Config)) rig {
	tb.Helper()
	s, err := fake.New(tb.Context(), tb.TempDir())
	if err != nil {
		tb.Fatalf("%v", err)
	}
	served := s.Start()
	tb.Cleanup(served.Close)
	c := github.Config{URL: served.URL}
	if app {
		key, err := fake.AppKey()
		if err != nil {
			tb.Fatalf("%v", err)
		}
		c.App = &github.App{ID: fake.AppID, Key: key}
	} else {
		c.Token = fake.Token
	}
	if change != nil {
		change(&c)
	}
	f, err := github.New(c)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	tb.Cleanup(func() { _ = f.Close() })
	return rig{s, f, served.URL, app}
}

func (r rig) repo(tb forgetest.TB, name string) forge.Repo {
	tb.Helper()
	repo := forge.Repo{Owner: "team", Name: name}
	if err := r.Repos.Create(tb.Context(), repo.FullName()); err != nil {
		tb.Fatalf("%v", err)
	}
	return repo
}

func (r rig) commit(tb forgetest.TB, repo forge.Repo, branch string, files map[string]forgetest.File) string {
	tb.Helper()
	commit, err := r.Repos.Commit(tb.Context(), repo.FullName(), branch, fakerig.Files(files))
	if err != nil {
		tb.Fatalf("commit: %v", err)
	}
	return commit
}

func (r rig) git(tb forgetest.TB, repo forge.Repo, args ...string) string {
	tb.Helper()
	out, err := r.Repos.Git(tb.Context(), repo.FullName(), "", args...)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	return strings.TrimSpace(out)
}

// pull opens a pull request with one commit on the tip of main.
func (r rig) pull(tb forgetest.TB, repo forge.Repo, files map[string]forgetest.File) forge.PullRequest {
	tb.Helper()
	base, topic := r.git(tb, repo, "rev-parse", "main"), "topic"
	for n := 2; ; n++ {
		if _, err := r.Repos.Resolve(tb.Context(), repo.FullName(), "refs/heads/"+topic); err != nil {
			break
		}
		topic = fmt.Sprintf("topic-%d", n)
	}
	r.git(tb, repo, "branch", topic, "main")
	head := r.commit(tb, repo, topic, files)
	return forge.PullRequest{
		Number: r.OpenPull(repo.FullName(), topic, "main"), HeadRef: topic, HeadCommit: head, HeadRepo: repo, BaseRef: "main", BaseCommit: base,
	}
}

// seen is what people see beside a commit.
func (r rig) seen(repo forge.Repo, commit string) (all []forge.Status) {
	if !r.app {
		for _, s := range r.Statuses(repo.FullName(), commit) {
			all = append(all, forge.Status{Key: s.Context, State: forge.StatusState(s.State), Description: s.Description, TargetURL: s.TargetURL})
		}
		return all
	}
	for _, c := range r.CheckRuns(repo.FullName(), commit, true) {
		s := forge.Status{Key: c.Name, Description: *c.Output.Title, TargetURL: c.DetailsURL}
		switch {
		case c.Status == "queued":
			s.State = forge.StatusPending
		case c.Status == "in_progress":
			s.State = forge.StatusRunning
		default:
			s.State = forge.StatusState(*c.Conclusion)
		}
		all = append(all, s)
	}
	return all
}

// shown is what GitHub makes of a state.
func (r rig) shown(s forge.StatusState) forge.StatusState {
	switch {
	case r.app && s == forge.StatusError:
		return forge.StatusFailure
	case r.app:
		return s
	case s == forge.StatusRunning:
		return forge.StatusPending
	case s == forge.StatusSkipped:
		return forge.StatusSuccess
	case s == forge.StatusCancelled:
		return forge.StatusError
	}
	return s
}

func (r rig) fixture() forgetest.Fixture {
	var users int64 = 500
	f := forgetest.Fixture{
		Forge: r.Forge, PullRequest: r.pull, Shown: r.shown,
		Statuses: func(_ forgetest.TB, repo forge.Repo, commit string) []forge.Status { return r.seen(repo, commit) },
		Comments: func(_ forgetest.TB, repo forge.Repo, number int) (all []string) {
			for _, c := range r.Comments(repo.FullName(), number) {
				all = append(all, c.Body)
			}
			return all
		},
		User: func(_ forgetest.TB, repo forge.Repo, mayApprove bool) forge.User {
			users++
			u := forge.User{ID: fmt.Sprint(users), Login: fmt.Sprintf("user-%d", users)}
			r.SetUser(users, u.Login)
			r.SetPermission(repo.FullName(), u.Login, map[bool]string{true: "write", false: "read"}[mayApprove])
			return u
		},
		Webhooks:   &forgetest.Webhooks{Request: webhook, SignedBy: []string{"X-Hub-Signature-256"}, Deliveries: deliveries()},
		WebhookURL: fake.HookURL,
	}
	f.Webhooks.PullRequest = func(tb forgetest.TB, repo forge.Repo, number int) (string, []byte) {
		payload, err := r.PullRequest(tb.Context(), r.url, repo.FullName(), number, "opened")
		if err != nil {
			tb.Fatalf("%v", err)
		}
		body, err := json.Marshal(payload)
		if err != nil {
			tb.Fatalf("%v", err)
		}
		return "pull_request", body
	}
	fakerig.Fill(&f, r.Repos, "team")
	return f
}

func webhook(tb forgetest.TB, event string, body, secret []byte) *http.Request {
	r, err := fake.Webhook(tb.Context(), "http://localhost/webhook", event, body, secret)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	return r
}

// deliveries are made by the fake; the real ones are those of TestPayloads.
func deliveries() []forgetest.Delivery {
	const base, repo = "https://github.example.org", "team/repo"
	by := fake.User{ID: 77, Login: "somebody"}
	a, b := strings.Repeat("a1", 20), strings.Repeat("b2", 20)
	zeros := strings.Repeat("0", 40)
	run := fake.CheckRun{Repo: repo, ID: 5, Name: "solstice/test", HeadSHA: a, ExternalID: "7:run/job", Status: "completed"}
	run.App.ID = fake.AppID
	foreign, early := run, run
	foreign.App.ID, early.ExternalID = 1, "somebody else's"
	suite := fake.Button(base, run, "rerequested", by)
	suite["check_suite"] = suite["check_run"]
	gone := fake.PullRequest(base, repo, "", "opened", 3, "topic", b, "main", a, by)
	gone["pull_request"].(map[string]any)["head"].(map[string]any)["repo"] = nil
	installation := map[string]any{"action": "created", "repositories": []any{fake.Repository(base, repo)}, "sender": by}
	var all []forgetest.Delivery
	for name, d := range map[string]struct {
		event string
		body  map[string]any
		err   error
	}{
		"push":                 {"push", fake.Push(base, repo, "refs/heads/feature/x", a, b, by), nil},
		"new-branch":           {"push", fake.Push(base, repo, "refs/heads/new", zeros, b, by), nil},
		"tag":                  {"push", fake.Push(base, repo, "refs/tags/v1", zeros, b, by), nil},
		"deleted-branch":       {"push", fake.Push(base, repo, "refs/heads/x", a, zeros, by), forge.ErrIgnored},
		"note":                 {"push", fake.Push(base, repo, "refs/notes/x", a, b, by), forge.ErrIgnored},
		"ref-of-two-lines":     {"push", fake.Push(base, repo, "refs/heads/a\nb", a, b, by), forge.ErrInvalid},
		"commit-in-words":      {"push", fake.Push(base, repo, "refs/heads/x", a, "--all", by), forge.ErrInvalid},
		"pull-request":         {"pull_request", fake.PullRequest(base, repo, "", "opened", 3, "topic", b, "main", a, by), nil},
		"pull-request-updated": {"pull_request", fake.PullRequest(base, repo, "", "synchronize", 3, "topic", b, "main", a, by), nil},
		"pull-request-of-fork": {"pull_request", fake.PullRequest(base, repo, "other/repo", "reopened", 3, "topic", b, "main", a, by), nil},
		"pull-request-of-none": {"pull_request", gone, nil},
		"pull-request-closed":  {"pull_request", fake.PullRequest(base, repo, "", "closed", 3, "topic", b, "main", a, by), nil},
		"pull-request-labeled": {"pull_request", fake.PullRequest(base, repo, "", "labeled", 3, "topic", b, "main", a, by), forge.ErrIgnored},
		"rerun":                {"check_run", fake.Button(base, run, "rerequested", by), nil},
		"rerun-all":            {"check_suite", suite, nil},
		"cancel":               {"check_run", fake.Button(base, run, "cancel", by), nil},
		"approve":              {"check_run", fake.Button(base, run, "approve", by), nil},
		"unknown-button":       {"check_run", fake.Button(base, run, "explode", by), forge.ErrIgnored},
		"of-another-app":       {"check_run", fake.Button(base, foreign, "approve", by), forge.ErrIgnored},
		"not-reported-by-us":   {"check_run", fake.Button(base, early, "approve", by), forge.ErrIgnored},
		"installed":            {"installation", installation, nil},
		"ping":                 {"ping", map[string]any{"zen": "Design for failure.", "repository": fake.Repository(base, repo), "sender": by}, nil},
		"star":                 {"star", map[string]any{"action": "created", "repository": fake.Repository(base, repo)}, forge.ErrIgnored},
	} {
		body, err := json.Marshal(d.body)
		if err != nil {
			panic(err)
		}
		delivery := forgetest.Delivery{Name: name, Event: d.event, Body: body, Repo: repo, Err: d.err}
		if d.err == nil {
			delivery.Golden = filepath.Join("testdata", "events", name+".json")
		}
		if d.event == "installation" {
			delivery.Repo = ""
		}
		all = append(all, delivery)
	}
	return all
}

func TestConformance(t *testing.T) {
	t.Run("app", func(t *testing.T) {
		forgetest.Run(t, forgetest.Harness{New: func(tb forgetest.TB) forgetest.Fixture { return start(tb, true, nil).fixture() }})
	})
	// What a token does in another way.
	t.Run("token", func(t *testing.T) {
		for _, c := range forgetest.Checks() {
			if !strings.HasPrefix(c.Name, "Status") && !slices.Contains([]string{"Clone", "Context", "UnknownRepo", "Comment", "MayApprove", "Check", "CheckFinds"}, c.Name) {
				continue
			}
			t.Run(c.Name, func(t *testing.T) { c.Run(t, start(t, false, nil).fixture()) })
		}
	})
}
