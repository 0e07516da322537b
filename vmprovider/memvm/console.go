package memvm

import (
	"context"
	"io"
	"sync"
)

// console is what a machine printed. Writes after the end are dropped.
type console struct {
	mu      sync.Mutex
	buf     []byte
	ended   bool
	changed chan struct{} // closed and replaced at every change
}

func newConsole() *console { return &console{changed: make(chan struct{})} }

// Write makes a console the io.Writer that a machine prints to.
func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return 0, io.ErrClosedPipe
	}
	c.buf = append(c.buf, p...)
	c.announce()
	return len(p), nil
}

func (c *console) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	c.announce()
}

func (c *console) announce() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// reader reads from the first byte; closing it ends a Read that waits.
type reader struct {
	c      *console
	follow bool
	ctx    context.Context
	cancel context.CancelFunc
	off    int
}

func (c *console) reader(ctx context.Context, follow bool) *reader {
	ctx, cancel := context.WithCancel(ctx)
	return &reader{c: c, follow: follow, ctx: ctx, cancel: cancel}
}

func (r *reader) Read(p []byte) (int, error) {
	for {
		if err := r.ctx.Err(); err != nil {
			return 0, err
		}
		if len(p) == 0 {
			return 0, nil
		}
		r.c.mu.Lock()
		n := copy(p, r.c.buf[r.off:])
		ended, changed := r.c.ended, r.c.changed
		r.c.mu.Unlock()
		r.off += n
		if n > 0 {
			return n, nil
		}
		if ended || !r.follow {
			return 0, io.EOF
		}
		select {
		case <-r.ctx.Done():
		case <-changed:
		}
	}
}

func (r *reader) Close() error {
	r.cancel()
	return nil
}
