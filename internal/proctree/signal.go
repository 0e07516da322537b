//go:build unix

package proctree

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// signalPID checks the identity and then signals the pid: where no handle on a
// process can be had, this is as close as one gets.
func signalPID(id ID, sig syscall.Signal) error {
	if id.PID <= 0 {
		return fmt.Errorf("proctree: signal process %d: %w", id.PID, os.ErrProcessDone)
	}
	p, err := lookup(id.PID)
	if err == nil && p.ID != id {
		err = os.ErrProcessDone
	}
	if err == nil {
		err = syscall.Kill(id.PID, sig)
	}
	if errors.Is(err, syscall.ESRCH) {
		err = os.ErrProcessDone
	}
	if err != nil {
		return fmt.Errorf("proctree: signal process %d: %w", id.PID, err)
	}
	return nil
}
