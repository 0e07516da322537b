// Package vmprovidertest is the conformance suite of vmprovider.Provider. A
// driver's test calls Run with a Harness; what the suite asks for follows from
// the driver's Capabilities, its optional interfaces and the machines that the
// harness can make, never from its name.
//
//	func TestConformance(t *testing.T) {
//		vmprovidertest.Run(t, vmprovidertest.Harness{Open: open})
//	}
package vmprovidertest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// Harness says how to reach the driver and what it can be made to do.
type Harness struct {
	// Open gives a provider; required. All that are opened with the same T are
	// on the same hypervisor, so that a check can close one and open the next.
	// The suite closes them.
	Open func(t T) vmprovider.Provider
	// Spec completes a spec that has ID, Owner and ExpiresAt with what the
	// driver needs (image, sizes, bootstrap); nil: nothing. Its machine has to
	// run until it is destroyed.
	Spec func(t T, s *vmprovider.Spec)

	// NeverBoots, when set, completes a spec to a machine that runs and in
	// which nothing ever comes up.
	NeverBoots func(t T, s *vmprovider.Spec)
	// ExitsEarly, when set, completes a spec to a machine that powers off by
	// itself soon.
	ExitsEarly func(t T, s *vmprovider.Spec)
	// Panics, when set, completes a spec to a machine whose system crashes by
	// itself soon.
	Panics func(t T, s *vmprovider.Spec)
	// Prints, when set, completes a spec to a machine that prints text to its
	// console at power-on, first of all, and runs on.
	Prints func(t T, s *vmprovider.Spec, text string)
	// Leave, when set, makes a leftover of a machine of that ID and owner, as a
	// provider that was killed half-way would.
	Leave func(t T, id, owner string)
	// Capacity, when not 0, is how many machines fit at once on the hypervisor,
	// which has to be otherwise empty.
	Capacity int

	// Timeout bounds one check, 2 minutes if 0. It is for drivers that hang;
	// no check passes or fails by how long something takes.
	Timeout time.Duration
	// Parallel is how many machines the check of concurrency makes, 8 if 0.
	Parallel int
}

// T is the part of testing.TB that the suite needs; *testing.T is one.
type T interface {
	Helper()
	Context() context.Context
	Cleanup(f func())
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Check is one promise of the interface.
type Check struct {
	Name string
	// Needs says whether the check applies; nil: to every driver.
	Needs func(h Harness, p vmprovider.Provider) bool
	Run   func(s *Suite)
}

// Run runs every check that applies as a subtest.
func Run(t *testing.T, h Harness) {
	t.Helper()
	for _, c := range Checks() {
		t.Run(c.Name, func(t *testing.T) {
			if !Verify(t, h, c) {
				t.Logf("does not apply to this driver")
			}
		})
	}
}

// Verify runs one check, and says whether it applies.
func Verify(t T, h Harness, c Check) bool {
	t.Helper()
	s := &Suite{T: t, h: h}
	timeout := h.Timeout
	if timeout == 0 {
		timeout = 2 * time.Minute
	}
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	s.ctx = ctx
	t.Cleanup(func() {
		defer cancel()
		s.cleanUp(timeout)
	})
	s.p = s.open()
	if c.Needs != nil && !c.Needs(h, s.p) {
		return false
	}
	c.Run(s)
	return true
}

// Suite is the state of one running check.
type Suite struct {
	T
	h      Harness
	ctx    context.Context
	p      vmprovider.Provider // the one most recently opened
	opened []vmprovider.Provider
	ids    []string
}

func (s *Suite) open() vmprovider.Provider {
	s.Helper()
	p := s.h.Open(s.T)
	s.opened = append(s.opened, p)
	return p
}

// cleanUp destroys what a check that failed has left.
func (s *Suite) cleanUp(timeout time.Duration) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), timeout)
	defer cancel()
	if len(s.ids) > 0 {
		p := s.h.Open(s.T)
		s.opened = append(s.opened, p)
		for _, id := range s.ids {
			if err := p.Destroy(ctx, id, vmprovider.DestroyOptions{}); err != nil {
				s.Errorf("clean up %s: %v", id, err)
			}
		}
	}
	for _, p := range s.opened {
		if err := p.Close(); err != nil {
			s.Errorf("Close: %v", err)
		}
	}
}

// id gives a fresh machine ID that is destroyed in the end.
func (s *Suite) id() string {
	id := "t-" + strings.ToLower(rand.Text())
	s.ids = append(s.ids, id)
	return id
}

func owner() string { return "owner-" + strings.ToLower(rand.Text()[:8]) }

// spec is that of an ordinary machine.
func (s *Suite) spec(owner string) vmprovider.Spec {
	s.Helper()
	spec := s.bare(owner)
	if s.h.Spec != nil {
		s.h.Spec(s.T, &spec)
	}
	return spec
}

func (s *Suite) bare(owner string) vmprovider.Spec {
	return vmprovider.Spec{ID: s.id(), Owner: owner, ExpiresAt: time.Now().Add(time.Hour).Truncate(time.Second)}
}

func (s *Suite) create(spec vmprovider.Spec) vmprovider.Instance {
	s.Helper()
	inst, err := s.p.Create(s.ctx, spec)
	if err != nil && s.ctx.Err() != nil {
		s.Fatalf("Create(%s): %v; it does not return: it should once the machine runs, without waiting for a boot", spec.ID, err)
	}
	if err != nil {
		s.Fatalf("Create(%s): %v", spec.ID, err)
	}
	return inst
}

func (s *Suite) destroy(id string) {
	s.Helper()
	if err := s.p.Destroy(s.ctx, id, vmprovider.DestroyOptions{}); err != nil {
		s.Fatalf("Destroy(%s): %v; want no error, also where nothing is there", id, err)
	}
}

func (s *Suite) get(id string) vmprovider.Instance {
	s.Helper()
	inst, err := s.p.Get(s.ctx, id)
	if err != nil {
		s.Fatalf("Get(%s): %v", id, err)
	}
	return inst
}

// absent asserts that there is nothing of the machine.
func (s *Suite) absent(id string) {
	s.Helper()
	if inst, err := s.p.Get(s.ctx, id); !errors.Is(err, vmprovider.ErrNotFound) {
		s.Errorf("Get(%s) = %+v, %v; want ErrNotFound", id, inst, err)
	}
	if slices.Contains(s.list(""), id) {
		s.Errorf("List still has %s", id)
	}
}

// list gives the IDs of an owner's machines in the order of List.
func (s *Suite) list(owner string) []string {
	s.Helper()
	var ids []string
	for inst, err := range s.p.List(s.ctx, vmprovider.ListOptions{Owner: owner}) {
		if err != nil {
			s.Fatalf("List(%q): %v", owner, err)
		}
		ids = append(ids, inst.ID)
	}
	return ids
}

// wants asserts that err wraps target.
func (s *Suite) wants(what string, err, target error) {
	s.Helper()
	if !errors.Is(err, target) {
		s.Errorf("%s: error %v; want one that wraps %q", what, err, target)
	}
}

func in(states ...vmprovider.State) func(vmprovider.Instance) bool {
	return func(i vmprovider.Instance) bool { return slices.Contains(states, i.State) }
}

// until waits for the machine's state by looking, so that it does not depend
// on what is being tested.
func (s *Suite) until(id string, cond func(vmprovider.Instance) bool) vmprovider.Instance {
	s.Helper()
	inst, err := vmprovider.Wait(s.ctx, onlyProvider{s.p}, id, cond)
	if err != nil {
		s.Fatalf("machine %s does not get there, last %+v: %v", id, inst, err)
	}
	return inst
}

// onlyProvider hides the optional interfaces.
type onlyProvider struct{ vmprovider.Provider }

func (onlyProvider) As(any) bool { return false }

// within runs f and reports an f that does not come back when the check ends.
func (s *Suite) within(what string, f func()) {
	s.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-s.ctx.Done():
		s.Fatalf("%s: does not return", what)
	}
}

func sameInstance(a, b vmprovider.Instance) error {
	var errs []error
	for _, field := range []struct {
		name      string
		got, want any
	}{
		{"ID", a.ID, b.ID},
		{"Owner", a.Owner, b.Owner},
		{"Host", a.Host, b.Host},
		{"CreatedAt", a.CreatedAt.UTC().Round(0), b.CreatedAt.UTC().Round(0)},
		{"ExpiresAt", a.ExpiresAt.UTC().Round(0), b.ExpiresAt.UTC().Round(0)},
	} {
		if field.got != field.want {
			errs = append(errs, fmt.Errorf("%s is %v, was %v", field.name, field.got, field.want))
		}
	}
	return errors.Join(errs...)
}
