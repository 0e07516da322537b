package vmprovidertest_test

import (
	"context"
	"errors"
	"iter"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// brokenCalls break what Create, Get and Destroy promise.
var brokenCalls = map[string]faults{
	"Create": {
		"returns before it runs": func(_ *world, d *driver) {
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				inst, err := d.Provider.Create(ctx, s)
				inst.State = vmprovider.StateCreating
				return inst, err
			}
		},
		"forgets the expiry": func(_ *world, d *driver) {
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				s.ExpiresAt = time.Time{}
				return d.Provider.Create(ctx, s)
			}
		},
		"forgets the owner": func(_ *world, d *driver) {
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				s.Owner = ""
				return d.Provider.Create(ctx, s)
			}
		},
		"has another time each time": func(_ *world, d *driver) {
			d.get = func(ctx context.Context, id string) (vmprovider.Instance, error) {
				inst, err := d.Provider.Get(ctx, id)
				inst.CreatedAt = time.Now().Add(time.Hour)
				return inst, err
			}
		},
	},
	"CreateRepeated": {
		"succeeds again": func(_ *world, d *driver) {
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				inst, err := d.Provider.Create(ctx, s)
				if errors.Is(err, vmprovider.ErrExists) {
					return d.Provider.Get(ctx, s.ID)
				}
				return inst, err
			}
		},
		"replaces the machine": func(_ *world, d *driver) {
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				inst, err := d.Provider.Create(ctx, s)
				if errors.Is(err, vmprovider.ErrExists) {
					_ = d.Provider.Destroy(ctx, s.ID, vmprovider.DestroyOptions{})
					_, _ = d.Provider.Create(ctx, s)
				}
				return inst, err
			}
		},
	},
	"CreateSameConcurrently": {
		"lets all win": func(_ *world, d *driver) {
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				inst, err := d.Provider.Create(ctx, s)
				if errors.Is(err, vmprovider.ErrExists) {
					return inst, nil
				}
				return inst, err
			}
		},
		"lets none win": func(_ *world, d *driver) {
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				_, _ = d.Provider.Create(ctx, s)
				return vmprovider.Instance{}, vmprovider.ErrExists
			}
		},
	},
	"InvalidID": {
		"says not found": func(_ *world, d *driver) {
			d.get = func(ctx context.Context, id string) (vmprovider.Instance, error) {
				inst, err := d.Provider.Get(ctx, id)
				if err != nil {
					err = vmprovider.ErrNotFound
				}
				return inst, err
			}
		},
		"destroys anything": func(_ *world, d *driver) {
			d.destroy = func(ctx context.Context, id string) error {
				if vmprovider.ValidateID(id) != nil {
					return nil
				}
				return d.Provider.Destroy(ctx, id, vmprovider.DestroyOptions{})
			}
		},
		"cleans IDs": func(_ *world, d *driver) {
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				s.ID = strings.TrimSpace(s.ID)
				return d.Provider.Create(ctx, s)
			}
		},
	},
	"InvalidSize": {
		"takes it for the default": func(_ *world, d *driver) {
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				s.CPUs, s.MemoryBytes, s.DiskBytes = 0, 0, 0
				return d.Provider.Create(ctx, s)
			}
		},
		"leaves parts": func(w *world, d *driver) {
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				inst, err := d.Provider.Create(ctx, s)
				if errors.Is(err, vmprovider.ErrInvalid) {
					_ = w.h.Leave(s.ID, s.Owner)
				}
				return inst, err
			}
		},
	},
	"GetAbsent": {
		"says stopped": func(_ *world, d *driver) {
			d.get = func(ctx context.Context, id string) (vmprovider.Instance, error) {
				inst, err := d.Provider.Get(ctx, id)
				if errors.Is(err, vmprovider.ErrNotFound) {
					return vmprovider.Instance{ID: id, State: vmprovider.StateStopped}, nil
				}
				return inst, err
			}
		},
	},
	"DestroyAbsent": {"fails": destroyAbsentFails},
	"DestroyTwice": {
		"fails": destroyAbsentFails,
		"only stops": func(w *world, d *driver) {
			d.destroy = func(_ context.Context, id string) error {
				_ = w.h.Crash(id, "destroyed")
				return nil
			}
		},
	},
	"DestroyConcurrently": {
		"fails when another is at it": func(w *world, d *driver) {
			d.destroy = func(ctx context.Context, id string) error {
				if _, busy := w.notes.LoadOrStore(id, true); busy {
					return errors.New("busy")
				}
				return d.Provider.Destroy(ctx, id, vmprovider.DestroyOptions{})
			}
		},
	},
	"DestroyDuringCreate": {
		"says it is too early": func(w *world, d *driver) {
			w.delay = slow
			d.destroy = func(ctx context.Context, id string) error {
				if inst, err := d.Provider.Get(ctx, id); err == nil && inst.State == vmprovider.StateCreating {
					return errors.New("not yet")
				}
				return d.Provider.Destroy(ctx, id, vmprovider.DestroyOptions{})
			}
		},
		"takes it for absent": func(w *world, d *driver) {
			w.delay = slow
			d.destroy = func(ctx context.Context, id string) error {
				if inst, err := d.Provider.Get(ctx, id); err == nil && inst.State == vmprovider.StateCreating {
					return nil
				}
				return d.Provider.Destroy(ctx, id, vmprovider.DestroyOptions{})
			}
		},
		"Create goes on": func(w *world, d *driver) {
			w.delay = slow
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				inst, err := d.Provider.Create(ctx, s)
				for errors.Is(err, vmprovider.ErrNotFound) || errors.Is(err, vmprovider.ErrExists) {
					inst, err = d.Provider.Create(ctx, s)
				}
				return inst, err
			}
		},
	},
	"DestroyOnlyThat": {
		"destroys the owner's": func(_ *world, d *driver) {
			d.destroy = func(ctx context.Context, id string) error {
				inst, err := d.Provider.Get(ctx, id)
				if err != nil {
					return nil
				}
				for other, err := range d.Provider.List(context.Background(), vmprovider.ListOptions{Owner: inst.Owner}) {
					if err != nil {
						return err
					}
					_ = d.Provider.Destroy(ctx, other.ID, vmprovider.DestroyOptions{})
				}
				return nil
			}
		},
	},
	"Context": {
		"ignored by Create": func(_ *world, d *driver) {
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				return d.Provider.Create(context.WithoutCancel(ctx), s)
			}
		},
		"ignored by Get": func(_ *world, d *driver) {
			d.get = func(ctx context.Context, id string) (vmprovider.Instance, error) {
				return d.Provider.Get(context.WithoutCancel(ctx), id)
			}
		},
		"ignored by List": func(_ *world, d *driver) {
			d.list = func(ctx context.Context, o vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error] {
				return d.Provider.List(context.WithoutCancel(ctx), o)
			}
		},
		"swallowed by List": func(_ *world, d *driver) {
			d.list = func(ctx context.Context, o vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error] {
				return forever(d.Provider.List(ctx, o))
			}
		},
		"ignored by Destroy": func(_ *world, d *driver) {
			d.destroy = func(ctx context.Context, id string) error {
				return d.Provider.Destroy(context.WithoutCancel(ctx), id, vmprovider.DestroyOptions{})
			}
		},
	},
	"ContextDuringCreate": {
		"loses the reason": func(w *world, d *driver) {
			w.delay = slow
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				inst, err := d.Provider.Create(ctx, s)
				if err != nil {
					err = errors.New("it did not work")
				}
				return inst, err
			}
		},
		"hangs": func(w *world, d *driver) {
			w.delay = slow
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				inst, err := d.Provider.Create(ctx, s)
				if err != nil {
					select {}
				}
				return inst, err
			}
		},
	},
	"Concurrency": {
		"does one thing at a time": func(w *world, d *driver) {
			d.create = func(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
				if _, busy := w.notes.LoadOrStore("create", true); busy {
					return vmprovider.Instance{}, vmprovider.ErrUnavailable
				}
				defer w.notes.Delete("create")
				return d.Provider.Create(ctx, s)
			}
		},
	},
}

func destroyAbsentFails(_ *world, d *driver) {
	d.destroy = func(ctx context.Context, id string) error {
		if _, err := d.Provider.Get(ctx, id); err != nil {
			return err
		}
		return d.Provider.Destroy(ctx, id, vmprovider.DestroyOptions{})
	}
}
