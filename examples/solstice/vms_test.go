//go:build linux && (libvirt || libvirt_dlopen) && cgo

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"

	"github.com/solstice-ci/solstice-go/internal/testenv" //nolint:depguard // the test is not part of the main that is copied
)

// TestVirtualMachines runs the programs that .mise/tasks/setup/vms builds, in a
// network namespace of its own.
func TestVirtualMachines(t *testing.T) {
	if !testenv.OwnNetwork(t) {
		return
	}
	v := &virtual{testenv.StartLibvirt(t), t.TempDir()}
	cmd := exec.CommandContext(t.Context(), "../../.mise/tasks/setup/vms", "debian")
	cmd.Env = append(os.Environ(), "URI="+v.URI, "STORAGE_POOL="+v.Pool, "DIST="+v.dist, "DATA="+v.dist)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("setup/vms: %v\n%s", err, out)
	}
	t.Run("workflow", v.workflow)
	t.Run("isolated", v.isolated)
	t.Run("plugin", v.plugin)
}

// virtual has what .mise/tasks/setup/vms makes, for a libvirtd of the test.
type virtual struct {
	*testenv.LibvirtServer
	dist string
}

// pools writes a file of pools beside the one of setup/vms.
func (v *virtual) pools(t *testing.T, name, pools string) string {
	t.Helper()
	file := filepath.Join(v.dist, "vms", name)
	text := "catalogue: images.yaml\nimage_dir: ../images\npools:\n" + pools
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// run is solstice run in a repository, without its context's end killing it.
func (v *virtual) run(t *testing.T, dir, pools string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), filepath.Join(v.dist, "solstice"), append([]string{"run", "--plain", "--pools", pools}, args...)...)
	cmd.Dir, cmd.Env = dir, environ("TMPDIR="+t.TempDir())
	return cmd
}

// killed has solstice run be killed when its job's machine is there.
func (v *virtual) killed(t *testing.T, cmd *exec.Cmd, there func() bool) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its machine runs", there)
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for began := time.Now(); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Since(began) > patience {
			t.Fatalf("in vain: %s", what)
		}
	}
}

// nothingLeft waits until no domain and no file of one is there.
func (v *virtual) nothingLeft(t *testing.T) {
	t.Helper()
	eventually(t, "no machine is left", func() bool {
		files, err := filepath.Glob(filepath.Join(v.PoolPath, "*"))
		return err == nil && len(files) == 0 && strings.TrimSpace(v.Virsh(t, "list", "--all", "--name")) == ""
	})
}

// workflow is this repository's for virtual machines.
func (v *virtual) workflow(t *testing.T) {
	pools := filepath.Join(v.dist, "vms/pools.yaml")
	out, err := v.run(t, "../..", pools, "vms").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	has(t, "output", string(out), "machine 1: Linux", "machine 2: Linux", "| # Solstice", "both machines had the repository",
		"Debian GNU/Linux 12 (bookworm), process 1 is systemd", "status: running", "ok  \tgithub.com/solstice-ci/solstice-go/blobstore/memblob\t", "ok  \tgithub.com/solstice-ci/solstice-go/vmprovider\t", "✓ vms succeeded")
	v.nothingLeft(t)

	// A run that is killed leaves nothing either.
	repo := workflowRepo(t, "jobs: { a: { runs-on: mini, steps: [{ run: sleep 600 }] } }\n")
	v.killed(t, v.run(t, repo, pools), func() bool { return strings.TrimSpace(v.Virsh(t, "list", "--name")) != "" })
	v.nothingLeft(t)
}

// isolated is a job of an orchestrator as docs/libvirt.md sets one up, whose other
// listeners are at all addresses.
func (v *virtual) isolated(t *testing.T) {
	pools := v.pools(t, "strict.yaml", fmt.Sprintf(`
  mini:
    provider: libvirt
    image: mini
    libvirt:
      uri: %s
      accelerator: tcg
      storage_pool: %s
      isolation: strict
      bridge: solstice0
      subnet: 10.99.0.0/24
      allow: [tcp/10.99.0.1:7000]
`, v.URI, v.Pool))
	repo := repository(t, map[string]string{"README.md": "# A project\n", workflowFile: `
jobs:
  probe:
    runs-on: mini
    steps:
      - run: |
          head -n 1 README.md
          try() { nc -w "$3" "$1" "$2" </dev/null >/dev/null 2>&1 && echo "$1 $2 is reached" || echo "$1 $2 is not reached"; }
          try 10.99.0.1 7000 60 &
          for port in 5432 8080 50051; do try 10.99.0.1 $port 3 & done
          wait
`})
	refused, err := v.run(t, repo, pools).CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != exitCouldNotRun {
		t.Errorf("solstice run: %v", err)
	}
	has(t, "solstice run", string(refused), "pool mini", "isolation: strict needs", "--agent-addr")
	untouched(t, v)

	for _, addr := range []string{":7000", ":5432"} {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_ = c.Close()
			}
		}()
	}
	state := t.TempDir()
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), filepath.Join(v.dist, "orchestrator"))
	cmd.Env = environ("STATE_DIR="+state, "POOLS="+pools, "RUNNER_DIR="+filepath.Join(v.dist, "runner"), "LOG_FORMAT=json",
		"AGENT_ADDR=10.99.0.1:50052", "RUNNER_ADDR=10.99.0.1:50053", "GRPC_ADDR=0.0.0.0:50051", "HTTP_ADDR=0.0.0.0:8080")
	o := testenv.Launch(t, cmd, "orchestrator started")
	o.Await()
	for _, port := range []string{"5432", "8080", "50051"} { // which are there for others
		c, err := net.Dial("tcp", "10.99.0.1:"+port)
		if err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
	}
	client := exec.CommandContext(t.Context(), filepath.Join(v.dist, "solstice"), "enqueue", "--follow", "--plain")
	client.Dir, client.Env = repo, environ("STATE_DIR="+state)
	out, err := client.CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	has(t, "output", string(out), "| # A project", "10.99.0.1 7000 is reached", "10.99.0.1 5432 is not reached", "10.99.0.1 8080 is not reached", "10.99.0.1 50051 is not reached")
	v.nothingLeft(t)
	o.Stop(syscall.SIGTERM)
	if o.Err != nil {
		t.Error(o.Err)
	}
	untouched(t, v)
}

// untouched asserts that no network is there but the loopback.
func untouched(t *testing.T, v *virtual) {
	t.Helper()
	links, err := net.Interfaces()
	if err != nil || len(links) != 1 {
		t.Errorf("interfaces: %v, %v", links, err)
	}
	rules, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	if tables, err := rules.ListTables(); err != nil || len(tables) > 0 {
		t.Errorf("tables: %v, %v", tables, err)
	}
	if networks := strings.TrimSpace(v.Virsh(t, "net-list", "--all", "--name")); networks != "" {
		t.Errorf("networks: %s", networks)
	}
}

// plugin has examples/qemuvm, which solstice run starts, make the machines.
func (v *virtual) plugin(t *testing.T) {
	root, err := os.MkdirTemp("", "vm") // a short name, for its sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(root) })
	build := exec.CommandContext(t.Context(), "go", "build", "-C", "../qemuvm", "-o", filepath.Join(v.dist, "vms/qemuvm"), ".")
	build.Env = environ("CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	pools := v.pools(t, "plugin.yaml", fmt.Sprintf(`
  mini:
    provider: command
    image: mini
    plugin:
      command: [./qemuvm, --root, %s, --accelerator, tcg]
      gateway: 10.0.2.2
`, root))
	nothingLeft := func(tmp string) {
		t.Helper()
		var left []string
		eventually(t, "nothing is left", func() bool {
			left, _ = filepath.Glob(filepath.Join(root, "[^.]*"))
			files, _ := filepath.Glob(filepath.Join(tmp, "*"))
			left = append(left, files...)
			processes, _ := filepath.Glob("/proc/[0-9]*/cmdline")
			for _, p := range processes {
				if argv, _ := os.ReadFile(p); bytes.Contains(argv, []byte(root)) { // of the plugin and of QEMU
					left = append(left, string(argv))
				}
			}
			return len(left) == 0
		})
	}
	tmp := func(cmd *exec.Cmd) string {
		return strings.TrimPrefix(cmd.Env[len(cmd.Env)-1], "TMPDIR=")
	}

	repo := repository(t, map[string]string{"README.md": "# A project\n", workflowFile: "jobs: { a: { runs-on: mini, steps: [{ run: head -n 1 README.md }] } }\n"})
	cmd := v.run(t, repo, pools)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	has(t, "output", string(out), "| # A project")
	nothingLeft(tmp(cmd))

	cmd = v.run(t, repo, pools)
	v.killed(t, cmd, func() bool {
		started, _ := filepath.Glob(filepath.Join(root, "*/started"))
		return len(started) > 0
	})
	nothingLeft(tmp(cmd))
}
