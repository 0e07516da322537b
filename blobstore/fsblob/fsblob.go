// Package fsblob keeps blobs as files in a directory: each object is written
// to a temporary file, synced, renamed into place, and its directory synced,
// so that what Put returned survives a crash of the machine. All access goes
// through os.Root: no key and no link planted in the tree leads out of it.
//
// Several processes may share a directory. An object's file holds its content
// followed by a short trailer with its content type, which keeps replacing an
// object atomic. Names are described in names.go; they are safe on file
// systems that fold case or normalise Unicode. The directory is for this
// package alone: foreign files are ignored or, as temporary files, removed.
package fsblob

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/solstice-ci/solstice-go/blobstore"
)

// Options tunes a store; the zero value is the default.
type Options struct {
	// StaleAfter is how old a temporary file must be before Open takes it for
	// the leftover of a crash and removes it, as Sweep does. Default 24 hours.
	StaleAfter time.Duration
	// NoSync omits every fsync: for tests and benchmarks. What was stored may
	// be lost or torn when the machine crashes.
	NoSync bool
}

// Store is a blobstore.Store on a directory. Make one with Open.
type Store struct {
	root *os.Root
	o    Options
	dirs dirCache

	mu     sync.RWMutex // held for reading during calls, so that Close waits
	closed bool

	write func(f *os.File, p []byte) (int, error) // tests put faults here
}

var (
	_ blobstore.Store   = (*Store)(nil)
	_ blobstore.Sweeper = (*Store)(nil)
)

// tmpDir holds files being written. No key has this name: "%t" is no escape.
const tmpDir = "%tmp"

// Open opens the store in dir, which is created if need be, and removes stale
// temporary files.
func Open(dir string, o Options) (*Store, error) {
	if o.StaleAfter <= 0 {
		o.StaleAfter = 24 * time.Hour
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("fsblob: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("fsblob: %w", err)
	}
	s := &Store{root: root, o: o, write: (*os.File).Write}
	s.dirs.store = s
	if _, err := s.cleanTemp(context.Background(), time.Now().Add(-o.StaleAfter)); err != nil {
		root.Close()
		return nil, fmt.Errorf("fsblob: temporary files: %w", err)
	}
	return s, nil
}

// Sweep implements blobstore.Sweeper.
func (s *Store) Sweep(ctx context.Context, minAge time.Duration) (removed int, err error) {
	end, err := s.begin(ctx)
	if err != nil {
		return 0, err
	}
	defer end()
	removed, err = s.cleanTemp(ctx, time.Now().Add(-minAge))
	if err != nil {
		return removed, fmt.Errorf("fsblob: temporary files: %w", err)
	}
	return removed, nil
}

func (s *Store) cleanTemp(ctx context.Context, before time.Time) (removed int, err error) {
	if err := s.root.MkdirAll(tmpDir, 0o700); err != nil {
		return 0, err
	}
	d, err := s.root.Open(tmpDir)
	if err != nil {
		return 0, err
	}
	defer d.Close()
	for {
		entries, err := d.ReadDir(1024)
		for _, e := range entries {
			if err := ctx.Err(); err != nil {
				return removed, err
			}
			// Whoever fails to look or to remove was too late or not allowed:
			// neither hinders the store.
			if info, err := e.Info(); err == nil && info.ModTime().Before(before) && s.root.Remove(tmpDir+"/"+e.Name()) == nil {
				removed++
			}
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				return removed, nil
			}
			return removed, err
		}
	}
}

// Capabilities implements blobstore.Store.
func (s *Store) Capabilities() blobstore.Capabilities {
	return blobstore.Capabilities{Durable: !s.o.NoSync, ContentType: true, MultiWriter: true}
}

// Close waits for calls under way; open readers stay usable.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	s.dirs.close()
	return s.root.Close()
}

// begin guards a call against Close; the caller calls the returned function.
func (s *Store) begin(ctx context.Context) (end func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.RLock()
	if s.closed {
		s.mu.RUnlock()
		return nil, blobstore.ErrClosed
	}
	return s.mu.RUnlock, nil
}

// Put implements blobstore.Store. A full disk wraps blobstore.ErrNoSpace.
func (s *Store) Put(ctx context.Context, key string, r io.Reader, o blobstore.PutOptions) (blobstore.Info, error) {
	if err := blobstore.ValidateKey(key); err != nil {
		return blobstore.Info{}, err
	}
	if err := o.Validate(); err != nil {
		return blobstore.Info{}, err
	}
	end, err := s.begin(ctx)
	if err != nil {
		return blobstore.Info{}, err
	}
	defer end()
	path := objectPath(key)
	if o.IfAbsent { // spare the work; what decides is the link below
		if _, err := s.root.Lstat(path); err == nil {
			return blobstore.Info{}, fmt.Errorf("%w: %s", blobstore.ErrExists, key)
		}
	}

	tmp := tmpDir + "/" + rand.Text()
	info, err := s.writeTemp(ctx, tmp, r, o)
	if err == nil {
		err = s.publish(ctx, tmp, path, o.IfAbsent)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			_ = s.dirs.prune(path) // what was made on the way; the error to report is the first
		}
	}
	if err != nil {
		_ = s.root.Remove(tmp) // what a crash leaves, Open removes
		return blobstore.Info{}, putError(key, err)
	}
	info.Key = key
	return info, nil
}

func putError(key string, err error) error {
	switch {
	case errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("fsblob: put %s: %w: %w", key, blobstore.ErrNoSpace, err)
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("%w: %s", blobstore.ErrExists, key)
	}
	return fmt.Errorf("fsblob: put %s: %w", key, err)
}

// buffers are large enough that a small object and its trailer are one write.
var buffers = sync.Pool{New: func() any { b := make([]byte, 256<<10); return &b }}

// writeTemp stores r's bytes and the trailer in a new file and syncs it,
// hashing in the same pass.
func (s *Store) writeTemp(ctx context.Context, tmp string, r io.Reader, o blobstore.PutOptions) (_ blobstore.Info, err error) {
	f, err := s.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return blobstore.Info{}, err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	var sum hash.Hash
	if o.SHA256 != nil {
		sum = sha256.New()
	}
	bp := buffers.Get().(*[]byte)
	defer buffers.Put(bp)
	buf := *bp
	var size int64
	for done := false; !done; {
		n, rerr := fill(ctx, r, buf[:len(buf)-maxTrailer])
		//nolint:errorlint // a reader ends with io.EOF itself; one that wraps it has failed
		if done = rerr == io.EOF; rerr != nil && !done {
			return blobstore.Info{}, rerr
		}
		if size += int64(n); o.Size > 0 && (size > o.Size || done && size < o.Size) {
			return blobstore.Info{}, fmt.Errorf("%w: not the %d bytes announced", blobstore.ErrChecksum, o.Size)
		}
		if sum != nil {
			sum.Write(buf[:n])
		}
		p := buf[:n]
		if done {
			p = appendTrailer(p, o.ContentType)
		}
		if _, err := s.write(f, p); err != nil {
			return blobstore.Info{}, err
		}
	}
	if sum != nil && !bytes.Equal(sum.Sum(nil), o.SHA256) {
		return blobstore.Info{}, fmt.Errorf("%w: SHA-256 is %x", blobstore.ErrChecksum, sum.Sum(nil))
	}
	if err := s.sync(f); err != nil {
		return blobstore.Info{}, err
	}
	st, err := f.Stat()
	if err != nil {
		return blobstore.Info{}, err
	}
	return blobstore.Info{Size: size, ModTime: st.ModTime(), ContentType: o.ContentType}, nil
}

// fill reads until p is full or r ends, which it reports as io.EOF.
func fill(ctx context.Context, r io.Reader, p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		if err := ctx.Err(); err != nil {
			return n, err
		}
		var m int
		m, err = r.Read(p[n:])
		n += m
	}
	return n, err
}

// publish gives the synced file its name, durably.
func (s *Store) publish(ctx context.Context, tmp, path string, ifAbsent bool) error {
	for named := false; ; {
		if err := ctx.Err(); err != nil && !named {
			return err
		}
		dir, err := s.dirs.acquire(parent(path))
		if err == nil {
			switch {
			case named: // but in a directory that was made anew under us
				_, err = s.root.Lstat(path)
				if errors.Is(err, fs.ErrNotExist) {
					s.dirs.release(dir)
					return nil // and is deleted since
				}
			case ifAbsent:
				err = s.root.Link(tmp, path)
			default:
				err = s.root.Rename(tmp, path)
			}
			if err == nil {
				named = true
				err = dir.sync()
			}
			if errors.Is(err, fs.ErrNotExist) {
				s.dirs.drop(dir.path)
			}
			s.dirs.release(dir)
		}
		switch {
		case err == nil && ifAbsent:
			_ = s.root.Remove(tmp)
			return nil
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
		// A Delete took the empty directory away meanwhile: again, unless it
		// is the temporary file that somebody took.
		if _, err := s.root.Lstat(tmp); err != nil && !named {
			return fmt.Errorf("temporary file: %w", err)
		}
	}
}

func (s *Store) sync(f *os.File) error {
	if s.o.NoSync {
		return nil
	}
	return f.Sync()
}

// The trailer: content type, its length, magic.
const (
	magic      = "fsblob1"
	minTrailer = 1 + len(magic)
	maxTrailer = blobstore.MaxContentTypeBytes + minTrailer
)

func appendTrailer(p []byte, contentType string) []byte {
	p = append(p, contentType...)
	p = append(p, byte(len(contentType)))
	return append(p, magic...)
}

var errCorrupt = errors.New("file was not written by fsblob or is damaged")

// readTrailer returns the content's size and type.
func readTrailer(f io.ReaderAt, fileSize int64) (size int64, contentType string, err error) {
	buf := make([]byte, min(fileSize, int64(maxTrailer)))
	if _, err := f.ReadAt(buf, fileSize-int64(len(buf))); err != nil && err != io.EOF {
		return 0, "", err
	}
	end := len(buf) - minTrailer
	if end < 0 || string(buf[end+1:]) != magic || int(buf[end]) > end {
		return 0, "", errCorrupt
	}
	n := int(buf[end])
	return fileSize - int64(minTrailer+n), string(buf[end-n : end]), nil
}

// open opens an object's file and describes it.
func (s *Store) open(key string) (*os.File, blobstore.Info, error) {
	f, err := s.root.Open(objectPath(key))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
			return nil, blobstore.Info{}, fmt.Errorf("%w: %s", blobstore.ErrNotFound, key)
		}
		return nil, blobstore.Info{}, fmt.Errorf("fsblob: %w", err)
	}
	info := blobstore.Info{Key: key}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = errCorrupt
	}
	if err == nil {
		info.ModTime = st.ModTime()
		info.Size, info.ContentType, err = readTrailer(f, st.Size())
	}
	if err != nil {
		f.Close()
		return nil, blobstore.Info{}, fmt.Errorf("fsblob: %s: %w", key, err)
	}
	return f, info, nil
}

// Get implements blobstore.Store. The reader goes on with the content it
// began with when the object is replaced or deleted.
func (s *Store) Get(ctx context.Context, key string, o blobstore.GetOptions) (io.ReadCloser, blobstore.Info, error) {
	if err := blobstore.ValidateKey(key); err != nil {
		return nil, blobstore.Info{}, err
	}
	end, err := s.begin(ctx)
	if err != nil {
		return nil, blobstore.Info{}, err
	}
	defer end()
	f, info, err := s.open(key)
	if err != nil {
		return nil, blobstore.Info{}, err
	}
	n, err := o.Range(info.Size)
	if err != nil {
		f.Close()
		return nil, blobstore.Info{}, fmt.Errorf("%s: %w", key, err)
	}
	return &reader{io.NewSectionReader(f, o.Offset, n), f, ctx}, info, nil
}

type reader struct {
	section *io.SectionReader
	f       *os.File
	ctx     context.Context
}

func (r *reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.section.Read(p)
}

func (r *reader) Close() error { return r.f.Close() }

// Stat implements blobstore.Store.
func (s *Store) Stat(ctx context.Context, key string) (blobstore.Info, error) {
	if err := blobstore.ValidateKey(key); err != nil {
		return blobstore.Info{}, err
	}
	end, err := s.begin(ctx)
	if err != nil {
		return blobstore.Info{}, err
	}
	defer end()
	f, info, err := s.open(key)
	if err != nil {
		return blobstore.Info{}, err
	}
	return info, f.Close()
}

// Delete implements blobstore.Store; directories it leaves empty go too.
func (s *Store) Delete(ctx context.Context, key string, _ blobstore.DeleteOptions) error {
	if err := blobstore.ValidateKey(key); err != nil {
		return err
	}
	end, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	path := objectPath(key)
	switch err := s.root.Remove(path); {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR):
		return nil
	case err != nil:
		return fmt.Errorf("fsblob: %w", err)
	}
	if err := s.dirs.prune(path); err != nil {
		return fmt.Errorf("fsblob: delete %s: %w", key, err)
	}
	return nil
}
