package github_test

import (
	"bytes"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/forgetest"
	"github.com/solstice-ci/solstice-go/forge/github"
	"github.com/solstice-ci/solstice-go/internal/fakeforge"
	fake "github.com/solstice-ci/solstice-go/internal/fakeforge/github"
	fakerig "github.com/solstice-ci/solstice-go/internal/fakeforge/rig"
)

func want(level forge.Level, says ...string) fakerig.Setup {
	return fakerig.Setup{Level: level, Says: says}
}

const (
	fine = forge.LevelNotice
	warn = forge.LevelWarning
	bad  = forge.LevelFailure
)

func TestCheck(t *testing.T) {
	fault := func(f fakeforge.Fault) func(*fake.Server) { return func(s *fake.Server) { s.Faults.Add(f) } }
	hook := func(change func(hook map[string]any, config map[string]string)) func(*fake.Server) {
		return func(s *fake.Server) {
			change(s.Setup.Hooks[0], s.Setup.Hook)
			change(s.Setup.Hooks[0], s.Setup.Hooks[0]["config"].(map[string]string))
		}
	}
	limit := fakeforge.Fault{Status: 429, Header: map[string]string{"Retry-After": "7"}}
	both := map[string]struct {
		change func(*fake.Server)
		want   fakerig.Setup
	}{
		"all is well":      {nil, want(fine, "sends what is needed")},
		"down":             {fault(fakeforge.Fault{Status: 502}), want(bad, "cannot be asked", "see that this machine reaches it")},
		"a limit":          {fault(limit), want(bad, "try again in 7s")},
		"elsewhere":        {fault(fakeforge.Fault{Redirect: "http://127.0.0.1:1/"}), want(bad, "cannot be asked")},
		"another API":      {fault(fakeforge.Fault{Status: 404}), want(bad, "there is no ")},
		"a hook with form": {hook(func(_ map[string]any, c map[string]string) { c["content_type"] = "form" }), want(bad, "application/json")},
		"without a secret": {hook(func(_ map[string]any, c map[string]string) { delete(c, "secret") }), want(bad, "no secret")},
		"any certificate":  {hook(func(_ map[string]any, c map[string]string) { c["insecure_ssl"] = "1" }), want(warn, "certificate")},
	}
	app := map[string]struct {
		change func(*fake.Server)
		want   fakerig.Setup
	}{
		"a clock behind":  {func(s *fake.Server) { s.Setup.Ahead = time.Hour }, want(bad, "a time that is wrong", "set the clock")},
		"a clock ahead":   {func(s *fake.Server) { s.Setup.Ahead = -time.Hour }, want(bad, "a time that is wrong")},
		"a clock a bit":   {func(s *fake.Server) { s.Setup.Ahead = -40 * time.Second }, want(warn, "ahead of")},
		"another key":     {fault(fakeforge.Fault{Status: 401, Path: "/app"}), want(bad, "private key of App 4711")},
		"a permission":    {func(s *fake.Server) { s.Setup.Permissions["checks"] = "read" }, want(bad, "lacks the permissions Checks: write", "team/settings/apps/solstice-fake/permissions")},
		"not accepted":    {func(s *fake.Server) { s.Setup.Accepted = map[string]string{"checks": "write"} }, want(bad, "the installation for team/repo lacks", "Contents: read", "accept")},
		"no comments":     {func(s *fake.Server) { s.Setup.Permissions["pull_requests"] = "read" }, want(fine, "write no comments")},
		"an event":        {func(s *fake.Server) { s.Setup.Events = s.Setup.Events[1:] }, want(bad, "events check_run")},
		"no hook":         {func(s *fake.Server) { s.Setup.Hook = nil }, want(bad, "no webhook")},
		"hook to another": {func(s *fake.Server) { s.Setup.Hook["url"] = "https://old.example.org/?hunter2" }, want(bad, "goes to https://old.example.org/ instead")},
		"failures": {func(s *fake.Server) {
			s.Setup.Deliveries = []map[string]any{fake.Delivery(3, "push", "OK", 200), fake.Delivery(2, "push", "timed out", 0), fake.Delivery(3, "push", "Bad Gateway", 502)}
		}, want(warn, "1 of 2 events", "push at 2026-01-02 03:04:05 UTC: 0 timed out", "deliver it again")},
		"silence":          {func(s *fake.Server) { s.Setup.Deliveries = nil }, want(fine, "has sent nothing")},
		"unseen":           {fault(fakeforge.Fault{Status: 403, Path: "/app/hook/config"}), want(fine, "cannot be seen")},
		"unseen too":       {fault(fakeforge.Fault{Status: 403, Path: "/app/hook/deliveries"}), want(fine, "cannot be seen")},
		"down in between":  {fault(fakeforge.Fault{Status: 502, Path: "/app/hook/deliveries"}), want(bad, "cannot be asked")},
		"suspended":        {func(s *fake.Server) { s.Setup.Suspended = true }, want(bad, "suspended")},
		"not installed":    {fault(fakeforge.Fault{Status: 404, Path: "/installation"}), want(bad, "not installed for team/repo", "/apps/solstice-fake/installations/new")},
		"down at the repo": {fault(fakeforge.Fault{Status: 503, Path: "/installation"}), want(bad, "cannot be asked")},
	}
	token := map[string]struct {
		change func(*fake.Server)
		want   fakerig.Setup
	}{
		"expired":         {func(s *fake.Server) { s.Setup.Expired = true }, want(bad, "expired", "make a token")},
		"ends":            {func(s *fake.Server) { s.Setup.Ends = time.Now().AddDate(1, 0, 0) }, want(fine, "the token ends at")},
		"ends soon":       {func(s *fake.Server) { s.Setup.Ends = time.Now().Add(time.Hour) }, want(warn, "the token ends at")},
		"a scope":         {func(s *fake.Server) { s.Setup.Scopes = []string{"gist"} }, want(bad, "not repo")},
		"public":          {func(s *fake.Server) { s.Setup.Scopes = []string{"public_repo", "repo:status"} }, want(fine, "for public repositories")},
		"fine-grained":    {func(s *fake.Server) { s.Setup.Scopes = nil }, want(fine, "is not told")},
		"of an App":       {fault(fakeforge.Fault{Status: 403, Path: "/user"}), want(fine, "as of one of an App")},
		"a role":          {func(s *fake.Server) { s.Setup.Role = map[string]bool{"pull": true} }, want(bad, "may not write to team/repo")},
		"not to be seen":  {fault(fakeforge.Fault{Status: 404, Path: "/repos/team/repo"}), want(bad, "cannot be read")},
		"hooks hidden":    {func(s *fake.Server) { s.Setup.HooksHidden = true }, want(fine, "cannot be seen")},
		"no hook":         {func(s *fake.Server) { s.Setup.Hooks = nil }, want(warn, "no webhook of team/repo", "organisation")},
		"hook to another": {func(s *fake.Server) { s.Setup.Hooks[0]["config"].(map[string]string)["url"] += "x" }, want(warn, "but there is one to")},
		"inactive":        {hook(func(h map[string]any, _ map[string]string) { h["active"] = false }), want(bad, "not active")},
		"an event":        {hook(func(h map[string]any, _ map[string]string) { h["events"] = []string{"push"} }), want(bad, "events pull_request")},
		"all events":      {hook(func(h map[string]any, _ map[string]string) { h["events"] = []string{"*"} }), want(fine)},
		"a failure": {hook(func(h map[string]any, _ map[string]string) {
			h["last_response"] = map[string]any{"code": 502, "message": "Bad Gateway"}
		}), want(warn, "502 Bad Gateway")},
		"never": {hook(func(h map[string]any, _ map[string]string) {
			h["last_response"] = map[string]any{"code": nil, "status": "unused", "message": nil}
		}), want(fine)},
		"down at the repo": {fault(fakeforge.Fault{Status: 503, Path: "/repos/"}), want(bad, "cannot be asked")},
	}
	maps.Copy(app, both)
	maps.Copy(token, both)
	for kind, table := range map[bool]map[string]struct {
		change func(*fake.Server)
		want   fakerig.Setup
	}{true: app, false: token} {
		for name, tc := range table {
			t.Run(map[bool]string{true: "app/", false: "token/"}[kind]+name, func(t *testing.T) {
				t.Parallel()
				r := start(t, kind, nil)
				repo := r.repo(t, "repo")
				if tc.change != nil {
					tc.change(r.Server)
				}
				tc.want.Check(t, r.Forge, forge.CheckOptions{Repos: []forge.Repo{repo}, WebhookURL: fake.HookURL}, fake.Token, "eyJ", "hunter2", "PRIVATE")
			})
		}
	}
}

// Nothing is looked for that is not asked for; names that cannot be are told.
func TestCheckOptions(t *testing.T) {
	for _, app := range []bool{true, false} {
		r := start(t, app, nil)
		r.Setup.Hook, r.Setup.Hooks = nil, nil
		fakerig.Setup{Level: fine}.Check(t, r, forge.CheckOptions{})
		fakerig.Setup{Level: bad, Says: []string{"owner/name"}}.Check(t, r, forge.CheckOptions{Repos: []forge.Repo{{Name: "x"}, {Owner: "a b", Name: "x"}}})
		fakerig.Setup{Level: bad, Says: []string{"no http"}}.Check(t, r, forge.CheckOptions{WebhookURL: "ci.example.org"})
	}
}

func TestPullRequests(t *testing.T) {
	r := start(t, true, nil)
	repo, _ := r.committed(t)
	fork := r.repo(t, "fork")
	r.commit(t, fork, "topic", map[string]forgetest.File{"a": {Content: "f"}})
	r.pull(t, repo, map[string]forgetest.File{"a": {Content: "2"}})
	var numbers []int
	for range 120 {
		numbers = append(numbers, r.OpenPull(repo.FullName(), "topic", "main"))
	}
	last := numbers[len(numbers)-1]
	r.ChangePull(repo.FullName(), last, func(p *fake.Pull) {
		p.Fork, p.Draft, p.Author = fork.FullName(), true, fake.User{ID: 66, Login: "mallory"}
	})
	r.ChangePull(repo.FullName(), numbers[0], func(p *fake.Pull) { p.Head = "main" })
	r.ClosePull(repo.FullName(), numbers[1])
	all, err := r.PullRequests(t.Context(), repo, 1000)
	if err != nil || len(all) != 120 {
		t.Fatalf("%d pull requests, %v", len(all), err)
	}
	if pr := all[0]; pr.Number != last || !pr.Fork || !pr.Draft || pr.Author.ID != "66" || pr.HeadRepo.FullName() != "team/fork" || pr.HeadCommit == "" {
		t.Errorf("of a fork: %+v", pr)
	}
	if pr := all[1]; pr.Fork || pr.HeadRepo.FullName() != "team/repo" || pr.MergeRef == "" {
		t.Errorf("not of a fork: %+v", pr)
	}
	if some, err := r.PullRequests(t.Context(), repo, 101); err != nil || len(some) != 101 {
		t.Errorf("%d pull requests, %v", len(some), err)
	}
}

// What the fake says of a set-up is what GitHub describes.
func TestSetupMatchesOpenAPI(t *testing.T) {
	api := openAPI(t)
	needed := map[string]any{}
	// clean turns a schema of OpenAPI 3.0 into one of JSON, in which what is left out
	// is fine: the fake says what somebody reads.
	var clean func(v any) any
	clean = func(v any) any {
		switch v := v.(type) {
		case []any:
			for i := range v {
				v[i] = clean(v[i])
			}
		case map[string]any:
			if name, ok := strings.CutPrefix(str(v["$ref"]), "#/components/schemas/"); ok && needed[name] == nil {
				needed[name] = true
				var s any
				if err := json.Unmarshal(api.Components.Schemas[name], &s); err != nil {
					t.Fatal(err)
				}
				needed[name] = clean(s)
			}
			delete(v, "example")           // which may hold anything
			if one, ok := v["oneOf"]; ok { // of some, which differ in what is required
				v["anyOf"] = one
				delete(v, "oneOf")
			}
			if _, list := v["required"].([]any); list {
				delete(v, "required")
			}
			for key := range v {
				v[key] = clean(v[key])
			}
			if v["nullable"] == true {
				return map[string]any{"anyOf": []any{v, map[string]any{"type": "null"}}}
			}
		}
		return v
	}
	got := map[string][]byte{}
	record := func(c *github.Config) {
		tr := transport(t)
		c.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
			resp, err := tr.RoundTrip(r)
			if err == nil && resp.StatusCode == http.StatusOK {
				body, _ := io.ReadAll(resp.Body)
				resp.Body.Close()
				resp.Body = io.NopCloser(bytes.NewReader(body))
				got[r.URL.Path] = body
			}
			return resp, err
		})
	}
	for _, app := range []bool{true, false} {
		r := start(t, app, record)
		repo, _ := r.committed(t)
		r.pull(t, repo, map[string]forgetest.File{"a": {Content: "2"}})
		if _, err := r.Check(t.Context(), forge.CheckOptions{Repos: []forge.Repo{repo}, WebhookURL: fake.HookURL}); err != nil {
			t.Fatal(err)
		}
		if _, err := r.PullRequests(t.Context(), repo, 10); err != nil {
			t.Fatal(err)
		}
	}
	paths := map[string]string{
		"/app": "/app", "/app/hook/config": "/app/hook/config", "/app/hook/deliveries": "/app/hook/deliveries", "/user": "/user",
		"/repos/team/repo/hooks": "/repos/{owner}/{repo}/hooks", "/repos/team/repo/pulls": "/repos/{owner}/{repo}/pulls",
		"/repos/team/repo/installation": "/repos/{owner}/{repo}/installation",
	}
	answers := map[string]any{}
	for path, described := range paths {
		var operation struct {
			Responses map[string]struct {
				Content map[string]struct {
					Schema any `json:"schema"`
				} `json:"content"`
			} `json:"responses"`
		}
		if err := json.Unmarshal(api.Paths[described]["get"], &operation); err != nil {
			t.Fatal(err)
		}
		answers[strings.ReplaceAll(path, "/", "-")] = clean(operation.Responses["200"].Content["application/json"].Schema)
	}
	raw, err := json.Marshal(map[string]any{"components": map[string]any{"schemas": needed}, "answers": answers})
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("api.json", doc); err != nil {
		t.Fatal(err)
	}
	for path := range paths {
		s, err := c.Compile("api.json#/answers/" + strings.ReplaceAll(path, "/", "-"))
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		answer, err := jsonschema.UnmarshalJSON(bytes.NewReader(got[fake.API+path]))
		if err != nil {
			t.Fatalf("%s: %v: %s", path, err, got[fake.API+path])
		}
		if err := s.Validate(answer); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func str(v any) string { s, _ := v.(string); return s }
