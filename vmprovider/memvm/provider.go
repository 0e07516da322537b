package memvm

import (
	"context"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// Provider is a vmprovider.Provider, Consoler and Watcher on a Hypervisor.
type Provider struct {
	h      *Hypervisor
	closed chan struct{}
	once   sync.Once
}

var (
	_ vmprovider.Provider = (*Provider)(nil)
	_ vmprovider.Consoler = (*Provider)(nil)
	_ vmprovider.Watcher  = (*Provider)(nil)
)

// New opens a provider on a hypervisor of its own.
func New(cfg Config) *Provider { return NewHypervisor(cfg).Open() }

// Open gives another provider on the hypervisor.
func (h *Hypervisor) Open() *Provider { return &Provider{h: h, closed: make(chan struct{})} }

// Hypervisor is what the provider was opened on.
func (p *Provider) Hypervisor() *Hypervisor { return p.h }

// begin is the start of every call.
func (p *Provider) begin(ctx context.Context, c Call, id string) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("memvm: %s %q: %w", c, id, err)
	}
	if p.isClosed() {
		return fmt.Errorf("memvm: %s %q: %w", c, id, vmprovider.ErrClosed)
	}
	if c != CallList && c != CallWatch {
		if err := vmprovider.ValidateID(id); err != nil {
			return fmt.Errorf("memvm: %s: %w", c, err)
		}
	}
	if p.h.cfg.Fault != nil {
		if err := p.h.cfg.Fault(ctx, c, id); err != nil {
			return fmt.Errorf("memvm: %s %q: %w", c, id, err)
		}
	}
	return nil
}

func (p *Provider) isClosed() bool {
	select {
	case <-p.closed:
		return true
	default:
		return false
	}
}

// Create makes a machine that lives as its Script says.
func (p *Provider) Create(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
	if err := p.begin(ctx, CallCreate, s.ID); err != nil {
		return vmprovider.Instance{}, err
	}
	if s.CPUs < 0 || s.MemoryBytes < 0 || s.DiskBytes < 0 {
		return vmprovider.Instance{}, fmt.Errorf("memvm: create %q: %w: negative size", s.ID, vmprovider.ErrInvalid)
	}
	m := p.h.newMachine(s)
	if err := p.h.admit(m); err != nil {
		return vmprovider.Instance{}, fmt.Errorf("memvm: create %q: %w", s.ID, err)
	}
	defer close(m.created)
	err := p.await(ctx, m)
	keep := true // what an interruption leaves is for Destroy
	if err == nil && m.script.CreateError != nil {
		err, keep = m.script.CreateError, m.script.LeaveParts
	}
	p.h.mu.Lock()
	defer p.h.mu.Unlock()
	if err == nil {
		select {
		case <-m.destroyed:
			err = errDestroyed
		default:
			p.h.set(m, vmprovider.StateRunning, "")
			go p.h.live(m)
			return m.inst, nil
		}
	}
	m.cancel(nil)
	m.console.end()
	close(m.off)
	if keep {
		p.h.set(m, vmprovider.StateLeftover, err.Error())
	} else {
		p.h.remove(m)
	}
	return vmprovider.Instance{}, fmt.Errorf("memvm: create %q: %w", s.ID, err)
}

var errDestroyed = fmt.Errorf("%w: destroyed meanwhile", vmprovider.ErrNotFound)

func (h *Hypervisor) admit(m *machine) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.machines[m.spec.ID] != nil {
		return vmprovider.ErrExists
	}
	if h.cfg.Max > 0 && len(h.machines) >= h.cfg.Max {
		return fmt.Errorf("%w: %d machines", vmprovider.ErrCapacity, len(h.machines))
	}
	h.machines[m.spec.ID] = m
	h.notifier.Publish(m.inst)
	return nil
}

// await passes the time that creation takes.
func (p *Provider) await(ctx context.Context, m *machine) error {
	if m.script.CreateDelay <= 0 {
		return nil
	}
	t := time.NewTimer(m.script.CreateDelay)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-p.closed:
		return vmprovider.ErrClosed
	case <-m.destroyed:
		return errDestroyed
	}
}

// Get gives the machine as it is.
func (p *Provider) Get(ctx context.Context, id string) (vmprovider.Instance, error) {
	if err := p.begin(ctx, CallGet, id); err != nil {
		return vmprovider.Instance{}, err
	}
	m, inst := p.h.find(id)
	if m == nil {
		return inst, fmt.Errorf("memvm: get %q: %w", id, vmprovider.ErrNotFound)
	}
	return inst, nil
}

func (h *Hypervisor) find(id string) (*machine, vmprovider.Instance) {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := h.machines[id]
	if m == nil {
		return nil, vmprovider.Instance{}
	}
	return m, m.inst
}

// List yields the machines ordered by ID.
func (p *Provider) List(ctx context.Context, o vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error] {
	return func(yield func(vmprovider.Instance, error) bool) {
		if err := p.begin(ctx, CallList, ""); err != nil {
			yield(vmprovider.Instance{}, err)
			return
		}
		p.h.mu.Lock()
		var all []vmprovider.Instance
		for _, m := range p.h.machines {
			if o.Owner == "" || m.inst.Owner == o.Owner {
				all = append(all, m.inst)
			}
		}
		p.h.mu.Unlock()
		slices.SortFunc(all, func(a, b vmprovider.Instance) int { return strings.Compare(a.ID, b.ID) })
		for _, inst := range all {
			if err := ctx.Err(); err != nil {
				yield(vmprovider.Instance{}, err)
				return
			}
			if !yield(inst, nil) {
				return
			}
		}
	}
}

// Destroy ends and removes the machine, unless Script.Stuck keeps it.
func (p *Provider) Destroy(ctx context.Context, id string, _ vmprovider.DestroyOptions) error {
	if err := p.begin(ctx, CallDestroy, id); err != nil {
		return err
	}
	m, _ := p.h.find(id)
	if m == nil {
		return nil
	}
	m.destroy.Do(func() { close(m.destroyed) })
	for _, over := range []<-chan struct{}{m.created, m.off} {
		p.h.mu.Lock()
		p.h.stopLocked(m, "destroyed")
		p.h.mu.Unlock()
		select {
		case <-over:
		case <-ctx.Done():
			return fmt.Errorf("memvm: destroy %q: %w", id, ctx.Err())
		}
	}
	p.h.mu.Lock()
	defer p.h.mu.Unlock()
	if p.h.machines[id] != m {
		return nil // another Destroy was faster
	}
	if m.script.Stuck > 0 {
		m.script.Stuck--
		p.h.set(m, vmprovider.StateLeftover, ErrStuck.Error())
		return fmt.Errorf("memvm: destroy %q: %w", id, ErrStuck)
	}
	p.h.remove(m)
	return nil
}

// Capabilities implements vmprovider.Provider: machines outlive the provider, and reach nothing.
func (p *Provider) Capabilities() vmprovider.Capabilities {
	return vmprovider.Capabilities{Isolated: true, Adopts: true}
}

// Close interrupts what this provider is doing; the machines stay.
func (p *Provider) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

// Console reads what the machine printed.
func (p *Provider) Console(ctx context.Context, id string, follow bool) (io.ReadCloser, error) {
	if err := p.begin(ctx, CallConsole, id); err != nil {
		return nil, err
	}
	m, _ := p.h.find(id)
	if m == nil {
		return nil, fmt.Errorf("memvm: console of %q: %w", id, vmprovider.ErrNotFound)
	}
	return m.console.reader(ctx, follow), nil
}

// Watch follows all machines of the hypervisor.
func (p *Provider) Watch(ctx context.Context) iter.Seq2[vmprovider.Instance, error] {
	return func(yield func(vmprovider.Instance, error) bool) {
		if err := p.begin(ctx, CallWatch, ""); err != nil {
			yield(vmprovider.Instance{}, err)
			return
		}
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		go func() {
			select {
			case <-p.closed:
				cancel(fmt.Errorf("memvm: watch: %w", vmprovider.ErrClosed))
			case <-ctx.Done():
			}
		}()
		for inst, err := range p.h.notifier.Watch(ctx, p.List) {
			if err != nil && context.Cause(ctx) != nil {
				err = context.Cause(ctx)
			}
			if !yield(inst, err) {
				return
			}
		}
	}
}
