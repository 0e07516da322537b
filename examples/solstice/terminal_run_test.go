package main

import (
	"bufio"
	"bytes"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
)

const hostile = `
name: terminal
jobs:
  a:
    checkout: false
    steps:
      - name: escape
        run: printf '\033]0;pwned\007\033[2J\033[32mgreen\033[0m\n'
`

func TestTerminal(t *testing.T) {
	t.Parallel()
	dir := workflowRepo(t, hostile)
	for _, c := range []struct {
		name    string
		args    []string
		env     string
		colours bool
	}{
		{"colours", nil, "", true},
		{"plain", []string{"--plain"}, "", false},
		{"NO_COLOR", nil, "NO_COLOR=1", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			u := newUser(t, dir)
			if c.env != "" {
				u.env = []string{c.env}
			}
			out := u.onTerminal(append([]string{"run"}, c.args...)...)
			has(t, "terminal", out, "▸ escape", "green", "terminal")
			if got := strings.Contains(out, "\x1b["); got != c.colours {
				t.Errorf("colours: %v", got)
			}
			if c.colours {
				has(t, "terminal", out, "\x1b[32mgreen\x1b[0m")
			}
			rest := sgr.ReplaceAllString(out, "")
			if strings.Contains(rest, "\x1b") || strings.Contains(out, "pwned") {
				t.Errorf("the job reached the terminal: %q", out)
			}
			u.nothingLeft()
		})
	}
}

// session is a run that is watched while it goes on.
type session struct {
	*user
	cmd *exec.Cmd
	mu  sync.Mutex
	out bytes.Buffer
	eof chan struct{}
}

func (u *user) start(args ...string) *session {
	u.t.Helper()
	s := &session{user: u, cmd: u.command(args...), eof: make(chan struct{})}
	r, w, err := os.Pipe()
	if err != nil {
		u.t.Fatal(err)
	}
	s.cmd.Stdout, s.cmd.Stderr = w, w
	if err := errors.Join(s.cmd.Start(), w.Close()); err != nil {
		u.t.Fatal(err)
	}
	go func() {
		defer close(s.eof)
		defer r.Close()
		for lines := bufio.NewReader(r); ; {
			l, err := lines.ReadString('\n')
			s.mu.Lock()
			s.out.WriteString(l)
			s.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return s
}

func (s *session) output() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.String()
}

func (s *session) says(what string) {
	s.t.Helper()
	s.await("it says "+what, func() bool {
		select {
		case <-s.eof:
			if !strings.Contains(s.output(), what) {
				s.t.Fatalf("it ended without saying %q:\n%s", what, s.output())
			}
		default:
		}
		return strings.Contains(s.output(), what)
	})
}

func (s *session) signal(sig syscall.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
}

// end waits for the end of the program, not for that of what it left.
func (s *session) end() int {
	s.t.Helper()
	_ = s.cmd.Wait() // the code says it
	return s.cmd.ProcessState.ExitCode()
}

const slow = `
jobs:
  slow:
    checkout: false
    steps:
      - name: nap
        run: |
          (setsid sleep 1000 &)
          echo "napping now"
          sleep 1000
      - name: tidy
        if: always()
        run: echo "tidied up"
  next: { needs: slow, steps: [{ run: echo never }] }
`

func TestInterrupt(t *testing.T) {
	t.Parallel()
	u := newUser(t, workflowRepo(t, slow))
	s := u.start("run")
	s.says("| napping now")
	if runtime.GOOS == "linux" && len(u.left()) < 3 { // the directory, the agent, the step
		t.Errorf("the test does not see what runs: %q", u.left())
	}
	s.signal(syscall.SIGINT)
	code := s.end()
	left := u.left()
	<-s.eof
	if code != exitInterrupted {
		t.Errorf("exit status %d", code)
	}
	if len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	has(t, "output", s.output(), "interrupted: cancelling the jobs", "· nap cancelled", "| tidied up", "- workflow cancelled")
}

const stubborn = `
jobs:
  a:
    checkout: false
    steps:
      - run: |
          trap '' TERM
          (setsid sleep 1000 &)
          echo "napping now"
          while :; do sleep 1; done
`

func TestWhoLeavesAtOnceLeavesNothing(t *testing.T) {
	t.Parallel()
	dir := workflowRepo(t, stubborn)
	for _, c := range []struct {
		name  string
		leave func(*session)
		code  int
	}{
		{"second interrupt", func(s *session) {
			s.signal(syscall.SIGINT)
			s.says("interrupt again to leave at once")
			s.signal(syscall.SIGINT)
		}, exitInterrupted},
		{"killed", func(s *session) { s.signal(syscall.SIGKILL) }, -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			u := newUser(t, dir)
			s := u.start("run")
			s.says("| napping now")
			c.leave(s)
			if code := s.end(); code != c.code {
				t.Errorf("exit status %d, want %d:\n%s", code, c.code, s.output())
			}
			u.nothingLeft()
		})
	}
}
