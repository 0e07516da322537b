package processvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"github.com/solstice-ci/solstice-go/internal/proctree"
)

// leftovers is what a Runner says that could not end its processes.
type leftovers struct{ error }

func (leftovers) ProcessesLeft() bool { return true }

// fakeRunner is the agent that Bootstrap.Hostname says. Those that start
// processes leave them.
func fakeRunner(ctx context.Context, bootstrap []byte, console io.Writer) error {
	var boot BootstrapFile
	if err := json.Unmarshal(bootstrap, &boot); err != nil {
		return err
	}
	if err := os.Mkdir(boot.WorkDir, 0o700); err != nil {
		return err
	}
	switch boot.Hostname {
	case "exit":
		return errors.New("exit early")
	case "goexit":
		runtime.Goexit()
	case "endless":
		for i := 0; ctx.Err() == nil; i++ {
			fmt.Fprintln(console, "line", i)
		}
	case "tree", "panic", "killed":
		env := []string{MarkerVariable + "=" + boot.InstanceID}
		for _, mode := range []string{"sleep", "fork", "write"} {
			cmd := step(mode, boot.WorkDir, env)
			start := cmd.Start
			if boot.Cgroup != "" && mode == "sleep" {
				cmd.Env = []string{} // found by its cgroup alone
				start = func() error { return startIn(boot.Cgroup, cmd) }
			}
			if err := start(); err != nil {
				return err
			}
			if mode == "sleep" {
				go func() { _ = cmd.Wait() }()
			} else if err := cmd.Wait(); err != nil {
				return err
			}
		}
		fmt.Fprintln(console, "ready")
		switch boot.Hostname {
		case "panic":
			panic("as asked for")
		case "killed":
			must(syscall.Kill(os.Getpid(), syscall.SIGKILL))
		}
		<-ctx.Done()
		return leftovers{context.Cause(ctx)}
	}
	<-ctx.Done()
	return context.Cause(ctx)
}

func startIn(path string, cmd *exec.Cmd) error {
	cg, err := proctree.OpenCgroup(path)
	if err != nil {
		return err
	}
	done, err := cg.Attach(cmd)
	if err != nil {
		return err
	}
	defer done()
	return cmd.Start()
}

func inside(c *Config) { c.Command, c.Runner = nil, fakeRunner }
