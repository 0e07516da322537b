package localgit_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
)

// pusher is a work tree, and the repository that it pushes to, whose hook writes
// down what it gets.
type pusher struct {
	t    *testing.T
	root string
	bare string // root/team/app.git
	work string
	lore string // what the hook wrote
}

// git runs as a person would, hooks and all.
func (p *pusher) git(args ...string) string {
	p.t.Helper()
	out, err := p.try(args...)
	if err != nil {
		p.t.Fatalf("git %q: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(out)
}

func (p *pusher) try(args ...string) (string, error) {
	cmd := exec.CommandContext(p.t.Context(), "git", append([]string{"-c", "user.name=Ann Ö", "-c", "user.email=ann@example.org"}, args...)...)
	cmd.Dir, cmd.Env = p.work, []string{"HOME=" + p.root, "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=" + os.DevNull}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func newPusher(t *testing.T, format string) *pusher {
	t.Helper()
	root := t.TempDir()
	p := &pusher{t: t, root: root, bare: filepath.Join(root, "team", "app.git"), work: filepath.Join(root, "work"), lore: filepath.Join(root, "it's lore")}
	if err := os.Mkdir(p.work, 0o755); err != nil {
		t.Fatal(err)
	}
	p.git("init", "-q", "-b", "main", "--object-format="+format)
	p.git("init", "-q", "--bare", "-b", "main", "--object-format="+format, p.bare)
	p.git("remote", "add", "origin", p.bare)
	p.install()
	return p
}

func (p *pusher) command() []string {
	return []string{"/bin/sh", "-c", `pwd >"$1"; cat >>"$1"`, "hook", p.lore}
}

func (p *pusher) install() string {
	p.t.Helper()
	path, err := localgit.InstallHook(p.t.Context(), p.bare, localgit.HookOptions{Command: p.command()})
	if err != nil {
		p.t.Fatal(err)
	}
	return path
}

// push pushes, and gives what the hook makes of it where it was run.
func (p *pusher) push(o localgit.PostReceiveOptions, args ...string) localgit.Push {
	p.t.Helper()
	p.git(append([]string{"push", "-q", "origin"}, args...)...)
	data, err := os.ReadFile(p.lore)
	if err != nil {
		p.t.Fatalf("the hook was not run: %v", err)
	}
	if err := os.Remove(p.lore); err != nil {
		p.t.Fatal(err)
	}
	dir, lines, _ := strings.Cut(string(data), "\n")
	if o.Root == "" {
		o.Root = p.root
	}
	got, err := localgit.PostReceive(p.t.Context(), dir, strings.NewReader(lines), o)
	if err != nil {
		p.t.Fatal(err)
	}
	for _, e := range got.Events {
		if err := e.Validate(); err != nil || time.Since(e.Time) > time.Hour {
			p.t.Errorf("%+v: %v", e, err)
		}
	}
	return got
}

func (p *pusher) commit(message string) string {
	p.t.Helper()
	p.git("commit", "-q", "--allow-empty", "-m", message)
	return p.git("rev-parse", "HEAD")
}

func TestPostReceive(t *testing.T) {
	for _, format := range []string{"sha1", "sha256"} {
		t.Run(format, func(t *testing.T) {
			t.Parallel()
			p := newPusher(t, format)
			one := func(args ...string) forge.Event {
				t.Helper()
				got := p.push(localgit.PostReceiveOptions{}, args...)
				if len(got.Events) != 1 || got.More != 0 || len(got.Ignored) != 0 {
					t.Fatalf("push %q: %+v", args, got)
				}
				return got.Events[0]
			}
			nothing := func(args ...string) {
				t.Helper()
				if got := p.push(localgit.PostReceiveOptions{}, args...); len(got.Events) != 0 || len(got.Ignored) != 0 {
					t.Errorf("push %q: %+v", args, got)
				}
			}
			a := p.commit("Begin\n\nAt the beginning.")
			e := one("main")
			repo := forge.Repo{Owner: "team", Name: "app.git", DefaultBranch: "main"}
			if e.Kind != forge.KindPush || e.Ref != "refs/heads/main" || e.Commit != a || strings.Trim(e.Before, "0") != "" || len(e.Before) != len(a) ||
				e.Title != "Begin" || e.Message != "Begin\n\nAt the beginning.\n" || e.Sender != (forge.User{Login: "Ann Ö"}) || e.Repo != repo || e.ChangedPaths != nil {
				t.Errorf("a new branch: %+v", e)
			}
			b := p.commit("Go on")
			if e := one("main"); e.Before != a || e.Commit != b {
				t.Errorf("more on it: %+v", e)
			}
			p.git("reset", "-q", "--hard", a)
			c := p.commit("Another way")
			if e := one("--force", "main"); e.Before != b || e.Commit != c {
				t.Errorf("with force: %+v", e)
			}
			p.git("tag", "light", a)
			p.git("tag", "-a", "-m", "the tag's", "heavy", b)
			p.git("tag", "-a", "-m", "of a tag", "twice", "heavy")
			for tag, commit := range map[string]string{"light": a, "heavy": b, "twice": b} {
				if e := one(tag); e.Kind != forge.KindTag || e.Ref != "refs/tags/"+tag || e.Commit != commit || e.Title == "the tag's" {
					t.Errorf("tag %s: %+v", tag, e)
				}
			}
			p.git("tag", "tree", "HEAD^{tree}")
			if got := p.push(localgit.PostReceiveOptions{}, "tree"); len(got.Events) != 0 || len(got.Ignored) != 1 || !strings.Contains(got.Ignored[0], `"refs/tags/tree"`) {
				t.Errorf("a tag of a tree: %+v", got)
			}
			nothing("--delete", "light")
			nothing("main:refs/notes/x")
			// Several at once, and one goes.
			p.git("branch", "topic")
			if got := p.push(localgit.PostReceiveOptions{}, "topic", "main:other", ":heavy"); len(got.Events) != 2 || got.More != 0 {
				t.Errorf("several: %+v", got)
			}
			// The same commits on the same branch again are a push of their own.
			one("--force", b+":main")
			one("--force", c+":main")
		})
	}
}

// Names that git takes, and more refs than anybody wants runs of.
func TestPostReceiveHostile(t *testing.T) {
	p := newPusher(t, "sha1")
	p.commit("x")
	names := []string{"$(touch>pwned)", "a;b", "-x", "'quoted'", `"`, "&&", "ünïcode", "<b>", strings.Repeat("long/", 50) + "x"}
	var specs []string
	for _, n := range names {
		specs = append(specs, "main:refs/heads/"+n)
	}
	got := p.push(localgit.PostReceiveOptions{}, append(specs, "main:refs/heads/latin\xff")...)
	if len(got.Events) != len(names) || len(got.Ignored) != 1 || !strings.Contains(got.Ignored[0], `latin\xff`) {
		t.Errorf("%d events, ignored %q", len(got.Events), got.Ignored)
	}
	for _, e := range got.Events {
		if !slices.Contains(names, strings.TrimPrefix(e.Ref, "refs/heads/")) {
			t.Errorf("%+v", e)
		}
	}
	var refs strings.Builder
	for i := range 2000 {
		fmt.Fprintf(&refs, "create refs/heads/many/%d HEAD\n", i)
	}
	gitIn(t, p.work)(refs.String(), "update-ref", "--stdin")
	if got := p.push(localgit.PostReceiveOptions{MaxEvents: 7}, "refs/heads/many/*"); len(got.Events) != 7 || got.More != 1993 {
		t.Errorf("%d events, %d more", len(got.Events), got.More)
	}

	if _, err := localgit.PostReceive(t.Context(), p.bare, strings.NewReader(""), localgit.PostReceiveOptions{Root: p.work}); !errors.Is(err, forge.ErrInvalid) {
		t.Errorf("outside of the root: %v", err)
	}
	if _, err := localgit.PostReceive(t.Context(), t.TempDir(), strings.NewReader(""), localgit.PostReceiveOptions{}); !errors.Is(err, forge.ErrNotFound) {
		t.Errorf("no repository: %v", err)
	}
	if _, err := localgit.PostReceive(t.Context(), p.bare, strings.NewReader("main\n"), localgit.PostReceiveOptions{}); !errors.Is(err, forge.ErrInvalid) {
		t.Errorf("not git's: %v", err)
	}
}

func TestInstallHook(t *testing.T) {
	p := newPusher(t, "sha1")
	path := p.install() // again
	if path != filepath.Join(p.bare, "hooks", "post-receive") {
		t.Errorf("at %s", path)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", st, err)
	}
	if left, err := filepath.Glob(filepath.Join(p.bare, "hooks", ".post-receive-*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	// Where the repository says that its hooks are.
	for _, dir := range []string{"own", filepath.Join(p.root, "shared hooks")} {
		p.git("--git-dir", p.bare, "config", "core.hooksPath", dir)
		want := filepath.Join(dir, "post-receive")
		if !filepath.IsAbs(dir) {
			want = filepath.Join(p.bare, want)
		}
		if at := p.install(); at != want {
			t.Errorf("core.hooksPath %s: at %s", dir, at)
		}
		p.commit("x")
		p.push(localgit.PostReceiveOptions{}, "main")
	}
	p.git("--git-dir", p.bare, "config", "core.hooksPath", "~/hooks")
	if at, err := localgit.InstallHook(t.Context(), p.bare, localgit.HookOptions{Command: p.command()}); !errors.Is(err, forge.ErrInvalid) {
		t.Errorf("everybody's own: %s, %v", at, err)
	}
	p.git("--git-dir", p.bare, "config", "--unset", "core.hooksPath")

	// What somebody else put there stays.
	for name, put := range map[string]func() error{
		"a file": func() error { return os.WriteFile(path, []byte("#!/bin/sh\necho mine\n"), 0o755) },
		"a link": func() error { return os.Symlink("elsewhere", path) },
	} {
		if err := errors.Join(os.Remove(path), put()); err != nil {
			t.Fatal(err)
		}
		before, _ := os.Lstat(path)
		_, err := localgit.InstallHook(t.Context(), p.bare, localgit.HookOptions{Command: []string{"/usr/bin/it's", "a b"}})
		foreign, ok := errors.AsType[*localgit.HookError](err)
		if !ok || foreign.Path != path || foreign.Line != `'/usr/bin/it'\''s' 'a b'` {
			t.Errorf("%s: %v", name, err)
		}
		if after, err := os.Lstat(path); err != nil || !os.SameFile(before, after) {
			t.Errorf("%s was replaced: %v", name, err)
		}
	}
	for _, command := range [][]string{nil, {"solstice"}, {"/bin/sh", "a\nb"}} {
		if _, err := localgit.InstallHook(t.Context(), p.bare, localgit.HookOptions{Command: command}); !errors.Is(err, forge.ErrInvalid) {
			t.Errorf("command %q: %v", command, err)
		}
	}
	if _, err := localgit.InstallHook(t.Context(), t.TempDir(), localgit.HookOptions{Command: p.command()}); !errors.Is(err, forge.ErrNotFound) {
		t.Errorf("no repository: %v", err)
	}
}
