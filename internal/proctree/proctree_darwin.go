package proctree

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const stateZombie = 5 // SZOMB, sys/proc.h

func fromKinfo(k *unix.KinfoProc) Process {
	t := k.Proc.P_starttime
	return Process{
		ID:     ID{PID: int(k.Proc.P_pid), Start: fmt.Sprintf("%d-%06d", t.Sec, t.Usec)},
		PPID:   int(k.Eproc.Ppid),
		Zombie: k.Proc.P_stat == stateZombie,
	}
}

func lookup(pid int) (Process, error) {
	k, err := unix.SysctlKinfoProc("kern.proc.pid", pid)
	if errors.Is(err, unix.EIO) || errors.Is(err, unix.ESRCH) || err == nil && int(k.Proc.P_pid) != pid {
		return Process{}, os.ErrProcessDone // an empty answer is EIO
	}
	if err != nil {
		return Process{}, err
	}
	return fromKinfo(k), nil
}

func processes() ([]Process, error) {
	ks, err := unix.SysctlKinfoProcSlice("kern.proc.all")
	if err != nil {
		return nil, err
	}
	out := make([]Process, 0, len(ks))
	for i := range ks {
		out = append(out, fromKinfo(&ks[i]))
	}
	return out, nil
}
