package processvm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

func TestRemoveTree(t *testing.T) {
	base := t.TempDir()
	outside := filepath.Join(base, "outside")
	ok(t, os.MkdirAll(filepath.Join(outside, "precious"), 0o700))
	dir := filepath.Join(base, "root")
	tree := filepath.Join(dir, "m")
	ok(t, os.MkdirAll(filepath.Join(tree, "locked/inside"), 0o700))
	ok(t, os.WriteFile(filepath.Join(tree, "locked/inside/file"), nil, 0))
	ok(t, os.Symlink(outside, filepath.Join(tree, "absolute")))
	ok(t, os.Symlink("../../outside", filepath.Join(tree, "relative")))
	ok(t, os.Symlink("nowhere", filepath.Join(tree, "dangling")))
	ok(t, os.WriteFile(filepath.Join(tree, ".moved-1"), nil, 0o600))
	for i := range 1000 {
		ok(t, os.WriteFile(filepath.Join(tree, "f"+strconv.Itoa(i)), nil, 0o600))
	}
	ok(t, os.Chmod(filepath.Join(tree, "locked/inside"), 0))
	ok(t, os.Chmod(filepath.Join(tree, "locked"), 0o500))
	root, err := os.OpenRoot(dir)
	ok(t, err)
	defer root.Close()
	// Deeper than paths can be long and than descriptors should be needed.
	deep, err := root.OpenRoot("m")
	ok(t, err)
	for range 3000 {
		ok(t, deep.Mkdir("d", 0o700))
		below, err := deep.OpenRoot("d")
		ok(t, err)
		ok(t, deep.Close())
		deep = below
	}
	ok(t, deep.Close())

	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := removeTree(ended, root, "m"); !errors.Is(err, context.Canceled) {
		t.Errorf("with an ended context: %v", err)
	}
	ok(t, removeTree(t.Context(), root, "m", "f7"))
	if left, err := os.ReadDir(tree); err != nil || len(left) != 1 || left[0].Name() != "f7" {
		t.Errorf("left: %v, %v; want f7", left, err)
	}
	for range 2 {
		ok(t, removeTree(t.Context(), root, "m"))
		if _, err := os.Lstat(tree); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the tree is still there: %v", err)
		}
	}
	if _, err := os.Stat(filepath.Join(outside, "precious")); err != nil {
		t.Errorf("a link was followed: %v", err)
	}
}
