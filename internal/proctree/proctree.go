//go:build unix

// Package proctree finds and ends processes reliably: a process is known by its
// pid and its start time, so that a recycled pid is never mistaken for it; the
// descendants of a process are found also where they left its session or its
// process group; and all of them are ended in spite of forks that race.
//
// What systems offer differs. Linux has everything below. Elsewhere there are
// no subreaper, no marker and no cgroup: a descendant that lost its parent has
// moved to init and is not found any more, and a signal is sent after a check
// of the start time instead of through a handle. Start times come from
// /proc/PID/stat (proc(5)) on Linux, /proc/PID/psinfo (proc(5)) on illumos,
// sysctl kern.proc on darwin, and ps(1) on the BSDs, where they count seconds.
package proctree

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// ID identifies a process for ever: pids are recycled, a pid with its start
// time is not.
type ID struct {
	PID int `json:"pid"`
	// Start is an opaque word without spaces or slashes, the same for as long
	// as the process lives; on Linux it differs between boots.
	Start string `json:"start"`
}

// String gives "PID.START", which ParseID reads.
func (id ID) String() string { return strconv.Itoa(id.PID) + "." + id.Start }

// IsZero says that id identifies nothing.
func (id ID) IsZero() bool { return id == ID{} }

// ParseID reads what ID.String wrote.
func ParseID(s string) (ID, error) {
	pid, start, ok := strings.Cut(s, ".")
	n, err := strconv.Atoi(pid)
	if !ok || err != nil || n <= 0 || start == "" {
		return ID{}, fmt.Errorf("proctree: not a process id: %q", s)
	}
	return ID{PID: n, Start: start}, nil
}

// Process is an entry of the process table.
type Process struct {
	ID
	PPID   int
	Zombie bool // has ended, and its parent has not taken notice yet
}

// Self identifies the calling process.
func Self() (ID, error) {
	p, err := Lookup(os.Getpid())
	return p.ID, err
}

// Lookup reads the entry of pid, a zombie's too. An error wraps
// os.ErrProcessDone where there is none.
func Lookup(pid int) (Process, error) {
	p, err := lookup(pid)
	if err != nil {
		return Process{}, fmt.Errorf("proctree: process %d: %w", pid, err)
	}
	return p, nil
}

// Processes reads the process table. It is no atomic snapshot: processes come
// and go meanwhile.
func Processes() ([]Process, error) {
	ps, err := processes()
	if err != nil {
		return nil, fmt.Errorf("proctree: read the process table: %w", err)
	}
	return ps, nil
}

// Alive says whether the process runs. A zombie does not, and neither does
// another process that got the same pid. Where the process table cannot be
// read the answer is true.
func (id ID) Alive() bool {
	p, err := Lookup(id.PID)
	if err != nil {
		return !errors.Is(err, os.ErrProcessDone)
	}
	return p.ID == id && !p.Zombie
}

// Wait returns nil when the process has ended (at once if there is no such
// process), or the error of ctx. It works for any process, not only children,
// and reaps nothing. On Linux the kernel wakes it; elsewhere it polls.
func (id ID) Wait(ctx context.Context) error {
	err := wait(ctx, id)
	if errors.Is(err, errors.ErrUnsupported) {
		return poll(ctx, 250*time.Millisecond, func() (bool, error) { return !id.Alive(), nil })
	}
	return err
}

// Descendants lists the living processes that descend from pid, parents before
// children, without pid itself. Those whose parent has ended are found only
// where they were adopted by a descendant or by pid itself (SetSubreaper).
func Descendants(pid int) ([]ID, error) {
	table, err := Processes()
	if err != nil {
		return nil, err
	}
	children := map[int][]Process{}
	for _, p := range table {
		children[p.PPID] = append(children[p.PPID], p)
	}
	var out []ID
	seen := map[int]bool{pid: true}
	for queue := []int{pid}; len(queue) > 0; queue = queue[1:] {
		for _, c := range children[queue[0]] {
			if seen[c.PID] {
				continue
			}
			seen[c.PID] = true
			queue = append(queue, c.PID)
			if !c.Zombie {
				out = append(out, c.ID)
			}
		}
	}
	return out, nil
}

// Marked lists the living processes, the caller excepted, that were started
// with marker ("NAME=value") in their environment, as far as the caller may
// see it. Elsewhere than on Linux it wraps errors.ErrUnsupported.
func Marked(marker string) ([]ID, error) {
	if name, _, ok := strings.Cut(marker, "="); !ok || name == "" || strings.ContainsRune(marker, 0) {
		return nil, fmt.Errorf("proctree: marker %q: want NAME=value", marker)
	}
	table, err := Processes()
	if err != nil {
		return nil, err
	}
	var out []ID
	for _, p := range table {
		if p.Zombie || p.PID == os.Getpid() {
			continue
		}
		yes, _, err := carries(p.ID, marker)
		if err != nil {
			return nil, err
		}
		if yes {
			out = append(out, p.ID)
		}
	}
	return out, nil
}

// SetSubreaper makes the calling process the one that adopts its orphaned
// descendants, so that they stay its descendants (Linux, prctl(2)); elsewhere
// it wraps errors.ErrUnsupported. What it adopts it has to reap: see Reaper.
func SetSubreaper() error { return setSubreaper() }

// Childless reports whether the caller has no children, not even zombies. A
// subreaper without children has no descendants. False where the system cannot
// tell.
func Childless() bool { return childless() }

// poll asks done with growing pauses until it says true or fails, or ctx ends.
func poll(ctx context.Context, longest time.Duration, done func() (bool, error)) error {
	pause := time.Millisecond
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		}
		if ok, err := done(); ok || err != nil {
			return err
		}
		timer.Reset(pause)
		pause = min(2*pause, longest)
	}
}
