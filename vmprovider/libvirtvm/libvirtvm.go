// Package libvirtvm makes machines that are virtual machines of libvirt: a
// domain each, with a disk that is an overlay over the image, a seed disk
// (vmprovider/seed) and a file that the serial console is written to from
// power-on.
//
// A machine's domain has its name and holds the owner and the expiry in its
// metadata; its three volumes are in one storage pool and are named
// ID@OWNER@KIND. What a provider that was killed leaves of them is a leftover
// machine to List, and Destroy removes it. Domains without that metadata are
// never touched.
//
// The driver that talks to libvirt is compiled with the build tag libvirt
// (linked, needs libvirt's headers) or libvirt_dlopen (loaded at run time), and
// with cgo; without, New returns an error that wraps errors.ErrUnsupported.
package libvirtvm

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"libvirt.org/go/libvirtxml"

	"github.com/solstice-ci/solstice-go/internal/keylock"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/seed"
)

const (
	// undoTimeout bounds what a failed Create does to leave nothing.
	undoTimeout = 30 * time.Second
	// grace is how long a call that changes something is waited for after ctx has
	// ended: most end by themselves, and then it is known what they did.
	grace = 20 * time.Second
	// redial is the pause between tries to reach libvirtd again.
	redialFirst, redialMost = 100 * time.Millisecond, 10 * time.Second
	// follow is how often a console is looked at for more.
	follow = 200 * time.Millisecond
)

var _ interface {
	vmprovider.Provider
	vmprovider.Watcher
} = (*Provider)(nil)

// Provider is a vmprovider.Provider on one libvirtd.
type Provider struct {
	cfg      Config
	log      *slog.Logger
	dial     func(uri string) (hypervisor, error)
	host     string
	poolPath string
	ctx      context.Context
	cancel   context.CancelFunc
	busy     sync.WaitGroup
	locks    keylock.Locks
	dialling keylock.Locks

	mu       sync.Mutex
	closed   bool
	hyp      hypervisor // nil: lost
	notifier *vmprovider.Notifier
	creating map[string]*creation
}

// creation is a Create that is going on.
type creation struct {
	meta      metadata
	interrupt context.CancelCauseFunc
}

var errDestroyed = fmt.Errorf("%w: destroyed meanwhile", vmprovider.ErrNotFound)

// New connects to libvirtd. An error wraps vmprovider.ErrInvalid for a
// configuration that cannot work, vmprovider.ErrUnavailable where libvirtd or the
// storage pool is not to be had, and errors.ErrUnsupported where this program was
// built without libvirt.
func New(ctx context.Context, cfg Config) (*Provider, error) { return open(ctx, cfg, dial) }

func open(ctx context.Context, cfg Config, dial func(uri string) (hypervisor, error)) (*Provider, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, fmt.Errorf("libvirtvm: %w", err)
	}
	p := &Provider{cfg: cfg, log: cfg.Logger, dial: dial, notifier: &vmprovider.Notifier{}, creating: map[string]*creation{}}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	h, err := p.connected(ctx)
	if err == nil {
		p.host, err = call(ctx, h.Hostname)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("libvirtvm: %s: %w", cfg.URI, unavailable(err)), p.Close())
	}
	p.busy.Add(1)
	go p.reconnect()
	return p, nil
}

// Close leaves the machines as they are.
func (p *Provider) Close() error {
	p.mu.Lock()
	p.closed = true
	h, n := p.hyp, p.notifier
	p.hyp = nil
	p.mu.Unlock()
	p.cancel()
	n.Close()
	p.busy.Wait()
	if h != nil {
		h.Close()
	}
	return nil
}

// Capabilities implements vmprovider.Provider.
func (p *Provider) Capabilities() vmprovider.Capabilities {
	return vmprovider.Capabilities{Adopts: true}
}

// As implements what vmprovider.As asks: libvirt's stand-in for tests has no
// consoles.
func (p *Provider) As(target any) bool {
	switch t := target.(type) {
	case *vmprovider.Watcher:
		*t = p
	case *vmprovider.Consoler:
		if p.cfg.synthetic() {
			return false
		}
		*t = consoler{p}
	default:
		return false
	}
	return true
}

// unavailable makes of libvirt's errors those that callers act on.
func unavailable(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errLost), errors.Is(err, errNoPool):
		return fmt.Errorf("%w: %w", vmprovider.ErrUnavailable, err)
	case errors.Is(err, errExists):
		return fmt.Errorf("%w: %w", vmprovider.ErrExists, err)
	case errors.Is(err, errNoSpace):
		return fmt.Errorf("%w: %w", vmprovider.ErrCapacity, err)
	}
	return err
}

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

// begin is the start of every call; end has to follow when it gives no error.
func (p *Provider) begin(ctx context.Context, what, id string) (h hypervisor, end func(), err error) {
	fail := func(err error) (hypervisor, func(), error) {
		return nil, nil, fmt.Errorf("libvirtvm: %s: %w", what, unavailable(err))
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	if what != "list" {
		if err := vmprovider.ValidateID(id); err != nil {
			return fail(err)
		}
	}
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return fail(vmprovider.ErrClosed)
	}
	p.busy.Add(1)
	p.mu.Unlock()
	if h, err = p.connected(ctx); err != nil {
		p.busy.Done()
		return fail(err)
	}
	return h, p.busy.Done, nil
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
			return h.Upload(pool, b.volume(seedVolume), seedDisk)
		}},
		{"console", func() error { return h.CreateVolume(pool, consoleXML) }},
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
	parts, err := p.volumes(ctx, h)
	errs = append(errs, err)
	for _, name := range parts[id].names {
		if err := settle(ctx, func() error { return h.DeleteVolume(p.cfg.StoragePool, name) }); !errors.Is(err, errNoVolume) {
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

// consoler is the Consoler of a hypervisor that has consoles.
type consoler struct{ *Provider }

// Console reads the file that the serial console is written to.
func (p consoler) Console(ctx context.Context, id string, follow bool) (io.ReadCloser, error) {
	inst, err := p.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	r := &console{p: p.Provider, ctx: ctx, id: id, volume: volume(id, inst.Owner, consoleVolume), follow: follow}
	if err := r.fill(); err != nil {
		return nil, fmt.Errorf("libvirtvm: console of %q: %w", id, unavailable(err))
	}
	return r, nil
}

// console reads piece by piece, since a download has an end.
type console struct {
	p          *Provider
	ctx        context.Context
	id, volume string
	follow     bool
	read       int64
	rest       bytes.Buffer
	last       bool // nothing comes after rest
}

// fill gets what is new.
func (c *console) fill() error {
	h, end, err := c.p.begin(c.ctx, "console", c.id)
	if err != nil {
		return err
	}
	defer end()
	running := false
	if c.follow { // asked before, so that its last words are read
		inst, err := c.p.get(c.ctx, h, c.id)
		if err != nil && !errors.Is(err, vmprovider.ErrNotFound) {
			return err
		}
		running = err == nil && (inst.State == vmprovider.StateRunning || inst.State == vmprovider.StateCreating)
	}
	b, err := call(c.ctx, func() ([]byte, error) {
		var b bytes.Buffer
		err := h.Download(c.p.cfg.StoragePool, c.volume, c.read, &b)
		return b.Bytes(), err
	})
	switch {
	case errors.Is(err, errNoVolume):
		c.last = !running // destroyed, or not made yet
		return nil
	case err != nil:
		return err
	}
	c.read += int64(len(b))
	c.rest.Write(b)
	c.last = !running
	return nil
}

// Read implements io.Reader.
func (c *console) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	for {
		if c.rest.Len() > 0 {
			return c.rest.Read(b)
		}
		if c.last {
			return 0, io.EOF
		}
		select {
		case <-c.ctx.Done():
			return 0, c.ctx.Err()
		case <-c.p.ctx.Done():
			return 0, vmprovider.ErrClosed
		case <-time.After(follow):
		}
		if err := c.fill(); err != nil {
			return 0, err
		}
	}
}

// Close implements io.Closer.
func (c *console) Close() error { return nil }
