package vmprovidertest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// console opens the console, which has to exist.
func (s *Suite) console(ctx context.Context, id string, follow bool) io.ReadCloser {
	s.Helper()
	c, _ := vmprovider.As[vmprovider.Consoler](s.p)
	r, err := c.Console(ctx, id, follow)
	if err != nil {
		s.Fatalf("Console(%s): %v", id, err)
	}
	return r
}

// printing creates a machine that prints text.
func (s *Suite) printing(text string) string {
	s.Helper()
	spec := s.bare(owner())
	s.h.Prints(s.T, &spec, text)
	s.create(spec)
	return spec.ID
}

func text() string { return "begin " + strings.Repeat("0123456789abcdef\n", 512) + "end\n" }

// awaitText follows the console until want has come, which has to be the first
// thing printed.
func (s *Suite) awaitText(r io.Reader, want string) {
	s.Helper()
	got := make([]byte, len(want))
	s.within("Read of a console that is followed", func() {
		if n, err := io.ReadFull(r, got); err != nil {
			s.Errorf("console ended after %d of %d bytes: %v", n, len(want), err)
		}
	})
	if !bytes.Equal(got, []byte(want)) {
		s.Errorf("console begins with %.60q, want %.60q", got, want)
	}
}

func checkConsole(s *Suite) {
	want := text()
	id := s.printing(want)
	follow := s.console(s.ctx, id, true)
	s.awaitText(follow, want)
	follow.Close()
	// All is there now, and the machine runs: a reader that does not follow
	// comes to an end all the same.
	var got []byte
	var err error
	r := s.console(s.ctx, id, false)
	defer r.Close()
	s.within("Read of a console", func() { got, err = io.ReadAll(r) })
	if err != nil || !bytes.HasPrefix(got, []byte(want)) {
		s.Errorf("console: %d bytes %.60q, %v; want %d from the first on", len(got), got, err, len(want))
	}
}

func checkConsoleFollow(s *Suite) {
	want := text()
	id := s.printing(want)
	r := s.console(s.ctx, id, true)
	defer r.Close()
	s.awaitText(r, want)
	rest := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, r)
		rest <- err
	}()
	s.destroy(id)
	s.within("Read of a console whose machine has gone", func() {
		if err := <-rest; err != nil {
			s.Errorf("a followed console ended with %v; want EOF", err)
		}
	})
}

func checkConsoleAbsent(s *Suite) {
	c, _ := vmprovider.As[vmprovider.Consoler](s.p)
	for _, follow := range []bool{false, true} {
		r, err := c.Console(s.ctx, s.id(), follow)
		if err == nil {
			_, err = r.Read(make([]byte, 1)) // where opening is lazy
			r.Close()
		}
		s.wants("Console of an absent machine", err, vmprovider.ErrNotFound)
	}
}

func checkConsoleAfterExit(s *Suite) {
	spec := s.bare(owner())
	s.h.ExitsEarly(s.T, &spec)
	s.create(spec)
	s.until(spec.ID, in(vmprovider.StateStopped))
	for _, follow := range []bool{false, true} {
		r := s.console(s.ctx, spec.ID, follow)
		s.within("Read of a stopped machine's console", func() {
			if _, err := io.Copy(io.Discard, r); err != nil {
				s.Errorf("console of a stopped machine: %v", err)
			}
		})
		r.Close()
	}
}

func checkConsoleContext(s *Suite) {
	want := text()
	id := s.printing(want)
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	r := s.console(ctx, id, true)
	defer r.Close()
	s.awaitText(r, want)
	ended := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, r)
		ended <- err
	}()
	cancel()
	s.within("Read with its context cancelled", func() { s.wants("Read", <-ended, context.Canceled) })
}

// watcher reads a Watch in the background.
type watcher struct {
	events chan vmprovider.Instance
	end    chan error
}

func (s *Suite) watch(ctx context.Context) watcher {
	v, _ := vmprovider.As[vmprovider.Watcher](s.p)
	w := watcher{events: make(chan vmprovider.Instance, 1024), end: make(chan error, 1)}
	go func() {
		var last error
		for inst, err := range v.Watch(ctx) {
			if last = err; err != nil {
				continue // nothing may follow
			}
			w.events <- inst
		}
		close(w.events)
		w.end <- last
	}()
	return w
}

// until gives all that is watched up to the first that cond accepts.
func (s *Suite) event(w watcher, what string, cond func(vmprovider.Instance) bool) []vmprovider.Instance {
	s.Helper()
	var seen []vmprovider.Instance
	for {
		select {
		case inst, ok := <-w.events:
			if !ok {
				s.Fatalf("Watch ended before %s: %v", what, <-w.end)
			}
			seen = append(seen, inst)
			if cond(inst) {
				return seen
			}
		case <-s.ctx.Done():
			s.Fatalf("Watch does not tell of %s; seen: %+v", what, seen)
		}
	}
}

func complete(i vmprovider.Instance) bool { return i == vmprovider.Instance{} }

func of(id string, states ...vmprovider.State) func(vmprovider.Instance) bool {
	return func(i vmprovider.Instance) bool { return i.ID == id && slices.Contains(states, i.State) }
}

func checkWatch(s *Suite) {
	w := s.watch(s.ctx)
	s.event(w, "the snapshot's end", complete)
	spec := s.spec(owner())
	inst := s.create(spec)
	seen := s.event(w, "the machine running", of(spec.ID, vmprovider.StateRunning))
	if err := sameInstance(seen[len(seen)-1], inst); err != nil {
		s.Errorf("Watch: %v", err)
	}
	s.destroy(spec.ID)
	seen = s.event(w, "the machine gone", of(spec.ID, vmprovider.StateGone))
	_ = seen
	// Wait is told by Watch; the machine is gone, which it has to see too.
	_, err := vmprovider.Wait(s.ctx, s.p, spec.ID, in(vmprovider.StateRunning))
	s.wants("Wait for a machine that is gone", err, vmprovider.ErrNotFound)
}

func checkWatchSnapshot(s *Suite) {
	spec := s.spec(owner())
	s.create(spec)
	w := s.watch(s.ctx)
	seen := s.event(w, "the snapshot's end", complete)
	if !slices.ContainsFunc(seen, of(spec.ID, vmprovider.StateRunning)) {
		s.Errorf("Watch began with %+v, which lacks %s", seen, spec.ID)
	}
	got, err := vmprovider.Wait(s.ctx, s.p, spec.ID, in(vmprovider.StateRunning))
	if err != nil || got.ID != spec.ID {
		s.Errorf("Wait for what is so already: %+v, %v", got, err)
	}
}

func checkWatchExit(s *Suite) {
	w := s.watch(s.ctx)
	s.event(w, "the snapshot's end", complete)
	spec := s.bare(owner())
	s.h.ExitsEarly(s.T, &spec)
	s.create(spec)
	s.event(w, "the machine stopped", of(spec.ID, vmprovider.StateStopped))
	if got := s.get(spec.ID); got.State != vmprovider.StateStopped {
		s.Errorf("Watch says stopped, Get says %+v", got)
	}
}

func checkWatchEnds(s *Suite) {
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	w := s.watch(ctx)
	s.event(w, "the snapshot's end", complete)
	cancel()
	s.within("Watch with its context cancelled", func() {
		if err := <-w.end; !errors.Is(err, context.Canceled) {
			s.Errorf("Watch ended with %v; want the context's error", err)
		}
	})
	w = s.watch(s.ctx)
	s.event(w, "the snapshot's end", complete)
	s.within("Close while watching", func() {
		if err := s.p.Close(); err != nil {
			s.Errorf("Close: %v", err)
		}
		if err := <-w.end; !errors.Is(err, vmprovider.ErrClosed) {
			s.Errorf("Watch ended with %v; want ErrClosed", err)
		}
	})
}
