package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestForeignCode runs the test-suites of modules that others published, in
// repositories made of what the module cache holds.
func TestForeignCode(t *testing.T) {
	t.Parallel()
	for _, module := range []string{"github.com/google/uuid", "github.com/dustin/go-humanize"} {
		t.Run(strings.ReplaceAll(module, "/", "_"), func(t *testing.T) {
			list := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", module)
			list.Env = environ()
			out, err := list.Output()
			source := strings.TrimSpace(string(out))
			if err != nil || source == "" {
				t.Fatalf("%s is not in the module cache: %v", module, err)
			}
			dir := filepath.Join(t.TempDir(), "module")
			if err := os.CopyFS(dir, os.DirFS(source)); err != nil {
				t.Fatal(err)
			}
			write(t, dir, map[string]string{workflowFile: `
env: { CGO_ENABLED: "0", GOFLAGS: "-mod=mod", GOPROXY: "off", GOTOOLCHAIN: local, GOWORK: "off" }
jobs:
  test:
    steps:
      - name: go test
        run: go test -short ./...
`})
			commit(t, dir)
			r := newUser(t, dir).solstice("run")
			if ok := regexp.MustCompile(`\| ok\s+` + regexp.QuoteMeta(module) + `\s`); !ok.MatchString(r.stdout) {
				t.Error("no line says that the tests passed")
			}
			has(t, "stdout", r.stdout, "· go test succeeded in ")
			r.want(t, 0)
		})
	}
}
