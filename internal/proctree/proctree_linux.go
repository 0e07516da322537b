package proctree

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// bootID tells apart start times of different boots; they count from the boot.
var bootID = sync.OnceValue(func() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.ReplaceAll(strings.TrimSpace(string(b)), "-", "")
})

func lookup(pid int) (Process, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			return Process{}, os.ErrProcessDone
		}
		return Process{}, err
	}
	return parseStat(pid, b)
}

// parseStat reads what proc(5) calls /proc/[pid]/stat. The second field is the
// command's name in parentheses, which may hold anything, parentheses too.
func parseStat(pid int, b []byte) (Process, error) {
	i := bytes.LastIndexByte(b, ')')
	f := strings.Fields(string(b[i+1:])) // f[0] is field 3, the state
	if i < 0 || len(f) < 20 {
		return Process{}, fmt.Errorf("malformed stat %q", b)
	}
	ppid, err := strconv.Atoi(f[1])
	if err != nil {
		return Process{}, fmt.Errorf("malformed stat %q", b)
	}
	return Process{
		ID:     ID{PID: pid, Start: f[19] + "-" + bootID()},
		PPID:   ppid,
		Zombie: f[0] == "Z" || f[0] == "X" || f[0] == "x",
	}, nil
}

func pids() ([]int, error) {
	d, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var out []int
	for _, n := range names {
		if pid, err := strconv.Atoi(n); err == nil {
			out = append(out, pid)
		}
	}
	return out, nil
}

func processes() ([]Process, error) {
	all, err := pids()
	if err != nil {
		return nil, err
	}
	var out []Process
	for _, pid := range all {
		p, err := lookup(pid)
		if errors.Is(err, os.ErrProcessDone) || errors.Is(err, fs.ErrPermission) {
			continue // ended, or hidden by hidepid
		}
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

// carries says whether the process has the marker. It is unsure where the
// environment is empty, as it also is for a moment during execve(2).
func carries(id ID, marker string) (yes, unsure bool, err error) {
	env, err := os.ReadFile("/proc/" + strconv.Itoa(id.PID) + "/environ")
	if err != nil {
		return false, false, nil // ended, or not ours to see
	}
	word := []byte(marker)
	for v := range bytes.SplitSeq(env, []byte{0}) {
		if bytes.Equal(v, word) {
			// The pid may have changed hands since the table was read.
			p, err := lookup(id.PID)
			return err == nil && p.ID == id, false, nil
		}
	}
	return false, len(env) == 0, nil
}

func childless() bool {
	err := unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	return errors.Is(err, unix.ECHILD)
}

func setSubreaper() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("proctree: become a subreaper: %w", err)
	}
	return nil
}

// open gives a handle on the very process that id names.
func open(id ID, flags int) (int, error) {
	fd, err := unix.PidfdOpen(id.PID, flags)
	switch {
	case errors.Is(err, unix.ESRCH):
		return -1, os.ErrProcessDone
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EPERM), errors.Is(err, unix.EINVAL):
		return -1, errors.ErrUnsupported // old kernel, or forbidden by a sandbox
	case err != nil:
		return -1, err
	}
	p, err := lookup(id.PID)
	if err == nil && p.ID != id {
		err = os.ErrProcessDone
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// Signal sends sig to that very process. An error wraps os.ErrProcessDone
// where it has ended.
func (id ID) Signal(sig syscall.Signal) error {
	fd, err := open(id, 0)
	if err == nil {
		defer unix.Close(fd)
		err = unix.PidfdSendSignal(fd, sig, nil, 0)
	} else if errors.Is(err, errors.ErrUnsupported) {
		return signalPID(id, sig)
	}
	if errors.Is(err, unix.ESRCH) {
		err = os.ErrProcessDone
	}
	if err != nil {
		return fmt.Errorf("proctree: signal process %d: %w", id.PID, err)
	}
	return nil
}

func wait(ctx context.Context, id ID) error {
	fd, err := open(id, unix.PIDFD_NONBLOCK)
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	defer f.Close()
	conn, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("proctree: wait for process %d: %w", id.PID, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var pollErr error
	err = conn.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}} //nolint:gosec // a descriptor fits
		n, err := unix.Poll(p, 0)
		if errors.Is(err, unix.EINTR) {
			return false
		}
		pollErr = err
		return n > 0 || err != nil
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err = errors.Join(err, pollErr); err != nil {
		return fmt.Errorf("proctree: wait for process %d: %w", id.PID, err)
	}
	return nil
}
