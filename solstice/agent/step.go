package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

// outcome is how a step ended.
type outcome struct {
	result  agentv1.Result
	exit    int // -1: none
	signal  string
	reason  string
	outputs map[string]string
	err     error // where it failed or timed out
}

func failed(err error) outcome {
	o := outcome{result: agentv1.Result_RESULT_FAILED, exit: -1, reason: err.Error(), err: err}
	var t *stepTimeout
	if errors.As(err, &t) {
		o.result = agentv1.Result_RESULT_TIMED_OUT
	}
	return o
}

// step runs one step.
func (j *job) step(ctx context.Context, w *watch, i int, st *agentv1.Step) outcome {
	if st.GetKind() == agentv1.StepKind_STEP_KIND_CHECKOUT {
		return j.checkoutStep(ctx, w, i, st)
	}
	s := &scriptStep{j: j, i: i, st: st}
	cmd, err := s.command()
	if err != nil {
		return failed(err)
	}
	p, err := j.procs.start(cmd, j.sink(i))
	if errors.Is(err, syscall.ENOEXEC) && st.GetKind() == agentv1.StepKind_STEP_KIND_SETUP {
		dir := cmd.Dir
		if cmd, err = s.shell("", cmd.Path); err == nil {
			cmd.Dir = dir
			p, err = j.procs.start(cmd, j.sink(i))
		}
	}
	if err != nil {
		return failed(startError(err))
	}
	err = j.await(w, p, st.GetTimeout().AsDuration())
	p.finish()
	return s.outcome(p.cmd.ProcessState, err)
}

func (j *job) sink(i int) func([]byte) {
	return func(b []byte) {
		j.journal.room(len(b))
		j.journal.log(int32(i), agentv1.Fd_FD_STDOUT, b)
	}
}

// startError tells a script that cannot run from a machine that cannot run
// scripts.
func startError(err error) error {
	err = fmt.Errorf("cannot start: %w", err)
	for _, own := range []error{syscall.E2BIG, syscall.ENOEXEC, syscall.EACCES, syscall.ENOENT, syscall.ENOTDIR, syscall.EINVAL} {
		if errors.Is(err, own) {
			return err
		}
	}
	return infra(err)
}

// await waits for the process's end, and brings it about when the step has
// taken too long or the job has to end. The error says which of these.
func (j *job) await(w *watch, p *process, limit time.Duration) error {
	var timeout, cleanup <-chan time.Time
	first := w.first
	if limit > 0 {
		t := time.NewTimer(limit)
		defer t.Stop()
		timeout = t.C
	}
	if j.stopping != notStopping {
		first = nil // known: this step runs in spite of it, but not for long
		t := time.NewTimer(w.cleanupTime())
		defer t.Stop()
		cleanup = t.C
	}
	select {
	case <-p.exited:
		return nil
	case <-timeout:
		p.terminate(w.graceTime(), w.kill)
		return &stepTimeout{limit}
	case <-cleanup:
		p.kill()
		return fmt.Errorf("%w: no time left", errStopped)
	case <-first:
	case <-w.kill:
	}
	j.stop(w.poll())
	p.terminate(w.graceTime(), w.kill)
	return fmt.Errorf("%w: %s", errStopped, j.stopWhy)
}

// stoppedOutcome is that of a step which was ended because of the job.
func (j *job) stoppedOutcome(err error) outcome {
	o := outcome{result: agentv1.Result_RESULT_CANCELLED, exit: -1, reason: err.Error(), err: err}
	if j.stopping == stopTimeout {
		o.result = agentv1.Result_RESULT_TIMED_OUT
	}
	return o
}

// A scriptStep is a RUN or SETUP step on its way.
type scriptStep struct {
	j   *job
	i   int
	st  *agentv1.Step
	env map[string]string
}

func (s *scriptStep) file(ext string) string {
	return filepath.Join(s.j.a.cfg.stepsDir(), fmt.Sprintf("%03d%s", s.i+1, ext))
}

// command makes the step's command: variables and text are evaluated, files
// written, the shell looked up.
func (s *scriptStep) command() (*exec.Cmd, error) {
	j := s.j
	cx := j.cx
	vars, err := cx.InterpolateEnv(pairs(s.st.GetEnv()))
	if err != nil {
		return nil, fmt.Errorf("env: %w", err)
	}
	s.env = maps.Clone(j.env)
	cx.Env = maps.Clone(j.cx.Env)
	for _, kv := range vars {
		s.env[kv.Name], cx.Env[kv.Name] = kv.Value, kv.Value
	}
	if err := s.wellKnown(); err != nil {
		return nil, err
	}
	text, err := cx.Interpolate(s.st.GetRun())
	if err != nil {
		return nil, fmt.Errorf("run: %w", err)
	}
	var cmd *exec.Cmd
	if s.st.GetKind() == agentv1.StepKind_STEP_KIND_SETUP {
		cmd, err = s.setup(text)
	} else {
		cmd, err = s.script(text)
	}
	if err != nil {
		return nil, err
	}
	if cmd.Dir, err = s.dir(); err != nil {
		return nil, err
	}
	return cmd, nil
}

// wellKnown adds what every step finds in its environment.
func (s *scriptStep) wellKnown() error {
	j := s.j
	if len(j.path) > 0 {
		s.env["PATH"] = strings.Join(append(slices.Clone(j.path), s.env["PATH"]), ":")
	}
	maps.Copy(s.env, map[string]string{
		"SOLSTICE":            "true",
		"SOLSTICE_RUN_ID":     j.spec.GetRunId(),
		"SOLSTICE_JOB_ID":     j.spec.GetJobId(),
		"SOLSTICE_REPO_URL":   j.spec.GetSource().GetRepoUrl(),
		"SOLSTICE_COMMIT_SHA": j.spec.GetSource().GetCommit(),
		"SOLSTICE_REF":        j.spec.GetSource().GetRef(),
		"SOLSTICE_WORKDIR":    j.a.cfg.WorkDir,
		machineVar:            j.a.machineID,
	})
	for name, key := range map[string]string{"TRACEPARENT": "traceparent", "TRACESTATE": "tracestate"} {
		if v := j.trace[key]; v != "" {
			s.env[name] = v
		}
	}
	for name, ext := range map[string]string{"SOLSTICE_OUTPUT": ".output", "SOLSTICE_ENV": ".env", "SOLSTICE_PATH": ".path"} {
		s.env[name] = s.file(ext) // made by the step, if it has something to say
	}
	return nil
}

func (s *scriptStep) dir() (string, error) {
	wd := s.st.GetWorkdir()
	if wd == "" {
		return s.j.a.cfg.WorkDir, nil
	}
	if !filepath.IsLocal(wd) {
		return "", fmt.Errorf("workdir %q is not inside the work tree", wd)
	}
	dir := filepath.Join(s.j.a.cfg.WorkDir, wd)
	st, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("workdir %q does not exist in the work tree", wd)
	case err != nil:
		return "", fmt.Errorf("workdir: %w", err)
	case !st.IsDir():
		return "", fmt.Errorf("workdir %q is not a directory", wd)
	}
	return dir, nil
}

// script writes text to a file for the step's shell.
func (s *scriptStep) script(text string) (*exec.Cmd, error) {
	ext := ".sh"
	switch s.st.GetShell() {
	case "python":
		ext = ".py"
	case "pwsh":
		ext = ".ps1"
	}
	file := s.file(ext)
	if err := os.WriteFile(file, []byte(text), 0o700); err != nil {
		return nil, infra(err)
	}
	return s.shell(s.st.GetShell(), file)
}

// setup runs a script file of the work tree: itself where it is executable,
// by sh -e otherwise.
func (s *scriptStep) setup(name string) (*exec.Cmd, error) {
	if !filepath.IsLocal(name) {
		return nil, fmt.Errorf("setup %q is not inside the work tree", name)
	}
	file := filepath.Join(s.j.a.cfg.WorkDir, name)
	st, err := os.Stat(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("setup %q does not exist in the work tree", name)
	case err != nil:
		return nil, fmt.Errorf("setup: %w", err)
	case !st.Mode().IsRegular():
		return nil, fmt.Errorf("setup %q is not a file", name)
	case st.Mode()&0o111 != 0:
		return &exec.Cmd{Path: file, Args: []string{file}, Env: flatten(s.env)}, nil
	}
	return s.shell("", file)
}

// shell makes the command line that runs a script file.
func (s *scriptStep) shell(shell, file string) (*exec.Cmd, error) {
	var argv []string
	switch shell {
	case "", "sh":
		argv = []string{"sh", "-e", file}
	case "bash":
		argv = []string{"bash", "--noprofile", "--norc", "-eo", "pipefail", file}
	case "python":
		argv = []string{"python3", file}
		if _, err := lookPath("python3", s.env["PATH"]); err != nil {
			argv[0] = "python"
		}
	case "pwsh":
		argv = []string{"pwsh", "-NoLogo", "-NoProfile", "-NonInteractive", "-File", file}
	default:
		if !strings.Contains(shell, "{0}") {
			return nil, fmt.Errorf("shell %q: want sh, bash, python, pwsh or a command with {0} for the script's file", shell)
		}
		for _, f := range strings.Fields(shell) {
			argv = append(argv, strings.ReplaceAll(f, "{0}", file))
		}
	}
	exe, err := lookPath(argv[0], s.env["PATH"])
	if err != nil {
		err = fmt.Errorf("shell: %w", err)
		if argv[0] == "sh" {
			err = infra(err)
		}
		return nil, err
	}
	return &exec.Cmd{Path: exe, Args: argv, Env: flatten(s.env)}, nil
}

// lookPath finds a program in the step's search path; os/exec would look in
// this process's.
func lookPath(name, path string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	for dir := range strings.SplitSeq(path, ":") {
		if !filepath.IsAbs(dir) {
			continue
		}
		file := filepath.Join(dir, name)
		if st, err := os.Stat(file); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("%q not found in PATH (%s): %w", name, path, exec.ErrNotFound)
}

func flatten(env map[string]string) []string {
	out := make([]string, 0, len(env))
	for _, k := range slices.Sorted(maps.Keys(env)) {
		out = append(out, k+"="+env[k])
	}
	return out
}

// outcome reads what the step left: its exit status and its files. stopErr
// says that it did not end by itself.
func (s *scriptStep) outcome(ps *os.ProcessState, stopErr error) outcome {
	o := outcome{result: agentv1.Result_RESULT_SUCCEEDED, exit: ps.ExitCode()}
	if ws, ok := ps.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		o.signal = unix.SignalName(ws.Signal())
		if o.signal == "" {
			o.signal = fmt.Sprintf("signal %d", int(ws.Signal()))
		}
	}
	var fail error
	var t *stepTimeout
	switch {
	case errors.As(stopErr, &t):
		fail = stopErr
	case stopErr != nil:
		stop := s.j.stoppedOutcome(stopErr)
		stop.exit, stop.signal = o.exit, o.signal
		o = stop
	case o.signal != "":
		fail = fmt.Errorf("ended by %s", o.signal)
	case o.exit != 0:
		fail = fmt.Errorf("exit status %d", o.exit)
	}
	if err := s.collect(&o); err != nil && fail == nil && stopErr == nil {
		fail = err
	}
	if fail != nil {
		f := failed(fail)
		f.exit, f.signal, f.outputs = o.exit, o.signal, o.outputs
		o = f
	}
	return o
}

// collect takes outputs, variables and path entries from the step's files.
func (s *scriptStep) collect(o *outcome) error {
	outputs, err := s.variables(".output")
	if err != nil {
		return fmt.Errorf("SOLSTICE_OUTPUT: %w", err)
	}
	size := 0
	for _, kv := range outputs {
		size += len(kv.Name) + len(kv.Value) + 16
	}
	if room := s.j.journal.eventRoom(); size > room {
		return fmt.Errorf("SOLSTICE_OUTPUT: %w: larger than %d bytes", ErrVariables, room)
	}
	for _, kv := range outputs {
		if o.outputs == nil {
			o.outputs = map[string]string{}
		}
		o.outputs[kv.Name] = kv.Value
	}
	vars, err := s.variables(".env")
	if err == nil {
		err = checkEnv(vars)
	}
	if err != nil {
		return fmt.Errorf("SOLSTICE_ENV: %w", err)
	}
	for _, kv := range vars {
		s.j.env[kv.Name], s.j.cx.Env[kv.Name] = kv.Value, kv.Value
	}
	data, err := readStepFile(s.file(".path"))
	if err == nil {
		var dirs []string
		dirs, err = parsePath(data)
		s.j.path = append(dirs, s.j.path...)
	}
	if err != nil {
		return fmt.Errorf("SOLSTICE_PATH: %w", err)
	}
	return nil
}

func (s *scriptStep) variables(ext string) ([]workflow.KV, error) {
	data, err := readStepFile(s.file(ext))
	if err != nil {
		return nil, err
	}
	return ParseVariables(data)
}
