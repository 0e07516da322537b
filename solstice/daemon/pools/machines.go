package pools

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/image"
)

// machines has a provider's machines stand on an image of the store and download
// the agents that there are when they are made.
type machines struct {
	vmprovider.Provider
	agents *daemon.Agents // nil: machines need none
	store  *image.Store   // nil: the image is the pool's
	img    image.Image
	log    *slog.Logger

	mu  sync.Mutex
	pin *image.Pin // held until Close: the pool's machines need it
}

var _ vmprovider.ImagePreparer = (*machines)(nil)

// Create implements vmprovider.Provider.
func (m *machines) Create(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
	var err error
	if m.store != nil {
		if s.Image, err = m.ready(ctx, nil); err != nil {
			return vmprovider.Instance{}, err
		}
	}
	if m.agents != nil {
		if s.Bootstrap.AgentSHA256, err = m.agents.Sums(); err != nil {
			return vmprovider.Instance{}, fmt.Errorf("%w: agents for guests: %w", vmprovider.ErrInvalid, err)
		}
		if len(s.Bootstrap.AgentSHA256) == 0 {
			return vmprovider.Instance{}, fmt.Errorf("%w: there is no agent for guests in %s", vmprovider.ErrInvalid, m.agents.Dir())
		}
	}
	return m.Provider.Create(ctx, s)
}

// ready gives the pinned image, and gets it where it is missing or damaged.
func (m *machines) ready(ctx context.Context, progress func(image.Progress)) (vmprovider.Image, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pin != nil {
		now, err := m.store.Pin(ctx, m.img)
		if err == nil {
			_ = now.Release() // it is pinned already
			return m.pin.Image(), nil
		}
		if ctx.Err() != nil {
			return vmprovider.Image{}, err
		}
		m.log.WarnContext(ctx, "the image in use is damaged, getting it anew", "image", m.img.Label, "error", err)
		_ = m.pin.Release() // or it could not be replaced
		m.pin = nil
	}
	pin, err := m.store.Ensure(ctx, m.img, progress)
	if err != nil {
		return vmprovider.Image{}, err
	}
	m.pin = pin
	return pin.Image(), nil
}

// PrepareImage implements vmprovider.ImagePreparer: it downloads the image.
func (m *machines) PrepareImage(ctx context.Context, img vmprovider.Image) error {
	if m.store != nil {
		var err error
		if img, err = m.ready(ctx, nil); err != nil {
			return err
		}
	}
	if p, ok := vmprovider.As[vmprovider.ImagePreparer](m.Provider); ok {
		return p.PrepareImage(ctx, img)
	}
	return nil
}

// As implements what vmprovider.As asks.
func (m *machines) As(target any) (ok bool) {
	switch t := target.(type) {
	case *vmprovider.ImagePreparer:
		*t, ok = m, true
	case *vmprovider.Consoler:
		*t, ok = vmprovider.As[vmprovider.Consoler](m.Provider)
	case *vmprovider.Watcher:
		*t, ok = vmprovider.As[vmprovider.Watcher](m.Provider)
	}
	return ok
}

// Close implements vmprovider.Provider.
func (m *machines) Close() error {
	err := m.Provider.Close()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.pin != nil {
		err = errors.Join(err, m.pin.Release())
	}
	return err
}
