//go:build unix

package processvm

import (
	"context"
	"errors"
	"os"

	"github.com/solstice-ci/solstice-go/internal/proctree"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

// attend watches for the exit of a machine's process, once.
func (p *Provider) attend(id string, proc proctree.ID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.attended[id] == proc {
		return
	}
	p.attended[id] = proc
	p.busy.Add(1)
	go func() {
		defer p.busy.Done()
		if err := proc.Wait(p.ctx); err != nil {
			if p.ctx.Err() == nil {
				p.log.Error("cannot watch a machine's process", "machine", id, "error", err)
			}
			return
		}
		if err := p.exited(id, proc); err != nil && p.ctx.Err() == nil {
			p.log.Warn("cannot record a machine's exit", "machine", id, "error", err)
		}
	}()
}

// exited writes down how the process ended and tells the watchers.
func (p *Provider) exited(id string, proc proctree.ID) error {
	unlock, err := p.locks.Lock(p.ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	defer p.publish(id)
	reason := "the agent ended"
	if st := exitStatus(proc); st != nil {
		reason += ": " + st.String()
	}
	rec, err := p.load(id)
	if err != nil || rec.Destroying != "" || rec.Exit != "" || rec.Process == nil || *rec.Process != proc {
		return nil // destroyed, or written down by another process
	}
	rec.Exit = reason
	return p.saveStatus(rec)
}

// exitStatus takes the exit status of a child that has ended, and with it the
// child out of the process table; nil: it is not ours to take. A machine's
// process is waited for by identity and not through what started it, since a
// later provider of the same process may have to.
func exitStatus(proc proctree.ID) *os.ProcessState {
	p, err := proctree.Lookup(proc.PID)
	if err != nil || p.ID != proc || !p.Zombie || p.PPID != os.Getpid() {
		return nil
	}
	child, err := os.FindProcess(proc.PID)
	if err != nil {
		return nil
	}
	st, err := child.Wait()
	if err != nil {
		return nil // another provider of this process was faster
	}
	return st
}

// running are the machines whose process is being watched.
func (p *Provider) running() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	ids := make([]string, 0, len(p.attended))
	for id, proc := range p.attended {
		if proc.Alive() {
			ids = append(ids, id)
		}
	}
	return ids
}

// stopped says whether nothing of the machine prints any more.
func (p *Provider) stopped(ctx context.Context, id string) (bool, error) {
	inst, err := p.Get(ctx, id)
	if errors.Is(err, vmprovider.ErrNotFound) {
		return true, nil
	}
	return err == nil && inst.State != vmprovider.StateRunning && inst.State != vmprovider.StateCreating, err
}
