// Package forgejo is the forge driver for Forgejo and Gitea, which share an API
// (https://forgejo.org/docs/latest/user/api-usage/) and webhooks.
//
// It has a small client of its own: that of code.gitea.io/sdk/gitea has one
// context for all calls, reads answers without a bound, and keeps rate limits to
// itself.
//
// Neither forge makes a merge commit before a pull request is merged, so there
// is no forge.Merger: the head is what is tested.
package forgejo

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
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
	// BaseURL is what people open: https://codeberg.org. A path is allowed.
	BaseURL string
	// Token is an access token. Scopes:
	// write:repository, write:issue (comments), read:user (approvals, comments).
	Token string
	// TokenFunc gives the token where it changes, as that of an OAuth2 application
	// does, and when it expires (zero: it does not). It is asked for every call.
	TokenFunc func(ctx context.Context) (token string, expires time.Time, err error)
	// Transport carries the calls; nil: one with timeouts and without a proxy.
	Transport http.RoundTripper
	// Timeout of one call; 0: 30 s.
	Timeout time.Duration
}

// Forge is the driver; safe for concurrent use.
type Forge struct {
	api      *rest.Client
	token    func(ctx context.Context) (string, time.Time, error)
	statuses *latest.Latest
	trees    lru.Cache[string, []entry] // by repository and tree; costs: entries
	commits  lru.Cache[string, string]  // the trees of commits
	mu       sync.Mutex
	version  string // of the server; empty: not asked yet
	self     int64  // our user's ID; 0: not asked yet
}

var (
	_ forge.Forge             = (*Forge)(nil)
	_ forge.ChangedPaths      = (*Forge)(nil)
	_ forge.Permissions       = (*Forge)(nil)
	_ forge.Commenter         = (*Forge)(nil)
	_ forge.HeadLister        = (*Forge)(nil)
	_ forge.PullRequestLister = (*Forge)(nil)
	_ forge.Checker           = (*Forge)(nil)
)

// What is remembered: object names say what is in them, so nothing gets stale.
const (
	maxEntries = 100_000
	maxCommits = 10_000
)

// New checks the configuration; it makes no call. It wraps forge.ErrInvalid.
func New(c Config) (*Forge, error) {
	if (c.Token == "") == (c.TokenFunc == nil) {
		return nil, fmt.Errorf("%w: forgejo needs one of Token and TokenFunc: make a token in the settings of the user that is to act", forge.ErrInvalid)
	}
	f := &Forge{
		token: c.TokenFunc, statuses: latest.New(),
		trees: lru.Cache[string, []entry]{Max: maxEntries}, commits: lru.Cache[string, string]{Max: maxCommits},
	}
	if f.token == nil {
		f.token = func(context.Context) (string, time.Time, error) { return c.Token, time.Time{}, nil }
	}
	var err error
	f.api, err = rest.New(rest.Config{
		Name: "forgejo", BaseURL: c.BaseURL, API: "api/v1", Transport: c.Transport, Timeout: c.Timeout,
		Authorize: func(ctx context.Context, h http.Header) error {
			token, _, err := f.token(ctx)
			if err == nil {
				h.Set("Authorization", "token "+token) // of OAuth2 too
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

// in gives the elements of a path below a repository.
func in(r forge.Repo, elements ...string) []string {
	return append([]string{"repos", r.Owner, r.Name}, elements...)
}

// check validates a repository's name; owners have no slashes here.
func check(r forge.Repo) error {
	if err := r.Validate(); err != nil {
		return err
	}
	if r.Owner == "" || strings.Contains(r.Owner, "/") {
		return fmt.Errorf("%w: repository %.80q: the name is owner/name", forge.ErrInvalid, r.FullName())
	}
	return nil
}

// get makes a call that reads; an empty repository, which the API calls a
// conflict, has nothing.
func (f *Forge) get(ctx context.Context, out any, query url.Values, path ...string) error {
	_, err := f.api.Do(ctx, rest.Call{Path: path, Query: query, Out: out})
	return empty(err)
}

func empty(err error) error {
	if rest.Status(err) == http.StatusConflict {
		return fmt.Errorf("%w: %w", forge.ErrNotFound, err)
	}
	return err
}

// maxRefs bounds the list of a repository's branches, which has no pages: 200,000.
const maxRefs = 64 << 20

// repository as the API and webhooks give it (modules/structs/repo.go of Gitea).
type repository struct {
	ID            int64  `json:"id"`
	Owner         user   `json:"owner"`
	Name          string `json:"name"`
	FullName      string `json:"full_name"`
	Private       bool   `json:"private"`
	HTMLURL       string `json:"html_url"`
	CloneURL      string `json:"clone_url"`
	DefaultBranch string `json:"default_branch"`
}

type user struct {
	ID    int64  `json:"id"`
	Login string `json:"login"`
}

// CloneInfo implements forge.Forge. The credentials are those of the driver,
// which can't be narrowed.
func (f *Forge) CloneInfo(ctx context.Context, r forge.Repo, _ forge.CloneOptions) (forge.Clone, error) {
	if err := check(r); err != nil {
		return forge.Clone{}, err
	}
	var found repository
	if err := f.get(ctx, &found, nil, in(r)...); err != nil {
		return forge.Clone{}, err
	}
	// Its name now: git's redirect from an old one is not followed.
	now := forge.Repo{Owner: found.Owner.Login, Name: found.Name}
	if err := check(now); err != nil {
		return forge.Clone{}, err
	}
	token, expires, err := f.token(ctx)
	if err != nil {
		return forge.Clone{}, fmt.Errorf("forgejo: credentials: %w", err)
	}
	return forge.Clone{
		URL:       f.cloneURL(now),
		Header:    map[string]string{"Authorization": "Basic " + base64.StdEncoding.EncodeToString([]byte("oauth2:"+token))},
		ExpiresAt: expires,
	}, nil
}

// cloneURL is made from the configured address, never from a payload.
func (f *Forge) cloneURL(r forge.Repo) string {
	return f.api.Base() + "/" + url.PathEscape(r.Owner) + "/" + url.PathEscape(r.Name) + ".git"
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
	if gitcmd.CheckObject(ref) == nil {
		c, err := f.lookUp(ctx, r, ref)
		return c.SHA, err
	}
	names := []string{"refs/heads/" + ref, "refs/tags/" + ref}
	if strings.HasPrefix(ref, "refs/") {
		names = []string{ref}
	}
	for _, name := range names {
		refs, err := f.refs(ctx, r, name)
		if errors.Is(err, forge.ErrNotFound) {
			continue
		}
		if err != nil {
			return "", err
		}
		for _, found := range refs {
			if found.Ref == name {
				return f.peel(ctx, r, found.Object)
			}
		}
	}
	return "", fmt.Errorf("%w: ref %q in %s", forge.ErrNotFound, ref, r.FullName())
}

type object struct {
	Type string `json:"type"`
	SHA  string `json:"sha"`
}

type reference struct {
	Ref    string `json:"ref"`
	Object object `json:"object"`
}

// oneOrMore: before Gitea 1.13 a single ref that matches exactly is no list.
type oneOrMore []reference

func (m *oneOrMore) UnmarshalJSON(data []byte) error {
	if len(data) > 0 && data[0] == '{' {
		*m = make(oneOrMore, 1)
		return unmarshal(data, &(*m)[0])
	}
	return unmarshal(data, (*[]reference)(m))
}

// refs gives a ref and those below it.
func (f *Forge) refs(ctx context.Context, r forge.Repo, name string) ([]reference, error) {
	var found oneOrMore
	path := in(r, append([]string{"git"}, strings.Split(name, "/")...)...)
	_, err := f.api.Do(ctx, rest.Call{Path: path, Out: &found, Max: maxRefs})
	return found, empty(err)
}

// peel gives the commit behind an object, through tags of tags.
func (f *Forge) peel(ctx context.Context, r forge.Repo, o object) (string, error) {
	for range 8 {
		if gitcmd.CheckObject(o.SHA) != nil {
			break
		}
		switch o.Type {
		case "commit":
			return o.SHA, nil
		case "tag":
			var tag struct {
				Object object `json:"object"`
			}
			if err := f.get(ctx, &tag, nil, in(r, "git", "tags", o.SHA)...); err != nil {
				return "", err
			}
			o = tag.Object
		default:
			return "", fmt.Errorf("%w: what is tagged is a %.20s", forge.ErrNotFound, o.Type)
		}
	}
	return "", fmt.Errorf("%w: no commit behind the tag", forge.ErrNotFound)
}

// Heads implements forge.HeadLister.
func (f *Forge) Heads(ctx context.Context, r forge.Repo) (map[string]string, error) {
	if err := check(r); err != nil {
		return nil, err
	}
	heads := map[string]string{}
	branches, err := f.refs(ctx, r, "refs/heads")
	if errors.Is(err, forge.ErrNotFound) { // none, or no such repository
		return heads, f.get(ctx, nil, nil, in(r)...)
	}
	if err != nil {
		return nil, err
	}
	for _, b := range branches {
		if b.Object.Type == "commit" && gitcmd.CheckObject(b.Object.SHA) == nil {
			heads[b.Ref] = b.Object.SHA
		}
	}
	// The list of tags knows the commits behind them.
	for page := 1; page <= maxPages; page++ {
		var tags []struct {
			Name   string `json:"name"`
			Commit object `json:"commit"`
		}
		if err := f.get(ctx, &tags, pageQuery(page, "limit", 50), in(r, "tags")...); err != nil {
			return nil, err
		}
		if len(tags) == 0 {
			return heads, nil
		}
		for _, t := range tags {
			if gitcmd.CheckObject(t.Commit.SHA) == nil {
				heads["refs/tags/"+t.Name] = t.Commit.SHA
			}
		}
	}
	return nil, fmt.Errorf("%w: %s has too many tags to list", forge.ErrTooLarge, r.FullName())
}
