package agent

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"time"
)

// powerOffCommands are tried in order; all of them return before the machine
// goes down.
var powerOffCommands = map[string][][]string{
	"linux":   {{"systemctl", "poweroff"}, {"poweroff"}, {"shutdown", "-h", "now"}},
	"illumos": {{"poweroff"}, {"shutdown", "-y", "-i5", "-g0"}},
	"freebsd": {{"shutdown", "-p", "now"}},
	"openbsd": {{"shutdown", "-p", "now"}},
	"netbsd":  {{"shutdown", "-p", "now"}},
}

// PowerOff turns this machine off, orderly where its system knows how: the last
// thing an agent does that has a machine of its own. It returns once that is
// under way. It wraps errors.ErrUnsupported on systems that agents do not run
// machines of.
func PowerOff(ctx context.Context) error {
	commands, ok := powerOffCommands[runtime.GOOS]
	if !ok {
		return fmt.Errorf("agent: power off on %s: %w", runtime.GOOS, errors.ErrUnsupported)
	}
	env := minimalEnv()
	var errs []error
	for _, argv := range commands {
		exe, err := lookPath(argv[0], env["PATH"])
		if err != nil {
			errs = append(errs, err)
			continue
		}
		cctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		cmd := exec.CommandContext(cctx, exe, argv[1:]...)
		cmd.Env = flatten(env)
		err = cmd.Run()
		cancel()
		if err == nil {
			return nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", argv[0], err))
	}
	if err := powerOffKernel(); err != nil {
		return fmt.Errorf("agent: power off: %w", errors.Join(append(errs, err)...))
	}
	return nil
}
