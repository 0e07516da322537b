// Package relay publishes the outbox of a store: in order per key, deleted after the
// queue has a message for good, so that a crash in between sends it twice.
package relay

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/solstice-ci/solstice-go/internal/grace"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/queue"
)

// every is the least time between two looks into the outbox. What comes first goes
// at once; what follows is merged, so that of a short job's statuses most are never
// sent.
const every = 100 * time.Millisecond

// Relay is one of those that publish a store's outbox.
type Relay struct {
	Store *store.Store
	Queue queue.Queue
	// Owner is who claims messages, for Lease.
	Owner string
	Lease time.Duration
	// Tick is how often it looks without being kicked.
	Tick   time.Duration
	Kick   <-chan struct{}
	Logger *slog.Logger
	// Grace is how long it goes on after Run's context has ended, to publish what is
	// in the outbox by then.
	Grace time.Duration
	// Noted may look at an error before it is logged.
	Noted func(error) error
}

// Run publishes until ctx ends.
func (r *Relay) Run(ctx context.Context) {
	const batch = 256
	work, cancel := grace.Context(ctx, r.Grace)
	defer cancel()
	tick := time.NewTicker(r.Tick)
	defer tick.Stop()
	retry := backoff.NewExponentialBackOff()
	for {
		began := time.Now()
		n, err := r.publish(work, batch)
		switch {
		case ctx.Err() != nil && (err != nil || n < batch):
			return
		case err != nil:
			if r.Noted != nil {
				err = r.Noted(err)
			}
			r.Logger.WarnContext(ctx, "outbox not relayed", "error", err)
			sleep(ctx, retry.NextBackOff())
			continue
		case n > 0: // there may be more
			retry.Reset()
			if n < batch {
				sleep(ctx, every-time.Since(began))
			}
			continue
		}
		select {
		case <-ctx.Done(): // once more
		case <-r.Kick:
		case <-tick.C:
		}
	}
}

// sleep ends early with ctx.
func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

func (r *Relay) publish(ctx context.Context, limit int) (int, error) {
	msgs, err := r.Store.OutboxClaim(ctx, r.Owner, limit, r.Lease)
	if err != nil || len(msgs) == 0 {
		return 0, err
	}
	byTopic := map[string][]*store.OutboxMessage{}
	for _, m := range msgs {
		byTopic[m.Topic] = append(byTopic[m.Topic], m)
	}
	var done []int64
	var errs []error
	for topic, ms := range byTopic {
		out := make([]queue.Message, len(ms))
		for i, m := range ms {
			out[i] = queue.Message{ID: fmt.Sprintf("%s-%d", r.Store.Installation(), m.ID), Body: m.Body, ContentType: m.ContentType}
			if len(m.Attributes) > 0 {
				if err := json.Unmarshal(m.Attributes, &out[i].Attributes); err != nil {
					return 0, fmt.Errorf("relay: attributes of message %d: %w", m.ID, err)
				}
			}
		}
		err := r.Queue.Publish(ctx, topic, out, queue.PublishOptions{})
		var partly *queue.PublishError
		switch {
		case err == nil:
			for _, m := range ms {
				done = append(done, m.ID)
			}
		case errors.As(err, &partly):
			errs = append(errs, err)
			failedKeys := map[string]bool{} // nothing of a key overtakes what failed
			for i, m := range ms {
				if partly.Failed[i] != nil {
					failedKeys[m.Key] = true
				} else if !failedKeys[m.Key] {
					done = append(done, m.ID)
				}
			}
		default:
			errs = append(errs, err)
		}
	}
	// Told even when we stop just now: what was published must not go out again.
	after, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if len(done) > 0 {
		errs = append(errs, r.Store.OutboxDone(after, done...))
	}
	if len(done) < len(msgs) {
		errs = append(errs, r.Store.OutboxRelease(after, r.Owner))
	}
	return len(done), errors.Join(errs...)
}
