package vmprovidertest_test

import (
	"context"
	"fmt"
	"io"
	"iter"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/memvm"
	"github.com/solstice-ci/solstice-go/vmprovider/vmprovidertest"
)

// recorder is a vmprovidertest.T that notes failures instead of failing.
type recorder struct {
	ctx context.Context

	mu       sync.Mutex
	failures []string
	cleanups []func()
}

func (r *recorder) Helper()                  {}
func (r *recorder) Context() context.Context { return r.ctx }
func (r *recorder) Logf(string, ...any)      {}

func (r *recorder) Cleanup(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cleanups = append(r.cleanups, f)
}

func (r *recorder) Errorf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failures = append(r.failures, fmt.Sprintf(format, args...))
}

func (r *recorder) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	runtime.Goexit()
}

// run does one check and gives what it failed with.
func run(t *testing.T, h vmprovidertest.Harness, c vmprovidertest.Check) (failures []string, applies bool) {
	r := &recorder{ctx: t.Context()}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			for i := len(r.cleanups) - 1; i >= 0; i-- {
				r.cleanups[i]()
			}
		}()
		applies = vmprovidertest.Verify(r, h, c)
	}()
	<-done
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.failures, applies || len(r.failures) > 0
}

// driver is a provider that works, except for what a test replaces.
type driver struct {
	*memvm.Provider
	create  func(context.Context, vmprovider.Spec) (vmprovider.Instance, error)
	get     func(context.Context, string) (vmprovider.Instance, error)
	list    func(context.Context, vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error]
	destroy func(context.Context, string) error
	close   func() error
	caps    func() vmprovider.Capabilities
	console func(context.Context, string, bool) (io.ReadCloser, error)
	watch   func(context.Context) iter.Seq2[vmprovider.Instance, error]
}

func (d *driver) Create(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
	if d.create != nil {
		return d.create(ctx, s)
	}
	return d.Provider.Create(ctx, s)
}

func (d *driver) Get(ctx context.Context, id string) (vmprovider.Instance, error) {
	if d.get != nil {
		return d.get(ctx, id)
	}
	return d.Provider.Get(ctx, id)
}

func (d *driver) List(ctx context.Context, o vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error] {
	if d.list != nil {
		return d.list(ctx, o)
	}
	return d.Provider.List(ctx, o)
}

func (d *driver) Destroy(ctx context.Context, id string, o vmprovider.DestroyOptions) error {
	if d.destroy != nil {
		return d.destroy(ctx, id)
	}
	return d.Provider.Destroy(ctx, id, o)
}

func (d *driver) Close() error {
	if d.close != nil {
		return d.close()
	}
	return d.Provider.Close()
}

func (d *driver) Capabilities() vmprovider.Capabilities {
	if d.caps != nil {
		return d.caps()
	}
	return d.Provider.Capabilities()
}

func (d *driver) Console(ctx context.Context, id string, follow bool) (io.ReadCloser, error) {
	if d.console != nil {
		return d.console(ctx, id, follow)
	}
	return d.Provider.Console(ctx, id, follow)
}

func (d *driver) Watch(ctx context.Context) iter.Seq2[vmprovider.Instance, error] {
	if d.watch != nil {
		return d.watch(ctx)
	}
	return d.Provider.Watch(ctx)
}

const capacity = 5

// slow is how long Create takes where a check has to come in its way.
const slow = 200 * time.Millisecond

// world is the hypervisor of one check, which faults may use to misbehave.
type world struct {
	h      *memvm.Hypervisor
	opened int
	delay  time.Duration // that Create takes
	notes  sync.Map
}

// harness gives drivers that spoil changed. Creation takes a moment, so that
// there is something to interrupt.
func harness(max int, spoil func(w *world, d *driver)) vmprovidertest.Harness {
	worlds := map[vmprovidertest.T]*world{}
	of := func(t vmprovidertest.T) *world {
		if worlds[t] == nil {
			w := &world{delay: time.Millisecond}
			w.h = memvm.NewHypervisor(memvm.Config{Max: max, Script: func(s vmprovider.Spec) memvm.Script {
				sc := memvm.Script{CreateDelay: w.delay, Console: s.Labels["print"]}
				if s.Labels["exit"] != "" || s.Labels["panic"] != "" {
					sc.Crash = time.Millisecond
				}
				return sc
			}})
			worlds[t] = w
		}
		return worlds[t]
	}
	label := func(k string) func(vmprovidertest.T, *vmprovider.Spec) {
		return func(_ vmprovidertest.T, s *vmprovider.Spec) { s.Labels = map[string]string{k: "yes"} }
	}
	return vmprovidertest.Harness{
		Open: func(t vmprovidertest.T) vmprovider.Provider {
			w := of(t)
			w.opened++
			d := &driver{Provider: w.h.Open()}
			if spoil != nil {
				spoil(w, d)
			}
			return d
		},
		NeverBoots: label("hang"),
		ExitsEarly: label("exit"),
		Panics:     label("panic"),
		Prints: func(_ vmprovidertest.T, s *vmprovider.Spec, text string) {
			s.Labels = map[string]string{"print": text}
		},
		Leave: func(t vmprovidertest.T, id, owner string) {
			if err := of(t).h.Leave(id, owner); err != nil {
				t.Fatalf("%v", err)
			}
		},
		Capacity: capacity,
		Timeout:  2 * time.Second, // what hangs for ever, hangs
	}
}

func TestWorkingDriverPasses(t *testing.T) {
	h := harness(capacity, nil)
	h.Timeout = 0
	for _, c := range vmprovidertest.Checks() {
		failures, applies := run(t, h, c)
		if !applies || len(failures) > 0 {
			t.Errorf("%s: applies %v, failures %q", c.Name, applies, failures)
		}
	}
}

// TestOptionalChecks: what a driver does not claim is not asked of it.
func TestOptionalChecks(t *testing.T) {
	h := harness(capacity, func(_ *world, d *driver) {
		d.caps = func() vmprovider.Capabilities { return vmprovider.Capabilities{} }
	})
	open := h.Open
	h.Open = func(t vmprovidertest.T) vmprovider.Provider { return struct{ vmprovider.Provider }{open(t)} }
	h.NeverBoots, h.ExitsEarly, h.Panics, h.Prints, h.Leave, h.Capacity = nil, nil, nil, nil, nil, 0
	optional := map[string]bool{}
	for _, name := range []string{
		"Leftover", "NeverBoots", "ExitsEarly", "Panics", "Capacity", "Reopen", "ReopenDuringCreate", "Console", "ConsoleFollow",
		"ConsoleAbsent", "ConsoleAfterExit", "ConsoleContext", "Watch", "WatchSnapshot", "WatchExit", "WatchEnds",
	} {
		optional[name] = true
	}
	for _, c := range vmprovidertest.Checks() {
		if c.Needs == nil {
			continue
		}
		if _, applies := run(t, h, c); applies || !optional[c.Name] {
			t.Errorf("%s applies: %v", c.Name, applies)
		}
	}
}
