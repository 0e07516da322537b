package integration

import (
	"context"
	"fmt"
	"time"

	"github.com/solstice-ci/solstice-go/internal/store"
)

const (
	// collectEvery is how often old webhooks are looked for.
	collectEvery = 10 * time.Minute
	// collectorTTL is how long one that died while it removed them keeps others waiting.
	collectorTTL = time.Minute
	// collectBatch is how many go at once.
	collectBatch = 100
)

// collect removes what is too old, until ctx ends.
func (in *Integration) collect(ctx context.Context) {
	for {
		n, err := in.removeOld(ctx)
		if err != nil && ctx.Err() == nil {
			in.log.WarnContext(ctx, "old webhooks not removed", "error", err)
		}
		if n > 0 {
			in.log.InfoContext(ctx, "removed by retention", "deliveries", n)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(collectEvery):
		}
	}
}

// removeOld leaves it to an engine where there is one: that removes more, by rules of
// its own. The lease is theirs, too.
func (in *Integration) removeOld(ctx context.Context) (n int64, err error) {
	engines, err := in.store.Orchestrators(ctx)
	if err != nil || len(engines) > 0 {
		return 0, err
	}
	mine, err := in.store.Lease(ctx, store.CollectorLease, in.id, collectorTTL)
	if err != nil || !mine {
		return 0, err
	}
	defer func() {
		after, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if uerr := in.store.Unlease(after, store.CollectorLease, in.id); err == nil {
			err = uerr
		}
	}()
	for began := time.Now(); time.Since(began) < collectorTTL/2; {
		r, err := in.store.RemoveDeliveries(ctx, in.cfg.DeliveryAge, collectBatch)
		n += r.Undelivered + r.Others
		if err != nil {
			return n, fmt.Errorf("integration: %w", err)
		}
		if max(r.Undelivered, r.Others) < collectBatch {
			break
		}
	}
	return n, nil
}
