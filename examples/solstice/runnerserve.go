package main

import (
	"context"
	"errors"
	"net/http"

	"github.com/solstice-ci/solstice-go/solstice/daemon"
)

type runnerServeCmd struct {
	daemon.Runner
	daemon.State
}

// Help is kong's.
func (runnerServeCmd) Help() string {
	return `Serves the files agent-OS-ARCH of a directory over plain HTTP as /runner/OS/ARCH, with their SHA-256 as /runner/OS/ARCH.sha256, as an orchestrator does itself: for guests that should load them from elsewhere. Tell the orchestrator with --runner-url.`
}

// Run is kong's.
func (c *runnerServeCmd) Run(e *env) error {
	if c.RunnerDir == "" && c.StateDir == "" {
		return unable("there is no directory with agents", nil, "give --runner-dir")
	}
	lis, url, err := c.Listen(e.ctx)
	if err != nil {
		return couldNot(err)
	}
	srv := daemon.HTTPServer(c.Agents(c.StateDir).Handler())
	stop := context.AfterFunc(e.ctx, func() { _ = srv.Close() })
	defer stop()
	note("agents are at %s/OS/ARCH", url)
	if err := srv.Serve(lis); !errors.Is(err, http.ErrServerClosed) {
		return unable("the listener failed", err, "")
	}
	return nil
}
