package localgit_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/forgetest"
	"github.com/solstice-ci/solstice-go/forge/localgit"
)

func TestForgetStatuses(t *testing.T) {
	root, statuses := t.TempDir(), t.TempDir()
	git := filepath.Join(root, "repo.git")
	gitIn(t, root)("", "init", "-q", "--bare", "-b", "main", "--", git)
	f, err := localgit.Open(t.Context(), localgit.Config{Root: root, StatusDir: statuses})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	repo := forge.Repo{Name: "repo"}
	var commits []string
	for _, content := range []string{"a", "b"} {
		c := forgetest.Git{Dir: git}.Commit(t, "main", map[string]forgetest.File{"f": {Content: content}})
		if err := f.ReportStatus(t.Context(), repo, c, forge.Status{Key: "k", Version: 1, State: forge.StatusSuccess}); err != nil {
			t.Fatal(err)
		}
		commits = append(commits, c)
	}
	forgetter, ok := forge.As[forge.StatusForgetter](f)
	if !ok {
		t.Fatal("localgit forgets no statuses")
	}
	have := func(commit string, want int) {
		t.Helper()
		if all, err := f.Statuses(t.Context(), repo, commit); err != nil || len(all) != want {
			t.Errorf("statuses of %s: %v, %v", commit, all, err)
		}
	}
	for range 2 { // the second time there is nothing
		if err := forgetter.ForgetStatuses(t.Context(), repo, commits[0]); err != nil {
			t.Error(err)
		}
	}
	have(commits[0], 0)
	have(commits[1], 1)
	if err := forgetter.ForgetStatuses(t.Context(), repo, "../../etc/passwd"); !errors.Is(err, forge.ErrInvalid) {
		t.Errorf("what is no commit: %v", err)
	}
	// Also when the repository is gone.
	if err := os.RemoveAll(git); err != nil {
		t.Fatal(err)
	}
	if err := forgetter.ForgetStatuses(t.Context(), repo, commits[1]); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(statuses); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
