//go:build unix

package processvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"runtime/debug"

	"github.com/solstice-ci/solstice-go/internal/proctree"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

// Runner runs an agent inside this process. bootstrap is what an agent process
// would read, a BootstrapFile as JSON; what the agent prints goes to console. It
// returns once the agent's job is over and all processes of it have ended, and
// soon after ctx has ended. Where it could not end all of them its error has, or
// wraps one that has, a method ProcessesLeft() bool that says so. A panic ends
// the machine; one in a goroutine that Runner starts is Runner's to catch.
type Runner func(ctx context.Context, bootstrap []byte, console io.Writer) error

// Why the machines inside a process end with it.
var errClosing = errors.New("the process that it ran inside was stopped")

// resident is a machine inside this process.
type resident struct {
	rec     record
	console memoryConsole
	cancel  context.CancelCauseFunc
	done    chan struct{} // closed when the agent has ended
	exit    string        // how; valid then
	left    bool          // and perhaps left processes; valid then
}

func (p *Provider) resident(id string) *resident {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.residents[id]
}

// now is the machine's record as it is at the moment.
func (r *resident) now() record {
	rec := r.rec
	select {
	case <-r.done:
		rec.Exit = r.exit
	default:
	}
	return rec
}

// settle starts the agent of a machine whose directory is complete.
func (p *Provider) settle(rec record, bootstrap []byte) (record, error) {
	if rec.Cgroup != "" {
		if _, err := proctree.MakeCgroup(rec.Cgroup); err != nil {
			p.log.Debug("no cgroup for a machine", "machine", rec.ID, "error", err)
		} else {
			p.cfg.failpoint("cgroup")
		}
	}
	r := &resident{rec: rec, done: make(chan struct{})}
	r.console.limit = p.cfg.ConsoleBytes
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(p.ctx))
	r.cancel = cancel
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		cancel(nil)
		return rec, vmprovider.ErrClosed
	}
	p.residents[rec.ID] = r
	p.busy.Add(1)
	p.mu.Unlock()
	go func() {
		defer p.busy.Done()
		defer cancel(nil)
		defer context.AfterFunc(p.ctx, func() { cancel(errClosing) })()
		r.left = true
		err := errors.New("its goroutine was ended")
		defer func() { p.agentEnded(r, err) }()
		err = p.runAgent(ctx, bootstrap, r)
	}()
	return rec, nil
}

// agentEnded notes how an agent ended and tells the watchers.
func (p *Provider) agentEnded(r *resident, err error) {
	r.exit = "the agent ended"
	if err != nil {
		r.exit += ": " + err.Error()
	}
	close(r.done)
	if unlock, err := p.locks.Lock(p.ctx, r.rec.ID); err == nil {
		p.publish(r.rec.ID)
		unlock()
	}
}

// runAgent is one agent's life.
func (p *Provider) runAgent(ctx context.Context, bootstrap []byte, r *resident) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("panic: %v", v)
			p.log.Error("an agent inside this process panicked", "panic", v)
			fmt.Fprintf(&r.console, "panic: %v\n%s", v, debug.Stack())
		} else if err != nil {
			fmt.Fprintln(&r.console, err)
		}
	}()
	err = p.cfg.Runner(ctx, bootstrap, &r.console)
	var l interface{ ProcessesLeft() bool }
	r.left = errors.As(err, &l) && l.ProcessesLeft()
	return err
}

// evict ends a machine inside this process and gives what is known of it then.
// bare says that no process of it is left.
func (p *Provider) evict(ctx context.Context, r *resident) (rec record, bare bool, err error) {
	r.cancel(errDestroyed)
	select {
	case <-r.done:
		return r.now(), !r.left, nil
	case <-ctx.Done():
		return r.now(), false, fmt.Errorf("its agent does not end: %w", context.Cause(ctx))
	}
}

// leave writes down, at Close, how the machines inside this process ended, and
// ends what an agent that failed has left.
func (p *Provider) leave() error {
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
	defer cancel()
	var errs []error
	for _, r := range p.residents {
		rec := r.now()
		errs = append(errs, p.saveStatus(rec))
		if r.left {
			errs = append(errs, p.kill(ctx, rec))
		}
	}
	return errors.Join(errs...)
}

// elsewhere says that a machine runs inside another process, or another provider
// of this one, and cannot be ended from here.
func (p *Provider) elsewhere(r record) bool {
	p.mu.Lock()
	_, ours := p.creating[r.ID]
	p.mu.Unlock()
	return !ours && r.Inside && r.Exit == "" && r.Destroying == "" && r.Creator.Alive()
}

// bootstrapOf is what the agent is told.
func (p *Provider) bootstrapOf(rec record, b vmprovider.Bootstrap) ([]byte, error) {
	dir := filepath.Join(p.cfg.Root, rec.ID)
	f := BootstrapFile{
		Bootstrap: b, Env: p.cfg.StepEnv,
		StateDir: filepath.Join(dir, stateDir), WorkDir: filepath.Join(dir, workDir),
	}
	if rec.Inside {
		f.Cgroup = rec.Cgroup
		return json.Marshal(f)
	}
	return json.MarshalIndent(f, "", "  ")
}
