//go:build unix

package processvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/solstice-ci/solstice-go/internal/proctree"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

// undoTimeout bounds what a failed Create does to leave nothing.
const undoTimeout = 30 * time.Second

// creation is a Create that is going on.
type creation struct {
	rec       record
	interrupt context.CancelCauseFunc
}

var errDestroyed = fmt.Errorf("%w: destroyed meanwhile", vmprovider.ErrNotFound)

// Create starts the agent. If it fails it undoes what it did; only
// where that fails too does a leftover stay.
func (p *Provider) Create(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
	end, err := p.begin(ctx, "create", s.ID)
	if err != nil {
		return vmprovider.Instance{}, err
	}
	defer end()
	inst, err := p.create(ctx, s)
	if err != nil {
		return vmprovider.Instance{}, fmt.Errorf("processvm: create %q: %w", s.ID, err)
	}
	return inst, nil
}

func (p *Provider) create(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
	if s.CPUs < 0 || s.MemoryBytes < 0 || s.DiskBytes < 0 {
		return vmprovider.Instance{}, fmt.Errorf("%w: negative size", vmprovider.ErrInvalid)
	}
	ctx, interrupt := context.WithCancelCause(ctx)
	defer interrupt(nil)
	defer context.AfterFunc(p.ctx, func() { interrupt(vmprovider.ErrClosed) })()

	c := &creation{rec: p.newRecord(s), interrupt: interrupt}
	if err := p.admit(c); err != nil {
		return vmprovider.Instance{}, err
	}
	unlock, err := p.locks.Lock(ctx, s.ID)
	if err != nil {
		p.dismiss(s.ID)
		return vmprovider.Instance{}, context.Cause(ctx)
	}
	defer unlock()
	p.notifier.Publish(p.instance(c.rec, vmprovider.StateCreating, ""))
	rec, named, err := p.build(ctx, c.rec, s.Bootstrap)
	if err == nil {
		p.dismiss(s.ID)
		inst := p.instance(rec, vmprovider.StateRunning, "")
		p.notifier.Publish(inst)
		if rec.Process != nil {
			p.attend(s.ID, *rec.Process)
		}
		return inst, nil
	}
	if named {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		if undoErr := p.destroy(undo, s.ID, "creation failed: "+err.Error()); undoErr != nil {
			err = fmt.Errorf("%w; undo: %w", err, undoErr)
		}
	}
	p.dismiss(s.ID)
	p.publish(s.ID)
	return vmprovider.Instance{}, err
}

func (p *Provider) newRecord(s vmprovider.Spec) record {
	r := record{intent: intent{
		ID: s.ID, Owner: s.Owner, Image: s.Image, CPUs: s.CPUs, MemoryBytes: s.MemoryBytes, DiskBytes: s.DiskBytes,
		Labels: s.Labels, CreatedAt: time.Now().UTC().Round(0), ExpiresAt: s.ExpiresAt.UTC().Round(0), Creator: p.self,
	}}
	if r.Inside = p.cfg.Runner != nil; !r.Inside {
		r.Command = append(slices.Clone(p.cfg.Command), "--bootstrap", filepath.Join(p.cfg.Root, s.ID, bootstrapFile))
	}
	r.Cgroup = p.cgroupPath(s.ID)
	return r
}

// admit takes the machine's name and its place among Max.
func (p *Provider) admit(c *creation) error {
	// A creation is dismissed after its directory has appeared, so under the
	// lock one of the two is always seen.
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.creating[c.rec.ID] != nil {
		return vmprovider.ErrExists
	}
	if _, err := p.root.Lstat(c.rec.ID); err == nil {
		return vmprovider.ErrExists
	}
	if p.cfg.Max > 0 {
		ids, err := p.idsLocked()
		if err != nil {
			return err
		}
		if len(ids) >= p.cfg.Max {
			return fmt.Errorf("%w: there are %d machines", vmprovider.ErrCapacity, len(ids))
		}
	}
	p.creating[c.rec.ID] = c
	return nil
}

func (p *Provider) dismiss(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.creating, id)
}

// build makes the directory, then the process. If it fails once the directory
// had its name (named), destroy removes what it made.
func (p *Provider) build(ctx context.Context, rec record, b vmprovider.Bootstrap) (_ record, named bool, err error) {
	bootstrap, err := p.bootstrapOf(rec, b)
	if err != nil {
		return rec, false, err
	}
	staging := p.stagingName(rec.ID)
	if err := p.stage(ctx, staging, rec, bootstrap); err != nil {
		return rec, false, errors.Join(err, removeTree(context.WithoutCancel(ctx), p.root, staging))
	}
	p.cfg.failpoint("named")
	if rec.Inside {
		if rec, err = p.settle(rec, bootstrap); err == nil {
			p.cfg.failpoint("started")
			err = context.Cause(ctx)
		}
		return rec, true, err
	}
	proc, contained, err := p.start(rec)
	if err != nil {
		return rec, true, err
	}
	p.cfg.failpoint("started")
	rec.Process, rec.Contained = &proc, contained
	if err := p.saveStatus(rec); err != nil {
		// Another process has removed the directory, perhaps without having
		// seen the agent; and destroy finds nothing to do.
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		return rec, true, errors.Join(err, p.kill(undo, rec))
	}
	p.cfg.failpoint("recorded")
	return rec, true, context.Cause(ctx)
}

// stage completes the directory under a name that nobody takes for a machine,
// then gives it its own.
func (p *Provider) stage(ctx context.Context, staging string, rec record, bootstrap []byte) error {
	type step struct {
		name string
		do   func() error
	}
	steps := []step{
		{"begun", func() error { return p.root.Mkdir(staging, 0o700) }},
		{"intent", func() error { return p.writeIntent(staging, rec) }},
	}
	if !rec.Inside {
		steps = append(steps,
			step{"bootstrap", func() error { return p.root.WriteFile(filepath.Join(staging, bootstrapFile), bootstrap, 0o600) }},
			step{"console", func() error { return p.root.WriteFile(filepath.Join(staging, consoleFile), nil, 0o600) }})
	}
	steps = append(steps, step{"", func() error { return p.root.Rename(staging, rec.ID) }})
	for _, s := range steps {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := s.do(); err != nil {
			if s.name == "" && (errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EEXIST)) {
				return vmprovider.ErrExists
			}
			return err
		}
		p.cfg.failpoint(s.name)
	}
	return nil
}

// start starts the agent in a session of its own, in its cgroup (contained) if
// that works.
func (p *Provider) start(rec record) (_ proctree.ID, contained bool, err error) {
	console, err := p.root.OpenFile(filepath.Join(rec.ID, consoleFile), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return proctree.ID{}, false, err
	}
	defer console.Close()
	command := func() *exec.Cmd {
		return &exec.Cmd{
			Path: rec.Command[0], Args: rec.Command,
			Dir: filepath.Join(p.cfg.Root, rec.ID), Env: []string{p.marker(rec.ID)},
			Stdout: console, Stderr: console, SysProcAttr: &syscall.SysProcAttr{Setsid: true},
		}
	}
	cmd := command()
	if rec.Cgroup != "" {
		if err = p.startInCgroup(rec, cmd); err != nil {
			// Forbidden, or no clone3: hold it together without.
			p.log.Debug("no cgroup for a machine", "machine", rec.ID, "error", err)
			cmd = command()
		}
		contained = err == nil
	}
	if !contained {
		err = cmd.Start()
	}
	if err != nil {
		return proctree.ID{}, false, fmt.Errorf("start the agent: %w", err)
	}
	// A child stays in the table until it is waited for, so this is it.
	proc, err := proctree.Lookup(cmd.Process.Pid)
	if err != nil {
		return proctree.ID{}, false, errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}
	// From now on it is treated like one that was found: see reap.
	return proc.ID, contained, cmd.Process.Release()
}

func (p *Provider) startInCgroup(rec record, cmd *exec.Cmd) error {
	cg, err := proctree.MakeCgroup(rec.Cgroup)
	if err != nil {
		return err
	}
	p.cfg.failpoint("cgroup")
	done, err := cg.Attach(cmd)
	if err == nil {
		err = cmd.Start()
		done()
	}
	if err != nil {
		return errors.Join(err, cg.Remove(p.ctx))
	}
	return nil
}
