package solstice

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

// lose ends an attempt whose journal will never come to its end: the job is
// queued again, or ends with the class's state when its retries are used up.
// Losing an attempt that is over, or that changed hands since a was read, does
// nothing.
func (e *Engine) lose(ctx context.Context, a *store.Attempt, given Class, reason, console string) {
	lost, class := false, given
	var epoch int64
	var trace string
	err := e.withRun(ctx, a.RunID, func(ctx context.Context, t *store.RunTx) error {
		lost = false
		now, err := t.Attempt(ctx, a.ID)
		if err != nil {
			return err
		}
		if AttemptState(now.State).Terminal() || now.Epoch != a.Epoch {
			return nil
		}
		if given == ClassNoAnswer && now.State != store.AttemptAssigned {
			return nil // it answered
		}
		class = given
		if class == ClassNoAnswer && !e.mayRetry(t, a.JobID, class) {
			class = ClassAgentLost
		}
		loss := store.Loss{Class: string(class), Reason: reason, Console: console}
		switch {
		case now.CancelReason != "":
			loss.Class, loss.JobState, loss.Reason = string(ClassCancelled), store.JobCancelled, now.CancelReason
		case class == ClassUser:
			loss.JobState = store.JobFailed
		case class == ClassTimeout:
			loss.JobState = store.JobTimedOut
		case e.mayRetry(t, a.JobID, class):
			loss.Retry = true
		default:
			loss.JobState = store.JobErrored
		}
		lost, epoch, trace = true, now.Epoch+1, t.Run.Trace
		return t.LoseAttempt(ctx, store.AttemptRef{ID: a.ID, Epoch: now.Epoch}, loss)
	})
	if err != nil {
		e.log.WarnContext(ctx, "attempt not given up yet", "attempt", a.ID, "class", class, "error", err)
		return
	}
	if !lost {
		return
	}
	e.log.WarnContext(ctx, "attempt lost", "run_id", a.RunID, "job_id", a.JobID, "attempt", a.Number, "class", class, "reason", reason)
	e.metrics.attemptLost(class)
	e.sealLost(ctx, a.LogStream, epoch)
	e.attemptOver(a, trace)
}

// sealLost ends the log of an attempt that nobody writes any more.
func (e *Engine) sealLost(ctx context.Context, stream string, epoch int64) {
	err := e.logs.Seal(ctx, stream, logstream.SealOptions{Epoch: epoch, Size: -1})
	if err != nil && !errors.Is(err, logstream.ErrSealed) && !errors.Is(err, logstream.ErrNotFound) { // retention was faster
		e.log.WarnContext(ctx, "log of a lost attempt not sealed", "stream", stream, "error", err)
	}
}

// attemptOver cleans up after an attempt that reached a terminal state: its
// session ends, its slot frees, and its machine goes, now if the pool is ours,
// by the sweep of whoever has the pool otherwise. trace is the run's.
func (e *Engine) attemptOver(a *store.Attempt, trace string) {
	e.hub.notify(a.ID)
	e.freeSlot(a.ID)
	e.background(func() {
		ctx := withTraceParent(context.Background(), trace)
		m, err := e.store.Machine(ctx, a.MachineID)
		if err != nil {
			e.log.Warn("machine of a finished attempt not read, the sweep will find it", "machine", a.MachineID, "error", err)
			return
		}
		e.destroy(ctx, m)
	})
}

// discard gets rid of a machine that has no attempt, or one that is over.
func (e *Engine) discard(ctx context.Context, m *store.Machine, why string) {
	var err error
	done := true
	if m.AttemptID == "" {
		done, err = e.store.DiscardIdle(ctx, m.ID, why) // unless it has got one since
	} else {
		err = e.store.MachineDestroying(ctx, m.ID, why)
	}
	if err != nil {
		e.log.WarnContext(ctx, "machine not marked for destruction", "machine", m.ID, "error", err)
		return
	}
	if !done {
		return
	}
	e.background(func() { e.destroy(context.WithoutCancel(ctx), m) })
}

// destroy removes a machine in state destroying and records that it is gone,
// which lets a retry of its job begin. It gives up after a while: the sweep
// tries again.
func (e *Engine) destroy(ctx context.Context, m *store.Machine) {
	p := e.poolNamed(m.Pool)
	if p == nil || p.Host != m.Host {
		return
	}
	p.mu.Lock()
	if _, busy := p.destroying[m.ID]; busy {
		p.mu.Unlock()
		return
	}
	p.destroying[m.ID] = struct{}{}
	cancelCreate := p.creating[m.ID]
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.destroying, m.ID)
		p.mu.Unlock()
	}()
	if cancelCreate != nil {
		cancelCreate()
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	ctx, span := e.tracer.Start(ctx, "machine.destroy")
	defer span.End()
	_, err := backoff.Retry(ctx, func() (struct{}, error) {
		return struct{}{}, p.Provider.Destroy(ctx, m.ID, vmprovider.DestroyOptions{})
	}, backoff.WithMaxTries(5))
	if err != nil {
		span.RecordError(err)
		e.log.WarnContext(ctx, "machine not destroyed yet", "machine", m.ID, "pool", m.Pool, "error", err)
		return
	}
	labels, err := e.store.MachineGone(ctx, m.ID)
	if err != nil {
		e.log.WarnContext(ctx, "machine destroyed but not recorded yet", "machine", m.ID, "error", err)
		return
	}
	e.kickHost(m.Host)
	if len(labels) > 0 {
		e.wake(labels)
	}
	e.hub.notify(m.ID)
}

// watchLoop acts at once when the provider says that a machine stopped.
func (p *pool) watchLoop(ctx context.Context) {
	w, ok := vmprovider.As[vmprovider.Watcher](p.Provider)
	if !ok {
		return
	}
	retry := backoff.NewExponentialBackOff()
	for ctx.Err() == nil {
		// It begins with all machines as they are: the sweep could be slow.
		for inst, err := range w.Watch(ctx) {
			if err != nil {
				if ctx.Err() == nil {
					p.e.log.WarnContext(ctx, "watching machines was interrupted", "pool", p.Name, "error", err)
				}
				break
			}
			retry.Reset()
			if inst.ID == "" {
				continue // the end of the first list
			}
			if inst.State == vmprovider.StateStopped || inst.State == vmprovider.StateGone {
				p.e.background(func() { p.stopped(ctx, inst.ID, inst.Reason) })
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(retry.NextBackOff()):
		}
	}
}

// stopped handles a machine of ours that runs no more, or is not there any
// more. A job that just finished stops its machine by itself: what its agent
// had sent is let through first.
func (p *pool) stopped(ctx context.Context, id, reason string) {
	e := p.e
	p.mu.Lock()
	_, creating := p.creating[id]
	p.mu.Unlock()
	if creating {
		return // a creation that failed says so itself; what else stops that soon, the sweep finds
	}
	e.mu.Lock()
	s := e.sessions[id]
	e.mu.Unlock()
	if s != nil {
		select {
		case <-s.done:
		case <-time.After(5 * time.Second):
		case <-ctx.Done():
			return
		}
	}
	// What is begun is brought to its end, also when the engine stops.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	m, err := e.store.Machine(ctx, id)
	if err != nil {
		if !errors.Is(err, store.ErrNotFound) {
			e.log.WarnContext(ctx, "stopped machine not read, the sweep will find it", "machine", id, "error", err)
		}
		return
	}
	if m.Pool != p.Name {
		return // another pool has this hypervisor too, and knows where the console is
	}
	p.over(ctx, m, whyStopped(reason))
}

// whyStopped says it with the provider's reason, where there is one.
func whyStopped(reason string) string {
	if reason == "" {
		return "its machine stopped"
	}
	return "its machine stopped: " + reason
}

// over ends what depends on a machine that is known not to run.
func (p *pool) over(ctx context.Context, m *store.Machine, why string) {
	e := p.e
	switch m.State {
	case store.MachineGone, store.MachineDestroying:
		return
	}
	if m.AttemptID == "" {
		if now, err := e.store.Now(ctx); err == nil && m.LeaseUntil <= now {
			e.discard(ctx, m, why) // its engine died: no fault of the machine's
			return
		}
		if m.State == store.MachineProvisioning {
			why += lastLine(p.console(ctx, m.ID))
		}
		e.warmFailed(ctx, m, why)
		return
	}
	a, err := e.store.Attempt(ctx, m.AttemptID)
	if err != nil {
		e.log.WarnContext(ctx, "attempt not read", "attempt", m.AttemptID, "error", err)
		return
	}
	if AttemptState(a.State).Terminal() {
		e.discard(ctx, m, why)
		return
	}
	if m.State == store.MachineProvisioning {
		e.lose(ctx, a, ClassBoot, "its machine stopped before its agent attached", p.console(ctx, m.ID))
		return
	}
	e.lose(ctx, a, ClassAgentLost, why, p.console(ctx, m.ID))
}

// console gives the end of what a machine printed, where the provider keeps it.
func (p *pool) console(ctx context.Context, id string) string {
	c, ok := vmprovider.As[vmprovider.Consoler](p.Provider)
	if !ok {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	r, err := c.Console(ctx, id, false)
	if err != nil {
		p.e.log.DebugContext(ctx, "console not readable", "machine", id, "error", err)
		return ""
	}
	defer func() { _ = r.Close() }()
	const keep = 16 << 10
	tail, buf := make([]byte, 0, 2*keep), make([]byte, keep)
	for {
		n, err := r.Read(buf)
		tail = append(tail, buf[:n]...)
		if len(tail) > keep {
			tail = append(tail[:0], tail[len(tail)-keep:]...)
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				p.e.log.DebugContext(ctx, "console cut short", "machine", id, "error", err)
			}
			return printable(tail)
		}
	}
}
