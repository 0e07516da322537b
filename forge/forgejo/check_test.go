package forgejo_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/forgejo"
	"github.com/solstice-ci/solstice-go/internal/fakeforge"
	fake "github.com/solstice-ci/solstice-go/internal/fakeforge/forgejo"
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
	for name, tc := range map[string]struct {
		change func(*fake.Server)
		want   rig.Setup
	}{
		"all is well":        {nil, want(fine, "is version 1.25.0", "the user bot", "may administrate team/app", "sends what is needed", "only by writing")},
		"down":               {fault(fakeforge.Fault{Status: 502}), want(bad, "cannot be asked", "see that this machine reaches it")},
		"a limit":            {fault(fakeforge.Fault{Status: 429, Header: map[string]string{"Retry-After": "7"}}), want(bad, "try again in 7s")},
		"no such API":        {fault(fakeforge.Fault{Status: 404}), want(bad, "there is no Forgejo or Gitea", "correct the base URL")},
		"elsewhere":          {fault(fakeforge.Fault{Redirect: "http://127.0.0.1:1/"}), want(bad, "correct the base URL")},
		"no version":         {fault(fakeforge.Fault{Status: 403, Path: "/version"}), want(fine, "is not told")},
		"a clock":            {fault(fakeforge.Fault{Status: 403, Path: "/version", Header: map[string]string{"Date": "Mon, 02 Jan 2006 15:04:05 GMT"}}), want(warn, "ahead of the forge's")},
		"deleted":            {func(s *fake.Server) { s.Setup.Deleted = true }, want(bad, "is not accepted", "make a token")},
		"no read:user":       {func(s *fake.Server) { s.Setup.Lacks = []string{"read:user"} }, want(warn, "whose it is", "scope(s): [read:user]")},
		"no read:repository": {func(s *fake.Server) { s.Setup.Lacks = []string{"read:repository"} }, want(bad, "cannot be read", "write:repository")},
		"no read:issue":      {func(s *fake.Server) { s.Setup.Lacks = []string{"read:issue"} }, want(warn, "comments in team/app", "write:issue")},
		"reads only":         {func(s *fake.Server) { s.Setup.Role = map[string]bool{"pull": true} }, want(bad, "bot may not write to team/app")},
		"writes only":        {func(s *fake.Server) { s.Setup.Role = map[string]bool{"pull": true, "push": true} }, want(warn, "who may approve")},
		"not to be seen":     {fault(fakeforge.Fault{Status: 404, Path: "/repos/team/app"}), want(bad, "not to be seen by the user bot")},
		"hooks unseen":       {fault(fakeforge.Fault{Status: 403, Path: "/hooks"}), want(fine, "cannot be seen")},
		"no hook":            {func(s *fake.Server) { s.Setup.Hooks = nil }, want(warn, "no webhook of team/app", "organisation")},
		"another hook":       {hook("config", map[string]string{"url": fake.HookURL + "x?hunter2", "content_type": "json"}), want(warn, "but there is one to "+fake.HookURL+"x")},
		"inactive":           {hook("active", false), want(bad, "not active")},
		"forms":              {hook("config", map[string]string{"url": fake.HookURL, "content_type": "form"}), want(bad, "application/json")},
		"events":             {hook("events", []string{"push"}), want(bad, "Pull Request, Pull Request Synchronized")},
		"many hooks":         {func(s *fake.Server) { s.PageSize, s.Setup.Hooks = 1, append(s.Setup.Hooks, s.Setup.Hooks[0]) }, want(warn, "2 webhooks")},
		"down at the user":   {fault(fakeforge.Fault{Status: 503, Path: "/user"}), want(bad, "cannot be asked")},
		"down at the repo":   {fault(fakeforge.Fault{Status: 503, Path: "/repos/"}), want(bad, "cannot be asked")},
		"down at the hooks":  {fault(fakeforge.Fault{Status: 503, Path: "/hooks"}), want(bad, "cannot be asked")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server, _, f := start(t, nil)
			r := forge.Repo{Owner: "team", Name: "app"}
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
	_, _, f := start(t, func(_ *fake.Server, c *forgejo.Config) {
		c.Token, c.TokenFunc = "", func(context.Context) (string, time.Time, error) { return "", time.Time{}, errors.New("not today") }
	})
	rig.Setup{Level: bad, Says: []string{"not today"}}.Check(t, f, forge.CheckOptions{})
}

// Nothing is looked for that is not asked for; names that cannot be are told, and
// when a token ends.
func TestCheckOptions(t *testing.T) {
	server, _, f := start(t, func(s *fake.Server, c *forgejo.Config) {
		token := c.Token
		c.Token, c.TokenFunc = "", func(context.Context) (string, time.Time, error) { return token, time.Now().AddDate(1, 0, 0), nil }
	})
	server.Setup.Hooks = nil
	rig.Setup{Level: fine, Says: []string{"the token ends at"}}.Check(t, f, forge.CheckOptions{})
	rig.Setup{Level: bad, Says: []string{"owner/name"}}.Check(t, f, forge.CheckOptions{Repos: []forge.Repo{{Owner: "a/b", Name: "x"}}})
	rig.Setup{Level: bad, Says: []string{"no http"}}.Check(t, f, forge.CheckOptions{WebhookURL: "ci.example.org"})
}

func TestPullRequests(t *testing.T) {
	server, _, f := start(t, func(s *fake.Server, _ *forgejo.Config) { s.PageSize = 2 })
	r, c := commit(t, server)
	server.SetUser(66, "mallory")
	for range 5 {
		if _, err := server.OpenPull(t.Context(), r.FullName(), c); err != nil {
			t.Fatal(err)
		}
	}
	change := func(number int, change func(*fake.Pull)) { server.ChangePull(r.FullName(), number, change) }
	change(5, func(p *fake.Pull) { p.HeadRepo, p.Author, p.Draft = "mallory/app", 66, true })
	change(4, func(p *fake.Pull) { p.HeadRef = "refs/pull/4/head" }) // AGit
	change(3, func(p *fake.Pull) { p.HeadIsGone = true })
	change(2, func(p *fake.Pull) { p.Closed = true })
	all, err := f.PullRequests(t.Context(), r, 10)
	if err != nil || len(all) != 4 {
		t.Fatalf("%+v, %v", all, err)
	}
	for i, want := range []struct {
		number int
		fork   bool
		head   string
	}{{5, true, "mallory/app"}, {4, true, "team/app"}, {3, true, ""}, {1, false, "team/app"}} {
		if pr := all[i]; pr.Number != want.number || pr.Fork != want.fork || pr.HeadRepo.FullName() != want.head || pr.HeadCommit != c {
			t.Errorf("%+v, want %+v", pr, want)
		}
	}
	if pr := all[0]; !pr.Draft || pr.Author != (forge.User{ID: "66", Login: "mallory"}) {
		t.Errorf("of a fork: %+v", pr)
	}
	change(5, func(p *fake.Pull) { p.Head = "--all" }) // as nobody sends it
	if some, err := f.PullRequests(t.Context(), r, 2); err != nil || len(some) != 2 || some[0].Number != 4 {
		t.Errorf("%+v, %v", some, err)
	}
}
