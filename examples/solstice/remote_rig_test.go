package main

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/testenv" //nolint:depguard // the test is not part of the main that is copied
	"github.com/solstice-ci/solstice-go/solstice"
)

var orchestratorBinary = sync.OnceValues(func() (string, error) { return build("orchestrator") })

// server is an orchestrator that a test started, on embedded defaults.
type server struct {
	*testenv.Daemon
	t    *testing.T
	dir  string // of its state
	args []string
}

// serve starts one; args win over free ports.
func serve(t *testing.T, args ...string) *server {
	t.Helper()
	s := &server{t: t, dir: filepath.Join(t.TempDir(), "state"), args: append([]string{
		"--grpc-addr=127.0.0.1:0", "--http-addr=127.0.0.1:0", "--agent-addr=127.0.0.1:0", "--runner-addr=127.0.0.1:0", "--drain-timeout=0s",
	}, args...)}
	s.again()
	return s
}

// again starts one on the same state.
func (s *server) again() {
	s.t.Helper()
	exe, err := orchestratorBinary()
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := exec.Command(exe, append([]string{"--state-dir", s.dir}, s.args...)...)
	cmd.Env = environ()
	s.Daemon = testenv.Launch(s.t, cmd, "orchestrator started")
	s.Await()
	d := s.Daemon
	s.t.Cleanup(func() {
		if s.Daemon == d {
			s.tidy()
		}
	})
}

// tidy ends the jobs that go on, which would outlive the orchestrator.
func (s *server) tidy() {
	solstice := func(args ...string) string {
		exe, err := binary()
		if err != nil {
			s.t.Fatal(err)
		}
		cmd := exec.Command(exe, args...)
		cmd.Env = environ("SOLSTICE_SERVER="+s.Said("grpc_addr"), "STATE_DIR="+s.dir)
		out, err := cmd.CombinedOutput()
		if err != nil {
			s.t.Fatalf("solstice %q: %v\n%s", args, err, out)
		}
		return string(out)
	}
	for _, r := range decoded[runList](s.t, solstice("status", "--json", "--limit", "500", "--state", "queued,running")).Runs {
		solstice("cancel", r.ID)
	}
	for began := time.Now(); solstice("machines", "--json") != noMachines; time.Sleep(20 * time.Millisecond) {
		if time.Since(began) > patience {
			s.t.Fatal("machines are left")
		}
	}
}

const noMachines = "{\n  \"machines\": []\n}\n"

func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// user is a person in a directory, with the server's address and state
// directory in the environment.
func (s *server) user(dir string) *user {
	s.t.Helper()
	u := newUser(s.t, dir)
	u.env = []string{"SOLSTICE_SERVER=" + s.Said("grpc_addr"), "STATE_DIR=" + s.dir}
	return u
}

// ok runs the program, which has to succeed, and gives what it printed.
func (u *user) ok(args ...string) string {
	u.t.Helper()
	r := u.solstice(args...)
	if r.code != 0 {
		u.t.Fatalf("solstice %q: exit status %d\n%s%s", args, r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// decoded is what the program printed as one JSON document; nothing else may be
// there.
func decoded[T any](t *testing.T, text string) (v T) {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&v); err != nil || dec.More() {
		t.Fatalf("not one JSON document (%v):\n%s", err, text)
	}
	return v
}

// documents are what the program printed as JSON lines.
func documents[T any](t *testing.T, text string) (all []T) {
	t.Helper()
	for l := range strings.Lines(text) {
		all = append(all, decoded[T](t, l))
	}
	if len(all) == 0 {
		t.Fatal("no JSON lines")
	}
	return all
}

type runList struct {
	Runs []solstice.Run `json:"runs"`
	Next string         `json:"next_page"`
}

// enqueue gives the one run that was accepted.
func (u *user) enqueue(args ...string) solstice.Run {
	u.t.Helper()
	l := decoded[runList](u.t, u.ok(append([]string{"enqueue", "--json"}, args...)...))
	if len(l.Runs) != 1 {
		u.t.Fatalf("%d runs", len(l.Runs))
	}
	return l.Runs[0]
}

// job of a run by its name.
func job(t *testing.T, r solstice.Run, name string) solstice.Job {
	t.Helper()
	for _, j := range r.Jobs {
		if j.Name == name {
			return j
		}
	}
	t.Fatalf("run %s has no job %q", r.ID, name)
	return solstice.Job{}
}

// over waits until a run is, and gives the exit status that says how.
func (u *user) over(id string) int {
	u.t.Helper()
	r := u.solstice("status", "--watch", id)
	if r.code > 1 {
		u.t.Fatalf("%s", r.stderr)
	}
	return r.code
}

func kill(s *server) { s.Stop(syscall.SIGKILL) }

func shell(t *testing.T, name, script string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, append([]string{"-c", script}, args...)...)
	cmd.Env = environ()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
	return string(out)
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
