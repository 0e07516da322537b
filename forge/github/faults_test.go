package github_test

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/forgetest"
	"github.com/solstice-ci/solstice-go/forge/github"
	"github.com/solstice-ci/solstice-go/internal/fakeforge"
	fake "github.com/solstice-ci/solstice-go/internal/fakeforge/github"
	fakerig "github.com/solstice-ci/solstice-go/internal/fakeforge/rig"
)

// roundTrip is a transport that is a function.
type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func transport(t *testing.T) *http.Transport {
	tr := http.DefaultTransport.(*http.Transport).Clone()
	t.Cleanup(tr.CloseIdleConnections)
	return tr
}

func TestFaults(t *testing.T) {
	r := start(t, true, func(c *github.Config) { c.Timeout = time.Second })
	repo, commit := r.committed(t)
	read := func(f *github.Forge) error {
		_, err := f.ReadFile(t.Context(), repo, commit, "a")
		return err
	}
	in := func(d time.Duration) string { return time.Now().Add(d).UTC().Format(http.TimeFormat) }
	for name, tc := range map[string]struct {
		fault fakeforge.Fault
		want  error
		after time.Duration // at most; 0: not said
	}{
		"429 with seconds":   {fakeforge.Fault{Status: 429, Header: map[string]string{"Retry-After": "7"}}, forge.ErrUnavailable, 7 * time.Second},
		"429 with a date":    {fakeforge.Fault{Status: 429, Header: map[string]string{"Retry-After": in(time.Minute)}}, forge.ErrUnavailable, time.Minute},
		"429 without a word": {fakeforge.Fault{Status: 429}, forge.ErrUnavailable, time.Minute},
		"secondary limit":    {fakeforge.Fault{Status: 403, Header: map[string]string{"Retry-After": "9"}}, forge.ErrUnavailable, 9 * time.Second},
		"for ever":           {fakeforge.Fault{Status: 429, Header: map[string]string{"Retry-After": "999999999"}}, forge.ErrUnavailable, time.Hour},
		"502":                {fakeforge.Fault{Status: 502}, forge.ErrUnavailable, 0},
		"503 with seconds":   {fakeforge.Fault{Status: 503, Header: map[string]string{"Retry-After": "5"}}, forge.ErrUnavailable, 5 * time.Second},
		"answer is lost":     {fakeforge.Fault{Lose: true}, forge.ErrUnavailable, 0},
		"half an answer":     {fakeforge.Fault{Slow: true}, forge.ErrUnavailable, 0},
		"403":                {fakeforge.Fault{Status: 403}, forge.ErrPermission, 0},
		"451":                {fakeforge.Fault{Status: 451}, forge.ErrPermission, 0},
		"410":                {fakeforge.Fault{Status: 410}, forge.ErrNotFound, 0},
		"empty repository":   {fakeforge.Fault{Status: 409}, forge.ErrNotFound, 0},
		"not asked well":     {fakeforge.Fault{Status: 400}, forge.ErrInvalid, 0},
		"redirect elsewhere": {fakeforge.Fault{Redirect: "http://127.0.0.1:1/x"}, forge.ErrUnavailable, 0},
	} {
		t.Run(name, func(t *testing.T) {
			paths := []string{"/git/commits", "/access_tokens", "/installation"}
			if errors.Is(tc.want, forge.ErrNotFound) || tc.fault.Lose || tc.fault.Slow {
				paths = paths[:1] // the others have their own meaning, or take their time
			}
			for _, path := range paths {
				f := r.again(t)
				if tc.fault.Lose || tc.fault.Slow {
					f = r.impatient(t)
				}
				tc.fault.Path = path
				r.Faults.Add(tc.fault)
				var err error
				for r.Faults.Pending() > 0 { // on a slow day something else is too slow first
					err = read(f)
				}
				if !errors.Is(err, tc.want) {
					t.Fatalf("%s: %v, want %v", path, err, tc.want)
				}
				var retry *forge.RetryError
				if errors.As(err, &retry) != (tc.after > 0) || retry != nil && (retry.After > tc.after || retry.After < tc.after-10*time.Second) {
					t.Errorf("%s: %v says to come again after %v, want %v", path, err, retry, tc.after)
				}
				for _, secret := range []string{"ghs_", "Bearer", "eyJ"} {
					if strings.Contains(err.Error(), secret) {
						t.Errorf("the error tells a secret: %v", err)
					}
				}
			}
		})
	}
}

// impatient is a driver that waits for a second.
func (r rig) impatient(t *testing.T) *github.Forge {
	key, err := fake.AppKey()
	if err != nil {
		t.Fatal(err)
	}
	f, err := github.New(github.Config{URL: r.url, App: &github.App{ID: fake.AppID, Key: key}, Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// After a limit nothing is asked until it is over.
func TestLimitIsKept(t *testing.T) {
	for name, tc := range map[string]struct {
		header map[string]string
		docs   string
	}{
		"primary": {map[string]string{
			"X-RateLimit-Remaining": "0", "X-RateLimit-Limit": "5000", "X-RateLimit-Reset": strconv.FormatInt(time.Now().Add(10*time.Minute).Unix(), 10),
		}, ""},
		"secondary": {map[string]string{"Retry-After": "600"}, "https://docs.github.com/rest/overview/resources-in-the-rest-api#secondary-rate-limits"},
	} {
		t.Run(name, func(t *testing.T) {
			asked := 0
			f, err := github.New(github.Config{Token: "secret", Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
				asked++
				resp := &http.Response{
					StatusCode: http.StatusForbidden, Header: http.Header{}, Request: r,
					Body: io.NopCloser(strings.NewReader(`{"message":"slow down","documentation_url":"` + tc.docs + `"}`)),
				}
				for key, value := range tc.header {
					resp.Header.Set(key, value)
				}
				return resp, nil
			})})
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				_, err := f.Heads(t.Context(), forge.Repo{Owner: "a", Name: "b"})
				var retry *forge.RetryError
				if !errors.As(err, &retry) || retry.After < 9*time.Minute || retry.After > 10*time.Minute {
					t.Errorf("%v, after %v", err, retry)
				}
			}
			if asked != 1 {
				t.Errorf("%d requests", asked)
			}
		})
	}
}

func TestRedirectOfARenamedRepository(t *testing.T) {
	r := start(t, true, nil)
	repo, commit := r.committed(t)
	r.Faults.Add(fakeforge.Fault{Path: "/git/commits/", Redirect: fake.API + "/repos/team/repo/git/commits/" + commit})
	if _, err := r.ListFiles(t.Context(), repo, commit, ""); err != nil {
		t.Error(err)
	}
}

func TestEndlessAnswer(t *testing.T) {
	object := strings.Repeat("a", 40)
	f, err := github.New(github.Config{Token: "secret", Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
		var body io.Reader = endless{}
		switch {
		case strings.Contains(r.URL.Path, "/git/commits/"):
			body = strings.NewReader(`{"tree":{"sha":"` + object + `"}}`)
		case strings.Contains(r.URL.Path, "/git/trees/"):
			body = strings.NewReader(`{"tree":[{"path":"a","type":"blob","mode":"100644","size":1,"sha":"` + object + `"}]}`)
		}
		return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Request: r, Body: io.NopCloser(body)}, nil
	})})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadFile(t.Context(), forge.Repo{Owner: "a", Name: "b"}, object, "a"); !errors.Is(err, forge.ErrTooLarge) {
		t.Error(err)
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// What has not changed costs nothing of the rate limit.
func TestUnchangedAnswers(t *testing.T) {
	r := start(t, true, nil)
	repo, commit := r.committed(t)
	for i := range 2 {
		if got, err := r.ReadFile(t.Context(), repo, commit, "a"); err != nil || string(got) != "1" {
			t.Fatalf("%q, %v", got, err)
		}
		if got := r.Unchanged(); got != i*3 { // commit, tree, blob
			t.Errorf("%d answers are said not to have changed, want %d", got, i*3)
		}
	}
	later := r.commit(t, repo, "main", map[string]forgetest.File{"a": {Content: "2"}})
	for range 2 {
		if got, err := r.Resolve(t.Context(), repo, "main"); err != nil || got != later {
			t.Errorf("%q, %v", got, err)
		}
	}
}

func TestTokens(t *testing.T) {
	r := start(t, true, nil)
	repo, commit := r.committed(t)
	clone := func() forge.Clone {
		t.Helper()
		c, err := r.CloneInfo(t.Context(), repo, forge.CloneOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	read := func(want error) {
		t.Helper()
		if _, err := r.ReadFile(t.Context(), repo, commit, "a"); !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
	}
	r.TokenLife = 5 * time.Minute // too short to be handed out again
	first := clone()
	r.TokenLife = 0
	second := clone()
	if third := clone(); first.Header["Authorization"] == second.Header["Authorization"] || second.Header["Authorization"] != third.Header["Authorization"] {
		t.Error("a token that ends soon was handed out again, or another was not")
	}
	if left := time.Until(second.ExpiresAt); left > time.Hour || left < 50*time.Minute {
		t.Errorf("expires in %v", left)
	}
	// A clone's token is good for that repository, and for nothing else.
	text := tokenOf(t, second)
	other := r.repo(t, "other")
	for url, want := range map[string]int{
		"/repos/team/repo/git/commits/" + commit: http.StatusOK, "/repos/team/repo/pulls/1": http.StatusForbidden,
		"/repos/" + other.FullName() + "/git/commits/" + commit: http.StatusNotFound,
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, r.url+fake.API+url, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+text)
		resp, err := transport(t).RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s gives %d, want %d", url, resp.StatusCode, want)
		}
	}

	read(nil)
	r.RevokeTokens() // as an owner may
	read(nil)
	if err := r.ReportStatus(t.Context(), repo, commit, forge.Status{Key: "k", Version: 1, State: forge.StatusSuccess}); err != nil {
		t.Error(err)
	}
	r.RevokeTokens()
	if err := r.ReportStatus(t.Context(), repo, commit, forge.Status{Key: "k", Version: 2, State: forge.StatusFailure}); err != nil {
		t.Error(err)
	}
	r.Reinstall("team")
	read(forge.ErrUnavailable)
	read(nil)
	r.Faults.Add(fakeforge.Fault{Path: "/git/commits", Status: http.StatusUnauthorized, Times: 2})
	read(forge.ErrPermission)
}

func tokenOf(t *testing.T, c forge.Clone) string {
	t.Helper()
	raw, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(c.Header["Authorization"], "Basic "))
	_, text, ok := strings.Cut(string(raw), ":")
	if err != nil || !ok {
		t.Fatalf("credentials %q, %v", raw, err)
	}
	return text
}

// A login that changes hands between two questions gives nobody more than he has.
func TestLoginChangesHands(t *testing.T) {
	var r rig
	var swap func(path string)
	tr := transport(t)
	r = start(t, true, func(c *github.Config) {
		c.Transport = roundTrip(func(req *http.Request) (*http.Response, error) {
			resp, err := tr.RoundTrip(req)
			if swap != nil {
				swap(req.URL.Path)
			}
			return resp, err
		})
	})
	repo, _ := r.committed(t)
	r.SetUser(500, "login")
	r.SetUser(501, "owner")
	r.SetPermission(repo.FullName(), "owner", "admin")
	swap = func(path string) {
		if strings.HasSuffix(path, "/user/500") {
			r.SetUser(500, "former")
			r.SetUser(501, "login")
			r.SetPermission(repo.FullName(), "login", "admin")
		}
	}
	if ok, err := r.MayApprove(t.Context(), repo, forge.User{ID: "500", Login: "owner"}); ok || !errors.Is(err, forge.ErrUnavailable) {
		t.Errorf("%v, %v", ok, err)
	}
	swap = nil
	for id, want := range map[string]bool{"500": false, "501": true} {
		if ok, err := r.MayApprove(t.Context(), repo, forge.User{ID: id}); ok != want || err != nil {
			t.Errorf("user %s: %v, %v", id, ok, err)
		}
	}
}

func TestMergeCommitOfAnOlderHead(t *testing.T) {
	r := start(t, true, nil)
	repo, _ := r.committed(t)
	pr := r.pull(t, repo, map[string]forgetest.File{"a": {Content: "2"}})
	ask := func(want error) string {
		t.Helper()
		commit, err := r.MergeCommit(t.Context(), repo, pr)
		if !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
		return commit
	}
	ask(forge.ErrUnavailable)
	if merge := ask(nil); r.git(t, repo, "rev-parse", merge+"^2") != pr.HeadCommit {
		t.Error("the merge commit is of another head")
	}
	r.StaleMerges = true
	before := pr
	pr.HeadCommit = r.commit(t, repo, "topic", map[string]forgetest.File{"a": {Content: "3"}})
	ask(forge.ErrUnavailable)
	pr = before // the event is older than the pull request
	ask(forge.ErrUnavailable)
	r.ClosePull(repo.FullName(), pr.Number)
	pr.HeadCommit = r.git(t, repo, "rev-parse", "topic")
	ask(forge.ErrInvalid)
}

// Anybody can write what marks our comments.
func TestCommentOfAStranger(t *testing.T) {
	for _, app := range []bool{true, false} {
		r := start(t, app, nil)
		repo, _ := r.committed(t)
		pr := r.pull(t, repo, map[string]forgetest.File{"a": {Content: "2"}})
		if err := r.Comment(t.Context(), repo, pr.Number, "k", "ours"); err != nil {
			t.Fatal(err)
		}
		ours := r.Comments(repo.FullName(), pr.Number)[0]
		stranger := r.OpenPull(repo.FullName(), "topic", "main")
		r.AddComment(repo.FullName(), stranger, fake.User{ID: 77, Login: "stranger"}, ours.Body)
		if err := r.Comment(t.Context(), repo, stranger, "k", "ours, too"); err != nil {
			t.Fatal(err)
		}
		if all := r.Comments(repo.FullName(), stranger); len(all) != 2 || all[0].Body != ours.Body || !strings.HasSuffix(all[1].Body, "ours, too") {
			t.Errorf("%+v", all)
		}
	}
}

// Where a comparison or a tree is cut off that is not taken for all.
func TestChangedPathsOfManyFiles(t *testing.T) {
	r := start(t, false, nil)
	repo, first := r.committed(t)
	files := map[string]forgetest.File{"a": {Content: "1"}}
	for _, name := range []string{"b", "c/d", "e", "f"} {
		files[name] = forgetest.File{}
	}
	second := r.commit(t, repo, "main", files)
	check := func(base string, want string, cut bool) {
		t.Helper()
		got, truncated, err := r.ChangedPaths(t.Context(), repo, base, second, 100)
		if err != nil || truncated != cut || strings.Join(got, " ") != want {
			t.Errorf("%q, %v, %v, want %q, %v", got, truncated, err, want, cut)
		}
	}
	r.MaxFiles = 300
	check(first, "b c/d e f", false)
	r.git(t, repo, "branch", "unrelated", r.git(t, repo, "commit-tree", "-m", "unrelated", first+"^{tree}"))
	check(r.git(t, repo, "rev-parse", "unrelated"), "b c/d e f", false)
	r.MaxTree = 2
	check(strings.Repeat("0", 40), "a b", true)
}

func TestManyHeads(t *testing.T) {
	r := start(t, false, nil)
	repo, commit := r.committed(t)
	var all strings.Builder
	const n = 250
	for i := range n {
		all.WriteString("create refs/heads/many/" + strings.Repeat("x", i+1) + " " + commit + "\n")
	}
	if _, err := r.Repos.Git(t.Context(), repo.FullName(), all.String(), "update-ref", "--stdin"); err != nil {
		t.Fatal(err)
	}
	if heads, err := r.Heads(t.Context(), repo); err != nil || len(heads) != n+1 {
		t.Errorf("%d heads, %v", len(heads), err)
	}
}

func TestOpen(t *testing.T) {
	key, err := fake.AppKey()
	if err != nil {
		t.Fatal(err)
	}
	app := &github.App{ID: 1, Key: key}
	for name, c := range map[string]github.Config{
		"nobody": {}, "both": {App: app, Token: "t"}, "no key": {App: &github.App{ID: 1}}, "no ID": {App: &github.App{Key: key}},
		"no URL": {Token: "t", URL: "github.com"}, "password": {Token: "t", URL: "https://user:secret@github.com"}, "ftp": {Token: "t", URL: "ftp://x"},
	} {
		if _, err := github.New(c); !errors.Is(err, forge.ErrInvalid) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, tc := range []struct{ url, api, wantAPI, wantClone string }{
		{"", "", "https://api.github.com/repos/a/b", "https://github.com/a/b.git"},
		{"https://github.example.org/", "", "https://github.example.org/api/v3/repos/a/b", "https://github.example.org/a/b.git"},
		{"https://octo.ghe.com", "https://api.octo.ghe.com", "https://api.octo.ghe.com/repos/a/b", "https://octo.ghe.com/a/b.git"},
	} {
		asked := ""
		f, err := github.New(github.Config{URL: tc.url, APIURL: tc.api, Token: "t", Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
			asked = r.URL.String()
			return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Request: r, Body: io.NopCloser(strings.NewReader(`{"id":1}`))}, nil
		})})
		if err != nil {
			t.Fatal(err)
		}
		c, err := f.CloneInfo(t.Context(), forge.Repo{Owner: "a", Name: "b"}, forge.CloneOptions{})
		if err != nil || asked != tc.wantAPI || c.URL != tc.wantClone {
			t.Errorf("%+v: %v, asked %s, clone from %s", tc, err, asked, c.URL)
		}
	}
}

// Nothing but GitHub is connected to, whatever a payload or a redirect names.
func TestContained(t *testing.T) {
	for _, app := range []bool{true, false} {
		r := start(t, app, nil)
		repo, _ := r.committed(t)
		r.commit(t, r.repo(t, "fork"), "topic", map[string]forgetest.File{"a": {Content: "f"}})
		pr := r.pull(t, repo, map[string]forgetest.File{"a": {Content: "2"}})
		r.ChangePull(repo.FullName(), pr.Number, func(p *fake.Pull) { p.Fork = "team/fork" })
		payload := fake.PullRequest(r.url, repo.FullName(), "team/fork", "opened", pr.Number, "topic", pr.HeadCommit, "main", pr.BaseCommit, fake.User{ID: 66, Login: "mallory"})
		body, err := json.Marshal(payload)
		if err != nil {
			t.Fatal(err)
		}
		fakerig.Contained(t, fakerig.Contain{
			URL: r.url, Faults: &r.Faults, Body: body,
			Request: func(body, secret []byte) *http.Request { return webhook(t, "pull_request", body, secret) },
			New: func() forge.Forge {
				if app {
					return r.again(t)
				}
				f, err := github.New(github.Config{URL: r.url, Token: fake.Token})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = f.Close() })
				return f
			},
		})
	}
}
