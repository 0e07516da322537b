package vmprovidertest

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// Checks gives all checks, in an order in which the basic ones come first.
func Checks() []Check {
	adopts := func(_ Harness, p vmprovider.Provider) bool { return p.Capabilities().Adopts }
	watches := func(_ Harness, p vmprovider.Provider) bool {
		_, ok := vmprovider.As[vmprovider.Watcher](p)
		return ok
	}
	console := func(h Harness, p vmprovider.Provider) bool {
		_, ok := vmprovider.As[vmprovider.Consoler](p)
		return ok && h.Prints != nil
	}
	return []Check{
		{Name: "Create", Run: checkCreate},
		{Name: "CreateRepeated", Run: checkCreateRepeated},
		{Name: "CreateSameConcurrently", Run: checkCreateSame},
		{Name: "InvalidID", Run: checkInvalidID},
		{Name: "InvalidSize", Run: checkInvalidSize},
		{Name: "GetAbsent", Run: checkGetAbsent},
		{Name: "DestroyAbsent", Run: checkDestroyAbsent},
		{Name: "DestroyTwice", Run: checkDestroyTwice},
		{Name: "DestroyConcurrently", Run: checkDestroyConcurrently},
		{Name: "DestroyDuringCreate", Run: checkDestroyDuringCreate},
		{Name: "DestroyOnlyThat", Run: checkDestroyOnlyThat},
		{Name: "ListByOwner", Run: checkListByOwner},
		{Name: "ListBreak", Run: checkListBreak},
		{Name: "Context", Run: checkContext},
		{Name: "ContextDuringCreate", Run: checkContextDuringCreate},
		{Name: "Concurrency", Run: checkConcurrency},
		{Name: "Closed", Run: checkClosed},
		{Name: "Capabilities", Run: checkCapabilities},
		{Name: "WaitByLooking", Run: checkWaitByLooking},
		{Name: "Leftover", Run: checkLeftover, Needs: func(h Harness, _ vmprovider.Provider) bool { return h.Leave != nil }},
		{Name: "NeverBoots", Run: checkNeverBoots, Needs: func(h Harness, _ vmprovider.Provider) bool { return h.NeverBoots != nil }},
		{Name: "ExitsEarly", Run: checkExitsEarly, Needs: func(h Harness, _ vmprovider.Provider) bool { return h.ExitsEarly != nil }},
		{Name: "Panics", Run: checkPanics, Needs: func(h Harness, _ vmprovider.Provider) bool { return h.Panics != nil }},
		{Name: "Capacity", Run: checkCapacity, Needs: func(h Harness, _ vmprovider.Provider) bool { return h.Capacity > 0 }},
		{Name: "Reopen", Run: checkReopen, Needs: adopts},
		{Name: "ReopenDuringCreate", Run: checkReopenDuringCreate, Needs: adopts},
		{Name: "Console", Run: checkConsole, Needs: console},
		{Name: "ConsoleFollow", Run: checkConsoleFollow, Needs: console},
		{Name: "ConsoleAbsent", Run: checkConsoleAbsent, Needs: console},
		{Name: "ConsoleAfterExit", Run: checkConsoleAfterExit, Needs: func(h Harness, p vmprovider.Provider) bool { return console(h, p) && h.ExitsEarly != nil }},
		{Name: "ConsoleContext", Run: checkConsoleContext, Needs: console},
		{Name: "Watch", Run: checkWatch, Needs: watches},
		{Name: "WatchSnapshot", Run: checkWatchSnapshot, Needs: watches},
		{Name: "WatchExit", Run: checkWatchExit, Needs: func(h Harness, p vmprovider.Provider) bool { return watches(h, p) && h.ExitsEarly != nil }},
		{Name: "WatchEnds", Run: checkWatchEnds, Needs: watches},
	}
}

func checkCreate(s *Suite) {
	spec := s.spec(owner())
	inst := s.create(spec)
	if inst.ID != spec.ID || inst.Owner != spec.Owner || inst.State != vmprovider.StateRunning {
		s.Errorf("Create gave %+v; want %s of %s, running", inst, spec.ID, spec.Owner)
	}
	if inst.Host == "" || inst.CreatedAt.IsZero() {
		s.Errorf("Create gave %+v; want a host and a time of creation", inst)
	}
	if !inst.ExpiresAt.Equal(spec.ExpiresAt) {
		s.Errorf("expires at %v, want %v", inst.ExpiresAt, spec.ExpiresAt)
	}
	got := s.get(spec.ID)
	if got.State != vmprovider.StateRunning {
		s.Errorf("Get gave %+v; want it running", got)
	}
	if err := sameInstance(got, inst); err != nil {
		s.Errorf("Get after Create: %v", err)
	}
	for listed, err := range s.p.List(s.ctx, vmprovider.ListOptions{Owner: spec.Owner}) {
		if err != nil {
			s.Fatalf("List: %v", err)
		}
		if err := sameInstance(listed, inst); err != nil {
			s.Errorf("List after Create: %v", err)
		}
	}
	s.destroy(spec.ID)
	s.absent(spec.ID)
}

func checkCreateRepeated(s *Suite) {
	spec := s.spec(owner())
	first := s.create(spec)
	for _, who := range []string{spec.Owner, owner()} {
		again := spec
		again.Owner = who
		_, err := s.p.Create(s.ctx, again)
		s.wants("a repeated ID", err, vmprovider.ErrExists)
	}
	got := s.get(spec.ID)
	if err := sameInstance(got, first); err != nil || got.State != vmprovider.StateRunning {
		s.Errorf("the first machine has changed: %+v, %v", got, err)
	}
}

func checkCreateSame(s *Suite) {
	spec := s.spec(owner())
	errs := make([]error, 4)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { _, errs[i] = s.p.Create(s.ctx, spec) })
	}
	s.within("Create", wg.Wait)
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
		} else {
			s.wants("a concurrent Create of the same ID", err, vmprovider.ErrExists)
		}
	}
	if won != 1 {
		s.Errorf("%d of %d concurrent Creates of one ID succeeded, want 1", won, len(errs))
	}
	if got := s.get(spec.ID); got.State != vmprovider.StateRunning {
		s.Errorf("the machine that was created is %+v; want it running", got)
	}
}

func checkInvalidID(s *Suite) {
	before := s.list("")
	// The harmless ones first, and no further than the first that is not refused:
	// who takes IDs for paths should not be asked to destroy "..".
	for _, id := range []string{"A", "a_b", "a b", "a\n", "é", "-a", "a.b", strings.Repeat("a", 64), "", "a/b", "../a", ".."} {
		_, err := s.p.Get(s.ctx, id)
		s.refuses("Get", id, err)
		s.refuses("Destroy", id, s.p.Destroy(s.ctx, id, vmprovider.DestroyOptions{}))
		spec := s.spec(owner())
		spec.ID = id
		if _, err = s.p.Create(s.ctx, spec); err == nil {
			s.ids = append(s.ids, id) // to be cleaned up
		}
		s.refuses("Create", id, err)
	}
	if after := s.list(""); len(after) > len(before) {
		s.Errorf("invalid IDs made machines: %v", after)
	}
}

func (s *Suite) refuses(call, id string, err error) {
	s.Helper()
	if !errors.Is(err, vmprovider.ErrInvalid) {
		s.Fatalf("%s of ID %q: error %v; want one that wraps ErrInvalid, from ValidateID, before anything else is done", call, id, err)
	}
}

func checkInvalidSize(s *Suite) {
	for _, change := range []func(*vmprovider.Spec){
		func(v *vmprovider.Spec) { v.CPUs = -1 },
		func(v *vmprovider.Spec) { v.MemoryBytes = -1 },
		func(v *vmprovider.Spec) { v.DiskBytes = -1 },
	} {
		spec := s.spec(owner())
		change(&spec)
		_, err := s.p.Create(s.ctx, spec)
		s.wants("Create with a negative size", err, vmprovider.ErrInvalid)
		s.absent(spec.ID)
	}
}

func checkGetAbsent(s *Suite) { s.absent(s.id()) }

func checkDestroyAbsent(s *Suite) { s.destroy(s.id()) }

func checkDestroyTwice(s *Suite) {
	spec := s.spec(owner())
	s.create(spec)
	for range 2 {
		s.destroy(spec.ID)
		s.absent(spec.ID)
	}
}

func checkDestroyConcurrently(s *Suite) {
	spec := s.spec(owner())
	s.create(spec)
	errs := make([]error, 4)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { errs[i] = s.p.Destroy(s.ctx, spec.ID, vmprovider.DestroyOptions{}) })
	}
	s.within("Destroy", wg.Wait)
	if err := errors.Join(errs...); err != nil {
		s.Errorf("concurrent Destroy: %v", err)
	}
	s.absent(spec.ID)
}

func checkDestroyDuringCreate(s *Suite) {
	for range 5 {
		spec := s.spec(owner())
		created := make(chan error, 1)
		go func() {
			_, err := s.p.Create(s.ctx, spec)
			created <- err
		}()
		// As soon as the machine is known, whatever Create is doing.
		known := func() bool {
			_, err := s.p.Get(s.ctx, spec.ID)
			return err == nil
		}
		ended := false
		var createErr error
		for !ended && !known() {
			select {
			case createErr = <-created:
				ended = true
			case <-s.ctx.Done():
				s.Fatalf("Create neither returned nor showed its machine")
			case <-time.After(100 * time.Microsecond):
			}
		}
		s.within("Destroy during Create", func() {
			if err := s.p.Destroy(s.ctx, spec.ID, vmprovider.DestroyOptions{}); err != nil {
				s.Errorf("Destroy during Create: %v", err)
			}
		})
		if !ended {
			s.within("Create during Destroy", func() { createErr = <-created })
		}
		s.Logf("Destroy during Create has returned, and Create with: %v; now nothing is to be left", createErr)
		s.absent(spec.ID)
	}
}

func checkDestroyOnlyThat(s *Suite) {
	who := owner()
	a, b := s.spec(who), s.spec(who)
	s.create(a)
	s.create(b)
	s.destroy(a.ID)
	s.absent(a.ID)
	if got := s.get(b.ID); got.State != vmprovider.StateRunning {
		s.Errorf("destroying one machine changed another: %+v", got)
	}
}

func checkListByOwner(s *Suite) {
	one, two := owner(), owner()
	a, b, c := s.spec(one), s.spec(one), s.spec(two)
	for _, spec := range []vmprovider.Spec{a, b, c} {
		s.create(spec)
	}
	for _, want := range []struct {
		owner string
		ids   []string
	}{{one, []string{a.ID, b.ID}}, {two, []string{c.ID}}, {owner(), nil}} {
		got := s.list(want.owner)
		slices.Sort(got)
		slices.Sort(want.ids)
		if !slices.Equal(got, want.ids) {
			s.Errorf("List(%s) = %v, want %v", want.owner, got, want.ids)
		}
	}
	all := s.list("")
	for _, spec := range []vmprovider.Spec{a, b, c} {
		if !slices.Contains(all, spec.ID) {
			s.Errorf("List of all lacks %s", spec.ID)
		}
	}
}

func checkListBreak(s *Suite) {
	who := owner()
	s.create(s.spec(who))
	s.create(s.spec(who))
	n := 0
	for _, err := range s.p.List(s.ctx, vmprovider.ListOptions{Owner: who}) {
		if err != nil {
			s.Fatalf("List: %v", err)
		}
		n++
		break
	}
	if again := s.list(who); n != 1 || len(again) != 2 {
		s.Errorf("a List of two machines that is broken out of yields %d, and the next one %v; want 1, and both", n, again)
	}
}

func checkContext(s *Suite) {
	spec := s.spec(owner())
	s.create(spec)
	ctx, cancel := context.WithCancel(s.ctx)
	cancel()
	other := s.spec(spec.Owner)
	_, err := s.p.Create(ctx, other)
	s.wants("Create with an ended context", err, context.Canceled)
	_, err = s.p.Get(ctx, spec.ID)
	s.wants("Get with an ended context", err, context.Canceled)
	s.wants("Destroy with an ended context", s.p.Destroy(ctx, spec.ID, vmprovider.DestroyOptions{}), context.Canceled)
	var last error
	for _, err := range s.p.List(ctx, vmprovider.ListOptions{}) {
		if last != nil {
			s.Errorf("List goes on after an error")
		}
		last = err
	}
	s.wants("List with an ended context", last, context.Canceled)
	if got := s.get(spec.ID); got.State != vmprovider.StateRunning {
		s.Errorf("an ended context destroyed a machine: %+v", got)
	}
}

func checkContextDuringCreate(s *Suite) {
	spec := s.spec(owner())
	ctx, cancel := context.WithCancel(s.ctx)
	created := make(chan error, 1)
	go func() {
		_, err := s.p.Create(ctx, spec)
		created <- err
	}()
	cancel()
	var err error
	s.within("Create with its context cancelled", func() { err = <-created })
	if err != nil {
		s.wants("Create with its context cancelled", err, context.Canceled)
	}
	// It may have been quicker, and may have left parts: Destroy copes.
	s.destroy(spec.ID)
	s.absent(spec.ID)
}

func checkConcurrency(s *Suite) {
	n := s.h.Parallel
	if n == 0 {
		n = 8
	}
	if s.h.Capacity > 0 {
		n = min(n, s.h.Capacity)
	}
	who := owner()
	specs := make([]vmprovider.Spec, n)
	for i := range specs {
		specs[i] = s.spec(who)
	}
	errs := make(chan error, 3*n)
	var wg sync.WaitGroup
	for _, spec := range specs {
		wg.Go(func() {
			_, err := s.p.Create(s.ctx, spec)
			errs <- err
			for _, listErr := range s.p.List(s.ctx, vmprovider.ListOptions{Owner: who}) {
				if listErr != nil {
					errs <- listErr
				}
			}
			_, err = s.p.Get(s.ctx, spec.ID)
			errs <- err
		})
	}
	s.within("concurrent Create", wg.Wait)
	if got := s.list(who); len(got) != n {
		s.Errorf("List after %d concurrent Creates: %v", n, got)
	}
	for _, spec := range specs {
		wg.Go(func() { errs <- s.p.Destroy(s.ctx, spec.ID, vmprovider.DestroyOptions{}) })
	}
	s.within("concurrent Destroy", wg.Wait)
	close(errs)
	for err := range errs {
		if err != nil {
			s.Errorf("concurrent use: %v", err)
		}
	}
	if got := s.list(who); len(got) != 0 {
		s.Errorf("left after concurrent Destroys: %v", got)
	}
}

func checkClosed(s *Suite) {
	spec := s.spec(owner())
	s.create(spec)
	s.destroy(spec.ID)
	for range 2 {
		if err := s.p.Close(); err != nil {
			s.Errorf("Close: %v", err)
		}
	}
	_, err := s.p.Create(s.ctx, spec)
	s.wants("Create after Close", err, vmprovider.ErrClosed)
	_, err = s.p.Get(s.ctx, spec.ID)
	s.wants("Get after Close", err, vmprovider.ErrClosed)
	s.wants("Destroy after Close", s.p.Destroy(s.ctx, spec.ID, vmprovider.DestroyOptions{}), vmprovider.ErrClosed)
	err = nil
	for _, err = range s.p.List(s.ctx, vmprovider.ListOptions{}) {
		continue
	}
	s.wants("List after Close", err, vmprovider.ErrClosed)
}

func checkCapabilities(s *Suite) {
	a, b := s.p.Capabilities(), s.open().Capabilities()
	if a.Isolated != b.Isolated || a.Adopts != b.Adopts || !slices.Equal(a.Platform, b.Platform) {
		s.Errorf("Capabilities differ: %+v, %+v", a, b)
	}
	for _, p := range a.Platform {
		if os, arch, ok := strings.Cut(p, "/"); !ok || os == "" || arch == "" {
			s.Errorf("platform %q; want os/arch", p)
		}
	}
}

func checkWaitByLooking(s *Suite) {
	spec := s.spec(owner())
	s.create(spec)
	s.until(spec.ID, in(vmprovider.StateRunning))
	s.destroy(spec.ID)
	s.until(spec.ID, in(vmprovider.StateGone))
	_, err := vmprovider.Wait(s.ctx, onlyProvider{s.p}, spec.ID, in(vmprovider.StateRunning))
	s.wants("Wait for a machine that is gone", err, vmprovider.ErrNotFound)
}

func checkLeftover(s *Suite) {
	spec := s.spec(owner())
	s.h.Leave(s.T, spec.ID, spec.Owner)
	if got := s.get(spec.ID); got.State != vmprovider.StateLeftover || got.ID != spec.ID || got.Owner != spec.Owner {
		s.Errorf("Get gave %+v; want a leftover of %s", got, spec.Owner)
	}
	if !slices.Contains(s.list(spec.Owner), spec.ID) {
		s.Errorf("List by owner lacks the leftover")
	}
	_, err := s.p.Create(s.ctx, spec)
	s.wants("Create over a leftover", err, vmprovider.ErrExists)
	s.destroy(spec.ID)
	s.absent(spec.ID)
}

func checkNeverBoots(s *Suite) {
	spec := s.bare(owner())
	s.h.NeverBoots(s.T, &spec)
	if inst := s.create(spec); inst.State != vmprovider.StateRunning {
		s.Errorf("Create gave %+v; want it running", inst)
	}
	s.destroy(spec.ID)
	s.absent(spec.ID)
}

func checkExitsEarly(s *Suite) { s.stops("powered off", s.h.ExitsEarly) }

func checkPanics(s *Suite) { s.stops("panicked", s.h.Panics) }

// stops checks a machine that ends by itself, and is kept until it is destroyed.
func (s *Suite) stops(what string, complete func(T, *vmprovider.Spec)) {
	s.Helper()
	spec := s.bare(owner())
	complete(s.T, &spec)
	s.create(spec)
	inst := s.until(spec.ID, func(i vmprovider.Instance) bool { return i.State != vmprovider.StateRunning })
	if inst.State != vmprovider.StateStopped || inst.Reason == "" {
		s.Errorf("a machine that %s is %+v; want it stopped, with a reason", what, inst)
	}
	if !slices.Contains(s.list(spec.Owner), spec.ID) {
		s.Errorf("List lacks a machine that %s", what)
	}
	_, err := s.p.Create(s.ctx, spec)
	s.wants("Create over a stopped machine", err, vmprovider.ErrExists)
	s.destroy(spec.ID)
	s.absent(spec.ID)
}

func checkCapacity(s *Suite) {
	who := owner()
	var last vmprovider.Spec
	for range s.h.Capacity {
		last = s.spec(who)
		s.create(last)
	}
	more := s.spec(who)
	_, err := s.p.Create(s.ctx, more)
	s.wants("Create beyond the capacity", err, vmprovider.ErrCapacity)
	s.absent(more.ID)
	s.destroy(last.ID)
	s.create(more)
}

func checkReopen(s *Suite) {
	spec := s.spec(owner())
	inst := s.create(spec)
	if err := s.p.Close(); err != nil {
		s.Fatalf("Close: %v", err)
	}
	s.p = s.open()
	got := s.get(spec.ID)
	if err := sameInstance(got, inst); err != nil || got.State != vmprovider.StateRunning {
		s.Errorf("after reopening: %+v, %v; want it running, as Capabilities.Adopts says", got, err)
	}
	if !slices.Contains(s.list(spec.Owner), spec.ID) {
		s.Errorf("List of the reopened provider lacks the machine")
	}
	_, err := s.p.Create(s.ctx, spec)
	s.wants("a repeated ID after reopening", err, vmprovider.ErrExists)
	s.destroy(spec.ID)
	s.absent(spec.ID)
}

func checkReopenDuringCreate(s *Suite) {
	for range 5 {
		spec := s.spec(owner())
		p := s.p
		created := make(chan error, 1)
		go func() {
			_, err := p.Create(s.ctx, spec)
			created <- err
		}()
		if err := p.Close(); err != nil {
			s.Errorf("Close during Create: %v", err)
		}
		var err error
		s.within("Create during Close", func() { err = <-created })
		if err != nil {
			s.wants("Create during Close", err, vmprovider.ErrClosed)
		}
		s.p = s.open()
		if inst, getErr := s.p.Get(s.ctx, spec.ID); err == nil && (getErr != nil || inst.State != vmprovider.StateRunning) {
			s.Errorf("Create succeeded, yet the reopened provider has %+v, %v", inst, getErr)
		}
		s.destroy(spec.ID)
		s.absent(spec.ID)
	}
}
