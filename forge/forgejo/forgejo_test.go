package forgejo_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/forgejo"
	"github.com/solstice-ci/solstice-go/forge/forgetest"
	"github.com/solstice-ci/solstice-go/internal/fakeforge"
	fake "github.com/solstice-ci/solstice-go/internal/fakeforge/forgejo"
	"github.com/solstice-ci/solstice-go/internal/fakeforge/rig"
)

var _ = flag.Bool("update", false, "write the golden events")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const zeros = "0000000000000000000000000000000000000000"

// start runs a fake and a driver that talks to it.
func start(tb forgetest.TB, change func(*fake.Server, *forgejo.Config)) (*fake.Server, *httptest.Server, *forgejo.Forge) {
	server, err := fake.New(tb.Context(), tb.TempDir())
	if err != nil {
		tb.Fatalf("%v", err)
	}
	web := httptest.NewServer(server.Handler())
	tb.Cleanup(web.Close)
	c := forgejo.Config{BaseURL: web.URL, Token: server.Token}
	if change != nil {
		change(server, &c)
	}
	f, err := forgejo.New(c)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	tb.Cleanup(func() { _ = f.Close() })
	return server, web, f
}

// shown is what the forge shows for a state; versions from 1.25 know skipped.
func shown(version string) func(forge.StatusState) forge.StatusState {
	return func(s forge.StatusState) forge.StatusState {
		switch s {
		case forge.StatusRunning:
			return forge.StatusPending
		case forge.StatusCancelled:
			return forge.StatusError
		case forge.StatusSkipped:
			if !strings.HasPrefix(version, "1.25") {
				return forge.StatusSuccess
			}
		}
		return s
	}
}

func fixture(tb forgetest.TB, version string) forgetest.Fixture {
	server, web, f := start(tb, func(s *fake.Server, _ *forgejo.Config) { s.Version, s.PageSize = version, 3 })
	users := int64(10)
	x := forgetest.Fixture{
		Forge: f,
		Statuses: func(_ forgetest.TB, r forge.Repo, commit string) []forge.Status {
			byKey := map[string]forge.Status{} // the last row of a context is what people see
			for _, s := range server.Statuses(r.FullName(), commit) {
				byKey[s.Context] = forge.Status{Key: s.Context, State: forge.StatusState(s.State), Description: s.Description, TargetURL: s.TargetURL}
			}
			var all []forge.Status
			for _, s := range byKey {
				all = append(all, s)
			}
			return all
		},
		Shown:      shown(version),
		Webhooks:   webhooks(tb),
		WebhookURL: fake.HookURL,
		Comments: func(_ forgetest.TB, r forge.Repo, number int) (all []string) {
			for _, c := range server.Comments(r.FullName(), number) {
				all = append(all, c.Body)
			}
			return all
		},
		User: func(_ forgetest.TB, r forge.Repo, may bool) forge.User {
			users++
			u := forge.User{ID: strconv.FormatInt(users, 10), Login: "user" + strconv.FormatInt(users, 10)}
			server.SetUser(users, u.Login)
			server.SetPermission(r.FullName(), u.Login, map[bool]string{true: "write", false: "read"}[may])
			return u
		},
	}
	rig.Fill(&x, server.Repos, "team")
	x.PullRequest = func(tb forgetest.TB, r forge.Repo, files map[string]forgetest.File) forge.PullRequest {
		base, err := server.Repos.Resolve(tb.Context(), r.FullName(), "refs/heads/main")
		if err != nil {
			tb.Fatalf("%v", err)
		}
		users++
		head, err := server.Repos.Commit(tb.Context(), r.FullName(), fmt.Sprintf("topic-%d", users), rig.Files(files), base)
		if err != nil {
			tb.Fatalf("%v", err)
		}
		number, err := server.OpenPull(tb.Context(), r.FullName(), head)
		if err != nil {
			tb.Fatalf("%v", err)
		}
		return forge.PullRequest{Number: number, HeadRef: "topic", HeadCommit: head, BaseRef: "main"}
	}
	x.Webhooks.PullRequest = func(tb forgetest.TB, r forge.Repo, number int) (string, []byte) {
		body, err := server.PullRequestOf(tb.Context(), web.URL, "opened", r.FullName(), number)
		if err != nil {
			tb.Fatalf("%v", err)
		}
		return "pull_request", body
	}
	return x
}

func TestConformance(t *testing.T) {
	forgetest.Run(t, forgetest.Harness{New: func(tb forgetest.TB) forgetest.Fixture { return fixture(tb, "1.25.0") }})
}

// Forgejo, whose version ends with that of the Gitea it is compatible with,
// differs in the states that it knows.
func TestForgejoStatuses(t *testing.T) {
	for _, c := range forgetest.Checks() {
		if c.Name == "Statuses" {
			c.Run(t, fixture(t, "12.0.1+gitea-1.22.0"))
		}
	}
}

// webhooks: push.json is the example of the documentation, Gitea's
// docs/content/usage/webhooks.en-us.md and https://forgejo.org/docs/latest/user/webhooks/;
// pull_request.json has the fields of modules/structs (hook.go, pull.go, repo.go) as
// services/convert/pull.go fills them. The others are these with what
// services/repository/push.go and services/webhook/notifier.go make of other events.
func webhooks(tb forgetest.TB) *forgetest.Webhooks {
	w := &forgetest.Webhooks{
		Request: func(tb forgetest.TB, event string, body, secret []byte) *http.Request {
			r, err := fake.Request(tb.Context(), "http://solstice.example.org/", event, "f6266f16-1bf3-46a5-9ea4-602e06ead473", body, secret)
			if err != nil {
				tb.Fatalf("%v", err)
			}
			return r
		},
	}
	type changes = map[string]any
	push := func(name, event string, err error, c changes) {
		w.Deliveries = append(w.Deliveries, delivery(tb, name, event, "push.json", "gitea/webhooks", err, c))
	}
	pull := func(name string, err error, c changes) {
		w.Deliveries = append(w.Deliveries, delivery(tb, name, "pull_request", "pull_request.json", "team/app", err, c))
	}
	const tag, released = "7d1b31e74ee336d15cbd21741bc88a537ed063a0", "bffeb74224043ba2feb48d137756c8a9331c449a"
	push("push", "push", nil, nil)
	push("a new branch", "push", nil, changes{"before": zeros})
	push("an annotated tag", "push", nil, changes{
		"ref": "refs/tags/v1.0.0", "before": zeros, "after": tag, "commits": []any{},
		"head_commit": changes{"id": released, "message": "Webhooks Yay!\n\nIndeed.", "timestamp": "2017-03-13T13:52:11-04:00"},
	})
	push("a deleted tag", "push", forge.ErrIgnored, changes{"ref": "refs/tags/v1.0.0", "after": zeros, "commits": []any{}, "head_commit": nil})
	push("a tag is made", "create", forge.ErrIgnored, changes{
		"ref": "v1.0.0", "ref_type": "tag", "sha": released, "before": rig.Absent, "after": rig.Absent, "commits": rig.Absent,
	})
	push("another ref", "push", forge.ErrIgnored, changes{"ref": "refs/notes/commits"})
	push("an issue", "issues", forge.ErrIgnored, changes{"action": "opened", "ref": rig.Absent})
	push("no commit", "push", forge.ErrInvalid, changes{"after": "HEAD"})
	push("no ref", "push", forge.ErrInvalid, changes{"ref": "refs/heads/../x"})
	pull("a fork", nil, nil)
	pull("the repository itself", nil, changes{"action": "synchronized", "pull_request.head.repo": changes{"id": 140, "full_name": "team/app"}, "pull_request.draft": true})
	pull("AGit", nil, changes{ // services/convert/pull.go: the base stands for the head
		"pull_request.head.repo": changes{"id": 140, "full_name": "team/app"}, "pull_request.head.ref": "refs/pull/7/head", "pull_request.head.label": "",
	})
	pull("the head is gone", nil, changes{"action": "closed", "pull_request.head.repo": nil, "pull_request.head.repo_id": -1, "pull_request.head.ref": "refs/pull/7/head"})
	pull("reopened", nil, changes{"action": "reopened"})
	pull("edited", forge.ErrIgnored, changes{"action": "edited", "changes": changes{"title": changes{"from": "Adjust"}}})
	pull("a label", forge.ErrIgnored, changes{"action": "label_updated"})
	pull("no pull request", forge.ErrInvalid, changes{"pull_request": nil})
	pull("no number", forge.ErrInvalid, changes{"number": 0})
	return w
}

func delivery(tb forgetest.TB, name, event, file, repo string, err error, changes map[string]any) forgetest.Delivery {
	d := forgetest.Delivery{Name: name, Event: event, Body: rig.Payload(tb, file, changes), Repo: repo, Err: err}
	if err == nil {
		d.Golden = "testdata/events/" + strings.ReplaceAll(name, " ", "-") + ".json"
	}
	return d
}

// commit makes a repository with one commit.
func commit(t *testing.T, s *fake.Server) (forge.Repo, string) {
	r := forge.Repo{Owner: "team", Name: "app"}
	if err := s.Repos.Create(t.Context(), r.FullName()); err != nil {
		t.Fatal(err)
	}
	c, err := s.Repos.Commit(t.Context(), r.FullName(), "main", map[string]fakeforge.File{"a": {Content: "1"}})
	if err != nil {
		t.Fatal(err)
	}
	return r, c
}

func status(version int64, state forge.StatusState) forge.Status {
	return forge.Status{Key: "solstice", Version: version, State: state}
}

// Whatever goes wrong on the way, the last state that was reported is what
// stands there in the end, and each is reported once unless an answer was lost.
func TestFaults(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("called elsewhere: %s with %v", r.URL, r.Header)
	}))
	defer elsewhere.Close()
	for name, tc := range map[string]struct {
		fault fakeforge.Fault
		want  error
		retry time.Duration
		rows  int // of the one report, after it was repeated
	}{
		"429":                {fakeforge.Fault{Status: 429, Header: map[string]string{"Retry-After": "7"}}, forge.ErrUnavailable, 7 * time.Second, 1},
		"403 with a limit":   {fakeforge.Fault{Status: 403, Header: map[string]string{"Retry-After": "60"}}, forge.ErrUnavailable, time.Minute, 1},
		"403":                {fakeforge.Fault{Status: 403}, forge.ErrPermission, 0, 1},
		"401":                {fakeforge.Fault{Status: 401}, forge.ErrPermission, 0, 1},
		"502":                {fakeforge.Fault{Status: 502}, forge.ErrUnavailable, 0, 1},
		"503":                {fakeforge.Fault{Status: 503, Header: map[string]string{"Retry-After": "Mon, 02 Jan 2006 15:04:05 GMT"}}, forge.ErrUnavailable, 0, 1},
		"the answer is lost": {fakeforge.Fault{Lose: true}, forge.ErrUnavailable, 0, 2},
		"elsewhere":          {fakeforge.Fault{Redirect: elsewhere.URL + "/api/v1/repos"}, nil, 0, 1},
		"a local file":       {fakeforge.Fault{Redirect: "file:///etc/passwd"}, nil, 0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server, _, f := start(t, func(_ *fake.Server, c *forgejo.Config) { c.Timeout = 500 * time.Millisecond })
			r, c := commit(t, server)
			if _, err := f.ReadFile(t.Context(), r, c, "a"); err != nil { // before it gets bad
				t.Fatal(err)
			}
			tc.fault.Method, tc.fault.Path = http.MethodPost, "/statuses/"
			server.Faults.Add(tc.fault)
			err := f.ReportStatus(t.Context(), r, c, status(2, forge.StatusSuccess))
			if err == nil || tc.want != nil && !errors.Is(err, tc.want) || tc.want == nil && errors.Is(err, forge.ErrUnavailable) {
				t.Errorf("ReportStatus: %v, want %v", err, tc.want)
			}
			if err != nil && strings.Contains(err.Error(), server.Token) {
				t.Errorf("the error tells the token: %v", err)
			}
			var retry *forge.RetryError
			if errors.As(err, &retry) && retry.After != tc.retry || tc.retry > 0 && retry == nil {
				t.Errorf("try again after %v, want %v", retry, tc.retry)
			}
			for _, s := range []forge.Status{status(2, forge.StatusSuccess), status(1, forge.StatusRunning)} {
				if err := f.ReportStatus(t.Context(), r, c, s); err != nil {
					t.Errorf("ReportStatus once more: %v", err)
				}
			}
			rows := server.Statuses(r.FullName(), c)
			if len(rows) != tc.rows || rows[len(rows)-1].State != "success" {
				t.Errorf("reported: %+v, want %d rows that end with success", rows, tc.rows)
			}
			if n := server.Faults.Pending(); n > 0 {
				t.Errorf("%d faults did not happen", n)
			}
		})
	}
}

// An answer that comes slowly, too long, or as what is no JSON.
func TestBadAnswers(t *testing.T) {
	server, _, f := start(t, func(_ *fake.Server, c *forgejo.Config) { c.Timeout = 500 * time.Millisecond })
	r, c := commit(t, server)
	server.Faults.Add(fakeforge.Fault{Path: "/git/commits/", Slow: true})
	if _, err := f.ReadFile(t.Context(), r, c, "a"); !errors.Is(err, forge.ErrUnavailable) {
		t.Errorf("half an answer: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	server.Faults.Add(fakeforge.Fault{Path: "/git/commits/", Slow: true})
	if _, err := f.ReadFile(ctx, r, c, "a"); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, forge.ErrUnavailable) {
		t.Errorf("the caller's deadline: %v", err)
	}
	if got, err := f.ReadFile(t.Context(), r, c, "a"); err != nil || string(got) != "1" {
		t.Errorf("ReadFile: %q, %v", got, err)
	}
	page := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("<html>")) }))
	defer page.Close()
	other, err := forgejo.New(forgejo.Config{BaseURL: page.URL, Token: "t"})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if _, err := other.ReadFile(t.Context(), r, c, "a"); !errors.Is(err, forge.ErrUnavailable) {
		t.Errorf("a page: %v", err)
	}
	page.Close()
	if _, err := other.ReadFile(t.Context(), r, c, "a"); !errors.Is(err, forge.ErrUnavailable) {
		t.Errorf("nobody there: %v", err)
	}
}

// The API redirects from a repository's old name; reports arrive all the same,
// and git, whose redirects are not followed, gets the new one.
func TestRenamed(t *testing.T) {
	server, web, f := start(t, nil)
	r, c := commit(t, server)
	old := forge.Repo{Owner: "team", Name: "old"}
	server.Rename(old.FullName(), r.FullName())
	if err := f.ReportStatus(t.Context(), old, c, status(1, forge.StatusSuccess)); err != nil || len(server.Statuses(r.FullName(), c)) != 1 {
		t.Errorf("ReportStatus: %v, %+v", err, server.Statuses(r.FullName(), c))
	}
	if clone, err := f.CloneInfo(t.Context(), old, forge.CloneOptions{}); err != nil || clone.URL != web.URL+"/team/app.git" {
		t.Errorf("CloneInfo: %+v, %v", clone.URL, err)
	}
}

// Before 1.13 a single ref is no list.
func TestOldRefs(t *testing.T) {
	server, _, f := start(t, func(s *fake.Server, _ *forgejo.Config) { s.Version = "1.12.0" })
	r, c := commit(t, server)
	if got, err := f.Resolve(t.Context(), r, "main"); err != nil || got != c {
		t.Errorf("Resolve: %s, %v", got, err)
	}
	if err := f.ReportStatus(t.Context(), r, c, status(1, forge.StatusSkipped)); err != nil {
		t.Errorf("skipped: %v", err)
	}
}

// A pull request's head is found by its ref; an empty repository has none.
func TestRefs(t *testing.T) {
	server, _, f := start(t, nil)
	r, c := commit(t, server)
	if _, err := server.OpenPull(t.Context(), r.FullName(), c); err != nil {
		t.Fatal(err)
	}
	if got, err := f.Resolve(t.Context(), r, "refs/pull/1/head"); err != nil || got != c {
		t.Errorf("Resolve: %s, %v", got, err)
	}
	empty := forge.Repo{Owner: "team", Name: "empty"}
	if err := server.Repos.Create(t.Context(), empty.FullName()); err != nil {
		t.Fatal(err)
	}
	if heads, err := f.Heads(t.Context(), empty); err != nil || len(heads) != 0 {
		t.Errorf("Heads: %v, %v", heads, err)
	}
	server.Faults.Add(fakeforge.Fault{Path: "/git/refs/", Status: http.StatusConflict}) // what older versions say
	if heads, err := f.Heads(t.Context(), empty); err != nil || len(heads) != 0 {
		t.Errorf("Heads: %v, %v", heads, err)
	}
}

// A comment of somebody else is not ours, whatever is in it.
func TestCommentOfOthers(t *testing.T) {
	server, _, f := start(t, nil)
	r, c := commit(t, server)
	number, err := server.OpenPull(t.Context(), r.FullName(), c)
	if err != nil {
		t.Fatal(err)
	}
	server.AddComment(r.FullName(), number, fake.User{ID: 66, Login: "mallory"}, "<!-- solstice: result -->\nmine")
	for _, text := range []string{"one", "two"} {
		if err := f.Comment(t.Context(), r, number, "result", text); err != nil {
			t.Fatal(err)
		}
	}
	all := server.Comments(r.FullName(), number)
	if len(all) != 2 || !strings.HasSuffix(all[0].Body, "\nmine") || !strings.HasSuffix(all[1].Body, "\ntwo") {
		t.Errorf("comments: %+v", all)
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []forgejo.Config{
		{},
		{BaseURL: "https://git.example.org"},
		{BaseURL: "git.example.org", Token: "t"},
		{BaseURL: "ftp://git.example.org", Token: "t"},
		{BaseURL: "https://user:hunter2@git.example.org", Token: "t"},
		{BaseURL: "https://git.example.org/?x=y", Token: "t"},
		{BaseURL: "https://git.example.org", Token: "t", TokenFunc: func(context.Context) (string, time.Time, error) { return "", time.Time{}, nil }},
	} {
		if _, err := forgejo.New(c); !errors.Is(err, forge.ErrInvalid) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("New(%+v): %v", c, err)
		}
	}
}

// A token that changes is asked for each time, and its end is told.
func TestTokenFunc(t *testing.T) {
	ends := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	var fail error
	server, _, f := start(t, func(s *fake.Server, c *forgejo.Config) {
		c.Token = ""
		c.TokenFunc = func(context.Context) (string, time.Time, error) { return s.Token, ends, fail }
	})
	r, c := commit(t, server)
	if clone, err := f.CloneInfo(t.Context(), r, forge.CloneOptions{}); err != nil || !clone.ExpiresAt.Equal(ends) {
		t.Errorf("CloneInfo: %v, %v", clone.ExpiresAt, err)
	}
	server.Token = "another"
	if _, err := f.ReadFile(t.Context(), r, c, "a"); err != nil {
		t.Errorf("ReadFile: %v", err)
	}
	fail = errors.New("no token today")
	if _, err := f.Resolve(t.Context(), r, "main"); !errors.Is(err, fail) {
		t.Errorf("Resolve: %v", err)
	}
}

// FuzzParseWebhook: no body and no header makes it panic, give an event that is
// not valid, or accept what is not signed.
func FuzzParseWebhook(f *testing.F) {
	secret := []byte("fuzz")
	for _, d := range webhooks(f).Deliveries {
		f.Add(d.Event, d.Body, "", true)
	}
	f.Add("push", []byte(`{"repository":{"full_name":"a/b"},"Repository":{"full_name":"c/d"}}`), "sha256=", false)
	driver, err := forgejo.New(forgejo.Config{BaseURL: "https://git.example.org", Token: "t"})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, event string, body []byte, signature string, signed bool) {
		r, err := fake.Request(t.Context(), "http://solstice.example.org/", event, "id", body, secret)
		if err != nil {
			t.Fatal(err)
		}
		if !signed {
			for _, name := range []string{"X-Forgejo-Signature", "X-Gitea-Signature", "X-Hub-Signature-256"} {
				r.Header.Set(name, signature)
			}
		}
		asked := ""
		e, err := driver.ParseWebhook(t.Context(), r, func(_ context.Context, repo string) ([]byte, error) {
			asked = repo
			return secret, nil
		})
		switch {
		case !signed && !errors.Is(err, forge.ErrSignature):
			t.Errorf("accepted with the signature %q: %v", signature, err)
		case err == nil && (e.Validate() != nil || e.Repo.FullName() != asked):
			t.Errorf("event %+v of %q, %v", e, asked, e.Validate())
		case err != nil && !errors.Is(err, forge.ErrInvalid) && !errors.Is(err, forge.ErrIgnored) && !errors.Is(err, forge.ErrSignature):
			t.Errorf("error %v", err)
		}
	})
}

// Nothing but the forge is connected to, whatever a payload or a redirect names.
func TestContained(t *testing.T) {
	server, web, _ := start(t, nil)
	r, c := commit(t, server)
	number, err := server.OpenPull(t.Context(), r.FullName(), c)
	if err != nil {
		t.Fatal(err)
	}
	body, err := server.PullRequest(web.URL, "opened", r.FullName(), number, "mallory/app", "topic", c, c, 1)
	if err != nil {
		t.Fatal(err)
	}
	rig.Contained(t, rig.Contain{
		URL: web.URL, Faults: &server.Faults, Body: body,
		Request: func(body, secret []byte) *http.Request {
			r, err := fake.Request(t.Context(), "http://solstice.example.org/", "pull_request", "id", body, secret)
			if err != nil {
				t.Fatal(err)
			}
			return r
		},
		New: func() forge.Forge {
			f, err := forgejo.New(forgejo.Config{BaseURL: web.URL, Token: server.Token})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = f.Close() })
			return f
		},
	})
}
