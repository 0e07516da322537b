//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/seed"
)

// Config of a Provider.
type Config struct {
	// Root has a directory per machine and is this provider's alone; its path is
	// absolute, without commas, of at most 39 bytes. Several processes may share
	// it.
	Root        string
	Accelerator string // "kvm", or "tcg", which emulates
	CPUs        int    // of a machine whose spec says 0; 0: 1
	MemoryBytes int64  // of a machine whose spec says 0; 0: 1 GiB
	Max         int    // machines at once; 0: any number
}

// Provider is a vmprovider.Provider and a vmprovider.Consoler. All it knows is in
// the file system, so the next one, or another process, knows the same.
type Provider struct {
	cfg           Config
	qemu, qemuImg string
	host          string
	ended         context.Context //nolint:containedctx // it ends with Close
	end           context.CancelFunc
	step          func(name string) // for tests: is told what was done, and may not come back
}

var (
	_ vmprovider.Provider = (*Provider)(nil)
	_ vmprovider.Consoler = (*Provider)(nil)
)

// New makes a provider. Errors wrap vmprovider.ErrInvalid where the configuration
// is to blame.
func New(cfg Config) (*Provider, error) {
	invalid := func(format string, args ...any) (*Provider, error) {
		return nil, fmt.Errorf("%w: qemuvm: %s", vmprovider.ErrInvalid, fmt.Sprintf(format, args...))
	}
	switch {
	case !filepath.IsAbs(cfg.Root) || strings.Contains(cfg.Root, ","):
		return invalid("root %q: want an absolute path without commas", cfg.Root)
	case len(cfg.Root) > longestRoot:
		return invalid("root %q: longer than %d bytes, which leaves a Unix socket no room", cfg.Root, longestRoot)
	case cfg.Accelerator != "kvm" && cfg.Accelerator != "tcg":
		return invalid("accelerator %q: want kvm or tcg", cfg.Accelerator)
	case cfg.CPUs < 0 || cfg.MemoryBytes < 0 || cfg.Max < 0:
		return invalid("negative size")
	}
	if cfg.CPUs == 0 {
		cfg.CPUs = 1
	}
	if cfg.MemoryBytes == 0 {
		cfg.MemoryBytes = 1 << 30
	}
	p := &Provider{cfg: cfg, step: func(string) {}}
	var err error
	if p.qemu, err = exec.LookPath("qemu-system-x86_64"); err != nil {
		return invalid("%v", err)
	}
	if p.qemuImg, err = exec.LookPath("qemu-img"); err != nil {
		return invalid("%v", err)
	}
	if p.host, err = os.Hostname(); err != nil {
		return nil, fmt.Errorf("qemuvm: %w", err)
	}
	if err := os.MkdirAll(cfg.Root, 0o700); err != nil {
		return nil, fmt.Errorf("qemuvm: %w", err)
	}
	p.ended, p.end = context.WithCancel(context.Background())
	if err := p.sweep(p.ended); err != nil {
		return nil, fmt.Errorf("qemuvm: sweep: %w", err)
	}
	return p, nil
}

// begin is how every call begins: Close ends its context, with ErrClosed as cause.
func (p *Provider) begin(ctx context.Context, id string) (context.Context, func(), error) {
	if err := vmprovider.ValidateID(id); err != nil {
		return nil, nil, err
	}
	if p.ended.Err() != nil {
		return nil, nil, fmt.Errorf("qemuvm: %w", vmprovider.ErrClosed)
	}
	if err := ctx.Err(); err != nil {
		return nil, nil, fmt.Errorf("qemuvm: %w", err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(p.ended, func() { cancel(vmprovider.ErrClosed) })
	return ctx, func() { stop(); cancel(nil) }, nil
}

// explain is how every call ends: an error has a sentinel where callers act on it.
func explain(ctx context.Context, what string, err error) error {
	switch cause := context.Cause(ctx); {
	case err == nil:
		return nil
	case cause != nil && !errors.Is(err, cause):
		return fmt.Errorf("qemuvm: %s: %w: %w", what, cause, err)
	case errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("qemuvm: %s: %w: %w", what, vmprovider.ErrCapacity, err)
	}
	return fmt.Errorf("qemuvm: %s: %w", what, err)
}

// Create implements vmprovider.Provider.
func (p *Provider) Create(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
	ctx, done, err := p.begin(ctx, s.ID)
	if err != nil {
		return vmprovider.Instance{}, err
	}
	defer done()
	inst, err := p.create(ctx, s)
	return inst, explain(ctx, "create "+s.ID, err)
}

// undoTimeout bounds the removal of what a Create that failed has made.
const undoTimeout = 30 * time.Second

func (p *Provider) create(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
	// What is wrong with the spec is found before anything is made.
	if err := p.complete(ctx, &s); err != nil {
		return vmprovider.Instance{}, err
	}
	seedDisk, err := seed.Build(s.Bootstrap, seed.Options{})
	if err != nil {
		return vmprovider.Instance{}, err
	}
	m, err := p.admit(ctx, s)
	if err != nil {
		return vmprovider.Instance{}, err
	}
	defer m.release()
	if err := p.build(ctx, m, s, seedDisk); err != nil {
		m.dropAlive() // where QEMU was not started
		// Also when ctx has ended. What fails here is a leftover, for Destroy.
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		return vmprovider.Instance{}, errors.Join(err, p.remove(undo, m))
	}
	return p.instance(m, vmprovider.StateRunning, ""), nil
}

// complete fills in what the spec leaves to the provider, and refuses what can
// never be made.
func (p *Provider) complete(ctx context.Context, s *vmprovider.Spec) error {
	if s.CPUs < 0 || s.MemoryBytes < 0 || s.DiskBytes < 0 {
		return fmt.Errorf("%w: negative size", vmprovider.ErrInvalid)
	}
	if s.CPUs == 0 {
		s.CPUs = p.cfg.CPUs
	}
	if s.MemoryBytes == 0 {
		s.MemoryBytes = p.cfg.MemoryBytes
	}
	size, err := p.imageSize(ctx, s.Image)
	if err != nil {
		return err
	}
	if s.DiskBytes == 0 {
		s.DiskBytes = size
	}
	if s.DiskBytes < size {
		return fmt.Errorf("%w: a disk of %d bytes for an image of %d", vmprovider.ErrInvalid, s.DiskBytes, size)
	}
	return nil
}

var errDestroyed = fmt.Errorf("%w: destroyed meanwhile", vmprovider.ErrNotFound)

// build makes the parts of a machine. It looks after each whether it shall go on.
func (p *Provider) build(ctx context.Context, m *machine, s vmprovider.Spec, seedDisk []byte) error {
	for _, part := range []struct {
		name string
		make func() error
	}{
		{"console", func() error { return os.WriteFile(m.path(consoleFile), nil, 0o600) }},
		{"seed", func() error { return os.WriteFile(m.path(seedFile), seedDisk, 0o600) }},
		{"disk", func() error { return p.overlay(ctx, m, s) }},
		{"qemu", func() error { return p.start(ctx, m, s) }},
		{"started", func() error { return m.mark(startedFile) }},
	} {
		if err := part.make(); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
		p.step(part.name)
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if m.marked(doomedFile) {
			return errDestroyed
		}
	}
	return nil
}

// Get implements vmprovider.Provider.
func (p *Provider) Get(ctx context.Context, id string) (vmprovider.Instance, error) {
	ctx, done, err := p.begin(ctx, id)
	if err != nil {
		return vmprovider.Instance{}, err
	}
	defer done()
	m, err := p.load(id)
	if err != nil {
		return vmprovider.Instance{}, explain(ctx, "get "+id, err)
	}
	state, reason := m.state(ctx)
	return p.instance(m, state, reason), explain(ctx, "get "+id, context.Cause(ctx))
}

// List implements vmprovider.Provider.
func (p *Provider) List(ctx context.Context, o vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error] {
	return func(yield func(vmprovider.Instance, error) bool) {
		ctx, done, err := p.begin(ctx, "all")
		if err != nil {
			yield(vmprovider.Instance{}, err)
			return
		}
		defer done()
		ids, err := p.ids()
		if err != nil {
			yield(vmprovider.Instance{}, explain(ctx, "list", err))
			return
		}
		for _, id := range ids {
			m, err := p.load(id)
			if errors.Is(err, vmprovider.ErrNotFound) || err == nil && o.Owner != "" && o.Owner != m.Owner {
				continue
			}
			var inst vmprovider.Instance
			if err == nil {
				state, reason := m.state(ctx)
				inst, err = p.instance(m, state, reason), context.Cause(ctx)
			}
			if !yield(inst, explain(ctx, "list", err)) || err != nil {
				return
			}
		}
	}
}

// Destroy implements vmprovider.Provider.
func (p *Provider) Destroy(ctx context.Context, id string, _ vmprovider.DestroyOptions) error {
	ctx, done, err := p.begin(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	m, err := p.load(id)
	if errors.Is(err, vmprovider.ErrNotFound) {
		return nil
	}
	if err == nil {
		// A Create under way sees the mark and gives up. Where it cannot be made,
		// on a full disk, Destroy waits for that Create and removes its machine.
		_ = m.mark(doomedFile)
		err = m.acquire(ctx)
	}
	if errors.Is(err, vmprovider.ErrNotFound) {
		return nil // another Destroy was quicker
	}
	if err == nil {
		defer m.release()
		p.step("doomed")
		err = p.remove(ctx, m)
	}
	return explain(ctx, "destroy "+id, err)
}

// remove ends and removes all there is of a machine that this process has
// acquired. What fails keeps nothing else from being tried, but the record stays
// until the rest is gone, so that List shows the machine.
func (p *Provider) remove(ctx context.Context, m *machine) error {
	_ = m.mark(doomedFile)
	errs := []error{m.kill(ctx)}
	p.step("killed")
	for _, name := range []string{diskFile, seedFile, consoleFile, logFile} {
		if err := os.Remove(m.path(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
		p.step("removed " + name)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	// The directory with the record goes in one step.
	gone := filepath.Join(p.cfg.Root, hidden+m.ID)
	if err := os.Rename(m.dir, gone); err != nil {
		return err
	}
	p.step("renamed")
	return os.RemoveAll(gone)
}

// Capabilities implements vmprovider.Provider.
func (p *Provider) Capabilities() vmprovider.Capabilities {
	return vmprovider.Capabilities{Isolated: true, Adopts: true}
}

// Close implements vmprovider.Provider: machines run on.
func (p *Provider) Close() error {
	p.end()
	return nil
}
