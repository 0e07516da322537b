//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/remotevm"
)

// First arguments that make the test's program another one.
const (
	asPlugin = "plugin" // the plugin itself
	asVictim = "victim" // a provider that is killed
)

func TestMain(m *testing.M) {
	var err error
	switch {
	case len(os.Args) > 1 && os.Args[1] == asPlugin:
		err = run(context.Background(), os.Args[2:], os.Stdin)
	case len(os.Args) > 1 && os.Args[1] == asVictim:
		err = victim()
	default:
		os.Exit(m.Run())
	}
	fmt.Fprintln(os.Stderr, err)
	if err != nil {
		os.Exit(1)
	}
}

// order is what a victim reads.
type order struct {
	Config Config
	Verb   string // create or destroy
	Spec   vmprovider.Spec
	Step   string // after which it is killed
}

// victim kills itself with SIGKILL in the middle of what it is told to do.
func victim() error {
	var o order
	if err := json.NewDecoder(os.Stdin).Decode(&o); err != nil {
		return err
	}
	p, err := New(o.Config)
	if err != nil {
		return err
	}
	p.step = func(name string) {
		if name == o.Step {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	if o.Verb == "create" {
		_, err = p.Create(context.Background(), o.Spec)
	} else {
		err = p.Destroy(context.Background(), o.Spec.ID, vmprovider.DestroyOptions{})
	}
	return errors.Join(errors.New("it did not come to that step"), err)
}

// killed has another process create or destroy a machine, and killed after a step.
func (h *host) killed(verb string, s vmprovider.Spec, step string) {
	h.t.Helper()
	in, err := json.Marshal(order{h.cfg, verb, s, step})
	if err != nil {
		h.t.Fatal(err)
	}
	cmd := exec.Command(h.exe, asVictim)
	cmd.Stdin = bytes.NewReader(in)
	out, err := cmd.CombinedOutput()
	status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !ok || !status.Signaled() || status.Signal() != syscall.SIGKILL {
		h.t.Fatalf("%s until %q: %v, %s", verb, step, err, out)
	}
}

// TestKilled: wherever a provider was killed, the next one lists what is left, whose
// it is, and one Destroy removes it.
func TestKilled(t *testing.T) {
	t.Parallel()
	for verb, steps := range map[string]map[string]vmprovider.State{
		"create": {
			"record":  vmprovider.StateGone, // it was no machine yet
			"console": vmprovider.StateLeftover, "seed": vmprovider.StateLeftover, "disk": vmprovider.StateLeftover,
			"qemu":    vmprovider.StateLeftover, // which runs
			"started": vmprovider.StateRunning,
		},
		"destroy": {
			"doomed": vmprovider.StateLeftover, "killed": vmprovider.StateLeftover,
			"removed disk": vmprovider.StateLeftover, "removed qemu.log": vmprovider.StateLeftover,
			"renamed": vmprovider.StateGone,
		},
	} {
		for step, want := range steps {
			t.Run(verb+" "+step, func(t *testing.T) {
				h := newHost(t)
				s := vmprovider.Spec{ID: "m", Owner: "me"}
				h.complete(&s, halt)
				if verb == "destroy" {
					h.create(s)
				}
				h.killed(verb, s, step)
				p := h.open()
				if inst, err := p.Get(t.Context(), "m"); want == vmprovider.StateGone {
					if !errors.Is(err, vmprovider.ErrNotFound) {
						t.Errorf("%+v, %v; want nothing", inst, err)
					}
				} else if err != nil || inst.State != want || inst.Owner != "me" {
					t.Errorf("%+v, %v; want %s", inst, err, want)
				}
				if err := p.Destroy(t.Context(), "m", vmprovider.DestroyOptions{}); err != nil {
					t.Error(err)
				}
				h.empty()
			})
		}
	}
}

// open opens a provider that is closed in the end.
func (h *host) open() *Provider {
	h.t.Helper()
	p, err := New(h.cfg)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = p.Close() })
	return p
}

func (h *host) create(s vmprovider.Spec) *Provider {
	h.t.Helper()
	p := h.open()
	if _, err := p.Create(h.t.Context(), s); err != nil {
		h.t.Fatal(err)
	}
	return p
}

// TestEnds: how a guest or its QEMU ended is said; one that is frozen goes, too.
func TestEnds(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		code   []byte
		signal syscall.Signal // to QEMU
		want   vmprovider.Instance
	}{
		"power off":   {powerOff, 0, vmprovider.Instance{State: vmprovider.StateStopped, Reason: "the guest powered off"}},
		"panic":       {panics, 0, vmprovider.Instance{State: vmprovider.StateStopped, Reason: "the guest panicked"}},
		"QEMU killed": {halt, syscall.SIGKILL, vmprovider.Instance{State: vmprovider.StateStopped, Reason: "QEMU has ended, or was killed"}},
		"QEMU frozen": {halt, syscall.SIGSTOP, vmprovider.Instance{State: vmprovider.StateRunning}},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			s := vmprovider.Spec{ID: "m", Owner: "me"}
			h.complete(&s, c.code)
			p := h.create(s)
			if c.signal != 0 {
				h.signal("m", c.signal)
			}
			inst, err := vmprovider.Wait(t.Context(), p, "m", func(i vmprovider.Instance) bool { return i.State == c.want.State })
			if err != nil || inst.Reason != c.want.Reason {
				t.Errorf("%+v, %v; want %q", inst, err, c.want.Reason)
			}
			if err := p.Destroy(t.Context(), "m", vmprovider.DestroyOptions{}); err != nil {
				t.Error(err)
			}
			h.empty()
		})
	}
}

func (h *host) signal(id string, s syscall.Signal) {
	h.t.Helper()
	b, err := os.ReadFile(filepath.Join(h.cfg.Root, id, pidFile))
	if err != nil {
		h.t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(string(b), &pid); err != nil {
		h.t.Fatal(err)
	}
	if err := syscall.Kill(pid, s); err != nil {
		h.t.Fatal(err)
	}
}

// TestTLS: over TCP the plugin serves who has a certificate of the authority.
func TestTLS(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	cert, key := certificate(t, h.images)
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(pair.Leaf)
	l, err := net.Listen("tcp", "127.0.0.1:0") // an address that is free
	if err != nil {
		t.Fatal(err)
	}
	at := l.Addr().String()
	_ = l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, []string{
			"--listen", at, "--root", h.cfg.Root, "--accelerator", "tcg", "--tls-cert", cert, "--tls-key", key, "--tls-ca", cert,
		}, os.Stdin)
	}()
	p, err := remotevm.Open(t.Context(), remotevm.Config{Target: at, TLS: &tls.Config{
		Certificates: []tls.Certificate{pair}, RootCAs: roots, MinVersion: tls.VersionTLS13,
	}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Get(t.Context(), "m"); !errors.Is(err, vmprovider.ErrNotFound) {
		t.Errorf("Get: %v", err)
	}
	cancel()
	if err := errors.Join(p.Close(), <-ended); err != nil {
		t.Error(err)
	}
	if err := run(t.Context(), []string{"--listen", at, "--root", h.cfg.Root, "--accelerator", "tcg"}, os.Stdin); !errors.Is(err, vmprovider.ErrInvalid) {
		t.Errorf("TCP without TLS: %v", err)
	}
}

// TestRefused: what can never be made is ErrInvalid, and leaves nothing; QEMU's own
// words are in the error where it refuses.
func TestRefused(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := h.open()
	backed := filepath.Join(h.images, "backed")
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/passwd", backed, "1M").CombinedOutput(); err != nil {
		t.Fatalf("%v, %s", err, out)
	}
	for name, spoil := range map[string]func(*vmprovider.Spec){
		"no image":                   func(s *vmprovider.Spec) { s.Image = vmprovider.Image{} },
		"an image that is not there": func(s *vmprovider.Spec) { s.Image.Path += "-" },
		"another format":             func(s *vmprovider.Spec) { s.Image.Format = "qcow2" },
		"a backing file":             func(s *vmprovider.Spec) { s.Image = vmprovider.Image{Path: backed, Format: "qcow2"} },
		"a disk that is too small":   func(s *vmprovider.Spec) { s.DiskBytes = 512 },
		"no bootstrap":               func(s *vmprovider.Spec) { s.Bootstrap = vmprovider.Bootstrap{} },
	} {
		s := vmprovider.Spec{ID: "m", Owner: "me"}
		h.complete(&s, halt)
		spoil(&s)
		if _, err := p.Create(t.Context(), s); !errors.Is(err, vmprovider.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	s := vmprovider.Spec{ID: "m", Owner: "me", CPUs: 1 << 20}
	h.complete(&s, halt)
	if _, err := p.Create(t.Context(), s); err == nil || !bytes.Contains([]byte(err.Error()), []byte("CPU")) {
		t.Errorf("a million processors: %v", err)
	}
	h.empty()
	for _, cfg := range []Config{
		{},
		{Root: "relative", Accelerator: "tcg"},
		{Root: "/a,b", Accelerator: "tcg"},
		{Root: "/tmp"},
		{Root: "/tmp", Accelerator: "tcg", Max: -1},
		{Root: "/tmp/" + string(make([]byte, 64)), Accelerator: "tcg"},
	} {
		if _, err := New(cfg); !errors.Is(err, vmprovider.ErrInvalid) {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
}
