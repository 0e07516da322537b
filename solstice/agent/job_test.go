package agent_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

const (
	succeeded = agentv1.Result_RESULT_SUCCEEDED
	failed    = agentv1.Result_RESULT_FAILED
	cancelled = agentv1.Result_RESULT_CANCELLED
	timedOut  = agentv1.Result_RESULT_TIMED_OUT
	skipped   = agentv1.Result_RESULT_SKIPPED

	classNone      = agentv1.FailureClass_FAILURE_CLASS_UNSPECIFIED
	classUser      = agentv1.FailureClass_FAILURE_CLASS_USER
	classTimeout   = agentv1.FailureClass_FAILURE_CLASS_TIMEOUT
	classCancelled = agentv1.FailureClass_FAILURE_CLASS_CANCELLED
	classInfra     = agentv1.FailureClass_FAILURE_CLASS_INFRA
)

// script is a RUN step.
func script(run string) *agentv1.Step {
	return &agentv1.Step{Kind: agentv1.StepKind_STEP_KIND_RUN, Run: run}
}

func when(cond string, st *agentv1.Step) *agentv1.Step {
	st.Condition = cond
	return st
}

func jobOf(steps ...*agentv1.Step) *agentv1.JobSpec {
	return &agentv1.JobSpec{
		RunId: "run-1", JobId: "job-1", Name: "test", Steps: steps,
		Source: &agentv1.Source{
			Path: "/git/" + testAttempt, Commit: strings.Repeat("a", 40), Ref: "refs/heads/main", RepoUrl: "https://example.org/repo",
		},
		Limits: &agentv1.Limits{CancelGrace: durationpb.New(5 * time.Second)},
	}
}

func checkResult(t *testing.T, f *agentv1.JobFinished, r agentv1.Result, c agentv1.FailureClass) {
	t.Helper()
	if f.GetResult() != r || f.GetClass() != c {
		t.Errorf("job ended %v (%v: %s), want %v (%v)", f.GetResult(), f.GetClass(), f.GetReason(), r, c)
	}
}

func checkSteps(t *testing.T, s *server, want ...agentv1.Result) {
	t.Helper()
	for i, r := range want {
		if f := s.step(i); f.GetResult() != r {
			t.Errorf("step %d: %v (%s), want %v", i, f.GetResult(), f.GetReason(), r)
		}
	}
}

func TestJob(t *testing.T) {
	s := newServer(t)
	s.spec = jobOf(
		&agentv1.Step{Id: "one", Kind: agentv1.StepKind_STEP_KIND_RUN, Run: `
			printf 'to stdout\n'; printf 'to stderr\n' >&2
			echo answer=42 >>"$SOLSTICE_OUTPUT"
			printf 'text<<E\na\nb\nE\n' >>"$SOLSTICE_OUTPUT"
			echo GREETING=hello >>"$SOLSTICE_ENV"
			mkdir bin; printf '#!/bin/sh\necho from-path\n' >bin/tool; chmod +x bin/tool
			echo "$PWD/bin" >>"$SOLSTICE_PATH"`},
		&agentv1.Step{
			Kind: agentv1.StepKind_STEP_KIND_RUN, Run: `echo "$GREETING $A $JOBVAR"; tool`,
			Env: []*agentv1.EnvVar{{Name: "A", Value: "${{ steps.one.outputs.answer }}"}},
		},
	)
	s.spec.Env = []*agentv1.EnvVar{{Name: "BASE", Value: "b"}, {Name: "JOBVAR", Value: "${{ env.BASE }}/${{ matrix.go }}"}}
	s.spec.Contexts, _ = json.Marshal(workflow.Contexts{Matrix: workflow.Values{"go": json.Number("1.20")}})
	s.spec.Outputs = []*agentv1.Output{{Name: "result", Value: "${{ steps.one.outputs.answer }}"}}

	cfg := s.config()
	cfg.TokenFile = filepath.Join(t.TempDir(), "token")
	must(t, os.WriteFile(cfg.TokenFile, []byte(testToken), 0o600))
	must(t, s.runConfig(cfg))
	f := s.verdict()
	checkResult(t, f, succeeded, classNone)
	if f.GetOutputs()["result"] != "42" {
		t.Errorf("outputs of the job: %v", f.GetOutputs())
	}
	if got := s.step(0).GetOutputs(); got["answer"] != "42" || got["text"] != "a\nb" {
		t.Errorf("outputs of the step: %v", got)
	}
	for _, want := range []string{"to stdout\n", "to stderr\n", "hello 42 b/1.20\n", "from-path\n"} {
		if !strings.Contains(s.logText(), want) {
			t.Errorf("log lacks %q:\n%s", want, s.logText())
		}
	}
	for _, gone := range []string{cfg.TokenFile, cfg.WorkDir} {
		if _, err := os.Stat(gone); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there", gone)
		}
	}
	if left, _ := os.ReadDir(cfg.StateDir); len(left) > 0 {
		t.Errorf("left in the state directory: %v", left)
	}
}

// TestStepEnvironment: what a step sees is made from nothing.
func TestStepEnvironment(t *testing.T) {
	for _, hostile := range []string{"GIT_DIR", "LD_PRELOAD_X", "OTEL_SERVICE_NAME", "HTTPS_PROXY", "https_proxy"} {
		t.Setenv(hostile, "http://127.0.0.1:1/hostile")
	}
	s := newServer(t)
	s.spec = jobOf(script("env"))
	s.spec.Env = []*agentv1.EnvVar{{Name: "SOLSTICE_JOB_ID", Value: "forged"}, {Name: "CI", Value: "maybe"}}
	cfg := s.config()
	cfg.Env = map[string]string{"PATH": "/usr/bin:/bin", "ONLY": "this"}
	must(t, s.runConfig(cfg))
	got := map[string]string{}
	for line := range strings.Lines(s.logText()) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), "=")
		got[k] = v
	}
	want := map[string]string{
		"PATH": "/usr/bin:/bin", "ONLY": "this", "CI": "maybe", "SOLSTICE": "true",
		"SOLSTICE_RUN_ID": "run-1", "SOLSTICE_JOB_ID": "job-1", "SOLSTICE_REPO_URL": "https://example.org/repo",
		"SOLSTICE_COMMIT_SHA": strings.Repeat("a", 40), "SOLSTICE_REF": "refs/heads/main",
		"SOLSTICE_WORKDIR": cfg.WorkDir, "SOLSTICE_MACHINE_ID": machineID(t),
		"TRACEPARENT": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
	}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s=%q, want %q", k, got[k], v)
		}
		delete(got, k)
	}
	for k := range got {
		switch k {
		case "SOLSTICE_OUTPUT", "SOLSTICE_ENV", "SOLSTICE_PATH", "PWD", "OLDPWD", "SHLVL", "_":
		default:
			t.Errorf("a step sees %s=%s", k, got[k])
		}
	}
}

func TestConditionsAfterFailure(t *testing.T) {
	s := newServer(t)
	s.spec = jobOf(
		&agentv1.Step{Kind: agentv1.StepKind_STEP_KIND_RUN, Run: "exit 7", ContinueOnError: true},
		script("echo still-well"),
		script("exit 3"),
		script("echo not-run"),
		when("failure()", script("echo run-on-failure")),
		when("always()", script("echo run-always")),
		when("cancelled()", script("echo not-cancelled")),
	)
	f := s.run()
	checkResult(t, f, failed, classUser)
	checkSteps(t, s, failed, succeeded, failed, skipped, succeeded, succeeded, skipped)
	if st := s.step(0); !st.GetContinued() || st.GetExitCode() != 7 {
		t.Errorf("first step: %v", st)
	}
	if st := s.step(2); st.GetContinued() || st.GetExitCode() != 3 || !strings.Contains(f.GetReason(), "exit status 3") {
		t.Errorf("failed step: %v, job: %s", st, f.GetReason())
	}
	if log := s.logText(); strings.Contains(log, "not-") || !strings.Contains(log, "run-on-failure") {
		t.Errorf("log: %s", log)
	}
}

func TestShells(t *testing.T) {
	bin := t.TempDir()
	must(t, os.WriteFile(filepath.Join(bin, "python3"), []byte("#!/bin/sh\necho snake; cat \"$1\"\n"), 0o755))
	for _, c := range []struct {
		name, shell, run, log string
		result                agentv1.Result
		class                 agentv1.FailureClass
		reason                string
	}{
		{"sh stops at the first failure", "", "false\necho beyond", "", failed, classUser, "exit status 1"},
		{"bash", "bash", "false | true; echo ${BASH_VERSION%%.*}", "", failed, classUser, "exit status 1"},
		{"python", "python", "print(1)", "snake\nprint(1)", succeeded, classNone, ""},
		{"template", "sh -x {0}", "echo traced", "+ echo traced\ntraced\n", succeeded, classNone, ""},
		{"template without file", "fish", "x", "", failed, classUser, "{0}"},
		{"missing shell", "no-such-shell {0}", "x", "", failed, classUser, "not found"},
		{"signal", "", "kill -SEGV $$", "", failed, classUser, "SIGSEGV"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newServer(t)
			st := script(c.run)
			st.Shell = c.shell
			s.spec = jobOf(st)
			cfg := s.config()
			cfg.Env = map[string]string{"PATH": bin + ":/usr/bin:/bin"}
			must(t, s.runConfig(cfg))
			f := s.verdict()
			checkResult(t, f, c.result, c.class)
			if !strings.Contains(s.logText(), c.log) || !strings.Contains(f.GetReason(), c.reason) {
				t.Errorf("reason %q, log %q", f.GetReason(), s.logText())
			}
			if strings.Contains(s.logText(), "beyond") {
				t.Error("the script went on after a failure")
			}
		})
	}
	t.Run("no sh at all", func(t *testing.T) {
		s := newServer(t)
		s.spec = jobOf(script("true"))
		cfg := s.config()
		cfg.Env = map[string]string{"PATH": bin}
		must(t, s.runConfig(cfg))
		checkResult(t, s.verdict(), failed, classInfra)
	})
}

func TestSetupAndWorkdir(t *testing.T) {
	setup := func(name string) *agentv1.Step {
		return &agentv1.Step{Kind: agentv1.StepKind_STEP_KIND_SETUP, Run: name}
	}
	at := func(dir string) *agentv1.Step {
		st := script("echo in ${PWD##*/}")
		st.Workdir = dir
		return st
	}
	s := newServer(t)
	s.spec = jobOf(
		script(`mkdir sub; echo 'echo plain' >plain.sh; echo 'echo no-shebang in ${PWD##*/}' >exec.sh; chmod +x exec.sh
			printf '#!/bin/sh\necho shebang\n' >sub/bang.sh; chmod +x sub/bang.sh`),
		setup("plain.sh"), setup("exec.sh"), setup("sub/bang.sh"), at("sub"),
	)
	checkResult(t, s.run(), succeeded, classNone)
	if got, want := s.logText(), "plain\nno-shebang in "+filepath.Base(s.config().WorkDir)+"\nshebang\nin sub\n"; got != want {
		t.Errorf("log %q, want %q", got, want)
	}
	for _, bad := range []*agentv1.Step{
		setup("../x"), setup("/bin/true"), setup("missing"), setup("."), at("../.."), at("/tmp"), at("missing"),
	} {
		t.Run(bad.GetRun()+" "+bad.GetWorkdir(), func(t *testing.T) {
			s := newServer(t)
			s.spec = jobOf(bad)
			checkResult(t, s.run(), failed, classUser)
		})
	}
}

// TestStepFiles: what is wrong in a step's files is said, and fails the step.
func TestStepFiles(t *testing.T) {
	for run, want := range map[string]string{
		`echo nonsense >"$SOLSTICE_OUTPUT"`:                                     "SOLSTICE_OUTPUT: ",
		`printf 'a<<E\nopen\n' >"$SOLSTICE_OUTPUT"`:                             "line 1",
		`head -c 2000000 /dev/zero | tr '\0' x >"$SOLSTICE_OUTPUT"`:             "larger than 1 MiB",
		`(printf a=; head -c 200000 /dev/zero | tr '\0' x) >"$SOLSTICE_OUTPUT"`: "larger than",
		`echo SOLSTICE_X=1 >"$SOLSTICE_ENV"`:                                    "reserved",
		`echo relative >"$SOLSTICE_PATH"`:                                       "absolute",
		`rm -f "$SOLSTICE_ENV"; mkfifo "$SOLSTICE_ENV"`:                         "regular",
		`rm -f "$SOLSTICE_ENV"; ln -s /dev/zero "$SOLSTICE_ENV"`:                "SOLSTICE_ENV",
	} {
		t.Run(run, func(t *testing.T) {
			s := newServer(t)
			s.spec = jobOf(script(run))
			f := s.run()
			checkResult(t, f, failed, classUser)
			if !strings.Contains(f.GetReason(), want) {
				t.Errorf("reason %q, want it to say %q", f.GetReason(), want)
			}
		})
	}
}

// TestBackgroundChild: a child that keeps the step's output open neither holds
// up the step nor breaks, and is gone after the job.
func TestBackgroundChild(t *testing.T) {
	s := newServer(t)
	s.spec = jobOf(
		script("( while :; do echo tick; sleep 0.05; done ) & echo $! >pid; echo started"),
		script("kill -0 $(cat pid) && echo alive"),
	)
	cfg := s.config()
	s.onEvent = grabFile(t, filepath.Join(cfg.WorkDir, "pid"))
	must(t, s.runConfig(cfg))
	checkResult(t, s.verdict(), succeeded, classNone)
	if !strings.Contains(s.logText(), "alive\n") {
		t.Errorf("log: %s", s.logText())
	}
}

// grabFile makes sure that a file was there to be seen.
func grabFile(t *testing.T, name string) func(*session, *agentv1.Event) {
	return func(_ *session, e *agentv1.Event) {
		if f := e.GetStepFinished(); f != nil && f.GetStep() == 0 {
			if b, err := os.ReadFile(name); err != nil || len(bytes.TrimSpace(b)) == 0 {
				t.Errorf("%s: %q, %v", name, b, err)
			}
		}
	}
}

func TestInvalidConfig(t *testing.T) {
	s := newServer(t)
	full := filepath.Join(t.TempDir(), "full")
	must(t, os.MkdirAll(filepath.Join(full, "precious"), 0o755))
	for name, change := range map[string]func(*agent.Config){
		"no contacts":    func(c *agent.Config) { c.Contacts = nil },
		"contact":        func(c *agent.Config) { c.Contacts = []string{"nowhere"} },
		"no CA":          func(c *agent.Config) { c.CA = []byte("nothing") },
		"no token":       func(c *agent.Config) { c.Token = "" },
		"no state":       func(c *agent.Config) { c.StateDir = "" },
		"work not empty": func(c *agent.Config) { c.WorkDir = full },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := s.config()
			change(&cfg)
			if err := s.runConfig(cfg); !errors.Is(err, agent.ErrConfig) {
				t.Errorf("Run: %v", err)
			}
		})
	}
	if _, err := os.Stat(filepath.Join(full, "precious")); err != nil {
		t.Error("a refused work directory was touched")
	}
}

func TestLoadBootstrap(t *testing.T) {
	file := filepath.Join(t.TempDir(), "b.json")
	must(t, os.WriteFile(file, fmt.Appendf(nil,
		`{"contacts":["h:1"],"ca":"UEVN","token":"t","hostname":"ignored","env":{"A":"b"},"state_dir":"/s","work_dir":"/w"}`), 0o600))
	c, err := agent.LoadBootstrap(file)
	must(t, err)
	if c.Contacts[0] != "h:1" || string(c.CA) != "PEM" || c.Token != "t" || c.Env["A"] != "b" ||
		c.StateDir != "/s" || c.WorkDir != "/w" || c.TokenFile != file {
		t.Errorf("config: %+v", c)
	}
	must(t, os.WriteFile(file, []byte("{"), 0o600))
	if _, err := agent.LoadBootstrap(file); !errors.Is(err, agent.ErrConfig) {
		t.Errorf("broken file: %v", err)
	}
	if _, err := agent.LoadBootstrap(file + ".absent"); !errors.Is(err, agent.ErrConfig) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent file: %v", err)
	}
}
