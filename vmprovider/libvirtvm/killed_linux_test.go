//go:build (libvirt || libvirt_dlopen) && cgo

package libvirtvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

// killedArg makes the test binary a process that is killed on its way.
const killedArg = "__libvirtvm-killed"

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == killedArg {
		fmt.Fprintln(os.Stderr, "not killed:", killedMain([]byte(os.Args[2])))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// inNetwork is config with machines in a network of their own.
func inNetwork(s *testenv.LibvirtServer) Config {
	cfg := config(s)
	cfg.Network, cfg.Isolation = Network{}, &Isolation{Bridge: "sol0", Subnet: netip.MustParsePrefix("10.99.0.0/24")}
	return cfg
}

// guards says that a failpoint is of the loop that watches the rules.
func guards(step string) bool { return strings.HasPrefix(step, "guard") }

// killed is a process that ends with SIGKILL at its failpoint At, counted from 0.
type killed struct {
	URI, Pool string
	Spec      vmprovider.Spec
	Destroy   bool // and not create
	At        int
}

func killedMain(conf []byte) error {
	var k killed
	if err := json.Unmarshal(conf, &k); err != nil {
		return err
	}
	cfg := inNetwork(&testenv.LibvirtServer{URI: k.URI, Pool: k.Pool})
	n := -1 // not yet
	cfg.failpoint = func(step string) {
		switch {
		case guards(step) || n < 0:
		case n == k.At:
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		default:
			n++
		}
	}
	p, err := New(context.Background(), cfg)
	if err != nil {
		return err
	}
	n = 0
	if k.Destroy {
		return p.Destroy(context.Background(), k.Spec.ID, vmprovider.DestroyOptions{})
	}
	_, err = p.Create(context.Background(), k.Spec)
	return err
}

// TestKilledAnywhere: at whatever step of a creation or a destruction a process
// is killed, the next one's List shows what is left, with its owner, one Destroy
// removes it, with its tap and, when the last one goes, the network and its rules;
// nothing else is touched.
func TestKilledAnywhere(t *testing.T) {
	if !testenv.OwnNetwork(t) {
		return
	}
	s := testenv.StartLibvirt(t)
	rig(t)
	untouched := s.Foreigners(t)
	img := image(t, t.TempDir(), halt)
	machine := func(id string) vmprovider.Spec {
		return vmprovider.Spec{ID: id, Owner: "me", Image: img, Bootstrap: bootstrap()}
	}
	var steps []string
	cfg := inNetwork(s)
	foreign(t, s, cfg)
	cfg.failpoint = func(step string) {
		if !guards(step) {
			steps = append(steps, step)
		}
	}
	whole := provider(t, cfg)
	t.Cleanup(func() { _ = whole.Close() })
	if _, err := whole.Create(t.Context(), machine("t-stays")); err != nil { // and keeps the network there
		t.Fatal(err)
	}
	steps = nil
	if _, err := whole.Create(t.Context(), machine("t-whole")); err != nil {
		t.Fatal(err)
	}
	creation := steps
	steps = nil
	if err := whole.Destroy(t.Context(), "t-whole", vmprovider.DestroyOptions{}); err != nil {
		t.Fatal(err)
	}
	destruction := steps
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	kill := func(t *testing.T, k killed) {
		t.Parallel()
		id := k.Spec.ID
		if k.Destroy {
			maker := provider(t, inNetwork(s))
			_, err := maker.Create(t.Context(), k.Spec)
			if err = errors.Join(err, maker.Close()); err != nil {
				t.Fatal(err)
			}
		}
		conf, err := json.Marshal(k)
		if err != nil {
			t.Fatal(err)
		}
		var status *exec.ExitError
		out, err := exec.Command(exe, killedArg, string(conf)).CombinedOutput()
		if !errors.As(err, &status) || status.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("ended with %v: %s", err, out)
		}
		p := provider(t, inNetwork(s))
		defer func() { _ = p.Close() }()
		domains := strings.Fields(s.Virsh(t, "list", "--all", "--name"))
		files, err := filepath.Glob(filepath.Join(s.PoolPath, id+"@*"))
		if err != nil {
			t.Fatal(err)
		}
		var found vmprovider.Instance
		for inst, err := range p.List(t.Context(), vmprovider.ListOptions{Owner: "me"}) {
			if err != nil {
				t.Error(err)
			} else if inst.ID == id {
				found = inst
			}
		}
		if left := slices.Contains(domains, id) || len(files) > 0; left != (found.ID == id) {
			t.Errorf("there are domains %v, files %v, and List has %+v", domains, files, found)
		}
		if runs := slices.Contains(s.Guests(t), id); runs != (found.State == vmprovider.StateRunning) {
			t.Errorf("QEMU runs: %t; List has %+v", runs, found)
		}
		if err := p.Destroy(t.Context(), id, vmprovider.DestroyOptions{}); err != nil {
			t.Error(err)
		}
		files, err = filepath.Glob(filepath.Join(s.PoolPath, id+"@*"))
		if err != nil || len(files) > 0 || slices.Contains(strings.Fields(s.Virsh(t, "list", "--all", "--name")), id) || slices.Contains(s.Guests(t), id) {
			t.Errorf("left: %v, %v, domains %s, processes of %v", files, err, s.Virsh(t, "list", "--all"), s.Guests(t))
		}
	}
	t.Run("at", func(t *testing.T) {
		for at, step := range creation {
			id := fmt.Sprintf("create-%d-%s", at, step)
			t.Run(id, func(t *testing.T) { kill(t, killed{s.URI, s.Pool, machine(id), false, at}) })
		}
		for at, step := range destruction {
			id := fmt.Sprintf("destroy-%d-%s", at, step)
			t.Run(id, func(t *testing.T) { kill(t, killed{s.URI, s.Pool, machine(id), true, at}) })
		}
	})
	if err := whole.Destroy(t.Context(), "t-stays", vmprovider.DestroyOptions{}); err != nil {
		t.Error(err)
	}
	untouched(t)
	if guests := s.Guests(t); !slices.Equal(guests, []string{testenv.Foreign}) {
		t.Errorf("left: processes of %v", guests)
	}
	for inst, err := range whole.List(t.Context(), vmprovider.ListOptions{}) {
		t.Errorf("left: %+v, %v", inst, err)
	}
	if err := whole.Close(); err != nil {
		t.Error(err)
	}
	onlyForeign(t, s)
}
