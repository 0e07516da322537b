package gitcmd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func find(t testing.TB) *Git {
	t.Helper()
	g, err := Find(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func repository(t testing.TB, g *Git, args ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "repo")
	if err := g.Run(t.Context(), Options{}, append(append([]string{"init", "-q"}, args...), "--", dir)...); err != nil {
		t.Fatal(err)
	}
	return dir
}

func script(t testing.TB, body string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(name, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestHostileEnvironment(t *testing.T) {
	marker := filepath.Join(t.TempDir(), "marker")
	evil := script(t, "touch "+marker+"; exit 3")
	config := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(config, []byte("[core]\n\tfsmonitor = "+evil+"\n[user]\n\tname = evil\n[broken\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{
		"GIT_DIR": "/nonexistent/dir", "GIT_WORK_TREE": "/nonexistent", "GIT_INDEX_FILE": "/nonexistent/index",
		"GIT_OBJECT_DIRECTORY": "/nonexistent/objects", "GIT_CONFIG_GLOBAL": config, "GIT_CONFIG_SYSTEM": config,
		"GIT_CONFIG_PARAMETERS": "broken", "GIT_CONFIG_COUNT": "broken", "GIT_EXEC_PATH": "/nonexistent",
		"GIT_TRACE": marker, "GIT_EXTERNAL_DIFF": evil, "GIT_SSH_COMMAND": evil, "GIT_ASKPASS": evil,
		"GIT_EDITOR": evil, "GIT_PAGER": evil, "GIT_ALLOW_PROTOCOL": "ext", "GIT_NAMESPACE": "evil",
		"GIT_PROTOCOL": "version=9", "GIT_TEMPLATE_DIR": "/nonexistent", "XDG_CONFIG_HOME": filepath.Dir(config),
		"GIT_LITERAL_PATHSPECS": "broken", "GIT_CEILING_DIRECTORIES": "/", "HOME": filepath.Dir(config), "LC_ALL": "de_DE.UTF-8",
	} {
		t.Setenv(name, value)
	}
	g := find(t)
	dir := repository(t, g)
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	in := Options{Dir: dir}
	if err := g.Run(t.Context(), in, "add", "--", "file"); err != nil {
		t.Fatal(err)
	}
	if out, err := g.Output(t.Context(), in, "ls-files"); err != nil || string(out) != "file\n" {
		t.Errorf("ls-files: %q, %v", out, err)
	}
	if out, err := g.Output(t.Context(), in, "config", "--get", "user.name"); err == nil {
		t.Errorf("user.name = %q from a configuration that must not be read", out)
	}
	if _, err := os.Stat(marker); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a hostile program ran: %v", err)
	}
}

func TestRepositoryConfigRunsNothing(t *testing.T) {
	g := find(t)
	dir := repository(t, g)
	marker := filepath.Join(t.TempDir(), "marker")
	evil := script(t, "touch "+marker)
	for _, setting := range []string{"core.fsmonitor", "core.hooksPath", "credential.helper", "core.askPass"} {
		if err := g.Run(t.Context(), Options{Dir: dir}, "config", "--add", "--", setting, evil); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, ".git", "hooks", "post-index-change"), []byte("#!/bin/sh\ntouch "+marker+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"add", "--", "file"}, {"status", "--porcelain"}} {
		if err := g.Run(t.Context(), Options{Dir: dir}, args...); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(marker); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the repository's configuration ran a program: %v", err)
	}
}

func TestProtocols(t *testing.T) {
	g := find(t)
	source := repository(t, g, "--bare")
	marker := filepath.Join(t.TempDir(), "marker")
	ext := "ext::" + script(t, "touch "+marker)
	if err := g.Run(t.Context(), Options{}, "ls-remote", "--", source); err == nil {
		t.Error("a local transport worked although none was allowed")
	}
	if err := g.Run(t.Context(), Options{Protocols: []string{"file"}}, "ls-remote", "--", source); err != nil {
		t.Error(err)
	}
	if err := g.Run(t.Context(), Options{Protocols: []string{"file", "https"}}, "ls-remote", "--", ext); err == nil {
		t.Error("ext:: worked")
	}
	if _, err := os.Stat(marker); !errors.Is(err, os.ErrNotExist) {
		t.Error("ext:: ran a program")
	}
}

func TestConfigIsNotInArguments(t *testing.T) {
	// A stand-in for git shows what it was started with.
	fake := script(t, `[ "$1" = "-c" ] || exit 9
for a; do last=$a; done
[ "$last" = version ] && { echo "git version 2.31.0"; exit 0; }
echo "args: $*"; env`)
	g, err := New(t.Context(), fake)
	if err != nil {
		t.Fatal(err)
	}
	if g.Version() != "2.31.0" {
		t.Errorf("version %q", g.Version())
	}
	t.Setenv("LEAKED_FROM_PARENT", "yes")
	out, err := g.Output(t.Context(), Options{Config: []string{"http.extraHeader=Authorization: Bearer s3cret=="}, Env: []string{"GIT_PROTOCOL=version=2"}}, "fetch")
	if err != nil {
		t.Fatal(err)
	}
	args, env, _ := strings.Cut(string(out), "\n")
	if strings.Contains(args, "s3cret") {
		t.Errorf("secret in the arguments: %s", args)
	}
	for _, want := range []string{
		"GIT_CONFIG_COUNT=1\n", "GIT_CONFIG_KEY_0=http.extraHeader\n", "GIT_CONFIG_VALUE_0=Authorization: Bearer s3cret==\n",
		"GIT_PROTOCOL=version=2\n", "GIT_TERMINAL_PROMPT=0\n", "HOME=/nonexistent\n", "GIT_ALLOW_PROTOCOL=\n",
	} {
		if !strings.Contains(env, want) {
			t.Errorf("environment lacks %q:\n%s", want, env)
		}
	}
	if strings.Contains(env, "LEAKED_FROM_PARENT") {
		t.Error("a variable of the parent was inherited")
	}
}

func TestNewRefuses(t *testing.T) {
	for name, body := range map[string]string{
		"too old": "echo git version 2.30.9", "no git": "echo hello", "fails": "exit 1",
	} {
		if _, err := New(t.Context(), script(t, body)); !errors.Is(err, ErrNoGit) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := New(t.Context(), "/nonexistent/git"); !errors.Is(err, ErrNoGit) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := New(ctx, script(t, "echo git version 2.40.0")); !errors.Is(err, context.Canceled) || errors.Is(err, ErrNoGit) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestErrors(t *testing.T) {
	g := find(t)
	err := g.Run(t.Context(), Options{}, "rev-parse", "--verify", "HEAD")
	var e *Error
	if !errors.As(err, &e) || e.Command != "rev-parse" || e.ExitCode != 128 || !strings.Contains(e.Stderr, "not a git repository") {
		t.Errorf("%#v", err)
	}
	if code, ok := ExitCode(err); !ok || code != 128 {
		t.Errorf("ExitCode %d, %v", code, ok)
	}
	if _, ok := ExitCode(io.EOF); ok {
		t.Error("ExitCode of another error")
	}
	var copied bytes.Buffer
	noisy, err := New(t.Context(), script(t, `for a; do last=$a; done
[ "$last" = version ] && { echo "git version 2.40.0"; exit 0; }
i=0; while [ $i -lt 2000 ]; do echo "line $i" >&2; i=$((i+1)); done; exit 1`))
	if err != nil {
		t.Fatal(err)
	}
	err = noisy.Run(t.Context(), Options{Stderr: &copied}, "x")
	if !errors.As(err, &e) || len(e.Stderr) > stderrTail || !strings.HasSuffix(e.Stderr, "line 1999\n") {
		t.Errorf("stderr tail: %v", err)
	}
	if !strings.HasPrefix(copied.String(), "line 0\n") {
		t.Error("stderr was not copied whole")
	}
}

func TestOutputIsBounded(t *testing.T) {
	g := find(t)
	dir := repository(t, g)
	in := Options{Dir: dir, Stdin: strings.NewReader(strings.Repeat("0123456789", 100_000))}
	id, err := g.Output(t.Context(), in, "hash-object", "-w", "--stdin")
	if err != nil {
		t.Fatal(err)
	}
	blob := strings.TrimSpace(string(id))
	if out, err := g.Output(t.Context(), Options{Dir: dir, MaxOutput: 1_000_000}, "cat-file", "blob", blob); err != nil || len(out) != 1_000_000 {
		t.Errorf("at the bound: %d bytes, %v", len(out), err)
	}
	if _, err := g.Output(t.Context(), Options{Dir: dir, MaxOutput: 999_999}, "cat-file", "blob", blob); !errors.Is(err, ErrTooLarge) {
		t.Errorf("over the bound: %v", err)
	}
}

// A cancelled context ends git and what git started, here a shell that would
// outlive it and holds its output open.
func TestCancelKillsDescendants(t *testing.T) {
	slow, err := New(t.Context(), script(t, `for a; do last=$a; done
[ "$last" = version ] && { echo "git version 2.40.0"; exit 0; }
(echo started; while :; do sleep 3600; done) &
wait`))
	if err != nil {
		t.Fatal(err)
	}
	reason := errors.New("reason")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	done := make(chan error, 1)
	go func() { done <- slow.Run(ctx, Options{Stdout: w}, "x") }()
	if _, err := io.ReadFull(r, make([]byte, len("started\n"))); err != nil {
		t.Fatal(err)
	}
	cancel(reason)
	if err := <-done; !errors.Is(err, context.Canceled) || !errors.Is(err, reason) {
		t.Error(err)
	}
	w.Close()
	// End of file comes when no process holds the pipe any more.
	if _, err := io.ReadAll(r); err != nil {
		t.Error(err)
	}
}
