package remotevm_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/memvm"
	"github.com/solstice-ci/solstice-go/vmprovider/remotevm"
	"github.com/solstice-ci/solstice-go/vmprovider/vmprovidertest"
)

// pluginArg makes the test binary a plugin.
const pluginArg = "__plugin"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == pluginArg {
		if err := plugin(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// plugin is a whole one, as its author would write it.
func plugin(args []string) error {
	flags := flag.NewFlagSet("plugin", flag.ContinueOnError)
	listen := flags.String("listen", "", "unix:PATH")
	pids := flags.String("pids", "", "file for the process's number")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := os.WriteFile(*pids, fmt.Append(nil, os.Getpid()), 0o600); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // ends with who started it
		stop()
	}()
	p := memvm.New(memvm.Config{})
	defer func() { _ = p.Close() }()
	return remotevm.Serve(ctx, *listen, remotevm.NewServer(p, remotevm.ServerOptions{Name: "memory", Version: "1"}), nil)
}

const capacity = 5

// over is a provider that is reached over the wire, and ends with its server.
type over struct {
	*remotevm.Provider
	end func()
}

func (o over) Close() error {
	err := o.Provider.Close()
	o.end()
	return err
}

// serve serves a provider, and connects to it.
func serve(t vmprovidertest.T, p vmprovider.Provider, listen, dial string, server, client *tls.Config) vmprovider.Provider {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- remotevm.Serve(ctx, listen, remotevm.NewServer(p, remotevm.ServerOptions{}), server)
	}()
	end := sync.OnceFunc(func() {
		cancel()
		if err := errors.Join(<-done, p.Close()); err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	r, err := remotevm.Open(context.WithoutCancel(t.Context()), remotevm.Config{Target: dial, TLS: client}) // also when the suite cleans up
	if err != nil {
		end()
		t.Fatalf("open: %v", err)
	}
	return over{r, end}
}

// harness gives every check a hypervisor of its own behind a server of its own.
func harness(wrap func(vmprovidertest.T, vmprovider.Provider) vmprovider.Provider) vmprovidertest.Harness {
	hypervisors := map[vmprovidertest.T]*memvm.Hypervisor{}
	hypervisor := func(t vmprovidertest.T) *memvm.Hypervisor {
		if hypervisors[t] == nil {
			hypervisors[t] = memvm.NewHypervisor(memvm.Config{
				Max: capacity,
				Script: func(s vmprovider.Spec) memvm.Script {
					sc := memvm.Script{CreateDelay: 5 * time.Millisecond, Console: s.Labels["print"]}
					switch s.Labels["script"] {
					case "hang":
						sc.Hang = true
					case "exit":
						sc.Crash = time.Millisecond
					case "panic":
						sc.Agent = func(context.Context, memvm.Machine) error { return errors.New("kernel panic") }
					}
					return sc
				},
			})
		}
		return hypervisors[t]
	}
	script := func(name string) func(vmprovidertest.T, *vmprovider.Spec) {
		return func(_ vmprovidertest.T, s *vmprovider.Spec) { s.Labels = map[string]string{"script": name} }
	}
	return vmprovidertest.Harness{
		Open:       func(t vmprovidertest.T) vmprovider.Provider { return wrap(t, hypervisor(t).Open()) },
		NeverBoots: script("hang"),
		ExitsEarly: script("exit"),
		Panics:     script("panic"),
		Prints: func(_ vmprovidertest.T, s *vmprovider.Spec, text string) {
			s.Labels = map[string]string{"print": text}
		},
		Leave: func(t vmprovidertest.T, id, owner string) {
			if err := hypervisor(t).Leave(id, owner); err != nil {
				t.Fatalf("Leave: %v", err)
			}
		},
		Capacity: capacity,
	}
}

// TestConformance runs the suite over a Unix socket.
func TestConformance(t *testing.T) {
	dir, n := t.TempDir(), 0
	vmprovidertest.Run(t, harness(func(t vmprovidertest.T, p vmprovider.Provider) vmprovider.Provider {
		n++
		at := "unix:" + filepath.Join(dir, fmt.Sprint(n))
		return serve(t, p, at, at, nil, nil)
	}))
}

// certificates are of a plugin's server and of its client.
func certificates(t *testing.T) (server, client *tls.Config) {
	t.Helper()
	ca := testenv.NewAuthority(t)
	load := func(name string) (tls.Certificate, *x509.CertPool) {
		issued := ca.Issue(t, name, "127.0.0.1")
		cert, err := tls.LoadX509KeyPair(issued.Cert, issued.Key)
		if err != nil {
			t.Fatal(err)
		}
		pem, err := os.ReadFile(ca.File)
		if err != nil {
			t.Fatal(err)
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(pem)
		return cert, roots
	}
	cert, roots := load("plugin")
	server = &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: roots, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13}
	cert, roots = load("orchestrator")
	return server, &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: roots, MinVersion: tls.VersionTLS13}
}

func freeAddr(t vmprovidertest.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("%v", err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// TestConformanceTLS runs it over TCP with certificates on both sides.
func TestConformanceTLS(t *testing.T) {
	server, client := certificates(t)
	vmprovidertest.Run(t, harness(func(t vmprovidertest.T, p vmprovider.Provider) vmprovider.Provider {
		at := freeAddr(t)
		return serve(t, p, at, at, server, client)
	}))
}

// TestStrangers: without a certificate of the authority nobody is served, and no
// plugin is believed.
func TestStrangers(t *testing.T) {
	server, client := certificates(t)
	foreign, stranger := certificates(t)
	at, other := freeAddr(t), freeAddr(t)
	p := serve(t, memvm.New(memvm.Config{}), at, at, server, client)
	defer func() { _ = p.Close() }()
	q := serve(t, memvm.New(memvm.Config{}), other, other, foreign, stranger)
	defer func() { _ = q.Close() }()
	for name, cfg := range map[string]remotevm.Config{
		"no certificate":      {Target: at, TLS: &tls.Config{RootCAs: client.RootCAs, MinVersion: tls.VersionTLS13}},
		"another authority's": {Target: at, TLS: &tls.Config{RootCAs: client.RootCAs, Certificates: stranger.Certificates, MinVersion: tls.VersionTLS13}},
		"a foreign plugin":    {Target: other, TLS: client},
	} {
		cfg.ConnectTimeout = 500 * time.Millisecond
		if p, err := remotevm.Open(t.Context(), cfg); !errors.Is(err, vmprovider.ErrUnavailable) {
			t.Errorf("%s: %v, %v", name, p, err)
		}
	}
	for _, cfg := range []remotevm.Config{{}, {Target: "unix:"}, {Target: "host"}, {Target: "host:1"}} {
		if _, err := remotevm.Open(t.Context(), cfg); !errors.Is(err, vmprovider.ErrInvalid) {
			t.Errorf("%+v: %v, want ErrInvalid", cfg, err)
		}
	}
	for _, listen := range []string{"127.0.0.1:0", ""} {
		if err := remotevm.Serve(t.Context(), listen, remotevm.NewServer(memvm.New(memvm.Config{}), remotevm.ServerOptions{}), nil); !errors.Is(err, vmprovider.ErrInvalid) {
			t.Errorf("listen at %q without TLS: %v, want ErrInvalid", listen, err)
		}
	}
}

// bare hides what a provider can do beyond the interface.
type bare struct{ vmprovider.Provider }

// TestVerbs: a plugin without optional verbs has none over the wire.
func TestVerbs(t *testing.T) {
	at := "unix:" + filepath.Join(t.TempDir(), "s")
	p := serve(t, bare{memvm.New(memvm.Config{})}, at, at, nil, nil)
	defer func() { _ = p.Close() }()
	if _, ok := vmprovider.As[vmprovider.Watcher](p); ok {
		t.Error("it watches")
	}
	if _, ok := vmprovider.As[vmprovider.Consoler](p); ok {
		t.Error("it has consoles")
	}
	if _, ok := vmprovider.As[vmprovider.ImagePreparer](p); ok {
		t.Error("it prepares images")
	}
}

func spec(id string) vmprovider.Spec {
	return vmprovider.Spec{ID: id, Owner: "o", ExpiresAt: time.Now().Add(time.Hour)}
}

// eventually waits for a condition until go test's own timeout.
func eventually(t *testing.T, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal("it did not happen")
		}
	}
}

// TestStart starts a plugin, kills it in the middle, and finds it ended at the end.
func TestStart(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	pids := filepath.Join(t.TempDir(), "pid")
	p, err := remotevm.Start(t.Context(), remotevm.Command{Argv: []string{exe, pluginArg, "-pids", pids}, Output: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	closed := false
	defer func() {
		if !closed {
			_ = p.Close()
		}
	}()
	pid := func() (n int) {
		b, err := os.ReadFile(pids)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = fmt.Sscan(string(b), &n)
		return n
	}
	first := pid()
	if name, version := p.Name(); name != "memory" || version != "1" {
		t.Errorf("it is %s %s", name, version)
	}
	if _, err := p.Create(t.Context(), spec("a")); err != nil {
		t.Fatal(err)
	}
	w, ok := vmprovider.As[vmprovider.Watcher](p)
	if !ok {
		t.Fatal("it does not watch")
	}
	seen := 0
	for inst, err := range w.Watch(t.Context()) {
		if err != nil {
			if !errors.Is(err, vmprovider.ErrUnavailable) {
				t.Errorf("watch: %v, want ErrUnavailable", err)
			}
			break
		}
		if seen++; inst == (vmprovider.Instance{}) {
			if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
	}
	if seen != 2 {
		t.Errorf("%d events", seen)
	}
	// This one's machines went with it; the next one serves.
	eventually(t, func() bool {
		_, err := p.Get(t.Context(), "a")
		if err != nil && !errors.Is(err, vmprovider.ErrUnavailable) && !errors.Is(err, vmprovider.ErrNotFound) {
			t.Fatalf("get: %v", err)
		}
		return errors.Is(err, vmprovider.ErrNotFound)
	})
	if _, err := p.Create(t.Context(), spec("b")); err != nil {
		t.Error(err)
	}
	second := pid()
	closed = true
	for range 2 { // a repeat is no error
		if err := p.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
	if err := syscall.Kill(second, 0); !errors.Is(err, syscall.ESRCH) || second == first {
		t.Errorf("the plugin is left: %v", err)
	}
}

// TestStartFails: a program that is not there, or serves nothing, is said at once,
// or when the time is up.
func TestStartFails(t *testing.T) {
	_, err := remotevm.Start(t.Context(), remotevm.Command{Argv: []string{"/no/such/plugin"}})
	if !errors.Is(err, vmprovider.ErrInvalid) || !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "/no/such/plugin") {
		t.Errorf("a program that is not there: %v", err)
	}
	if _, err := remotevm.Start(t.Context(), remotevm.Command{}); !errors.Is(err, vmprovider.ErrInvalid) {
		t.Errorf("no program: %v", err)
	}
	_, err = remotevm.Start(t.Context(), remotevm.Command{Argv: []string{"/bin/ls"}, ConnectTimeout: 2 * time.Second})
	if !errors.Is(err, vmprovider.ErrUnavailable) || !strings.Contains(err.Error(), "--listen") {
		t.Errorf("a program that says why it serves nothing: %v", err)
	}
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 100))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	_, err = remotevm.Start(t.Context(), remotevm.Command{Argv: []string{"/bin/ls"}, Dir: dir})
	if !errors.Is(err, vmprovider.ErrInvalid) || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("no room for the name of its socket: %v", err)
	}
	if err := os.Remove(dir); err != nil {
		t.Errorf("something is left: %v", err)
	}
}

// TestFrozen: a plugin that does not answer holds up nobody beyond the call's time.
func TestFrozen(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	pids := filepath.Join(t.TempDir(), "pid")
	p, err := remotevm.Start(t.Context(), remotevm.Command{Argv: []string{exe, pluginArg, "-pids", pids}, CallTimeout: 200 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(pids)
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(string(b), &pid); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	// Its threads stop one by one.
	eventually(t, func() bool { _, err := p.Get(t.Context(), "a"); return errors.Is(err, context.DeadlineExceeded) })
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := p.Create(ctx, spec("a")); !errors.Is(err, context.Canceled) {
		t.Errorf("create: %v, want Canceled", err)
	}
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { _, err := p.Get(t.Context(), "none"); return errors.Is(err, vmprovider.ErrNotFound) })
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

// BenchmarkGet is a call of a provider that costs nothing itself, in process and
// over a Unix socket: what the wire adds.
func BenchmarkGet(b *testing.B) {
	at := "unix:" + filepath.Join(b.TempDir(), "s")
	direct := memvm.New(memvm.Config{})
	if _, err := direct.Create(b.Context(), spec("a")); err != nil {
		b.Fatal(err)
	}
	remote := serve(b, direct, at, at, nil, nil)
	defer func() {
		if err := errors.Join(direct.Destroy(context.WithoutCancel(b.Context()), "a", vmprovider.DestroyOptions{}), remote.Close()); err != nil {
			b.Error(err)
		}
	}()
	for name, p := range map[string]vmprovider.Provider{"in process": direct, "over the wire": remote} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if _, err := p.Get(b.Context(), "a"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
