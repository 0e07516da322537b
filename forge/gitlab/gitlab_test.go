package gitlab_test

import (
	"context"
	"encoding/base64"
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
	"github.com/solstice-ci/solstice-go/forge/forgetest"
	"github.com/solstice-ci/solstice-go/forge/gitlab"
	"github.com/solstice-ci/solstice-go/internal/fakeforge"
	fake "github.com/solstice-ci/solstice-go/internal/fakeforge/gitlab"
	"github.com/solstice-ci/solstice-go/internal/fakeforge/rig"
)

var _ = flag.Bool("update", false, "write the golden events")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const zeros = "0000000000000000000000000000000000000000"

// signing is a signing token, as the forge makes them.
var signing = []byte("whsec_" + base64.StdEncoding.EncodeToString([]byte("thirty-two bytes, as they should")))

// start runs a fake and a driver that talks to it.
func start(tb forgetest.TB, change func(*fake.Server, *gitlab.Config)) (*fake.Server, *httptest.Server, *gitlab.Forge) {
	server, err := fake.New(tb.Context(), tb.TempDir())
	if err != nil {
		tb.Fatalf("%v", err)
	}
	web := httptest.NewServer(server.Handler())
	tb.Cleanup(web.Close)
	c := gitlab.Config{BaseURL: web.URL, Token: server.Token}
	if change != nil {
		change(server, &c)
	}
	f, err := gitlab.New(c)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	tb.Cleanup(func() { _ = f.Close() })
	return server, web, f
}

func fixture(tb forgetest.TB) forgetest.Fixture {
	server, web, f := start(tb, func(s *fake.Server, _ *gitlab.Config) { s.PageSize = 3 })
	users := int64(10)
	x := forgetest.Fixture{
		Forge: f,
		Statuses: func(_ forgetest.TB, r forge.Repo, commit string) []forge.Status {
			names := map[string]forge.StatusState{"failed": forge.StatusFailure, "canceled": forge.StatusCancelled}
			byKey := map[string]forge.Status{} // the last job of a name is what people see
			for _, s := range server.Statuses(r.FullName(), commit) {
				state := forge.StatusState(s.State)
				if names[s.State] != "" {
					state = names[s.State]
				}
				byKey[s.Name] = forge.Status{Key: s.Name, State: state, Description: s.Description, TargetURL: s.TargetURL}
			}
			var all []forge.Status
			for _, s := range byKey {
				all = append(all, s)
			}
			return all
		},
		Shown: func(s forge.StatusState) forge.StatusState {
			if s == forge.StatusError {
				return forge.StatusFailure
			}
			return s
		},
		Webhooks:   webhooks(tb),
		WebhookURL: fake.HookURL,
		Comments: func(_ forgetest.TB, r forge.Repo, number int) (all []string) {
			for _, n := range server.Notes(r.FullName(), number) {
				all = append(all, n.Body)
			}
			return all
		},
		User: func(_ forgetest.TB, r forge.Repo, may bool) forge.User {
			users++
			u := fake.User{ID: users, Username: "user" + strconv.FormatInt(users, 10)}
			server.SetMember(r.FullName(), u, map[bool]int{true: 30, false: 20}[may])
			return forge.User{ID: strconv.FormatInt(u.ID, 10), Login: u.Username}
		},
	}
	rig.Fill(&x, server.Repos, "group/sub")
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
		number, err := server.OpenRequest(tb.Context(), r.FullName(), head, "main")
		if err != nil {
			tb.Fatalf("%v", err)
		}
		return forge.PullRequest{Number: number, HeadRef: "topic", HeadCommit: head, BaseRef: "main"}
	}
	x.Webhooks.PullRequest = func(tb forgetest.TB, r forge.Repo, number int) (string, []byte) {
		body, err := server.MergeRequestOf(web.URL, "open", r.FullName(), number)
		if err != nil {
			tb.Fatalf("%v", err)
		}
		return "Merge Request Hook", body
	}
	return x
}

func TestConformance(t *testing.T) {
	forgetest.Run(t, forgetest.Harness{New: func(tb forgetest.TB) forgetest.Fixture { return fixture(tb) }})
}

// TestSigned is what is said of webhooks, with those of a signing token.
func TestSigned(t *testing.T) {
	for _, c := range forgetest.Checks() {
		if !strings.HasPrefix(c.Name, "Webhook") || c.Name == "WebhookHostile" || c.Name == "WebhookOversized" {
			continue // or not about signatures
		}
		t.Run(c.Name, func(t *testing.T) {
			f := fixture(t)
			f.Webhooks.Secret, f.Webhooks.SignedBy = signing, []string{"Webhook-Signature"}
			if c.Needs == nil || c.Needs(f) {
				c.Run(t, f)
			}
		})
	}
}

// webhooks: the files are the examples of GitLab's documentation,
// doc/user/project/integrations/webhook_events.md, whose lists of labels are left
// out; the others are these with what that page, lib/gitlab/data_builder/push.rb
// and lib/gitlab/hook_data/merge_request_builder.rb say of other cases.
func webhooks(tb forgetest.TB) *forgetest.Webhooks {
	w := &forgetest.Webhooks{
		Request: func(tb forgetest.TB, event string, body, secret []byte) *http.Request {
			// What no signing token is gets to be one where others are.
			r, err := fake.Request(tb.Context(), "http://solstice.example.org/", event, "f6266f16-1bf3-46a5-9ea4-602e06ead473", time.Now(), body, secret)
			if err != nil {
				tb.Fatalf("%v", err)
			}
			return r
		},
	}
	type changes = map[string]any
	add := func(name, event, file, repo string, err error, c changes) {
		d := forgetest.Delivery{Name: name, Event: event, Body: rig.Payload(tb, file, c), Repo: repo, Err: err}
		if err == nil {
			d.Golden = "testdata/events/" + strings.ReplaceAll(name, " ", "-") + ".json"
		}
		w.Deliveries = append(w.Deliveries, d)
	}
	push := func(name string, err error, c changes) { add(name, "Push Hook", "push.json", "mike/diaspora", err, c) }
	tag := func(name string, err error, c changes) {
		add(name, "Tag Push Hook", "tag_push.json", "jsmith/example", err, c)
	}
	merge := func(name string, err error, c changes) {
		add(name, "Merge Request Hook", "merge_request.json", "gitlabhq/gitlab-test", err, c)
	}
	const oldrev = "95790bf891e76fee5e1747ab589903a6a1f80f22"
	push("push", nil, nil)
	push("a new branch", nil, changes{"before": zeros})
	add("groups in groups", "Push Hook", "push.json", "group/sub/app", nil, changes{"project.path_with_namespace": "group/sub/app"})
	push("a deleted branch", forge.ErrIgnored, changes{"after": zeros, "checkout_sha": nil, "commits": []any{}})
	push("no commit", forge.ErrInvalid, changes{"after": "HEAD", "checkout_sha": "HEAD"})
	push("no ref", forge.ErrInvalid, changes{"ref": "master"})
	tag("a tag", nil, nil)
	tag("an annotated tag", nil, changes{"checkout_sha": oldrev})
	tag("a deleted tag", forge.ErrIgnored, changes{"after": zeros, "checkout_sha": nil})
	merge("opened", nil, nil)
	merge("synchronized", nil, changes{"object_attributes.action": "update", "object_attributes.oldrev": oldrev})
	merge("reopened", nil, changes{"object_attributes.action": "reopen"})
	merge("closed", nil, changes{"object_attributes.action": "close"})
	merge("merged", nil, changes{"object_attributes.action": "merge"})
	merge("a fork", nil, changes{
		"object_attributes.source_project_id": 77, "object_attributes.source.path_with_namespace": "mallory/project", "object_attributes.draft": true,
		"user.id": 51, "user.username": "mallory",
	})
	merge("the fork is gone", nil, changes{"object_attributes.action": "close", "object_attributes.source": nil})
	merge("an edit", forge.ErrIgnored, changes{"object_attributes.action": "update"})
	merge("an approval", forge.ErrIgnored, changes{"object_attributes.action": "approved"})
	merge("no merge request", forge.ErrInvalid, changes{"object_attributes": nil})
	merge("no head", forge.ErrInvalid, changes{"object_attributes.last_commit": nil})
	add("a pipeline", "Pipeline Hook", "merge_request.json", "gitlabhq/gitlab-test", forge.ErrIgnored, changes{"object_kind": "pipeline"})
	add("no kind", "Push Hook", "push.json", "mike/diaspora", forge.ErrInvalid, changes{"object_kind": rig.Absent})
	return w
}

// commit makes a project with one commit.
func commit(t *testing.T, s *fake.Server) (forge.Repo, string) {
	r := forge.Repo{Owner: "group/sub", Name: "app"}
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
// stands there in the end.
func TestFaults(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("called elsewhere: %s with %v", r.URL, r.Header)
	}))
	defer elsewhere.Close()
	for name, tc := range map[string]struct {
		fault fakeforge.Fault
		want  error
		retry bool
	}{
		"429":                {fakeforge.Fault{Status: 429, Header: map[string]string{"RateLimit-Remaining": "0", "RateLimit-Reset": "4102444800"}}, forge.ErrUnavailable, true},
		"429 without a time": {fakeforge.Fault{Status: 429}, forge.ErrUnavailable, false},
		"403":                {fakeforge.Fault{Status: 403}, forge.ErrPermission, false},
		"409":                {fakeforge.Fault{Status: 409}, forge.ErrUnavailable, false},
		"502":                {fakeforge.Fault{Status: 502}, forge.ErrUnavailable, false},
		"the answer is lost": {fakeforge.Fault{Lose: true}, forge.ErrUnavailable, false},
		"elsewhere":          {fakeforge.Fault{Redirect: elsewhere.URL + "/api/v4/projects"}, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server, _, f := start(t, func(_ *fake.Server, c *gitlab.Config) { c.Timeout = 500 * time.Millisecond })
			r, c := commit(t, server)
			if err := f.ReportStatus(t.Context(), r, c, status(1, forge.StatusRunning)); err != nil {
				t.Fatal(err)
			}
			tc.fault.Method, tc.fault.Path = http.MethodPost, "/statuses/"
			server.Faults.Add(tc.fault)
			err := f.ReportStatus(t.Context(), r, c, status(3, forge.StatusSuccess))
			if err == nil || tc.want != nil && !errors.Is(err, tc.want) || tc.want == nil && errors.Is(err, forge.ErrUnavailable) {
				t.Errorf("ReportStatus: %v, want %v", err, tc.want)
			}
			if err != nil && strings.Contains(err.Error(), server.Token) {
				t.Errorf("the error tells the token: %v", err)
			}
			var retry *forge.RetryError
			if errors.As(err, &retry) != tc.retry || tc.retry && retry.After <= 0 {
				t.Errorf("try again after %+v, want one: %v", retry, tc.retry)
			}
			for _, s := range []forge.Status{status(3, forge.StatusSuccess), status(2, forge.StatusRunning)} {
				if err := f.ReportStatus(t.Context(), r, c, s); err != nil {
					t.Errorf("ReportStatus once more: %v", err)
				}
			}
			all := server.Statuses(r.FullName(), c)
			if all[len(all)-1].State != "success" || len(all) > 2 {
				t.Errorf("reported: %+v", all)
			}
			for _, s := range all {
				if s.State != "success" {
					t.Errorf("left behind: %+v", s)
				}
			}
			if n := server.Faults.Pending(); n > 0 {
				t.Errorf("%d faults did not happen", n)
			}
		})
	}
}

// Older versions refuse the state that a status has, and know no skipped.
func TestStrict(t *testing.T) {
	server, _, f := start(t, func(s *fake.Server, _ *gitlab.Config) { s.Strict = true })
	r, c := commit(t, server)
	for i, tc := range []struct {
		state forge.StatusState
		want  string
	}{
		{forge.StatusPending, "pending"},
		{forge.StatusPending, "pending"},
		{forge.StatusRunning, "running"},
		{forge.StatusRunning, "running"},
		{forge.StatusPending, "running"},
		{forge.StatusFailure, "failed"},
		{forge.StatusFailure, "failed"},
		{forge.StatusSkipped, "success"},
	} {
		if err := f.ReportStatus(t.Context(), r, c, status(int64(i+1), tc.state)); err != nil {
			t.Errorf("%d, %s: %v", i, tc.state, err)
		}
		if all := server.Statuses(r.FullName(), c); all[len(all)-1].State != tc.want {
			t.Errorf("%d: %s is shown as %s, want %s", i, tc.state, all[len(all)-1].State, tc.want)
		}
	}
}

// A merge request of a fork has a head that is on no branch; statuses of a commit
// stay in one pipeline until it is deleted.
func TestPipelines(t *testing.T) {
	server, _, f := start(t, nil)
	r, base := commit(t, server)
	head, err := server.Repos.Commit(t.Context(), r.FullName(), "refs/keep-around/x", map[string]fakeforge.File{"a": {Content: "2"}}, base)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.ReportStatus(t.Context(), r, head, status(1, forge.StatusPending)); !errors.Is(err, forge.ErrNotFound) {
		t.Errorf("a commit on no branch: %v", err)
	}
	if _, err := server.OpenRequest(t.Context(), r.FullName(), head, "main"); err != nil {
		t.Fatal(err)
	}
	for v, state := range []forge.StatusState{forge.StatusPending, forge.StatusRunning, forge.StatusSuccess, forge.StatusPending} {
		if err := f.ReportStatus(t.Context(), r, head, status(int64(v+1), state)); err != nil {
			t.Fatal(err)
		}
	}
	all := server.Statuses(r.FullName(), head)
	if len(all) != 2 || all[0].State != "success" || all[1].State != "pending" ||
		all[0].Ref != "refs/merge-requests/1/head" || all[0].Pipeline != all[1].Pipeline {
		t.Errorf("statuses: %+v", all)
	}
	server.DeletePipelines(r.FullName(), head)
	if err := f.ReportStatus(t.Context(), r, head, status(5, forge.StatusSuccess)); err != nil {
		t.Errorf("after the pipeline was deleted: %v", err)
	}
	if got, err := f.Resolve(t.Context(), r, "refs/merge-requests/1/head"); err != nil || got != head {
		t.Errorf("Resolve: %s, %v", got, err)
	}
}

// A merge that is not known yet, and one that is of another head.
func TestMergeLater(t *testing.T) {
	server, _, f := start(t, func(s *fake.Server, _ *gitlab.Config) { s.Checking = true })
	r, base := commit(t, server)
	head, err := server.Repos.Commit(t.Context(), r.FullName(), "topic", map[string]fakeforge.File{"a": {Content: "2"}}, base)
	if err != nil {
		t.Fatal(err)
	}
	number, err := server.OpenRequest(t.Context(), r.FullName(), head, "main")
	if err != nil {
		t.Fatal(err)
	}
	pr := forge.PullRequest{Number: number, HeadCommit: head}
	if _, err := f.MergeCommit(t.Context(), r, pr); !errors.Is(err, forge.ErrUnavailable) {
		t.Errorf("MergeCommit while it is checked: %v", err)
	}
	server.Checking = false
	pr.HeadCommit = zeros
	if c, err := f.MergeCommit(t.Context(), r, pr); !errors.Is(err, forge.ErrUnavailable) {
		t.Errorf("MergeCommit of another head: %s, %v", c, err)
	}
}

// What the forge cuts off is said to be.
func TestOverflow(t *testing.T) {
	server, _, f := start(t, func(s *fake.Server, _ *gitlab.Config) { s.MaxDiffs = 2 })
	r, base := commit(t, server)
	head, err := server.Repos.Commit(t.Context(), r.FullName(), "main", map[string]fakeforge.File{"b": {}, "c": {}, "d": {}})
	if err != nil {
		t.Fatal(err)
	}
	if paths, truncated, err := f.ChangedPaths(t.Context(), r, base, head, 100); err != nil || !truncated || len(paths) != 2 {
		t.Errorf("ChangedPaths: %q, %v, %v", paths, truncated, err)
	}
}

// A note of somebody else is not ours, whatever is in it.
func TestNoteOfOthers(t *testing.T) {
	server, _, f := start(t, nil)
	r, c := commit(t, server)
	number, err := server.OpenRequest(t.Context(), r.FullName(), c, "main")
	if err != nil {
		t.Fatal(err)
	}
	server.AddNote(r.FullName(), number, fake.User{ID: 66, Username: "mallory"}, "<!-- solstice: result -->\nmine")
	for _, text := range []string{"one", "two"} {
		if err := f.Comment(t.Context(), r, number, "result", text); err != nil {
			t.Fatal(err)
		}
	}
	all := server.Notes(r.FullName(), number)
	if len(all) != 2 || !strings.HasSuffix(all[0].Body, "\nmine") || !strings.HasSuffix(all[1].Body, "\ntwo") {
		t.Errorf("notes: %+v", all)
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []gitlab.Config{
		{},
		{BaseURL: "https://gitlab.example.org"},
		{BaseURL: "https://user:hunter2@gitlab.example.org", Token: "t"},
	} {
		if _, err := gitlab.New(c); !errors.Is(err, forge.ErrInvalid) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("New(%+v): %v", c, err)
		}
	}
}

func parse(f *gitlab.Forge, r *http.Request, secret []byte) (forge.Event, error) {
	return f.ParseWebhook(r.Context(), r, func(context.Context, string) ([]byte, error) { return secret, nil })
}

// The kinds of secrets don't stand in for each other, what is signed has an age,
// and a signing token that is none is a configuration error.
func TestSecrets(t *testing.T) {
	f, err := gitlab.New(gitlab.Config{BaseURL: "https://gitlab.example.org", Token: "t"})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	body := rig.Payload(t, "push.json", nil)
	request := func(at time.Time, secret []byte) *http.Request {
		r, err := fake.Request(t.Context(), "http://solstice.example.org/", "Push Hook", "id", at, body, secret)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	now := time.Now()
	for name, tc := range map[string]struct {
		r      *http.Request
		secret []byte
		ok     bool
	}{
		"a token":                       {request(now, []byte("token")), []byte("token"), true},
		"signed":                        {request(now, signing), signing, true},
		"signed, but a token is wanted": {request(now, signing), []byte("token"), false},
		"a token, but signed is wanted": {request(now, []byte("token")), signing, false},
		"signed long ago":               {request(now.Add(-time.Hour), signing), signing, false},
		"signed in the future":          {request(now.Add(time.Hour), signing), signing, false},
		"the signing token as the token": {func() *http.Request {
			r := request(now, nil)
			r.Header.Set("X-Gitlab-Token", string(signing))
			return r
		}(), signing, false},
	} {
		if _, err := parse(f, tc.r, tc.secret); tc.ok != (err == nil) || !tc.ok && !errors.Is(err, forge.ErrSignature) {
			t.Errorf("%s: %v", name, err)
		}
	}
	both := request(now, signing)
	both.Header.Set("Webhook-Signature", "v1,c29tZXRoaW5nIGVsc2U= v2,abc "+both.Header.Get("Webhook-Signature"))
	if _, err := parse(f, both, signing); err != nil {
		t.Errorf("several signatures: %v", err)
	}
	for _, secret := range []string{"whsec_", "whsec_???"} {
		if _, err := parse(f, request(now, []byte("token")), []byte(secret)); err == nil || errors.Is(err, forge.ErrSignature) {
			t.Errorf("the secret %q: %v, want a configuration error", secret, err)
		}
	}
}

// Deliveries have different IDs even where the forge gives them the same, as
// for the branches of one push before it had idempotency keys.
func TestDelivery(t *testing.T) {
	f, err := gitlab.New(gitlab.Config{BaseURL: "https://gitlab.example.org", Token: "t"})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	seen := map[string]bool{}
	for _, branch := range []string{"refs/heads/a", "refs/heads/b"} {
		r, err := fake.Request(t.Context(), "http://solstice.example.org/", "Push Hook", "", time.Now(), rig.Payload(t, "push.json", map[string]any{"ref": branch}), []byte("s"))
		if err != nil {
			t.Fatal(err)
		}
		e, err := parse(f, r, []byte("s"))
		if err != nil || e.Delivery == "" || seen[e.Delivery] {
			t.Errorf("delivery %q, %v", e.Delivery, err)
		}
		seen[e.Delivery] = true
	}
}

// FuzzParseWebhook: no body and no header makes it panic, give an event that is
// not valid, or accept what is not signed.
func FuzzParseWebhook(f *testing.F) {
	for _, d := range webhooks(f).Deliveries {
		f.Add(d.Event, d.Body, "", "", true)
	}
	f.Add("Push Hook", []byte(`{"project":{"path_with_namespace":"a/b"}}`), "1700000000", "v1,", false)
	driver, err := gitlab.New(gitlab.Config{BaseURL: "https://gitlab.example.org", Token: "t"})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, event string, body []byte, stamp, signature string, signed bool) {
		r, err := fake.Request(t.Context(), "http://solstice.example.org/", event, "id", time.Now(), body, signing)
		if err != nil {
			t.Fatal(err)
		}
		if !signed {
			r.Header.Set("Webhook-Timestamp", stamp)
			r.Header.Set("Webhook-Signature", signature)
			r.Header.Set("X-Gitlab-Token", signature)
		}
		asked := ""
		e, err := driver.ParseWebhook(t.Context(), r, func(_ context.Context, repo string) ([]byte, error) {
			asked = repo
			return signing, nil
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
	number, err := server.OpenRequest(t.Context(), r.FullName(), c, "main")
	if err != nil {
		t.Fatal(err)
	}
	body, err := server.MergeRequest(web.URL, "open", r.FullName(), number, "mallory/app", "topic", c, "", 1)
	if err != nil {
		t.Fatal(err)
	}
	rig.Contained(t, rig.Contain{
		URL: web.URL, Faults: &server.Faults, Body: body,
		Request: func(body, secret []byte) *http.Request {
			r, err := fake.Request(t.Context(), "http://solstice.example.org/", "Merge Request Hook", "id", time.Now(), body, secret)
			if err != nil {
				t.Fatal(err)
			}
			return r
		},
		New: func() forge.Forge {
			f, err := gitlab.New(gitlab.Config{BaseURL: web.URL, Token: server.Token})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = f.Close() })
			return f
		},
	})
}
