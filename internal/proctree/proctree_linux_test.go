package proctree_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/proctree"
	"go.uber.org/goleak"
)

// The test binary plays the processes: ARGV0 helper MODE TAG.
func TestMain(m *testing.M) {
	if len(os.Args) > 3 && os.Args[1] == "helper" {
		helper(os.Args[2], os.Args[3])
		return
	}
	goleak.VerifyTestMain(m)
}

func spawn(mode, tag string, setsid bool, env []string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", "helper", mode, tag)
	cmd.Env = env
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: setsid}
	cmd.Stdout = os.Stdout
	return cmd
}

func helper(mode, tag string) {
	die := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	switch mode {
	case "sleep":
		fmt.Println("up")
	case "quit":
		return
	case "exit3":
		os.Exit(3)
	case "fork": // leaves an orphan in a session of its own, its environment wiped
		die(spawn("sleep", tag, true, []string{}).Start())
		return
	case "bomb": // forks without end; every generation ends after the next began
		// Should the test fail it is not for ever: the tag ends with the time.
		nanos, err := strconv.ParseInt(tag[strings.LastIndexByte(tag, '-')+1:], 10, 64)
		die(err)
		if time.Since(time.Unix(0, nanos)) > 30*time.Second {
			return
		}
		die(spawn("bomb", tag, true, os.Environ()).Start())
		return
	case "tree", "subreaper":
		if mode == "subreaper" {
			die(proctree.SetSubreaper())
		}
		die(spawn("sleep", tag, false, os.Environ()).Start())
		die(spawn("sleep", tag, true, os.Environ()).Start())
		die(spawn("fork", tag, true, os.Environ()).Run())
		fmt.Println("up")
	}
	never := make(chan os.Signal, 1)
	signal.Notify(never, syscall.SIGUSR1)
	<-never
}

// start runs a helper, waits until want processes said that they are up, and
// gives its identity.
func start(t *testing.T, mode, tag string, want int, env []string) (*exec.Cmd, proctree.ID) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", "helper", mode, tag)
	cmd.Env = env
	cmd.Stderr = os.Stderr
	in, inW, err := os.Pipe()
	ok(t, err)
	outR, out, err := os.Pipe()
	ok(t, err)
	cmd.Stdin, cmd.Stdout = in, out
	ok(t, cmd.Start())
	in.Close()
	out.Close()
	t.Cleanup(func() {
		inW.Close()
		outR.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		for _, pid := range tagged(t, tag) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	})
	lines := bufio.NewScanner(outR)
	for range want {
		if !lines.Scan() {
			t.Fatalf("helper ended: %v", lines.Err())
		}
	}
	p, err := proctree.Lookup(cmd.Process.Pid)
	ok(t, err)
	return cmd, p.ID
}

// tagged finds the living processes that have tag as an argument.
func tagged(t *testing.T, tag string) []int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	ok(t, err)
	var out []int
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil && slices.ContainsFunc(bytes.Split(b, []byte{0}), func(a []byte) bool { return string(a) == tag }) {
			pid, _ := strconv.Atoi(strings.Split(f, "/")[2])
			if pid != os.Getpid() {
				out = append(out, pid)
			}
		}
	}
	return out
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func tag(t *testing.T) string {
	return fmt.Sprintf("tag-%d-%s-%d", os.Getpid(), strings.ReplaceAll(t.Name(), "/", "-"), time.Now().UnixNano())
}

func kill(t *testing.T, target proctree.Target) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ok(t, proctree.KillAll(ctx, target))
}

func nothingLeft(t *testing.T, tag string) {
	t.Helper()
	if left := tagged(t, tag); len(left) > 0 {
		t.Errorf("processes left: %v", left)
	}
}

func TestIdentity(t *testing.T) {
	self, err := proctree.Self()
	ok(t, err)
	if self.PID != os.Getpid() || !self.Alive() {
		t.Errorf("Self = %v, alive %v", self, self.Alive())
	}
	again, err := proctree.ParseID(self.String())
	if err != nil || again != self {
		t.Errorf("ParseID(%q) = %v, %v", self.String(), again, err)
	}
	for _, bad := range []string{"", "1", "1.", "0.1", "-1.1", "x.1"} {
		if _, err := proctree.ParseID(bad); err == nil {
			t.Errorf("ParseID(%q) succeeded", bad)
		}
	}
	recycled := proctree.ID{PID: self.PID, Start: "0-" + self.Start}
	if recycled.Alive() {
		t.Error("another process of the same pid counts as alive")
	}
	if err := recycled.Signal(syscall.SIGKILL); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("signal to a recycled pid: %v", err)
	}
	ok(t, recycled.Wait(t.Context()))
	if _, err := proctree.Lookup(1 << 30); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("Lookup of an absent pid: %v", err)
	}
}

func TestWait(t *testing.T) {
	cmd, id := start(t, "sleep", tag(t), 1, []string{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- id.Wait(ctx) }()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled Wait = %v", err)
	}
	go func() { done <- id.Wait(t.Context()) }()
	ok(t, id.Signal(syscall.SIGKILL))
	ok(t, <-done)
	if id.Alive() {
		t.Error("a zombie counts as alive")
	}
	if p, err := proctree.Lookup(id.PID); err != nil || !p.Zombie {
		t.Errorf("Wait reaped: %+v, %v", p, err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("killed helper reported success")
	}
	if err := id.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("signal to an ended process: %v", err)
	}
}

func TestDescendants(t *testing.T) {
	_, id := start(t, "subreaper", tag(t), 4, []string{})
	ids, err := proctree.Descendants(id.PID)
	ok(t, err)
	if len(ids) != 3 {
		t.Errorf("descendants of a subreaper: %v, want 3", ids)
	}
	self, err := proctree.Descendants(os.Getpid())
	ok(t, err)
	if !slices.Contains(self, id) || len(self) < 4 {
		t.Errorf("descendants of the test: %v", self)
	}
}

func TestMarked(t *testing.T) {
	tag := tag(t)
	_, id := start(t, "tree", tag, 4, []string{"A=B", "MARK=" + tag})
	ids, err := proctree.Marked("MARK=" + tag)
	ok(t, err)
	if len(ids) != 3 || !slices.Contains(ids, id) {
		t.Errorf("marked: %v, want 3 with %v", ids, id)
	}
	for _, other := range []string{"MARK=" + tag[1:], "MARK=" + tag + "0", "XMARK=" + tag} {
		if ids, err := proctree.Marked(other); err != nil || len(ids) != 0 {
			t.Errorf("Marked(%q) = %v, %v", other, ids, err)
		}
	}
	if _, err := proctree.Marked("MARK"); err == nil {
		t.Error("a marker without a value was accepted")
	}
}

func TestKillAllByDescent(t *testing.T) {
	tag, other := tag(t), "foreign-"+tag(t)
	_, foreign := start(t, "sleep", other, 1, []string{})
	_, id := start(t, "subreaper", tag, 4, []string{})
	kill(t, proctree.Target{Root: id})
	nothingLeft(t, tag)
	if !foreign.Alive() {
		t.Error("a process that is no descendant was killed")
	}
	kill(t, proctree.Target{Root: id}) // nothing to do
}

func TestKillAllByMarker(t *testing.T) {
	tag := tag(t)
	_, id := start(t, "tree", tag, 4, []string{"MARK=" + tag})
	ok(t, id.Signal(syscall.SIGKILL))
	ok(t, id.Wait(t.Context()))
	kill(t, proctree.Target{Root: id, Marker: "MARK=" + tag})
	// The orphan that wiped its environment is out of reach without a cgroup.
	if left := tagged(t, tag); len(left) != 1 {
		t.Errorf("left: %v, want the one without a marker", left)
	}
}

func TestKillAllSparesRoot(t *testing.T) {
	tag := tag(t)
	_, id := start(t, "subreaper", tag, 4, []string{})
	kill(t, proctree.Target{Root: id, SpareRoot: true})
	if !id.Alive() || len(tagged(t, tag)) != 1 {
		t.Errorf("root alive %v, left %v", id.Alive(), tagged(t, tag))
	}
}

func TestKillAllForkBomb(t *testing.T) {
	tag := tag(t)
	start(t, "bomb", tag, 0, []string{"MARK=" + tag})
	kill(t, proctree.Target{Marker: "MARK=" + tag})
	nothingLeft(t, tag)
}

func TestKillAllIsBounded(t *testing.T) {
	tag := tag(t)
	_, id := start(t, "sleep", tag, 1, []string{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := proctree.KillAll(ctx, proctree.Target{Root: id}); !errors.Is(err, context.Canceled) {
		t.Errorf("KillAll with an ended context: %v", err)
	}
}

func TestReaper(t *testing.T) {
	ok(t, proctree.SetSubreaper())
	var r proctree.Reaper
	tag := tag(t)
	ours := spawn("exit3", tag, false, []string{})
	ok(t, r.Start(ours))
	exited, err := proctree.Lookup(ours.Process.Pid)
	ok(t, err)
	ok(t, exited.Wait(t.Context()))

	fork := spawn("fork", tag, false, []string{})
	fork.Stdout = nil
	ok(t, r.Start(fork))
	ok(t, r.Wait(fork))
	self, err := proctree.Self()
	ok(t, err)
	var orphan proctree.ID
	for _, pid := range tagged(t, tag) {
		if p, err := proctree.Lookup(pid); err == nil && !p.Zombie {
			orphan = p.ID
		}
	}
	kill(t, proctree.Target{Root: self, Reaper: &r})
	if orphan.IsZero() || orphan.Alive() {
		t.Errorf("adopted orphan %v still runs", orphan)
	}
	for r.Reap() > 0 {
		continue
	}
	if _, err := proctree.Lookup(orphan.PID); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("adopted orphan was not reaped: %v", err)
	}
	var exit *exec.ExitError
	if err := r.Wait(ours); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("Wait of our own child = %v, want exit status 3", err)
	}
}

func TestCgroup(t *testing.T) {
	tag := tag(t)
	c, err := proctree.NewCgroup("proctree-" + tag)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Logf("no cgroup to be had: %v", err)
		return
	}
	ok(t, err)
	t.Cleanup(func() { _ = c.Remove(context.Background()) })
	cmd := exec.Command("/proc/self/exe", "helper", "tree", tag)
	cmd.Env = []string{}
	done, err := c.Attach(cmd)
	ok(t, err)
	out, err := cmd.StdoutPipe()
	ok(t, err)
	_, err = cmd.StdinPipe()
	ok(t, err)
	ok(t, cmd.Start())
	done()
	lines := bufio.NewScanner(out)
	for range 4 {
		lines.Scan()
	}
	if ids, err := c.Processes(); err != nil || len(ids) != 4 {
		t.Errorf("processes in the cgroup: %v, %v; want 4", ids, err)
	}
	ok(t, os.Mkdir(filepath.Join(c.Path(), "nested"), 0o755))
	again, err := proctree.OpenCgroup(c.Path())
	ok(t, err)
	kill(t, proctree.Target{Cgroup: again})
	_ = cmd.Wait()
	nothingLeft(t, tag)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ok(t, c.Remove(ctx))
	ok(t, c.Remove(ctx))
	if _, err := proctree.OpenCgroup(c.Path()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removed cgroup: %v", err)
	}
	if _, err := proctree.OpenCgroup(t.TempDir()); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("a directory passed for a cgroup: %v", err)
	}
}

func TestCgroupRemoveKills(t *testing.T) {
	tag := tag(t)
	c, err := proctree.NewCgroup("proctree-" + tag)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Logf("no cgroup to be had: %v", err)
		return
	}
	ok(t, err)
	cmd := exec.Command("/proc/self/exe", "helper", "sleep", tag)
	cmd.Env = []string{}
	done, err := c.Attach(cmd)
	ok(t, err)
	ok(t, cmd.Start())
	done()
	go func() { _ = cmd.Wait() }()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ok(t, c.Remove(ctx))
	nothingLeft(t, tag)
}
