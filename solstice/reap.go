package solstice

import (
	"context"
	"errors"
	"strings"
	"time"
	"unicode"

	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

// renewal is how often leases are renewed and contacts noted.
func (e *Engine) renewal() time.Duration {
	return min(e.cfg.Timing.Lease, e.cfg.Timing.AgentDeadline) / 3
}

// renewLoop keeps what this engine owns. A session whose attempt is another's
// by now is ended, so that it stops writing; the fence would refuse it anyhow.
func (e *Engine) renewLoop(ctx context.Context) {
	tick := time.NewTicker(e.renewal())
	defer tick.Stop()
	e.beat(ctx)
	e.wakes.send(nil) // the others hear of this engine
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		attempts, machines := e.inContact()
		slots := e.slotsTaken()
		still, _, err := e.store.Renew(ctx, e.id, e.cfg.Timing.Lease, attempts, machines)
		if err != nil {
			if ctx.Err() == nil {
				e.log.WarnContext(ctx, "leases not renewed", "error", e.noted(err))
			}
			continue
		}
		e.settleSlots(slots, still)
		e.mu.Lock()
		for _, s := range e.sessions {
			if ref := s.ref.Load(); ref != nil && still[ref.ID] != ref.Epoch {
				// It may be younger than the renewal: the store decides.
				go s.recheck(*ref)
			}
		}
		e.mu.Unlock()
		e.beat(ctx)
	}
}

func (s *session) recheck(ref store.AttemptRef) {
	a, err := s.e.store.Attempt(s.ctx, ref.ID)
	if err == nil && (a.Epoch != ref.Epoch || a.Owner != s.e.id) {
		s.cancel(store.ErrStale)
	}
}

// inContact lists attempts and machines whose agents were heard of lately.
func (e *Engine) inContact() (attempts, machines []string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	since := time.Now().Add(-2 * e.cfg.Timing.Heartbeat).UnixNano()
	for id, s := range e.sessions {
		if s.contact.Load() < since {
			continue
		}
		machines = append(machines, id)
		if ref := s.ref.Load(); ref != nil {
			attempts = append(attempts, ref.ID)
		}
	}
	return attempts, machines
}

// reapLoop is the slow safety net behind everything that normally happens at
// once: deadlines, machines nobody cleaned up, runs nobody moved on.
func (e *Engine) reapLoop(ctx context.Context) {
	tick := time.NewTicker(e.cfg.Timing.Tick)
	defer tick.Stop()
	r := reaper{e: e, suspects: map[string]suspect{}, looked: map[store.RunState]string{}, readAt: time.Now().Round(0)}
	for {
		if err := r.sweep(ctx); err != nil {
			if ctx.Err() != nil {
				return
			}
			e.log.WarnContext(ctx, "sweep failed", "error", e.noted(err))
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// reaper is what the sweeps of an engine remember.
type reaper struct {
	e          *Engine
	suspects   map[string]suspect        // attempts whose agents seem dead
	readAt     time.Time                 // of the last good look at the state, by the wall clock
	quietUntil time.Time                 // nothing is given up before
	trippedAt  time.Time                 // when the breaker tripped; zero: it did not
	looked     map[store.RunState]string // how far the search for stuck runs is
}

// suspect is an attempt that was overdue, and since when it is for us.
type suspect struct {
	contact int64
	since   time.Time
}

// look reads what is overdue, in a bounded time.
func (r *reaper) look(ctx context.Context) (store.Due, error) {
	t := r.e.cfg.Timing
	ctx, cancel := context.WithTimeout(ctx, t.Lease)
	defer cancel()
	return r.e.store.Overdue(ctx, t.AgentDeadline+t.DeadlineMargin)
}

// lost says which of the overdue attempts are to be given up now. They have to
// be overdue for as long as it takes every engine to renew what it has, so that
// neither a clock that jumps nor a stale reading of the state ends a job.
func (r *reaper) lost(overdue []*store.Attempt, live int) []*store.Attempt {
	e, now := r.e, time.Now()
	before := r.suspects
	r.suspects = map[string]suspect{}
	var out []*store.Attempt
	for _, a := range overdue {
		s, ok := before[a.ID]
		if !ok || s.contact != a.ContactAt {
			s = suspect{a.ContactAt, now}
		}
		r.suspects[a.ID] = s
		if now.Sub(s.since) >= 2*e.renewal() {
			out = append(out, a)
		}
	}
	tripped := e.tripped(len(overdue), live, &r.trippedAt)
	if tripped || now.Before(r.quietUntil) {
		return nil
	}
	return out
}

func (r *reaper) sweep(ctx context.Context) error {
	e, t := r.e, r.e.cfg.Timing
	due, err := r.look(ctx)
	if err != nil {
		return err
	}
	// While the state was away, or this process stood still, no agent's contact
	// could be recorded: give all of them the time to show up again.
	if away := time.Now().Round(0).Sub(r.readAt); away > t.Lease+t.Tick {
		r.quietUntil = time.Now().Add(t.AgentDeadline)
		e.log.WarnContext(ctx, "state is back: nothing is given up for one agent deadline", "away", away, "until", r.quietUntil)
	}
	r.readAt = time.Now().Round(0)
	for _, a := range r.lost(due.Lost, len(due.Live)) {
		e.lose(ctx, a, ClassAgentLost, "its agent was not heard of for "+(t.AgentDeadline+t.DeadlineMargin).String(), "")
	}
	for _, m := range due.Boot {
		e.bootFailed(ctx, m)
	}
	for _, a := range due.TimedOut {
		e.lose(ctx, a, ClassTimeout, "the job was over its timeout and its agent did not end it", "")
	}
	now, err := e.store.Now(ctx)
	if err != nil {
		return err
	}
	for _, a := range due.Live {
		if a.CancelReason == "" {
			continue
		}
		if a.CancelAt+(3*e.cfg.CancelGrace+t.DeadlineMargin).Microseconds() < now {
			e.lose(ctx, a, ClassCancelled, a.CancelReason, "")
		} else {
			e.cancelAttempt(a.MachineID, a.CancelReason) // asked by another engine, or not delivered yet
		}
	}
	for _, state := range []store.RunState{store.RunQueued, store.RunRunning} {
		stuck, next, err := e.store.StuckRuns(ctx, state, r.looked[state], 100)
		if err != nil {
			return err
		}
		r.looked[state] = next
		for _, id := range stuck {
			if err := e.withRun(ctx, id, func(context.Context, *store.RunTx) error { return nil }); err != nil {
				e.log.WarnContext(ctx, "run not moved on", "run_id", id, "error", err)
			}
		}
	}
	labels, err := e.store.ReleaseHolds(ctx, t.HoldTimeout)
	if err != nil {
		return err
	}
	if len(labels) > 0 {
		e.log.WarnContext(ctx, "retries begin though their old machines could not be destroyed in time", "labels", labels)
		e.wake(labels)
	}
	for _, p := range e.pools {
		p.sweepAside(ctx)
	}
	return nil
}

// tripped is the circuit breaker: when more than half of the agents, and at
// least five, seem dead at once, the fault is more likely ours (a network, a
// clock). Then nothing is given up for one more deadline.
func (e *Engine) tripped(lost, live int, since *time.Time) bool {
	if lost < 5 || 2*lost <= live {
		*since = time.Time{}
		return false
	}
	now := time.Now()
	if since.IsZero() {
		*since = now
	}
	if now.Sub(*since) >= e.cfg.Timing.AgentDeadline {
		return false
	}
	e.metrics.breakerTripped()
	e.log.Error("too many agents seem dead at once: nothing is given up for one more deadline", "lost", lost, "live", live, "since", *since)
	return true
}

func (e *Engine) bootFailed(ctx context.Context, m *store.Machine) {
	p := e.poolNamed(m.Pool)
	console := ""
	if p != nil && p.Host == m.Host {
		console = p.console(ctx, m.ID)
	}
	var a *store.Attempt
	var err error
	if m.AttemptID != "" {
		if a, err = e.store.Attempt(ctx, m.AttemptID); err != nil {
			e.log.WarnContext(ctx, "attempt not read", "attempt", m.AttemptID, "error", err)
			return
		}
	}
	// The agent may have attached since the machine was found late. Looked at after
	// the attempt, so that one that attaches from here on raises its epoch.
	now, err := e.store.Machine(ctx, m.ID)
	if err != nil || now.State != store.MachineProvisioning {
		return
	}
	if a == nil {
		e.warmFailed(ctx, m, "its agent did not attach in time"+lastLine(console))
		return
	}
	e.lose(ctx, a, ClassBoot, "its machine's agent did not attach in time", console)
}

// sweepTimeout bounds one look at all machines of a provider.
const sweepTimeout = 2 * time.Minute

// sweepAside sweeps unless that is going on: deadlines do not wait for a provider
// that is slow, or that never answers.
func (p *pool) sweepAside(ctx context.Context) {
	if !p.sweeping.CompareAndSwap(false, true) {
		return
	}
	p.e.background(func() {
		defer p.sweeping.Store(false)
		bounded, cancel := context.WithTimeout(ctx, sweepTimeout)
		defer cancel()
		if err := p.sweep(bounded); err != nil && ctx.Err() == nil {
			p.e.log.WarnContext(ctx, "machines not swept", "pool", p.Name, "error", err)
		}
	})
}

// sweep compares the hypervisor's machines with the rows, both ways. One engine
// at a time does it per host. It never touches what has a live owner or belongs
// to another installation.
func (p *pool) sweep(ctx context.Context) error {
	e := p.e
	mine, err := e.store.Lease(ctx, "reaper/"+p.Host+"/"+p.Name, e.id, 3*e.cfg.Timing.Tick+e.cfg.Timing.Lease)
	if err != nil || !mine {
		return err
	}
	// The rows are read first: a machine that is created in between has a row
	// that this list lacks, so machines without a row are looked up once more.
	rows, err := e.store.MachinesNotGone(ctx, p.Host)
	if err != nil {
		return err
	}
	seen := map[string]vmprovider.Instance{}
	for inst, err := range p.Provider.List(ctx, vmprovider.ListOptions{Owner: e.store.Installation()}) {
		if err != nil {
			return err // an incomplete list proves nothing
		}
		seen[inst.ID] = inst
	}
	known := map[string]bool{}
	var waiting []*store.Machine
	booting := 0
	now, err := e.store.Now(ctx)
	if err != nil {
		return err
	}
	for _, m := range rows {
		known[m.ID] = true
		if m.Pool != p.Name {
			continue
		}
		inst, there := seen[m.ID]
		live := m.LeaseUntil > now && m.Owner != ""
		p.mu.Lock()
		_, creating := p.creating[m.ID]
		p.mu.Unlock()
		switch {
		case m.State == store.MachineDestroying:
			e.background(func() { e.destroy(context.WithoutCancel(ctx), m) }) // begun, it is brought to its end
		case creating:
		case !there && m.State == store.MachineProvisioning && live && m.Owner != e.id:
			// Its owner is about to create it.
		case !there:
			// The list may be older than the machine.
			if _, err := p.Provider.Get(ctx, m.ID); errors.Is(err, vmprovider.ErrNotFound) {
				p.over(ctx, m, "its machine is gone")
			}
		case inst.State == vmprovider.StateStopped:
			p.over(ctx, m, whyStopped(inst.Reason))
		case inst.State == vmprovider.StateLeftover && !live && m.State != store.MachineBound:
			// Whoever made it died over it. One that has an agent with a job was
			// complete enough: whether that agent lives, its silence says.
			p.over(ctx, m, "its machine was not completed")
		case m.State == store.MachineReady && m.AttemptID == "":
			waiting = append(waiting, m)
		}
		if m.State == store.MachineProvisioning && m.AttemptID == "" {
			booting++
		}
	}
	p.tend(ctx, waiting, booting, now)
	for id := range seen {
		if known[id] {
			continue
		}
		m, err := e.store.Machine(ctx, id)
		if err == nil && m.State != store.MachineGone {
			continue
		}
		e.log.WarnContext(ctx, "machine without a row destroyed", "machine", id, "pool", p.Name)
		if err := p.Provider.Destroy(ctx, id, vmprovider.DestroyOptions{}); err != nil {
			e.log.WarnContext(ctx, "stray machine not destroyed yet", "machine", id, "error", err)
		}
	}
	return nil
}

// printable makes console output safe to show: valid UTF-8, no control
// characters but line breaks and tabs.
func printable(b []byte) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || !unicode.IsControl(r) {
			return r
		}
		return -1
	}, strings.ToValidUTF8(string(b), "�"))
}
