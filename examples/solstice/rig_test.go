package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/vmprovider/processvm"
)

// patience bounds every wait for a condition; it only ends what hangs.
const patience = 3 * time.Minute

var scratch string

func TestMain(m *testing.M) {
	var err error
	if scratch, err = os.MkdirTemp("", "solstice-cli-test-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	if err := os.RemoveAll(scratch); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

// binary builds the program, once, when the first test wants it.
var binary = sync.OnceValues(func() (string, error) { return build("solstice") })

// build makes one of the examples.
func build(program string) (string, error) {
	name := filepath.Join(scratch, program)
	cmd := exec.Command("go", "build", "-o", name, "../"+program)
	cmd.Env = environ("CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return name, nil
}

// environ is what the tool chain needs, and more.
func environ(more ...string) []string {
	out := []string{"TERM=xterm-256color"}
	for k, v := range daemon.Environment("PATH", "HOME", "GO*", "XDG_CACHE_HOME") {
		out = append(out, k+"="+v)
	}
	return append(out, more...)
}

// user is a person with a temporary directory of their own, in which every run
// has to clean up.
type user struct {
	t   *testing.T
	dir string // current directory
	tmp string
	env []string // on top of what everybody has
}

func newUser(t *testing.T, dir string) *user {
	t.Helper()
	return &user{t: t, dir: dir, tmp: t.TempDir()}
}

func (u *user) command(args ...string) *exec.Cmd {
	u.t.Helper()
	exe, err := binary()
	if err != nil {
		u.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(u.t.Context(), patience)
	u.t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, exe, args...)
	cmd.Dir, cmd.Env = u.dir, environ(append(u.env, "TMPDIR="+u.tmp)...)
	return cmd
}

type result struct {
	code           int
	stdout, stderr string
}

// solstice runs the program to its end; nothing may be left then.
func (u *user) solstice(args ...string) result {
	u.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := u.command(args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		u.t.Fatal(err)
	}
	if left := u.left(); len(left) > 0 {
		u.t.Errorf("solstice %q left %q", args, left)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// left lists the directories and the processes of machines that runs left.
func (u *user) left() []string {
	u.t.Helper()
	dirs, err := filepath.Glob(filepath.Join(u.tmp, "solstice-run-*"))
	if err != nil {
		u.t.Fatal(err)
	}
	// An agent has the directory in its arguments, a step in its environment.
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		u.t.Fatal(err)
	}
	for _, p := range procs {
		env, _ := os.ReadFile(filepath.Join(p, "environ")) // gone meanwhile
		args, _ := os.ReadFile(filepath.Join(p, "cmdline"))
		if bytes.Contains(env, []byte(processvm.MarkerVariable+"=")) && (bytes.Contains(env, []byte(u.tmp)) || bytes.Contains(args, []byte(u.tmp))) {
			dirs = append(dirs, p+": "+strings.ReplaceAll(string(args), "\x00", " "))
		}
	}
	return dirs
}

// nothingLeft waits until what a run left is gone.
func (u *user) nothingLeft() {
	u.t.Helper()
	u.await("nothing is left", func() bool { return len(u.left()) == 0 })
}

func (u *user) await(what string, ok func() bool) {
	u.t.Helper()
	ctx, cancel := context.WithTimeout(u.t.Context(), patience)
	defer cancel()
	for !ok() {
		select {
		case <-ctx.Done():
			u.t.Fatalf("waited in vain until %s; left: %q", what, u.left())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (r result) want(t *testing.T, code int) {
	t.Helper()
	if r.code != code {
		t.Errorf("exit status %d, want %d", r.code, code)
	}
	if t.Failed() {
		t.Logf("stdout:\n%s\nstderr:\n%s", r.stdout, r.stderr)
	}
}

func has(t *testing.T, where, text string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(text, p) {
			t.Errorf("%s does not have %q:\n%s", where, p, text)
		}
	}
}

// git runs in a repository without a look at anyone's configuration.
func git(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", append([]string{"-C", dir, "-c", "user.name=T", "-c", "user.email=t@localhost"}, args...)...)
	cmd.Env = []string{"HOME=" + t.TempDir(), "GIT_CONFIG_NOSYSTEM=1"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %q: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// repository makes one with a commit of these files by name.
func repository(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "project")
	write(t, dir, files)
	commit(t, dir)
	return dir
}

func commit(t *testing.T, dir string) {
	t.Helper()
	if _, err := os.Stat(filepath.Join(dir, ".git")); err != nil {
		git(t, dir, "init", "-q", "-b", "main")
	}
	git(t, dir, "add", "-A")
	git(t, dir, "commit", "-q", "-m", "test")
}

func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		name = filepath.Join(dir, filepath.FromSlash(name))
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
}

const workflowFile = ".solstice/workflow.yaml"

func workflowRepo(t *testing.T, yaml string) string {
	t.Helper()
	return repository(t, map[string]string{workflowFile: yaml})
}

var timing = regexp.MustCompile(` in ([0-9.]+s|[0-9hms]+s)`)

// linesOf gives the lines of one job, without prefix and times.
func linesOf(out, job string) []string {
	var lines []string
	for l := range strings.Lines(out) {
		name, text, ok := strings.Cut(strings.TrimSuffix(l, "\n"), " |")
		if ok && strings.TrimSpace(name) == job {
			lines = append(lines, timing.ReplaceAllString(strings.TrimPrefix(text, " "), ""))
		}
	}
	return lines
}
