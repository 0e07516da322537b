package agent

import (
	"context"
	"math/rand/v2"
	"time"
)

// backoff spaces out attempts: doubling delays with jitter (between half and
// the whole), so that agents do not return in step after an outage.
type backoff struct {
	first, limit time.Duration
	n            int
}

func (b *backoff) reset() { b.n = 0 }

func (b *backoff) delay() time.Duration {
	d := b.limit
	if b.n < 30 {
		d = min(b.first<<b.n, b.limit)
	}
	b.n++
	return d/2 + rand.N(d/2+1)
}

// wait sleeps for the next delay, or until ctx ends.
func (b *backoff) wait(ctx context.Context) error {
	t := time.NewTimer(b.delay())
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
