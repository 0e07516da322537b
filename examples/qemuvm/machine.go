//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// What a machine's directory holds.
const (
	recordFile  = "machine.json" // whose it is; written before the directory has its name, and never changed
	diskFile    = "disk"         // qcow2, over the image
	seedFile    = "seed"
	consoleFile = "console"
	logFile     = "qemu.log" // what QEMU says itself
	pidFile     = "pid"      // written by QEMU
	qmpFile     = "qmp"      // socket

	// Marks say how far it has got.
	startedFile = "started" // Create has ended well
	doomedFile  = "doomed"  // Destroy has begun

	// Locks say who is there. The kernel takes them from a process that ends,
	// however it ends.
	busyFile  = "busy"  // held by the Create or Destroy under way
	aliveFile = "alive" // held by QEMU, which inherits it
)

const (
	hidden = "." // begins the names of what is no machine: not yet, or not any more
	// longestRoot leaves room for /ID/qmp in a Unix socket's address.
	longestRoot = 107 - 1 - 63 - 1 - len(qmpFile)
)

// record is what machine.json says. It holds no secret.
type record struct {
	ID        string            `json:"id"`
	Owner     string            `json:"owner"`
	Labels    map[string]string `json:"labels,omitempty"`
	CreatedAt time.Time         `json:"created_at"`
	ExpiresAt time.Time         `json:"expires_at"`
}

// machine is a machine's directory.
type machine struct {
	record
	dir         string
	damaged     error    // what is wrong with its record
	busy, alive *os.File // locks that this process holds
}

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }

func (m *machine) mark(name string) error { return os.WriteFile(m.path(name), nil, 0o600) }

func (m *machine) marked(name string) bool {
	_, err := os.Lstat(m.path(name))
	return err == nil
}

// admit makes the machine's directory, under the lock of all: so an ID is given
// once and Max is kept, also between processes. The directory appears complete
// with its record, or not at all.
func (p *Provider) admit(ctx context.Context, s vmprovider.Spec) (_ *machine, err error) {
	all, err := acquire(ctx, filepath.Join(p.cfg.Root, hidden+"lock"))
	if err != nil {
		return nil, err
	}
	defer all.Close()
	ids, err := p.ids()
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		if id == s.ID {
			return nil, vmprovider.ErrExists
		}
	}
	if p.cfg.Max > 0 && len(ids) >= p.cfg.Max {
		return nil, fmt.Errorf("%w: there are %d machines", vmprovider.ErrCapacity, len(ids))
	}
	dir, err := os.MkdirTemp(p.cfg.Root, hidden+"new-")
	if err != nil {
		return nil, err
	}
	m := &machine{dir: dir, record: record{
		ID: s.ID, Owner: s.Owner, Labels: s.Labels, CreatedAt: time.Now().UTC().Round(0), ExpiresAt: s.ExpiresAt,
	}}
	defer func() {
		if err != nil {
			m.release()
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	if m.busy, err = acquire(ctx, m.path(busyFile)); err != nil {
		return nil, err
	}
	if m.alive, err = acquire(ctx, m.path(aliveFile)); err != nil {
		return nil, err
	}
	if err := m.writeRecord(); err != nil {
		return nil, err
	}
	p.step("record")
	m.dir = filepath.Join(p.cfg.Root, m.ID)
	return m, os.Rename(dir, m.dir)
}

func (m *machine) writeRecord() error {
	b, err := json.Marshal(m.record)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(m.path(recordFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

// sweep removes what was killed before it was a machine, or after.
func (p *Provider) sweep(ctx context.Context) error {
	all, err := acquire(ctx, filepath.Join(p.cfg.Root, hidden+"lock"))
	if err != nil {
		return err
	}
	defer all.Close() // nobody is in admit
	entries, err := os.ReadDir(p.cfg.Root)
	for _, e := range entries {
		if e.IsDir() && strings.HasPrefix(e.Name(), hidden) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(p.cfg.Root, e.Name())))
		}
	}
	return err
}

// ids are the machines there are. An error wraps ErrUnavailable.
func (p *Provider) ids() ([]string, error) {
	entries, err := os.ReadDir(p.cfg.Root)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", vmprovider.ErrUnavailable, err)
	}
	var ids []string
	for _, e := range entries {
		if e.IsDir() && vmprovider.ValidateID(e.Name()) == nil {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// load reads a machine's record. A damaged one is no error: something is there.
func (p *Provider) load(id string) (*machine, error) {
	m := &machine{dir: filepath.Join(p.cfg.Root, id)}
	b, err := os.ReadFile(m.path(recordFile))
	if err == nil {
		err = json.Unmarshal(b, &m.record)
	}
	if err == nil && m.ID == id {
		return m, nil
	}
	if _, err := os.Lstat(m.dir); errors.Is(err, os.ErrNotExist) {
		return nil, vmprovider.ErrNotFound
	}
	if _, err := os.ReadDir(p.cfg.Root); err != nil {
		return nil, fmt.Errorf("%w: %w", vmprovider.ErrUnavailable, err)
	}
	m.damaged = fmt.Errorf("damaged record: %w", err)
	m.record = record{ID: id}
	return m, nil
}

func (p *Provider) instance(m *machine, s vmprovider.State, reason string) vmprovider.Instance {
	return vmprovider.Instance{
		ID: m.ID, Owner: m.Owner, State: s, Host: p.host, Reason: reason, CreatedAt: m.CreatedAt, ExpiresAt: m.ExpiresAt,
	}
}

// state is what the marks, the locks and QEMU say.
func (m *machine) state(ctx context.Context) (_ vmprovider.State, reason string) {
	busy := held(m.path(busyFile)) // first: Create marks what it has started, then lets go
	switch {
	case m.damaged != nil:
		return vmprovider.StateLeftover, m.damaged.Error()
	case m.marked(doomedFile) && busy:
		return vmprovider.StateLeftover, "it is being destroyed"
	case m.marked(doomedFile):
		return vmprovider.StateLeftover, "its destruction was cut short"
	case m.marked(startedFile):
		return m.status(ctx)
	case busy:
		return vmprovider.StateCreating, ""
	}
	return vmprovider.StateLeftover, "its creation was cut short"
}

// acquire makes this process the one that changes the machine. It wraps
// ErrNotFound when the machine has gone meanwhile.
func (m *machine) acquire(ctx context.Context) (err error) {
	m.busy, err = acquire(ctx, m.path(busyFile))
	if err == nil {
		if !sameFile(m.busy, m.path(busyFile)) {
			m.release()
			return vmprovider.ErrNotFound
		}
		return nil
	}
	if errors.Is(err, os.ErrNotExist) {
		return vmprovider.ErrNotFound
	}
	return err
}

// release lets go of the locks.
func (m *machine) release() {
	m.dropAlive()
	_ = m.busy.Close() // of nil it does nothing
	m.busy = nil
}

// dropAlive leaves that lock to QEMU, if it was started.
func (m *machine) dropAlive() {
	_ = m.alive.Close()
	m.alive = nil
}

func sameFile(f *os.File, path string) bool {
	a, err := f.Stat()
	b, err2 := os.Stat(path)
	return err == nil && err2 == nil && os.SameFile(a, b)
}

// acquire locks a file, waiting for whoever has it until ctx ends.
func acquire(ctx context.Context, path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			_ = f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			_ = f.Close()
			return nil, context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// held says whether somebody has the lock of a file, also where that is unknown.
func held(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return !errors.Is(err, os.ErrNotExist)
	}
	defer f.Close()
	return errors.Is(syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB), syscall.EWOULDBLOCK)
}
