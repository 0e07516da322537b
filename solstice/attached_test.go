package solstice_test

import (
	"context"
	"io"
	"iter"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/memvm"
)

// slowConsole is a provider of machines to which something happens while their
// consoles are read.
type slowConsole struct {
	vmprovider.Provider
	meanwhile func()
	read      atomic.Bool // a console was
	listed    atomic.Bool // after that, the machines were
}

func (s *slowConsole) As(target any) bool {
	c, ok := target.(*vmprovider.Consoler)
	if ok {
		*c = s
	}
	return ok
}

func (s *slowConsole) Console(context.Context, string, bool) (io.ReadCloser, error) {
	s.meanwhile()
	s.read.Store(true)
	return nil, vmprovider.ErrNotFound
}

func (s *slowConsole) List(ctx context.Context, o vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error] {
	if s.read.Load() {
		s.listed.Store(true)
	}
	return s.Provider.List(ctx, o)
}

// TestAttachedMeanwhile: a machine that was found late is not given up when its
// agent has attached by then.
func TestAttachedMeanwhile(t *testing.T) { onBoth(t, testAttachedMeanwhile) }

func testAttachedMeanwhile(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	p.Timing.Boot = 5 * time.Second
	boots := make(chan vmprovider.Bootstrap, 8)
	vms := memvm.New(memvm.Config{Script: func(s vmprovider.Spec) memvm.Script { boots <- s.Bootstrap; return memvm.Script{} }})
	t.Cleanup(func() { _ = vms.Close() })
	attach, attached := make(chan struct{}), make(chan struct{})
	prov := &slowConsole{Provider: vms, meanwhile: sync.OnceFunc(func() {
		close(attach)
		select {
		case <-attached:
		case <-t.Context().Done():
		}
	})}
	eng, _ := p.start(t, func(c *solstice.Config) { c.Pools[0].Provider = prov })
	r := p.submit(t, eng, "jobs: { a: { steps: [ { run: 'true' } ] } }\n")
	g := newGuest(t, <-boots)
	reply, err := g.enroll(g.boot.Token, 1)
	if err != nil {
		t.Fatal(err)
	}
	<-attach
	_, _, err = g.attach(reply.GetSessionCredential(), &agentv1.Hello{})
	close(attached)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the sweep that found the machine late goes on", prov.listed.Load)
	as, err := eng.Attempts(t.Context(), r.Jobs[0].ID)
	if err != nil || len(as) != 1 || as[0].State.Terminal() {
		t.Errorf("attempts %+v, %v", as, err)
	}
	if err := eng.Cancel(t.Context(), r.ID, "over"); err != nil {
		t.Fatal(err)
	}
	finish(t, eng, r.ID)
}

// halfMade is a provider whose machines look as if their creator had died over
// them.
type halfMade struct {
	vmprovider.Provider
	lists atomic.Int32
}

func (*halfMade) As(any) bool { return false }

func (h *halfMade) List(ctx context.Context, o vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error] {
	h.lists.Add(1)
	return func(yield func(vmprovider.Instance, error) bool) {
		for inst, err := range h.Provider.List(ctx, o) {
			inst.State = vmprovider.StateLeftover
			if !yield(inst, err) {
				return
			}
		}
	}
}

// TestHalfMadeMachineWorks: a machine whose creator was killed before it could
// note that it is complete runs its job, also while no engine has its agent.
func TestHalfMadeMachineWorks(t *testing.T) { onBoth(t, testHalfMadeMachineWorks) }

func testHalfMadeMachineWorks(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	boots := make(chan vmprovider.Bootstrap, 8)
	vms := memvm.New(memvm.Config{Script: func(s vmprovider.Spec) memvm.Script { boots <- s.Bootstrap; return memvm.Script{} }})
	t.Cleanup(func() { _ = vms.Close() })
	eng, stop := p.start(t, func(c *solstice.Config) { c.Pools[0].Provider = vms })
	r := p.submit(t, eng, "jobs: { a: { steps: [ { run: 'true' } ] } }\n")
	g := newGuest(t, <-boots)
	reply, err := g.enroll(g.boot.Token, 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := g.attach(reply.GetSessionCredential(), &agentv1.Hello{}); err != nil {
		t.Fatal(err)
	}
	stop()
	next := &halfMade{Provider: vms}
	eng, _ = p.start(t, func(c *solstice.Config) { c.Pools[0].Provider = next })
	eventually(t, "the next engine's sweeps", func() bool { return next.lists.Load() >= 3 })
	as, err := eng.Attempts(t.Context(), r.Jobs[0].ID)
	if err != nil || len(as) != 1 || as[0].State.Terminal() {
		t.Errorf("attempts %+v, %v", as, err)
	}
	if err := eng.Cancel(t.Context(), r.ID, "over"); err != nil {
		t.Fatal(err)
	}
}
