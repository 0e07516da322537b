//go:build unix && !linux && !darwin && !illumos

package proctree

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// ps runs ps(1) in an empty environment, so that no locale and no time zone of
// the caller changes how it prints a start time.
func ps(selection ...string) ([]Process, error) {
	cmd := exec.Command("/bin/ps", append(selection, "-o", "pid=,ppid=,stat=,lstart=")...)
	cmd.Env = []string{}
	out, err := cmd.Output()
	if err != nil && len(out) > 0 {
		return nil, fmt.Errorf("ps: %w", err)
	}
	// ps exits with 1 and prints nothing where nothing matches.
	return parsePS(string(out))
}

func lookup(pid int) (Process, error) {
	out, err := ps("-p", strconv.Itoa(pid))
	if err != nil {
		return Process{}, err
	}
	for _, p := range out {
		if p.PID == pid {
			return p, nil
		}
	}
	return Process{}, os.ErrProcessDone
}

func processes() ([]Process, error) { return ps("-a", "-x") }

// parsePS reads lines such as "  17   1 Ss   Mon Nov 23 18:17:36 2026".
func parsePS(s string) ([]Process, error) {
	var out []Process
	for line := range strings.Lines(s) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if len(f) < 4 {
			return nil, fmt.Errorf("ps: unexpected line %q", line)
		}
		pid, err1 := strconv.Atoi(f[0])
		ppid, err2 := strconv.Atoi(f[1])
		if err1 != nil || err2 != nil {
			return nil, fmt.Errorf("ps: unexpected line %q", line)
		}
		out = append(out, Process{
			ID:     ID{PID: pid, Start: strings.Join(f[3:], "-")},
			PPID:   ppid,
			Zombie: strings.HasPrefix(f[2], "Z"),
		})
	}
	return out, nil
}
