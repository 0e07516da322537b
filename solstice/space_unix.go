//go:build linux || darwin

package solstice

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// freeBytes is what a user who is not root may still write below dir.
func freeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fmt.Errorf("statfs: %w", err)
	}
	return int64(st.Bavail) * int64(st.Bsize), nil //nolint:unconvert // of another type on darwin
}
