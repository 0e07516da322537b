package solstice

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

// followTick is how often a follower looks by itself, for changes that another
// engine made.
const followTick = time.Second

// Watch yields the run with its jobs, now and after every change, until it is
// terminal. Changes may be coalesced. The error comes with the last pair.
func (e *Engine) Watch(ctx context.Context, runID string) iter.Seq2[Run, error] {
	return func(yield func(Run, error) bool) {
		changed, unsubscribe := e.hub.subscribe(runID)
		defer unsubscribe()
		tick := time.NewTicker(followTick)
		defer tick.Stop()
		version := int64(-1)
		for {
			row, err := e.store.Run(ctx, runID)
			if err == nil && row.Version != version {
				var jobs []*store.Job
				// They may be newer than the run's row; the next round is then soon.
				if jobs, err = e.store.Jobs(ctx, runID); err == nil {
					version = row.Version
					if r := publicRun(row, jobs); !yield(r, nil) || r.State.Terminal() {
						return
					}
				}
			}
			if err != nil {
				yield(Run{}, e.publicError("run "+runID, err))
				return
			}
			select {
			case <-ctx.Done():
				yield(Run{}, ctx.Err())
				return
			case <-changed:
			case <-tick.C:
			}
		}
	}
}

// Log yields an attempt's log from a byte offset and follows it until the
// attempt is over and all of it was yielded. The error comes with the last
// pair; an unknown attempt wraps ErrNotFound, a log that retention has removed,
// also while it is read, ErrRemoved.
//
// What another engine is receiving comes from there, through Config.Peers, and
// from what is stored while it cannot be asked.
func (e *Engine) Log(ctx context.Context, attemptID string, from int64) iter.Seq2[logstream.Chunk, error] {
	return e.readLog(ctx, attemptID, from, e.tail)
}

// LocalLog is Log of what this engine receives and of what is stored, for a
// peer that asks: it asks nobody else.
func (e *Engine) LocalLog(ctx context.Context, attemptID string, from int64) iter.Seq2[logstream.Chunk, error] {
	return e.readLog(ctx, attemptID, from, func(ctx context.Context, a *store.Attempt, from int64) iter.Seq2[logstream.Chunk, error] {
		return e.logs.Tail(ctx, a.LogStream, from)
	})
}

func (e *Engine) readLog(ctx context.Context, attemptID string, from int64,
	tail func(context.Context, *store.Attempt, int64) iter.Seq2[logstream.Chunk, error],
) iter.Seq2[logstream.Chunk, error] {
	return func(yield func(logstream.Chunk, error) bool) {
		a, err := e.store.Attempt(ctx, attemptID)
		if err == nil && AttemptState(a.State).Terminal() {
			err = e.logKept(ctx, a)
		}
		if err != nil {
			yield(logstream.Chunk{}, e.publicError("attempt "+attemptID, err))
			return
		}
		ctx, cancel := context.WithCancelCause(ctx)
		ended := make(chan struct{})
		go func() { defer close(ended); cancel(e.attendLog(ctx, a.ID)) }()
		defer func() { cancel(nil); <-ended }()
		for c, err := range tail(ctx, a, from) {
			if err != nil && (errors.Is(err, logstream.ErrNotFound) || errors.Is(context.Cause(ctx), store.ErrRemoved) ||
				errors.Is(e.logKept(ctx, a), store.ErrRemoved)) {
				err = e.publicError("log of attempt "+attemptID, store.ErrRemoved)
			}
			if !yield(c, err) || err != nil {
				return
			}
		}
	}
}

// logKept wraps ErrRemoved when the log of an attempt was removed.
func (e *Engine) logKept(ctx context.Context, a *store.Attempt) error {
	kept, err := e.store.RunRetention(ctx, a.RunID)
	if errors.Is(err, store.ErrNotFound) || err == nil && !kept.HasLogs() {
		return fmt.Errorf("%w: log of attempt %s", store.ErrRemoved, a.ID)
	}
	return err
}

// attendLog looks after a log that is read, until ctx ends or retention removes
// the log: then it returns an error that wraps store.ErrRemoved, since a reader
// would wait for the stream to come. And a log which nobody writes any more gets
// its end: the engine that gave the attempt up may have died before it sealed
// the log.
func (e *Engine) attendLog(ctx context.Context, attemptID string) error {
	changed, unsubscribe := e.hub.subscribe(attemptID)
	defer unsubscribe()
	tick := time.NewTicker(followTick)
	defer tick.Stop()
	for sealed := false; ; {
		a, err := e.store.Attempt(ctx, attemptID)
		over := err == nil && AttemptState(a.State).Terminal()
		switch {
		case errors.Is(err, store.ErrNotFound):
			return fmt.Errorf("%w: attempt %s", store.ErrRemoved, attemptID)
		case over:
			err := e.logKept(ctx, a)
			if err == nil && a.State == store.AttemptLost && !sealed {
				err, sealed = e.sealRead(ctx, a), true
			}
			if errors.Is(err, store.ErrRemoved) {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-tick.C:
		}
	}
}

// sealRead is sealLost for a reader: a seal makes the log again that retention
// has removed since we looked. So it looks again, and is brought to its end
// even if nobody waits any more.
func (e *Engine) sealRead(ctx context.Context, a *store.Attempt) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	e.sealLost(ctx, a.LogStream, a.Epoch)
	err := e.logKept(ctx, a)
	if errors.Is(err, store.ErrRemoved) {
		if derr := e.logs.Delete(ctx, a.LogStream); derr != nil {
			e.log.WarnContext(ctx, "removed log not deleted again", "stream", a.LogStream, "error", derr)
		}
	}
	return err
}

// JobChunk is a piece of a job's log, or the boundary before an attempt's.
type JobChunk struct {
	// Attempt the chunk belongs to. Begin is true for the boundary: then Chunk
	// is empty.
	Attempt Attempt
	Begin   bool
	Chunk   logstream.Chunk
}

// FollowJob yields the logs of all attempts of a job, one after the other, each
// after a boundary, until the job is terminal. A job that never had an attempt
// yields nothing.
func (e *Engine) FollowJob(ctx context.Context, jobID string) iter.Seq2[JobChunk, error] {
	return e.FollowJobFrom(ctx, jobID, 1, 0)
}

// FollowJobFrom is FollowJob beginning at a byte offset of an attempt, which is
// named by its number.
func (e *Engine) FollowJobFrom(ctx context.Context, jobID string, attempt int, from int64) iter.Seq2[JobChunk, error] {
	return func(yield func(JobChunk, error) bool) {
		changed, unsubscribe := e.hub.subscribe(jobID)
		defer unsubscribe()
		tick := time.NewTicker(followTick)
		defer tick.Stop()
		for next := 0; ; {
			job, err := e.store.Job(ctx, jobID)
			if err != nil {
				yield(JobChunk{}, e.publicError("job "+jobID, err))
				return
			}
			attempts, err := e.logAttempts(ctx, job)
			if err != nil {
				yield(JobChunk{}, err)
				return
			}
			for ; next < len(attempts); next++ {
				a := attempts[next]
				if a.Number < attempt {
					continue
				}
				offset := int64(0)
				if a.Number == attempt {
					offset = from
				}
				if !yield(JobChunk{Attempt: a, Begin: true}, nil) {
					return
				}
				for c, err := range e.Log(ctx, a.ID, offset) {
					if !yield(JobChunk{Attempt: a, Chunk: c}, err) || err != nil {
						return
					}
				}
			}
			if job.State.Terminal() {
				return
			}
			select {
			case <-ctx.Done():
				yield(JobChunk{}, ctx.Err())
				return
			case <-changed:
			case <-tick.C:
			}
		}
	}
}
