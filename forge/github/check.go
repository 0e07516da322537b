package github

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	gh "github.com/google/go-github/v88/github"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/internal/checkup"
	"github.com/solstice-ci/solstice-go/forge/internal/hook"
)

// What an App, and the webhook of a repository, have to be told of.
var (
	appEvents  = []string{"check_run", "check_suite", "pull_request", "push"}
	hookEvents = []string{"pull_request", "push"}
)

// Check implements forge.Checker.
func (f *Forge) Check(ctx context.Context, o forge.CheckOptions) ([]forge.Finding, error) {
	var l checkup.List
	if f.app != nil {
		f.checkApp(ctx, o, &l)
	} else {
		f.checkToken(ctx, o, &l)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return l, nil
}

// header of an answer, or of the answer that an error is.
func header(resp *gh.Response, err error) http.Header {
	var refused *gh.ErrorResponse
	switch {
	case resp != nil && resp.Response != nil:
		return resp.Header
	case errors.As(err, &refused) && refused.Response != nil:
		return refused.Response.Header
	}
	return nil
}

func (f *Forge) checkApp(ctx context.Context, o forge.CheckOptions, l *checkup.List) {
	app, resp, err := f.asApp.Apps.Get(ctx, "")
	said := header(resp, err)
	err = fail(ctx, err, "ask who App %d is", f.app.ID)
	skewed := false
	if !errors.Is(err, forge.ErrUnavailable) {
		skewed = l.Clock(said, time.Now())
	}
	settings := f.web + "/settings/apps"
	switch {
	case l.Down(f.web, err):
		return
	case err != nil && skewed:
		l.Fail("set the clock of this machine first", "GitHub does not accept what App %d signs with a time that is wrong: %v", f.app.ID, err)
		return
	case errors.Is(err, forge.ErrNotFound):
		l.Fail("see the App's settings for its App ID, and generate a private key there if it has none", "there is no App with the ID %d at %s: %v", f.app.ID, f.web, err)
		return
	case err != nil:
		l.Fail("generate a private key in the App's settings, and configure it with the App ID that stands there", "GitHub does not accept the private key of App %d: %v", f.app.ID, err)
		return
	}
	if owner := app.GetOwner().GetLogin(); isName(owner) && isName(app.GetSlug()) {
		settings = f.web + "/organizations/" + owner + "/settings/apps/" + app.GetSlug()
		if app.GetOwner().GetType() == "User" {
			settings = f.web + "/settings/apps/" + app.GetSlug()
		}
	}
	l.Fine("the credentials are those of the App %q of %s, which do not end", hook.Line(app.GetName()), hook.Line(app.GetOwner().GetLogin()))
	if p := permissions(app.GetPermissions(), l, "the App"); len(p) > 0 {
		l.Fail("add them under "+settings+"/permissions, and have each installation accept them", "the App lacks the permissions %s", strings.Join(p, ", "))
	}
	if missing := checkup.Missing(appEvents, app.Events); len(missing) > 0 {
		l.Fail("subscribe to them under "+settings+"/permissions", "the App is not told of the events %s", strings.Join(missing, ", "))
	}
	if l.WebhookURL(o.WebhookURL) && !f.checkAppHook(ctx, l, o.WebhookURL, settings) {
		return
	}
	if len(o.Repos) == 0 {
		l.Fine("the App has %d installations", app.GetInstallationsCount())
	}
	for _, r := range o.Repos {
		if !f.checkInstallation(ctx, l, r, app) {
			return
		}
	}
}

// permissions are those that are missing.
func permissions(p *gh.InstallationPermissions, l *checkup.List, whose string) (missing []string) {
	for _, need := range []struct{ name, have, want string }{
		{"Checks", p.GetChecks(), "write"},
		{"Contents", p.GetContents(), "read"},
		{"Metadata", p.GetMetadata(), "read"},
		{"Pull requests", p.GetPullRequests(), "read"},
	} {
		if need.have != "write" && need.have != "admin" && need.have != need.want {
			missing = append(missing, need.name+": "+need.want)
		}
	}
	if p.GetPullRequests() == "read" {
		l.Unseen("", "%s may read pull requests, and so write no comments", whose)
	}
	return missing
}

func (f *Forge) checkAppHook(ctx context.Context, l *checkup.List, want, settings string) (up bool) {
	c, _, err := f.asApp.Apps.GetHookConfig(ctx)
	switch err = fail(ctx, err, "read the webhook of the App"); {
	case l.Down(f.web, err):
		return false
	case err != nil && !isNotFound(err):
		l.Unseen("see "+settings, "the webhook of the App cannot be seen: %v", err)
		return true
	case err != nil || c.GetURL() == "":
		l.Fail("activate it under "+settings+", with the URL "+want, "the App has no webhook")
		return true
	}
	h := hookOf(c)
	var delivered []*gh.HookDelivery
	if checkup.SameURL(c.GetURL(), want) {
		if delivered, _, err = f.asApp.Apps.ListHookDeliveries(ctx, &gh.ListCursorOptions{PerPage: perPage}); err == nil {
			h.Last = undelivered(delivered)
		}
	}
	l.Hook("the webhook of the App", want, h)
	switch err = fail(ctx, err, "list what the webhook sent"); {
	case l.Down(f.web, err):
		return false
	case err != nil:
		l.Unseen("see "+settings+"/advanced", "what the webhook of the App sent cannot be seen: %v", err)
	case len(delivered) == 0:
		l.Unseen("if something was pushed, see whether it is active under "+settings, "the webhook of the App has sent nothing lately")
	}
	return true
}

func hookOf(c *gh.HookConfig) checkup.Hook {
	return checkup.Hook{
		URL: c.GetURL(), NotJSON: c.GetContentType() != "json", NoSecret: c.GetSecret() == "",
		Unverified: c.GetInsecureSSL() == "1" && strings.HasPrefix(c.GetURL(), "https:"),
	}
}

// undelivered says which deliveries, listed from the newest on, have not arrived:
// a delivery may be tried again.
func undelivered(all []*gh.HookDelivery) string {
	seen := map[string]bool{}
	lost, last := 0, ""
	for _, d := range all {
		if seen[d.GetGUID()] {
			continue
		}
		seen[d.GetGUID()] = true
		if code := d.GetStatusCode(); code < 200 || code > 299 {
			if lost++; lost == 1 {
				last = fmt.Sprintf("%s at %s: %d %s", hook.Line(d.GetEvent()), d.GetDeliveredAt().UTC().Format("2006-01-02 15:04:05 MST"), code, hook.Line(d.GetStatus()))
			}
		}
	}
	if lost == 0 {
		return ""
	}
	return fmt.Sprintf("%d of %d events, the newest %s", lost, len(seen), last)
}

func (f *Forge) checkInstallation(ctx context.Context, l *checkup.List, r forge.Repo, app *gh.App) (up bool) {
	name := r.FullName()
	if r.Validate() != nil || !isName(r.Owner) || !isName(r.Name) {
		l.Fail("repositories are owner/name", "GitHub has no repository called %.80q", name)
		return true
	}
	install := "install it"
	if isName(app.GetSlug()) {
		install += " there: " + f.web + "/apps/" + app.GetSlug() + "/installations/new"
	}
	found, _, err := f.asApp.Apps.GetRepositoryInstallation(ctx, r.Owner, r.Name)
	switch err = fail(ctx, err, "find where the App is installed for %s", name); {
	case l.Down(f.web, err):
		return false
	case isNotFound(err):
		l.Fail(install, "the App is not installed for %s, or there is no such repository", name)
		return true
	case err != nil:
		l.Unseen("", "whether the App is installed for %s cannot be seen: %v", name, err)
		return true
	case found.SuspendedAt != nil:
		l.Fail("have its owner unsuspend it, in the settings of the account", "the installation of the App for %s is suspended", name)
		return true
	}
	if p := permissions(found.GetPermissions(), l, "the installation for "+name); len(p) > 0 {
		l.Fail("have its owner accept the App's new permissions, in the settings of the account", "the installation for %s lacks the permissions %s", name, strings.Join(p, ", "))
		return true
	}
	l.Fine("the App is installed for %s", name)
	return true
}

func (f *Forge) checkToken(ctx context.Context, o forge.CheckOptions, l *checkup.List) {
	const token = "make a token with the scope repo, or a fine-grained one with Commit statuses: write, Contents: read, Pull requests: read"
	me, resp, err := f.asToken.Users.Get(ctx, "")
	said := header(resp, err)
	switch err = fail(ctx, err, "ask whose the token is"); {
	case l.Down(f.web, err):
		return
	case said.Get("X-GitHub-Request-Id") == "" && isNotFound(err):
		l.Fail("correct the URL and the API's", "there is no GitHub at %s: %v", f.api, err)
		return
	case isStatus(err, http.StatusUnauthorized):
		l.Fail(token, "GitHub does not accept the token: it has expired, or was revoked: %v", err)
		return
	case err != nil:
		l.Unseen("", "whose the token is cannot be seen, as of one of an App: %v", err)
	default:
		l.Fine("the token is one of the user %s", hook.Line(me.GetLogin()))
	}
	l.Clock(said, time.Now())
	if resp != nil && !resp.TokenExpiration.IsZero() {
		l.Ends("the token", resp.TokenExpiration.Time, time.Now())
	}
	if scopes, classic := said["X-Oauth-Scopes"]; classic {
		have := strings.Split(strings.ReplaceAll(strings.Join(scopes, ","), " ", ""), ",")
		switch {
		case slices.Contains(have, "repo"):
			l.Fine("the token has the scope repo")
		case slices.Contains(have, "repo:status") && slices.Contains(have, "public_repo"):
			l.Fine("the token has scopes for public repositories")
		default:
			l.Fail(token, "the token has the scopes %q, and not repo", hook.Line(strings.Join(scopes, ",")))
		}
	} else {
		l.Unseen("see its settings for Commit statuses: write, Contents: read, Pull requests: read", "which permissions the token has is not told, as of every fine-grained one")
	}
	hooks := l.WebhookURL(o.WebhookURL)
	for _, r := range o.Repos {
		there, up := f.checkRepo(ctx, l, r)
		if !up || hooks && there && !f.checkHooks(ctx, l, r, o.WebhookURL) {
			return
		}
	}
}

func isStatus(err error, code int) bool {
	var refused *gh.ErrorResponse
	return errors.As(err, &refused) && refused.Response != nil && refused.Response.StatusCode == code
}

// checkRepo reports whether there is one, and whether it is worth while to go on.
func (f *Forge) checkRepo(ctx context.Context, l *checkup.List, r forge.Repo) (there, up bool) {
	const advice = "give the token's user the role Write, and the token this repository"
	repo, err := f.open(ctx, r)
	if err != nil {
		l.Fail("repositories are owner/name", "%v", err)
		return false, ctx.Err() == nil
	}
	found, _, err := repo.Repositories.Get(ctx, repo.owner, repo.name)
	switch err = fail(ctx, err, "look for %s", r.FullName()); {
	case l.Down(f.web, err):
		return false, false
	case err != nil:
		l.Fail(advice, "%s cannot be read with the token: %v", r.FullName(), err)
		return false, true
	case found.GetPermissions() == nil:
		l.Unseen("", "what the token's user may do in %s is not told", r.FullName())
	case !found.GetPermissions().GetPush() && !found.GetPermissions().GetAdmin():
		l.Fail(advice, "the token's user may not write to %s: no status can be reported", r.FullName())
	default:
		l.Fine("the token's user may write to %s", r.FullName())
	}
	return true, true
}

func (f *Forge) checkHooks(ctx context.Context, l *checkup.List, r forge.Repo, want string) (up bool) {
	repo, err := f.open(ctx, r)
	if err != nil {
		return ctx.Err() == nil // which is said already
	}
	var all []checkup.Hook
	err = pages(func(o gh.ListOptions) (*gh.Response, error) {
		found, resp, err := repo.Repositories.ListHooks(ctx, repo.owner, repo.name, &o)
		for _, h := range found {
			one := hookOf(h.GetConfig())
			if !h.GetActive() {
				one.Inactive = "somebody deactivated it"
			}
			if !slices.Contains(h.Events, "*") {
				one.Missing = checkup.Missing(hookEvents, h.Events)
			}
			if code, ok := h.LastResponse["code"].(float64); ok && (code < 200 || code > 299) {
				one.Last = hook.Line(fmt.Sprintf("%.0f %v", code, h.LastResponse["message"]))
			}
			all = append(all, one)
		}
		return resp, err
	})
	switch err = fail(ctx, err, "list the webhooks of %s", r.FullName()); {
	case l.Down(f.web, err):
		return false
	case err != nil:
		l.Unseen("see the repository's settings, under Webhooks, or give the token the permission Webhooks: read (the scope read:repo_hook)",
			"the webhooks of %s cannot be seen with the token: %v", r.FullName(), err)
		return true
	}
	l.Hooks(r.FullName(), want, "the organisation has one", all)
	return true
}
