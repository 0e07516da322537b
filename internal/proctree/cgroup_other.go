//go:build unix && !linux

package proctree

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
)

var errNoCgroup = fmt.Errorf("proctree: cgroup: %w", errors.ErrUnsupported)

// Cgroup exists on Linux only; elsewhere none can be had.
type Cgroup struct{}

// NewCgroup wraps errors.ErrUnsupported.
func NewCgroup(string) (*Cgroup, error) { return nil, errNoCgroup }

// MakeCgroup wraps errors.ErrUnsupported.
func MakeCgroup(string) (*Cgroup, error) { return nil, errNoCgroup }

// CgroupPath wraps errors.ErrUnsupported.
func CgroupPath(string) (string, error) { return "", errNoCgroup }

// OpenCgroup wraps errors.ErrUnsupported.
func OpenCgroup(string) (*Cgroup, error) { return nil, errNoCgroup }

// Path is empty.
func (*Cgroup) Path() string { return "" }

// Attach wraps errors.ErrUnsupported.
func (*Cgroup) Attach(*exec.Cmd) (done func(), err error) { return nil, errNoCgroup }

// Detach does nothing.
func (*Cgroup) Detach(*exec.Cmd) {}

// Processes wraps errors.ErrUnsupported.
func (*Cgroup) Processes() ([]ID, error) { return nil, errNoCgroup }

// Empty wraps errors.ErrUnsupported.
func (*Cgroup) Empty() (bool, error) { return false, errNoCgroup }

// Kill wraps errors.ErrUnsupported.
func (*Cgroup) Kill() error { return errNoCgroup }

// Remove wraps errors.ErrUnsupported.
func (*Cgroup) Remove(context.Context) error { return errNoCgroup }
