package vmprovidertest_test

import (
	"context"
	"io"
	"iter"
	"strings"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// brokenStreams break what List, Console and Watch promise.
var brokenStreams = map[string]faults{
	"ListByOwner": {
		"ignores the owner": func(_ *world, d *driver) {
			d.list = func(ctx context.Context, _ vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error] {
				return d.Provider.List(ctx, vmprovider.ListOptions{})
			}
		},
		"takes empty for an owner": func(_ *world, d *driver) {
			d.list = func(ctx context.Context, o vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error] {
				return filter(d.Provider.List(ctx, o), func(i vmprovider.Instance) bool { return i.Owner == o.Owner })
			}
		},
		"gives only the first": func(_ *world, d *driver) {
			d.list = func(ctx context.Context, o vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error] {
				n := 0
				return filter(d.Provider.List(ctx, o), func(vmprovider.Instance) bool { n++; return n == 1 })
			}
		},
	},
	"ListBreak": {
		"remembers where it was": func(_ *world, d *driver) {
			at := 0
			d.list = func(ctx context.Context, o vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error] {
				n := 0
				return filter(d.Provider.List(ctx, o), func(vmprovider.Instance) bool {
					n++
					if n <= at {
						return false
					}
					at = n
					return true
				})
			}
		},
	},
	"Console": {
		"loses the beginning": func(_ *world, d *driver) {
			d.console = func(ctx context.Context, id string, follow bool) (io.ReadCloser, error) {
				r, err := d.Provider.Console(ctx, id, follow)
				if err == nil {
					_, _ = r.Read(make([]byte, 1))
				}
				return r, err
			}
		},
		"always follows": func(_ *world, d *driver) {
			d.console = func(ctx context.Context, id string, _ bool) (io.ReadCloser, error) {
				return d.Provider.Console(ctx, id, true)
			}
		},
	},
	"ConsoleFollow": {
		"outlives the machine": func(_ *world, d *driver) {
			d.console = func(ctx context.Context, id string, follow bool) (io.ReadCloser, error) {
				r, err := d.Provider.Console(ctx, id, follow)
				return endless{r, ctx}, err
			}
		},
	},
	"ConsoleAbsent": {
		"is empty": func(_ *world, d *driver) {
			d.console = func(ctx context.Context, id string, follow bool) (io.ReadCloser, error) {
				r, err := d.Provider.Console(ctx, id, follow)
				if err != nil {
					return io.NopCloser(strings.NewReader("")), nil
				}
				return r, nil
			}
		},
	},
	"ConsoleAfterExit": {
		"is gone": func(_ *world, d *driver) {
			d.console = func(ctx context.Context, id string, follow bool) (io.ReadCloser, error) {
				if inst, err := d.Provider.Get(ctx, id); err == nil && inst.State == vmprovider.StateStopped {
					return nil, vmprovider.ErrNotFound
				}
				return d.Provider.Console(ctx, id, follow)
			}
		},
	},
	"ConsoleContext": {
		"ignored": func(_ *world, d *driver) {
			d.console = func(ctx context.Context, id string, follow bool) (io.ReadCloser, error) {
				return d.Provider.Console(context.WithoutCancel(ctx), id, follow)
			}
		},
	},
	"Watch": {
		"says nothing of the end": func(_ *world, d *driver) {
			d.watch = func(ctx context.Context) iter.Seq2[vmprovider.Instance, error] {
				return filter(d.Provider.Watch(ctx), func(i vmprovider.Instance) bool { return i.ID == "" || i.State != vmprovider.StateGone })
			}
		},
		"says nothing of the beginning": func(_ *world, d *driver) {
			d.watch = func(ctx context.Context) iter.Seq2[vmprovider.Instance, error] {
				return filter(d.Provider.Watch(ctx), func(i vmprovider.Instance) bool { return i.State != vmprovider.StateRunning })
			}
		},
	},
	"WatchSnapshot": {
		"has none": func(_ *world, d *driver) {
			d.watch = func(ctx context.Context) iter.Seq2[vmprovider.Instance, error] {
				complete := false
				return filter(d.Provider.Watch(ctx), func(i vmprovider.Instance) bool { complete = complete || i.ID == ""; return complete })
			}
		},
		"has no end": func(_ *world, d *driver) {
			d.watch = func(ctx context.Context) iter.Seq2[vmprovider.Instance, error] {
				return filter(d.Provider.Watch(ctx), func(i vmprovider.Instance) bool { return i.ID != "" })
			}
		},
	},
	"WatchExit": {
		"unnoticed": func(_ *world, d *driver) {
			d.watch = func(ctx context.Context) iter.Seq2[vmprovider.Instance, error] {
				return filter(d.Provider.Watch(ctx), func(i vmprovider.Instance) bool { return i.State != vmprovider.StateStopped })
			}
		},
	},
	"WatchEnds": {
		"without a reason": func(_ *world, d *driver) {
			d.watch = func(ctx context.Context) iter.Seq2[vmprovider.Instance, error] { return forever(d.Provider.Watch(ctx)) }
		},
		"not with its context": func(_ *world, d *driver) {
			d.watch = func(ctx context.Context) iter.Seq2[vmprovider.Instance, error] {
				return d.Provider.Watch(context.WithoutCancel(ctx))
			}
		},
	},
}

// forever yields what seq does, but neither its error nor its end.
func forever(seq iter.Seq2[vmprovider.Instance, error]) iter.Seq2[vmprovider.Instance, error] {
	return func(yield func(vmprovider.Instance, error) bool) {
		for inst, err := range seq {
			if err == nil && !yield(inst, nil) {
				return
			}
		}
	}
}

func filter(seq iter.Seq2[vmprovider.Instance, error], keep func(vmprovider.Instance) bool) iter.Seq2[vmprovider.Instance, error] {
	return func(yield func(vmprovider.Instance, error) bool) {
		for inst, err := range seq {
			if (err != nil || keep(inst)) && !yield(inst, err) {
				return
			}
		}
	}
}

// endless blocks where the reader ends.
type endless struct {
	io.ReadCloser
	ctx context.Context
}

func (e endless) Read(p []byte) (int, error) {
	n, err := e.ReadCloser.Read(p)
	if err != nil {
		<-e.ctx.Done()
		err = e.ctx.Err()
	}
	return n, err
}
