package agent

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
)

// maxLinks bounds the symbolic links of an archive, which are kept in memory
// until its end.
const maxLinks = 100_000

// untar unpacks a tar of a commit, as git-archive(1) writes it, into an empty
// directory, and returns the number of files. Nothing outside root is touched
// and no link is followed: links are made after all else, and what a tree in git
// cannot hold (hard links, devices, a second entry of the same name, .git) is
// refused. Of the modes only the executable bit counts. Errors of reading r or of
// the disk are infraErrors, others are the archive's.
func untar(r io.Reader, root *os.Root, commit string) (files int, err error) {
	src := &errReader{r: r}
	tr := tar.NewReader(src)
	type link struct{ name, target string }
	var links []link
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return files, src.blame(fmt.Errorf("agent: source archive: %w", err))
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			if id := h.PAXRecords["comment"]; commit != "" && id != "" && id != commit {
				return files, infra(fmt.Errorf("agent: source archive is of commit %s instead of %s", clip(id), commit))
			}
			continue
		}
		name, err := entryName(h.Name)
		if err != nil {
			return files, err
		}
		switch h.Typeflag {
		case tar.TypeDir:
			if name != "." {
				err = mkdirs(root, name)
			}
		case tar.TypeReg:
			files++
			err = writeEntry(root, name, h, tr, src)
		case tar.TypeSymlink:
			files++
			if len(links) == maxLinks {
				return files, fmt.Errorf("agent: source archive: more than %d symbolic links", maxLinks)
			}
			links = append(links, link{name, h.Linkname})
		default:
			err = fmt.Errorf("agent: source archive: %q is of type %q, which is refused", clip(name), h.Typeflag)
		}
		if err != nil {
			return files, err
		}
	}
	// What follows the archive's end says whether the answer was whole.
	if _, err := io.Copy(io.Discard, src); err != nil {
		return files, infra(fmt.Errorf("agent: source archive: %w", err))
	}
	made := map[string]bool{}
	for _, l := range links {
		for dir := path.Dir(l.name); dir != "."; dir = path.Dir(dir) {
			if made[dir] {
				return files, fmt.Errorf("agent: source archive: %q is below a symbolic link", clip(l.name))
			}
		}
		made[l.name] = true
		if err := mkdirs(root, path.Dir(l.name)); err != nil {
			return files, err
		}
		if err := root.Symlink(l.target, l.name); err != nil {
			return files, entryError(l.name, err)
		}
	}
	return files, nil
}

// entryName gives the name in its shortest form; one that leaves the tree or
// enters .git is refused.
func entryName(name string) (string, error) {
	clean := path.Clean(name)
	if name == "" || strings.IndexByte(name, 0) >= 0 || !filepath.IsLocal(clean) {
		return "", fmt.Errorf("agent: source archive: name %q is not inside the tree", clip(name))
	}
	for part := range strings.SplitSeq(clean, "/") {
		if strings.EqualFold(part, ".git") {
			return "", fmt.Errorf("agent: source archive: name %q is not part of a tree", clip(name))
		}
	}
	return clean, nil
}

// mkdirs makes a directory and its parents. As the archive's links do not exist
// yet, none can be on the way.
func mkdirs(root *os.Root, dir string) error {
	if dir == "." {
		return nil
	}
	if err := root.MkdirAll(dir, 0o755); err != nil {
		return entryError(dir, err)
	}
	return nil
}

func writeEntry(root *os.Root, name string, h *tar.Header, r io.Reader, src *errReader) error {
	if name == "." {
		return errors.New("agent: source archive: a file without a name")
	}
	if err := mkdirs(root, path.Dir(name)); err != nil {
		return err
	}
	mode := fs.FileMode(0o644)
	if h.Mode&0o111 != 0 {
		mode = 0o755
	}
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return entryError(name, err)
	}
	_, err = io.Copy(f, r)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		return nil
	}
	var disk *fs.PathError
	if errors.As(err, &disk) {
		return infra(err)
	}
	return src.blame(fmt.Errorf("agent: source archive: %q: %w", clip(name), err))
}

// entryError tells a disk that fails from an archive that contradicts itself.
func entryError(name string, err error) error {
	err = fmt.Errorf("agent: source archive: %q: %w", clip(name), err)
	for _, disk := range []error{syscall.ENOSPC, syscall.EDQUOT, syscall.EIO, syscall.EROFS, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.EACCES} {
		if errors.Is(err, disk) {
			return infra(err)
		}
	}
	return err
}

// errReader remembers how reading failed, so that a broken connection is not
// taken for a broken archive.
type errReader struct {
	r   io.Reader
	err error
}

func (e *errReader) Read(b []byte) (int, error) {
	n, err := e.r.Read(b)
	if err != nil && !errors.Is(err, io.EOF) {
		e.err = err
	}
	return n, err
}

func (e *errReader) blame(err error) error {
	if e.err != nil {
		return infra(err)
	}
	return err
}
