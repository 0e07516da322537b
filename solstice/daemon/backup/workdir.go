package backup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
)

// workDir makes a directory .BASE.PURPOSE-RANDOM in parent, which nobody else
// uses, and removes those that processes left which were killed. lock is the
// name of its lock. done removes it, if it is there still.
func workDir(parent, base, purpose string) (dir string, done func() error, err error) {
	prefix := "." + base + "." + purpose + "-"
	entries, err := os.ReadDir(parent)
	if err != nil {
		return "", nil, err
	}
	for _, e := range entries {
		if name := e.Name(); e.IsDir() && len(name) > len(prefix) && name[:len(prefix)] == prefix {
			if err := removeStale(filepath.Join(parent, name)); err != nil {
				return "", nil, fmt.Errorf("remove what an earlier one left: %w", err)
			}
		}
	}
	dir, err = os.MkdirTemp(parent, prefix) // mode 0700
	if err != nil {
		return "", nil, err
	}
	unlock, err := storage.Lock(dir, daemonName)
	if err != nil {
		return "", nil, errors.Join(err, os.RemoveAll(dir))
	}
	return dir, func() error { return errors.Join(os.RemoveAll(dir), unlock()) }, nil
}

// removeStale leaves a directory alone that is in use.
func removeStale(dir string) error {
	unlock, err := storage.Lock(dir, daemonName)
	if errors.Is(err, storage.ErrLocked) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(dir), unlock())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
