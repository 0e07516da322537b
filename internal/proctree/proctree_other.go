//go:build unix && !linux

package proctree

import (
	"context"
	"errors"
	"fmt"
	"syscall"
)

// Signal sends sig to that very process. An error wraps os.ErrProcessDone
// where it has ended.
func (id ID) Signal(sig syscall.Signal) error { return signalPID(id, sig) }

func wait(context.Context, ID) error { return errors.ErrUnsupported }

func childless() bool { return false }

func setSubreaper() error {
	return fmt.Errorf("proctree: become a subreaper: %w", errors.ErrUnsupported)
}

func carries(ID, string) (yes, unsure bool, err error) {
	return false, false, fmt.Errorf("proctree: read environments: %w", errors.ErrUnsupported)
}
