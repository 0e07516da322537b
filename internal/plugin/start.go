package plugin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// Command is a plugin that Start starts. Nil fields have the defaults of
// remotevm.Command, which is the same with comments for everyone.
type Command struct {
	Argv   []string
	Env    []string
	Output io.Writer
	Logger *slog.Logger
	Dir    string
}

// How a plugin is asked to end: its standard input does and it gets SIGTERM, then,
// after stopTimeout, SIGKILL.
const stopTimeout = drain + 5*time.Second

// longestSocket is the least that a system has: macOS and the BSDs 103, Linux 107.
const longestSocket = 103

// Start starts a plugin, and starts it again, with growing pauses, whenever it
// ends; open connects to it. Its standard input is a pipe that ends with this
// process, however that ends. stop ends it.
func Start[P any](ctx context.Context, c Command, e Errors, open func(ctx context.Context, target string) (P, error)) (p P, stop func() error, err error) {
	var none P
	if len(c.Argv) == 0 {
		return none, nil, fmt.Errorf("%w: a plugin without a program", e.Invalid)
	}
	if c.Env == nil {
		c.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	pattern := "solstice-plugin-"
	if c.Dir != "" {
		pattern = "" // names of sockets are short
	}
	dir, err := os.MkdirTemp(c.Dir, pattern)
	if err != nil {
		return none, nil, err
	}
	socket := filepath.Join(dir, "socket")
	if len(socket) > longestSocket {
		err := fmt.Errorf("%w: %s is longer than the %d bytes that a Unix socket's name may have", e.Invalid, socket, longestSocket)
		return none, nil, errors.Join(err, os.Remove(dir))
	}
	target := "unix:" + socket
	c.Argv = append(append([]string(nil), c.Argv...), "--listen", target)
	run, end := context.WithCancel(context.Background())
	var over sync.WaitGroup
	failed := make(chan error, 1) // to start at all
	var last error                // how it ended most recently; read once supervise has returned
	over.Go(func() { last = c.supervise(run, failed) })
	stop = func() error {
		end()
		over.Wait()
		return os.RemoveAll(dir)
	}
	octx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case err := <-failed:
			cancel(err)
		case <-octx.Done():
		}
	}()
	p, err = open(octx, target)
	cause := context.Cause(octx)
	cancel(nil)
	<-watched
	if err != nil {
		if cause != nil && ctx.Err() == nil {
			err = fmt.Errorf("%w: plugin %s: %w", e.Invalid, c.Argv[0], cause)
		}
		stopped := stop()
		if cause == nil && last != nil {
			err = fmt.Errorf("%w; %s ended: %w", err, c.Argv[0], last)
		}
		return none, nil, errors.Join(err, stopped)
	}
	return p, stop, nil
}

// supervise keeps the plugin running until ctx ends, and returns how it last ended
// by itself.
func (c *Command) supervise(ctx context.Context, failed chan<- error) (last error) {
	retry := backoff.NewExponentialBackOff()
	retry.InitialInterval, retry.MaxInterval = 100*time.Millisecond, 10*time.Second
	for ctx.Err() == nil {
		began := time.Now()
		err := c.run(ctx)
		if ctx.Err() != nil {
			return last
		}
		if last = err; err == nil {
			last = errors.New("without an error")
		}
		if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
			select {
			case failed <- err:
			default:
			}
		}
		if time.Since(began) > time.Minute {
			retry.Reset()
		}
		wait := retry.NextBackOff()
		c.Logger.WarnContext(ctx, "plugin ended, starting it again", "program", c.Argv[0], "error", err, "again_in", wait)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
	return last
}

// run runs the plugin once. Where that fails, the end of what it printed is in the
// error.
func (c *Command) run(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, c.Argv[0], c.Argv[1:]...) //nolint:gosec // the operator's program
	said := &tail{to: c.Output}
	cmd.Env, cmd.Stdout, cmd.Stderr = c.Env, said, said
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	cmd.Cancel = func() error {
		_ = stdin.Close()
		return cmd.Process.Signal(syscall.SIGTERM)
	}
	cmd.WaitDelay = stopTimeout
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(said.end))
	}
	return nil
}

// tail passes on what is written, and keeps the end of it.
type tail struct {
	to  io.Writer // may be nil
	end []byte
}

func (t *tail) Write(p []byte) (int, error) {
	const most = 1 << 10
	t.end = append(t.end, p[max(0, len(p)-most):]...)
	t.end = t.end[max(0, len(t.end)-most):]
	if t.to == nil {
		return len(p), nil
	}
	return t.to.Write(p)
}
