package runpages_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/blobstore/memblob"
	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/queue/memqueue"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/runpages"
	"github.com/solstice-ci/solstice-go/vmprovider/processvm"
)

func TestMain(m *testing.M) {
	agent.Hook()
	os.Exit(m.Run())
}

// workflow has a job that prints what could harm, and waits until it may end; one that
// fails; and one that no pool takes.
const hostile = `name: <script>alert(1)</script>
on: push
checkout: false
jobs:
  prints:
    steps:
      - run: |
          printf '\033]0;title\007<img src=x onerror=alert(1)>\033[31mred\033[0m\n'
          printf 'second\n'
          while ! [ -e %q ]; do sleep 0.05; done
          printf 'last'
  fails:
    steps:
      - run: exit 3
  waits:
    runs-on: nowhere
    steps:
      - run: "true"
`

func open(t *testing.T, db *bun.DB, url string) *runpages.Pages {
	t.Helper()
	p, err := runpages.Open(t.Context(), db, runpages.Config{URL: url, MaxRequests: 3})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func get(t *testing.T, url string) (*http.Response, string) {
	t.Helper()
	resp := begin(t, url)
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

// begin leaves the body to be read.
func begin(t *testing.T, url string) *http.Response {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = resp.Body.Close() })
	return resp
}

func TestPages(t *testing.T) {
	dir := t.TempDir()
	gate := filepath.Join(dir, "gate")
	work := filepath.Join(dir, "work")
	script := "git init -q -b main && mkdir .solstice && printf '" + strings.NewReplacer("'", `'\''`, "%q", gate, `\`, `\\`).Replace(hostile) +
		"' >.solstice/workflow.yaml && git add . && git -c user.name=n -c user.email=e commit -qm first"
	if err := os.MkdirAll(work, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "sh", "-c", script)
	cmd.Dir = work
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	db, err := sqldb.Open(t.Context(), "sqlite:"+filepath.Join(dir, "s.db"), sqldb.Options{PoolTimeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	if err := solstice.Migrate(t.Context(), db); err != nil {
		t.Fatal(err)
	}
	repo, err := localgit.Open(t.Context(), localgit.Config{Dir: work, Name: "repo", StatusDir: filepath.Join(dir, "statuses")})
	if err != nil {
		t.Fatal(err)
	}
	machines, err := processvm.New(processvm.Config{Root: filepath.Join(dir, "machines"), Command: agent.Command(), StepEnv: map[string]string{"PATH": "/usr/bin:/bin"}})
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	web := httptest.NewServer(mux)
	t.Cleanup(web.Close)
	pages := open(t, db, web.URL+"/")
	eng, err := solstice.New(solstice.Config{
		DB: db, Queue: memqueue.New(), Blobs: memblob.New(), TargetURL: pages.URL,
		Pools:  []solstice.Pool{{Labels: []string{solstice.DefaultLabel}, Provider: machines}},
		Forges: map[string]forge.Forge{"local": repo},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- eng.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := errors.Join(<-ended, machines.Close(), repo.Close()); err != nil {
			t.Error(err)
		}
	})
	following, stopFollowing := context.WithCancel(t.Context())
	mux.Handle("/runs/", pages.Handler(following, eng))

	runs, err := eng.Submit(ctx, solstice.RunRequest{Repo: forge.Repo{Name: "repo", URL: "javascript:alert(1)"}, Ref: "refs/heads/main", Event: forge.Event{Kind: forge.KindPush}})
	if err != nil || len(runs) != 1 || len(runs[0].Jobs) != 3 {
		t.Fatalf("runs %+v, %v", runs, err)
	}
	run, jobs := runs[0], map[string]solstice.Job{}
	for _, j := range run.Jobs {
		jobs[j.Key] = j
	}
	finished := func(key string) {
		t.Helper()
		for r, err := range eng.Watch(ctx, run.ID) {
			if err != nil {
				t.Fatal(err)
			}
			for _, j := range r.Jobs {
				if j.Key == key && j.State.Terminal() {
					return
				}
			}
		}
	}

	// A log is followed while it grows.
	log := begin(t, pages.URL(run.ID, jobs["prints"].ID))
	var first []byte
	for piece := make([]byte, 512); !strings.HasSuffix(string(first), "second\n"); {
		n, err := log.Body.Read(piece)
		if first = append(first, piece[:n]...); err != nil {
			t.Fatalf("log begins %q, %v", first, err)
		}
	}
	if string(first) != "<img src=x onerror=alert(1)>red\nsecond\n" {
		t.Errorf("log begins %q", first)
	}
	if log.Header.Get("Content-Type") != "text/plain; charset=utf-8" || log.Header.Get("X-Content-Type-Options") != "nosniff" || log.Header.Get("Referrer-Policy") != "no-referrer" {
		t.Errorf("headers %v", log.Header)
	}
	finished("fails")
	resp, page := get(t, pages.URL(run.ID, ""))
	for _, want := range []string{
		`<meta http-equiv="refresh"`, "&lt;script&gt;", jobs["prints"].ID, `<td class="failed">failed</td>`, `class="queued"`, "#ZgotmplZ",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("page has no %s", want)
		}
	}
	if strings.Contains(page, "<script>") || strings.Contains(page, "javascript:") || strings.Contains(page, "/"+jobs["waits"].ID) {
		t.Errorf("page %s", page)
	}
	if csp := resp.Header.Get("Content-Security-Policy"); resp.StatusCode != http.StatusOK || !strings.HasPrefix(csp, "default-src 'none'; style-src 'sha256-") {
		t.Errorf("page: %s, policy %q", resp.Status, csp)
	}
	if _, body := get(t, pages.URL(run.ID, jobs["fails"].ID)); !strings.Contains(body, "=== failed") {
		t.Errorf("log of what failed: %q", body)
	}

	// A key is one run's.
	good := pages.URL(run.ID, "")
	other := strings.Replace(pages.URL("00000000-0000-7000-8000-000000000000", ""), "00000000-0000-7000-8000-000000000000", run.ID, 1)
	for _, u := range []string{
		other, good[:len(good)-1], good + "A", web.URL + "/runs/" + run.ID, web.URL + "/runs/" + run.ID + "/", pages.URL("nothing", ""), good + "/nothing",
		web.URL + "/runs/" + run.ID + "/" + "/" + jobs["fails"].ID, strings.Replace(pages.URL("x", jobs["fails"].ID), "/x/", "/"+run.ID+"/", 1),
		pages.URL("x", jobs["fails"].ID),
	} {
		if resp, _ := get(t, u); resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %s", u, resp.Status)
		}
	}
	if resp, err := http.Post(good, "text/plain", strings.NewReader("x")); err != nil || resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %v, %v", resp.Status, err)
	} else {
		_ = resp.Body.Close()
	}
	if again := open(t, db, web.URL); again.URL(run.ID, "") != good {
		t.Error("another process on the same database makes other links")
	}

	// More than its share gets nobody, but comes again.
	waiting := []*http.Response{begin(t, pages.URL(run.ID, jobs["waits"].ID)), begin(t, pages.URL(run.ID, jobs["waits"].ID))}
	if resp, _ := get(t, good); resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
		t.Errorf("the fourth at once: %s", resp.Status)
	}
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(log.Body); err != nil || !strings.HasPrefix(string(rest), "last\n") || !strings.HasSuffix(string(rest), "\n=== succeeded ===\n") {
		t.Errorf("log ends %q, %v", rest, err)
	}
	stopFollowing() // as a server does that stops
	for _, w := range waiting {
		if _, err := io.ReadAll(w.Body); err != nil {
			t.Error(err)
		}
	}
}

func TestConfig(t *testing.T) {
	for _, u := range []string{"", "ci.example.org", "ftp://x", "https://", "https://u:p@x", "https://x?a", "https://x#a", "https://x\n"} {
		if _, err := runpages.Open(t.Context(), nil, runpages.Config{URL: u}); !errors.Is(err, runpages.ErrInvalid) {
			t.Errorf("%q: %v", u, err)
		}
	}
}
