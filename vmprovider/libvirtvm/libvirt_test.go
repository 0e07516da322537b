//go:build (libvirt || libvirt_dlopen) && cgo

package libvirtvm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"libvirt.org/go/libvirt"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/vmprovidertest"
)

// Guests that are a boot sector, in 16-bit code: what they do they do at once.
var (
	halt     = []byte{0xf4, 0xeb, 0xfd}                                          // hlt; jmp $-1
	powerOff = append([]byte{0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef}, halt...) // mov dx,0x604; mov ax,0x2000; out dx,ax
	panics   = append([]byte{0xba, 0x05, 0x05, 0xb0, 0x01, 0xee}, halt...)       // mov dx,0x505; mov al,1; out dx,al
)

// says prints text, which follows the boot sector, to the serial port, and goes on
// with then.
func says(text string, then []byte) []byte {
	sectors := byte(len(text)/512 + 1) //nolint:gosec // a test's text is short
	code := slices.Concat(clear16, []byte{
		0xb8, sectors, 0x02, 0xbb, 0x00, 0x7e, 0xb9, 0x02, 0x00, 0xb6, 0x00, 0xcd, 0x13, // read them to 0x7e00 by int 0x13
		0xbe, 0x00, 0x7e, // mov si,0x7e00
	}, print16, then)
	return append(append(code, make([]byte, 512-len(code))...), text...)
}

// labels prints the label of the disc in the first CD-ROM drive, and halts.
var labels = slices.Concat(clear16, []byte{
	0xbe, 0xf0, 0x7c, 0xb8, 0x00, 0x42, 0xb2, 0xe0, 0xcd, 0x13, // what is to be read is at 0x7cf0: int 0x13 of drive 0xe0
	0xbe, 0x28, 0x7e, // mov si,0x7e28
}, print16, halt, make([]byte, 0xf0-len(clear16)-13-len(print16)-len(halt)),
	[]byte{16, 0, 1, 0, 0x00, 0x7e, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0}) // one sector, to 0x7e00, the 16th

var (
	clear16 = []byte{0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0} // xor ax,ax; mov ds,ax; mov es,ax
	// print16 prints what is at si to the serial port, as far as a 0.
	print16 = []byte{
		0xfc,                                     // cld
		0xac, 0x84, 0xc0, 0x74, 0x12, 0x88, 0xc4, // next: lodsb; test al,al; jz done; mov ah,al
		0xba, 0xfd, 0x03, 0xec, 0xa8, 0x20, 0x74, 0xfb, // mov dx,0x3fd; wait: in al,dx; test al,0x20; jz wait
		0xba, 0xf8, 0x03, 0x88, 0xe0, 0xee, 0xeb, 0xe9, // mov dx,0x3f8; mov al,ah; out dx,al; jmp next; done:
	}
)

// image writes a raw disk that boots code; nil: that cannot be booted.
func image(t vmprovidertest.T, dir string, code []byte) vmprovider.Image {
	disk := make([]byte, 1<<20)
	copy(disk, code)
	if code != nil {
		disk[510], disk[511] = 0x55, 0xaa
	}
	f, err := os.CreateTemp(dir, "image-")
	if err == nil {
		_, err = f.Write(disk)
		err = errors.Join(err, f.Chmod(0o644), f.Close())
	}
	if err != nil {
		t.Fatalf("%v", err)
	}
	return vmprovider.Image{Path: f.Name(), Format: "raw"}
}

func config(s *testenv.LibvirtServer) Config {
	return Config{
		URI: s.URI, Accelerator: TCG, StoragePool: s.Pool, Network: Network{Type: NetworkUser}, MemoryBytes: 32 << 20,
		Logger: slog.New(slog.DiscardHandler),
	}
}

func provider(t vmprovidertest.T, cfg Config) *Provider {
	p, err := New(context.WithoutCancel(t.Context()), cfg) // the suite opens one to clean up, too
	if err != nil {
		t.Fatalf("%v", err)
	}
	return p
}

// TestConformance: real machines of a real libvirtd, the system's of this host and
// a user's of another. That the other two pairs are the same is left to TestRemoteCut
// and to the engine's TestJobsInVMs.
func TestConformance(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(t testing.TB) *testenv.LibvirtServer{
		"system": testenv.StartLibvirt,
		"remote session": func(t testing.TB) *testenv.LibvirtServer {
			s := testenv.StartLibvirtSession(t)
			s.URI, _ = s.Remote(t)
			return s
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conforms(t, start(t))
		})
	}
}

func conforms(t *testing.T, s *testenv.LibvirtServer) {
	t.Helper()
	with := func(code []byte) func(t vmprovidertest.T, spec *vmprovider.Spec) {
		return func(t vmprovidertest.T, spec *vmprovider.Spec) {
			spec.Image, spec.Bootstrap = image(t, s.Images, code), bootstrap()
		}
	}
	cfg := config(s)
	cfg.Max = 4
	vmprovidertest.Run(t, vmprovidertest.Harness{
		Open:       func(t vmprovidertest.T) vmprovider.Provider { return provider(t, cfg) },
		Spec:       with(halt),
		NeverBoots: with(nil),
		ExitsEarly: with(says("going\n", powerOff)),
		Panics:     with(panics),
		Prints: func(t vmprovidertest.T, spec *vmprovider.Spec, text string) {
			with(says(text, halt))(t, spec)
		},
		Leave: func(t vmprovidertest.T, id, owner string) {
			spec := vmprovider.Spec{ID: id, Owner: owner, Image: image(t, s.Images, halt), Bootstrap: bootstrap()}
			leave(t, cfg, spec, "overlay")
		},
		Capacity: cfg.Max, Parallel: 3,
	})
	left, err := filepath.Glob(filepath.Join(s.PoolPath, "*"))
	if err != nil || len(left) > 0 || strings.TrimSpace(s.Virsh(t, "list", "--all", "--name")) != "" {
		t.Errorf("left: %v, %v, %s", left, err, s.Virsh(t, "list", "--all"))
	}
}

// leave ends a Create at a step, as if the process had been killed there.
func leave(t vmprovidertest.T, cfg Config, spec vmprovider.Spec, step string) {
	at := make(chan struct{})
	cfg.failpoint = func(name string) {
		if name == step {
			close(at)
			select {} // for ever, as a process that is gone
		}
	}
	p := provider(t, cfg)
	go func() { _, _ = p.Create(t.Context(), spec) }()
	<-at
}

// TestSynthetic: libvirt's own stand-in for tests, which keeps its state inside
// the connection.
func TestSynthetic(t *testing.T) {
	h, err := dial("test:///default")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	cfg := Config{URI: "test:///default", StoragePool: "default-pool", Network: Network{Type: NetworkNone}, Max: 12}
	vmprovidertest.Run(t, vmprovidertest.Harness{
		Open: func(t vmprovidertest.T) vmprovider.Provider { return provider(t, cfg) },
		Spec: func(_ vmprovidertest.T, spec *vmprovider.Spec) {
			spec.Image, spec.Bootstrap, spec.DiskBytes = vmprovider.Image{Path: "/base.raw", Format: "raw"}, bootstrap(), 1<<20
		},
		Capacity: cfg.Max,
	})
}

// TestNamed: libvirt's errors of a volume that a reader is just opening, and of its
// pool, which no test can wait for.
func TestNamed(t *testing.T) {
	for _, busy := range []libvirt.Error{
		{Code: libvirt.ERR_OPERATION_INVALID, Message: "Requested operation is not valid: volume 't-1@me@console' is still in use."},
		{Code: libvirt.ERR_INTERNAL_ERROR, Message: "internal error: pool 'solstice' has asynchronous jobs running."},
	} {
		busy.Domain = libvirt.FROM_STORAGE
		if err := named(busy); !errors.Is(err, errBusy) {
			t.Error(err)
		}
	}
}

// TestGuestEnds: how a guest ended is said.
func TestGuestEnds(t *testing.T) {
	s := testenv.StartLibvirt(t)
	dir := t.TempDir()
	p := provider(t, config(s))
	t.Cleanup(func() { _ = p.Close() })
	for name, c := range map[string]struct {
		code   []byte
		end    func(id string)
		reason string
	}{
		"off":    {says("off\n", powerOff), nil, "the guest powered off"},
		"panic":  {says("oh\n", panics), nil, "the guest panicked, or QEMU crashed"},
		"killed": {halt, func(id string) { s.SignalGuest(t, id, syscall.SIGKILL) }, "the guest panicked, or QEMU crashed"},
	} {
		t.Run(name, func(t *testing.T) {
			spec := vmprovider.Spec{ID: "t-" + name, Owner: "me", Image: image(t, dir, c.code), Bootstrap: bootstrap()}
			if _, err := p.Create(t.Context(), spec); err != nil {
				t.Fatal(err)
			}
			if c.end != nil {
				c.end(spec.ID)
			}
			inst, err := vmprovider.Wait(t.Context(), p, spec.ID, func(i vmprovider.Instance) bool { return i.State != vmprovider.StateRunning })
			if err != nil || inst.State != vmprovider.StateStopped || inst.Reason != c.reason {
				t.Errorf("%+v, %v; want it stopped, %q", inst, err, c.reason)
			}
			if err := p.Destroy(t.Context(), spec.ID, vmprovider.DestroyOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
}

// nothing asserts that no part of a machine is left.
func nothing(t *testing.T, s *testenv.LibvirtServer, p *Provider) {
	t.Helper()
	for inst, err := range p.List(t.Context(), vmprovider.ListOptions{}) {
		t.Errorf("left: %+v, %v", inst, err)
	}
	files, err := filepath.Glob(filepath.Join(s.PoolPath, "*"))
	if err != nil || len(files) > 0 {
		t.Errorf("left: %v, %v", files, err)
	}
	if out := strings.TrimSpace(s.Virsh(t, "list", "--all", "--name")); out != "" {
		t.Errorf("left: %s", out)
	}
}

// TestLibvirtdKilled: machines run on, calls fail with ErrUnavailable until it is
// back, and watchers are told to begin anew.
func TestLibvirtdKilled(t *testing.T) {
	s := testenv.StartLibvirt(t)
	p := provider(t, config(s))
	t.Cleanup(func() { _ = p.Close() })
	spec := vmprovider.Spec{ID: "t-1", Owner: "me", Image: image(t, t.TempDir(), halt), Bootstrap: bootstrap()}
	if _, err := p.Create(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	snapshot, watched := watching(t, p)
	<-snapshot
	s.Kill(t)
	if err := <-watched; !errors.Is(err, vmprovider.ErrUnavailable) {
		t.Errorf("watch ended with %v", err)
	}
	if _, err := p.Get(t.Context(), spec.ID); !errors.Is(err, vmprovider.ErrUnavailable) {
		t.Errorf("Get without libvirtd: %v", err)
	}
	s.Start(t)
	inst, err := vmprovider.Wait(t.Context(), p, spec.ID, func(vmprovider.Instance) bool { return true })
	if err != nil || inst.State != vmprovider.StateRunning {
		t.Errorf("%+v, %v", inst, err)
	}
	if err := p.Destroy(t.Context(), spec.ID, vmprovider.DestroyOptions{}); err != nil {
		t.Error(err)
	}
	nothing(t, s, p)
}

// TestRemoteCut: a connection to another host that breaks is made again, and what
// ran runs on: its end is told of, and its console can be followed, also into another
// file.
func TestRemoteCut(t *testing.T) {
	s := testenv.StartLibvirt(t)
	uri, cut := s.Remote(t)
	cfg := config(s)
	cfg.URI = uri
	p := provider(t, cfg)
	t.Cleanup(func() { _ = p.Close() })
	spec := vmprovider.Spec{ID: "t-1", Owner: "me", Image: image(t, s.Images, says("here\n", halt)), Bootstrap: bootstrap()}
	if _, err := p.Create(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	snapshot, watched := watching(t, p)
	<-snapshot
	cut()
	if err := <-watched; !errors.Is(err, vmprovider.ErrUnavailable) {
		t.Errorf("watch ended with %v", err)
	}
	inst, err := vmprovider.Wait(t.Context(), p, spec.ID, func(vmprovider.Instance) bool { return true })
	if err != nil || inst.State != vmprovider.StateRunning {
		t.Fatalf("%+v, %v", inst, err)
	}
	r, err := consoler{p}.Console(t.Context(), spec.ID, true)
	if err != nil {
		t.Fatal(err)
	}
	printed := bufio.NewReader(r)
	if line, err := printed.ReadString('\n'); err != nil || !strings.HasSuffix(line, "here\n") {
		t.Errorf("console: %q, %v", line, err)
	}
	// As virtlogd does with one that has grown.
	file := filepath.Join(s.PoolPath, volume(spec.ID, "me", consoleVolume))
	next := strings.Repeat("new\n", piece/2) // in pieces
	if err := errors.Join(os.Rename(file, file+".0"), os.WriteFile(file, []byte(next), 0o600)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(next))
	if n, err := io.ReadFull(printed, got); err != nil || string(got) != next {
		t.Errorf("console, begun anew: %d bytes of %d, %v", n, len(next), err)
	}
	s.SignalGuest(t, spec.ID, syscall.SIGKILL)
	inst, err = vmprovider.Wait(t.Context(), p, spec.ID, func(i vmprovider.Instance) bool { return i.State != vmprovider.StateRunning })
	if err != nil || inst.State != vmprovider.StateStopped {
		t.Errorf("%+v, %v; want it stopped", inst, err)
	}
	if _, err := io.Copy(io.Discard, printed); err != nil {
		t.Errorf("the console's end: %v", err)
	}
	if err := p.Destroy(t.Context(), spec.ID, vmprovider.DestroyOptions{}); err != nil {
		t.Error(err)
	}
	nothing(t, s, p)
}

// watching watches, and says when the snapshot is complete, and how it ends.
func watching(t *testing.T, p *Provider) (snapshot chan struct{}, end chan error) {
	t.Helper()
	snapshot, end = make(chan struct{}), make(chan error, 1)
	go func() {
		for inst, err := range p.Watch(t.Context()) {
			if err != nil {
				end <- err
			} else if inst.ID == "" {
				close(snapshot)
			}
		}
	}()
	return snapshot, end
}

// TestLibvirtdPaused: nobody waits longer than its context for a libvirtd that
// does not answer, and after a while it counts as gone.
func TestLibvirtdPaused(t *testing.T) {
	s := testenv.StartLibvirt(t)
	p := provider(t, config(s))
	t.Cleanup(func() { _ = p.Close() })
	snapshot, watched := watching(t, p)
	<-snapshot
	s.Pause(t)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := p.Get(ctx, "t-1"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Get: %v", err)
	}
	if err := <-watched; !errors.Is(err, vmprovider.ErrUnavailable) {
		t.Errorf("watch ended with %v", err)
	}
	s.Resume(t)
	spec := vmprovider.Spec{ID: "t-1", Owner: "me", Image: image(t, t.TempDir(), halt), Bootstrap: bootstrap()}
	for {
		_, err := p.Create(t.Context(), spec)
		if err == nil {
			break
		}
		if !errors.Is(err, vmprovider.ErrUnavailable) {
			t.Fatalf("resumed: %v", err)
		}
	}
	if err := p.Destroy(t.Context(), spec.ID, vmprovider.DestroyOptions{}); err != nil {
		t.Error(err)
	}
	nothing(t, s, p)
}

// TestPoolFull: no room is ErrCapacity, and nothing is left.
func TestPoolFull(t *testing.T) {
	s := testenv.StartLibvirt(t)
	p := provider(t, config(s))
	t.Cleanup(func() { _ = p.Close() })
	s.FillPool(t)
	_, err := p.Create(t.Context(), vmprovider.Spec{ID: "t-1", Owner: "me", Image: image(t, t.TempDir(), halt), Bootstrap: bootstrap()})
	if !errors.Is(err, vmprovider.ErrCapacity) {
		t.Errorf("Create: %v", err)
	}
	nothing(t, s, p)
}

// TestManyAtOnce: as many machines at once as anybody likes cost no connection.
func TestManyAtOnce(t *testing.T) {
	s := testenv.StartLibvirt(t)
	p := provider(t, config(s))
	t.Cleanup(func() { _ = p.Close() })
	img := image(t, t.TempDir(), halt)
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			spec := vmprovider.Spec{ID: fmt.Sprintf("t-%d", i), Owner: "me", Image: img, Bootstrap: bootstrap()}
			_, err := p.Create(t.Context(), spec)
			if err = errors.Join(err, p.Destroy(t.Context(), spec.ID, vmprovider.DestroyOptions{})); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	nothing(t, s, p)
	if said := s.Messages(t); strings.Contains(said, "max requests limit") {
		t.Errorf("libvirtd did not read from the connection: %s", said)
	}
}

// TestForeign: domains and volumes of others are not seen and not touched.
func TestForeign(t *testing.T) {
	s := testenv.StartLibvirt(t)
	p := provider(t, config(s))
	t.Cleanup(func() { _ = p.Close() })
	untouched := s.Foreigners(t)
	for inst, err := range p.List(t.Context(), vmprovider.ListOptions{}) {
		t.Errorf("%+v, %v", inst, err)
	}
	if _, err := p.Get(t.Context(), testenv.Foreign); !errors.Is(err, vmprovider.ErrNotFound) {
		t.Errorf("Get: %v", err)
	}
	if err := p.Destroy(t.Context(), testenv.Foreign, vmprovider.DestroyOptions{}); err != nil {
		t.Error(err)
	}
	_, err := p.Create(t.Context(), vmprovider.Spec{ID: testenv.Foreign, Owner: "me", Image: image(t, t.TempDir(), halt), Bootstrap: bootstrap()})
	if !errors.Is(err, vmprovider.ErrExists) {
		t.Errorf("Create: %v", err)
	}
	untouched(t)
}
