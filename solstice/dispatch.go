package solstice

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice/workflow"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

// pool is a Pool at work: it claims jobs for its labels and makes machines.
type pool struct {
	Pool
	e    *Engine
	kick flag
	made string // its recipe

	silent map[string]suspect // the sweep's: machines that wait, whose agents seem dead

	sweeping atomic.Bool

	mu         sync.Mutex
	creating   map[string]context.CancelFunc // machines whose Create runs here
	destroying map[string]struct{}
	pauseUntil time.Time // after the provider refused
	pause      time.Duration
	warmAt     time.Time // not before: a job was just taken
	problem    string    // why no job is taken yet
}

// warmDelay is how long new warm machines wait for the jobs that used up the
// old ones to get going, whose start they would slow down.
const warmDelay = 200 * time.Millisecond

func newPool(e *Engine, cfg *Pool) *pool {
	return &pool{Pool: *cfg, e: e, kick: newFlag(), made: cfg.recipe(), creating: map[string]context.CancelFunc{}, destroying: map[string]struct{}{}}
}

func (e *Engine) poolNamed(name string) *pool {
	for _, p := range e.pools {
		if p.Name == name {
			return p
		}
	}
	return nil
}

// dispatchLoop claims whenever there may be work: at the start, on a wake-up,
// when a slot or a machine frees, and on a slow tick.
func (p *pool) dispatchLoop(ctx context.Context) {
	if !p.prepare(ctx) {
		return
	}
	tick := time.NewTicker(p.e.cfg.Timing.Tick)
	defer tick.Stop()
	for ctx.Err() == nil {
		wait := p.paused()
		if wait <= 0 {
			n, err := p.claim(ctx)
			if err != nil && ctx.Err() == nil {
				p.e.log.WarnContext(ctx, "claim failed", "pool", p.Name, "error", err)
				p.refused()
				continue
			}
			if n > 0 {
				continue
			}
			wait = p.e.cfg.Timing.Tick
		}
		pause := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-p.kick.c:
			if d := p.paused(); d > 0 { // a wake-up does not end a pause
				select {
				case <-ctx.Done():
				case <-pause.C:
				}
			}
		case <-tick.C:
		case <-pause.C:
		}
		pause.Stop()
	}
}

func (p *pool) paused() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Until(p.pauseUntil)
}

// refused makes the pool wait before it claims again, longer each time.
func (p *pool) refused() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pause = min(max(2*p.pause, 500*time.Millisecond), 30*time.Second)
	p.pauseUntil = time.Now().Add(p.pause)
}

func (p *pool) accepted() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pause, p.pauseUntil = 0, time.Time{}
}

func (p *pool) warmDue() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !time.Now().Before(p.warmAt)
}

// deferWarm has the next warm machines wait, once: jobs that come all the time
// do not put them off.
func (p *pool) deferWarm() {
	if p.Warm == 0 || !p.warmDue() {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.warmAt = time.Now().Add(warmDelay)
	time.AfterFunc(warmDelay, p.kick.set)
}

// claim takes what there is room for and reports how many jobs and machines it
// got.
func (p *pool) claim(ctx context.Context) (int, error) {
	e := p.e
	if why, _ := e.space.state(); why != "" {
		return 0, nil // a kick says when it is over
	}
	free := e.slotsLeft()
	warm := 0
	if p.Warm > 0 && p.warmDue() {
		idle, err := e.store.IdleMachines(ctx, p.Host, p.Name, p.made)
		if err != nil {
			return 0, err
		}
		if idle < p.Warm {
			warm = p.Warm
		}
	}
	if free <= 0 && warm <= 0 {
		return 0, nil
	}
	tokens := map[string]string{} // by machine; only its hash is stored
	request := store.ClaimRequest{
		Owner: e.id, Lease: e.cfg.Timing.Lease, Labels: p.Labels, Pool: p.Name, PoolCapacity: p.Capacity,
		Host: p.Host, HostCapacity: p.HostCapacity, HostBoots: p.HostBoots,
		Max: max(free, 0), Ready: e.readyMachines(p.Name), Warm: warm, Recipe: p.made, Others: p.others(), Boot: p.Boot,
		NewMachine: func() *store.Machine {
			token := randomToken()
			m := &store.Machine{ID: "sol-" + uuid.Must(uuid.NewV7()).String(), TokenHash: hashToken(token)}
			tokens[m.ID] = token
			// Before the row can be seen: a row of ours that is neither being
			// created nor at the provider is a machine that is gone.
			p.mu.Lock()
			p.creating[m.ID] = func() {}
			p.mu.Unlock()
			return m
		},
		Expire: func(j *store.Job) time.Duration {
			if j == nil {
				return p.WarmMaxAge + p.Boot + 24*time.Hour
			}
			return decode[workflow.PlannedJob](j.Spec).Timeout + p.Boot + 2*e.cfg.Timing.AgentDeadline
		},
	}
	claimed, err := e.store.Claim(ctx, request)
	p.mu.Lock()
	for id := range tokens {
		if !slices.ContainsFunc(claimed, func(c store.Claimed) bool { return c.Machine.ID == id }) {
			delete(p.creating, id)
		}
	}
	p.mu.Unlock()
	if err != nil {
		return 0, e.noted(err)
	}
	for _, c := range claimed {
		if c.Attempt != nil {
			p.deferWarm()
			e.takeSlot(c.Attempt.ID)
			e.hub.notify(c.Job.ID)
			e.hub.notify(c.Job.RunID)
			e.log.InfoContext(ctx, "job claimed", "run_id", c.Job.RunID, "job_id", c.Job.ID, "attempt", c.Attempt.Number,
				"pool", p.Name, "machine", c.Machine.ID, "fresh", c.Fresh)
		}
		switch {
		case c.Fresh:
			p.mu.Lock()
			create, cancel := context.WithTimeout(context.WithoutCancel(ctx), p.Boot)
			p.creating[c.Machine.ID] = cancel
			p.mu.Unlock()
			e.background(func() { p.create(create, c, tokens[c.Machine.ID]) })
		default:
			e.assignReady(c)
			e.expectAnswer(ctx, c)
		}
	}
	jobs := len(slices.DeleteFunc(slices.Clone(claimed), func(c store.Claimed) bool { return c.Attempt == nil }))
	if err := p.makeRoom(ctx, request, free-jobs); err != nil {
		e.log.WarnContext(ctx, "no room made for jobs", "pool", p.Name, "error", e.noted(err))
	}
	return len(claimed), nil
}

// create makes a machine whose row exists. It returns once the machine runs;
// the agent is waited for by nobody: it attaches, or the boot deadline passes.
func (p *pool) create(ctx context.Context, c store.Claimed, token string) {
	e, m := p.e, c.Machine
	if c.Run != nil {
		ctx = withTraceParent(ctx, c.Run.Trace)
	}
	ctx, span := e.tracer.Start(ctx, "machine.create")
	defer span.End()
	_, err := p.Provider.Create(ctx, vmprovider.Spec{
		ID: m.ID, Owner: e.store.Installation(), Image: p.Image, CPUs: p.CPUs, MemoryBytes: p.MemoryBytes, DiskBytes: p.DiskBytes,
		Labels: map[string]string{"pool": p.Name}, ExpiresAt: timeOf(m.ExpiresAt),
		Bootstrap: vmprovider.Bootstrap{
			Contacts: e.contactsFor(p.Name), CA: e.ca, Token: token, RunnerURL: p.RunnerURL, AgentSHA256: p.AgentSHA256,
			Hostname: m.ID, InstanceID: m.ID,
		},
	})
	// Until what became of it is recorded: a row without a machine that nobody
	// creates is taken for a machine that is gone.
	defer func() {
		p.mu.Lock()
		cancel := p.creating[m.ID]
		delete(p.creating, m.ID)
		p.mu.Unlock()
		if cancel != nil {
			cancel()
		}
	}()
	if err == nil {
		p.accepted()
		return
	}
	span.RecordError(err)
	class := ClassInfra
	if errors.Is(err, vmprovider.ErrCapacity) {
		class = ClassCapacity
	}
	e.log.WarnContext(ctx, "machine not created", "machine", m.ID, "pool", p.Name, "class", class, "error", err)
	after := context.WithoutCancel(ctx)
	if c.Attempt != nil {
		p.refused()
		e.lose(after, c.Attempt, class, "the machine could not be created: "+err.Error(), "")
		return
	}
	e.warmFailed(after, m, "it could not be created: "+err.Error())
}

func randomToken() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails, see crypto/rand
	return base64.RawURLEncoding.EncodeToString(b)
}

// hashToken is what the store keeps of a token: hex SHA-256.
func hashToken(s string) string {
	h := sha256.Sum256([]byte(s))
	return hex.EncodeToString(h[:])
}

// wake has the pools for these labels claim, here at once and in every other
// engine by way of the queue.
func (e *Engine) wake(labels []string) {
	e.wakeLocal(labels)
	e.wakes.send(labels)
}

func (e *Engine) wakeLocal(labels []string) {
	for _, p := range e.pools {
		if slices.ContainsFunc(labels, func(l string) bool { return slices.Contains(p.Labels, l) }) {
			p.kick.set()
		}
	}
}
