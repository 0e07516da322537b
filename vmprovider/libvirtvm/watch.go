package libvirtvm

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

func (p *Provider) publish(inst vmprovider.Instance) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.notifier.Publish(inst)
}

// changed is told by libvirt that a domain's state changed.
func (p *Provider) changed(name string) {
	if vmprovider.ValidateID(name) != nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.busy.Add(1)
	go func() {
		defer p.busy.Done()
		h, err := p.connected(p.ctx)
		if err != nil {
			return
		}
		unlock, err := p.locks.Lock(p.ctx, name) // so that news stay in order
		if err != nil {
			return
		}
		defer unlock()
		d, err := call(p.ctx, func() (domain, error) { return h.Domain(name) })
		if err == nil {
			if _, err := read(d.XML); errors.Is(err, errForeign) {
				return
			}
		}
		inst, err := p.get(p.ctx, h, name)
		switch {
		case errors.Is(err, vmprovider.ErrNotFound):
			p.publish(vmprovider.Instance{ID: name, Host: p.host, State: vmprovider.StateGone})
		case err != nil:
			p.log.Debug("changed machine not read", "machine", name, "error", err)
		default:
			p.publish(inst)
		}
	}()
}

// Watch tells of every change that libvirt tells of; see vmprovider.Watcher.
// When the connection to libvirtd is lost it ends with an error that wraps
// vmprovider.ErrUnavailable.
func (p *Provider) Watch(ctx context.Context) iter.Seq2[vmprovider.Instance, error] {
	return func(yield func(vmprovider.Instance, error) bool) {
		p.mu.Lock()
		n := p.notifier
		p.mu.Unlock()
		for inst, err := range n.Watch(ctx, p.List) {
			if errors.Is(err, vmprovider.ErrClosed) {
				p.mu.Lock()
				closed := p.closed
				p.mu.Unlock()
				if !closed {
					err = fmt.Errorf("libvirtvm: watch: %w: %w", vmprovider.ErrUnavailable, errLost)
				}
			}
			if !yield(inst, err) {
				return
			}
		}
	}
}
