package fsblob

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"sync"
)

// parent of a path inside the root; the root itself is ".".
func parent(path string) string {
	if i := strings.LastIndexByte(path, '/'); i >= 0 {
		return path[:i]
	}
	return "."
}

// dirCache keeps directories open that are known to be durable: they and all
// above them are synced into their parents. That saves a Put into a known
// directory everything but the sync of the directory itself. A handle pins its
// inode, so comparing it with what the path names now shows reliably whether
// somebody, another process perhaps, removed the directory meanwhile.
type dirCache struct {
	store *Store
	mu    sync.Mutex
	open  map[string]*dirHandle
}

const maxCachedDirs = 64

type dirHandle struct {
	store *Store
	path  string
	f     *os.File
	refs  int // guarded by dirCache.mu, as is
	gone  bool
}

// acquire opens a directory, creating it and those above it where they are
// missing; the caller releases it. fs.ErrNotExist means that a directory was
// removed meanwhile: try again.
func (c *dirCache) acquire(path string) (*dirHandle, error) {
	c.mu.Lock()
	if h := c.open[path]; h != nil {
		h.refs++
		c.mu.Unlock()
		return h, nil
	}
	c.mu.Unlock()

	if path != "." {
		up, err := c.acquire(parent(path))
		if err != nil {
			return nil, err
		}
		defer c.release(up)
		if err = c.store.root.Mkdir(path, 0o700); err == nil || errors.Is(err, fs.ErrExist) {
			err = up.sync() // also what another process made and has not synced yet
		}
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				c.drop(up.path)
			}
			return nil, err
		}
	}
	f, err := c.store.root.Open(path)
	if err != nil {
		return nil, err
	}
	h := &dirHandle{store: c.store, path: path, f: f, refs: 1}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open == nil {
		c.open = map[string]*dirHandle{}
	}
	if other := c.open[path]; other != nil {
		c.dropLocked(other)
	}
	for _, old := range c.open {
		if len(c.open) < maxCachedDirs {
			break
		}
		c.dropLocked(old)
	}
	c.open[path] = h
	return h, nil
}

func (c *dirCache) release(h *dirHandle) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h.refs--; h.refs == 0 && h.gone {
		h.f.Close()
	}
}

// drop forgets a directory.
func (c *dirCache) drop(path string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if h := c.open[path]; h != nil {
		c.dropLocked(h)
	}
}

func (c *dirCache) dropLocked(h *dirHandle) {
	delete(c.open, h.path)
	h.gone = true
	if h.refs == 0 {
		h.f.Close()
	}
}

func (c *dirCache) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, h := range c.open {
		c.dropLocked(h)
	}
}

// sync makes the directory's entries durable. It fails with fs.ErrNotExist
// when the path no longer names this directory.
func (h *dirHandle) sync() error {
	mine, err := h.f.Stat()
	if err != nil {
		return err
	}
	now, err := h.store.root.Stat(h.path)
	if err != nil {
		return err
	}
	if !os.SameFile(mine, now) {
		return &fs.PathError{Op: "sync", Path: h.path, Err: fs.ErrNotExist}
	}
	return h.store.sync(h.f)
}

// prune removes the directories above a path that is not there which are empty
// now, and makes all of it durable.
func (c *dirCache) prune(path string) error {
	dir := parent(path)
	for ; dir != "."; dir = parent(dir) {
		if err := c.store.root.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			break // not empty
		}
		c.drop(dir)
	}
	f, err := c.store.root.Open(dir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // whoever removed it syncs further up
		}
		return err
	}
	defer f.Close()
	return c.store.sync(f)
}
