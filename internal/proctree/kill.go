//go:build unix

package proctree

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
)

// Target says which processes KillAll ends: the union of what its fields name.
// The caller itself and process 1 are never among them.
type Target struct {
	// Root and all that descend from it. Root is stopped first and ended last:
	// as long as it lives, orphans that it adopts (SetSubreaper) are found.
	Root ID
	// SpareRoot leaves Root itself alone, untouched.
	SpareRoot bool
	// Marker, "NAME=value": processes started with it in their environment, and
	// all that descend from them. Ignored where there is no way to look.
	Marker string
	// Cgroup: all processes in it.
	Cgroup *Cgroup
	// Contained says that all others were started inside Cgroup: then the table
	// is not read, which costs as much as the machine has processes.
	Contained bool
	// Reaper takes away what the caller adopted, as it ends; nil: nothing does.
	Reaper *Reaper
}

// stopRounds bounds how often the table is read to stop newcomers before the
// killing starts all the same; a stopped process does not fork, so two or three
// are usual.
const stopRounds = 20

// KillAll ends every process of the target with SIGKILL and returns nil when
// none is left but zombies; otherwise an error says which are left, and why.
// Processes that fork meanwhile are found as well: all are stopped before the
// first is killed, and the search is repeated until it finds nothing.
// Having nothing to do is no error.
func KillAll(ctx context.Context, t Target) error {
	h := hunt{
		Target: t, self: os.Getpid(),
		members: map[ID]bool{}, strangers: map[ID]bool{}, failed: map[ID]error{},
	}
	h.SpareRoot = t.SpareRoot || t.Root.PID == h.self
	if err := h.stop(ctx); err != nil {
		return err
	}
	if err := h.kill(ctx); err != nil {
		return err
	}
	return h.killRoot(ctx)
}

type hunt struct {
	Target
	self      int
	members   map[ID]bool // ever seen; true once it was stopped
	strangers map[ID]bool // seen without the marker; false: look once more
	failed    map[ID]error
}

// scan reads the table once and gives the living members, Root excepted. sure
// says that there are no others.
func (h *hunt) scan(ctx context.Context) (alive []ID, sure bool, err error) {
	if err := ctx.Err(); err != nil {
		return nil, false, fmt.Errorf("proctree: kill: %w", err)
	}
	if h.Reaper != nil {
		h.Reaper.Reap()
	}
	if h.Cgroup != nil {
		ids, err := h.Cgroup.Processes()
		if err != nil {
			return nil, false, err
		}
		for _, id := range ids {
			h.add(id)
		}
	}
	if h.Cgroup != nil && h.Contained {
		for id := range h.members {
			if p, err := Lookup(id.PID); err == nil && p.ID == id && !p.Zombie {
				alive = append(alive, id)
			}
		}
		return alive, true, nil
	}
	table, err := Processes()
	if err != nil {
		return nil, false, err
	}
	if sure, err = h.mark(table); err != nil {
		return nil, false, err
	}
	byPID := make(map[int]Process, len(table))
	for _, p := range table {
		byPID[p.PID] = p
	}
	// Membership spreads from parent to child until nothing is added.
	for grown := true; grown; {
		grown = false
		for _, p := range table {
			parent, ok := byPID[p.PPID]
			if !ok {
				continue
			}
			if _, in := h.members[parent.ID]; in || !h.Root.IsZero() && parent.ID == h.Root {
				grown = h.add(p.ID) || grown
			}
		}
	}
	for id := range h.members {
		if p, ok := byPID[id.PID]; ok && p.ID == id && !p.Zombie {
			alive = append(alive, id)
		}
	}
	return alive, sure, nil
}

// mark adds those that carry the marker. An environment is read once, an empty
// one twice: until the second look the hunt is not sure.
func (h *hunt) mark(table []Process) (sure bool, err error) {
	if h.Marker == "" {
		return true, nil
	}
	sure = true
	for _, p := range table {
		if _, in := h.members[p.ID]; in || p.Zombie || h.strangers[p.ID] {
			continue
		}
		yes, unsure, err := carries(p.ID, h.Marker)
		if errors.Is(err, errors.ErrUnsupported) {
			return true, nil
		}
		if err != nil {
			return false, err
		}
		if yes {
			h.add(p.ID)
			continue
		}
		_, second := h.strangers[p.ID]
		h.strangers[p.ID] = second || !unsure
		sure = sure && h.strangers[p.ID]
	}
	return sure, nil
}

// add takes a process among the members and says whether it is new.
func (h *hunt) add(id ID) bool {
	if _, in := h.members[id]; in || id.PID == h.self || id.PID == 1 || id == h.Root {
		return false
	}
	h.members[id] = false
	return true
}

func (h *hunt) signal(id ID, sig syscall.Signal) {
	if err := id.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		h.failed[id] = err
	}
}

// stop freezes the tree, so that it neither grows nor loses its shape while it
// is being killed. What is in the cgroup need not be frozen: cgroup.kill takes
// its forks along.
func (h *hunt) stop(ctx context.Context) error {
	if !h.Root.IsZero() && !h.SpareRoot {
		h.signal(h.Root, syscall.SIGSTOP)
	}
	for range stopRounds {
		alive, sure, err := h.scan(ctx)
		if err != nil {
			return err
		}
		if h.Cgroup != nil {
			if err := h.Cgroup.Kill(); err != nil {
				return err
			}
		}
		fresh := false
		for _, id := range alive {
			if !h.members[id] {
				h.members[id] = true
				h.signal(id, syscall.SIGSTOP)
				fresh = true
			}
		}
		if !fresh && sure {
			return nil
		}
	}
	return nil
}

func (h *hunt) kill(ctx context.Context) error {
	var alive []ID
	for id := range h.members {
		h.signal(id, syscall.SIGKILL)
	}
	if len(h.members) == 0 {
		return nil // and stop was sure of it, or gave up on a table in flux
	}
	err := poll(ctx, 50*time.Millisecond, func() (done bool, err error) {
		var sure bool
		if alive, sure, err = h.scan(ctx); err != nil {
			return false, err
		}
		if len(alive) > 0 && h.Cgroup != nil {
			if err := h.Cgroup.Kill(); err != nil {
				return false, err
			}
		}
		for _, id := range alive {
			h.signal(id, syscall.SIGKILL)
		}
		return len(alive) == 0 && sure, nil
	})
	return h.outcome(err, alive)
}

func (h *hunt) killRoot(ctx context.Context) error {
	if h.Root.IsZero() || h.SpareRoot || h.Root.PID == 1 {
		return nil
	}
	h.signal(h.Root, syscall.SIGKILL)
	return h.outcome(h.Root.Wait(ctx), []ID{h.Root})
}

// outcome says of which process an error is.
func (h *hunt) outcome(err error, alive []ID) error {
	if err == nil {
		return nil
	}
	errs := []error{fmt.Errorf("proctree: processes %v left: %w", alive, err)}
	for _, id := range alive {
		if h.failed[id] != nil {
			errs = append(errs, h.failed[id])
		}
	}
	return errors.Join(errs...)
}
