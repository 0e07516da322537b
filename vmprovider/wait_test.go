package vmprovider_test

import (
	"context"
	"errors"
	"iter"
	"testing"
	"testing/synctest"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/memvm"
)

func state(s vmprovider.State) func(vmprovider.Instance) bool {
	return func(i vmprovider.Instance) bool { return i.State == s }
}

// looker hides that its provider is a Watcher.
type looker struct{ vmprovider.Provider }

func (looker) As(any) bool { return false }

// flaky is a Watcher whose watches fail with err, times times.
type flaky struct {
	*memvm.Provider
	times int
	err   error
}

func (f *flaky) Watch(ctx context.Context) iter.Seq2[vmprovider.Instance, error] {
	if f.times > 0 {
		f.times--
		return func(yield func(vmprovider.Instance, error) bool) {
			if f.err != nil {
				yield(vmprovider.Instance{}, f.err)
			}
		}
	}
	return f.Provider.Watch(ctx)
}

func newProvider(s memvm.Script) *memvm.Provider {
	return memvm.New(memvm.Config{Script: func(vmprovider.Spec) memvm.Script { return s }})
}

func TestWait(t *testing.T) {
	for name, wrap := range map[string]func(*memvm.Provider) vmprovider.Provider{
		"told":                  func(p *memvm.Provider) vmprovider.Provider { return p },
		"looking":               func(p *memvm.Provider) vmprovider.Provider { return looker{p} },
		"unavailable at first":  func(p *memvm.Provider) vmprovider.Provider { return &flaky{p, 3, vmprovider.ErrUnavailable} },
		"watch ends by itself":  func(p *memvm.Provider) vmprovider.Provider { return &flaky{p, 3, nil} },
		"watch not implemented": func(p *memvm.Provider) vmprovider.Provider { return &flaky{p, 1 << 30, errors.ErrUnsupported} },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				mem := newProvider(memvm.Script{Crash: time.Minute})
				p := wrap(mem)
				ctx := t.Context()
				if _, err := p.Create(ctx, vmprovider.Spec{ID: "a"}); err != nil {
					t.Fatal(err)
				}
				began := time.Now()
				inst, err := vmprovider.Wait(ctx, p, "a", state(vmprovider.StateStopped))
				if err != nil || inst.State != vmprovider.StateStopped || inst.Reason != "crashed" {
					t.Errorf("Wait for the crash: %+v, %v", inst, err)
				}
				// In the bubble's time, which only waiting lets pass.
				if late := time.Since(began) - time.Minute; late < 0 || late > 2*time.Second || name == "told" && late != 0 {
					t.Errorf("Wait returned %v after the crash", late)
				}
				go func() {
					time.Sleep(time.Hour) // the bubble's
					_ = mem.Destroy(ctx, "a", vmprovider.DestroyOptions{})
				}()
				inst, err = vmprovider.Wait(ctx, p, "a", state(vmprovider.StateRunning))
				if !errors.Is(err, vmprovider.ErrNotFound) || inst.ID != "a" || inst.State != vmprovider.StateGone {
					t.Errorf("Wait for what never comes: %+v, %v", inst, err)
				}
				if inst, err = vmprovider.Wait(ctx, p, "a", state(vmprovider.StateGone)); err != nil || inst.ID != "a" {
					t.Errorf("Wait for it to be gone: %+v, %v", inst, err)
				}
			})
		})
	}
}

func TestWaitEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProvider(memvm.Script{})
		if _, err := p.Create(t.Context(), vmprovider.Spec{ID: "a"}); err != nil {
			t.Fatal(err)
		}
		for _, p := range []vmprovider.Provider{p, looker{p}} {
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
			if _, err := vmprovider.Wait(ctx, p, "a", state(vmprovider.StateStopped)); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("Wait beyond its context: %v", err)
			}
			cancel()
		}
		if _, err := vmprovider.Wait(t.Context(), p, "A", state(vmprovider.StateStopped)); !errors.Is(err, vmprovider.ErrInvalid) {
			t.Errorf("Wait for an invalid ID: %v", err)
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := vmprovider.Wait(t.Context(), p, "a", state(vmprovider.StateStopped)); !errors.Is(err, vmprovider.ErrClosed) {
			t.Errorf("Wait on a closed provider: %v", err)
		}
		if err := p.Hypervisor().Open().Destroy(t.Context(), "a", vmprovider.DestroyOptions{}); err != nil {
			t.Fatal(err)
		}
	})
}

// TestNotifierCoalesces: a watcher that does not keep up sees the latest.
func TestNotifierCoalesces(t *testing.T) {
	var n vmprovider.Notifier
	none := func(context.Context, vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error] {
		return func(func(vmprovider.Instance, error) bool) {}
	}
	var seen []vmprovider.Instance
	for inst, err := range n.Watch(t.Context(), none) {
		if err != nil {
			if !errors.Is(err, vmprovider.ErrClosed) {
				t.Errorf("Watch ended with %v", err)
			}
			break
		}
		if seen = append(seen, inst); inst.ID == "" {
			for range 1000 {
				n.Publish(vmprovider.Instance{ID: "a", State: vmprovider.StateCreating})
				n.Publish(vmprovider.Instance{ID: "b", State: vmprovider.StateRunning})
			}
			n.Publish(vmprovider.Instance{ID: "a", State: vmprovider.StateGone})
			n.Close()
		}
	}
	if len(seen) != 3 || seen[1].ID != "a" || seen[1].State != vmprovider.StateGone || seen[2].ID != "b" {
		t.Errorf("seen: %+v", seen)
	}
	for _, err := range n.Watch(t.Context(), none) {
		if !errors.Is(err, vmprovider.ErrClosed) {
			t.Errorf("Watch after Close: %v", err)
		}
	}
}

func TestValidateID(t *testing.T) {
	for id, want := range map[string]bool{"a": true, "0-z": true, "": false, "-a": false, "A": false, "a.b": false} {
		if err := vmprovider.ValidateID(id); (err == nil) != want || err != nil && !errors.Is(err, vmprovider.ErrInvalid) {
			t.Errorf("ValidateID(%q) = %v", id, err)
		}
	}
}

func TestAs(t *testing.T) {
	p := newProvider(memvm.Script{})
	if w, ok := vmprovider.As[vmprovider.Watcher](p); !ok || w == nil {
		t.Error("a Watcher is not found")
	}
	if _, ok := vmprovider.As[vmprovider.Watcher](looker{p}); ok {
		t.Error("a wrapper's denial is overridden")
	}
	if _, ok := vmprovider.As[vmprovider.ImagePreparer](p); ok {
		t.Error("found what is not there")
	}
}
