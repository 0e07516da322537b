package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/forgetest"
	"github.com/solstice-ci/solstice-go/forge/remoteforge"
)

// asPlugin as the first argument makes the test's program the forge's.
const asPlugin = "bareforge"

func TestMain(m *testing.M) {
	// A hook is run with the arguments of create: without asPlugin.
	if len(os.Args) > 1 && (os.Args[1] == asPlugin || os.Args[1] == "hook") {
		args := os.Args[1:]
		if args[0] == asPlugin {
			args = args[1:]
		}
		if err := run(context.Background(), args, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "bareforge:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// push commits a file to a new clone and pushes it; it gives the commit and what git
// printed.
func push(t *testing.T, repo repository, content string, refs ...string) (commit, said string) {
	t.Helper()
	dir := t.TempDir()
	git := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("git", args...)
		cmd.Dir = dir
		cmd.Env = append([]string{
			"GIT_AUTHOR_NAME=A", "GIT_AUTHOR_EMAIL=a@example.org", "GIT_COMMITTER_NAME=A", "GIT_COMMITTER_EMAIL=a@example.org",
			"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*",
		}, environment...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("git %q: %v: %s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	git("clone", "-q", repo.dir, ".")
	git("checkout", "-q", "-B", "main")
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	git("add", "file")
	git("commit", "-q", "-m", "Say "+content)
	git("tag", "-a", "-m", "a tag", "v-"+content)
	return git("rev-parse", "HEAD"), git(append([]string{"push", "origin"}, refs...)...)
}

// TestPushToStatus is all of it: a repository of `init`, a push, its hook's webhooks at
// an orchestrator's side that knows the plugin only, and a status beside the commit.
func TestPushToStatus(t *testing.T) {
	t.Parallel()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	plugin, err := remoteforge.Start(t.Context(), remoteforge.Command{Argv: []string{exe, asPlugin, "serve", "--root", root}, Output: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	defer plugin.Close()
	events := make(chan forge.Event, 10)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		e, err := plugin.ParseWebhook(r.Context(), r, nil)
		if err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		events <- e
		w.WriteHeader(http.StatusAccepted)
	}))
	defer server.Close()
	verb := func(args ...string) string {
		t.Helper()
		out, err := exec.Command(exe, append([]string{asPlugin}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("bareforge %q: %v: %s", args, err, out)
		}
		return string(out)
	}
	verb("init", "--root", root, "--url", server.URL, "team/app")
	repo := repository{name: "team/app", dir: filepath.Join(root, "team", "app.git")}
	if info, err := os.Stat(repo.own("secret")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("its secret: %v, %v", info, err)
	}
	commit, _ := push(t, repo, "hello", "main", "v-hello")
	for _, want := range []forge.Event{{Kind: forge.KindPush, Ref: "refs/heads/main"}, {Kind: forge.KindTag, Ref: "refs/tags/v-hello"}} {
		e := <-events
		if e.Kind != want.Kind || e.Ref != want.Ref || e.Commit != commit || e.Title != "Say hello" || e.Repo.FullName() != "team/app" ||
			e.Sender.ID != fmt.Sprint(os.Getuid()) || e.Delivery == "" {
			t.Errorf("event %+v, want %+v of %s", e, want, commit)
		}
		content, err := plugin.ReadFile(t.Context(), e.Repo, e.Commit, "file")
		if err != nil || string(content) != "hello" {
			t.Errorf("its file: %q, %v", content, err)
		}
		if err := plugin.ReportStatus(t.Context(), e.Repo, e.Commit, forge.Status{
			Key: "ci/" + string(e.Kind), Version: 1, State: forge.StatusSuccess, Description: "all is well", TargetURL: "https://ci/1",
		}); err != nil {
			t.Error(err)
		}
	}
	if got := verb("statuses", "--root", root, "team/app", commit); got != "success    ci/push: all is well https://ci/1\nsuccess    ci/tag: all is well https://ci/1\n" {
		t.Errorf("statuses prints %q", got)
	}

	// What a hook cannot deliver is said to who pushes, who has pushed nevertheless.
	if err := os.WriteFile(repo.own("secret"), []byte("another one"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, said := push(t, repo, "again", "main"); strings.Contains(said, "403") { // the plugin reads it anew
		t.Errorf("a new secret: %s", said)
	}
	<-events
	server.Close()
	commit, said := push(t, repo, "later", "main")
	if !strings.Contains(said, "bareforge: ") {
		t.Errorf("git says %q", said)
	}
	heads, err := Open(root)
	if err != nil {
		t.Fatal(err)
	}
	if all, err := heads.Heads(t.Context(), forge.Repo{Owner: "team", Name: "app"}); err != nil || all["refs/heads/main"] != commit {
		t.Errorf("a webhook that never came is found by its head: %v, %v", all, err)
	}
}

// TestForged: a webhook of a repository that is not there, or is signed with another
// one's secret, is not believed.
func TestForged(t *testing.T) {
	t.Parallel()
	f, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"team/app", "other"} {
		if err := f.create(t.Context(), name, "http://localhost", "/bin/true"); err != nil {
			t.Fatal(err)
		}
	}
	other, err := f.Secret(t.Context(), "other")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"team/app", "absent", "../other", "", "team"} {
		body := fmt.Appendf(nil, `{"event":"ping","repo":%q}`, name)
		if _, err := f.ParseWebhook(t.Context(), request(t, "", body, other), f.Secret); !errors.Is(err, forge.ErrSignature) {
			t.Errorf("%q with the secret of another: %v", name, err)
		}
	}
	if err := f.create(t.Context(), "other", "http://localhost", "/bin/true"); !errors.Is(err, forge.ErrInvalid) {
		t.Errorf("the same again: %v", err)
	}
	if again, err := f.Secret(t.Context(), "other"); err != nil || !bytes.Equal(again, other) {
		t.Errorf("the secret is another: %v", err)
	}
}

// TestRootIsNotLeft: neither links nor names lead out of the root, or into a
// repository.
func TestRootIsNotLeft(t *testing.T) {
	t.Parallel()
	outside, root := t.TempDir(), t.TempDir()
	forgetest.Git{Dir: filepath.Join(outside, "secret.git")}.Init(t)
	inside := forgetest.Git{Dir: filepath.Join(root, "app.git")}
	inside.Init(t)
	commit := inside.Commit(t, "main", map[string]forgetest.File{"a": {}})
	for _, branch := range []string{"x.git/HEAD", "x.git/objects", "x.git/refs"} { // looks like one
		inside.Run(t, "", "branch", "--", branch, commit)
	}
	if err := errors.Join(os.Symlink(outside, filepath.Join(root, "link")), os.Symlink(filepath.Join(outside, "secret.git"), filepath.Join(root, "direct.git"))); err != nil {
		t.Fatal(err)
	}
	f, err := Open(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []forge.Repo{{Owner: "link", Name: "secret"}, {Name: "direct"}, {Owner: "app.git/refs/heads", Name: "x"}} {
		if c, err := f.CloneInfo(t.Context(), r, forge.CloneOptions{}); err == nil {
			t.Errorf("%s leads to %s", r.FullName(), c.Dir)
		}
	}
}

// TestKilled: a plugin that is killed while it reports leaves no half of a status, and
// the next one goes on.
func TestKilled(t *testing.T) {
	t.Parallel()
	x := over(t.TempDir())
	r := forge.Repo{Name: "app"}
	x.git(r).Init(t)
	commit := x.git(r).Commit(t, "main", map[string]forgetest.File{"a": {}})
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	people, err := Open(x.root)
	if err != nil {
		t.Fatal(err)
	}
	for round := range int64(3) {
		cmd := exec.Command(exe, asPlugin, "serve", "--root", x.root, "--listen", "unix:"+filepath.Join(x.root, "s"))
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		f, err := remoteforge.Open(t.Context(), remoteforge.Config{Target: "unix:" + filepath.Join(x.root, "s")})
		if err != nil {
			t.Fatal(err)
		}
		var reported int64
		for v := round*1000 + 1; err == nil; v++ {
			if err = f.ReportStatus(t.Context(), r, commit, forge.Status{Key: "ci", Version: v, State: forge.StatusRunning}); err != nil {
				break
			}
			if reported == 0 { // from now on, anywhere
				go func() { _ = cmd.Process.Kill() }()
			}
			reported = v
		}
		if !errors.Is(err, forge.ErrUnavailable) {
			t.Errorf("killed: %v", err)
		}
		_ = cmd.Wait()
		_ = f.Close()
		all, err := people.Statuses(t.Context(), r, commit)
		if err != nil || len(all) != 1 || all[0].Version < reported {
			t.Errorf("reported was %d, there is %+v, %v", reported, all, err)
		}
	}
}
