package agent_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/solstice-ci/solstice-go/internal/proctree"
	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
)

// nothingLeft fails the test when a process of its machine still runs.
func nothingLeft(t *testing.T) {
	t.Helper()
	left, err := proctree.Marked("SOLSTICE_MACHINE_ID=" + machineID(t))
	if errors.Is(err, errors.ErrUnsupported) {
		return
	}
	must(t, err)
	if len(left) > 0 {
		t.Errorf("processes left: %v", left)
	}
}

// cancelWhen cancels the job when text appears in its log.
func (s *server) cancelWhen(text string, grace time.Duration) {
	done := false
	s.onEvent = func(ses *session, e *agentv1.Event) {
		if !done && strings.Contains(s.logText(), text) {
			done = true
			ses.cancel(grace, "somebody asked")
			ses.cancel(time.Hour, "asked again") // of no effect
		}
	}
}

func TestCancel(t *testing.T) {
	s := newServer(t)
	s.spec = jobOf(
		script(`trap 'echo cleaning; exit 0' TERM; echo ready; while :; do sleep 0.1; done`),
		script("echo unwanted"),
		when("failure()", script("echo unwanted")),
		when("always()", script("echo always-ran")),
		when("cancelled()", script("echo cancelled-ran")),
	)
	s.cancelWhen("ready", 20*time.Second)
	f := s.run()
	checkResult(t, f, cancelled, classCancelled)
	checkSteps(t, s, cancelled, skipped, skipped, succeeded, succeeded)
	if !strings.Contains(f.GetReason(), "somebody asked") {
		t.Errorf("reason %q", f.GetReason())
	}
	for _, want := range []string{"cleaning\n", "always-ran\n", "cancelled-ran\n"} {
		if !strings.Contains(s.logText(), want) {
			t.Errorf("log lacks %q: %s", want, s.logText())
		}
	}
	if strings.Contains(s.logText(), "unwanted") {
		t.Error("a step ran that should not have")
	}
	nothingLeft(t)
}

// TestCancelIgnored: what ignores SIGTERM is killed after the grace, and so is a
// step that runs in spite of the cancellation and does not end.
func TestCancelIgnored(t *testing.T) {
	s := newServer(t)
	stubborn := `trap '' TERM; echo ready; while :; do sleep 0.1; done`
	s.spec = jobOf(script(stubborn), when("always()", script(stubborn)), when("always()", script("echo too-late")))
	s.cancelWhen("ready", 300*time.Millisecond)
	checkResult(t, s.run(), cancelled, classCancelled)
	checkSteps(t, s, cancelled, cancelled, skipped)
	if st := s.step(0); st.GetSignal() != "SIGKILL" {
		t.Errorf("the first step ended by %q", st.GetSignal())
	}
	nothingLeft(t)
}

func TestJobTimeout(t *testing.T) {
	s := newServer(t)
	s.spec = jobOf(script("sleep 1000"), script("echo unwanted"), when("always()", script("echo always-ran")))
	s.spec.Limits.JobTimeout = durationpb.New(300 * time.Millisecond)
	f := s.run()
	checkResult(t, f, timedOut, classTimeout)
	checkSteps(t, s, timedOut, skipped, succeeded)
	if !strings.Contains(f.GetReason(), "300ms") || s.logText() != "always-ran\n" {
		t.Errorf("reason %q, log %q", f.GetReason(), s.logText())
	}
	nothingLeft(t)
}

func TestStepTimeout(t *testing.T) {
	limited := func(run string, goOn bool) *agentv1.Step {
		st := script(run)
		st.Timeout, st.ContinueOnError = durationpb.New(200*time.Millisecond), goOn
		return st
	}
	s := newServer(t)
	s.spec = jobOf(limited("sleep 1000 & sleep 1000", true), script("echo on"), limited("sleep 1000", false), script("echo unwanted"))
	f := s.run()
	checkResult(t, f, timedOut, classTimeout)
	checkSteps(t, s, timedOut, succeeded, timedOut, skipped)
	if s.logText() != "on\n" {
		t.Errorf("log %q", s.logText())
	}
	nothingLeft(t)
}

// TestForkTree: sessions of their own and double forks, with and without the
// machine's variables, are all gone after the job. This takes an agent with a
// process of its own.
func TestForkTree(t *testing.T) {
	if _, err := exec.LookPath("setsid"); err != nil {
		t.Log("no setsid on this machine: sessions of their own are not tried")
	}
	s := newServer(t)
	pids := filepath.Join(t.TempDir(), "pids")
	s.spec = jobOf(script(`
		spawn() { "$@" sh -c 'echo $$ >>` + pids + `; trap "" TERM; while :; do sleep 0.1; done' >/dev/null 2>&1 & }
		spawn env
		spawn nohup
		if command -v setsid; then
			spawn setsid
			spawn env -i "PATH=$PATH" setsid
			(spawn setsid -f; spawn env -i "PATH=$PATH" setsid -f) & wait $!
		fi
		want=2; command -v setsid && want=6
		while [ "$(wc -l <` + pids + `)" -lt $want ]; do sleep 0.05; done`))
	must(t, s.runProcess(nil))
	checkResult(t, s.verdict(), succeeded, classNone)
	data, err := os.ReadFile(pids)
	must(t, err)
	for line := range bytes.Lines(data) {
		var pid int
		must(t, json.Unmarshal(line, &pid))
		if p, err := proctree.Lookup(pid); err == nil && !p.Zombie {
			t.Errorf("process %d is left", pid)
		}
	}
	nothingLeft(t)
}

// runProcess runs an agent as a process of its own, with an empty environment;
// started is called with it.
func (s *server) runProcess(started func(*exec.Cmd)) error {
	cfg := s.config()
	file := filepath.Join(s.t.TempDir(), "bootstrap.json")
	b, err := json.Marshal(map[string]any{
		"contacts": cfg.Contacts, "ca": cfg.CA, "token": cfg.Token, "state_dir": cfg.StateDir, "work_dir": cfg.WorkDir,
		"env": map[string]string{"PATH": "/usr/local/bin:/usr/bin:/bin"},
	})
	must(s.t, err)
	must(s.t, os.WriteFile(file, b, 0o600))
	argv := append(agent.Command(), "--bootstrap", file)
	ctx, cancel := context.WithTimeout(s.t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = []string{}
	var console bytes.Buffer
	cmd.Stderr = &console
	must(s.t, cmd.Start())
	if started != nil {
		started(cmd)
	}
	err = cmd.Wait()
	s.t.Logf("console of the agent:\n%s", &console)
	if _, serr := os.Stat(file); serr == nil {
		s.t.Error("the bootstrap file with the token is still there")
	}
	return err
}

// TestTerminatedAgent: an agent that is told to go takes its job along.
func TestTerminatedAgent(t *testing.T) {
	s := newServer(t)
	s.spec = jobOf(script("echo ready; sleep 1000"))
	err := s.runProcess(func(cmd *exec.Cmd) {
		s.waitLog("ready")
		must(t, cmd.Process.Signal(os.Interrupt))
	})
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("the agent ended with %v", err)
	}
	nothingLeft(t)
}

func TestContextEnds(t *testing.T) {
	s := newServer(t)
	s.spec = jobOf(script("echo ready; sleep 1000"), when("always()", script("echo unwanted")))
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("no more")
	go func() {
		s.waitLog("ready")
		cancel(why)
	}()
	cfg := s.config()
	if err := agent.Run(ctx, cfg); !errors.Is(err, why) {
		t.Errorf("Run: %v", err)
	}
	if _, err := os.Stat(cfg.WorkDir); err == nil {
		t.Error("the work tree is left")
	}
	nothingLeft(t)
}
