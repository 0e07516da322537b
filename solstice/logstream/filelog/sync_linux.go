package filelog

import (
	"errors"
	"os"
	"syscall"
)

// syncData spares the sync of times that fsync would add.
func syncData(f *os.File) error {
	for {
		if err := syscall.Fdatasync(int(f.Fd())); !errors.Is(err, syscall.EINTR) {
			return os.NewSyscallError("fdatasync", err)
		}
	}
}
