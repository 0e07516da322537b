package localgit_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/forgetest"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var identity = []string{"GIT_AUTHOR_NAME=A", "GIT_AUTHOR_EMAIL=a@example.org", "GIT_COMMITTER_NAME=A", "GIT_COMMITTER_EMAIL=a@example.org"}

// gitIn gives a function that runs git in a directory and gives what it printed.
func gitIn(tb forgetest.TB, dir string) func(stdin string, args ...string) string {
	git, err := gitcmd.Find(tb.Context())
	if err != nil {
		tb.Fatalf("%v", err)
	}
	return func(stdin string, args ...string) string {
		tb.Helper()
		out, err := git.Output(tb.Context(), gitcmd.Options{
			Dir: dir, Env: identity, Stdin: strings.NewReader(stdin), Protocols: []string{"file"},
		}, args...)
		if err != nil {
			tb.Fatalf("%v", err)
		}
		return strings.TrimSpace(string(out))
	}
}

func fixture(tb forgetest.TB, format string, single bool) forgetest.Fixture {
	root := tb.TempDir()
	config := localgit.Config{Root: root}
	path := func(r forge.Repo) string { return filepath.Join(root, r.FullName()+".git") }
	if single {
		config = localgit.Config{Dir: path(forge.Repo{Name: "repo"}), Name: "repo", StatusDir: tb.TempDir()}
		gitIn(tb, root)("", "init", "-q", "--bare", "-b", "main", "--object-format="+format, "--", config.Dir)
	}
	f, err := localgit.Open(tb.Context(), config)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	return forgetest.Fixture{
		Forge: f,
		Repo: func(tb forgetest.TB, name string) forge.Repo {
			r := forge.Repo{Name: name}
			if !single {
				r.Owner = "team"
				gitIn(tb, root)("", "init", "-q", "--bare", "-b", "main", "--object-format="+format, "--", path(r))
			}
			return r
		},
		Commit: func(tb forgetest.TB, r forge.Repo, branch string, files map[string]forgetest.File) string {
			return forgetest.Git{Dir: path(r)}.Commit(tb, branch, files)
		},
		Tag: func(tb forgetest.TB, r forge.Repo, name, commit string, annotated bool) {
			forgetest.Git{Dir: path(r)}.Tag(tb, name, commit, annotated)
		},
		Fetch: func(tb forgetest.TB, c forge.Clone, commit, name string) (string, error) {
			dir := filepath.Join(tb.TempDir(), "clone")
			if _, err := localgit.Mirror(tb.Context(), c.Dir, dir, localgit.MirrorOptions{Ref: commit, Depth: 1, Schemes: []string{"file"}}); err != nil {
				return "", err
			}
			return gitIn(tb, dir)("", "cat-file", "blob", commit+":"+name), nil
		},
		Statuses: func(tb forgetest.TB, r forge.Repo, commit string) []forge.Status {
			all, err := f.Statuses(tb.Context(), r, commit)
			if err != nil {
				tb.Errorf("Statuses: %v", err)
			}
			return all
		},
	}
}

func TestConformance(t *testing.T) {
	t.Run("root", func(t *testing.T) {
		forgetest.Run(t, forgetest.Harness{New: func(tb forgetest.TB) forgetest.Fixture { return fixture(tb, "sha1", false) }})
	})
	t.Run("single", func(t *testing.T) {
		forgetest.Run(t, forgetest.Harness{New: func(tb forgetest.TB) forgetest.Fixture { return fixture(tb, "sha1", true) }})
	})
}

// Names that lead elsewhere, by path or by link, are not followed.
func TestRootIsNotLeft(t *testing.T) {
	outside := t.TempDir()
	gitIn(t, outside)("", "init", "-q", "--bare", "--", filepath.Join(outside, "secret.git"))
	root := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(outside, "secret.git"), filepath.Join(root, "direct.git")); err != nil {
		t.Fatal(err)
	}
	f, err := localgit.Open(t.Context(), localgit.Config{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, r := range []forge.Repo{{Owner: "link", Name: "secret"}, {Name: "direct"}, {Name: "direct.git"}} {
		if c, err := f.CloneInfo(t.Context(), r, forge.CloneOptions{}); err == nil {
			t.Errorf("%s leads to %s", r.FullName(), c.Dir)
		}
	}
}
