//go:build (libvirt || libvirt_dlopen) && cgo

package libvirtvm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/blobstore/memblob"
	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue/memqueue"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/seed"
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

// reaper is an engine that has nothing but an empty database and p, whose reaper looks
// once; sweep has it do so until no machine of its installation is left.
func reaper(t *testing.T, p *Provider) (installation string, sweep func()) {
	t.Helper()
	db, err := sqldb.Open(t.Context(), testenv.SQLite(t), sqldb.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	if err := solstice.Migrate(t.Context(), db); err != nil {
		t.Fatal(err)
	}
	eng, err := solstice.New(solstice.Config{
		DB: db, Queue: memqueue.New(), Blobs: memblob.New(), Timing: solstice.Timing{Tick: time.Hour},
		Pools: []solstice.Pool{{Labels: []string{"vm"}, Provider: p}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return eng.Installation(), func() {
		t.Helper()
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- eng.Run(ctx) }()
		bounded, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
		defer cancel()
		for inst, err := range p.List(bounded, vmprovider.ListOptions{Owner: eng.Installation()}) {
			if err == nil {
				_, err = vmprovider.Wait(bounded, p, inst.ID, func(i vmprovider.Instance) bool { return i.State == vmprovider.StateGone })
			}
			if err != nil {
				t.Errorf("%s is left by the sweep: %v", inst.ID, err)
			}
		}
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

// allAtOnce makes machines with whatever a configuration has a word for, as far as it
// can be had together, and asks QEMU, the kernel and the guest for each of it. The
// host's cgroups have to be writable, as for every libvirtd with a quota.
func allAtOnce(t *testing.T, s *testenv.LibvirtServer) {
	t.Helper()
	for _, m := range []struct {
		network Network
		code    []byte
		prints  string
	}{
		{Network{NetworkBridge, "foreign"}, labels, seed.Label},
		{Network{NetworkNamed, "foreign"}, nil, "not a bootable disk"},
	} {
		cfg := config(s)
		cfg.Network, cfg.SeedFormat = m.network, seed.ISO
		cfg.CPUQuota, cfg.DiskIOPS, cfg.DiskBytesPerSecond = 0.5, 100, 1<<20
		cfg.Domain = `<os><bios useserial="yes"/></os><devices><watchdog model="i6300esb" action="poweroff"/></devices>`
		p := provider(t, cfg)
		id := "t-" + string(m.network.Type)
		spec := vmprovider.Spec{ID: id, Owner: "me", Image: image(t, t.TempDir(), m.code), Bootstrap: bootstrap()}
		if _, err := p.Create(t.Context(), spec); err != nil {
			t.Fatal(err)
		}
		console, err := consoler{p}.Console(t.Context(), id, true)
		if err != nil {
			t.Fatal(err)
		}
		var printed bytes.Buffer
		for !strings.Contains(printed.String(), m.prints) {
			if _, err := io.CopyN(&printed, console, 1); err != nil {
				t.Fatalf("%s: %v after %q", id, err, &printed)
			}
		}
		ports, err := exec.Command("ip", "-o", "link", "show", "master", "foreign").Output()
		if err != nil || strings.Count(string(ports), ": vnet") != 1 {
			t.Errorf("%s: at the bridge are %s, %v", id, ports, err)
		}
		asked := strings.Join([]string{
			printed.String(), s.Virsh(t, "schedinfo", id), // as the cgroup has it
			s.Virsh(t, "qemu-monitor-command", id, "--hmp", "info block"), s.Virsh(t, "qemu-monitor-command", id, "--hmp", "info qtree"),
		}, "\n")
		for _, want := range []string{"SeaBIOS", "vcpu_quota     : 50000\n", " bps=1048576 ", " iops=100 ", "dev: ide-cd,", "dev: i6300esb,"} {
			if !strings.Contains(asked, want) {
				t.Errorf("%s: no %q in\n%s", id, want, asked)
			}
		}
		if err := errors.Join(p.Destroy(t.Context(), id, vmprovider.DestroyOptions{}), p.Close()); err != nil {
			t.Error(err)
		}
	}
}

// TestKilledAnywhere: at whatever step of a creation or a destruction a process is
// killed, List shows what is left, with its owner, and one sweep of an engine's reaper
// removes all of it, with taps and what virtlogd put aside; when the last machine goes,
// the network and its rules do. Nothing of others is touched, nor of another
// installation.
func TestKilledAnywhere(t *testing.T) {
	if !testenv.OwnNetwork(t) {
		return
	}
	s := testenv.StartLibvirt(t)
	rig(t)
	untouched := s.Foreigners(t)
	img := image(t, t.TempDir(), halt)
	var steps []string
	cfg := inNetwork(s)
	foreign(t, s, cfg)
	allAtOnce(t, s)
	cfg.failpoint = func(step string) {
		if !guards(step) {
			steps = append(steps, step)
		}
	}
	whole := provider(t, cfg)
	t.Cleanup(func() { _ = whole.Close() })
	owner, sweep := reaper(t, whole)
	machine := func(id, owner string) vmprovider.Spec {
		return vmprovider.Spec{ID: id, Owner: owner, Image: img, Bootstrap: bootstrap()}
	}
	if _, err := whole.Create(t.Context(), machine("t-stays", "another")); err != nil { // and keeps the network there
		t.Fatal(err)
	}
	steps = nil
	if _, err := whole.Create(t.Context(), machine("t-whole", owner)); err != nil {
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
	}
	var ids []string
	t.Run("at", func(t *testing.T) {
		for _, way := range []struct {
			name  string
			steps []string
		}{{"create", creation}, {"destroy", destruction}} {
			for at, step := range way.steps {
				id := fmt.Sprintf("%s-%d-%s", way.name, at, step)
				ids = append(ids, id)
				t.Run(id, func(t *testing.T) { kill(t, killed{s.URI, s.Pool, machine(id, owner), way.name == "destroy", at}) })
			}
		}
	})
	files := func(kind string) []string {
		found, err := filepath.Glob(filepath.Join(s.PoolPath, "*@*@"+kind))
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	for _, file := range files("console") {
		if !strings.Contains(file, "/t-stays@") {
			if err := os.WriteFile(file+".0", nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	found := map[string]vmprovider.Instance{}
	for inst, err := range whole.List(t.Context(), vmprovider.ListOptions{Owner: owner}) {
		if err != nil {
			t.Fatal(err)
		}
		found[inst.ID] = inst
	}
	domains, there, guests := strings.Fields(s.Virsh(t, "list", "--all", "--name")), files("*"), s.Guests(t)
	for _, id := range ids {
		left := slices.Contains(domains, id) || slices.ContainsFunc(there, func(f string) bool { return strings.HasPrefix(filepath.Base(f), id+"@") })
		if left != (found[id].ID == id) {
			t.Errorf("of %s there are domains %v, files %v, and List has %+v", id, domains, there, found[id])
		}
		if runs := slices.Contains(guests, id); runs != (found[id].State == vmprovider.StateRunning) {
			t.Errorf("QEMU of %s runs: %t; List has %+v", id, runs, found[id])
		}
	}
	sweep()
	if domains := strings.Fields(s.Virsh(t, "list", "--all", "--name")); !slices.Equal(domains, []string{testenv.Foreign, "t-stays"}) {
		t.Errorf("left after the sweep: domains %v", domains)
	}
	if left := files("*"); len(left) != 3 || !strings.HasPrefix(filepath.Base(left[0]), "t-stays@another@") {
		t.Errorf("left after the sweep: %v", left)
	}
	if inst, err := whole.Get(t.Context(), "t-stays"); err != nil || inst.State != vmprovider.StateRunning {
		t.Errorf("another installation's machine: %+v, %v", inst, err)
	}
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
