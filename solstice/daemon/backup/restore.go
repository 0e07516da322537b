package backup

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
)

// maxListBytes bounds what is read into memory of an archive: its own files.
const maxListBytes = 256 << 20

// errDamaged: the archive is not as Create wrote it.
var errDamaged = errors.New("it is damaged or cut short")

// Restore makes the state directory of an archive. The directory must not exist
// or be empty; its parent is written to. All of the archive is verified before
// anything is touched, and the directory appears whole: what a killed Restore
// leaves beside it the next one removes.
func Restore(ctx context.Context, name, stateDir string) (Info, error) {
	info, err := restore(ctx, name, stateDir)
	var p *daemon.Problem
	if err != nil && !errors.As(err, &p) {
		err = problem("cannot restore", err, "")
	}
	return info, err
}

func restore(ctx context.Context, name, stateDir string) (Info, error) {
	stateDir, err := filepath.Abs(stateDir)
	if err != nil {
		return Info{}, err
	}
	release, err := claim(stateDir)
	if err != nil {
		return Info{}, err
	}
	defer release()
	f, err := os.Open(name)
	if err != nil {
		return Info{}, problem("cannot read the backup", err, "")
	}
	defer func() { _ = f.Close() }() // only read from
	info, err := verify(ctx, f)
	if err != nil {
		var p *daemon.Problem
		if errors.Is(err, errDamaged) && !errors.As(err, &p) {
			err = problem("cannot use the backup "+name, err, "take another copy of it, or an older backup")
		}
		return info, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return info, err
	}
	return info, install(ctx, f, stateDir)
}

const lockName = daemonName + ".lock"

// claim locks a state directory, where there is one, against daemons and refuses
// one that is in use or holds anything.
func claim(dir string) (release func(), err error) {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return func() {}, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if e.Name() != lockName {
			return nil, notEmpty(dir, e.Name())
		}
	}
	unlock, err := storage.Lock(dir, daemonName)
	if err != nil {
		return nil, err
	}
	return func() { _ = unlock() }, nil // it wrote nothing
}

func notEmpty(dir, name string) error {
	return problem("the state directory "+dir+" is not empty", errors.New("it has "+name), "give --state-dir a new directory, or move this one away")
}

// walk reads an archive, in order: first gets what it is, each every file of the
// state directory. It fails with errDamaged unless all is as the list at the end
// says.
func walk(ctx context.Context, r io.Reader, first func(Info) error, each func(name string, r io.Reader) error) (Info, error) {
	var info Info
	var found []file
	var list []byte
	own := func(r io.Reader) ([]byte, error) {
		data, err := io.ReadAll(io.LimitReader(r, maxListBytes))
		return data, damaged(err)
	}
	for t, n := tar.NewReader(contextReader{ctx, r}), 0; ; n++ {
		h, err := t.Next()
		if err != nil { // the end as well: the last entry returns below
			return info, damaged(orEnd(err))
		}
		switch {
		case h.Typeflag != tar.TypeReg || h.Size < 0:
			return info, fmt.Errorf("%w: %q is no file", errDamaged, h.Name)
		case n == 0:
			data, err := own(t)
			if err != nil {
				return info, err
			}
			if h.Name != FirstName || json.Unmarshal(data, &info) != nil {
				return info, fmt.Errorf("%w: it does not begin as a backup", errDamaged)
			}
			if err := first(info); err != nil {
				return info, err
			}
		case h.Name == listName:
			if list, err = own(t); err != nil {
				return info, err
			}
		case h.Name == sumName:
			sum, err := own(t)
			if err != nil {
				return info, err
			}
			info.Files = len(found)
			return info, compare(found, list, string(sum))
		default:
			if !allowed(h.Name) {
				return info, fmt.Errorf("%w: %q is no file of a state directory", errDamaged, h.Name)
			}
			sum := sha256.New()
			if err := each(h.Name, io.TeeReader(t, sum)); err != nil {
				return info, err
			}
			info.Bytes += h.Size
			found = append(found, file{h.Name, h.Size, hex.EncodeToString(sum.Sum(nil))})
		}
	}
}

// orEnd says that there ought to be more.
func orEnd(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// damaged tells an archive that is not whole from one that cannot be read now.
func damaged(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, tar.ErrHeader) {
		return fmt.Errorf("%w: %w", errDamaged, err)
	}
	return err
}

func compare(found []file, list []byte, sum string) error {
	if s := sha256.Sum256(list); hex.EncodeToString(s[:]) != sum {
		return fmt.Errorf("%w: the list of its files is not as it was written", errDamaged)
	}
	var want []file
	if err := json.Unmarshal(list, &want); err != nil {
		return fmt.Errorf("%w: the list of its files: %w", errDamaged, err)
	}
	for i, f := range found {
		if i >= len(want) || f != want[i] {
			return fmt.Errorf("%w: %s is not as it was written", errDamaged, f.Name)
		}
	}
	if len(want) > len(found) {
		return fmt.Errorf("%w: %s is missing", errDamaged, want[len(found)].Name)
	}
	return nil
}

// allowed says whether a name is one that Create writes: nothing of an archive
// gets elsewhere.
func allowed(name string) bool {
	if name != path.Clean(name) || !filepath.IsLocal(filepath.FromSlash(name)) {
		return false
	}
	dir, _, below := strings.Cut(name, "/")
	if below {
		return dir == logs || slices.Contains(directories, dir)
	}
	return name == database || slices.Contains(singleFiles, name)
}

func verify(ctx context.Context, r io.Reader) (Info, error) {
	seen := map[string]bool{}
	info, err := walk(ctx, r, check, func(name string, r io.Reader) error {
		if seen[name] {
			return fmt.Errorf("%w: %s is in it twice", errDamaged, name)
		}
		seen[name] = true
		_, err := io.Copy(io.Discard, r)
		return damaged(err)
	})
	if err == nil && !seen[database] {
		err = fmt.Errorf("%w: it has no database", errDamaged)
	}
	return info, err
}

// check refuses an archive that this program cannot go on from.
func check(i Info) error {
	if i.Format != Format {
		return problem(fmt.Sprintf("the backup has format %d, this program reads %d", i.Format, Format), nil, "restore with the version that made it: "+i.Version)
	}
	known, err := store.KnowsSchema(i.Schema)
	if err == nil && !known {
		err = problem("the backup's database is of another version", fmt.Errorf("its schema is %q, which this program does not know", i.Schema), "restore with the version that made it, or a later one: "+i.Version)
	}
	return err
}

// install unpacks beside the state directory, and puts that in its place.
func install(ctx context.Context, r io.Reader, stateDir string) (err error) {
	parent := filepath.Dir(stateDir)
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return err
	}
	work, done, err := workDir(parent, filepath.Base(stateDir), "restore")
	if err != nil {
		return problem("cannot restore beside the state directory", err, "restore as a user who may write to "+parent+", or into another --state-dir")
	}
	defer func() { err = errors.Join(err, done()) }()
	root, err := os.OpenRoot(work)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }() // all files of it are closed
	if _, err := walk(ctx, r, check, func(name string, r io.Reader) error { return unpack(root, name, r) }); err != nil {
		return err // it was right just now: the file changed
	}
	if err := syncDirs(work); err != nil {
		return err
	}
	// A directory takes the place of an empty one, and of no other, in one step.
	if err := os.Remove(filepath.Join(stateDir, lockName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := unix.Rename(work, stateDir); err != nil { // os.Rename takes no directory's place
		advice := "give --state-dir a new directory"
		if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EXDEV) {
			advice = "it is the root of a file system: give --state-dir a directory below it"
		}
		return problem("cannot put the state directory in its place", err, advice)
	}
	return syncDir(parent)
}

func unpack(root *os.Root, name string, r io.Reader) (err error) {
	if dir := path.Dir(name); dir != "." {
		if err := root.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Sync(), f.Close())
}

func syncDirs(root string) error {
	return filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			err = syncDir(name)
		}
		return err
	})
}
