package rig

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	"github.com/solstice-ci/solstice-go/internal/fakeforge"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// Contain is what Contained needs of a driver.
type Contain struct {
	// New makes a driver without caches; the fake behind it is the same.
	New    func() forge.Forge
	URL    string // of the fake
	Faults *fakeforge.Faults
	// Body is that of a pull request's webhook, of a repository with a branch main,
	// and Request a delivery of it.
	Body    []byte
	Request func(body, secret []byte) *http.Request
}

// Contained checks that a driver connects to its forge and to nothing else: not to
// what a payload names, and not to where the forge or its git redirects.
//
// Names that are given another address between a check and the connection
// (rebinding) are of no use against that, since no name of a payload is ever
// resolved: the only host is the one that is configured.
func Contained(t *testing.T, c Contain) {
	t.Helper()
	trap, caught := trap(t)
	body := leadTo(t, c.Body, trap)
	secret := []byte("a secret")
	f := c.New()
	e, err := f.ParseWebhook(t.Context(), c.Request(body, secret), func(context.Context, string) ([]byte, error) { return secret, nil })
	if err != nil || !strings.HasPrefix(e.Repo.CloneURL, trap) || !strings.HasPrefix(e.PullRequest.HeadRepo.CloneURL, trap) {
		t.Fatalf("the webhook: %v, %+v", err, e)
	}
	if errs := everything(t, f, e); errs != nil {
		t.Errorf("with a hostile payload: %v", errs)
	}
	if n := caught(); n != 0 {
		t.Errorf("%d connections to what a payload names", n)
	}
	// It would be seen if they were made.
	_ = everything(t, believer{f}, e)
	if caught() == 0 {
		t.Error("a driver that believes the payload is not caught")
	}

	ofAPI := fakeforge.Fault{Redirect: trap + "/api/v1/elsewhere", Times: 1000}
	c.Faults.Add(ofAPI)
	if everything(t, c.New(), e) == nil {
		t.Error("a redirect elsewhere is no error")
	}
	if n := caught(); n != 0 {
		t.Errorf("%d connections to where the API redirects", n)
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, c.URL+"/api", nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := client.Do(req); err == nil {
		_ = resp.Body.Close()
	}
	if caught() == 0 {
		t.Error("a client that follows redirects is not caught")
	}

	c.Faults.Clear()
	clone, err := c.New().CloneInfo(t.Context(), e.Repo, forge.CloneOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c.Faults.Add(fakeforge.Fault{Path: ".git/", Redirect: trap + "/x.git/info/refs?service=git-upload-pack", Times: 1000})
	if _, err := Fetch(t.Context(), t.TempDir(), clone, e.Commit, "a"); err == nil || caught() != 0 {
		t.Errorf("git was redirected: %v", err)
	}
	git, err := gitcmd.Find(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, _ = git.Output(t.Context(), gitcmd.Options{Protocols: []string{"http"}, Config: []string{"http.followRedirects=true"}}, "ls-remote", "--", clone.URL)
	if caught() == 0 {
		t.Error("a git that follows redirects is not caught")
	}
	c.Faults.Clear()
}

// believer clones from where the payload says.
type believer struct{ forge.Forge }

func (b believer) CloneInfo(_ context.Context, r forge.Repo, _ forge.CloneOptions) (forge.Clone, error) {
	return forge.Clone{URL: r.CloneURL}, nil
}

// trap is a listener, and a function that says how often it was connected to
// since it was asked last.
func trap(t *testing.T) (address string, caught func() int64) {
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var n atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n.Add(1) // before whoever connects learns that there is no answer
			_ = c.Close()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
	return "http://" + l.Addr().String(), func() int64 { return n.Swap(0) }
}

// leadTo has every URL in a body lead to another place, and adds some that forges
// know, wherever a repository is.
func leadTo(t *testing.T, body []byte, place string) []byte {
	var v any
	if err := json.Unmarshal(body, &v); err != nil {
		t.Fatal(err)
	}
	var walk func(v any) any
	walk = func(v any) any {
		switch v := v.(type) {
		case string:
			if u, err := url.Parse(v); err == nil && u.Scheme != "" && u.Host != "" {
				return place + u.Path
			}
		case []any:
			for i := range v {
				v[i] = walk(v[i])
			}
		case map[string]any:
			for _, key := range slices.Collect(maps.Keys(v)) {
				v[key] = walk(v[key])
			}
			if v["full_name"] != nil || v["path_with_namespace"] != nil {
				for _, key := range []string{
					"url", "html_url", "clone_url", "git_url", "ssh_url", "svn_url", "mirror_url", "original_url", "archive_url", "contents_url", "statuses_url",
					"web_url", "http_url", "git_http_url", "http_url_to_repo", "homepage", "avatar_url",
				} {
					v[key] = place + "/x/y.git"
				}
			}
		}
		return v
	}
	out, err := json.Marshal(walk(v))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// everything calls all that a driver has, with what the event says; the errors are
// those of its repository, the head's may not be there.
func everything(t *testing.T, f forge.Forge, e forge.Event) error {
	ctx, pr := t.Context(), *e.PullRequest
	all := func(r forge.Repo) (errs []error) {
		add := func(err error) { errs = append(errs, err) }
		_, err := f.Resolve(ctx, r, "main")
		add(err)
		_, err = f.ReadFile(ctx, r, e.Commit, "a")
		add(err)
		_, err = f.ListFiles(ctx, r, e.Commit, "")
		add(err)
		add(f.ReportStatus(ctx, r, e.Commit, forge.Status{Key: "solstice", Version: 1, State: forge.StatusSuccess, TargetURL: "https://ci.example.org"}))
		clone, err := f.CloneInfo(ctx, r, forge.CloneOptions{})
		if err == nil {
			_, err = localgit.Mirror(ctx, clone.URL, filepath.Join(t.TempDir(), "x.git"), localgit.MirrorOptions{
				Ref: e.Commit, Depth: 1, Schemes: []string{"http", "https"}, Header: clone.Header,
			})
		}
		add(err)
		if x, ok := forge.As[forge.HeadLister](f); ok {
			_, err := x.Heads(ctx, r)
			add(err)
		}
		if x, ok := forge.As[forge.ChangedPaths](f); ok {
			_, _, err := x.ChangedPaths(ctx, r, strings.Repeat("0", len(e.Commit)), e.Commit, 10)
			add(err)
		}
		if x, ok := forge.As[forge.PullRequestLister](f); ok {
			_, err := x.PullRequests(ctx, r, 10)
			add(err)
		}
		// These need not be fine with what is made up.
		if x, ok := forge.As[forge.Permissions](f); ok {
			_, _ = x.MayApprove(ctx, r, pr.Author)
		}
		if x, ok := forge.As[forge.Merger](f); ok {
			_, _ = x.MergeCommit(ctx, r, pr)
		}
		if x, ok := forge.As[forge.Commenter](f); ok {
			_ = x.Comment(ctx, r, pr.Number, "key", "text")
		}
		if x, ok := forge.As[forge.Checker](f); ok {
			_, err := x.Check(ctx, forge.CheckOptions{Repos: []forge.Repo{r}, WebhookURL: "https://ci.example.org"})
			add(err)
		}
		return errs
	}
	_ = all(pr.HeadRepo)
	return errors.Join(all(e.Repo)...)
}
