package solstice_test

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/processvm"
)

// agentPID finds the agent's process of a machine.
func agentPID(t *testing.T, p *plant, machine string) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(p.machinesDir(), machine, "status.json"))
	if err != nil {
		t.Fatal(err)
	}
	var s struct {
		Process struct {
			PID int `json:"pid"`
		} `json:"process"`
	}
	if err := json.Unmarshal(b, &s); err != nil || s.Process.PID == 0 {
		t.Fatalf("%s: %v", b, err)
	}
	return s.Process.PID
}

func readyMachines(t *testing.T, p *plant) (ids []string) {
	t.Helper()
	db := p.openDB(t)
	defer func() { _ = db.Close() }()
	if err := db.NewSelect().Table("machines").Column("id").Where("state = 'ready'").Scan(t.Context(), &ids); err != nil {
		t.Fatal(err)
	}
	return ids
}

// destroyAll removes the machines that a stopped engine left alive, as it
// should: agents of warm machines wait for another engine.
func (p *plant) destroyAll(t testing.TB) {
	t.Helper()
	prov, err := processvm.New(processvm.Config{Root: p.machinesDir(), Command: []string{"/bin/false"}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = prov.Close() }()
	for _, m := range machinesOf(t, prov) {
		if err := prov.Destroy(context.WithoutCancel(t.Context()), m.ID, vmprovider.DestroyOptions{}); err != nil {
			t.Fatal(err)
		}
	}
}

// freeAddr reserves a loopback address for a process that is started later.
func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// cutting puts a proxy in front of an address that cuts every connection after
// so many bytes from the agent.
func cutting(t *testing.T, upstream string, bytes int64) string {
	t.Helper()
	proxy := testenv.NewProxy(t, upstream)
	if bytes > 0 {
		proxy.Add(t, "limit_data", testenv.ToServer, map[string]any{"bytes": bytes})
	}
	return proxy.Addr()
}

// TestTakeOver has two engines on one database and one blob store, an agent
// whose stream is cut every 64 KiB, and kills the engine that owns the job in
// the middle of a step. Then the job that failed is run again.
func TestTakeOver(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) { takeOver(t, url, 0) })
	t.Run("warm", func(t *testing.T) { takeOver(t, testenv.Postgres(t), 1) })
}

func takeOver(t *testing.T, url string, warm int) {
	p := newPlant(t, url)
	p.Timing.AgentDeadline, p.Timing.Heartbeat = 2*time.Minute, 2*time.Second // a busy machine is slow at handshakes
	victimAddr, survivorAddr := freeAddr(t), freeAddr(t)
	p.Contacts = []string{cutting(t, victimAddr, 64<<10), cutting(t, survivorAddr, 64<<10)}
	p.Warm = warm
	file := func(name string) string { return filepath.Join(p.Dir, name) }
	touch := func(name string) {
		if err := os.WriteFile(file(name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	victim := p.spawn(t, victimAddr)
	if warm > 0 {
		eventually(t, "a machine is warm", func() bool { return len(readyMachines(t, p)) > 0 })
	}
	// The job has to go to the victim: the other engine serves another label.
	eng, stop := p.start(t, func(c *solstice.Config) {
		c.AgentAddr = survivorAddr
		c.Pools[0].Labels, c.Pools[0].Name, c.Pools[0].Warm = []string{"other"}, "host", 0
	})
	r := p.submit(t, eng, `
jobs:
  a:
    checkout: false
    steps:
      - run: |
          echo x >> `+file("count")+`
          seq 1 60000
          touch `+file("half")+`
          while [ ! -e `+file("gate")+` ]; do sleep 0.05; done
          seq 60001 120000
      - run: echo the end
  b:
    needs: a
    runs-on: other
    checkout: false
    steps: [ { run: test -e `+file("fixed")+` } ]
`)
	eventually(t, "the job is in the middle of its step", func() bool { _, err := os.Stat(file("half")); return err == nil })
	if err := victim.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	touch("gate")
	eventually(t, "the first attempt is over", func() bool {
		as, err := eng.Attempts(t.Context(), r.Jobs[0].ID)
		if err == nil && as[0].State == solstice.AttemptLost {
			t.Fatalf("the attempt was lost: %s, after %d log bytes; its agent said:\n%s", as[0].Reason, as[0].LogSize, as[0].Console)
		}
		return err == nil && as[0].State.Terminal()
	})
	r = finish(t, eng, r.ID)
	a := job(t, r, "a")
	attempts, err := eng.Attempts(t.Context(), a.ID)
	if err != nil || a.State != solstice.JobSucceeded || len(attempts) != 1 || attempts[0].State != solstice.AttemptFinished {
		t.Fatalf("a is %s, %v, attempts: %+v", a.State, err, attempts)
	}
	if b, err := os.ReadFile(file("count")); err != nil || string(b) != "x\n" {
		t.Errorf("the job ran %d times: %v", len(b)/2, err)
	}
	var want strings.Builder
	for i := 1; i <= 120000; i++ {
		fmt.Fprintln(&want, i)
	}
	want.WriteString("the end\n")
	same := func(jobID string) {
		t.Helper()
		if got := jobLog(t, eng, jobID); sha256.Sum256([]byte(got)) != sha256.Sum256([]byte(want.String())) {
			t.Errorf("the log differs: %d bytes, want %d", len(got), want.Len())
		}
	}
	same(a.ID)
	// The engine that is left has the provider too, so the machine goes.
	eventually(t, "the machine is destroyed", func() bool {
		_, err := os.Stat(filepath.Join(p.machinesDir(), attempts[0].MachineID))
		return os.IsNotExist(err)
	})

	if r.State != solstice.RunFailed || job(t, r, "b").State != solstice.JobFailed {
		t.Fatalf("run is %s, b is %s", r.State, job(t, r, "b").State)
	}
	touch("fixed")
	again, err := eng.Rerun(t.Context(), r.ID, solstice.RerunOptions{Failed: true})
	if err != nil {
		t.Fatal(err)
	}
	again = finish(t, eng, again.ID)
	if again.State != solstice.RunSucceeded || job(t, again, "a").CopiedFrom != a.ID {
		t.Errorf("rerun: %+v", again)
	}
	same(job(t, again, "a").ID)
	stop()
	p.destroyAll(t) // warm machines wait for an engine that serves them
}

// TestStreamIsCut has every connection of the agent cut after 64 KiB: a log of any
// bytes arrives as it was printed, and the job runs once.
func TestStreamIsCut(t *testing.T) {
	p := newPlant(t, testenv.SQLite(t))
	addr := freeAddr(t)
	p.Contacts = []string{cutting(t, addr, 64<<10)}
	want := make([]byte, 1<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(want) // no text, and lines of any length
	printed := filepath.Join(p.Dir, "printed")
	if err := os.WriteFile(printed, want, 0o600); err != nil {
		t.Fatal(err)
	}
	eng, _ := p.start(t, func(c *solstice.Config) { c.AgentAddr = addr })
	r := finish(t, eng, p.submit(t, eng, "jobs: { a: { checkout: false, steps: [ { run: cat "+printed+" } ] } }\n").ID)
	if r.State != solstice.RunSucceeded || r.Jobs[0].Attempts != 1 {
		t.Errorf("run is %s after %d attempts: %s", r.State, r.Jobs[0].Attempts, r.Jobs[0].Reason)
	}
	if got := jobLog(t, eng, r.Jobs[0].ID); got != string(want) {
		t.Errorf("the log differs: %d bytes, want %d", len(got), len(want))
	}
}

// TestSilentJob: a job that prints nothing for longer than the agent deadline and
// the lease is not given up, since its agent is in contact.
func TestSilentJob(t *testing.T) {
	p := newPlant(t, testenv.SQLite(t))
	p.Timing.AgentDeadline, p.Timing.DeadlineMargin = 2*time.Second, 500*time.Millisecond
	eng, _ := p.start(t)
	r := finish(t, eng, p.submit(t, eng, "jobs: { a: { checkout: false, steps: [ { run: sleep 6; echo over } ] } }\n").ID)
	if r.State != solstice.RunSucceeded || r.Jobs[0].Attempts != 1 || jobLog(t, eng, r.Jobs[0].ID) != "over\n" {
		t.Errorf("run is %s after %d attempts: %s", r.State, r.Jobs[0].Attempts, r.Jobs[0].Reason)
	}
}

// TestHandOver stops an engine in an orderly way: its job goes on and finishes
// at its successor.
func TestHandOver(t *testing.T) { onBoth(t, testHandOver) }

func testHandOver(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	addr := freeAddr(t)
	p.Contacts = []string{addr}
	at := func(c *solstice.Config) { c.AgentAddr = addr }
	first, stop := p.start(t, at)
	gate, begun := filepath.Join(p.Dir, "gate"), filepath.Join(p.Dir, "begun")
	r := p.submit(t, first, `
jobs:
  a:
    steps: [ { run: 'touch `+begun+`; while [ ! -e `+gate+` ]; do sleep 0.05; done; echo done' } ]
`)
	eventually(t, "the job runs", func() bool { _, err := os.Stat(begun); return err == nil })
	stop()
	second, _ := p.start(t, at)
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r = finish(t, second, r.ID)
	if r.State != solstice.RunSucceeded || r.Jobs[0].Attempts != 1 || !strings.HasSuffix(jobLog(t, second, r.Jobs[0].ID), "done\n") {
		t.Errorf("run: %+v, log %q", r, jobLog(t, second, r.Jobs[0].ID))
	}
}

// TestAgentDeadline cuts an agent off for good: it kills its job by itself, the
// server gives the attempt up, and the next attempt succeeds.
func TestAgentDeadline(t *testing.T) { onBoth(t, testAgentDeadline) }

func testAgentDeadline(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	p.Timing.AgentDeadline, p.Timing.DeadlineMargin = 2*time.Second, 500*time.Millisecond
	addr := freeAddr(t)
	proxy := testenv.NewProxy(t, addr)
	p.Contacts = []string{proxy.Addr()}
	eng, _ := p.start(t, func(c *solstice.Config) { c.AgentAddr = addr })
	first := filepath.Join(p.Dir, "first")
	r := p.submit(t, eng, `
jobs:
  a:
    steps:
      - run: |
          if mkdir `+first+`; then sleep 600; fi
          echo second
`)
	eventually(t, "the first attempt runs", func() bool { _, err := os.Stat(first); return err == nil })
	proxy.Cut()
	eventually(t, "the attempt is given up", func() bool {
		as, err := eng.Attempts(t.Context(), r.Jobs[0].ID)
		return err == nil && len(as) > 0 && as[0].State == solstice.AttemptLost
	})
	proxy.Restore(t)
	r = finish(t, eng, r.ID)
	as, err := eng.Attempts(t.Context(), r.Jobs[0].ID)
	if err != nil || r.State != solstice.RunSucceeded || as[0].Class != solstice.ClassAgentLost {
		t.Errorf("run is %s, attempts %+v, %v", r.State, as, err)
	}
}

// TestBootFailure has machines whose agent never attaches: retried within the
// budget, then errored, with the console to look at.
func TestBootFailure(t *testing.T) { onBoth(t, testBootFailure) }

func testBootFailure(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	broken := filepath.Join(p.Dir, "broken")
	if err := os.WriteFile(broken, []byte("#!/bin/sh\necho no kernel for you\nexit 1\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	eng, _ := p.start(t, func(c *solstice.Config) {
		prov, err := processvm.New(processvm.Config{Root: p.machinesDir(), Command: []string{broken}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = prov.Close() })
		c.Pools[0].Provider = prov
		c.Retries = map[solstice.Class]int{solstice.ClassBoot: 1}
	})
	r := finish(t, eng, p.submit(t, eng, "jobs: { a: { steps: [ { run: 'true' } ] } }\n").ID)
	if r.State != solstice.RunErrored || r.Jobs[0].State != solstice.JobErrored || r.Jobs[0].Class != solstice.ClassBoot {
		t.Errorf("run: %+v", r)
	}
	as, err := eng.Attempts(t.Context(), r.Jobs[0].ID)
	if err != nil || len(as) != 2 {
		t.Fatalf("attempts: %+v, %v", as, err)
	}
	for _, a := range as {
		if a.Class != solstice.ClassBoot || !strings.Contains(a.Console, "no kernel for you") {
			t.Errorf("attempt %d: class %s, console %q", a.Number, a.Class, a.Console)
		}
	}
}

// TestCreateFails has a provider that refuses at first: no retry budget is
// used for a full host.
func TestNoRoom(t *testing.T) { onBoth(t, testNoRoom) }

func testNoRoom(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	p.Capacity = 3
	eng, _ := p.start(t, func(c *solstice.Config) {
		prov := c.Pools[0].Provider
		c.Pools[0].Provider = &fullOnce{Provider: prov, left: 3}
		c.Retries = map[solstice.Class]int{}
	})
	r := finish(t, eng, p.submit(t, eng, "jobs: { a: { steps: [ { run: echo hi } ] } }\n").ID)
	if r.State != solstice.RunSucceeded || r.Jobs[0].Attempts != 4 {
		t.Errorf("run is %s after %d attempts", r.State, r.Jobs[0].Attempts)
	}
}
