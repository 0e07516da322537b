package solstice

import (
	"context"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// prepare has the pool's provider ready its image, if it can, before the first
// claim: a download may take longer than a machine may to boot. It is tried until
// it is done; false: ctx ended before.
func (p *pool) prepare(ctx context.Context) bool {
	preparer, ok := vmprovider.As[vmprovider.ImagePreparer](p.Provider)
	if !ok {
		return true
	}
	p.notPrepared("its image is being made ready")
	defer p.notPrepared("")
	retry := backoff.NewExponentialBackOff()
	retry.InitialInterval, retry.MaxInterval = time.Second, time.Minute
	for began := time.Now(); ; {
		err := preparer.PrepareImage(ctx, p.Image)
		if err == nil {
			p.e.log.DebugContext(ctx, "image ready", "pool", p.Name, "took", time.Since(began))
			return true
		}
		wait := retry.NextBackOff()
		p.notPrepared("its image is not ready: " + err.Error())
		p.e.log.WarnContext(ctx, "image not ready, the pool takes no jobs", "pool", p.Name, "error", err, "again_in", wait)
		select {
		case <-ctx.Done():
			return false
		case <-time.After(wait):
		}
	}
}

// notPrepared notes why the pool takes no jobs yet, for the next beat.
func (p *pool) notPrepared(why string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.problem = why
}

func (p *pool) unprepared() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.problem
}
