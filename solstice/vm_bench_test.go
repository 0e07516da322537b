//go:build (libvirt || libvirt_dlopen) && cgo

package solstice_test

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/selfca"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/seed"
)

// moments are when an engine said something first.
type moments struct {
	slog.Handler
	mu *sync.Mutex
	at map[string]time.Time
}

func newMoments() moments {
	return moments{slog.DiscardHandler, &sync.Mutex{}, map[string]time.Time{}}
}

func (m moments) Enabled(context.Context, slog.Level) bool { return true }

func (m moments) Handle(_ context.Context, r slog.Record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.at[r.Message].IsZero() {
		m.at[r.Message] = time.Now()
	}
	return nil
}

func (m moments) forget() {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.at)
}

func (m moments) of(message string) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.at[message]
}

// minimalAgent dials the first contact over TLS, and that is all.
const minimalAgent = `package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"os"
	"time"
)

func main() {
	var b struct {
		Contacts []string
		CA       []byte
	}
	data, err := os.ReadFile(os.Args[2])
	if err == nil {
		err = json.Unmarshal(data, &b)
	}
	if err != nil {
		panic(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(b.CA)
	c, err := tls.Dial("tcp", b.Contacts[0], &tls.Config{RootCAs: pool, ServerName: %q, MinVersion: tls.VersionTLS13})
	if err != nil {
		panic(err)
	}
	time.Sleep(time.Hour) // its machine ends when it is told to
	c.Close()
}
`

// floor boots the domain of a machine with nothing but virsh and qemu-img. Its
// guest downloads as many bytes as an agent has, hashes them, and dials TLS.
type floor struct {
	*testenv.LibvirtServer
	xml, id, dir string
	seed         []byte
	image        string
	dialled      chan time.Time
}

func newFloor(b *testing.B, s *testenv.LibvirtServer, pool solstice.Pool) *floor {
	b.Helper()
	f := &floor{LibvirtServer: s, dir: b.TempDir(), image: pool.Image.Path, dialled: make(chan time.Time, 1)}
	// The program, as large as the agent.
	agentFile, _ := guestAgent(b)
	info, err := os.Stat(agentFile)
	if err != nil {
		b.Fatal(err)
	}
	src, exe := filepath.Join(f.dir, "main.go"), filepath.Join(f.dir, "minimal")
	if err := os.WriteFile(src, fmt.Appendf(nil, minimalAgent, agent.ServerName), 0o600); err != nil {
		b.Fatal(err)
	}
	build := exec.Command("go", "build", "-ldflags=-s -w", "-o", exe, src)
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	if err := os.Truncate(exe, info.Size()); err != nil { // what follows an executable's end is ignored
		b.Fatal(err)
	}
	data, err := os.ReadFile(exe)
	if err != nil {
		b.Fatal(err)
	}
	sum := sha256.Sum256(data)
	mux := http.NewServeMux()
	mux.HandleFunc("/runner/", func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, exe) })
	srv := httptest.NewServer(mux)
	b.Cleanup(srv.Close)
	web := srv.Listener.Addr().String()

	ca, err := selfca.New(agent.ServerName)
	if err != nil {
		b.Fatal(err)
	}
	lis, err := tls.Listen("tcp", "127.0.0.1:0", ca.ServerConfig())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = lis.Close() })
	go func() {
		for {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			if c.(*tls.Conn).HandshakeContext(context.Background()) == nil {
				f.dialled <- time.Now()
			}
			_ = c.Close()
		}
	}()
	boot := vmprovider.Bootstrap{
		Contacts: []string{fromGuest(b, lis.Addr().String())}, CA: ca.PEM(), Token: "token", RunnerURL: "http://" + fromGuest(b, web) + "/runner",
		AgentSHA256: map[string]string{"linux/amd64": hex.EncodeToString(sum[:])}, Hostname: "floor", InstanceID: "floor",
	}
	if f.seed, err = seed.Build(boot, seed.Options{}); err != nil {
		b.Fatal(err)
	}
	// The domain is what the provider makes.
	f.id = "floor-model"
	spec := vmprovider.Spec{ID: f.id, Owner: "bench", Image: pool.Image, Bootstrap: boot}
	if _, err := pool.Provider.Create(b.Context(), spec); err != nil {
		b.Fatal(err)
	}
	f.xml = s.Virsh(b, "dumpxml", "--inactive", f.id)
	if err := pool.Provider.Destroy(b.Context(), f.id, vmprovider.DestroyOptions{}); err != nil {
		b.Fatal(err)
	}
	select {
	case <-f.dialled:
	default:
	}
	return f
}

// boot starts a guest and gives how long it took to be dialled, and what ends it
// and how long that took.
func (f *floor) boot(b *testing.B, n int) (up time.Duration, end func() time.Duration) {
	b.Helper()
	name := fmt.Sprintf("bare-%d", n)
	xml := strings.ReplaceAll(f.xml, f.id, name)
	var uuid string
	if _, rest, ok := strings.Cut(xml, "<uuid>"); ok {
		uuid, _, _ = strings.Cut(rest, "</uuid>")
	}
	xml = strings.Replace(xml, "<uuid>"+uuid+"</uuid>", "", 1)
	file := filepath.Join(f.dir, name+".xml")
	part := func(kind string) string { return filepath.Join(f.PoolPath, name+"@bench@"+kind) }
	start := time.Now()
	overlay := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-b", f.image, "-F", "qcow2", part("disk.qcow2"))
	if out, err := overlay.CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	if err := errors.Join(os.WriteFile(part("seed"), f.seed, 0o600), os.WriteFile(part("console"), nil, 0o600), os.WriteFile(file, []byte(xml), 0o600)); err != nil {
		b.Fatal(err)
	}
	f.Virsh(b, "create", file)
	up = (<-f.dialled).Sub(start)
	return up, func() time.Duration {
		start := time.Now()
		f.Virsh(b, "destroy", name)
		if err := errors.Join(os.Remove(part("disk.qcow2")), os.Remove(part("seed")), os.Remove(part("console"))); err != nil {
			b.Fatal(err)
		}
		return time.Since(start)
	}
}

func sum(ds []time.Duration) (s time.Duration) {
	for _, d := range ds {
		s += d
	}
	return s
}

// BenchmarkColdVM has a job claimed until its machine's agent has enrolled, beside
// floor, in turns; and the machine of each destroyed while it runs. Under
// emulation.
func BenchmarkColdVM(b *testing.B) {
	server := testenv.StartLibvirt(b)
	edit := inGuests(b, server)
	m := newMoments()
	p := newPlant(b, testenv.SQLite(b))
	var pool solstice.Pool
	eng, _ := p.start(b, edit, func(c *solstice.Config) { c.Logger, pool = slog.New(m), c.Pools[0] })
	f := newFloor(b, server, pool)
	var ours, bare, oursEnd, bareEnd []time.Duration
	theirs := func(n int) {
		up, end := f.boot(b, n)
		bare, bareEnd = append(bare, up), append(bareEnd, end())
	}
	mine := func(n int) {
		m.forget()
		r := p.submit(b, eng, fmt.Sprintf("jobs: { a: { checkout: false, steps: [{ run: sleep 600; echo %d }] } }", n))
		eventually(b, "its agent enrolled", func() bool { return !m.of("agent enrolled").IsZero() })
		ours = append(ours, m.of("agent enrolled").Sub(m.of("job claimed")))
		for _, vm := range machinesOf(b, pool.Provider) {
			start := time.Now()
			if err := pool.Provider.Destroy(b.Context(), vm.ID, vmprovider.DestroyOptions{}); err != nil {
				b.Fatal(err)
			}
			oursEnd = append(oursEnd, time.Since(start))
		}
		if err := eng.Cancel(b.Context(), r.ID, "measured"); err != nil {
			b.Fatal(err)
		}
		finish(b, eng, r.ID)
	}
	for n := range b.N {
		first, second := theirs, mine
		if n%2 == 1 {
			first, second = second, first
		}
		first(n)
		second(n)
	}
	percentiles(b, "enrolled", ours)
	percentiles(b, "bare", bare)
	percentiles(b, "destroy", oursEnd)
	percentiles(b, "bare-destroy", bareEnd)
	b.ReportMetric(float64(sum(ours))/float64(sum(bare)), "x-bare")
	b.ReportMetric(float64(sum(oursEnd))/float64(sum(bareEnd)), "x-bare-destroy")
}

// BenchmarkWarmVM has a job claimed by a warm machine until its first step is known
// to have begun, and until a follower has the step's first line.
func BenchmarkWarmVM(b *testing.B) {
	edit := inGuests(b, testenv.StartLibvirt(b))
	m := newMoments()
	p := newPlant(b, testenv.SQLite(b))
	eng, _ := p.start(b, edit, func(c *solstice.Config) { c.Logger, c.Pools[0].Warm = slog.New(m), 1 })
	var step, line []time.Duration
	for n := range b.N {
		awaitWarm(b, eng)
		m.forget()
		r := p.submit(b, eng, fmt.Sprintf("jobs: { a: { checkout: false, steps: [{ run: echo hi %d }] } }", n))
		var watcher sync.WaitGroup
		watcher.Go(func() {
			for ; b.Context().Err() == nil; time.Sleep(2 * time.Millisecond) {
				j, err := eng.Job(b.Context(), r.Jobs[0].ID)
				if err != nil {
					b.Error(err)
					return
				}
				if j.AttemptID == "" {
					continue
				}
				steps, err := eng.Steps(b.Context(), j.AttemptID)
				if err != nil {
					b.Error(err)
					return
				}
				if len(steps) > 0 {
					step = append(step, time.Since(m.of("job claimed")))
					return
				}
			}
		})
		for c, err := range eng.FollowJob(b.Context(), r.Jobs[0].ID) {
			if err != nil {
				b.Fatal(err)
			}
			if len(c.Chunk.Data) > 0 {
				line = append(line, time.Since(m.of("job claimed")))
				break
			}
		}
		watcher.Wait()
		finish(b, eng, r.ID)
	}
	percentiles(b, "claim-to-step", step)
	percentiles(b, "claim-to-line", line)
}

// BenchmarkVMPool has 20 jobs (4 with -short) through a pool of two machines,
// without warm machines and with two.
func BenchmarkVMPool(b *testing.B) {
	jobs := brief(20, 2)
	for _, warm := range []int{0, 2} {
		b.Run(fmt.Sprintf("warm=%d", warm), func(b *testing.B) {
			edit := inGuests(b, testenv.StartLibvirt(b))
			p := newPlant(b, testenv.SQLite(b))
			eng, _ := p.start(b, edit, func(c *solstice.Config) { c.Pools[0].Warm = warm })
			if warm > 0 {
				awaitWarm(b, eng)
			}
			workflow := "jobs: { a: { checkout: false, matrix: { n: [%s] }, steps: [{ run: echo hi %d }] } }"
			b.ResetTimer()
			for n := range b.N {
				finishWithin(b, eng, p.submit(b, eng, fmt.Sprintf(workflow, numbers(jobs), n)).ID, 20*time.Minute)
			}
			b.ReportMetric(b.Elapsed().Seconds()/float64(b.N*jobs), "s/job")
		})
	}
}

// numbers are the first n, as YAML has them in a list.
func numbers(n int) string {
	var out []string
	for i := range n {
		out = append(out, fmt.Sprint(i))
	}
	return strings.Join(out, ",")
}
