package gitlab_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/gitlab"
	"github.com/solstice-ci/solstice-go/internal/fakeforge"
	fake "github.com/solstice-ci/solstice-go/internal/fakeforge/gitlab"
	"github.com/solstice-ci/solstice-go/internal/fakeforge/rig"
)

func want(level forge.Level, says ...string) rig.Setup { return rig.Setup{Level: level, Says: says} }

const (
	fine = forge.LevelNotice
	warn = forge.LevelWarning
	bad  = forge.LevelFailure
)

func TestCheck(t *testing.T) {
	fault := func(f fakeforge.Fault) func(*fake.Server) { return func(s *fake.Server) { s.Faults.Add(f) } }
	hook := func(key string, value any) func(*fake.Server) {
		return func(s *fake.Server) { s.Setup.Hooks[0][key] = value }
	}
	in := func(d time.Duration) func(*fake.Server) {
		return func(s *fake.Server) { s.Setup.Ends = time.Now().Add(d).UTC().Format(time.DateOnly) }
	}
	for name, tc := range map[string]struct {
		change func(*fake.Server)
		want   rig.Setup
	}{
		"all is well":       {nil, want(fine, "the user bot", `"solstice" has the scope api`, "does not expire", "Maintainer or more", "sends what is needed")},
		"down":              {fault(fakeforge.Fault{Status: 502}), want(bad, "cannot be asked", "see that this machine reaches it")},
		"a limit":           {fault(fakeforge.Fault{Status: 429, Header: map[string]string{"Retry-After": "7"}}), want(bad, "try again in 7s")},
		"no such API":       {fault(fakeforge.Fault{Status: 404}), want(bad, "there is no GitLab", "correct the base URL")},
		"elsewhere":         {fault(fakeforge.Fault{Redirect: "http://127.0.0.1:1/"}), want(bad, "correct the base URL")},
		"a clock":           {fault(fakeforge.Fault{Status: 401, Header: map[string]string{"Date": "Mon, 02 Jan 2006 15:04:05 GMT"}}), want(bad, "not accepted")},
		"expired":           {func(s *fake.Server) { s.Setup.Expired = true }, want(bad, "has expired", "make an access token")},
		"a scope":           {func(s *fake.Server) { s.Setup.Scopes = []string{"read_api"} }, want(bad, "read_api, and not api")},
		"no scope at all":   {fault(fakeforge.Fault{Status: 403, Path: "/user"}), want(bad, "lacks the scope")},
		"fine-grained":      {func(s *fake.Server) { s.Setup.Scopes = []string{"granular"} }, want(fine, "cannot be seen")},
		"ends":              {in(100 * 24 * time.Hour), want(fine, "the token ends at")},
		"ends soon":         {in(48 * time.Hour), want(warn, "the token ends at")},
		"of an application": {func(s *fake.Server) { s.Setup.OAuth = true }, want(fine, "cannot be seen, as of one that an OAuth")},
		"Developer":         {func(s *fake.Server) { s.Setup.Level = 30 }, want(fine, "is Developer", "by its Maintainers only")},
		"Reporter":          {func(s *fake.Server) { s.Setup.Level = 20 }, want(bad, "access level 20")},
		"no member":         {func(s *fake.Server) { s.Setup.Level = 0 }, want(bad, "no member of group/sub/app")},
		"administrator":     {func(s *fake.Server) { s.Setup.Level, s.Setup.Admin = 0, true }, want(fine, "may do everything")},
		"not to be seen":    {fault(fakeforge.Fault{Status: 404, Path: "/projects/"}), want(bad, "not to be seen by the user bot")},
		"hooks unseen":      {fault(fakeforge.Fault{Status: 403, Path: "/hooks"}), want(fine, "cannot be seen")},
		"no hook":           {func(s *fake.Server) { s.Setup.Hooks = nil }, want(warn, "no webhook of group/sub/app", "group")},
		"another hook":      {hook("url", "http://ci.example.org/webhooks/gitlab?hunter2"), want(warn, "but there is one to http://ci")},
		"disabled":          {hook("alert_status", "disabled"), want(bad, "failed too often")},
		"disabled for now": {func(s *fake.Server) {
			s.Setup.Hooks[0]["alert_status"], s.Setup.Hooks[0]["disabled_until"] = "temporarily_disabled", "2026-01-02"
		}, want(bad, "until 2026-01-02")},
		"any certificate":    {hook("enable_ssl_verification", false), want(warn, "certificate")},
		"without a secret":   {hook("token_present", false), want(bad, "no secret")},
		"an older version":   {func(s *fake.Server) { delete(s.Setup.Hooks[0], "token_present") }, want(fine, "sends what is needed")},
		"triggers":           {hook("tag_push_events", false), want(bad, "events Tag push events")},
		"down at the token":  {fault(fakeforge.Fault{Status: 503, Path: "/self"}), want(bad, "cannot be asked")},
		"down at the repo":   {fault(fakeforge.Fault{Status: 503, Path: "/projects/"}), want(bad, "cannot be asked")},
		"down at the member": {fault(fakeforge.Fault{Status: 503, Path: "/members/"}), want(bad, "cannot be asked")},
		"down at the hooks":  {fault(fakeforge.Fault{Status: 503, Path: "/hooks"}), want(bad, "cannot be asked")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server, _, f := start(t, nil)
			r := forge.Repo{Owner: "group/sub", Name: "app"}
			if err := server.Repos.Create(t.Context(), r.FullName()); err != nil {
				t.Fatal(err)
			}
			if tc.change != nil {
				tc.change(server)
			}
			tc.want.Check(t, f, forge.CheckOptions{Repos: []forge.Repo{r}, WebhookURL: fake.HookURL}, server.Token, "hunter2")
		})
	}
}

// A token that cannot be had is said before anything is asked.
func TestCheckWithoutToken(t *testing.T) {
	_, _, f := start(t, func(_ *fake.Server, c *gitlab.Config) {
		c.Token, c.TokenFunc = "", func(context.Context) (string, time.Time, error) { return "", time.Time{}, errors.New("not today") }
	})
	rig.Setup{Level: bad, Says: []string{"not today"}}.Check(t, f, forge.CheckOptions{})
}

// Nothing is looked for that is not asked for; names that cannot be are told, and
// when a token ends.
func TestCheckOptions(t *testing.T) {
	server, _, f := start(t, func(s *fake.Server, c *gitlab.Config) {
		token := c.Token
		c.Token, c.TokenFunc = "", func(context.Context) (string, time.Time, error) { return token, time.Now().AddDate(1, 0, 0), nil }
	})
	server.Setup.Hooks, server.Setup.OAuth = nil, true
	rig.Setup{Level: fine, Says: []string{"the token ends at"}}.Check(t, f, forge.CheckOptions{})
	rig.Setup{Level: bad, Says: []string{"group/project"}}.Check(t, f, forge.CheckOptions{Repos: []forge.Repo{{Name: "x"}}})
	rig.Setup{Level: bad, Says: []string{"no http"}}.Check(t, f, forge.CheckOptions{WebhookURL: "ci.example.org"})
	rig.Setup{Level: warn, Says: []string{"arrive by http"}}.Check(t, f, forge.CheckOptions{WebhookURL: "http://ci.example.org"})
}

func TestPullRequests(t *testing.T) {
	server, _, f := start(t, func(s *fake.Server, _ *gitlab.Config) { s.PageSize = 2 })
	r, c := commit(t, server)
	if err := server.Repos.Create(t.Context(), "mallory/app"); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		if _, err := server.OpenRequest(t.Context(), r.FullName(), c, "main"); err != nil {
			t.Fatal(err)
		}
	}
	change := func(number int, source, branch string, author int64, draft bool) {
		server.ChangeRequest(r.FullName(), number, source, branch, author, draft)
	}
	change(5, "mallory/app", "topic", 66, true)
	change(4, "", "topic", 1, false)               // it is gone
	change(3, "mallory/hidden", "topic", 1, false) // it is there, and not to be seen
	server.CloseRequest(r.FullName(), 2)
	all, err := f.PullRequests(t.Context(), r, 10)
	if err != nil || len(all) != 4 {
		t.Fatalf("%+v, %v", all, err)
	}
	for i, want := range []struct {
		number int
		fork   bool
		head   string
	}{{5, true, "mallory/app"}, {4, true, ""}, {3, true, ""}, {1, false, "group/sub/app"}} {
		if pr := all[i]; pr.Number != want.number || pr.Fork != want.fork || pr.HeadRepo.FullName() != want.head || pr.HeadCommit != c {
			t.Errorf("%+v, want %+v", pr, want)
		}
	}
	if pr := all[0]; !pr.Draft || pr.Author.ID != "66" || all[2].HeadRepo.ID == "" {
		t.Errorf("of forks: %+v, %+v", pr, all[2])
	}
	change(5, "mallory/app", "a branch", 66, true) // as nobody sends it
	if some, err := f.PullRequests(t.Context(), r, 2); err != nil || len(some) != 1 || some[0].Number != 4 {
		t.Errorf("%+v, %v", some, err)
	}
}
