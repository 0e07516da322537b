package libvirtvm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// Destroy stops the domain, deletes its volumes and takes back its definition.
func (p *Provider) Destroy(ctx context.Context, id string, _ vmprovider.DestroyOptions) error {
	h, end, err := p.begin(ctx, "destroy", id)
	if err != nil {
		return err
	}
	defer end()
	p.mu.Lock()
	if c := p.creating[id]; c != nil {
		c.interrupt(errDestroyed)
	}
	p.mu.Unlock()
	unlock, err := p.locks.Lock(ctx, id)
	if err == nil {
		defer unlock()
		err = p.destroy(ctx, h, id)
	}
	if err != nil {
		return fmt.Errorf("libvirtvm: destroy %q: %w", id, unavailable(err))
	}
	return nil
}

// destroy does it, under the machine's lock. The definition goes last: it holds
// the name as long as anything is left.
func (p *Provider) destroy(ctx context.Context, h hypervisor, id string) error {
	ours := true
	d, err := call(ctx, func() (domain, error) { return h.Domain(id) })
	switch {
	case errors.Is(err, errNoDomain):
		ours = false
	case err != nil:
		return err
	default:
		if _, err := read(d.XML); errors.Is(err, errForeign) {
			ours = false
		} else if err != nil {
			return err
		}
	}
	var errs []error
	if ours {
		p.cfg.failpoint("stop")
		if err := settle(ctx, func() error { return h.StopDomain(id) }); !errors.Is(err, errNotRunning) && !errors.Is(err, errNoDomain) {
			errs = append(errs, err)
		}
	}
	p.cfg.failpoint("delete")
	// virtlogd renames a console that has grown, and libvirt does not hear of it.
	errs = append(errs, unhurried(ctx, func() error { return h.RefreshPool(p.cfg.StoragePool) }))
	parts, err := p.volumes(ctx, h)
	errs = append(errs, err)
	for _, name := range parts[id].names {
		if err := unhurried(ctx, func() error { return h.DeleteVolume(p.cfg.StoragePool, name) }); !errors.Is(err, errNoVolume) {
			errs = append(errs, err)
		}
		p.cfg.failpoint("deleted")
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if ours {
		p.cfg.failpoint("undefine")
		if err := settle(ctx, func() error { return h.UndefineDomain(id) }); err != nil && !errors.Is(err, errNoDomain) {
			return err
		}
	}
	if ours || len(parts[id].names) > 0 {
		p.publish(vmprovider.Instance{ID: id, Owner: parts[id].owner, Host: p.host, State: vmprovider.StateGone})
	}
	return nil
}

// unhurried tries again while somebody is opening or making a volume, as whoever
// follows a console does every now and then.
func unhurried(ctx context.Context, f func() error) error {
	for tries := 1; ; tries++ {
		err := settle(ctx, f)
		if !errors.Is(err, errBusy) || tries == busyTries {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(busyPause):
		}
	}
}
