//go:build unix

package processvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// How often consoles are bounded, and a reader that follows looks for more.
const (
	boundEvery  = time.Second
	followEvery = 50 * time.Millisecond
)

func (p *Provider) consoleMark() string {
	return fmt.Sprintf("\n[solstice] console cut after %d bytes\n", p.cfg.ConsoleBytes)
}

// boundConsoles cuts files that have grown too long. The agent writes to the
// file itself, so that it neither notices nor needs the provider.
func (p *Provider) boundConsoles() {
	defer p.busy.Done()
	t := time.NewTicker(boundEvery)
	defer t.Stop()
	for {
		select {
		case <-p.ctx.Done():
			return
		case <-t.C:
		}
		for _, id := range p.running() {
			if err := p.boundConsole(id); err != nil && !errors.Is(err, fs.ErrNotExist) {
				p.log.Warn("cannot bound a console", "machine", id, "error", err)
			}
		}
	}
}

// boundConsole leaves the first ConsoleBytes and the mark. What the agent
// appends between the two steps is overwritten by the mark or cut next time.
func (p *Provider) boundConsole(id string) error {
	f, err := p.root.OpenFile(filepath.Join(id, consoleFile), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || fi.Size() <= p.cfg.ConsoleBytes+int64(len(p.consoleMark())) {
		return err
	}
	if err := f.Truncate(p.cfg.ConsoleBytes); err != nil {
		return err
	}
	_, err = f.WriteAt([]byte(p.consoleMark()), p.cfg.ConsoleBytes)
	return err
}

// Console reads what the agent printed to its standard output and error, at
// most Config.ConsoleBytes and a mark.
func (p *Provider) Console(ctx context.Context, id string, follow bool) (io.ReadCloser, error) {
	end, err := p.begin(ctx, "console", id)
	if err != nil {
		return nil, err
	}
	defer end()
	if r := p.resident(id); r != nil {
		return p.newConsoleReader(ctx, id, &r.console, follow), nil
	}
	f, err := p.root.Open(filepath.Join(id, consoleFile))
	if errors.Is(err, fs.ErrNotExist) {
		inst, getErr := p.get(id)
		if getErr != nil {
			return nil, fmt.Errorf("processvm: console of %q: %w", id, vmprovider.ErrNotFound)
		}
		return nil, fmt.Errorf("processvm: console of %q: %w: machine is %s", id, vmprovider.ErrUnavailable, inst.State)
	}
	if err != nil {
		return nil, fmt.Errorf("processvm: console of %q: %w", id, err)
	}
	return p.newConsoleReader(ctx, id, fileConsole{f}, follow), nil
}

// consoleSource is where a console is kept.
type consoleSource interface {
	io.ReaderAt
	io.Closer
	size() (int64, error)
}

type fileConsole struct{ *os.File }

func (f fileConsole) size() (int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

// memoryConsole is that of a machine inside this process: its first bytes.
type memoryConsole struct {
	limit int64

	mu      sync.Mutex
	kept    []byte
	written int64
}

func (c *memoryConsole) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.written += int64(len(b))
	c.kept = append(c.kept, b[:min(int64(len(b)), c.limit-int64(len(c.kept)))]...)
	return len(b), nil
}

// ReadAt implements io.ReaderAt.
func (c *memoryConsole) ReadAt(b []byte, off int64) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if off >= int64(len(c.kept)) {
		return 0, io.EOF
	}
	n := copy(b, c.kept[off:])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (c *memoryConsole) size() (int64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.written, nil
}

// Close implements io.Closer; the console stays for other readers.
func (c *memoryConsole) Close() error { return nil }

func (p *Provider) newConsoleReader(ctx context.Context, id string, f consoleSource, follow bool) *consoleReader {
	ctx, cancel := context.WithCancel(ctx)
	return &consoleReader{p: p, id: id, f: f, follow: follow, ctx: ctx, cancel: cancel}
}

type consoleReader struct {
	p      *Provider
	id     string
	f      consoleSource
	follow bool
	ctx    context.Context
	cancel context.CancelFunc

	off   int64
	mark  string // what is left of it to read
	cut   bool
	ended bool // the machine stopped: what is there now is all
}

func (r *consoleReader) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	for {
		if err := r.ctx.Err(); err != nil {
			return 0, err
		}
		n, err := r.next(b)
		if n > 0 || err != nil {
			return n, err
		}
		if r.ended || !r.follow {
			return 0, io.EOF
		}
		if r.ended, err = r.p.stopped(r.ctx, r.id); err != nil {
			return 0, err
		}
		if r.ended {
			continue // look once more
		}
		t := time.NewTimer(followEvery)
		select {
		case <-t.C:
		case <-r.ctx.Done():
			t.Stop()
		}
	}
}

// next reads what is there, nothing at the end for now.
func (r *consoleReader) next(b []byte) (int, error) {
	limit := r.p.cfg.ConsoleBytes
	if r.off < limit {
		n, err := r.f.ReadAt(b[:min(int64(len(b)), limit-r.off)], r.off)
		r.off += int64(n)
		if n > 0 || errors.Is(err, io.EOF) {
			err = nil
		}
		return n, err
	}
	if !r.cut {
		size, err := r.f.size()
		if err != nil || size <= limit {
			return 0, err
		}
		r.cut, r.mark = true, r.p.consoleMark()
	}
	n := copy(b, r.mark)
	r.mark = r.mark[n:]
	return n, nil
}

// Close ends a Read that waits.
func (r *consoleReader) Close() error {
	r.cancel()
	return r.f.Close()
}
