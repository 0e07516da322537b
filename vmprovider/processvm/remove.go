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
)

// deepest is how far removal descends before it moves what is below up to the
// top: each level costs an open directory, and a job may nest thousands.
const deepest = 64

// removeTree removes name below top and all in it, whatever the modes as far as
// the user may, following no links, and goes on after failures. Absent is no
// error.
func removeTree(ctx context.Context, top *os.Root, name string, keep ...string) error {
	r := remover{ctx: ctx, top: top, name: name}
	return r.dir(top, name, name, 0, keep)
}

type remover struct {
	ctx   context.Context
	top   *os.Root
	name  string // the tree's, in top
	moved int
}

// dir removes the directory name of parent; path is its path from top. Names in
// keep, and so the directory itself if any are given, stay.
func (r *remover) dir(parent *os.Root, name, path string, depth int, keep []string) error {
	d, err := openDir(parent, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	err = r.content(d, path, depth, keep)
	if err = errors.Join(err, d.Close()); err != nil || len(keep) > 0 {
		return err
	}
	return absentIsFine(parent.Remove(name))
}

func (r *remover) content(d *os.Root, path string, depth int, keep []string) error {
	kept := map[string]bool{}
	for _, k := range keep {
		kept[k] = true
	}
	var errs []error
	// Reading starts anew until nothing is left to try: names that are removed
	// while a directory is read may hide others, and content may be moved up.
	for {
		if err := r.ctx.Err(); err != nil {
			return errors.Join(append(errs, err)...)
		}
		names, err := readNames(d, len(kept)+256)
		if err != nil {
			return errors.Join(append(errs, err)...)
		}
		tried := false
		for _, n := range names {
			if kept[n] {
				continue
			}
			tried = true
			if err := r.entry(d, n, filepath.Join(path, n), depth); err != nil {
				kept[n] = true // not again
				errs = append(errs, err)
			}
		}
		if !tried {
			return errors.Join(errs...)
		}
	}
}

func (r *remover) entry(d *os.Root, name, path string, depth int) error {
	fi, err := d.Lstat(name)
	if err != nil {
		return absentIsFine(err)
	}
	if !fi.IsDir() {
		return absentIsFine(d.Remove(name))
	}
	if depth >= deepest {
		return r.moveUp(d, name, path)
	}
	return r.dir(d, name, path, depth+1, nil)
}

func (r *remover) moveUp(d *os.Root, name, path string) error {
	_ = d.Chmod(name, 0o700) // a directory changes its parent with write permission only
	for {
		r.moved++
		to := filepath.Join(r.name, fmt.Sprintf(".moved-%d", r.moved))
		if _, err := r.top.Lstat(to); errors.Is(err, fs.ErrNotExist) {
			return r.top.Rename(path, to)
		}
	}
}

// openDir opens a directory, not what a link points to, granting its owner what
// removal needs.
func openDir(parent *os.Root, name string) (*os.Root, error) {
	fi, err := parent.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !fi.IsDir() {
		return nil, &fs.PathError{Op: "open", Path: name, Err: errors.New("not a directory")}
	}
	if fi.Mode().Perm()&0o700 != 0o700 {
		// A failure shows when the directory is used.
		_ = parent.Chmod(name, 0o700)
	}
	d, err := parent.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	if now, err := d.Stat("."); err != nil || !os.SameFile(fi, now) {
		d.Close()
		return nil, &fs.PathError{Op: "open", Path: name, Err: errors.New("was replaced meanwhile")}
	}
	return d, nil
}

func readNames(d *os.Root, n int) ([]string, error) {
	f, err := d.Open(".")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(n)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return names, err
}

func absentIsFine(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
