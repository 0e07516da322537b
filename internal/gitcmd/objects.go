package gitcmd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// ErrNoObject: the repository has no such object.
var ErrNoObject = errors.New("git: no such object")

// objectsIdle is how long a reader of objects waits for the next question
// before its process ends.
const objectsIdle = 10 * time.Second

// Objects reads objects of one repository through a git that keeps running (git
// cat-file --batch), since to start one costs a hundred times as much as an
// answer. The process begins with the first question and ends when there was
// none for a while, so an Objects that is dropped leaves nothing behind. It is
// safe for concurrent use.
type Objects struct {
	git  *Git
	o    Options
	turn chan struct{} // holds the right to what is below
	run  *batch
	idle *time.Timer
}

type batch struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// Objects of the repository that the options name.
func (g *Git) Objects(o Options) *Objects {
	r := &Objects{git: g, o: o, turn: make(chan struct{}, 1)}
	r.turn <- struct{}{}
	return r
}

// Read gives the type and the bytes of an object by its full hexadecimal name.
// It wraps ErrNoObject, ErrTooLarge where there are more than limit bytes, or
// the context's error.
func (r *Objects) Read(ctx context.Context, name string, limit int64) (kind string, data []byte, err error) {
	if err := CheckObject(name); err != nil {
		return "", nil, err
	}
	select {
	case <-r.turn:
	case <-ctx.Done():
		return "", nil, ctx.Err()
	}
	defer func() { r.turn <- struct{}{} }()
	// A process that was left alone may have died: ask a second one.
	for fresh := false; ; {
		if r.run == nil {
			if r.run, err = r.start(); err != nil {
				return "", nil, err
			}
			fresh = true
		}
		if r.idle != nil {
			r.idle.Stop()
		}
		kind, data, err = r.ask(ctx, name, limit)
		var broken *brokenPipe
		if !errors.As(err, &broken) {
			r.idle = time.AfterFunc(objectsIdle, r.Close)
			return kind, data, err
		}
		stop(r.run)
		r.run = nil
		if fresh || ctx.Err() != nil {
			return "", nil, broken.err
		}
	}
}

// Close ends the process; the next question starts another.
func (r *Objects) Close() {
	<-r.turn
	defer func() { r.turn <- struct{}{} }()
	if r.idle != nil {
		r.idle.Stop()
	}
	if r.run != nil {
		stop(r.run)
		r.run = nil
	}
}

func (r *Objects) start() (*batch, error) {
	args := append(r.git.flags(r.o), "cat-file", "--batch")
	// Not the call's context, which it outlives.
	cmd := exec.CommandContext(context.Background(), r.git.exe, args...)
	cmd.Env, cmd.Dir = r.git.environ(r.o), r.o.Dir
	if cmd.Dir == "" {
		cmd.Dir = string(filepath.Separator)
	}
	cmd.WaitDelay = waitDelay
	ownGroup(cmd)
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, &Error{Command: "cat-file", ExitCode: -1, Err: err}
	}
	return &batch{cmd, in, bufio.NewReaderSize(out, 64<<10)}, nil
}

func stop(b *batch) {
	_ = b.in.Close()
	_ = b.cmd.Process.Kill()
	_ = b.cmd.Wait() // killed, or its repository is gone: either way it is over
}

// brokenPipe: the process is of no use any more.
type brokenPipe struct{ err error }

func (b *brokenPipe) Error() string { return b.err.Error() }

func (r *Objects) ask(ctx context.Context, name string, limit int64) (kind string, data []byte, err error) {
	b := r.run
	stopWatch := context.AfterFunc(ctx, func() { _ = b.cmd.Process.Kill() })
	defer stopWatch()
	fail := func(err error) (string, []byte, error) {
		if ctx.Err() != nil {
			err = ctx.Err()
		} else {
			err = &Error{Command: "cat-file", ExitCode: -1, Err: err}
		}
		return "", nil, &brokenPipe{err}
	}
	if _, err := io.WriteString(b.in, name+"\n"); err != nil {
		return fail(err)
	}
	head, err := b.out.ReadString('\n')
	if err != nil {
		return fail(err)
	}
	fields := strings.Fields(head)
	if len(fields) == 2 && fields[1] == "missing" {
		return "", nil, fmt.Errorf("%w: %s", ErrNoObject, name)
	}
	if len(fields) != 3 {
		return fail(fmt.Errorf("unexpected answer %.80q", head))
	}
	size, err := strconv.ParseInt(fields[2], 10, 64)
	if err != nil || size < 0 {
		return fail(fmt.Errorf("unexpected answer %.80q", head))
	}
	if size > limit {
		stop(b) // rather than read what nobody wants
		r.run = nil
		return "", nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, size)
	}
	data = make([]byte, size+1) // and the newline behind it
	if _, err := io.ReadFull(b.out, data); err != nil {
		return fail(err)
	}
	return fields[1], data[:size], nil
}
