package agent

import (
	"os"

	"golang.org/x/sys/unix"
)

// widen makes a pipe as large as the pump's pieces, so that a process that
// prints much is not switched to and fro for each 64 KiB. Where the user's pipes
// hold all that they may, it stays as it is. See F_SETPIPE_SZ in fcntl(2).
func widen(pipe *os.File) {
	if raw, err := pipe.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pumpBuffer) })
	}
}
