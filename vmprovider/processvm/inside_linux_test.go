package processvm

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

func TestInsideFiles(t *testing.T) {
	root := t.TempDir()
	p := open(t, root, inside)
	ctx := testContext(t)
	id := id(t)
	_, err := p.Create(ctx, spec(id, ""))
	ok(t, err)
	for {
		_, err := os.Stat(filepath.Join(root, id, workDir))
		if err == nil {
			break
		}
		ok(t, ctx.Err())
	}
	entries, err := os.ReadDir(filepath.Join(root, id))
	ok(t, err)
	for _, e := range entries {
		if e.Name() != recordFile && e.Name() != workDir {
			t.Errorf("a machine inside this process has a file %s", e.Name())
		}
	}
	if b, err := os.ReadFile(filepath.Join(root, id, recordFile)); err != nil || strings.Contains(string(b), "secret") {
		t.Errorf("%s: %s, %v", recordFile, b, err)
	}
	destroyAll(t, p)
	nothingLeft(t, root)
}

func TestInsideEndsTree(t *testing.T) {
	for _, behaviour := range []string{"tree", "panic"} {
		for name, change := range map[string]func(*Config){"cgroup": func(*Config) {}, "marker": noCgroup} {
			t.Run(behaviour+" "+name, func(t *testing.T) {
				root := t.TempDir()
				other := foreign(t)
				p := open(t, root, inside, change)
				ctx := testContext(t)
				id := id(t)
				_, err := p.Create(ctx, spec(id, behaviour))
				ok(t, err)
				awaitConsole(t, p, id, "ready")
				if behaviour == "panic" {
					inst, err := vmprovider.Wait(ctx, p, id, stopped)
					if err != nil || !strings.Contains(inst.Reason, "panic: as asked for") {
						t.Errorf("machine whose agent panicked: %+v, %v", inst, err)
					}
					awaitConsole(t, p, id, "fakeRunner") // the stack
				}
				if n := len(processes(t, root)); n < 2 {
					t.Fatalf("%d processes; the test is pointless", n)
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

// TestInsideKilled kills the process that machines are inside of at every step
// of Create and Destroy, and while a job runs; the next one finds them stopped,
// or half-made, and leaves nothing.
func TestInsideKilled(t *testing.T) {
	exe, err := os.Executable()
	ok(t, err)
	for _, mode := range []string{"cgroup", "descent"} {
		for _, point := range []string{"begun", "intent", "named", "cgroup", "started", "killed", "destroying", "killed tree", "emptied", "unnamed"} {
			if mode == "descent" && point == "cgroup" {
				continue
			}
			t.Run(mode+" "+point, func(t *testing.T) {
				root := t.TempDir()
				id := id(t)
				other := foreign(t)
				behaviour := "idle"
				if point == "killed tree" {
					behaviour = "killed"
				}
				cmd := exec.Command(exe, "fake-orchestrator", root, id, point, mode+"-inside", behaviour)
				cmd.Stderr = os.Stderr
				err := cmd.Run()
				var exit *exec.ExitError
				if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
					if point == "cgroup" && err == nil {
						return // none to be had on this host
					}
					t.Fatalf("the process was not killed at %q: %v", point, err)
				}
				if point == "killed tree" {
					if n := len(processes(t, root)); n < 2 {
						t.Fatalf("%d processes; the test is pointless", n)
					}
				}
				p := open(t, root, func(c *Config) { c.NoCgroup = mode == "descent" })
				inst, err := p.Get(testContext(t), id)
				switch {
				case point == "begun" || point == "intent" || point == "unnamed":
					if !errors.Is(err, vmprovider.ErrNotFound) {
						t.Errorf("what is no machine is %+v, %v", inst, err)
					}
				case err != nil || inst.State != vmprovider.StateStopped || inst.Reason == "":
					t.Errorf("a machine inside a process that was killed is %+v, %v; want it stopped", inst, err)
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

func TestInsideClose(t *testing.T) {
	root := t.TempDir()
	p := open(t, root, inside)
	ctx := testContext(t)
	running, over := id(t), id(t)
	_, err := p.Create(ctx, spec(running, "tree"))
	ok(t, err)
	awaitConsole(t, p, running, "ready")
	_, err = p.Create(ctx, spec(over, "goexit"))
	ok(t, err)
	_, err = vmprovider.Wait(ctx, p, over, stopped)
	ok(t, err)
	ok(t, p.Close())
	if pids := processes(t, root); len(pids) > 0 {
		t.Errorf("processes left by Close: %v", pids)
	}
	p = open(t, root)
	for id, why := range map[string]string{running: "was stopped", over: "its goroutine was ended"} {
		inst, err := p.Get(ctx, id)
		if err != nil || inst.State != vmprovider.StateStopped || !strings.Contains(inst.Reason, why) {
			t.Errorf("after Close: %+v, %v; want it stopped: %s", inst, err, why)
		}
		if _, err := p.Console(ctx, id, false); !errors.Is(err, vmprovider.ErrUnavailable) {
			t.Errorf("console that went with its process: %v; want ErrUnavailable", err)
		}
	}
	destroyAll(t, p)
	nothingLeft(t, root)
}

// TestInsideElsewhere: who did not make a machine cannot end it while it runs.
func TestInsideElsewhere(t *testing.T) {
	root := t.TempDir()
	p, other := open(t, root, inside), open(t, root)
	ctx := testContext(t)
	id := id(t)
	_, err := p.Create(ctx, spec(id, ""))
	ok(t, err)
	if inst, err := other.Get(ctx, id); err != nil || inst.State != vmprovider.StateRunning {
		t.Errorf("seen from elsewhere: %+v, %v; want it running", inst, err)
	}
	if err := other.Destroy(ctx, id, vmprovider.DestroyOptions{}); !errors.Is(err, vmprovider.ErrUnavailable) {
		t.Errorf("Destroy from elsewhere: %v; want ErrUnavailable", err)
	}
	if inst, err := p.Get(ctx, id); err != nil || inst.State != vmprovider.StateRunning {
		t.Errorf("afterwards: %+v, %v; want it running", inst, err)
	}
	destroyAll(t, p)
	nothingLeft(t, root)
}

func TestInsideConsoleIsBounded(t *testing.T) {
	root := t.TempDir()
	const limit = 10_000
	p := open(t, root, inside, func(c *Config) { c.ConsoleBytes = limit })
	ctx := testContext(t)
	id := id(t)
	_, err := p.Create(ctx, spec(id, "endless"))
	ok(t, err)
	awaitConsole(t, p, id, p.consoleMark())
	r, err := p.Console(ctx, id, false)
	ok(t, err)
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil || !strings.HasPrefix(string(b), "line 0\nline 1\n") || !strings.HasSuffix(string(b), p.consoleMark()) || len(b) != limit+len(p.consoleMark()) {
		t.Errorf("console of %d bytes, %v: %.20q … %q", len(b), err, b, b[max(0, len(b)-60):])
	}
	kept := &p.resident(id).console
	kept.mu.Lock()
	if n := len(kept.kept); n != limit {
		t.Errorf("%d bytes are kept, want %d", n, limit)
	}
	kept.mu.Unlock()
	destroyAll(t, p)
	nothingLeft(t, root)
}

// TestInsideManyMachines: what machines need is given back, one after another.
func TestInsideManyMachines(t *testing.T) {
	root := t.TempDir()
	p := open(t, root, inside)
	ctx := testContext(t)
	descriptors := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		ok(t, err)
		return len(entries)
	}
	one := func(i int) {
		id := fmt.Sprintf("m-%d-%d", os.Getpid(), i)
		_, err := p.Create(ctx, spec(id, []string{"", "exit"}[i%2]))
		ok(t, err)
		ok(t, p.Destroy(ctx, id, vmprovider.DestroyOptions{}))
	}
	remembered := func() int {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.residents) + p.locks.InUse() + len(p.creating) + len(p.attended)
	}
	one(0)
	goroutines, files := runtime.NumGoroutine(), descriptors()
	for i := range 1000 {
		one(i)
	}
	// A destroyed machine's attendant may be about to end.
	for remembered() > 0 || runtime.NumGoroutine() > goroutines {
		if err := ctx.Err(); err != nil {
			t.Fatalf("%d machines are remembered; %d goroutines, %d before", remembered(), runtime.NumGoroutine(), goroutines)
		}
		runtime.Gosched()
	}
	if n := descriptors(); n > files {
		t.Errorf("%d files are open, %d were before", n, files)
	}
	nothingLeft(t, root)
}
