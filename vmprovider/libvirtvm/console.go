package libvirtvm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// consoler is the Consoler of a hypervisor that has consoles.
type consoler struct{ *Provider }

// Console reads the file that the serial console is written to.
func (p consoler) Console(ctx context.Context, id string, follow bool) (io.ReadCloser, error) {
	inst, err := p.Get(ctx, id)
	if err != nil {
		return nil, err
	}
	r := &console{p: p.Provider, ctx: ctx, id: id, volume: volume(id, inst.Owner, consoleVolume), follow: follow}
	if err := r.fill(); err != nil {
		return nil, fmt.Errorf("libvirtvm: console of %q: %w", id, unavailable(err))
	}
	return r, nil
}

const (
	// piece is how many bytes of a console are in memory at most: a guest may print
	// without end.
	piece = 256 << 10
	// overlap is how many of them are read twice, to know the file again: virtlogd
	// begins a new one when it has grown.
	overlap = 64
)

// console reads piece by piece, since a download has an end.
type console struct {
	p          *Provider
	ctx        context.Context
	id, volume string
	follow     bool
	read       int64  // of this file
	seen       []byte // the last of it
	rest       bytes.Buffer
	more, last bool // something is there after rest, nothing comes any more
}

// fill gets what is new.
func (c *console) fill() error {
	h, end, err := c.p.begin(c.ctx, "console", c.id)
	if err != nil {
		return err
	}
	defer end()
	running := false
	if c.follow { // asked before, so that its last words are read
		inst, err := c.p.get(c.ctx, h, c.id)
		if err != nil && !errors.Is(err, vmprovider.ErrNotFound) {
			return err
		}
		running = err == nil && (inst.State == vmprovider.StateRunning || inst.State == vmprovider.StateCreating)
	}
	b, err := c.download(h)
	if err == nil && !bytes.HasPrefix(b, c.seen) { // another file
		c.read, c.seen = 0, nil
		b, err = c.download(h)
	}
	switch {
	case errors.Is(err, errNoVolume):
		c.more, c.last = false, !running // destroyed, or not made yet
		return nil
	case err != nil:
		return err
	}
	fresh := b[len(c.seen):]
	c.read += int64(len(fresh))
	c.rest.Write(fresh)
	c.seen = slices.Clone(b[max(0, len(b)-overlap):])
	c.more = len(b) == piece
	c.last = !running && !c.more
	return nil
}

// download gets what was seen, if the file is the same, and what is new.
func (c *console) download(h hypervisor) ([]byte, error) {
	return call(c.ctx, func() ([]byte, error) {
		var b bytes.Buffer
		err := h.Download(c.p.cfg.StoragePool, c.volume, c.read-int64(len(c.seen)), piece, &b)
		return b.Bytes(), err
	})
}

// Read implements io.Reader.
func (c *console) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	for {
		if c.rest.Len() > 0 {
			return c.rest.Read(b)
		}
		if c.last {
			return 0, io.EOF
		}
		pause := follow
		if c.more {
			pause = 0
		}
		select {
		case <-c.ctx.Done():
			return 0, c.ctx.Err()
		case <-c.p.ctx.Done():
			return 0, vmprovider.ErrClosed
		case <-time.After(pause):
		}
		if err := c.fill(); err != nil {
			return 0, err
		}
	}
}

// Close implements io.Closer.
func (c *console) Close() error { return nil }
