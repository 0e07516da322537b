package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
)

// ErrPanic: a fault of this package. The job was killed.
var ErrPanic = errors.New("agent: panic")

// RunInside is Run inside a process that is more than an agent: the Runner of a
// process pool whose jobs are trusted. bootstrap is the content of a bootstrap
// file (LoadBootstrap), console gets the log. It changes nothing of the process:
// no signal handlers, no working directory, no subreaper; children of the
// process that are not the job's are left alone.
func RunInside(ctx context.Context, bootstrap []byte, console io.Writer) error {
	return runInside(ctx, bootstrap, console, nil)
}

func runInside(ctx context.Context, bootstrap []byte, console io.Writer, local *Local) error {
	cfg, err := parseBootstrap(bootstrap)
	if err != nil {
		return err
	}
	cfg.Logger = slog.New(slog.NewTextHandler(console, nil))
	cfg.Version = buildVersion()
	cfg.local = local
	return Run(ctx, cfg)
}

// guard runs f, the body of a goroutine. A panic in it ends the agent with an
// error, not its process: there may be other agents in it.
func (a *agent) guard(f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("%w: %v", ErrPanic, v)
			a.log.Error("panic: giving up", "panic", v, "stack", string(debug.Stack()))
			a.stop(err)
		}
	}()
	return f()
}

// spawn is guard in a goroutine of its own.
func (a *agent) spawn(f func()) {
	go func() { _ = a.guard(func() error { f(); return nil }) }()
}
