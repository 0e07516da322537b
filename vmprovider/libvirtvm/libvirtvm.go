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
// With Config.Isolation the machines are in a network of their own, which the
// provider makes and removes: a bridge, and rules of nftables, which are applied
// again before each machine starts.
//
// The driver that talks to libvirt is compiled with the build tag libvirt
// (linked, needs libvirt's headers) or libvirt_dlopen (loaded at run time), and
// with cgo; without, New returns an error that wraps errors.ErrUnsupported.
package libvirtvm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/internal/keylock"
	"github.com/solstice-ci/solstice-go/vmprovider"
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
	// busyTries at storage that somebody is just using, and the pause between them.
	busyTries, busyPause = 100, 100 * time.Millisecond
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
	if _, err := p.connected(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("libvirtvm: %s: %w", cfg.URI, unavailable(err)), p.Close())
	}
	p.busy.Add(1)
	go p.reconnect()
	if cfg.Isolation != nil {
		p.mu.Lock()
		h := p.hyp
		p.mu.Unlock()
		if err := p.isolate(ctx, h); err != nil {
			return nil, errors.Join(fmt.Errorf("libvirtvm: %w", unavailable(err)), p.Close())
		}
		p.busy.Add(1)
		go p.guard()
	}
	return p, nil
}

// Close leaves the machines as they are. When there are none, the network that
// isolates them goes.
func (p *Provider) Close() error {
	p.mu.Lock()
	p.closed = true
	h, n := p.hyp, p.notifier
	p.hyp = nil
	p.mu.Unlock()
	p.cancel()
	n.Close()
	p.busy.Wait()
	if h == nil {
		return nil
	}
	defer h.Close()
	if p.cfg.Isolation == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
	defer cancel()
	if err := p.unisolate(ctx, h); err != nil {
		return fmt.Errorf("libvirtvm: close: network %s: %w", p.cfg.Isolation.Bridge, unavailable(err))
	}
	return nil
}

// Capabilities implements vmprovider.Provider.
func (p *Provider) Capabilities() vmprovider.Capabilities {
	return vmprovider.Capabilities{Isolated: true, Adopts: true}
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
