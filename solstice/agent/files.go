package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// removeTree deletes a directory whatever the modes in it are: a module cache,
// for one, is read-only on purpose. Links are not followed. Absent is no error.
func removeTree(dir string) error {
	err := os.RemoveAll(dir)
	if err == nil || !errors.Is(err, fs.ErrPermission) {
		return wrapRemove(err)
	}
	_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, _ error) error {
		if d != nil && d.IsDir() {
			_ = os.Chmod(p, 0o700) // before it is read; what stays forbidden shows in RemoveAll
		}
		return nil
	})
	return wrapRemove(os.RemoveAll(dir))
}

func wrapRemove(err error) error {
	if err != nil {
		return fmt.Errorf("agent: remove: %w", err)
	}
	return nil
}
