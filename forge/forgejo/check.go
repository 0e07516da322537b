package forgejo

import (
	"context"
	"errors"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/internal/checkup"
	"github.com/solstice-ci/solstice-go/forge/internal/hook"
	"github.com/solstice-ci/solstice-go/forge/internal/rest"
)

// Events that a webhook has to send (modules/webhook/type.go of Gitea), and what
// its settings call them.
var hookEvents = []struct{ name, label string }{
	{"push", "Push"}, {"pull_request", "Pull Request"}, {"pull_request_sync", "Pull Request Synchronized"},
}

// Check implements forge.Checker. The API says which scope a call lacks, and
// nothing of those that a token has: reading shows whether those for reading are
// there.
func (f *Forge) Check(ctx context.Context, o forge.CheckOptions) ([]forge.Finding, error) {
	var l checkup.List
	f.check(ctx, o, &l)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return l, nil
}

func (f *Forge) check(ctx context.Context, o forge.CheckOptions, l *checkup.List) {
	_, ends, err := f.token(ctx)
	if err != nil {
		l.Fail("see where the token comes from", "there is no token: %v", err)
		return
	}
	if !ends.IsZero() {
		l.Ends("the token", ends, time.Now())
	}
	var about struct {
		Version string `json:"version"`
	}
	h, err := f.api.Do(ctx, rest.Call{Path: []string{"version"}, Out: &about})
	switch {
	case l.Down(f.api.Base(), err):
		return
	case errors.Is(err, forge.ErrNotFound), err != nil && rest.Status(err) == 0: // or it leads elsewhere
		l.Fail("correct the base URL: it is what people open", "there is no Forgejo or Gitea at %s: %v", f.api.Base(), err)
		return
	case err != nil: // it may be told to known users only
		l.Unseen("", "which version is at %s is not told: %v", f.api.Base(), err)
	default:
		l.Fine("%s is version %s", f.api.Base(), hook.Line(about.Version))
	}
	l.Clock(h, time.Now())

	const token = "make a token in the settings of the user that is to act, under Applications, with the scopes write:repository, write:issue and read:user"
	var me user
	switch err := f.get(ctx, &me, nil, "user"); {
	case l.Down(f.api.Base(), err):
		return
	case rest.Status(err) == 403:
		l.Warn("make a token with the scope read:user too", "the token may not see whose it is, so nobody can be asked for approval, and comments cannot be replaced: %v", err)
	case err != nil:
		l.Fail(token, "the token is not accepted; it may have been deleted: %v", err)
		return
	default:
		l.Fine("the token is one of the user %s", hook.Line(me.Login))
	}
	l.Unseen("", "whether the token may write (write:repository, write:issue) is seen only by writing")
	hooks := l.WebhookURL(o.WebhookURL)
	for _, r := range o.Repos {
		there, up := f.checkRepo(ctx, l, r, me.Login)
		if !up || hooks && there && !f.checkHooks(ctx, l, r, o.WebhookURL) {
			return
		}
	}
}

// checkRepo reports whether there is one, and whether it is worth while to go on.
func (f *Forge) checkRepo(ctx context.Context, l *checkup.List, r forge.Repo, login string) (there, up bool) {
	name := r.FullName()
	if err := check(r); err != nil {
		l.Fail("repositories are owner/name", "%v", err)
		return false, true
	}
	var found struct {
		Permissions struct {
			Admin bool `json:"admin"`
			Push  bool `json:"push"`
		} `json:"permissions"`
	}
	switch err := f.get(ctx, &found, nil, in(r)...); {
	case l.Down(f.api.Base(), err):
		return false, false
	case errors.Is(err, forge.ErrNotFound):
		l.Fail("make the user a collaborator who may administrate it", "%s is not there, or not to be seen by the user %s", name, login)
		return false, true
	case err != nil:
		l.Fail("make a token with the scope write:repository", "%s cannot be read: %v", name, err)
		return false, true
	case !found.Permissions.Push:
		l.Fail("make the user a collaborator who may administrate it", "the user %s may not write to %s: no status can be reported", login, name)
	case !found.Permissions.Admin:
		l.Warn("make the user a collaborator who may administrate it", "the user %s may write to %s, but not ask who may approve", login, name)
	default:
		l.Fine("the user %s may administrate %s", login, name)
	}
	// Whoever may write issues may read them.
	if err := f.get(ctx, nil, pageQuery(1, "limit", 1), in(r, "issues")...); rest.Status(err) == 403 {
		l.Warn("make a token with the scope write:issue too", "the token cannot write comments in %s: %v", name, err)
	}
	return true, true
}

func (f *Forge) checkHooks(ctx context.Context, l *checkup.List, r forge.Repo, want string) bool {
	const advice = "look at the repository's settings, under Webhooks"
	var all []checkup.Hook
	for page := 1; page <= maxPages; page++ {
		var found []struct {
			Active bool     `json:"active"`
			Events []string `json:"events"`
			Config struct {
				URL  string `json:"url"`
				Type string `json:"content_type"`
			} `json:"config"`
		}
		switch err := f.get(ctx, &found, pageQuery(page, "limit", 50), in(r, "hooks")...); {
		case l.Down(f.api.Base(), err):
			return false
		case err != nil:
			l.Unseen(advice, "the webhooks of %s cannot be seen: %v", r.FullName(), err)
			return true
		}
		for _, h := range found {
			one := checkup.Hook{URL: h.Config.URL, NotJSON: h.Config.Type != "json"}
			if !h.Active {
				one.Inactive = "somebody deactivated it"
			}
			var missing []string
			for _, e := range hookEvents {
				if len(checkup.Missing([]string{e.name}, h.Events)) > 0 {
					missing = append(missing, e.label)
				}
			}
			one.Missing = missing
			all = append(all, one)
		}
		if len(found) == 0 {
			break
		}
	}
	l.Hooks(r.FullName(), want, "the organisation or the instance has one; its type is Forgejo or Gitea", all)
	l.Unseen(advice, "whether the secret of a webhook is ours, and what it delivered, is seen only there")
	return true
}
