// Package solstice is the engine of a CI system whose jobs run on throw-away
// machines.
//
// An [Engine] accepts runs ([Engine.Submit]), plans them from the workflow
// files at a commit, gives each job a machine from a pool, takes the journal of
// the agent in that machine, stores its log, and reports statuses. Any number
// of engines may share one database, queue and blob store; each claims what its
// pools have room for, and any of them accepts any agent.
//
// What holds, whatever is killed: an accepted run, job or attempt is a row; a
// job is executed at least once and has exactly one recorded result; a terminal
// state never changes; a retry begins when the machine of the lost attempt is
// destroyed. See [Config] for what an engine needs and the package's
// examples for how little that can be.
package solstice

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/reporter"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logstream/bloblog"
)

// Engine runs jobs. Make one with New, then call Run; the other methods work
// from New on and are safe for concurrent use.
type Engine struct {
	cfg     Config
	id      string // of this process, as owner of leases
	store   *store.Store
	logs    logstream.Store
	ownLogs bool
	log     *slog.Logger
	tracer  trace.Tracer
	metrics *metrics
	hub     *hub
	space   *space
	pools   []*pool

	relayKick flag
	groupKick flag
	wakes     *wakeSender
	reporter  *reporter.Reporter
	listener  net.Listener
	contacts  []string // of this engine
	fleet     atomic.Pointer[fleet]
	ca        []byte

	mu       sync.Mutex
	running  bool
	serving  bool // between the start and the end of Run
	draining bool
	sessions map[string]*session // by machine
	slots    map[string]struct{} // attempts under way that this engine claimed
	slotFree chan struct{}       // closed and replaced when one is freed

	work sync.WaitGroup // machines being created or destroyed
}

// New checks the configuration and opens what belongs to the engine, with its
// agent listener. The database must be migrated. Close releases an engine whose
// Run was not called.
func New(cfg Config) (*Engine, error) {
	if err := cfg.fill(); err != nil {
		return nil, err
	}
	e := &Engine{
		cfg: cfg, id: newID(), log: cfg.Logger, tracer: cfg.TracerProvider.Tracer("github.com/solstice-ci/solstice-go/solstice"),
		hub: newHub(), relayKick: newFlag(), groupKick: newFlag(), sessions: map[string]*session{}, slots: map[string]struct{}{}, slotFree: make(chan struct{}),
	}
	e.space = newSpace(cfg.Space, 2*e.renewal()+time.Second)
	e.lookSpace(context.Background())
	var err error
	if e.metrics, err = newMetrics(cfg.MeterProvider, e.space); err != nil {
		return nil, fmt.Errorf("solstice: metrics: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if e.store, err = store.New(ctx, cfg.DB, store.Options{Changed: e.statuses, Clock: cfg.clock}); err != nil {
		return nil, fmt.Errorf("solstice: open state: %w", err)
	}
	e.reporter = &reporter.Reporter{Store: e.store, Forges: map[string]forge.Forge{}, Owner: e.id, Lease: cfg.Timing.Lease, Tick: cfg.Timing.Tick, Logger: e.log}
	for name, f := range cfg.Forges {
		if !slices.Contains(cfg.ReportedElsewhere, name) {
			e.reporter.Forges[name] = f
		}
	}
	if e.logs = cfg.Logs; e.logs == nil {
		// The sweep takes what this database does not list for nobody's: where
		// installations share a store, each keeps to its own part.
		prefix := "logs/" + strings.ReplaceAll(e.store.Installation(), "-", "") + "/"
		if e.logs, err = bloblog.New(cfg.Blobs, e.store.LogIndex(), bloblog.Options{Prefix: prefix}); err != nil {
			return nil, fmt.Errorf("solstice: open logs: %w", err)
		}
		e.ownLogs = true
	}
	for i := range cfg.Pools {
		e.pools = append(e.pools, newPool(e, &cfg.Pools[i]))
	}
	e.wakes = newWakeSender(e)
	if err := e.listen(ctx); err != nil {
		_ = e.closeLogs()
		return nil, err
	}
	return e, nil
}

func (e *Engine) closeLogs() error {
	if !e.ownLogs {
		return nil
	}
	return e.logs.Close()
}

// Close releases an engine that is not running; Run does it by itself.
func (e *Engine) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.running {
		return errors.New("solstice: Close of a running engine: cancel the context of Run")
	}
	return errors.Join(e.listener.Close(), e.closeLogs())
}

// AgentAddr is the address of the agents' listener.
func (e *Engine) AgentAddr() string { return e.listener.Addr().String() }

// Installation is the UUID that machines of this database are tagged with.
func (e *Engine) Installation() string { return e.store.Installation() }

// Run serves until ctx is done, then drains: it claims nothing more, waits for
// jobs under way for at most Config.DrainTimeout, hands over what is left (its
// agents go on and look for another engine, or for this one's successor) and
// returns nil. An error means that the engine could not start. Call it once.
func (e *Engine) Run(ctx context.Context) error {
	e.mu.Lock()
	if e.running {
		e.mu.Unlock()
		return errors.New("solstice: Run was called before")
	}
	e.running = true
	e.mu.Unlock()

	// Loops outlive ctx by the drain.
	loops, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var wg sync.WaitGroup
	start := func(f func(context.Context)) {
		wg.Add(1)
		go func() { defer wg.Done(); f(loops) }()
	}
	stopServing, err := e.serve(loops)
	if err != nil {
		return errors.Join(err, e.closeLogs())
	}
	consumers, err := e.consumers()
	if err != nil {
		stopServing()
		return errors.Join(err, e.closeLogs())
	}
	for _, c := range consumers {
		start(c)
	}
	start(e.spaceLoop)
	start(e.renewLoop)
	start(e.reapLoop)
	start(e.collectLoop)
	start(e.groupLoop)
	start(e.relayLoop)
	start(e.reporter.Run)
	start(e.wakes.loop)
	for _, p := range e.pools {
		start(p.watchLoop)
		start(func(context.Context) { p.dispatchLoop(ctx) }) // ends with ctx: a draining engine claims nothing
	}
	e.setServing(true)
	e.log.InfoContext(ctx, "engine started", "orchestrator", e.id, "agent_addr", e.AgentAddr(), "pools", len(e.pools))

	<-ctx.Done()
	e.drain()
	e.setServing(false)
	stop()
	stopServing()
	wg.Wait()
	e.work.Wait()
	final, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	err = errors.Join(e.store.Release(final, e.id), e.store.Leave(final, e.id))
	if err != nil {
		e.log.WarnContext(ctx, "ownership not released, it expires by itself", "error", err)
	}
	if err := e.closeLogs(); err != nil {
		e.log.WarnContext(ctx, "logs not closed cleanly", "error", err)
	}
	e.log.InfoContext(ctx, "engine stopped", "orchestrator", e.id)
	return nil
}

func (e *Engine) setServing(on bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.serving = on
}

// drain waits for jobs under way, within its bound.
func (e *Engine) drain() {
	e.mu.Lock()
	e.draining = true
	left := len(e.slots)
	e.mu.Unlock()
	if left == 0 || e.cfg.DrainTimeout <= 0 {
		return
	}
	e.log.Info("draining", "jobs", left, "timeout", e.cfg.DrainTimeout)
	timeout := time.NewTimer(e.cfg.DrainTimeout)
	defer timeout.Stop()
	for {
		e.mu.Lock()
		left, free := len(e.slots), e.slotFree
		e.mu.Unlock()
		if left == 0 {
			return
		}
		select {
		case <-free:
		case <-timeout.C:
			e.log.Warn("drain timed out, jobs are handed over", "jobs", left)
			return
		}
	}
}

// slotsTaken names the attempts that have slots.
func (e *Engine) slotsTaken() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Collect(maps.Keys(e.slots))
}

// settleSlots makes the slots agree with the live attempts that this engine
// owns: agents come from other engines and leave for them. before are the slots
// as they were when owned was looked up; younger ones are left alone.
func (e *Engine) settleSlots(before []string, owned map[string]int64) {
	for _, id := range before {
		if _, mine := owned[id]; !mine {
			e.freeSlot(id)
		}
	}
	for id := range owned {
		e.takeSlot(id) // if it is over by now, until the next time
	}
}

// takeSlot and freeSlot count the jobs under way against MaxConcurrency.
func (e *Engine) takeSlot(attempt string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.slots[attempt] = struct{}{}
}

func (e *Engine) freeSlot(attempt string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if _, ok := e.slots[attempt]; !ok {
		return
	}
	delete(e.slots, attempt)
	close(e.slotFree)
	e.slotFree = make(chan struct{})
	for _, p := range e.pools {
		p.kick.set()
	}
}

func (e *Engine) slotsLeft() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.cfg.MaxConcurrency - len(e.slots)
}

// background runs f beside the loops; Run waits for it before it returns.
func (e *Engine) background(f func()) {
	e.work.Add(1)
	go func() { defer e.work.Done(); f() }()
}
