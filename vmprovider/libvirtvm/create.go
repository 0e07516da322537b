package libvirtvm

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/seed"
)

// creation is a Create that is going on.
type creation struct {
	meta      metadata
	place     place // with isolation, once it has one
	interrupt context.CancelCauseFunc
}

var errDestroyed = fmt.Errorf("%w: destroyed meanwhile", vmprovider.ErrNotFound)

// Create defines the domain, which takes the name, makes the volumes and starts
// it. If it fails it undoes what it did; only where that fails too does a
// leftover stay.
func (p *Provider) Create(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
	h, end, err := p.begin(ctx, "create", s.ID)
	if err != nil {
		return vmprovider.Instance{}, err
	}
	defer end()
	inst, err := p.create(ctx, h, s)
	if err != nil {
		return vmprovider.Instance{}, fmt.Errorf("libvirtvm: create %q: %w", s.ID, unavailable(err))
	}
	return inst, nil
}

func (p *Provider) create(ctx context.Context, h hypervisor, s vmprovider.Spec) (vmprovider.Instance, error) {
	b, seedDisk, err := p.plan(s)
	if err != nil {
		return vmprovider.Instance{}, err
	}
	ctx, interrupt := context.WithCancelCause(ctx)
	defer interrupt(nil)
	defer context.AfterFunc(p.ctx, func() { interrupt(vmprovider.ErrClosed) })()
	c := &creation{meta: b.meta, interrupt: interrupt}
	if err := p.admit(ctx, h, c); err != nil {
		return vmprovider.Instance{}, err
	}
	defer p.dismiss(s.ID)
	unlock, err := p.locks.Lock(ctx, s.ID)
	if err != nil {
		return vmprovider.Instance{}, context.Cause(ctx)
	}
	defer unlock()
	if p.cfg.Isolation != nil {
		if b.place, err = p.seat(ctx, h, c); err != nil {
			return vmprovider.Instance{}, err
		}
	}
	defined, err := p.build(ctx, h, b, seedDisk)
	if err == nil {
		p.dismiss(s.ID)
		inst := p.instance(b.meta, vmprovider.StateRunning, "")
		p.publish(inst)
		return inst, nil
	}
	if defined {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		h, undoErr := p.connected(undo) // the connection may be what failed
		if undoErr == nil {
			undoErr = p.destroy(undo, h, s.ID)
		}
		if undoErr != nil {
			err = fmt.Errorf("%w; undo: %w", err, undoErr)
		}
	}
	return vmprovider.Instance{}, err
}

// plan checks what is asked for.
func (p *Provider) plan(s vmprovider.Spec) (blueprint, []byte, error) {
	b := blueprint{spec: s}
	if s.CPUs < 0 || s.MemoryBytes < 0 || s.DiskBytes < 0 {
		return b, nil, invalid("negative size")
	}
	if len(volume(s.ID, s.Owner, consoleVolume)) > 200 {
		return b, nil, invalid("owner %q is too long to be in a file's name", s.Owner)
	}
	if err := p.cfg.checkImage(s); err != nil {
		return b, nil, err
	}
	disk, err := seed.Build(s.Bootstrap, seed.Options{Format: p.cfg.SeedFormat})
	if err != nil {
		return b, nil, err
	}
	b.meta = metadata{
		ID: s.ID, Owner: s.Owner, Created: time.Now().UTC().Round(0), Expires: s.ExpiresAt.UTC().Round(0),
	}
	for _, name := range slices.Sorted(maps.Keys(s.Labels)) {
		b.meta.Labels = append(b.meta.Labels, label{name, s.Labels[name]})
	}
	p.mu.Lock()
	b.poolPath = p.poolPath
	p.mu.Unlock()
	return b, disk, nil
}

// admit takes the name in this process, and a place among Max.
func (p *Provider) admit(ctx context.Context, h hypervisor, c *creation) error {
	var there []vmprovider.Instance
	if p.cfg.Max > 0 {
		unlock, err := p.locks.Lock(ctx, "") // one counts at a time
		if err != nil {
			return context.Cause(ctx)
		}
		defer unlock()
		if there, err = p.list(ctx, h); err != nil {
			return err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.creating[c.meta.ID] != nil {
		return vmprovider.ErrExists
	}
	if p.cfg.Max > 0 && len(there) >= p.cfg.Max {
		if slices.ContainsFunc(there, func(i vmprovider.Instance) bool { return i.ID == c.meta.ID }) {
			return vmprovider.ErrExists
		}
		return fmt.Errorf("%w: there are %d machines", vmprovider.ErrCapacity, len(there))
	}
	p.creating[c.meta.ID] = c
	return nil
}

func (p *Provider) dismiss(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.creating, id)
}

// build makes the parts. defined: it made one, so that there is something to
// undo.
func (p *Provider) build(ctx context.Context, h hypervisor, b blueprint, seedDisk []byte) (defined bool, err error) {
	domainXML, err := p.cfg.domain(b)
	if err != nil {
		return false, err
	}
	overlay, err := b.overlayVolume()
	if err != nil {
		return false, err
	}
	seedXML, err := b.rawVolume(seedVolume, len(seedDisk))
	if err != nil {
		return false, err
	}
	consoleXML, err := b.rawVolume(consoleVolume, 0)
	if err != nil {
		return false, err
	}
	meta := b.meta
	meta.Started = true
	started, err := xml.Marshal(meta)
	if err != nil {
		return false, err
	}
	id, pool := b.spec.ID, p.cfg.StoragePool
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"define", func() error { return h.DefineDomain(domainXML) }},
		{"overlay", func() error { return h.CreateVolume(pool, overlay) }},
		{"seed", func() error { return h.CreateVolume(pool, seedXML) }},
		{"upload", func() error {
			if p.cfg.synthetic() {
				return nil // its volumes have no content
			}
			// The volume is zeros: they are not sent, since what is on its way counts
			// against what libvirtd takes over a connection.
			return h.Upload(pool, b.volume(seedVolume), bytes.TrimRight(seedDisk, "\x00"))
		}},
		{"console", func() error { return h.CreateVolume(pool, consoleXML) }},
		{"network", func() error {
			if p.cfg.Isolation == nil {
				return nil
			}
			return p.isolate(ctx, h)
		}},
		{"start", func() error { return h.StartDomain(id) }},
		{"started", func() error { return h.SetMetadata(id, namespace, string(started)) }},
	} {
		p.cfg.failpoint(step.name)
		err := settle(ctx, step.do)
		if step.name == "define" {
			if errors.Is(err, errExists) {
				return false, vmprovider.ErrExists
			}
			p.publish(p.instance(b.meta, vmprovider.StateCreating, ""))
			defined = true
		}
		if err != nil {
			return defined, fmt.Errorf("%s: %w", step.name, err)
		}
	}
	p.cfg.failpoint("made")
	return defined, context.Cause(ctx)
}

// settle waits for a call that changes something, also for a while after ctx has
// ended, whose error it returns then.
func settle(ctx context.Context, f func() error) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	bounded, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(grace, cancel) })()
	err := do(bounded, f)
	if bounded.Err() != nil && errors.Is(err, bounded.Err()) {
		return context.Cause(ctx)
	}
	return err
}
