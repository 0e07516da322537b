package solstice

import (
	"context"
	"errors"
	"iter"
	"log/slog"
	"time"

	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

// Peers reaches the other engines of an installation. Package
// solstice/orchestrator has one that speaks solstice.orchestrator.v1.
type Peers interface {
	// Tail yields what the engine at addr, its Config.PeerAddr, knows of an
	// attempt's log from a byte offset on, as its LocalLog does. It does not try
	// again: the error comes with the last pair.
	Tail(ctx context.Context, addr, attemptID string, from int64) iter.Seq2[logstream.Chunk, error]
}

// peerRetry is how long a peer is left alone that failed.
const peerRetry = 10 * time.Second

// errMoved ends a reading when another engine receives the log by now.
var errMoved = errors.New("solstice: the log is read elsewhere by now")

// tail follows a log where it is known first: at the engine that receives it,
// and while that cannot be asked in what is stored.
func (e *Engine) tail(ctx context.Context, a *store.Attempt, from int64) iter.Seq2[logstream.Chunk, error] {
	if e.cfg.Peers == nil {
		return e.logs.Tail(ctx, a.LogStream, from)
	}
	return func(yield func(logstream.Chunk, error) bool) {
		t := peerTail{e: e, attempt: a, from: from, pos: from}
		t.follow(ctx, yield)
	}
}

// peerTail is how far a log was followed.
type peerTail struct {
	e       *Engine
	attempt *store.Attempt
	from    int64
	pos     int64
	failed  string // the peer that failed last
	failedT time.Time
}

func (t *peerTail) follow(ctx context.Context, yield func(logstream.Chunk, error) bool) {
	pass := func(c logstream.Chunk) bool {
		t.pos = c.Offset + int64(len(c.Data))
		return yield(c, nil)
	}
	for {
		if peer, err := t.peer(ctx); err == nil && peer != "" {
			stopped, moved, err := t.read(ctx, peer, pass)
			if stopped || err == nil {
				return
			}
			if !moved {
				level := slog.LevelDebug
				if peer != t.failed {
					level = slog.LevelWarn
				}
				t.e.log.Log(ctx, level, "peer does not tell a log", "peer", peer, "attempt", t.attempt.ID, "error", err)
				t.failed, t.failedT = peer, time.Now()
			}
		}
		stopped, moved, err := t.read(ctx, "", pass)
		var beyond *logstream.OffsetError
		switch {
		case stopped || err == nil:
			return
		case moved && ctx.Err() == nil:
			continue
		case errors.As(err, &beyond) && t.from <= beyond.Want && beyond.Want < t.pos:
			// The peer showed more than became durable, and the attempt was lost
			// with it: the log ends before what was shown.
			return
		}
		yield(logstream.Chunk{}, err)
		return
	}
}

// read passes on what a peer tells, or with none what is stored. stopped: the
// reader wants no more; moved: it is to be read elsewhere by now.
func (t *peerTail) read(ctx context.Context, peer string, pass func(logstream.Chunk) bool) (stopped, moved bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	go func() { defer close(watched); t.watch(ctx, peer, cancel) }()
	defer func() {
		moved = errors.Is(context.Cause(ctx), errMoved)
		cancel(nil)
		<-watched
	}()
	chunks := t.e.logs.Tail(ctx, t.attempt.LogStream, t.pos)
	if peer != "" {
		chunks = t.e.cfg.Peers.Tail(ctx, peer, t.attempt.ID, t.pos)
	}
	for c, err := range chunks {
		if err != nil {
			return false, false, err
		}
		if !pass(c) {
			return true, false, nil
		}
	}
	return false, false, nil
}

// peer is the one to ask now; empty: none.
func (t *peerTail) peer(ctx context.Context) (string, error) {
	addr, err := t.e.store.AttemptPeer(ctx, t.attempt.ID, t.e.id)
	if err != nil || addr == t.failed && time.Since(t.failedT) < peerRetry {
		return "", err
	}
	return addr, nil
}

// watch ends a reading once there is another peer to ask, or none.
func (t *peerTail) watch(ctx context.Context, peer string, cancel context.CancelCauseFunc) {
	tick := time.NewTicker(followTick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			// Without an answer it is read on as it was.
			if now, err := t.peer(ctx); err == nil && now != peer {
				cancel(errMoved)
				return
			}
		}
	}
}
