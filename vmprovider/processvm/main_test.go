package processvm

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
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
	"github.com/solstice-ci/solstice-go/vmprovider"
	"go.uber.org/goleak"
)

// The test binary plays the agent, its steps and an orchestrator:
//
//	ARGV0 fake-agent --bootstrap FILE   what Bootstrap.Hostname says
//	ARGV0 fake-step MODE TAG
//	ARGV0 fake-orchestrator ROOT ID FAILPOINT cgroup|descent[-inside] BEHAVIOUR
func TestMain(m *testing.M) {
	if len(os.Args) > 3 {
		switch os.Args[1] {
		case "fake-agent":
			fakeAgent(os.Args[len(os.Args)-1])
			return
		case "fake-step":
			fakeStep(os.Args[2], os.Args[3])
			return
		case "fake-orchestrator":
			fakeOrchestrator(os.Args[2], os.Args[3], os.Args[4], os.Args[5], os.Args[6])
			return
		}
	}
	goleak.VerifyTestMain(m)
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func forever() {
	never := make(chan os.Signal, 1)
	signal.Notify(never, syscall.SIGUSR1)
	<-never
}

func fakeAgent(file string) {
	b, err := os.ReadFile(file)
	must(err)
	var boot BootstrapFile
	must(json.Unmarshal(b, &boot))
	must(os.Mkdir(boot.WorkDir, 0o700))
	switch boot.Hostname {
	case "exit":
		fmt.Println("bye")
		os.Exit(3)
	case "panic":
		panic("oh")
	case "print":
		fmt.Print(boot.RunnerURL)
	case "environment":
		fmt.Printf("%q\n", os.Environ())
	case "endless":
		for i := 0; ; i++ {
			fmt.Println("line", i)
		}
	case "tree", "dead-tree":
		if boot.Hostname == "tree" {
			// An orphan that wipes its environment is found as long as we adopt.
			_ = proctree.SetSubreaper()
			must(step("fork", boot.WorkDir, []string{}).Run())
		}
		env := os.Environ()
		must(step("sleep", boot.WorkDir, env).Start())
		must(step("fork", boot.WorkDir, env).Run())
		must(step("write", boot.WorkDir, env).Run())
		fmt.Println("ready")
		if boot.Hostname == "dead-tree" {
			os.Exit(1)
		}
	}
	forever()
}

func step(mode, tag string, env []string) *exec.Cmd {
	return &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{"step", "fake-step", mode, tag}, Env: env, Dir: tag,
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
}

func fakeStep(mode, work string) {
	switch mode {
	case "fork":
		must(step("sleep", work, os.Environ()).Start())
		return
	case "write": // what a module cache and a hostile job leave behind
		must(os.MkdirAll(filepath.Join(work, "pkg/mod/x@v1"), 0o700))
		must(os.WriteFile(filepath.Join(work, "pkg/mod/x@v1/file"), []byte("x"), 0o400))
		must(os.Chmod(filepath.Join(work, "pkg/mod/x@v1"), 0o555))
		must(os.Chmod(filepath.Join(work, "pkg/mod"), 0o000))
		must(os.Symlink("/", filepath.Join(work, "everything")))
		return
	}
	forever()
}

func fakeOrchestrator(root, id, failpoint, mode, behaviour string) {
	exe, err := os.Executable()
	must(err)
	cfg := Config{
		Root: root, Command: []string{exe, "fake-agent"}, NoCgroup: !strings.HasPrefix(mode, "cgroup"),
		failpoint: func(at string) {
			if at == failpoint {
				must(syscall.Kill(os.Getpid(), syscall.SIGKILL))
				select {}
			}
		},
	}
	if strings.HasSuffix(mode, "-inside") {
		inside(&cfg)
	}
	p, err := New(cfg)
	must(err)
	_, err = p.Create(context.Background(), spec(id, behaviour))
	must(err)
	if behaviour == "killed" {
		forever()
	}
	must(p.Destroy(context.Background(), id, vmprovider.DestroyOptions{}))
	must(p.Close())
}

func spec(id, behaviour string) vmprovider.Spec {
	return vmprovider.Spec{ID: id, Owner: "me", Bootstrap: vmprovider.Bootstrap{Hostname: behaviour, Token: "secret-token", InstanceID: id}}
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func open(t *testing.T, root string, change ...func(*Config)) *Provider {
	t.Helper()
	exe, err := os.Executable()
	ok(t, err)
	cfg := Config{Root: root, Command: []string{exe, "fake-agent"}, Host: "here"}
	for _, c := range change {
		c(&cfg)
	}
	p, err := New(cfg)
	ok(t, err)
	t.Cleanup(func() {
		ok(t, p.Close())
		// Whatever failed, no process of a test stays.
		for _, pid := range processes(t, root) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	})
	return p
}

func noCgroup(c *Config) { c.NoCgroup = true }

// id is unique: the marker is looked for on the whole host.
func id(t *testing.T) string {
	return fmt.Sprintf("m-%d-%d", os.Getpid(), time.Now().UnixNano())
}

// processes finds those that have a path below root as an argument, zombies
// excepted, by other means than the provider does.
func processes(t *testing.T, root string) []int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	ok(t, err)
	var out []int
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil && bytes.Contains(b, []byte(root+"/")) {
			pid, _ := strconv.Atoi(strings.Split(f, "/")[2])
			out = append(out, pid)
		}
	}
	return out
}

// nothingLeft asserts that no trace of any machine below root exists.
func nothingLeft(t *testing.T, root string) {
	t.Helper()
	if pids := processes(t, root); len(pids) > 0 {
		t.Errorf("processes left: %v", pids)
	}
	entries, err := os.ReadDir(root)
	ok(t, err)
	for _, e := range entries {
		t.Errorf("left on disk: %s", e.Name())
	}
	p := &Provider{cfg: Config{Root: root}}
	if path, err := proctree.CgroupPath(p.cgroupName("x")); err == nil {
		groups, err := filepath.Glob(strings.TrimSuffix(path, "x") + "*")
		ok(t, err)
		if len(groups) > 0 {
			t.Errorf("cgroups left: %v", groups)
		}
	}
	for deadline := testContext(t); ; { // a child inside is waited for by who started it, right now
		table, err := proctree.Processes()
		ok(t, err)
		zombies := slices.DeleteFunc(table, func(e proctree.Process) bool { return e.PPID != os.Getpid() || !e.Zombie })
		if len(zombies) == 0 {
			return
		}
		if deadline.Err() != nil {
			t.Errorf("zombies left: %v", zombies)
			return
		}
	}
}

// awaitConsole follows the console until it contains want.
func awaitConsole(t *testing.T, p *Provider, id, want string) {
	t.Helper()
	r, err := p.Console(testContext(t), id, true)
	ok(t, err)
	defer r.Close()
	var got []byte
	buf := make([]byte, 4096)
	for !bytes.Contains(got, []byte(want)) {
		n, err := r.Read(buf)
		got = append(got, buf[:n]...)
		if err != nil && !bytes.Contains(got, []byte(want)) {
			t.Fatalf("console ended with %v before %q: %q", err, want, got)
		}
	}
}
