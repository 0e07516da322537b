package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/solstice/agent"
)

func TestMain(m *testing.M) {
	agent.Hook()
	os.Exit(m.Run())
}

func TestRun(t *testing.T) {
	dir := t.TempDir()
	workflow := filepath.Join(dir, ".solstice", "workflow.yaml")
	err := errors.Join(os.MkdirAll(filepath.Dir(workflow), 0o755), os.WriteFile(workflow, []byte(`
jobs:
  a: { steps: [{ run: cat greeting }] }
  b: { needs: a, checkout: false, steps: [{ run: exit 1 }] }
`), 0o644), os.WriteFile(filepath.Join(dir, "greeting"), []byte("hello from the repository\n"), 0o644))
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"init", "-q"}, {"add", "-A"}, {"-c", "user.name=T", "-c", "user.email=t@localhost", "commit", "-q", "-m", "test"}} {
		cmd := exec.CommandContext(t.Context(), "git", append([]string{"-C", dir}, args...)...)
		cmd.Env = []string{"HOME=" + dir, "GIT_CONFIG_NOSYSTEM=1"}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %q: %v\n%s", args, err, out)
		}
	}
	var out strings.Builder
	if err := run(t.Context(), dir, &out); err != nil {
		t.Fatal(err)
	}
	if got := out.String(); !strings.Contains(got, "hello from the repository\n") || !strings.HasSuffix(got, "workflow failed\n") {
		t.Errorf("got %q", got)
	}
	if err := run(t.Context(), t.TempDir(), &out); err == nil {
		t.Error("a directory without a repository was run")
	}
}
