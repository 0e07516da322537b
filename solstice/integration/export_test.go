package integration

import "context"

// RemoveOld is what Run does now and then.
func (in *Integration) RemoveOld(ctx context.Context) (int64, error) { return in.removeOld(ctx) }
