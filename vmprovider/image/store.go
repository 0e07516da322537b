package image

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// Options of a store; the zero value is the default.
type Options struct {
	MaxBytes      int64         // of all images together, beyond which those that were not used for longest go; 0: no bound
	MaxAge        time.Duration // since its last use, after which an image goes; 0: never
	MaxImageBytes int64         // of one image, unpacked, that does not say its own; 0: 64 GiB
	StallTimeout  time.Duration // how long a download may stand still; 0: 30 s
	Attempts      int           // at a download without any progress, before it fails; 0: 8
	MaxRedirects  int           // 0: 10
	TLS           *tls.Config   // for https; nil: the system's authorities
	Logger        *slog.Logger  // nil: none
}

// Phases of making an image ready.
const (
	Downloading = "downloading"
	Unpacking   = "unpacking"
	Verifying   = "verifying"
	Waiting     = "waiting" // for another process that uses the image or makes it ready, and has not said how far it is
)

// Progress is how far an image is. What another process does is seen, too.
type Progress struct {
	Phase string
	Done  int64 // bytes
	Total int64 // bytes; 0: not known
}

// poll is how often it is looked whether another process is done.
const poll = 100 * time.Millisecond

// Store keeps images in a directory, which any number of processes of one host
// share. All methods are safe for concurrent use.
//
// Of an image there are KEY.img, for reading only, and KEY.json, what it has to
// be; KEY.part and KEY.part.json, as much as is downloaded; KEY.new, as much as
// is unpacked; KEY.lock, locked by who changes anything of these, shared by who
// uses the image. Its time of modification is that of the last use.
type Store struct {
	dir    string
	root   *os.Root
	o      Options
	client *http.Client
}

// Open opens a store, and makes its directory unless it exists: so that others,
// such as a hypervisor's user, can read the images.
func Open(dir string, o Options) (*Store, error) {
	o.MaxImageBytes = cmp.Or(o.MaxImageBytes, 64<<30)
	o.StallTimeout = cmp.Or(o.StallTimeout, 30*time.Second)
	o.Attempts = cmp.Or(o.Attempts, 8)
	o.MaxRedirects = cmp.Or(o.MaxRedirects, 10)
	o.Logger = cmp.Or(o.Logger, slog.New(slog.DiscardHandler))
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	s := &Store{dir: dir, root: root, o: o, client: newClient(o)}
	return s, s.sweep()
}

var tmpName = regexp.MustCompile(`^[0-9a-f]{64}[a-z.]*\.json\.[0-9]+\.tmp$`)

// sweep removes what processes left that died while they wrote a small file.
func (s *Store) sweep() error {
	files, err := fs.ReadDir(s.root.FS(), ".")
	for _, f := range files {
		if info, err := f.Info(); err == nil && tmpName.MatchString(f.Name()) && time.Since(info.ModTime()) > time.Hour {
			_ = s.root.Remove(f.Name()) // the next one may
		}
	}
	return err
}

// Close releases the store; pins hold on.
func (s *Store) Close() error {
	s.client.CloseIdleConnections()
	return s.root.Close()
}

// Pin is an image in use. It is not removed or evicted, by any process, until it
// is released or the process that holds it ends.
type Pin struct {
	store  *Store
	key    string
	path   string
	format string
	record record
	mu     sync.Mutex
	lock   *os.File // nil: released
}

// Path is the image's file, which is only to be read.
func (p *Pin) Path() string { return p.path }

// Bytes is the image's size.
func (p *Pin) Bytes() int64 { return p.record.Bytes }

// Image is what a machine's disk is based on.
func (p *Pin) Image() vmprovider.Image {
	return vmprovider.Image{Path: p.path, Digest: "sha256:" + p.record.SHA256, Format: p.format}
}

// Release says that the image is no longer in use. A repeat is no error.
func (p *Pin) Release() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lock == nil {
		return nil
	}
	now := time.Now()
	err := errors.Join(unix.Futimes(int(p.lock.Fd()), []unix.Timeval{unix.NsecToTimeval(now.UnixNano()), unix.NsecToTimeval(now.UnixNano())}), p.lock.Close())
	p.lock = nil
	return err
}

// record is what a store knows of an image.
type record struct {
	Label    string    `json:"label"`
	Source   string    `json:"source"`
	SHA256   string    `json:"sha256"` // of the image
	Bytes    int64     `json:"bytes"`
	ModTime  time.Time `json:"mod_time"`
	Verified time.Time `json:"verified"` // when all of it was read
}

// Ensure returns the image, pinned. What is not in the store is downloaded,
// checked and unpacked, once: who comes meanwhile waits, sees how far it is, and
// goes on where a process that died has stopped. An image that looks different
// from what was stored is read in whole, and replaced if it is. The progress may
// be nil; it is called by the caller's goroutine, a few times per second.
//
// The error wraps ErrChecksum, ErrTooLarge, ErrSource or ErrInvalid where only a
// person can help, what the file system said (syscall.ENOSPC), or ctx's.
func (s *Store) Ensure(ctx context.Context, img Image, progress func(Progress)) (*Pin, error) {
	key, err := img.key()
	if err != nil {
		return nil, err
	}
	r, made := &reporter{to: progress}, false
	for {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("image %s: %w", img.Label, context.Cause(ctx))
		}
		pin, err := s.pin(ctx, key, img, r)
		switch {
		case err == nil && made: // pinned, so that others go
			if err := s.Evict(ctx); err != nil {
				s.o.Logger.WarnContext(ctx, "cannot evict images", "err", err)
			}
			return pin, nil
		case err == nil:
			return pin, nil
		case errors.Is(err, ErrNotFound), errors.Is(err, ErrCorrupt):
			err = s.makeLocked(ctx, key, img, r)
		}
		switch {
		case err == nil:
			made = true
			continue
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
			return nil, fmt.Errorf("image %s: no room in %s: %w", img.Label, s.dir, err)
		case !errors.Is(err, errBusy):
			return nil, fmt.Errorf("image %s: %w", img.Label, err)
		}
		r.report(s.sight(key))
		select {
		case <-time.After(poll):
		case <-ctx.Done():
			return nil, fmt.Errorf("image %s: another process uses it or makes it ready: %w", img.Label, context.Cause(ctx))
		}
	}
}

// Pin returns an image that is in the store, pinned; otherwise the error wraps
// ErrNotFound, ErrInUse while it is made, or ErrCorrupt.
func (s *Store) Pin(ctx context.Context, img Image) (*Pin, error) {
	key, err := img.key()
	if err != nil {
		return nil, err
	}
	pin, err := s.pin(ctx, key, img, &reporter{})
	if errors.Is(err, errBusy) {
		err = ErrInUse
	}
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", img.Label, err)
	}
	return pin, nil
}

func (s *Store) pin(ctx context.Context, key string, img Image, r *reporter) (*Pin, error) {
	if !s.exists(key + ".img") { // and no lock has to be made
		return nil, ErrNotFound
	}
	l, err := s.lockNow(key, unix.LOCK_SH)
	if err != nil {
		return nil, err
	}
	rec, err := s.check(key, img)
	if errors.Is(err, ErrCorrupt) && rec.SHA256 != "" { // otherwise it was read already, and is bad
		rec, err = s.verify(ctx, key, img, r)
	}
	if err == nil {
		err = s.used(key)
	}
	if err != nil {
		_ = l.Close()
		return nil, err
	}
	return &Pin{store: s, key: key, path: filepath.Join(s.dir, key+".img"), format: img.Format, record: rec, lock: l}, nil
}

// check looks whether an image seems to be what was stored; it does not read it.
func (s *Store) check(key string, img Image) (record, error) {
	info, err := s.root.Lstat(key + ".img")
	if errors.Is(err, fs.ErrNotExist) {
		return record{}, ErrNotFound
	} else if err != nil {
		return record{}, err
	}
	rec, ok := s.record(key)
	if !ok {
		return record{}, fmt.Errorf("%w: it is not recorded what it has to be", ErrCorrupt)
	}
	if !info.Mode().IsRegular() || info.Size() != rec.Bytes || !info.ModTime().Equal(rec.ModTime) {
		return rec, fmt.Errorf("%w: size or time of change are not those recorded", ErrCorrupt)
	}
	if want := img.imageSHA256(); want != "" && want != rec.SHA256 {
		return rec, fmt.Errorf("%w: stored with SHA-256 %s, the catalogue says %s", ErrCorrupt, rec.SHA256, want)
	}
	return rec, nil
}

// verify reads an image, and forgets its record when it is damaged, so that the
// next Ensure replaces it. The image's lock is held.
func (s *Store) verify(ctx context.Context, key string, img Image, r *reporter) (record, error) {
	rec, known := s.record(key)
	want := cmp.Or(img.imageSHA256(), rec.SHA256)
	f, err := s.root.Open(key + ".img")
	if errors.Is(err, fs.ErrNotExist) {
		return record{}, ErrNotFound
	} else if err != nil {
		return record{}, err
	}
	defer func() { _ = f.Close() }() // only read from
	info, err := f.Stat()
	if err != nil {
		return record{}, err
	}
	h := sha256.New()
	if err := copyTo(ctx, h, f, func(done int64) { r.report(Progress{Verifying, done, info.Size()}) }); err != nil {
		return record{}, err
	}
	if got := sumText(h.Sum(nil)); got != want {
		if known {
			if err := s.root.Remove(key + ".json"); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return record{}, err
			}
		}
		return record{}, fmt.Errorf("%w: it has SHA-256 %s, not %s", ErrCorrupt, got, cmp.Or(want, "what was recorded"))
	}
	rec.Label, rec.Source = cmp.Or(img.Label, rec.Label), cmp.Or(shown(img.Source), rec.Source)
	rec.SHA256, rec.Bytes, rec.ModTime, rec.Verified = want, info.Size(), info.ModTime(), time.Now()
	return rec, s.writeRecord(key, rec)
}

// Verify reads an image in whole, also while it is in use. A damaged one is
// ErrCorrupt, and replaced by the next Ensure once nobody uses it.
func (s *Store) Verify(ctx context.Context, img Image, progress func(Progress)) error {
	key, err := img.key()
	if err != nil {
		return err
	}
	if !s.exists(key + ".img") {
		return fmt.Errorf("image %s: %w", img.Label, ErrNotFound)
	}
	l, err := s.lockNow(key, unix.LOCK_SH)
	if err == nil {
		_, err = s.verify(ctx, key, img, &reporter{to: progress})
		_ = l.Close()
	} else if errors.Is(err, errBusy) {
		err = ErrInUse
	}
	if err != nil {
		return fmt.Errorf("image %s: %w", img.Label, err)
	}
	return nil
}

// Entry is an image in a store, or a part of one.
type Entry struct {
	Image    Image     // as far as the store knows it: SHA256, Compression, and Label and Source from when it was made
	State    State     //
	Bytes    int64     // on disk, without holes being taken off
	InUse    bool      // pinned, or being made ready, by any process
	LastUse  time.Time //
	Verified time.Time // when all of it was last read
	Path     string    // of a ready or damaged image
}

// State of an image in a store.
type State string

// States.
const (
	Ready   State = "ready"
	Partial State = "partial" // being downloaded, or to be resumed
	Damaged State = "damaged" // it does not look as it was stored; the next Ensure reads it in whole
)

var fileName = regexp.MustCompile(`^(([0-9a-f]{64})(?:\.(xz|zstd|gz))?)\.(img|json|lock|part|part\.json|new)$`)

// List says what is in the store, that used last first.
func (s *Store) List(ctx context.Context) ([]Entry, error) {
	files, err := fs.ReadDir(s.root.FS(), ".")
	if err != nil {
		return nil, err
	}
	byKey := map[string]Image{}
	for _, f := range files {
		if m := fileName.FindStringSubmatch(f.Name()); m != nil {
			byKey[m[1]] = Image{SHA256: m[2], Compression: cmp.Or(m[3], None)}
		}
	}
	var list []Entry
	for key, img := range byKey {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if e, ok := s.entry(key, img); ok {
			list = append(list, e)
		}
	}
	slices.SortFunc(list, func(a, b Entry) int {
		return cmp.Or(b.LastUse.Compare(a.LastUse), cmp.Compare(a.Image.SHA256, b.Image.SHA256))
	})
	return list, nil
}

// entry is not there when only a lock is.
func (s *Store) entry(key string, img Image) (Entry, bool) {
	e := Entry{Image: img, State: Partial}
	here := false
	for _, suffix := range []string{".part", ".new", ".img"} {
		if info, err := s.root.Lstat(key + suffix); err == nil {
			e.Bytes, here, e.LastUse = e.Bytes+info.Size(), true, info.ModTime()
		}
	}
	if !here {
		return e, false
	}
	rec, err := s.check(key, img)
	e.Image.Label, e.Image.Source, e.Verified = rec.Label, rec.Source, rec.Verified
	switch {
	case err == nil:
		e.State = Ready
	case errors.Is(err, ErrCorrupt):
		e.State = Damaged
	}
	if e.State != Partial {
		e.Path = filepath.Join(s.dir, key+".img")
	}
	if info, err := s.root.Stat(key + ".lock"); err == nil {
		e.LastUse = info.ModTime()
		l, err := s.lock(key, unix.LOCK_EX)
		if e.InUse = errors.Is(err, errBusy); err == nil {
			_ = l.Close()
		}
	}
	return e, true
}

// Remove removes an image, and what there is of its download. Absent is
// ErrNotFound, pinned or being made ready ErrInUse.
func (s *Store) Remove(_ context.Context, img Image) error {
	key, err := img.key()
	if err != nil {
		return err
	}
	if _, ok := s.entry(key, img); !ok {
		return fmt.Errorf("image %s: %w", cmp.Or(img.Label, img.SHA256), ErrNotFound)
	}
	if err := s.remove(key, nil); err != nil {
		return fmt.Errorf("image %s: %w", cmp.Or(img.Label, img.SHA256), err)
	}
	return nil
}

// remove removes an image unless the condition, under its lock, says otherwise.
func (s *Store) remove(key string, unless func() bool) error {
	l, err := s.lockNow(key, unix.LOCK_EX)
	if errors.Is(err, errBusy) {
		return ErrInUse
	} else if err != nil {
		return err
	}
	defer func() { _ = l.Close() }()
	if unless != nil && unless() {
		return nil
	}
	return s.discard(key, ".json", ".img", ".part", ".part.json", ".new", ".lock") // the lock last
}

// discard removes files of an image whose lock is held.
func (s *Store) discard(key string, suffixes ...string) error {
	var errs []error
	for _, suffix := range suffixes {
		if err := s.root.Remove(key + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, s.sync())...)
}

// Evict removes what was not used for Options.MaxAge, then as much of what was
// not used for longest as is needed to keep within Options.MaxBytes; never what
// is in use. Ensure does so too, after it has made an image ready.
func (s *Store) Evict(ctx context.Context) error {
	if s.o.MaxBytes <= 0 && s.o.MaxAge <= 0 {
		return nil
	}
	list, err := s.List(ctx)
	if err != nil {
		return err
	}
	total := int64(0)
	for _, e := range list {
		total += e.Bytes
	}
	var errs []error
	for _, e := range slices.Backward(list) {
		old := s.o.MaxAge > 0 && time.Since(e.LastUse) > s.o.MaxAge
		if !old && (s.o.MaxBytes <= 0 || total <= s.o.MaxBytes) {
			continue
		}
		key, err := e.Image.key()
		if err == nil && !e.InUse {
			usedMeanwhile := false
			err = s.remove(key, func() bool {
				info, err := s.root.Stat(key + ".lock")
				usedMeanwhile = err == nil && info.ModTime().After(e.LastUse)
				return usedMeanwhile
			})
			if err == nil && !usedMeanwhile {
				total -= e.Bytes
				s.o.Logger.InfoContext(ctx, "evicted an image", "image", e.Image.Label, "sha256", e.Image.SHA256, "bytes", e.Bytes, "last_use", e.LastUse)
			}
		}
		if err != nil && !errors.Is(err, ErrInUse) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// makeLocked makes an image ready unless another process is at it (errBusy) or
// has just done it.
func (s *Store) makeLocked(ctx context.Context, key string, img Image, r *reporter) (err error) {
	l, err := s.lock(key, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer func() {
		if !s.exists(key+".img") && !s.exists(key+".part") {
			err = errors.Join(err, s.discard(key, ".part.json", ".lock"))
		}
		_ = l.Close()
	}()
	if _, err := s.check(key, img); err == nil {
		return nil
	} else if errors.Is(err, ErrCorrupt) {
		s.o.Logger.WarnContext(ctx, "an image is not what was stored and is replaced", "image", img.Label, "sha256", img.SHA256, "err", err)
	}
	if err := s.discard(key, ".json", ".img", ".new"); err != nil {
		return err
	}
	if err := s.used(key); err != nil {
		return err
	}
	if err := s.fetch(ctx, key, img, r); err != nil {
		return err
	}
	return s.finish(ctx, key, img, r)
}

// finish makes the image of what is downloaded and verified.
func (s *Store) finish(ctx context.Context, key string, img Image, r *reporter) (err error) {
	name, sum := key+".part", img.SHA256
	if img.compressed() {
		name = key + ".new"
		defer func() {
			if err != nil {
				err = errors.Join(err, s.discard(key, ".new"))
			}
		}()
		if sum, err = s.unpack(ctx, key, img, r); err != nil {
			return err
		}
	}
	// Only now: had it died before, another process could not have gone on.
	if err := s.root.Chmod(name, 0o444); err != nil {
		return err
	}
	f, err := s.root.Open(name)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // only read from
	if img.Format == QCOW2 {
		magic := make([]byte, 4)
		if _, err := io.ReadFull(f, magic); err != nil || string(magic) != "QFI\xfb" {
			return errors.Join(fmt.Errorf("%w: it is no qcow2 image, as the catalogue says that it is", ErrInvalid), s.discard(key, ".part", ".part.json"))
		}
	}
	if err := f.Sync(); err != nil { // the mode as well
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	rec := record{Label: img.Label, Source: shown(img.Source), SHA256: sum, Bytes: info.Size(), ModTime: info.ModTime(), Verified: time.Now()}
	if err := s.writeRecord(key, rec); err != nil {
		return err
	}
	if err := s.root.Rename(name, key+".img"); err != nil {
		return err
	}
	return s.discard(key, ".part", ".part.json")
}

// sight is how far another process is with an image.
func (s *Store) sight(key string) Progress {
	if info, err := s.root.Stat(key + ".new"); err == nil {
		return Progress{Unpacking, info.Size(), 0}
	}
	if info, err := s.root.Stat(key + ".part"); err == nil {
		return Progress{Downloading, info.Size(), s.origin(key).Total}
	}
	return Progress{Phase: Waiting}
}

func (s *Store) exists(name string) bool {
	_, err := s.root.Lstat(name)
	return err == nil
}

func (s *Store) record(key string) (rec record, ok bool) {
	data, err := s.root.ReadFile(key + ".json")
	return rec, err == nil && json.Unmarshal(data, &rec) == nil && sha256Hex.MatchString(rec.SHA256)
}

func (s *Store) writeRecord(key string, rec record) error { return s.writeJSON(key+".json", rec) }

// writeJSON replaces a small file as a whole.
func (s *Store) writeJSON(name string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	tmp := fmt.Sprintf("%s.%d.tmp", name, time.Now().UnixNano())
	f, err := s.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = s.root.Rename(tmp, name)
	}
	if err != nil {
		return errors.Join(err, s.root.Remove(tmp))
	}
	return s.sync()
}

// sync makes durable which files there are.
func (s *Store) sync() error {
	d, err := s.root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// reporter passes progress on, a few times per second and each new phase.
type reporter struct {
	to    func(Progress)
	last  time.Time
	phase string
}

func (r *reporter) report(p Progress) {
	if r.to == nil || p.Phase == r.phase && time.Since(r.last) < poll && p.Done != p.Total {
		return
	}
	r.last, r.phase = time.Now(), p.Phase
	r.to(p)
}

// copyTo copies until the end, and says how many bytes it has.
func copyTo(ctx context.Context, w io.Writer, r io.Reader, progress func(int64)) error {
	buf := make([]byte, 1<<20)
	for done := int64(0); ; {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		n, err := r.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
			done += int64(n)
			progress(done)
		}
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}
