//go:build linux

package main

import (
	"context"
	"errors"
	"io"
	"os"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// Console implements vmprovider.Consoler: QEMU writes a file from power-on.
func (p *Provider) Console(ctx context.Context, id string, follow bool) (io.ReadCloser, error) {
	ctx, done, err := p.begin(ctx, id)
	if err != nil {
		return nil, err
	}
	m, err := p.load(id)
	var f *os.File
	if err == nil {
		f, err = os.Open(m.path(consoleFile))
	}
	switch {
	case err == nil:
		return &console{ctx: ctx, done: done, m: m, f: f, follow: follow}, nil
	case errors.Is(err, os.ErrNotExist):
		err = vmprovider.ErrNotFound // it has none yet, or none any more
	}
	err = explain(ctx, "console of "+id, err)
	done()
	return nil, err
}

type console struct {
	ctx    context.Context //nolint:containedctx // that of the call that opened it
	done   func()
	m      *machine
	f      *os.File
	follow bool
}

// lookEvery is how often a console that is followed is looked at.
const lookEvery = 50 * time.Millisecond

func (c *console) Read(b []byte) (int, error) {
	for {
		if err := context.Cause(c.ctx); err != nil {
			return 0, explain(c.ctx, "console of "+c.m.ID, err)
		}
		running := c.follow && c.running() // first: what is printed before it stops is read after
		n, err := c.f.Read(b)
		if !errors.Is(err, io.EOF) || !running {
			return n, err
		}
		select {
		case <-c.ctx.Done():
		case <-time.After(lookEvery):
		}
	}
}

func (c *console) running() bool {
	state, _ := c.m.state(c.ctx)
	return state == vmprovider.StateRunning || state == vmprovider.StateCreating
}

func (c *console) Close() error {
	c.done()
	return c.f.Close()
}
