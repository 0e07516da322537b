//go:build (libvirt || libvirt_dlopen) && cgo

package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/testenv" //nolint:depguard // the test is not part of the main that is copied
)

// virtual has what .mise/tasks/setup/vms makes, for a libvirtd of the test.
type virtual struct {
	*testenv.LibvirtServer
	t    *testing.T
	dist string
}

func newVirtual(t *testing.T) *virtual {
	t.Helper()
	v := &virtual{testenv.StartLibvirt(t), t, t.TempDir()}
	cmd := exec.CommandContext(t.Context(), "../../.mise/tasks/setup/vms", "debian")
	cmd.Env = append(os.Environ(), "URI="+v.URI, "STORAGE_POOL="+v.Pool, "DIST="+v.dist, "DATA="+v.dist)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("setup/vms: %v\n%s", err, out)
	}
	return v
}

// run is solstice run in a repository, without its context's end killing it.
func (v *virtual) run(dir string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(context.WithoutCancel(v.t.Context()), filepath.Join(v.dist, "solstice"),
		append([]string{"run", "--plain", "--pools", filepath.Join(v.dist, "vms/pools.yaml")}, args...)...)
	cmd.Dir, cmd.Env = dir, environ("TMPDIR="+v.t.TempDir())
	return cmd
}

// eventually waits for a condition.
func (v *virtual) eventually(what string, ok func() bool) {
	v.t.Helper()
	for began := time.Now(); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Since(began) > patience {
			v.t.Fatalf("in vain: %s", what)
		}
	}
}

// nothingLeft waits until no domain and no file of one is there.
func (v *virtual) nothingLeft() {
	v.t.Helper()
	v.eventually("no machine is left", func() bool {
		files, err := filepath.Glob(filepath.Join(v.PoolPath, "*"))
		return err == nil && len(files) == 0 && strings.TrimSpace(v.Virsh(v.t, "list", "--all", "--name")) == ""
	})
}

// TestOwnVMWorkflow: this repository's workflow for virtual machines.
func TestOwnVMWorkflow(t *testing.T) {
	v := newVirtual(t)
	out, err := v.run("../..", "vms").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"machine 1: Linux", "machine 2: Linux", "| # Solstice", "both machines had the repository",
		"Debian GNU/Linux 12 (bookworm), process 1 is systemd", "status: running", "blobstore/memblob\t", "solstice-go/vmprovider\t", "✓ vms succeeded"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
	v.nothingLeft()

	// A run that is killed leaves nothing either.
	repo := workflowRepo(t, "jobs: { a: { runs-on: mini, steps: [{ run: sleep 600 }] } }\n")
	cmd := v.run(repo)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	v.eventually("its machine runs", func() bool { return strings.TrimSpace(v.Virsh(t, "list", "--name")) != "" })
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	v.nothingLeft()
}
