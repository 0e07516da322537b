package remotevm

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/internal/plugin"
)

// Command is a plugin that Start starts.
type Command struct {
	// Argv is the program and its arguments; "--listen" and "unix:PATH" are
	// appended, and it has to serve there. Required.
	Argv []string
	// Env is all of its environment, NAME=VALUE; nil: only PATH, as it is usual.
	Env []string
	// Output gets what it prints; nil: nobody.
	Output io.Writer
	// Logger is told when it ends and is started again; nil: nobody.
	Logger *slog.Logger
	// Dir is where the directory of its socket is made, which this process leaves
	// there only when it is killed; empty: the system's for temporary files.
	Dir string

	ConnectTimeout, CallTimeout time.Duration // as in Config
}

// Start starts a plugin, and starts it again, with growing pauses, whenever it
// ends. Its standard input is a pipe that ends with this process, however that
// ends, and the plugin should do so then. What makes machines outlive it decides
// about them (Capabilities.Adopts).
func Start(ctx context.Context, c Command) (*Provider, error) {
	p, stop, err := plugin.Start(ctx, plugin.Command{Argv: c.Argv, Env: c.Env, Output: c.Output, Logger: c.Logger, Dir: c.Dir}, wraps,
		func(ctx context.Context, target string) (*Provider, error) {
			return Open(ctx, Config{Target: target, ConnectTimeout: c.ConnectTimeout, CallTimeout: c.CallTimeout})
		})
	if err != nil {
		return nil, err
	}
	disconnect := p.close
	p.close = sync.OnceValue(func() error { return errors.Join(disconnect(), stop()) })
	return p, nil
}
