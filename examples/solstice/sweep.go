package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/processvm"
)

// sweepArg as the first argument makes this program the sweeper of a run.
const sweepArg = "__solstice-sweep"

// What the sweeper does with the state directory, its third argument.
const (
	keepState   = "keep"
	removeState = "remove"
)

// machinesDir is where a run's machines are.
func machinesDir(state string) string { return filepath.Join(state, "machines") }

// sweeper is a process that outlives a run which was killed, or left at once,
// and ends what it left. It is in a session of its own, out of a terminal's
// reach, and learns of the run's end by the end of its standard input.
type sweeper struct {
	cmd *exec.Cmd
	run io.Closer
}

func startSweeper(state, then string) (*sweeper, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	s := &sweeper{cmd: exec.CommandContext(context.Background(), exe, sweepArg, state, then)}
	s.cmd.Env = []string{} // it needs little of it
	for k, v := range daemon.Environment("PATH", "HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME") {
		s.cmd.Env = append(s.cmd.Env, k+"="+v)
	}
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if s.run, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	return s, s.cmd.Start()
}

// dismiss tells the sweeper that the run is over, and waits for it.
func (s *sweeper) dismiss() error {
	_ = s.run.Close()
	return s.cmd.Wait()
}

// sweepHook is the sweeper's main; in any other process it returns at once.
func sweepHook() {
	if len(os.Args) != 4 || os.Args[1] != sweepArg {
		return
	}
	signal.Ignore(os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	_, _ = io.Copy(io.Discard, os.Stdin)
	if err := sweep(os.Args[2], os.Args[3]); err != nil {
		os.Exit(1) // nobody listens any more
	}
	os.Exit(0)
}

func sweep(state, then string) error {
	var errs []error
	if _, err := os.Stat(machinesDir(state)); err == nil {
		p, err := processvm.New(processvm.Config{Root: machinesDir(state), Command: agent.Command()})
		if err != nil {
			return err
		}
		errs = append(errs, destroyAll(p), p.Close())
	}
	errs = append(errs, sweepMachines(state))
	if then == removeState {
		errs = append(errs, os.RemoveAll(state))
	}
	return errors.Join(errs...)
}

// destroyAll makes sure that nothing is left, whatever happened.
func destroyAll(p vmprovider.Provider) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	left := map[string]bool{}
	for m, err := range p.List(ctx, vmprovider.ListOptions{}) {
		if err != nil {
			return fmt.Errorf("list what is left: %w", err)
		}
		left[m.ID] = true
	}
	var errs []error
	for _, id := range slices.Sorted(maps.Keys(left)) {
		errs = append(errs, p.Destroy(ctx, id, vmprovider.DestroyOptions{}))
	}
	return errors.Join(errs...)
}
