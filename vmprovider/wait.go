package vmprovider

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// How often Wait looks where it is not told: at first, and at the longest.
const (
	pollFirst = 50 * time.Millisecond
	pollMost  = 2 * time.Second
)

// Wait returns the machine as soon as cond accepts it. Where p is a Watcher it
// is told, otherwise it looks with growing pauses; either way it sees the
// machine as it is now first. A machine that is no more, or never was, is shown
// to cond with its ID and StateGone; if cond does not accept that, Wait returns
// it with an error that wraps ErrNotFound. While the provider is unavailable
// Wait goes on trying; ctx bounds it.
//
// States may be passed over quickly, so cond should accept what follows the
// state that is waited for, too.
func Wait(ctx context.Context, p Provider, id string, cond func(Instance) bool) (Instance, error) {
	if err := ValidateID(id); err != nil {
		return Instance{}, err
	}
	w, watches := As[Watcher](p)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for pause := pollFirst; ; pause = min(pause*3/2, pollMost) {
		select {
		case <-ctx.Done():
			return Instance{ID: id}, waitErr(id, ctx.Err())
		case <-timer.C:
		}
		var inst Instance
		var done bool
		var err error
		if watches {
			inst, done, err = watch(ctx, w, id, cond)
		} else {
			inst, done, err = look(ctx, p, id, cond)
		}
		switch {
		case done:
			return inst, nil
		case errors.Is(err, errors.ErrUnsupported):
			watches = false // a proxy that promised more than it can do
		case err != nil && !errors.Is(err, ErrUnavailable):
			return inst, waitErr(id, err)
		}
		timer.Reset(pause)
	}
}

// look asks once.
func look(ctx context.Context, p Provider, id string, cond func(Instance) bool) (Instance, bool, error) {
	inst, err := p.Get(ctx, id)
	if err != nil {
		inst = Instance{ID: id}
		if !errors.Is(err, ErrNotFound) {
			return inst, false, err
		}
	}
	if cond(inst) {
		return inst, true, nil
	}
	return inst, false, err
}

// watch follows the machine until cond accepts it or the watch ends.
func watch(ctx context.Context, w Watcher, id string, cond func(Instance) bool) (Instance, bool, error) {
	last := Instance{ID: id}
	seen := false
	for inst, err := range w.Watch(ctx) {
		switch {
		case err != nil:
			return last, false, err
		case inst.ID == id:
			seen = true
		case inst.ID == "" && !seen:
			inst.ID = id // not among those there are
		default:
			continue
		}
		last = inst
		if cond(inst) {
			return inst, true, nil
		}
		if inst.State == StateGone {
			return inst, false, ErrNotFound
		}
	}
	if err := ctx.Err(); err != nil {
		return last, false, err
	}
	return last, false, ErrUnavailable // ended without a reason: begin anew
}

func waitErr(id string, err error) error {
	return fmt.Errorf("wait for machine %q: %w", id, err)
}
