//go:build (libvirt || libvirt_dlopen) && cgo

package solstice_test

import (
	"crypto/sha256"
	"encoding/hex"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/solstice"
)

// guestAgent builds the agent for the mini guest, and gives what serves it.
func guestAgent(t testing.TB) (file, sum string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "agent")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", file, "../examples/agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the agent: %v\n%s", err, out)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	s := sha256.Sum256(b)
	return file, hex.EncodeToString(s[:])
}

// guestsOn are mini guests of a libvirtd, whose engine listens at addr, and which
// fetch their agent, and whatever else there is on web, from this process.
func guestsOn(t testing.TB, s *testenv.LibvirtServer, web *http.ServeMux, addr string) *guests {
	t.Helper()
	file, sum := guestAgent(t)
	web.HandleFunc("/runner/", func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, file) })
	srv := httptest.NewServer(web)
	t.Cleanup(srv.Close)
	return &guests{
		URI: s.URI, Storage: s.Pool, StoragePath: s.PoolPath, Image: s.Image(t, testenv.MiniGuest(t)),
		Contact: fromGuest(t, addr), RunnerURL: "http://" + fromGuest(t, srv.Listener.Addr().String()) + "/runner", SHA256: sum,
	}
}

// fromGuest is how a guest with user networking reaches an address of this host's
// loopback.
func fromGuest(t testing.TB, addr string) string {
	t.Helper()
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	return "10.0.2.2:" + port
}

// inGuests makes the plant's only pool one of virtual machines, which boot the
// mini guest and reach this host at 10.0.2.2.
func inGuests(t testing.TB, server *testenv.LibvirtServer) (edit func(*solstice.Config)) {
	t.Helper()
	agents, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := guestsOn(t, server, http.NewServeMux(), agents.Addr().String())
	vms, err := g.open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = vms.Close() })
	return func(c *solstice.Config) {
		c.AgentListener = agents
		c.Timing = solstice.Timing{
			Lease: 10 * time.Second, AgentDeadline: time.Minute, DeadlineMargin: 5 * time.Second,
			Heartbeat: time.Second, Tick: time.Second, Boot: 2 * time.Minute,
		}
		pool := &c.Pools[0]
		pool.Provider, pool.Capacity = vms, 2
		g.serve(pool)
	}
}

// nothingRuns asserts that no domain and no file of one is left.
func nothingRuns(t *testing.T, s *testenv.LibvirtServer) {
	t.Helper()
	eventually(t, "no machine", func() bool {
		files, err := filepath.Glob(filepath.Join(s.PoolPath, "*"))
		return err == nil && len(files) == 0 && strings.TrimSpace(s.Virsh(t, "list", "--all", "--name")) == ""
	})
}

// TestJobsInVMs: a matrix and what needs it, each job in a virtual machine of its
// own, the repository by way of the agents' endpoint. Nothing of libvirt is root's.
func TestJobsInVMs(t *testing.T) {
	server := testenv.StartLibvirtSession(t) // the system's has the faults
	edit := inGuests(t, server)
	p := newPlant(t, testenv.SQLite(t))
	p.commit(t, map[string]string{"greeting": "hello from the repository\n"})
	eng, _ := p.start(t, edit)
	r := finishWithin(t, eng, p.submit(t, eng, `
jobs:
  a:
    matrix: { n: [1, 2] }
    steps:
      - run: cat greeting && echo "n=${{ matrix.n }} on $(uname -n)"
  b:
    needs: a
    steps:
      - run: cat greeting && echo "last on $(uname -n)"
`).ID, 5*time.Minute)
	machines := map[string]bool{}
	for _, j := range r.Jobs {
		as, err := eng.Attempts(t.Context(), j.ID)
		if err != nil || len(as) != 1 || j.State != solstice.JobSucceeded {
			t.Fatalf("job %s: %s, attempts %+v, %v", j.Name, j.State, as, err)
		}
		machines[as[0].MachineID] = true
		if log := jobLog(t, eng, j.ID); !strings.Contains(log, "hello from the repository\n") || !strings.Contains(log, " on ") {
			t.Errorf("log of %s: %q", j.Name, log)
		}
	}
	if r.State != solstice.RunSucceeded || len(machines) != 3 {
		t.Errorf("%s on %d machines", r.State, len(machines))
	}
	nothingRuns(t, server)
}
