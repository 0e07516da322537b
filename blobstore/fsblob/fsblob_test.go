package fsblob

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/blobstore/blobstoretest"
)

func open(tb testing.TB, dir string, o Options) *Store {
	tb.Helper()
	s, err := Open(dir, o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { s.Close() })
	return s
}

func harness(o Options) blobstoretest.Harness {
	return blobstoretest.Harness{
		Open: func(tb testing.TB) blobstore.Store { return open(tb, tb.TempDir(), o) },
		Reopen: func(tb testing.TB, s blobstore.Store) blobstore.Store {
			if err := s.Close(); err != nil {
				tb.Fatal(err)
			}
			return open(tb, s.(*Store).root.Name(), o)
		},
		Second:    func(tb testing.TB, s blobstore.Store) blobstore.Store { return open(tb, s.(*Store).root.Name(), o) },
		Leftovers: leftovers,
		Abandon: func(tb testing.TB, s blobstore.Store) {
			f, err := s.(*Store).root.Create(tmpDir + "/abandoned")
			if err != nil {
				tb.Fatal(err)
			}
			f.Close()
		},
	}
}

// leftovers are files that hold no listed object, and empty directories.
func leftovers(tb testing.TB, bs blobstore.Store) (left []string) {
	s := bs.(*Store)
	keep := map[string]bool{".": true, tmpDir: true}
	for info, err := range s.List(tb.Context(), blobstore.ListOptions{}) {
		if err != nil {
			tb.Fatal(err)
		}
		for p := objectPath(info.Key); p != "."; p = parent(p) {
			keep[p] = true
		}
	}
	err := fs.WalkDir(s.root.FS(), ".", func(path string, _ fs.DirEntry, err error) error {
		if !keep[path] {
			left = append(left, path)
		}
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	return left
}

func TestConformance(t *testing.T)       { blobstoretest.Run(t, harness(Options{})) }
func TestConformanceNoSync(t *testing.T) { blobstoretest.Run(t, harness(Options{NoSync: true})) }

func TestConformanceSmallPages(t *testing.T) {
	defer func(n int) { pageSize = n }(pageSize)
	pageSize = 2
	blobstoretest.Run(t, harness(Options{NoSync: true}))
}

func FuzzNames(f *testing.F) {
	for _, s := range []string{"a", "A/b", "%", "~", strings.Repeat("X", 200), strings.Repeat("x", 120), "é/日本"} {
		f.Add(s, s+"!")
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		if blobstore.ValidateKey(a) != nil || blobstore.ValidateKey(b) != nil {
			return
		}
		pa, pb := objectPath(a), objectPath(b)
		if (a == b) != strings.EqualFold(pa, pb) {
			t.Fatalf("%q and %q become %q and %q", a, b, pa, pb)
		}
		// Walking down the path gives the key again.
		key := ""
		parts := strings.Split(pa, "/")
		for i, name := range parts {
			if len(name) > 130 {
				t.Fatalf("name of %d bytes", len(name))
			}
			elem, k, ok := parseName(name, i < len(parts)-1)
			if !ok {
				t.Fatalf("%q is not understood", name)
			}
			if key += elem; k == directory {
				key += "/"
			}
		}
		if key != a {
			t.Fatalf("%q became %q became %q", a, pa, key)
		}
	})
}

func TestStaleTemporaryFilesGo(t *testing.T) {
	dir := t.TempDir()
	open(t, dir, Options{}).Close()
	for name, age := range map[string]time.Duration{"old": 25 * time.Hour, "young": time.Hour} {
		path := filepath.Join(dir, tmpDir, name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		at := time.Now().Add(-age)
		if err := os.Chtimes(path, at, at); err != nil {
			t.Fatal(err)
		}
	}
	s := open(t, dir, Options{})
	if left := leftovers(t, s); !slices.Equal(left, []string{tmpDir + "/young"}) {
		t.Fatalf("left: %q", left)
	}
}

func TestFullDiskLeavesNothing(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	put := func(key string) error {
		_, err := s.Put(t.Context(), key, strings.NewReader(strings.Repeat("x", 1<<20)), blobstore.PutOptions{})
		return err
	}
	if err := put("d/k"); err != nil {
		t.Fatal(err)
	}
	s.write = func(f *os.File, p []byte) (int, error) {
		n, _ := f.Write(p[:len(p)/2])
		return n, &fs.PathError{Op: "write", Path: f.Name(), Err: syscall.ENOSPC}
	}
	for _, key := range []string{"d/k", "new/k"} {
		if err := put(key); !errors.Is(err, blobstore.ErrNoSpace) || !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("error is %v", err)
		}
	}
	if left := leftovers(t, s); len(left) > 0 {
		t.Fatalf("left: %q", left)
	}
	s.write = (*os.File).Write
	if err := put("new/k"); err != nil { // recovers unaided
		t.Fatal(err)
	}
}

func TestForeignFilesAreIgnored(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	outside := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(outside, appendTrailer([]byte("secret"), ""), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"Readme", "UPPER~", "%6~", "%61~", "x"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "d~"), 0o700); err != nil {
		t.Fatal(err)
	}
	for info, err := range s.List(t.Context(), blobstore.ListOptions{}) {
		t.Fatalf("List gave %q, %v", info.Key, err)
	}
	if err := os.Symlink(outside, filepath.Join(dir, "link~")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Get(t.Context(), "link", blobstore.GetOptions{}); err == nil {
		t.Fatal("a link led out of the root")
	}
	if err := os.WriteFile(filepath.Join(dir, "torn~"), []byte("no trailer"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Get(t.Context(), "torn", blobstore.GetOptions{}); !errors.Is(err, errCorrupt) {
		t.Fatalf("Get of a damaged file: %v", err)
	}
}

func TestManyDirectoriesKeepFewOpen(t *testing.T) {
	s := open(t, t.TempDir(), Options{NoSync: true})
	for i := range 3 * maxCachedDirs {
		key := fmt.Sprintf("d%d/e/k", i)
		if _, err := s.Put(t.Context(), key, strings.NewReader(key), blobstore.PutOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(s.dirs.open); n > maxCachedDirs {
		t.Fatalf("%d directories are open", n)
	}
}

// BenchmarkPut measures Put beside its floor: the system calls that atomic and
// durable replacement cannot do without, in the same run and directory tree.
// Both write into one existing directory. x/floor is the ratio of their rates.
func BenchmarkPut(b *testing.B) {
	for _, size := range []int{1 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			data := bytes.Repeat([]byte("x"), size)
			dir := b.TempDir()
			s := open(b, filepath.Join(dir, "store"), Options{})
			floorDir := filepath.Join(dir, "floor")
			if err := os.MkdirAll(floorDir, 0o700); err != nil {
				b.Fatal(err)
			}
			d, err := os.Open(floorDir)
			if err != nil {
				b.Fatal(err)
			}
			defer d.Close()
			var ours, floor time.Duration
			b.SetBytes(int64(size))
			for i := 0; b.Loop(); i++ {
				start := time.Now()
				if _, err := s.Put(context.Background(), fmt.Sprintf("runs/1/%d", i), bytes.NewReader(data), blobstore.PutOptions{}); err != nil {
					b.Fatal(err)
				}
				mid := time.Now()
				if err := floorPut(floorDir, d, i, data); err != nil {
					b.Fatal(err)
				}
				ours += mid.Sub(start)
				floor += time.Since(mid)
			}
			b.ReportMetric(float64(floor)/float64(ours), "x/floor")
		})
	}
}

func floorPut(dir string, d *os.File, i int, data []byte) error {
	tmp, name := filepath.Join(dir, "tmp"), filepath.Join(dir, fmt.Sprint(i))
	f, err := os.Create(tmp)
	if err != nil {
		return err
	}
	_, werr := f.Write(data)
	return errors.Join(werr, f.Sync(), f.Close(), os.Rename(tmp, name), d.Sync())
}
