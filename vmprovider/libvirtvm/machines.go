package libvirtvm

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

func (p *Provider) instance(m metadata, s vmprovider.State, reason string) vmprovider.Instance {
	return vmprovider.Instance{ID: m.ID, Owner: m.Owner, State: s, Host: p.host, Reason: reason, CreatedAt: m.Created, ExpiresAt: m.Expires}
}

// being gives the machine that a Create of this process is making.
func (p *Provider) being(id string) (vmprovider.Instance, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.creating[id]
	if c == nil {
		return vmprovider.Instance{}, false
	}
	return p.instance(c.meta, vmprovider.StateCreating, ""), true
}

// look makes an instance of a domain.
func (p *Provider) look(d domain) (vmprovider.Instance, error) {
	m, err := read(d.XML)
	if err != nil {
		return vmprovider.Instance{}, err
	}
	switch {
	case d.Active:
		return p.instance(m, vmprovider.StateRunning, ""), nil
	case m.Started:
		return p.instance(m, vmprovider.StateStopped, d.Reason), nil
	}
	return p.instance(m, vmprovider.StateLeftover, "its creation did not come to an end"), nil
}

// Get reads the domain, and where there is none looks for volumes.
func (p *Provider) Get(ctx context.Context, id string) (vmprovider.Instance, error) {
	h, end, err := p.begin(ctx, "get", id)
	if err != nil {
		return vmprovider.Instance{}, err
	}
	defer end()
	inst, err := p.get(ctx, h, id)
	if err != nil {
		return vmprovider.Instance{}, fmt.Errorf("libvirtvm: get %q: %w", id, unavailable(err))
	}
	return inst, nil
}

func (p *Provider) get(ctx context.Context, h hypervisor, id string) (vmprovider.Instance, error) {
	if inst, ok := p.being(id); ok {
		return inst, nil
	}
	d, err := call(ctx, func() (domain, error) { return h.Domain(id) })
	if err == nil {
		var inst vmprovider.Instance
		if inst, err = p.look(d); !errors.Is(err, errForeign) {
			return inst, err
		}
	} else if !errors.Is(err, errNoDomain) {
		return vmprovider.Instance{}, err
	}
	parts, err := p.volumes(ctx, h)
	if err != nil {
		return vmprovider.Instance{}, err
	}
	if left, ok := parts[id]; ok {
		return p.stray(id, left), nil
	}
	return vmprovider.Instance{}, vmprovider.ErrNotFound
}

// strays are a machine's volumes.
type strays struct {
	owner string
	names []string
}

func (p *Provider) stray(id string, left strays) vmprovider.Instance {
	return p.instance(metadata{ID: id, Owner: left.owner}, vmprovider.StateLeftover, "there is no domain, only "+strings.Join(left.names, ", "))
}

// volumes are those of machines, by machine.
func (p *Provider) volumes(ctx context.Context, h hypervisor) (map[string]strays, error) {
	names, err := call(ctx, func() ([]string, error) { return h.Volumes(p.cfg.StoragePool) })
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	found := map[string]strays{}
	for _, name := range names {
		if id, owner, ok := volumeOf(name); ok {
			found[id] = strays{owner, append(found[id].names, name)}
		}
	}
	return found, nil
}

// List yields the machines of this libvirtd, ordered by ID.
func (p *Provider) List(ctx context.Context, o vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error] {
	return func(yield func(vmprovider.Instance, error) bool) {
		h, end, err := p.begin(ctx, "list", "")
		var all []vmprovider.Instance
		if err == nil {
			if all, err = p.list(ctx, h); err != nil {
				err = fmt.Errorf("libvirtvm: list: %w", unavailable(err))
			}
			end()
		}
		for _, inst := range all {
			if o.Owner != "" && inst.Owner != o.Owner {
				continue
			}
			if err := ctx.Err(); err != nil {
				yield(vmprovider.Instance{}, err)
				return
			}
			if !yield(inst, nil) {
				return
			}
		}
		if err != nil {
			yield(vmprovider.Instance{}, err)
		}
	}
}

func (p *Provider) list(ctx context.Context, h hypervisor) ([]vmprovider.Instance, error) {
	found := map[string]vmprovider.Instance{}
	// Volumes first: they go before their domain does.
	parts, err := p.volumes(ctx, h)
	if err != nil {
		return nil, err
	}
	for id, left := range parts {
		found[id] = p.stray(id, left)
	}
	domains, err := call(ctx, h.Domains)
	if err != nil {
		return nil, err
	}
	for _, d := range domains {
		inst, err := p.look(d)
		if errors.Is(err, errForeign) {
			continue
		}
		if err != nil {
			return nil, err
		}
		found[inst.ID] = inst
	}
	p.mu.Lock()
	for id, c := range p.creating {
		found[id] = p.instance(c.meta, vmprovider.StateCreating, "")
	}
	p.mu.Unlock()
	return slices.SortedFunc(maps.Values(found), func(a, b vmprovider.Instance) int { return strings.Compare(a.ID, b.ID) }), nil
}
