package processvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/solstice-ci/solstice-go/internal/proctree"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

func stopped(i vmprovider.Instance) bool { return i.State == vmprovider.StateStopped }

// destroyAll is what a reaper does.
func destroyAll(t *testing.T, p *Provider) {
	t.Helper()
	ctx := testContext(t)
	for inst, err := range p.List(ctx, vmprovider.ListOptions{Owner: "me"}) {
		ok(t, err)
		ok(t, p.Destroy(ctx, inst.ID, vmprovider.DestroyOptions{}))
	}
}

// foreign starts a process that belongs to no machine.
func foreign(t *testing.T) proctree.ID {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "fake-step", "sleep", "elsewhere")
	cmd.Env = []string{MarkerVariable + "=another"}
	ok(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	proc, err := proctree.Lookup(cmd.Process.Pid)
	ok(t, err)
	return proc.ID
}

func TestFiles(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	p := open(t, root, func(c *Config) { c.StepEnv = map[string]string{"PATH": "/bin"} })
	ctx := testContext(t)
	id := id(t)
	s := spec(id, "environment")
	s.Labels = map[string]string{"pool": "host"}
	_, err := p.Create(ctx, s)
	ok(t, err)
	awaitConsole(t, p, id, fmt.Sprintf("[%q]\n", MarkerVariable+"="+id))
	dir := filepath.Join(root, id)
	for name, mode := range map[string]os.FileMode{
		"": 0o700, bootstrapFile: 0o600, recordFile: 0o600, statusFile: 0o600, consoleFile: 0o600,
	} {
		fi, err := os.Stat(filepath.Join(dir, name))
		ok(t, err)
		if fi.Mode().Perm() != mode {
			t.Errorf("%s has mode %o, want %o", name, fi.Mode().Perm(), mode)
		}
	}
	b, err := os.ReadFile(filepath.Join(dir, bootstrapFile))
	ok(t, err)
	var boot BootstrapFile
	ok(t, json.Unmarshal(b, &boot))
	if boot.Token != "secret-token" || boot.Env["PATH"] != "/bin" || boot.StateDir != filepath.Join(dir, stateDir) || boot.WorkDir != filepath.Join(dir, workDir) {
		t.Errorf("bootstrap file: %s", b)
	}
	for _, name := range []string{recordFile, statusFile} {
		if b, err = os.ReadFile(filepath.Join(dir, name)); err != nil || strings.Contains(string(b), "secret") {
			t.Errorf("%s: %s, %v", name, b, err)
		}
	}
	rec, err := p.load(id)
	ok(t, err)
	sid, _, errno := syscall.Syscall(syscall.SYS_GETSID, uintptr(rec.Process.PID), 0, 0)
	if errno != 0 || int(sid) != rec.Process.PID {
		t.Errorf("agent %d is in session %d (%v), not its own", rec.Process.PID, sid, errno)
	}
	destroyAll(t, p)
	nothingLeft(t, root)
}

func TestDestroyEndsTree(t *testing.T) {
	for name, c := range map[string]struct {
		behaviour string
		change    func(*Config)
	}{
		"cgroup":            {"tree", func(*Config) {}},
		"cgroup, no agent":  {"dead-tree", func(*Config) {}},
		"descent":           {"tree", noCgroup},
		"marker, no agent":  {"dead-tree", noCgroup},
		"recorded cgroup":   {"tree", func(*Config) {}},
		"adopted, descent":  {"tree", noCgroup},
		"adopted, no agent": {"dead-tree", noCgroup},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			other := foreign(t)
			p := open(t, root, c.change)
			ctx := testContext(t)
			id := id(t)
			_, err := p.Create(ctx, spec(id, c.behaviour))
			ok(t, err)
			awaitConsole(t, p, id, "ready")
			if c.behaviour == "dead-tree" {
				// For a moment it has ended and nobody has taken its status yet.
				inst, err := vmprovider.Wait(ctx, p, id, func(i vmprovider.Instance) bool {
					return stopped(i) && i.Reason != "ended unobserved"
				})
				if err != nil || !strings.Contains(inst.Reason, "exit status 1") {
					t.Errorf("machine whose agent ended: %+v, %v", inst, err)
				}
			}
			if n := len(processes(t, root)); n < 2 {
				t.Fatalf("%d processes; the test is pointless", n)
			}
			switch name {
			case "recorded cgroup": // made by a provider that would make none
				ok(t, p.Close())
				p = open(t, root, noCgroup)
			case "adopted, descent", "adopted, no agent":
				ok(t, p.Close())
				p = open(t, root, c.change)
			}
			destroyAll(t, p)
			nothingLeft(t, root)
			if !other.Alive() {
				t.Error("a foreign process was killed")
			}
		})
	}
}

// TestKilledOrchestrator kills the orchestrator's process at every step of
// Create and Destroy; one sweep by the next one leaves nothing.
func TestKilledOrchestrator(t *testing.T) {
	exe, err := os.Executable()
	ok(t, err)
	points := []string{
		"begun", "intent", "bootstrap", "console", "named", "cgroup", "started", "recorded",
		"destroying", "killed", "emptied", "unnamed",
	}
	for _, mode := range []string{"cgroup", "descent"} {
		for _, point := range points {
			if mode == "descent" && point == "cgroup" {
				continue
			}
			t.Run(mode+" "+point, func(t *testing.T) {
				root := t.TempDir()
				id := id(t)
				other := foreign(t)
				cmd := exec.Command(exe, "fake-orchestrator", root, id, point, mode, "tree")
				cmd.Stderr = os.Stderr
				err := cmd.Run()
				var exit *exec.ExitError
				if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
					if point == "cgroup" && err == nil {
						return // none to be had on this host
					}
					t.Fatalf("the orchestrator was not killed at %q: %v", point, err)
				}
				p := open(t, root, func(c *Config) { c.NoCgroup = mode == "descent" })
				ctx := testContext(t)
				if point == "recorded" {
					inst, err := p.Get(ctx, id)
					if err != nil || inst.State != vmprovider.StateRunning {
						t.Errorf("a complete machine is %+v, %v; want it running", inst, err)
					}
				} else if inst, err := p.Get(ctx, id); err == nil && inst.State != vmprovider.StateLeftover {
					t.Errorf("an incomplete machine is %+v; want a leftover", inst)
				}
				destroyAll(t, p)
				nothingLeft(t, root)
				if !other.Alive() {
					t.Error("a foreign process was killed")
				}
			})
		}
	}
}

func TestAdoptedExitIsNoticed(t *testing.T) {
	exe, err := os.Executable()
	ok(t, err)
	root := t.TempDir()
	id := id(t)
	_ = exec.Command(exe, "fake-orchestrator", root, id, "recorded", "descent", "idle").Run()
	p := open(t, root)
	ctx := testContext(t)
	rec, err := p.load(id)
	ok(t, err)
	got := make(chan vmprovider.Instance, 1)
	go func() {
		inst, _ := vmprovider.Wait(ctx, p, id, stopped)
		got <- inst
	}()
	ok(t, rec.Process.Signal(syscall.SIGKILL))
	if inst := <-got; inst.State != vmprovider.StateStopped || inst.Reason == "" {
		t.Errorf("killed agent's machine: %+v", inst)
	}
	destroyAll(t, p)
	nothingLeft(t, root)
}

// TestRecycledPID: a machine's record names a pid that another process has now.
func TestRecycledPID(t *testing.T) {
	root := t.TempDir()
	other := foreign(t)
	id := id(t)
	ok(t, os.Mkdir(filepath.Join(root, id), 0o700))
	for name, v := range map[string]any{
		recordFile: intent{ID: id, Owner: "me", Creator: other},
		statusFile: status{Process: &proctree.ID{PID: other.PID, Start: "1-" + other.Start}},
	} {
		b, err := json.Marshal(v)
		ok(t, err)
		ok(t, os.WriteFile(filepath.Join(root, id, name), b, 0o600))
	}
	p := open(t, root)
	inst, err := p.Get(testContext(t), id)
	if err != nil || inst.State != vmprovider.StateStopped {
		t.Errorf("machine whose pid was recycled: %+v, %v", inst, err)
	}
	destroyAll(t, p)
	nothingLeft(t, root)
	if !other.Alive() {
		t.Error("the process that got the pid was killed")
	}
}

func TestDamagedRecord(t *testing.T) {
	for name, damage := range map[string]func(file string) error{
		"garbage": func(f string) error { return os.WriteFile(f, []byte("{"), 0o600) },
		"gone":    os.Remove,
		"another": func(f string) error { return os.WriteFile(f, []byte(`{"id":"x"}`), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			p := open(t, root)
			ctx := testContext(t)
			id := id(t)
			_, err := p.Create(ctx, spec(id, "tree"))
			ok(t, err)
			awaitConsole(t, p, id, "ready")
			ok(t, p.Close())
			ok(t, damage(filepath.Join(root, id, recordFile)))
			p = open(t, root)
			inst, err := p.Get(ctx, id)
			if err != nil || inst.State != vmprovider.StateLeftover || inst.Reason == "" {
				t.Errorf("machine with a damaged record: %+v, %v", inst, err)
			}
			ok(t, p.Destroy(ctx, id, vmprovider.DestroyOptions{}))
			nothingLeft(t, root)
		})
	}
}

func TestConsoleIsBounded(t *testing.T) {
	root := t.TempDir()
	const limit = 10_000
	p := open(t, root, func(c *Config) { c.ConsoleBytes = limit })
	ctx := testContext(t)
	id := id(t)
	_, err := p.Create(ctx, spec(id, "endless"))
	ok(t, err)
	mark := p.consoleMark()
	awaitConsole(t, p, id, mark)
	rec, err := p.load(id)
	ok(t, err)
	file := filepath.Join(root, id, consoleFile)
	// Held still, the file is seen as the next bounding leaves it: cut, and then marked.
	ok(t, rec.Process.Signal(syscall.SIGSTOP))
	for bounded := false; !bounded; {
		ok(t, ctx.Err())
		fi, err := os.Stat(file)
		ok(t, err)
		bounded = fi.Size() == int64(limit+len(mark))
	}
	b, err := os.ReadFile(file)
	ok(t, err)
	if !strings.HasPrefix(string(b), "line 0\nline 1\n") || !strings.HasSuffix(string(b), mark) || len(b) != limit+len(mark) {
		t.Errorf("console file of %d bytes: %.20q … %q", len(b), b, b[max(0, len(b)-60):])
	}
	r, err := p.Console(ctx, id, false)
	ok(t, err)
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || string(got) != string(b) {
		t.Errorf("console reads %d bytes, %v; want %d", len(got), err, len(b))
	}
	destroyAll(t, p)
	nothingLeft(t, root)
}

func TestCreateFailsCleanly(t *testing.T) {
	root := t.TempDir()
	ctx := testContext(t)
	for name, change := range map[string]func(*Config){
		"no such program": func(c *Config) { c.Command = []string{filepath.Join(root, "absent")} },
		"not executable":  func(c *Config) { c.Command = []string{"/etc/passwd"} },
	} {
		p := open(t, root, change)
		if _, err := p.Create(ctx, spec(id(t), "")); err == nil || errors.Is(err, vmprovider.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
		nothingLeft(t, root)
	}
	for _, bad := range []Config{
		{},
		{Root: root},
		{Root: root, Command: []string{"agent"}},
		{Root: root, Command: []string{"/a"}, Max: -1},
		{Root: root, Command: []string{"/a"}, Runner: fakeRunner},
	} {
		if _, err := New(bad); !errors.Is(err, vmprovider.ErrInvalid) {
			t.Errorf("New(%+v): %v", bad, err)
		}
	}
}

// TestInterruptedCreate interrupts Create at every step, by its context.
func TestInterruptedCreate(t *testing.T) {
	for _, point := range []string{"begun", "intent", "bootstrap", "console", "named", "started", "recorded"} {
		t.Run(point, func(t *testing.T) {
			root := t.TempDir()
			ctx, cancel := context.WithCancel(testContext(t))
			var passed []string
			p := open(t, root, func(c *Config) {
				c.failpoint = func(at string) {
					passed = append(passed, at)
					if at == point {
						cancel()
					}
				}
			})
			if _, err := p.Create(ctx, spec(id(t), "tree")); !errors.Is(err, context.Canceled) {
				t.Errorf("Create: %v", err)
			}
			if !slices.Contains(passed, point) {
				t.Errorf("Create passes %v, not %q", passed, point)
			}
			nothingLeft(t, root)
		})
	}
}
