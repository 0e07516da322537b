// Package memvm is a synthetic hypervisor in memory, for tests and simulations:
// its machines boot, hang, crash and leak as a script says, and run a function
// instead of an agent.
//
// A Hypervisor outlives the providers that are opened on it, as a real one
// does: closing a provider and opening another one plays the restart of an
// orchestrator, and two providers play two orchestrators on one host. All
// waiting is done with Go's timers and channels, so that it works, and takes no
// time, in a testing/synctest bubble.
package memvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// ErrStuck is what Destroy wraps while Script.Stuck holds the machine.
var ErrStuck = errors.New("memvm: machine cannot be removed yet")

// Call names a method of a provider; Config.Fault is asked before each.
type Call string

// Calls.
const (
	CallCreate  Call = "create"
	CallGet     Call = "get"
	CallList    Call = "list"
	CallDestroy Call = "destroy"
	CallConsole Call = "console"
	CallWatch   Call = "watch"
)

// Config says how a Hypervisor behaves. The zero value gives machines that boot
// at once, do nothing and run until they are destroyed.
type Config struct {
	// Host is what Instance.Host says; empty: "memory".
	Host string
	// Max is how many machines fit, in whatever state; 0: any number.
	Max int
	// Script says what becomes of a machine; nil: the zero Script for all.
	Script func(vmprovider.Spec) Script
	// Fault, when it gives an error, makes the call fail with it before it had
	// any effect; nil: none does. The ID is empty where the call has none. It
	// may block, and is called from many goroutines.
	Fault func(ctx context.Context, c Call, id string) error
}

// Machine is what the function that plays the agent gets.
type Machine struct {
	Spec    vmprovider.Spec
	Console io.Writer
}

// Script is the life of one machine. Its zero value boots at once, does nothing
// and runs until the machine is destroyed.
type Script struct {
	// CreateDelay is how long Create takes. A Create that is interrupted
	// meanwhile (by its context or Close) leaves parts.
	CreateDelay time.Duration
	// CreateError is what Create returns, after CreateDelay; the machine never
	// runs. With LeaveParts a leftover stays.
	CreateError error
	LeaveParts  bool
	// Console is printed at power-on.
	Console string
	// Boot is how long after power-on Agent starts; with Hang it never does.
	Boot time.Duration
	Hang bool
	// Agent runs instead of an agent. The machine powers off when it returns;
	// an error becomes Instance.Reason. ctx ends with the machine, and Agent has
	// to return then: Destroy waits for it.
	Agent func(ctx context.Context, m Machine) error
	// Crash is how long after power-on the machine stops by itself; 0: never.
	Crash time.Duration
	// Stuck is how often Destroy stops the machine but fails to remove it, with
	// ErrStuck, before it succeeds.
	Stuck int
}

// Hypervisor holds machines. Its methods are safe for concurrent use.
type Hypervisor struct {
	cfg      Config
	notifier vmprovider.Notifier

	mu       sync.Mutex
	machines map[string]*machine
}

type machine struct {
	inst   vmprovider.Instance
	spec   vmprovider.Spec
	script Script

	console   *console
	created   chan struct{} // closed when Create is over
	destroyed chan struct{} // closed when Destroy wants Create to end
	destroy   sync.Once
	ctx       context.Context // the machine's power
	cancel    context.CancelCauseFunc
	off       chan struct{} // closed when nothing of it runs any more
}

// NewHypervisor makes one without machines.
func NewHypervisor(cfg Config) *Hypervisor {
	if cfg.Host == "" {
		cfg.Host = "memory"
	}
	if cfg.Script == nil {
		cfg.Script = func(vmprovider.Spec) Script { return Script{} }
	}
	return &Hypervisor{cfg: cfg, machines: map[string]*machine{}}
}

// Crash cuts a running machine's power, now; reason becomes Instance.Reason.
// An error wraps vmprovider.ErrNotFound where no such machine runs.
func (h *Hypervisor) Crash(id, reason string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := h.machines[id]
	if m == nil || m.inst.State != vmprovider.StateRunning {
		return fmt.Errorf("memvm: crash machine %q: %w", id, vmprovider.ErrNotFound)
	}
	h.stopLocked(m, reason)
	return nil
}

// Leave puts a leftover there, as a provider that died half-way would.
func (h *Hypervisor) Leave(id, owner string) error {
	if err := vmprovider.ValidateID(id); err != nil {
		return err
	}
	m := h.newMachine(vmprovider.Spec{ID: id, Owner: owner})
	m.inst.State, m.inst.Reason = vmprovider.StateLeftover, "left by a test"
	m.console.end()
	m.cancel(nil)
	close(m.created)
	close(m.off)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.machines[id] != nil {
		return fmt.Errorf("memvm: leave machine %q: %w", id, vmprovider.ErrExists)
	}
	h.machines[id] = m
	h.notifier.Publish(m.inst)
	return nil
}

// Len counts the machines there are, leftovers too.
func (h *Hypervisor) Len() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.machines)
}

func (h *Hypervisor) newMachine(s vmprovider.Spec) *machine {
	ctx, cancel := context.WithCancelCause(context.Background())
	return &machine{
		inst: vmprovider.Instance{
			ID: s.ID, Owner: s.Owner, State: vmprovider.StateCreating, Host: h.cfg.Host,
			CreatedAt: time.Now().Round(0), ExpiresAt: s.ExpiresAt.Round(0),
		},
		spec: s, script: h.cfg.Script(s), console: newConsole(),
		created: make(chan struct{}), destroyed: make(chan struct{}),
		ctx: ctx, cancel: cancel, off: make(chan struct{}),
	}
}

// set changes a machine's state and tells the watchers, under h.mu.
func (h *Hypervisor) set(m *machine, s vmprovider.State, reason string) {
	m.inst.State, m.inst.Reason = s, reason
	h.notifier.Publish(m.inst)
}

func (h *Hypervisor) remove(m *machine) {
	delete(h.machines, m.inst.ID)
	gone := m.inst
	gone.State, gone.Reason = vmprovider.StateGone, ""
	h.notifier.Publish(gone)
}

// stopLocked cuts the power and says why, under h.mu. Only the first reason
// counts.
func (h *Hypervisor) stopLocked(m *machine, reason string) {
	if m.inst.State == vmprovider.StateRunning {
		m.cancel(nil)
		m.console.end()
		h.set(m, vmprovider.StateStopped, reason)
	}
}

// live is the machine from power-on to power-off.
func (h *Hypervisor) live(m *machine) {
	defer close(m.off)
	var agent sync.WaitGroup
	defer agent.Wait()
	defer m.cancel(nil)
	_, _ = io.WriteString(m.console, m.script.Console)

	after := func(d time.Duration, when bool) (<-chan time.Time, func() bool) {
		if !when {
			return nil, func() bool { return true }
		}
		t := time.NewTimer(d)
		return t.C, t.Stop
	}
	crash, stopCrash := after(m.script.Crash, m.script.Crash > 0)
	defer stopCrash()
	boot, stopBoot := after(m.script.Boot, !m.script.Hang)
	defer stopBoot()
	finished := make(chan error, 1)
	for {
		var reason string
		select {
		case <-m.ctx.Done():
			return // whoever cut the power has said why
		case <-crash:
			reason = "crashed"
		case <-boot:
			if m.script.Agent != nil {
				agent.Go(func() {
					finished <- m.script.Agent(m.ctx, Machine{Spec: m.spec, Console: m.console})
				})
			}
			continue
		case err := <-finished:
			reason = "powered off"
			if err != nil {
				reason = "agent: " + err.Error()
			}
		}
		h.mu.Lock()
		h.stopLocked(m, reason)
		h.mu.Unlock()
		return
	}
}
