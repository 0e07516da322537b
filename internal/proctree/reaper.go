//go:build unix

package proctree

import (
	"os"
	"os/exec"
	"sync"
	"syscall"
)

// Reaper takes away the zombies that a subreaper adopted without stealing the
// exit status of a child that os/exec waits for. The kernel does not tell the
// two apart, so every command of the process has to be started and waited for
// through the one Reaper. The zero value is ready.
type Reaper struct {
	mu    sync.Mutex
	owned map[int]struct{}
}

// Start is cmd.Start; the child is not touched by Reap until Wait returned.
func (r *Reaper) Start(cmd *exec.Cmd) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return err
	}
	if r.owned == nil {
		r.owned = map[int]struct{}{}
	}
	r.owned[cmd.Process.Pid] = struct{}{}
	return nil
}

// Wait is cmd.Wait, once for each Start.
func (r *Reaper) Wait(cmd *exec.Cmd) error {
	err := cmd.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.owned, cmd.Process.Pid)
	return err
}

// Reap takes away the zombies among the caller's children that nobody waits
// for, and says how many there were. Call it when a step has ended, or on
// SIGCHLD; KillAll calls it.
func (r *Reaper) Reap() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	table, err := Processes()
	if err != nil {
		return 0 // they stay zombies until the next time
	}
	n, self := 0, os.Getpid()
	for _, p := range table {
		if !p.Zombie || p.PPID != self {
			continue
		}
		if _, ours := r.owned[p.PID]; ours {
			continue
		}
		if pid, err := syscall.Wait4(p.PID, nil, syscall.WNOHANG, nil); err == nil && pid == p.PID {
			n++
		}
	}
	return n
}
