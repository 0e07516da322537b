//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package filelog

import (
	"errors"
	"fmt"
	"os"
	"runtime"
)

func lockFile(*os.File) error {
	return fmt.Errorf("filelog: no file locks on %s: %w", runtime.GOOS, errors.ErrUnsupported)
}
