// Package github is the forge driver for GitHub and GitHub Enterprise Server.
//
// As a GitHub App it reports check runs, which have annotations and buttons, and
// gives clones credentials that end within the hour and read one repository.
// With a token alone it reports commit statuses. Either way webhooks are the
// same; only signatures by SHA-256 are accepted.
//
// It keeps caches and nothing else, all of them bounded: answers with their
// ETags, so that asking again costs nothing of the rate limit, credentials, and
// what was reported last. A limit that GitHub imposes is a [forge.RetryError].
package github

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/bradleyfalzon/ghinstallation/v2"
	gh "github.com/google/go-github/v88/github"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/internal/latest"
	"github.com/solstice-ci/solstice-go/forge/internal/lru"
	"github.com/solstice-ci/solstice-go/internal/keylock"
)

// App is a GitHub App.
type App struct {
	ID  int64
	Key []byte // private key, PEM
}

// Config says which GitHub, and as whom; one of App and Token is set.
type Config struct {
	// URL is where people and git go; empty: https://github.com.
	URL string
	// APIURL is the REST API's; empty: https://api.github.com, or URL/api/v3 of a
	// GitHub Enterprise Server.
	APIURL string
	App    *App
	Token  string
	// Transport reaches GitHub; nil: one without a proxy.
	Transport http.RoundTripper
	// Timeout bounds one request with its answer; 0: 30 s.
	Timeout time.Duration
	// CacheBytes bounds the answers that are kept; 0: 16 MiB.
	CacheBytes int
}

const (
	publicURL      = "https://github.com"
	publicAPI      = "https://api.github.com"
	defaultTimeout = 30 * time.Second
	defaultCache   = 16 << 20
	maxKept        = 4096          // repositories, check runs
	maxBackoff     = 1 * time.Hour // a limit is asked about again after that
)

// Forge is the driver; safe for concurrent use.
type Forge struct {
	app     *App
	web     string            // without a slash at the end
	api     string            // with one
	base    http.RoundTripper // bounded answers, no credentials
	own     *http.Transport   // nil: the caller's
	answers *lru.Cache[string, *answer]

	asApp    *gh.Client // signs as the App; nil without one
	asToken  *gh.Client // nil with an App
	plain    string     // the token
	creds    keylock.Locks
	repos    lru.Cache[string, *installation] // by repository
	installs lru.Cache[int64, *installation]
	clones   lru.Cache[string, token] // by repository
	self     lru.Cache[string, int64] // the token's own user

	reports  *latest.Latest
	checks   lru.Cache[string, checkRun] // by repository, commit and key
	comments keylock.Locks
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

// New checks the configuration; it asks GitHub nothing yet. It wraps
// forge.ErrInvalid.
func New(c Config) (*Forge, error) {
	if (c.App == nil) == (c.Token == "") {
		return nil, fmt.Errorf("%w: github needs one of a GitHub App and a token", forge.ErrInvalid)
	}
	if c.URL == "" {
		c.URL = publicURL
	}
	c.URL = strings.TrimRight(c.URL, "/")
	switch {
	case c.APIURL != "":
	case c.URL == publicURL:
		c.APIURL = publicAPI
	default:
		c.APIURL = c.URL + "/api/v3"
	}
	for _, raw := range []string{c.URL, c.APIURL} {
		u, err := url.Parse(raw)
		if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
			return nil, fmt.Errorf("%w: github needs a URL like %s, without user and query, not that of host %q", forge.ErrInvalid, publicURL, hostOf(u))
		}
	}
	if c.Timeout <= 0 {
		c.Timeout = defaultTimeout
	}
	if c.CacheBytes <= 0 {
		c.CacheBytes = defaultCache
	}
	f := &Forge{
		plain: c.Token,
		app:   c.App, web: c.URL, api: strings.TrimRight(c.APIURL, "/") + "/",
		answers: &lru.Cache[string, *answer]{Max: c.CacheBytes}, reports: latest.New(),
	}
	f.repos.Max, f.installs.Max, f.clones.Max, f.self.Max, f.checks.Max = maxKept, maxKept, maxKept, 1, maxKept
	if c.Transport == nil {
		f.own = http.DefaultTransport.(*http.Transport).Clone()
		f.own.Proxy = nil // the default asks the environment
		f.own.MaxIdleConnsPerHost = 16
		f.own.ResponseHeaderTimeout = c.Timeout
		c.Transport = f.own
	}
	f.base = &bounded{c.Transport, c.Timeout}
	var err error
	if c.App == nil {
		f.asToken, err = f.client("token", bearer{c.Token, f.base})
		return f, err
	}
	if c.App.ID <= 0 {
		return nil, fmt.Errorf("%w: the ID of the GitHub App is %d", forge.ErrInvalid, c.App.ID)
	}
	// Its Transport for installations is not used: it gives the expiry of a token
	// unsynchronised, and errors that do not say when to come again.
	signer, err := ghinstallation.NewAppsTransport(f.base, c.App.ID, c.App.Key)
	if err != nil {
		return nil, fmt.Errorf("%w: the private key of the GitHub App: %w", forge.ErrInvalid, err)
	}
	f.asApp, err = f.client("app", signer)
	return f, err
}

func hostOf(u *url.URL) string {
	if u == nil {
		return ""
	}
	return u.Host
}

// client makes a client whose answers are kept under the credential's name. Each
// credential has its own, since each has its own rate limit.
func (f *Forge) client(credential string, auth http.RoundTripper) (*gh.Client, error) {
	c, err := gh.NewClient(
		gh.WithHTTPClient(&http.Client{
			Transport: &conditional{credential, f.answers, auth}, CheckRedirect: sameHost,
		}),
		gh.WithURLs(&f.api, &f.api), gh.WithUserAgent("solstice"),
		gh.WithMaxSecondaryRateLimitRetryAfterDuration(maxBackoff),
	)
	if err != nil {
		return nil, fmt.Errorf("%w: github: %w", forge.ErrInvalid, err)
	}
	return c, nil
}

// sameHost follows a redirect, as of a renamed repository, where it stays with
// the host that the credentials are for and the method remains.
func sameHost(r *http.Request, via []*http.Request) error {
	first := via[0].URL
	if len(via) > 5 || r.URL.Scheme != first.Scheme || r.URL.Host != first.Host || r.Method != via[0].Method {
		return fmt.Errorf("%w: a redirect to another place (%s at %s) is not followed", forge.ErrUnavailable, r.Method, r.URL.Host)
	}
	return nil
}

// Close releases idle connections.
func (f *Forge) Close() error {
	if f.own != nil {
		f.own.CloseIdleConnections()
	}
	return nil
}

// Capabilities implements forge.Forge.
func (f *Forge) Capabilities() forge.Capabilities {
	return forge.Capabilities{Webhooks: true, Statuses: true, StatusKeysFold: f.app == nil}
}

// repository is a checked name, and the client that may read it.
type repository struct {
	*gh.Client
	owner, name string
	install     *installation // nil without an App
}

// key is the name as GitHub compares names.
func (r repository) key() string { return strings.ToLower(r.owner + "/" + r.name) }

// open checks the name, and finds the App's installation for it.
func (f *Forge) open(ctx context.Context, r forge.Repo) (repository, error) {
	if err := ctx.Err(); err != nil {
		return repository{}, err
	}
	if err := r.Validate(); err != nil {
		return repository{}, err
	}
	if !isName(r.Owner) || !isName(r.Name) {
		return repository{}, fmt.Errorf("%w: GitHub has no repository called %.80q", forge.ErrInvalid, r.FullName())
	}
	repo := repository{Client: f.asToken, owner: r.Owner, name: r.Name}
	if f.app == nil {
		return repo, nil
	}
	var err error
	if repo.install, err = f.installation(ctx, repo); err != nil {
		return repository{}, err
	}
	repo.Client = repo.install.client
	return repo, nil
}

// isName: of an account or a repository; nothing in it has to be escaped in a URL.
func isName(s string) bool {
	return s != "" && len(s) <= 255 && !strings.ContainsFunc(s, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.'
	})
}

// fail gives the sentinel for what went wrong, with what was tried.
func fail(ctx context.Context, err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	what := fmt.Sprintf("github: "+format, args...)
	if over := ctx.Err(); over != nil {
		return fmt.Errorf("%s: %w", what, over)
	}
	for _, known := range []error{
		forge.ErrUnavailable, forge.ErrNotFound, forge.ErrPermission, forge.ErrInvalid, forge.ErrTooLarge, forge.ErrConflict,
	} {
		if errors.Is(err, known) {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
	var primary *gh.RateLimitError
	var secondary *gh.AbuseRateLimitError
	var answer *gh.ErrorResponse
	switch {
	case errors.As(err, &primary):
		return retry(what, err, time.Until(primary.Rate.Reset.Time))
	case errors.As(err, &secondary):
		return retry(what, err, secondary.GetRetryAfter())
	case errors.As(err, &answer) && answer.Response != nil:
		code := answer.Response.StatusCode
		after, asked := retryAfter(answer.Response.Header)
		switch {
		case asked && (code == http.StatusForbidden || code == http.StatusTooManyRequests || code == http.StatusServiceUnavailable):
			return retry(what, err, after)
		case code == http.StatusTooManyRequests:
			return retry(what, err, 0)
		case code == http.StatusUnauthorized:
			return fmt.Errorf("%s: %w: the credentials are not, or no longer, accepted: %w", what, forge.ErrPermission, err)
		case code == http.StatusForbidden, code == http.StatusUnavailableForLegalReasons:
			return fmt.Errorf("%s: %w: %w", what, forge.ErrPermission, err)
		case code == http.StatusNotFound, code == http.StatusGone,
			code == http.StatusConflict && answer.Response.Request.Method == http.MethodGet: // an empty repository
			return fmt.Errorf("%s: %w, or not to be seen with these credentials: %w", what, forge.ErrNotFound, err)
		case code >= 400 && code < 500:
			return fmt.Errorf("%s: %w: %w", what, forge.ErrInvalid, err)
		}
	}
	return fmt.Errorf("%s: %w: %w", what, forge.ErrUnavailable, err)
}

// retry is an error that says when to come again; GitHub asks for a minute where
// it does not say.
func retry(what string, err error, after time.Duration) error {
	if after <= 0 {
		after = time.Minute
	}
	return &forge.RetryError{After: min(after, maxBackoff), Err: fmt.Errorf("%s: %w", what, err)}
}

// retryAfter reads the header, in seconds or as a date.
func retryAfter(h http.Header) (time.Duration, bool) {
	v := h.Get("Retry-After")
	if n, err := strconv.ParseUint(v, 10, 31); err == nil {
		return time.Duration(n) * time.Second, true
	}
	if t, err := http.ParseTime(v); err == nil {
		return time.Until(t), true
	}
	return 0, false
}
