package proctree

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Cgroup is a control group of version 2 (cgroups(7)), used only to hold
// processes together: no descendant leaves it by fork, setsid or orphanage.
type Cgroup struct {
	path string
}

// NewCgroup makes a cgroup of that name below the caller's own, or opens it
// where it exists. It wraps errors.ErrUnsupported where there is no cgroup v2
// or the caller may not make one, which is usual without root or delegation.
func NewCgroup(name string) (*Cgroup, error) {
	path, err := CgroupPath(name)
	if err != nil {
		return nil, err
	}
	return MakeCgroup(path)
}

// MakeCgroup is NewCgroup at a path that CgroupPath gave.
func MakeCgroup(path string) (*Cgroup, error) {
	if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("proctree: cgroup: %w: %w", errors.ErrUnsupported, err)
	}
	return OpenCgroup(path)
}

// CgroupPath is the Path of what NewCgroup would make, so that it can be
// written down before.
func CgroupPath(name string) (string, error) {
	if name == "" || name == "." || name == ".." || strings.ContainsRune(name, '/') {
		return "", fmt.Errorf("proctree: cgroup name %q", name)
	}
	parent, err := ownCgroup()
	if err != nil {
		return "", fmt.Errorf("proctree: cgroup: %w: %w", errors.ErrUnsupported, err)
	}
	return filepath.Join(parent, name), nil
}

// OpenCgroup opens an existing cgroup by its Path. An error wraps
// fs.ErrNotExist where it is gone, and errors.ErrUnsupported where path is no
// cgroup.
func OpenCgroup(path string) (*Cgroup, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return nil, fmt.Errorf("proctree: cgroup %s: %w", path, err)
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC {
		return nil, fmt.Errorf("proctree: %s is no cgroup of version 2: %w", path, errors.ErrUnsupported)
	}
	return &Cgroup{path: path}, nil
}

// ownCgroup is the directory of the cgroup that the caller is in.
func ownCgroup() (string, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	own, found := "", false
	for line := range strings.Lines(string(b)) {
		if p, ok := strings.CutPrefix(strings.TrimRight(line, "\n"), "0::"); ok {
			own, found = p, true
		}
	}
	if !found {
		return "", errors.New("not in a cgroup of version 2")
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(mounts)) {
		where, what, _ := strings.Cut(line, " - ")
		f := strings.Fields(where)
		if !strings.HasPrefix(what, "cgroup2 ") || len(f) < 5 {
			continue
		}
		rel, err := filepath.Rel(f[3], own)
		if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
			continue // this mount does not show it
		}
		return filepath.Join(f[4], rel), nil
	}
	return "", errors.New("no cgroup2 file system mounted that shows it")
}

// Path is the cgroup's directory; OpenCgroup takes it.
func (c *Cgroup) Path() string { return c.path }

// Attach makes cmd start inside the cgroup. Call done once cmd has started or
// failed to.
func (c *Cgroup) Attach(cmd *exec.Cmd) (done func(), err error) {
	d, err := os.Open(c.path)
	if err != nil {
		return nil, fmt.Errorf("proctree: cgroup: %w", err)
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.UseCgroupFD = true
	cmd.SysProcAttr.CgroupFD = int(d.Fd()) //nolint:gosec // a descriptor fits
	return func() { d.Close() }, nil
}

// Detach takes back Attach, for where starting inside is refused.
func (c *Cgroup) Detach(cmd *exec.Cmd) {
	cmd.SysProcAttr.UseCgroupFD = false
	cmd.SysProcAttr.CgroupFD = 0
}

// Processes lists the processes in the cgroup and those below it.
func (c *Cgroup) Processes() ([]ID, error) {
	var out []ID
	err := c.walk(func(dir string) error {
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil {
			return err
		}
		for word := range strings.FieldsSeq(string(b)) {
			pid, err := strconv.Atoi(word)
			if err != nil || pid == 0 {
				continue // 0: of another pid namespace, nothing to signal
			}
			if p, err := lookup(pid); err == nil && !p.Zombie {
				out = append(out, p.ID)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("proctree: cgroup: %w", err)
	}
	return out, nil
}

// Empty says whether no process is in the cgroup or below it, zombies aside; it
// reads one small file, whatever the host has of processes.
func (c *Cgroup) Empty() (bool, error) {
	b, err := os.ReadFile(filepath.Join(c.path, "cgroup.events"))
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("proctree: cgroup: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.TrimSpace(line) == "populated 0" {
			return true, nil
		}
	}
	return false, nil
}

// walk calls f for the directory of the cgroup and of all below it, children
// first; what vanishes meanwhile is skipped.
func (c *Cgroup) walk(f func(dir string) error) error {
	var rec func(string) error
	rec = func(dir string) error {
		entries, err := os.ReadDir(dir)
		if err == nil {
			for _, e := range entries {
				if e.IsDir() {
					if err := rec(filepath.Join(dir, e.Name())); err != nil {
						return err
					}
				}
			}
			err = f(dir)
		}
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil
		}
		return err
	}
	return rec(c.path)
}

// Kill sends SIGKILL to all in the cgroup and below it, forks that race
// included (cgroup.kill, Linux 5.14); before that, to all that it finds.
func (c *Cgroup) Kill() error {
	err := os.WriteFile(filepath.Join(c.path, "cgroup.kill"), []byte("1"), 0)
	if err == nil {
		return nil
	}
	if _, gone := os.Stat(c.path); errors.Is(gone, fs.ErrNotExist) {
		return nil
	}
	ids, err := c.Processes()
	if err != nil {
		return err
	}
	for _, id := range ids {
		if err := id.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
	}
	return nil
}

// Remove kills what is in the cgroup and removes it with all below it, waiting
// until the kernel lets go. Absent is no error.
func (c *Cgroup) Remove(ctx context.Context) error {
	var last error
	if err := os.Remove(c.path); err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil // as mostly
	}
	err := poll(ctx, 50*time.Millisecond, func() (bool, error) {
		last = c.walk(os.Remove)
		if errors.Is(last, unix.EBUSY) {
			return false, c.Kill()
		}
		return true, last
	})
	if err != nil {
		return fmt.Errorf("proctree: remove cgroup: %w", errors.Join(err, last))
	}
	return nil
}
