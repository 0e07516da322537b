package gitlab

import (
	"context"
	"errors"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/internal/checkup"
	"github.com/solstice-ci/solstice-go/forge/internal/hook"
	"github.com/solstice-ci/solstice-go/forge/internal/rest"
)

// maintainer is the role that may see a project's webhooks
// (https://docs.gitlab.com/api/access_requests/#valid-access-levels).
const maintainer = 40

// Check implements forge.Checker.
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
	const token = "make an access token of the project or the group, with the role Developer and the scope api"
	var me struct {
		user
		Admin bool `json:"is_admin"`
	}
	h, err := f.api.Do(ctx, rest.Call{Path: []string{"user"}, Out: &me})
	skewed := l.Clock(h, time.Now())
	switch {
	case l.Down(f.api.Base(), err):
		return
	case errors.Is(err, forge.ErrNotFound), err != nil && rest.Status(err) == 0: // or it leads elsewhere
		l.Fail("correct the base URL: it is what people open", "there is no GitLab at %s: %v", f.api.Base(), err)
		return
	case rest.Status(err) == 403:
		l.Fail(token, "the token lacks the scope api: %v", err)
		return
	case err != nil:
		l.Fail(token, "the token is not accepted: it has expired, or was revoked: %v", err)
		return
	}
	l.Fine("the token is one of the user %s", hook.Line(me.Username))
	if skewed {
		l.Warn("have the time of this machine set by NTP", "webhooks with a signature are refused where the clocks differ by more than %s", f.maxAge)
	}
	if !f.checkToken(ctx, l) {
		return
	}
	hooks := l.WebhookURL(o.WebhookURL)
	if hooks && strings.HasPrefix(o.WebhookURL, "http:") {
		l.Warn("let webhooks arrive by https", "webhooks arrive by http: a secret token is sent along with each")
	}
	for _, r := range o.Repos {
		level, up := f.checkProject(ctx, l, r, me.user, me.Admin)
		if !up || hooks && level >= 0 && !f.checkHooks(ctx, l, r, level, o.WebhookURL) {
			return
		}
	}
}

// checkToken asks what the token says of itself; one of OAuth says nothing.
func (f *Forge) checkToken(ctx context.Context, l *checkup.List) (up bool) {
	var self struct {
		Name   string   `json:"name"`
		Scopes []string `json:"scopes"`
		Ends   string   `json:"expires_at"` // a day, at whose beginning (UTC) it ends
	}
	err := f.get(ctx, &self, nil, "personal_access_tokens", "self")
	if l.Down(f.api.Base(), err) {
		return false
	}
	switch {
	case err != nil:
		l.Unseen("", "which scopes the token has, and when it ends, cannot be seen, as of one that an OAuth application got: %v", err)
		return true
	case slices.Contains(self.Scopes, "granular"):
		l.Unseen("see its settings", "what the token %q may do, which is a fine-grained one, cannot be seen", hook.Line(self.Name))
	case !slices.Contains(self.Scopes, "api"):
		l.Fail("make a token with the scope api", "the token has the scopes %s, and not api", hook.Line(strings.Join(self.Scopes, ", ")))
	default:
		l.Fine("the token %q has the scope api", hook.Line(self.Name))
	}
	if day, err := time.Parse(time.DateOnly, self.Ends); err == nil {
		l.Ends("the token", day, time.Now())
	} else {
		l.Fine("the token does not expire")
	}
	return true
}

// checkProject gives what our user may do, -1 where the project is not there, and
// whether it is worth while to go on.
func (f *Forge) checkProject(ctx context.Context, l *checkup.List, r forge.Repo, me user, admin bool) (level int, up bool) {
	name, login := r.FullName(), hook.Line(me.Username)
	const advice = "give the user, or the project's or group's token, the role Developer or more"
	if err := check(r); err != nil {
		l.Fail("projects are group/project", "%v", err)
		return -1, true
	}
	switch err := f.get(ctx, nil, nil, in(r)...); {
	case l.Down(f.api.Base(), err):
		return -1, false
	case errors.Is(err, forge.ErrNotFound):
		l.Fail(advice, "%s is not there, or not to be seen by the user %s", name, login)
		return -1, true
	case err != nil:
		l.Fail(advice, "%s cannot be read: %v", name, err)
		return -1, true
	}
	var member struct {
		Level int    `json:"access_level"`
		State string `json:"state"`
	}
	switch err := f.get(ctx, &member, nil, in(r, "members", "all", strconv.FormatInt(me.ID, 10))...); {
	case l.Down(f.api.Base(), err):
		return -1, false
	case admin:
		l.Fine("the user %s administrates the instance, and so may do everything in %s", login, name)
		return maintainer, true
	case errors.Is(err, forge.ErrNotFound):
		l.Fail(advice, "the user %s is no member of %s: no status can be reported", login, name)
	case err != nil:
		l.Unseen("", "what the user %s may do in %s cannot be seen: %v", login, name, err)
	case member.Level < developer:
		l.Fail(advice, "the user %s has the access level %d in %s, which is less than Developer (%d): no status can be reported", login, member.Level, name, developer)
	case member.Level < maintainer:
		l.Fine("the user %s is Developer in %s; where branches are protected it has to be Maintainer", login, name)
	default:
		l.Fine("the user %s is Maintainer or more in %s", login, name)
	}
	return member.Level, true
}

func (f *Forge) checkHooks(ctx context.Context, l *checkup.List, r forge.Repo, level int, want string) bool {
	const advice = "look at the project's settings, under Webhooks"
	if level < maintainer {
		l.Unseen(advice, "the webhooks of %s are seen by its Maintainers only", r.FullName())
		return true
	}
	type webhook struct {
		URL           string `json:"url"`
		Push          bool   `json:"push_events"`
		Tag           bool   `json:"tag_push_events"`
		Merge         bool   `json:"merge_requests_events"`
		Verify        *bool  `json:"enable_ssl_verification"`
		Alert         string `json:"alert_status"`          // since 15.0
		DisabledUntil string `json:"disabled_until"`        // the same
		Token         *bool  `json:"token_present"`         // since 19.0
		SigningToken  bool   `json:"signing_token_present"` // the same
	}
	var all []checkup.Hook
	err := pages(ctx, f, url.Values{}, func(list []webhook) bool {
		for _, h := range list {
			one := checkup.Hook{
				URL: h.URL, Unverified: h.Verify != nil && !*h.Verify && strings.HasPrefix(want, "https:"),
				NoSecret: h.Token != nil && !*h.Token && !h.SigningToken,
			}
			switch h.Alert {
			case "disabled":
				one.Inactive = "GitLab disabled it, since it failed too often"
			case "temporarily_disabled":
				one.Inactive = "GitLab disabled it until " + hook.Line(h.DisabledUntil) + ", since it failed"
			}
			for label, on := range map[string]bool{"Push events": h.Push, "Tag push events": h.Tag, "Merge request events": h.Merge} {
				if !on {
					one.Missing = append(one.Missing, label)
				}
			}
			slices.Sort(one.Missing)
			all = append(all, one)
		}
		return true
	}, in(r, "hooks")...)
	switch {
	case l.Down(f.api.Base(), err):
		return false
	case err != nil:
		l.Unseen(advice, "the webhooks of %s cannot be seen: %v", r.FullName(), err)
		return true
	}
	l.Hooks(r.FullName(), want, "its group or the instance has one", all)
	return true
}
