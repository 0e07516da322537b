package libvirtvm

import (
	"context"
	"fmt"
	"time"

	"libvirt.org/go/libvirtxml"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// connected gives the connection, after it has tried to make one where there is
// none.
func (p *Provider) connected(ctx context.Context) (hypervisor, error) {
	p.mu.Lock()
	h, closed := p.hyp, p.closed
	p.mu.Unlock()
	if closed {
		return nil, vmprovider.ErrClosed
	}
	if h != nil {
		select {
		case <-h.Lost():
		default:
			return h, nil
		}
	}
	unlock, err := p.dialling.Lock(ctx, "")
	if err != nil {
		return nil, err
	}
	defer unlock()
	p.mu.Lock()
	now := p.hyp
	p.mu.Unlock()
	if now != nil && now != h {
		return now, nil // somebody was faster
	}
	return call(ctx, func() (hypervisor, error) { return p.connect(h) })
}

// connect makes a connection that takes the place of a lost one.
func (p *Provider) connect(old hypervisor) (hypervisor, error) {
	h, err := p.dial(p.cfg.URI)
	if err != nil {
		return nil, err
	}
	path, err := poolPath(h, p.cfg.StoragePool)
	if err == nil && old == nil {
		p.host, err = h.Hostname() // before anybody hears of changes
	}
	if err == nil {
		err = h.Changes(p.changed)
	}
	if err != nil {
		h.Close()
		return nil, err
	}
	if err := h.RefreshPool(p.cfg.StoragePool); err != nil { // refused while somebody writes to it
		p.log.Debug("storage pool not refreshed", "pool", p.cfg.StoragePool, "error", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.hyp != old {
		h.Close()
		if p.closed {
			return nil, vmprovider.ErrClosed
		}
		return p.hyp, nil
	}
	p.hyp, p.poolPath = h, path
	if old != nil {
		old.Close()
		p.log.Info("libvirtd is back", "uri", p.cfg.URI)
	}
	return h, nil
}

// poolPath is the directory of a storage pool, on the hypervisor's host.
func poolPath(h hypervisor, pool string) (string, error) {
	text, err := h.PoolXML(pool)
	if err != nil {
		return "", fmt.Errorf("storage pool %q: %w", pool, err)
	}
	var x libvirtxml.StoragePool
	if err := x.Unmarshal(text); err != nil {
		return "", fmt.Errorf("storage pool %q: %w", pool, err)
	}
	if x.Type != "dir" || x.Target == nil || x.Target.Path == "" {
		return "", invalid("storage pool %q is of type %s: want one of type dir", pool, x.Type)
	}
	return x.Target.Path, nil
}

// reconnect keeps a connection, so that watchers hear of changes also while
// nobody calls. Those of a lost one are told: they may have missed some.
func (p *Provider) reconnect() {
	defer p.busy.Done()
	for {
		p.mu.Lock()
		h := p.hyp
		p.mu.Unlock()
		if h == nil {
			return // closed
		}
		select {
		case <-p.ctx.Done():
			return
		case <-h.Lost():
		}
		p.log.Warn("connection to libvirtd lost", "uri", p.cfg.URI)
		p.mu.Lock()
		if !p.closed {
			p.notifier.Close()
			p.notifier = &vmprovider.Notifier{}
		}
		p.mu.Unlock()
		for pause := redialFirst; ; pause = min(2*pause, redialMost) {
			if _, err := p.connected(p.ctx); err == nil || p.ctx.Err() != nil {
				break
			}
			select {
			case <-p.ctx.Done():
				return
			case <-time.After(pause):
			}
		}
	}
}
