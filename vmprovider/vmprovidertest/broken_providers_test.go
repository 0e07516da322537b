package vmprovidertest_test

import (
	"context"
	"errors"
	"iter"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// brokenProviders break what is promised of machines that fail or fill the
// host, and of a provider's end and successor.
var brokenProviders = map[string]faults{
	"Closed": {
		"goes on": func(_ *world, d *driver) { d.close = func() error { return nil } },
		"fails the second time": func(_ *world, d *driver) {
			closed := false
			d.close = func() error {
				if closed {
					return vmprovider.ErrClosed
				}
				closed = true
				return d.Provider.Close()
			}
		},
	},
	"Capabilities": {
		"differ": func(w *world, d *driver) {
			n := w.opened
			d.caps = func() vmprovider.Capabilities { return vmprovider.Capabilities{Isolated: n == 1} }
		},
		"name no platform": func(_ *world, d *driver) {
			d.caps = func() vmprovider.Capabilities { return vmprovider.Capabilities{Platform: []string{"linux"}} }
		},
	},
	"WaitByLooking": {
		"shows what is gone": func(w *world, d *driver) {
			d.get = func(ctx context.Context, id string) (vmprovider.Instance, error) {
				inst, err := d.Provider.Get(ctx, id)
				if err == nil {
					w.notes.Store(id, inst)
				} else if old, ok := w.notes.Load(id); ok && errors.Is(err, vmprovider.ErrNotFound) {
					return old.(vmprovider.Instance), nil
				}
				return inst, err
			}
		},
	},
	"Leftover": {
		"hidden by Get": func(_ *world, d *driver) {
			d.get = func(ctx context.Context, id string) (vmprovider.Instance, error) {
				inst, err := d.Provider.Get(ctx, id)
				if err == nil && inst.State == vmprovider.StateLeftover {
					err = vmprovider.ErrNotFound
				}
				return inst, err
			}
		},
		"hidden by List": func(_ *world, d *driver) {
			d.list = func(ctx context.Context, o vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error] {
				return filter(d.Provider.List(ctx, o), func(i vmprovider.Instance) bool { return i.State != vmprovider.StateLeftover })
			}
		},
		"not destroyed": func(_ *world, d *driver) {
			d.destroy = func(ctx context.Context, id string) error {
				if inst, err := d.Provider.Get(ctx, id); err == nil && inst.State == vmprovider.StateLeftover {
					return nil
				}
				return d.Provider.Destroy(ctx, id, vmprovider.DestroyOptions{})
			}
		},
	},
	"NeverBoots": {
		"Create waits for the boot": func(_ *world, d *driver) {
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				inst, err := d.Provider.Create(ctx, s)
				if s.Labels["hang"] != "" {
					<-ctx.Done()
					return vmprovider.Instance{}, ctx.Err()
				}
				return inst, err
			}
		},
	},
	"ExitsEarly": {
		"vanishes": func(_ *world, d *driver) {
			d.get = func(ctx context.Context, id string) (vmprovider.Instance, error) {
				inst, err := d.Provider.Get(ctx, id)
				if err == nil && inst.State == vmprovider.StateStopped {
					return vmprovider.Instance{}, vmprovider.ErrNotFound
				}
				return inst, err
			}
		},
		"unnoticed": func(_ *world, d *driver) {
			d.get = func(ctx context.Context, id string) (vmprovider.Instance, error) {
				inst, err := d.Provider.Get(ctx, id)
				inst.State = vmprovider.StateRunning
				return inst, err
			}
		},
		"not listed": func(_ *world, d *driver) {
			d.list = func(ctx context.Context, o vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error] {
				return filter(d.Provider.List(ctx, o), func(i vmprovider.Instance) bool { return i.State != vmprovider.StateStopped })
			}
		},
	},
	"Panics": {
		"unnoticed": func(_ *world, d *driver) {
			d.get = func(ctx context.Context, id string) (vmprovider.Instance, error) {
				inst, err := d.Provider.Get(ctx, id)
				inst.State = vmprovider.StateRunning
				return inst, err
			}
		},
		"without a reason": func(_ *world, d *driver) {
			d.get = func(ctx context.Context, id string) (vmprovider.Instance, error) {
				inst, err := d.Provider.Get(ctx, id)
				inst.Reason = ""
				return inst, err
			}
		},
		"of no use any more": func(_ *world, d *driver) {
			d.get = func(ctx context.Context, id string) (vmprovider.Instance, error) {
				inst, err := d.Provider.Get(ctx, id)
				if err == nil && inst.State == vmprovider.StateStopped {
					inst.State = vmprovider.StateLeftover
				}
				return inst, err
			}
		},
	},
	"Capacity": {
		"another error": func(_ *world, d *driver) {
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				inst, err := d.Provider.Create(ctx, s)
				if errors.Is(err, vmprovider.ErrCapacity) {
					err = vmprovider.ErrUnavailable
				}
				return inst, err
			}
		},
		"never given back": func(w *world, d *driver) {
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				inst, err := d.Provider.Create(ctx, s)
				if errors.Is(err, vmprovider.ErrCapacity) {
					w.notes.Store("full", true)
				}
				if _, full := w.notes.Load("full"); full {
					return vmprovider.Instance{}, vmprovider.ErrCapacity
				}
				return inst, err
			}
		},
	},
	"Reopen": {
		"forgets": func(w *world, d *driver) {
			d.close = func() error {
				for inst, err := range w.h.Open().List(context.Background(), vmprovider.ListOptions{}) {
					if err != nil {
						return err
					}
					_ = w.h.Open().Destroy(context.Background(), inst.ID, vmprovider.DestroyOptions{})
				}
				return d.Provider.Close()
			}
		},
		"lists only its own": func(w *world, d *driver) {
			if w.opened > 1 {
				d.list = func(context.Context, vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error] {
					return func(func(vmprovider.Instance, error) bool) {}
				}
			}
		},
	},
	"ReopenDuringCreate": {
		"Create hangs": func(w *world, d *driver) {
			w.delay = slow
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				inst, err := d.Provider.Create(ctx, s)
				if errors.Is(err, vmprovider.ErrClosed) {
					<-ctx.Done()
				}
				return inst, err
			}
		},
		"another error": func(w *world, d *driver) {
			w.delay = slow
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				inst, err := d.Provider.Create(ctx, s)
				if errors.Is(err, vmprovider.ErrClosed) {
					err = context.Canceled
				}
				return inst, err
			}
		},
	},
}
