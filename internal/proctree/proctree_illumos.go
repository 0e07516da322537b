package proctree

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
)

// Offsets in psinfo_t as a 64-bit process sees it (proc(5), sys/procfs.h).
const (
	psLWPs      = 4
	psPID       = 8
	psPPID      = 12
	psStartSec  = 88
	psStartNsec = 96
	psMin       = 104
)

func lookup(pid int) (Process, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/psinfo")
	if errors.Is(err, fs.ErrNotExist) {
		return Process{}, os.ErrProcessDone
	}
	if err != nil {
		return Process{}, err
	}
	if len(b) < psMin {
		return Process{}, fmt.Errorf("psinfo of %d bytes", len(b))
	}
	u32 := func(off int) int { return int(binary.NativeEndian.Uint32(b[off:])) }
	return Process{
		ID: ID{PID: u32(psPID), Start: fmt.Sprintf("%d-%09d",
			binary.NativeEndian.Uint64(b[psStartSec:]), binary.NativeEndian.Uint64(b[psStartNsec:]))},
		PPID:   u32(psPPID),
		Zombie: u32(psLWPs) == 0,
	}, nil
}

func processes() ([]Process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var out []Process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		p, err := lookup(pid)
		if errors.Is(err, os.ErrProcessDone) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}
