package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// stopped says that, and why, a job has to end.
type stopped struct {
	kind   stopKind
	reason string
}

// A watch notices what ends a job from outside: a Cancel, the job's timeout,
// the end of its context. It belongs to one job.
type watch struct {
	kill  chan struct{} // closed when nothing may run any more
	first chan struct{} // closed at the first reason to end
	quit  chan struct{}
	done  sync.WaitGroup

	mu      sync.Mutex
	state   stopped
	grace   time.Duration // of a Cancel that says
	cleanup time.Time     // until when steps after the stop may run; zero before
}

// watch starts watching.
func (j *job) watch(ctx context.Context) *watch {
	w := &watch{
		kill: make(chan struct{}), first: make(chan struct{}), quit: make(chan struct{}), grace: j.grace,
	}
	w.done.Go(func() {
		err := j.a.guard(func() error {
			j.a.cfg.failpoint("watch")
			w.loop(ctx, j.cancel, j.spec.GetLimits().GetJobTimeout().AsDuration())
			return nil
		})
		if err != nil {
			w.end(stopped{stopKill, err.Error()})
		}
	})
	return w
}

func (w *watch) loop(ctx context.Context, cancel <-chan cancelRequest, limit time.Duration) {
	var timeout <-chan time.Time
	if limit > 0 {
		t := time.NewTimer(limit)
		defer t.Stop()
		timeout = t.C
	}
	for {
		select {
		case <-w.quit:
			return
		case c := <-cancel:
			cancel, timeout = nil, nil
			reason := "cancelled"
			if c.reason != "" {
				reason = "cancelled: " + c.reason
			}
			w.set(stopped{stopCancel, reason}, c.grace)
		case <-timeout:
			cancel, timeout = nil, nil
			w.set(stopped{stopTimeout, fmt.Sprintf("the job took longer than %s", limit)}, 0)
		case <-ctx.Done():
			kind := stopKill
			cause := context.Cause(ctx)
			if isInfra(cause) {
				kind = stopBroken
			}
			w.end(stopped{kind, cause.Error()})
			return
		}
	}
}

// end is the last thing that is noticed.
func (w *watch) end(s stopped) {
	w.set(s, 0)
	close(w.kill)
}

func (w *watch) set(s stopped, grace time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.state.kind == notStopping {
		close(w.first)
	}
	w.state = s
	if grace > 0 {
		w.grace = grace
	}
}

// poll says whether the job has to end.
func (w *watch) poll() stopped {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.state
}

// graceTime is between SIGTERM and SIGKILL.
func (w *watch) graceTime() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.grace
}

// cleanupTime is how long steps may still run after the stop: the grace, from
// the first time it is asked for.
func (w *watch) cleanupTime() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.cleanup.IsZero() {
		w.cleanup = time.Now().Add(w.grace)
	}
	return time.Until(w.cleanup)
}

func (w *watch) cleanupOver() bool { return w.cleanupTime() <= 0 }

// context is for work inside the agent that has to end when the step's time is
// up or the job is stopped; already says that it runs although the job was.
func (w *watch) context(ctx context.Context, limit time.Duration, already bool) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	first := w.first
	var timeout, cleanup <-chan time.Time
	stopTimers := func() {}
	if limit > 0 {
		t := time.NewTimer(limit)
		timeout, stopTimers = t.C, func() { t.Stop() }
	}
	if already {
		first = nil
		cleanup = time.After(w.cleanupTime())
	}
	var done sync.WaitGroup
	done.Go(func() {
		defer stopTimers()
		select {
		case <-timeout:
			cancel(&stepTimeout{limit})
		case <-first:
			cancel(errStopped)
		case <-cleanup:
			cancel(fmt.Errorf("%w: no time left", errStopped))
		case <-ctx.Done():
		}
	})
	return ctx, func() {
		cancel(nil)
		done.Wait()
	}
}

func (w *watch) close() {
	close(w.quit)
	w.done.Wait()
}

// stepTimeout is the error of a step that took too long.
type stepTimeout struct{ limit time.Duration }

func (e *stepTimeout) Error() string { return fmt.Sprintf("took longer than %s", e.limit) }

var errStopped = errors.New("agent: the job is being stopped")
