//go:build (libvirt || libvirt_dlopen) && cgo

package solstice_test

import (
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/remotevm"
)

// gates hold the first job that comes to each, until it is opened.
type gates struct {
	mu    sync.Mutex
	first map[string]chan struct{} // closed: open
}

func (g *gates) ServeHTTP(_ http.ResponseWriter, r *http.Request) {
	name := r.PathValue("name")
	g.mu.Lock()
	gate := g.first[name]
	came := gate != nil
	if !came {
		gate = make(chan struct{})
		g.first[name] = gate
	}
	g.mu.Unlock()
	if came {
		return
	}
	select {
	case <-gate:
	case <-r.Context().Done():
	}
}

// begun says whether a job waits, or has waited, at a gate.
func (g *gates) begun(name string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.first[name] != nil
}

func (g *gates) open(name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.first[name])
}

// damaged is a copy of an image with wrong bytes in its kernel and what follows.
func damaged(t *testing.T, image string) string {
	t.Helper()
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	for i := len(b) / 4 * 3; i < len(b)/20*19; i++ {
		b[i] ^= 0xa5
	}
	file := filepath.Join(t.TempDir(), "damaged.qcow2")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// plugged starts the guests' provider as a plugin; pid tells its process.
func plugged(t *testing.T, g *guests) (p *remotevm.Provider, pid func() int) {
	t.Helper()
	conf, err := json.Marshal(g)
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	pids := filepath.Join(t.TempDir(), "pid")
	p, err = remotevm.Start(t.Context(), remotevm.Command{Argv: []string{exe, pluginArg, string(conf), pids}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p, func() int {
		b, err := os.ReadFile(pids)
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.Atoi(string(b))
		if err != nil {
			return 0 // it is being written
		}
		return n
	}
}

// TestFaultsInVMs: what happens to machines under running jobs, on one libvirtd:
// each failure has its class, is tried again where that may help, and leaves
// nothing, and nobody else's domain is touched.
func TestFaultsInVMs(t *testing.T) {
	server := testenv.StartLibvirt(t)
	untouched := server.Foreigners(t)
	makeRoom := server.FullPool(t, "full")
	gate := &gates{first: map[string]chan struct{}{}}
	web := http.NewServeMux()
	web.Handle("/gate/{name}", gate)
	agents, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := newPlant(t, testenv.SQLite(t))
	p.Guests = guestsOn(t, server, web, agents.Addr().String())
	p.Timing = solstice.Timing{
		Lease: 6 * time.Second, AgentDeadline: 20 * time.Second, DeadlineMargin: 5 * time.Second,
		Heartbeat: time.Second, Tick: time.Second, Boot: 5 * time.Minute,
	}
	elsewhere := *p.Guests
	elsewhere.Storage = "full"
	full, err := elsewhere.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = full.Close() })
	plugin, pluginPID := plugged(t, p.Guests)
	broken := damaged(t, p.Guests.Image)
	eng, stop := p.start(t, func(c *solstice.Config) {
		c.AgentListener, c.MaxConcurrency = agents, 8
		c.Retries = map[solstice.Class]int{solstice.ClassBoot: 1, solstice.ClassAgentLost: 1}
		pool := func(name string, edit func(*solstice.Pool)) {
			other := c.Pools[0]
			other.Labels, other.Capacity = []string{name}, 1
			edit(&other)
			c.Pools = append(c.Pools, other)
		}
		pool("broken", func(o *solstice.Pool) { o.Image.Path = broken })
		pool("full", func(o *solstice.Pool) { o.Provider = full })
		pool("plugin", func(o *solstice.Pool) { o.Provider = plugin })
	})
	at := strings.TrimSuffix(p.Guests.RunnerURL, "/runner") + "/gate/"
	held := func(name, on string) string {
		return "  " + name + ": { runs-on: " + on + ", checkout: false, steps: [ { run: 'wget -q -O - " + at + name + "; echo over' } ] }\n"
	}
	r := p.submit(t, eng, "jobs:\n"+held("killed", "host")+held("frozen", "host")+held("plugged", "plugin"))
	attempts := func(t *testing.T, job string) []solstice.Attempt {
		t.Helper()
		as, err := eng.Attempts(t.Context(), job)
		if err != nil {
			t.Fatal(err)
		}
		return as
	}
	// ended waits for a job's end and checks how its attempts came to theirs.
	ended := func(t *testing.T, id string, state solstice.JobState, classes ...solstice.Class) []solstice.Attempt {
		t.Helper()
		var j solstice.Job
		eventuallyWithin(t, 10*time.Minute, "the job is over", func() bool {
			var err error
			j, err = eng.Job(t.Context(), id)
			return err == nil && j.State.Terminal()
		})
		as := attempts(t, id)
		var got []solstice.Class
		for _, a := range as {
			got = append(got, a.Class)
		}
		if j.State != state || !slices.Equal(slices.Compact(got), classes) {
			t.Errorf("job is %s, attempts %+v; want it %s, and the classes %q", j.State, as, state, classes)
		}
		return as
	}
	waiting := map[string]solstice.Job{}
	for _, j := range r.Jobs {
		eventuallyWithin(t, 5*time.Minute, j.Name+" runs", func() bool { return gate.begun(j.Name) })
		waiting[j.Name] = j
	}
	machine := func(t *testing.T, name string) string {
		t.Helper()
		as := attempts(t, waiting[name].ID)
		if len(as) != 1 || as[0].State.Terminal() {
			t.Fatalf("%s: %+v", name, as)
		}
		return as[0].MachineID
	}
	server.Kill(t)
	server.Start(t)
	eventually(t, "the provider is back", func() bool {
		for name := range waiting {
			if inst, err := full.Get(t.Context(), machine(t, name)); err != nil || inst.State != vmprovider.StateRunning {
				return false
			}
		}
		return true
	})
	// All at once: what follows only looks how each comes to its end.
	server.SignalGuest(t, machine(t, "killed"), syscall.SIGKILL)
	server.SignalGuest(t, machine(t, "frozen"), syscall.SIGSTOP)
	before := pluginPID()
	if err := syscall.Kill(before, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	spent(t, server, machine(t, "plugged"), agents.Addr().String())
	gate.open("plugged")
	submit := func(on string) string {
		r := p.submit(t, eng, "jobs: { a: { runs-on: "+on+", checkout: false, steps: [ { run: 'true' } ] } }\n")
		return r.Jobs[0].ID
	}
	neverBoots, noRoom := submit("broken"), submit("full")
	eventually(t, "it was tried twice without room", func() bool { return len(attempts(t, noRoom)) > 1 })
	makeRoom(t)

	t.Run("engine killed", func(t *testing.T) { enginesDie(t, server, *p.Guests) })
	t.Run("libvirtd and plugin killed", func(t *testing.T) {
		as := ended(t, waiting["plugged"].ID, solstice.JobSucceeded, "")
		eventually(t, "the plugin is started again", func() bool { now := pluginPID(); return now != 0 && now != before })
		eventually(t, "the machine is destroyed", func() bool {
			_, err := plugin.Get(t.Context(), as[0].MachineID)
			return errors.Is(err, vmprovider.ErrNotFound)
		})
	})
	t.Run("pool full", func(t *testing.T) {
		ended(t, noRoom, solstice.JobSucceeded, solstice.ClassCapacity, "")
	})
	t.Run("QEMU killed", func(t *testing.T) {
		as := ended(t, waiting["killed"].ID, solstice.JobSucceeded, solstice.ClassAgentLost, "")
		if !strings.Contains(as[0].Reason, "QEMU crashed") || !strings.Contains(as[0].Console, "mini: init") {
			t.Errorf("%q, console %q", as[0].Reason, as[0].Console)
		}
	})
	t.Run("image damaged", func(t *testing.T) {
		as := ended(t, neverBoots, solstice.JobErrored, solstice.ClassBoot)
		for _, a := range as {
			if !strings.Contains(a.Console, "SYSLINUX") {
				t.Errorf("%q, console %q", a.Reason, a.Console)
			}
		}
		if len(as) != 2 {
			t.Errorf("%d attempts", len(as))
		}
	})
	t.Run("guest frozen", func(t *testing.T) {
		as := ended(t, waiting["frozen"].ID, solstice.JobSucceeded, solstice.ClassAgentLost, "")
		if !strings.Contains(as[0].Reason, "not heard of") {
			t.Errorf("%q", as[0].Reason)
		}
	})
	eventuallyWithin(t, 2*time.Minute, "nothing is left", func() bool {
		files, err := filepath.Glob(filepath.Join(server.PoolPath, "*@*"))
		return err == nil && len(files) == 0 && strings.TrimSpace(server.Virsh(t, "vol-list", "full")) == "" &&
			strings.TrimSpace(server.Virsh(t, "list", "--all", "--name")) == testenv.Foreign &&
			slices.Equal(server.Guests(t), []string{testenv.Foreign})
	})
	untouched(t)
	stop()
	if err := plugin.Close(); err != nil {
		t.Error(err)
	}
	if err := syscall.Kill(pluginPID(), 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the plugin's process: %v", err)
	}
}

// spent reads the enrolment token from the seed of a machine whose agent runs a
// job: it is of no use.
func spent(t *testing.T, s *testenv.LibvirtServer, machine, addr string) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(s.PoolPath, machine+"@*@seed"))
	if err != nil || len(files) != 1 {
		t.Fatalf("seeds: %v, %v", files, err)
	}
	b, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`\{"contacts":.*\}`).Find(b)
	var boot vmprovider.Bootstrap
	if err := json.Unmarshal(found, &boot); err != nil || boot.Token == "" {
		t.Fatalf("bootstrap in the seed: %v", err)
	}
	boot.Contacts = []string{addr}
	g := newGuest(t, boot)
	if _, err := g.enroll(boot.Token, 7); status.Code(err) != codes.Unauthenticated {
		t.Errorf("enrolled with a token that is used up: %v", err)
	}
	if _, _, err := g.attach(boot.Token, nil); status.Code(err) != codes.Unauthenticated {
		t.Errorf("attached with it: %v", err)
	}
}

// enginesDie kills an engine while it creates a machine, and its successor while
// that destroys one; the third brings everything to its end.
func enginesDie(t *testing.T, s *testenv.LibvirtServer, g guests) {
	addr := freeAddr(t)
	p := newPlant(t, testenv.SQLite(t))
	g.Contact = fromGuest(t, addr)
	p.Timing = solstice.Timing{
		Lease: 3 * time.Second, AgentDeadline: time.Minute, DeadlineMargin: 5 * time.Second,
		Heartbeat: time.Second, Tick: time.Second, Boot: 5 * time.Minute,
	}
	eng, _ := p.start(t, func(c *solstice.Config) { c.Pools = nil }) // for us to ask
	r := p.submit(t, eng, "jobs: { a: { checkout: false, steps: [ { run: 'true' } ] } }\n")
	parts := func() (found []string) {
		files, err := filepath.Glob(filepath.Join(s.PoolPath, "*@"+eng.Installation()+"@*"))
		if err != nil {
			t.Fatal(err)
		}
		return files
	}
	for _, in := range []string{"create", "destroy"} {
		g.DiesIn = in
		p.Guests = &g
		victim := p.spawn(t, addr).Process.Pid
		eventuallyWithin(t, 5*time.Minute, "the engine is killed in "+in, func() bool {
			return errors.Is(syscall.Kill(victim, 0), syscall.ESRCH)
		})
		t.Logf("killed in %s, which leaves %v", in, parts())
	}
	g.DiesIn = ""
	last, _ := p.start(t, func(c *solstice.Config) { c.AgentAddr = addr })
	r = finishWithin(t, last, r.ID, 10*time.Minute)
	as, err := last.Attempts(t.Context(), r.Jobs[0].ID)
	if err != nil || r.State != solstice.RunSucceeded {
		t.Errorf("run is %s, attempts %+v, %v", r.State, as, err)
	}
	// The first creation may just have come to its end, where this computer is
	// busy: then its agent finds the second engine, and the job goes on.
	for _, a := range as[:len(as)-1] {
		if a.Class != solstice.ClassBoot {
			t.Errorf("attempt %d: class %s, %s", a.Number, a.Class, a.Reason)
		}
	}
	eventually(t, "the machines are gone", func() bool {
		ms, err := last.Machines(t.Context(), solstice.MachineFilter{})
		return err == nil && len(ms) == 0 && len(parts()) == 0
	})
}
