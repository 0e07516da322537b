// Package grace lets what is under way go on for a while after it was told to end.
package grace

import (
	"context"
	"time"
)

// Context ends d after ctx does, or when it is cancelled; with a d of 0 with ctx.
func Context(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if d <= 0 {
		return context.WithCancel(ctx)
	}
	late, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(d, cancel) })
	return late, func() {
		stop()
		cancel()
	}
}
