//go:build unix

package processvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/solstice-ci/solstice-go/internal/proctree"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

// Destroy kills all processes of the machine and removes its directory.
func (p *Provider) Destroy(ctx context.Context, id string, _ vmprovider.DestroyOptions) error {
	end, err := p.begin(ctx, "destroy", id)
	if err != nil {
		return err
	}
	defer end()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(p.ctx, func() { cancel(vmprovider.ErrClosed) })()
	p.mu.Lock()
	if c := p.creating[id]; c != nil {
		c.interrupt(errDestroyed)
	}
	p.mu.Unlock()
	unlock, err := p.locks.Lock(ctx, id)
	if err == nil {
		defer unlock()
		err = p.destroy(ctx, id, "destruction has begun")
	}
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = fmt.Errorf("%w: %w", cause, err)
		}
		return fmt.Errorf("processvm: destroy %q: %w", id, err)
	}
	return nil
}

// destroy does it, under the machine's lock.
func (p *Provider) destroy(ctx context.Context, id, why string) error {
	var errs []error
	var rec record
	var bare bool
	var err error
	if r := p.resident(id); r != nil {
		// Nothing is written down: if this process ends now the machine is stopped.
		rec, bare, err = p.evict(ctx, r)
		errs = append(errs, err)
	} else {
		rec, err = p.load(id)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if p.elsewhere(rec) {
			return fmt.Errorf("%w: it runs inside process %d", vmprovider.ErrUnavailable, rec.Creator.PID)
		}
		if readable := err == nil; readable && rec.Destroying == "" {
			rec.Destroying = why
			errs = append(errs, p.saveStatus(rec))
		}
	}
	p.cfg.failpoint("destroying")
	if bare {
		errs = append(errs, p.removeCgroup(ctx, rec))
	} else {
		errs = append(errs, p.kill(ctx, rec))
	}
	p.cfg.failpoint("killed")
	errs = append(errs, removeTree(ctx, p.root, id, recordFile, statusFile))
	p.cfg.failpoint("emptied")
	if err := errors.Join(errs...); err != nil {
		p.publish(id)
		return err
	}
	if rec.Process == nil && !rec.Inside {
		// Its creator, in another process, may have started the agent after the
		// search and before the directory went. It cannot any more.
		if err := p.kill(ctx, rec); err != nil {
			return err
		}
	}
	gone := gonePrefix + id
	if err := removeTree(ctx, p.root, gone); err != nil {
		return err
	}
	if err := p.root.Rename(id, gone); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	p.cfg.failpoint("unnamed")
	p.mu.Lock()
	delete(p.attended, id)
	delete(p.residents, id)
	p.mu.Unlock()
	p.notifier.Publish(p.instance(rec, vmprovider.StateGone, ""))
	// It is no machine any more; what cannot be removed now the next New does.
	if err := removeTree(ctx, p.root, gone); err != nil {
		p.log.Warn("cannot remove a remnant", "name", gone, "error", err)
	}
	return nil
}

// kill ends all processes of the machine and removes its cgroup.
func (p *Provider) kill(ctx context.Context, rec record) error {
	t := proctree.Target{Marker: p.marker(rec.ID)}
	if rec.Process != nil {
		t.Root = *rec.Process
	}
	var errs []error
	cg, err := p.cgroup(rec)
	if err != nil {
		errs = append(errs, err)
	}
	if cg != nil {
		t.Cgroup, t.Contained = cg, rec.Contained
	}
	// What is our child has to leave the process table, too.
	children := []proctree.ID{t.Root}
	if rec.Process == nil {
		children, _ = proctree.Marked(t.Marker)
	}
	errs = append(errs, proctree.KillAll(ctx, t))
	for _, child := range children {
		exitStatus(child)
	}
	if t.Cgroup != nil {
		errs = append(errs, t.Cgroup.Remove(ctx))
	}
	return errors.Join(errs...)
}

// cgroup opens the machine's, nil where there is none.
func (p *Provider) cgroup(rec record) (*proctree.Cgroup, error) {
	path := rec.Cgroup
	if path == "" { // a damaged record, perhaps: it is where this process would have put it
		path = p.cgroupPath(rec.ID)
	}
	// Only one that a provider made for this machine, perhaps below the same Root
	// by another path.
	if name := filepath.Base(path); !strings.HasPrefix(name, cgroupPrefix) || !strings.HasSuffix(name, "-"+rec.ID) {
		return nil, nil
	}
	cg, err := proctree.OpenCgroup(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errors.ErrUnsupported) {
		return nil, nil
	}
	return cg, err
}

// removeCgroup is for a machine without processes.
func (p *Provider) removeCgroup(ctx context.Context, rec record) error {
	cg, err := p.cgroup(rec)
	if err != nil || cg == nil {
		return err
	}
	return cg.Remove(ctx)
}

// publish tells the watchers how the machine is now.
func (p *Provider) publish(id string) {
	inst, err := p.get(id)
	if err != nil {
		inst = p.instance(record{intent: intent{ID: id}}, vmprovider.StateGone, "")
		p.mu.Lock()
		delete(p.attended, id)
		p.mu.Unlock()
	}
	p.notifier.Publish(inst)
}
