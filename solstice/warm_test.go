package solstice_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/memvm"
	"github.com/solstice-ci/solstice-go/vmprovider/processvm"
)

// warmReady waits until n machines wait for a job, none of them one of not, and
// returns them, oldest first.
func warmReady(t *testing.T, p *plant, n int, not ...string) (ids []string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d machines wait for a job", n), func() bool {
		ids = readyMachines(t, p)
		return len(ids) == n && !slices.ContainsFunc(ids, func(id string) bool { return slices.Contains(not, id) })
	})
	slices.Sort(ids)
	return ids
}

// machineRows counts the machines in a state; "": all that there ever were.
func machineRows(t *testing.T, p *plant, state string) int {
	t.Helper()
	db := p.openDB(t)
	defer func() { _ = db.Close() }()
	q := db.NewSelect().Table("machines")
	if state != "" {
		q = q.Where("state = ?", state)
	}
	n, err := q.Count(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return int(n)
}

func attemptsOf(t *testing.T, eng *solstice.Engine, r solstice.Run) []solstice.Attempt {
	t.Helper()
	as, err := eng.Attempts(t.Context(), r.Jobs[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	return as
}

// TestWarmMachineFreezes between two heartbeats, and gets a job: another machine
// does it, at no cost. Then one freezes without a job, and one dies.
func TestWarmMachineFreezes(t *testing.T) { onBoth(t, testWarmMachineFreezes) }

func testWarmMachineFreezes(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	p.Warm, p.Timing.Heartbeat = 2, 1500*time.Millisecond
	eng, stop := p.start(t, func(c *solstice.Config) { c.Retries = map[solstice.Class]int{} })
	frozen := warmReady(t, p, 2)[0]
	freeze := func() {
		if err := syscall.Kill(agentPID(t, p, frozen), syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	freeze()
	r := finish(t, eng, p.submit(t, eng, echo).ID)
	as := attemptsOf(t, eng, r)
	if r.State != solstice.RunSucceeded {
		t.Errorf("run is %s: %+v", r.State, as)
	}
	for i, a := range as {
		switch {
		case i == len(as)-1:
			if a.MachineID == frozen {
				t.Error("the frozen machine is said to have done the job")
			}
		case a.Class != solstice.ClassNoAnswer || a.MachineID != frozen:
			t.Errorf("attempt %d: %+v", a.Number, a)
		}
	}
	if len(as) < 2 {
		t.Log("it was known to be silent before the job came")
	}
	frozen = warmReady(t, p, 2, frozen)[0]
	freeze()
	ids := warmReady(t, p, 2, frozen)
	if err := syscall.Kill(agentPID(t, p, ids[0]), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	warmReady(t, p, 2, frozen, ids[0])
	stop()
	p.destroyAll(t)
}

// counted counts the machines that are made.
type counted struct {
	vmprovider.Provider
	made atomic.Int64
	away atomic.Bool
}

func (c *counted) Create(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
	c.made.Add(1)
	if c.away.Load() {
		return vmprovider.Instance{}, fmt.Errorf("test: %w", vmprovider.ErrUnavailable)
	}
	return c.Provider.Create(ctx, s)
}

func (c *counted) As(target any) bool {
	switch target := target.(type) {
	case *vmprovider.Watcher:
		w, ok := vmprovider.As[vmprovider.Watcher](c.Provider)
		*target = w
		return ok
	case *vmprovider.Consoler:
		w, ok := vmprovider.As[vmprovider.Consoler](c.Provider)
		*target = w
		return ok
	}
	return false
}

// TestWarmBootsFail has a provider that is not there, and then machines that stop
// while they boot: fewer and fewer are made, the pool says why, and once they boot
// again all is well.
func TestWarmBootsFail(t *testing.T) { onBoth(t, testWarmBootsFail) }

func testWarmBootsFail(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	p.Warm = 2
	agentScript := filepath.Join(p.Dir, "agent")
	write := func(script string) {
		if err := os.WriteFile(agentScript+".new", []byte("#!/bin/sh\n"+script), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(agentScript+".new", agentScript); err != nil {
			t.Fatal(err)
		}
	}
	write("echo no kernel for you\nexit 1\n")
	var provider *counted
	eng, stop := p.start(t, func(c *solstice.Config) {
		prov, err := processvm.New(processvm.Config{Root: p.machinesDir(), Command: append([]string{agentScript}, agent.Command()...)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = prov.Close() })
		provider = &counted{Provider: prov}
		provider.away.Store(true)
		c.Pools[0].Provider = provider
	})
	info := func() (i solstice.PoolInfo) {
		pools, err := eng.Pools(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, i = range pools { // none before the engine has said that it is there
		}
		return i
	}
	eventually(t, "the pool says that its provider is away", func() bool { return strings.Contains(info().Problem, "could not be created: test: ") })
	provider.away.Store(false)
	eventually(t, "the pool says that it failed, and why", func() bool {
		made, failures := provider.made.Load(), 0
		said := info().Problem
		_, err := fmt.Sscanf(said, "no machine comes to wait for a job, %d failures in a row: its machine stopped", &failures)
		if err == nil && made > int64(failures+2) { // two, and one after each failure
			t.Fatalf("%d machines were made: %s", made, said)
		}
		return failures >= 3 && strings.Contains(said, "its console ends: no kernel for you")
	})
	write("exec \"$@\"\n")
	warmReady(t, p, 2)
	if i := info(); i.Problem != "" || i.Ready != 2 || i.Booting != 0 {
		t.Errorf("pool: %+v", i)
	}
	stop()
	p.destroyAll(t)
}

// TestWarmGivesWay: a job of another pool at a full host gets the place of a
// machine that waits for one, which is made again afterwards.
func TestWarmGivesWay(t *testing.T) { onBoth(t, testWarmGivesWay) }

func testWarmGivesWay(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	p.Warm = 2
	eng, stop := p.start(t, func(c *solstice.Config) {
		c.Pools[0].HostCapacity = 2
		other := c.Pools[0]
		other.Labels, other.Warm = []string{"other"}, 0
		c.Pools = append(c.Pools, other)
	})
	ids := warmReady(t, p, 2)
	gate, begun := filepath.Join(p.Dir, "gate"), filepath.Join(p.Dir, "begun")
	r := p.submit(t, eng, `
jobs:
  a: { runs-on: other, checkout: false, steps: [ { run: 'touch `+begun+`; while [ ! -e `+gate+` ]; do sleep 0.05; done' } ] }
`)
	eventually(t, "the job runs", func() bool { _, err := os.Stat(begun); return err == nil })
	if left := warmReady(t, p, 1); !slices.Contains(ids, left[0]) {
		t.Errorf("%s is left of %v", left[0], ids)
	}
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if r = finish(t, eng, r.ID); r.State != solstice.RunSucceeded || r.Jobs[0].Attempts != 1 {
		t.Errorf("run is %s after %d attempts", r.State, r.Jobs[0].Attempts)
	}
	warmReady(t, p, 2)
	stop()
	p.destroyAll(t)
}

// TestWarmSuccessor: two engines keep the warm machines of a pool together. One
// is killed and one stops: their successor takes the machines over, and one whose
// pool is another by now replaces them before they get a job.
func TestWarmSuccessor(t *testing.T) { onBoth(t, testWarmSuccessor) }

func testWarmSuccessor(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	p.Warm = 3
	addrs := []string{freeAddr(t), freeAddr(t)}
	p.Contacts = addrs
	at := func(i int, edit ...func(*solstice.Config)) (*solstice.Engine, func()) {
		return p.start(t, append(edit, func(c *solstice.Config) { c.AgentAddr = addrs[i] })...)
	}
	victim := p.spawn(t, addrs[0])
	_, stop := at(1)
	ids := warmReady(t, p, 3)
	if n := machineRows(t, p, ""); n != 3 {
		t.Errorf("%d machines were made", n)
	}
	if err := victim.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	stop()
	eng, stop := at(1)
	var first solstice.Attempt
	jobs := 0
	run := func() solstice.Run {
		jobs++
		return finish(t, eng, p.submit(t, eng, fmt.Sprintf("jobs: { a: { checkout: false, steps: [ { run: echo %d } ] } }\n", jobs)).ID)
	}
	eventually(t, "a job gets one of the old machines", func() bool { // agents need a moment to come
		r := run()
		first = attemptsOf(t, eng, r)[0]
		return slices.Contains(ids, first.MachineID)
	})
	ids = warmReady(t, p, 3, first.MachineID)
	stop()
	eng, stop = at(0, func(c *solstice.Config) { c.Pools[0].Image.Digest, c.Pools[0].Warm = "sha256:new", 1 })
	for range 3 {
		r := run()
		if a := attemptsOf(t, eng, r)[0]; r.State != solstice.RunSucceeded || slices.Contains(ids, a.MachineID) {
			t.Errorf("run is %s, on %s, old machines are %v", r.State, a.MachineID, ids)
		}
	}
	ids = warmReady(t, p, 1, ids...)
	eventually(t, "the old machines are gone", func() bool { return machineRows(t, p, "gone") == machineRows(t, p, "")-len(ids) })
	stop()
	p.destroyAll(t)
}

// TestWarmMaxAge replaces what waited for too long, one after the other, and lets
// go what an engine before kept beyond its count.
func TestWarmMaxAge(t *testing.T) { onBoth(t, testWarmMaxAge) }

func testWarmMaxAge(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	p.Warm = 2
	addr := freeAddr(t)
	p.Contacts = []string{addr}
	at := func(c *solstice.Config) { c.AgentAddr = addr }
	_, stop := p.start(t, at)
	ids := warmReady(t, p, 2)
	stop()
	_, stop = p.start(t, at, func(c *solstice.Config) { c.Pools[0].Warm = 1 })
	left := warmReady(t, p, 1)
	if left[0] != ids[1] {
		t.Errorf("%s is left of %v, not the youngest", left[0], ids)
	}
	stop()
	_, stop = p.start(t, at, func(c *solstice.Config) { c.Pools[0].WarmMaxAge = time.Second })
	eventually(t, "the old one is replaced", func() bool { return !slices.Contains(readyMachines(t, p), left[0]) })
	warmReady(t, p, 2, left[0])
	stop()
	p.destroyAll(t)
}

// TestHostBoots: pools of two engines at one host boot one machine at a time, and
// jobs that wait for that say so. A machine for a job comes before one that is to
// wait for a job.
func TestHostBoots(t *testing.T) { onBoth(t, testHostBoots) }

func testHostBoots(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	patient(p)
	boots := make(chan vmprovider.Bootstrap, 8)
	vms := memvm.New(memvm.Config{Script: func(s vmprovider.Spec) memvm.Script { boots <- s.Bootstrap; return memvm.Script{} }})
	t.Cleanup(func() { _ = vms.Close() })
	first, _ := p.start(t, func(c *solstice.Config) { c.Pools[0].Provider, c.Pools[0].HostBoots = vms, 1 })
	_, _ = p.start(t, func(c *solstice.Config) {
		c.Pools[0].Provider, c.Pools[0].HostBoots, c.Pools[0].Warm, c.Pools[0].Labels = vms, 1, 1, []string{"other"}
	})
	up := func(b vmprovider.Bootstrap) {
		t.Helper()
		g := newGuest(t, b)
		reply, err := g.enroll(b.Token, 1)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := g.attach(reply.GetSessionCredential(), &agentv1.Hello{}); err != nil {
			t.Fatal(err)
		}
	}
	up(<-boots) // the warm one; from here on only jobs
	one := p.submit(t, first, "jobs: { a: { steps: [ { run: 'true' } ] } }\n")
	two := p.submit(t, first, "jobs: { a: { steps: [ { run: 'false' } ] } }\n")
	b := <-boots
	waits(t, first, one.Jobs[0].ID, solstice.WaitBoot)
	if w := waits(t, first, two.Jobs[0].ID, solstice.WaitBoots); w.Message != "it is next: test boots 1 machine, as many as it may at once" {
		t.Error(w.Message)
	}
	if n := machineRows(t, p, "provisioning"); n != 1 {
		t.Errorf("%d machines boot", n)
	}
	up(b)
	up(<-boots)
	for _, r := range []solstice.Run{one, two} {
		if err := first.Cancel(t.Context(), r.ID, "over"); err != nil {
			t.Fatal(err)
		}
	}
}
