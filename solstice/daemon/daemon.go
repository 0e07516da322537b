// Package daemon is what a program's main is made of: flags, the environment
// and a configuration file read once into a struct ([Parse]), flag groups that
// open what they describe, start-up errors as diagnostics ([Problem]), signals
// and exit codes ([Main]), and a certificate authority of one's own ([CA]).
//
// A main embeds the groups it needs and parses:
//
//	var flags struct {
//		daemon.Telemetry
//		daemon.State
//		storage.Database
//	}
//	daemon.Main(func(ctx context.Context) error {
//		if _, err := daemon.Parse(&flags, daemon.Program{Name: "solstice-example"}); err != nil {
//			return err
//		}
//		stop, err := flags.Telemetry.Init(ctx)
//		…
//	})
//
// Groups that need a database driver are in the package storage below this one,
// so that the agent builds where no driver does.
//
// This is the only package of the module that reads the environment.
package daemon

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"syscall"
)

// Exit codes of programs run by [Main].
const (
	ExitOK          = 0
	ExitFailure     = 1   // it failed
	ExitUsage       = 2   // flags, environment or configuration file are wrong
	ExitInterrupted = 130 // 128+SIGINT, for programs that report an interrupt
)

// ExitError ends a program run by [Main] with a code of its own. A nil Err
// prints nothing.
type ExitError struct {
	Code int
	Err  error
}

func (e *ExitError) Error() string {
	if e.Err == nil {
		return "exit"
	}
	return e.Err.Error()
}

func (e *ExitError) Unwrap() error { return e.Err }

// Main runs a program and exits with its code. SIGINT and SIGTERM end run's
// context, and run then winds down; a second signal exits at once with 128 plus
// its number. When run returns nil, or after a signal [context.Canceled], the
// code is 0; an [*ExitError] says its own; for anything else it is 1. Errors are
// rendered to stderr as [Render] does.
func Main(run func(ctx context.Context) error) {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	os.Exit(supervise(run, signals, os.Stderr, os.Exit))
}

func supervise(run func(context.Context) error, signals <-chan os.Signal, stderr io.Writer, exit func(int)) int {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	finished, watcher := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watcher)
		select {
		case <-finished:
			return
		case <-signals:
			cancel()
		}
		select {
		case <-finished:
		case s := <-signals:
			code := ExitFailure
			if n, ok := s.(syscall.Signal); ok {
				code = 128 + int(n)
			}
			exit(code)
		}
	}()
	err := run(ctx)
	interrupted := ctx.Err() != nil
	close(finished)
	<-watcher

	if own, ok := errors.AsType[*ExitError](err); ok {
		if own.Err != nil {
			Render(stderr, own.Err)
		}
		return own.Code
	}
	if err == nil || interrupted && errors.Is(err, context.Canceled) {
		return ExitOK
	}
	Render(stderr, err)
	return ExitFailure
}
