package agent_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
	"github.com/solstice-ci/solstice-go/internal/gitserve"
	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
)

// repo is a repository with three commits on main, the second one tagged.
type repo struct {
	dir     string
	commits []string
}

func git(t testing.TB, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", append([]string{
		"-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "init.defaultBranch=main", "-c", "commit.gpgSign=false",
		"-c", "protocol.file.allow=always",
	}, args...)...)
	cmd.Dir = dir
	cmd.Env = []string{"PATH=/usr/local/bin:/usr/bin:/bin", "HOME=/nonexistent", "GIT_CONFIG_NOSYSTEM=1"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func makeRepo(t testing.TB) *repo {
	t.Helper()
	if _, err := exec.LookPath("git"); err != nil {
		t.Fatal("the project needs git to be tested")
	}
	r := &repo{dir: t.TempDir()}
	git(t, r.dir, "init", "-q")
	for i := range 3 {
		must(t, os.WriteFile(filepath.Join(r.dir, "file"), fmt.Appendf(nil, "version %d\n", i), 0o600))
		must(t, os.WriteFile(filepath.Join(r.dir, "tool.sh"), []byte("#!/bin/sh\necho tool\n"), 0o755))
		if i == 0 {
			must(t, os.Symlink("file", filepath.Join(r.dir, "link")))
			must(t, os.MkdirAll(filepath.Join(r.dir, "deep", "er"), 0o755))
			must(t, os.WriteFile(filepath.Join(r.dir, "deep", "er", "x"), []byte("x"), 0o600))
		}
		git(t, r.dir, "add", "-A")
		git(t, r.dir, "commit", "-qm", fmt.Sprintf("commit %d", i))
		r.commits = append(r.commits, git(t, r.dir, "rev-parse", "HEAD"))
	}
	git(t, r.dir, "tag", "v1", r.commits[1])
	return r
}

// serve is the endpoint's side, as the engine has it.
func (r *repo) serve(t *testing.T, commit string) http.Handler {
	t.Helper()
	g, err := gitcmd.Find(t.Context())
	must(t, err)
	h, err := gitserve.New(gitserve.Config{
		Git: g, Logger: testLogger(t),
		Authorize: func(_ context.Context, _ *http.Request, attempt string) (gitserve.Source, error) {
			if attempt != testAttempt {
				return gitserve.Source{}, fmt.Errorf("attempt %q", attempt)
			}
			return gitserve.Source{Clone: forge.Clone{Dir: r.dir}, Commit: commit}, nil
		},
	})
	must(t, err)
	return h
}

// checkoutJob checks out a commit and then runs a script.
func checkoutJob(commit string, depth int32, run string) *agentv1.JobSpec {
	j := jobOf(&agentv1.Step{Kind: agentv1.StepKind_STEP_KIND_CHECKOUT, Name: "checkout"}, script(run))
	j.Source.Commit = commit
	j.Checkout = &agentv1.Checkout{Depth: depth}
	return j
}

// noGit is a search path without git.
func noGit(t *testing.T) map[string]string {
	bin := t.TempDir()
	for _, tool := range []string{"sh", "cat", "ls", "readlink"} {
		exe, err := exec.LookPath(tool)
		must(t, err)
		must(t, os.Symlink(exe, filepath.Join(bin, tool)))
	}
	return map[string]string{"PATH": bin}
}

func TestCheckoutGit(t *testing.T) {
	r := makeRepo(t)
	for name, c := range map[string]struct {
		commit int
		ref    string
		depth  int32
		run    string
		want   string
	}{
		"shallow": {
			1, "refs/heads/main", 1,
			`cat file; ./tool.sh; cat link; git rev-list --count HEAD; git remote get-url origin; git rev-parse origin/main; git symbolic-ref -q HEAD || echo detached`,
			"version 1\ntool\nversion 1\n1\nhttps://example.org/repo\n" + r.commits[1] + "\ndetached\n",
		},
		"two commits": {2, "", 2, "git rev-list --count HEAD", "2\n"},
		"tag":         {1, "refs/tags/v1", 1, "git describe --tags", "v1\n"},
		"whole history": {
			2, "refs/heads/main", 0, "git rev-list --count HEAD; git describe --tags; git rev-parse origin/main",
			"3\nv1-1-g" + r.commits[2][:7] + "\n" + r.commits[2] + "\n",
		},
		"pull request": {2, "refs/pull/7/head", 1, "git rev-parse refs/remotes/pull/7/head", r.commits[2] + "\n"},
		"no secrets":   {2, "", 1, "! grep -r " + testCredential + " .git && echo clean", "clean\n"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			s.source = r.serve(t, r.commits[c.commit])
			s.spec = checkoutJob(r.commits[c.commit], c.depth, c.run)
			s.spec.Source.Ref = c.ref
			checkResult(t, s.run(), succeeded, classNone)
			if !strings.HasSuffix(s.logText(), c.want) {
				t.Errorf("log:\n%s\nwant at its end:\n%s", s.logText(), c.want)
			}
		})
	}
}

func TestCheckoutTar(t *testing.T) {
	r := makeRepo(t)
	s := newServer(t)
	s.source = r.serve(t, r.commits[1])
	s.spec = checkoutJob(r.commits[1], 1, "cat file; ./tool.sh; readlink link; cat deep/er/x; ls -A")
	cfg := s.config()
	cfg.Env = noGit(t)
	must(t, s.runConfig(cfg))
	checkResult(t, s.verdict(), succeeded, classNone)
	if want := "version 1\ntool\nfile\nxdeep\nfile\nlink\ntool.sh\n"; !strings.HasSuffix(s.logText(), want) {
		t.Errorf("log:\n%s", s.logText())
	}
}

func TestCheckoutFailures(t *testing.T) {
	r := makeRepo(t)
	missing := strings.Repeat("1", 40)
	gone := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusBadGateway) })
	redirect := http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		http.Redirect(w, q, "https://example.org/", http.StatusFound)
	})
	short := http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		// The beginning of an honest answer, then nothing.
		rec := httptest.NewRecorder()
		r.serve(t, r.commits[2]).ServeHTTP(rec, q)
		w.Header().Set("Content-Type", rec.Header().Get("Content-Type"))
		if b := rec.Body.Bytes(); len(b) > 600 {
			_, _ = w.Write(b[:600])
			panic(http.ErrAbortHandler)
		}
		_, _ = io.Copy(w, rec.Body)
	})
	for name, c := range map[string]struct {
		source http.Handler
		commit string
		change func(*agentv1.JobSpec)
		tar    bool
		class  agentv1.FailureClass
		reason string
	}{
		"missing commit":      {r.serve(t, missing), missing, nil, false, classUser, missing},
		"missing commit, tar": {r.serve(t, missing), missing, nil, true, classUser, missing},
		"endpoint fails":      {gone, r.commits[2], nil, false, classInfra, "502"},
		"endpoint fails, tar": {gone, r.commits[2], nil, true, classInfra, "502"},
		"redirect":            {redirect, r.commits[2], nil, false, classInfra, "302"},
		"redirect, tar":       {redirect, r.commits[2], nil, true, classInfra, "302"},
		"broken answer, tar":  {short, r.commits[2], nil, true, classInfra, "EOF"},
		"wrong commit, tar":   {r.serve(t, r.commits[1]), r.commits[2], nil, true, classInfra, r.commits[1]},
		"option as commit":    {nil, "--upload-pack=touch /tmp/x", nil, false, classUser, "object name"},
		"short commit":        {nil, r.commits[2][:10], nil, false, classUser, "object name"},
		"option as ref":       {nil, r.commits[2], func(j *agentv1.JobSpec) { j.Source.Ref = "--output=x" }, false, classUser, "ref"},
		"ref with refspec":    {nil, r.commits[2], func(j *agentv1.JobSpec) { j.Source.Ref = "refs/heads/a:refs/heads/b" }, false, classUser, "ref"},
		"ref leaves":          {nil, r.commits[2], func(j *agentv1.JobSpec) { j.Source.Ref = "refs/heads/../../x" }, false, classUser, "ref"},
		"path leaves":         {nil, r.commits[2], func(j *agentv1.JobSpec) { j.Source.Path = "/git/../enroll" }, false, classUser, "path"},
		"path with query":     {nil, r.commits[2], func(j *agentv1.JobSpec) { j.Source.Path = "/git/a?b" }, false, classUser, "path"},
		"other attempt":       {r.serve(t, r.commits[2]), r.commits[2], func(j *agentv1.JobSpec) { j.Source.Path = "/git/attempt-2" }, false, classInfra, "404"},
		"submodules, no git":  {nil, r.commits[2], func(j *agentv1.JobSpec) { j.Checkout.Submodules = true }, true, classUser, "need git"},
		"lfs where it lacks":  {r.serve(t, r.commits[2]), r.commits[2], func(j *agentv1.JobSpec) { j.Checkout.Lfs = true }, false, classUser, "git-lfs"},
		"negative depth":      {nil, r.commits[2], func(j *agentv1.JobSpec) { j.Checkout.Depth = -1 }, false, classUser, "depth"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := exec.LookPath("git-lfs"); err == nil && strings.HasPrefix(name, "lfs") {
				t.Log("git-lfs is installed: its absence cannot be tried")
				return
			}
			s := newServer(t)
			s.source = c.source
			s.spec = checkoutJob(c.commit, 1, "echo unwanted")
			if c.change != nil {
				c.change(s.spec)
			}
			cfg := s.config()
			cfg.SetSourceTries(1)
			if c.tar {
				cfg.Env = noGit(t)
			}
			must(t, s.runConfig(cfg))
			f := s.verdict()
			checkResult(t, f, failed, c.class)
			if !strings.Contains(f.GetReason(), c.reason) {
				t.Errorf("reason %q, want it to say %q", f.GetReason(), c.reason)
			}
			if !strings.Contains(s.logText(), "[solstice] checkout failed") || strings.Contains(s.logText(), "unwanted") {
				t.Errorf("log: %s", s.logText())
			}
		})
	}
}

// TestCheckoutLFSRefused: large files that their server does not give fail the
// checkout, which says where they were to come from.
func TestCheckoutLFSRefused(t *testing.T) {
	r := makeRepo(t)
	s := newServer(t)
	s.source = r.serve(t, r.commits[2])
	s.spec = checkoutJob(r.commits[2], 1, "echo unwanted")
	s.spec.Checkout.Lfs = true
	s.spec.Source.RepoUrl = "https://forge.example/o/r"
	cfg := s.config()
	bin := noGit(t)["PATH"]
	git, err := exec.LookPath("git")
	must(t, err)
	must(t, os.Symlink(git, filepath.Join(bin, "git")))
	refuses := "#!/bin/sh\n[ \"$1\" != pull ] || { echo 'Authentication required' >&2; exit 2; }\n"
	must(t, os.WriteFile(filepath.Join(bin, "git-lfs"), []byte(refuses), 0o755))
	cfg.Env = map[string]string{"PATH": bin}
	must(t, s.runConfig(cfg))
	f := s.verdict()
	checkResult(t, f, failed, classUser)
	for _, want := range []string{"large files", "https://forge.example/o/r", "without credentials", "Authentication required"} {
		if !strings.Contains(f.GetReason(), want) {
			t.Errorf("reason %q does not say %q", f.GetReason(), want)
		}
	}
}

// TestCheckoutRetries: an endpoint that is away for a moment costs a moment.
func TestCheckoutRetries(t *testing.T) {
	r := makeRepo(t)
	var calls atomic.Int32
	s := newServer(t)
	honest := r.serve(t, r.commits[2])
	s.source = http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if calls.Add(1) == 1 {
			http.Error(w, "starting", http.StatusServiceUnavailable)
			return
		}
		honest.ServeHTTP(w, q)
	})
	s.spec = checkoutJob(r.commits[2], 1, "cat file")
	checkResult(t, s.run(), succeeded, classNone)
	if !strings.Contains(s.logText(), "trying again") {
		t.Errorf("log: %s", s.logText())
	}
}

// TestCheckoutCancelled: a source that never comes does not hold up a cancel.
func TestCheckoutCancelled(t *testing.T) {
	r := makeRepo(t)
	s := newServer(t)
	asked := make(chan struct{})
	var once atomic.Bool
	s.source = http.HandlerFunc(func(_ http.ResponseWriter, q *http.Request) {
		if once.CompareAndSwap(false, true) {
			close(asked)
		}
		<-q.Context().Done()
	})
	s.onStart = func(ses *session) {
		go func() {
			<-asked
			ses.cancel(0, "changed my mind")
		}()
	}
	s.spec = checkoutJob(r.commits[2], 1, "echo unwanted")
	checkResult(t, s.run(), cancelled, classCancelled)
	checkSteps(t, s, cancelled, skipped)
}

// TestCheckoutSubmodules: a submodule comes from where .gitmodules says.
func TestCheckoutSubmodules(t *testing.T) {
	sub := makeRepo(t)
	h := sub.serve(t, sub.commits[2])
	web := httptest.NewServer(h)
	defer web.Close()
	r := makeRepo(t)
	git(t, r.dir, "submodule", "--quiet", "add", sub.dir, "lib")
	git(t, r.dir, "config", "-f", ".gitmodules", "submodule.lib.url", web.URL+"/git/"+testAttempt)
	git(t, r.dir, "commit", "-qam", "submodule")
	head := git(t, r.dir, "rev-parse", "HEAD")

	s := newServer(t)
	s.source = r.serve(t, head)
	s.spec = checkoutJob(head, 1, "cat lib/file")
	s.spec.Checkout.Submodules = true
	checkResult(t, s.run(), succeeded, classNone)
	if !strings.HasSuffix(s.logText(), "version 2\n") {
		t.Errorf("log: %s", s.logText())
	}

	// What git has to say is in the log once; the reason is its last line.
	git(t, r.dir, "config", "-f", ".gitmodules", "submodule.lib.url", web.URL+"/git/nothing")
	git(t, r.dir, "commit", "-qam", "wrong")
	head = git(t, r.dir, "rev-parse", "HEAD")
	s = newServer(t)
	s.source = r.serve(t, head)
	s.spec = checkoutJob(head, 1, "true")
	s.spec.Checkout.Submodules = true
	f := s.run()
	checkResult(t, f, failed, classUser)
	if why := f.GetReason(); !strings.Contains(why, "git submodule: exit status") || strings.Contains(why, "\n") {
		t.Errorf("reason %q", why)
	}
}
