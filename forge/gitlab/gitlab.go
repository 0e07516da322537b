// Package gitlab is the forge driver for GitLab, by its REST API
// (https://docs.gitlab.com/api/rest/) and webhooks.
//
// It has a small client of its own: that of gitlab.com/gitlab-org/api/client-go
// brings modules under a licence that is not permissive (MPL), and reads answers
// without a bound.
package gitlab

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/internal/latest"
	"github.com/solstice-ci/solstice-go/forge/internal/lru"
	"github.com/solstice-ci/solstice-go/forge/internal/rest"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// Config says where the forge is and who we are there. BaseURL and one of Token
// and TokenFunc are required.
type Config struct {
	// BaseURL is what people open: https://gitlab.com. A path is allowed.
	BaseURL string
	// Token is a project's, a group's or a person's access token with the scope api
	// and the role Developer.
	Token string
	// TokenFunc gives the token where it changes, as that of an OAuth application
	// does, and when it expires (zero: it does not). It is asked for every call.
	TokenFunc func(ctx context.Context) (token string, expires time.Time, err error)
	// MaxAge is how far the time of a signed webhook may be from ours; 0: 5 min.
	MaxAge time.Duration
	// Transport carries the calls; nil: one with timeouts and without a proxy.
	Transport http.RoundTripper
	// Timeout of one call; 0: 30 s.
	Timeout time.Duration
}

// Forge is the driver; safe for concurrent use.
type Forge struct {
	api       *rest.Client
	token     func(ctx context.Context) (string, time.Time, error)
	maxAge    time.Duration
	statuses  *latest.Latest
	commits   lru.Cache[string, struct{}] // that there are
	dirs      lru.Cache[string, []entry]  // by commit and path; costs: entries
	pipelines lru.Cache[string, int64]    // where statuses of a commit are
	mu        sync.Mutex
	self      int64 // our user's ID; 0: not asked yet
}

var (
	_ forge.Forge             = (*Forge)(nil)
	_ forge.ChangedPaths      = (*Forge)(nil)
	_ forge.Permissions       = (*Forge)(nil)
	_ forge.Merger            = (*Forge)(nil)
	_ forge.Commenter         = (*Forge)(nil)
	_ forge.HeadLister        = (*Forge)(nil)
	_ forge.PullRequestLister = (*Forge)(nil)
	_ forge.Checker           = (*Forge)(nil)
)

// What is remembered: a commit's name says what is in it, so nothing gets stale.
const (
	maxEntries   = 100_000
	maxCommits   = 10_000
	maxPipelines = 10_000
)

// New checks the configuration; it makes no call. It wraps forge.ErrInvalid.
func New(c Config) (*Forge, error) {
	if (c.Token == "") == (c.TokenFunc == nil) {
		return nil, fmt.Errorf("%w: gitlab needs one of Token and TokenFunc: make an access token in the settings of the project or the group", forge.ErrInvalid)
	}
	if c.MaxAge <= 0 {
		c.MaxAge = 5 * time.Minute
	}
	f := &Forge{
		token: c.TokenFunc, maxAge: c.MaxAge, statuses: latest.New(),
		commits:   lru.Cache[string, struct{}]{Max: maxCommits},
		dirs:      lru.Cache[string, []entry]{Max: maxEntries},
		pipelines: lru.Cache[string, int64]{Max: maxPipelines},
	}
	if f.token == nil {
		f.token = func(context.Context) (string, time.Time, error) { return c.Token, time.Time{}, nil }
	}
	var err error
	f.api, err = rest.New(rest.Config{
		Name: "gitlab", BaseURL: c.BaseURL, API: "api/v4", Transport: c.Transport, Timeout: c.Timeout,
		Authorize: func(ctx context.Context, h http.Header) error {
			token, _, err := f.token(ctx)
			if err == nil {
				h.Set("Authorization", "Bearer "+token) // of every kind; Private-Token is not for OAuth's
			}
			return err
		},
	})
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Capabilities implements forge.Forge.
func (f *Forge) Capabilities() forge.Capabilities {
	return forge.Capabilities{Webhooks: true, Statuses: true}
}

// Close ends idle connections.
func (f *Forge) Close() error {
	f.api.Close()
	return nil
}

// in gives the elements of a path below a project, which its path identifies.
func in(r forge.Repo, elements ...string) []string {
	return append([]string{"projects", r.FullName()}, elements...)
}

// check validates a project's path; owners may be groups in groups.
func check(r forge.Repo) error {
	if err := r.Validate(); err != nil {
		return err
	}
	if r.Owner == "" {
		return fmt.Errorf("%w: repository %.80q: the name is group/project", forge.ErrInvalid, r.FullName())
	}
	return nil
}

func (f *Forge) get(ctx context.Context, out any, query url.Values, path ...string) error {
	_, err := f.api.Do(ctx, rest.Call{Path: path, Query: query, Out: out})
	return err
}

// perPage is the most that the API gives; maxPages bounds what is read so.
const (
	perPage  = 100
	maxPages = 1000
)

// pages reads lists page by page until yield has enough.
func pages[T any](ctx context.Context, f *Forge, query url.Values, yield func([]T) (more bool), path ...string) error {
	if query == nil {
		query = url.Values{}
	}
	query.Set("per_page", strconv.Itoa(perPage))
	for page := 1; page <= maxPages; page++ {
		query.Set("page", strconv.Itoa(page))
		var list []T
		h, err := f.api.Do(ctx, rest.Call{Path: path, Query: query, Out: &list})
		if err != nil {
			return err
		}
		if !yield(list) || len(list) == 0 || h.Get("X-Next-Page") == "" {
			return nil
		}
	}
	return fmt.Errorf("%w: gitlab: more than %d pages of %s", forge.ErrTooLarge, maxPages, path[len(path)-1])
}

// project as the API gives it.
type project struct {
	ID   int64  `json:"id"`
	Path string `json:"path_with_namespace"`
}

// CloneInfo implements forge.Forge. The credentials are those of the driver,
// which can't be narrowed.
func (f *Forge) CloneInfo(ctx context.Context, r forge.Repo, _ forge.CloneOptions) (forge.Clone, error) {
	if err := check(r); err != nil {
		return forge.Clone{}, err
	}
	var found project
	if err := f.get(ctx, &found, nil, in(r)...); err != nil {
		return forge.Clone{}, err
	}
	token, expires, err := f.token(ctx)
	if err != nil {
		return forge.Clone{}, fmt.Errorf("gitlab: credentials: %w", err)
	}
	var path strings.Builder // its path now: git's redirect from an old one is not followed
	for part := range strings.SplitSeq(found.Path, "/") {
		path.WriteString("/" + url.PathEscape(part))
	}
	return forge.Clone{
		URL:       f.api.Base() + path.String() + ".git",
		Header:    map[string]string{"Authorization": "Basic " + base64.StdEncoding.EncodeToString([]byte("oauth2:"+token))},
		ExpiresAt: expires,
	}, nil
}

// commitInfo as the API gives it.
type commitInfo struct {
	ID      string   `json:"id"`
	Parents []string `json:"parent_ids"`
}

// lookUp asks for the commit that a revision names.
func (f *Forge) lookUp(ctx context.Context, r forge.Repo, rev string) (commitInfo, error) {
	var c commitInfo
	if err := f.get(ctx, &c, url.Values{"stats": {"false"}}, in(r, "repository", "commits", rev)...); err != nil {
		return c, err
	}
	if gitcmd.CheckObject(c.ID) != nil {
		return c, fmt.Errorf("%w: gitlab: the answer for %.80q names no commit", forge.ErrUnavailable, rev)
	}
	return c, nil
}

// commit makes sure that there is one.
func (f *Forge) commit(ctx context.Context, r forge.Repo, commit string) error {
	if err := check(r); err != nil {
		return err
	}
	if err := gitcmd.CheckObject(commit); err != nil {
		return fmt.Errorf("%w: %w", forge.ErrInvalid, err)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	key := r.FullName() + "@" + commit
	if _, ok := f.commits.Get(key); ok {
		return nil
	}
	c, err := f.lookUp(ctx, r, commit)
	if err != nil {
		return err
	}
	if c.ID != commit {
		return fmt.Errorf("%w: %s is no commit", forge.ErrNotFound, commit)
	}
	f.commits.Put(key, struct{}{}, 1)
	return nil
}

// Resolve implements forge.Forge. Of a branch and a tag of one name the branch
// is meant.
func (f *Forge) Resolve(ctx context.Context, r forge.Repo, ref string) (string, error) {
	if err := check(r); err != nil {
		return "", err
	}
	if err := gitcmd.CheckRef(ref); err != nil {
		return "", fmt.Errorf("%w: %w", forge.ErrInvalid, err)
	}
	branch, isBranch := strings.CutPrefix(ref, "refs/heads/")
	tag, isTag := strings.CutPrefix(ref, "refs/tags/")
	switch {
	case isBranch:
		return f.named(ctx, r, "branches", branch)
	case isTag:
		return f.named(ctx, r, "tags", tag)
	case gitcmd.CheckObject(ref) == nil, strings.HasPrefix(ref, "refs/"): // of a merge request
		c, err := f.lookUp(ctx, r, ref)
		return c.ID, err
	}
	commit, err := f.named(ctx, r, "branches", ref)
	if errors.Is(err, forge.ErrNotFound) {
		commit, err = f.named(ctx, r, "tags", ref)
	}
	return commit, err
}

// named is a branch or a tag as the API gives it, with the commit behind it.
type named struct {
	Name   string     `json:"name"`
	Commit commitInfo `json:"commit"`
}

func (f *Forge) named(ctx context.Context, r forge.Repo, kind, name string) (string, error) {
	var n named
	if err := f.get(ctx, &n, nil, in(r, "repository", kind, name)...); err != nil {
		return "", err
	}
	if gitcmd.CheckObject(n.Commit.ID) != nil {
		return "", fmt.Errorf("%w: %q in %s has no commit", forge.ErrNotFound, name, r.FullName())
	}
	return n.Commit.ID, nil
}

// Heads implements forge.HeadLister.
func (f *Forge) Heads(ctx context.Context, r forge.Repo) (map[string]string, error) {
	if err := check(r); err != nil {
		return nil, err
	}
	heads := map[string]string{}
	for kind, prefix := range map[string]string{"branches": "refs/heads/", "tags": "refs/tags/"} {
		if err := pages(ctx, f, nil, func(list []named) bool {
			for _, n := range list {
				if gitcmd.CheckObject(n.Commit.ID) == nil { // a tag may be of something else
					heads[prefix+n.Name] = n.Commit.ID
				}
			}
			return true
		}, in(r, "repository", kind)...); err != nil {
			return nil, err
		}
	}
	return heads, nil
}
