package storage

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/solstice-ci/solstice-go/solstice/daemon"
)

// ErrLocked: another process has the lock.
var ErrLocked = errors.New("locked by another process")

// Lock makes the caller the only one of that name in a state directory until it
// is released or the process ends, however it ends. Where another one is, the
// error wraps ErrLocked.
func Lock(stateDir, name string) (release func() error, err error) {
	path := filepath.Join(stateDir, name+".lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, &daemon.Problem{What: "cannot lock the state directory", Err: err}
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close() // nothing was written
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("%s: %w", path, ErrLocked)
			return nil, &daemon.Problem{
				What: "another " + name + " uses the state directory " + stateDir, Err: err, Advice: "stop it, or give this one a --state-dir of its own",
			}
		}
		return nil, &daemon.Problem{What: "cannot lock the state directory", Err: err}
	}
	return f.Close, nil
}
