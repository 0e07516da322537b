package agent_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/solstice-ci/solstice-go/solstice/agent"
)

func archive(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		content := ""
		if h.Typeflag == tar.TypeReg {
			content = "content of " + h.Name
			h.Size = int64(len(content))
		}
		if h.Mode == 0 && h.Typeflag != tar.TypeXGlobalHeader {
			h.Mode = 0o644
		}
		must(t, w.WriteHeader(&h))
		_, err := io.WriteString(w, content)
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

func file(name string) tar.Header { return tar.Header{Typeflag: tar.TypeReg, Name: name} }
func link(name, target string) tar.Header {
	return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target}
}

// place is a directory to unpack into, inside one that must not change.
func place(t testing.TB) (outer string, root *os.Root) {
	t.Helper()
	outer = t.TempDir()
	must(t, os.WriteFile(filepath.Join(outer, "secret"), []byte("secret"), 0o600))
	must(t, os.Mkdir(filepath.Join(outer, "work"), 0o755))
	root, err := os.OpenRoot(filepath.Join(outer, "work"))
	must(t, err)
	t.Cleanup(func() { _ = root.Close() })
	return outer, root
}

// untouched checks that nothing happened outside of the work tree.
func untouched(t testing.TB, outer string) {
	t.Helper()
	entries, err := os.ReadDir(outer)
	must(t, err)
	if len(entries) != 2 {
		t.Errorf("outside of the work tree: %v", entries)
	}
	if b, err := os.ReadFile(filepath.Join(outer, "secret")); err != nil || string(b) != "secret" {
		t.Errorf("a file outside of the work tree: %q, %v", b, err)
	}
}

func TestUntar(t *testing.T) {
	outer, root := place(t)
	n, err := agent.Untar(bytes.NewReader(archive(t,
		tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "c1"}},
		tar.Header{Typeflag: tar.TypeDir, Name: "dir/", Mode: 0o700},
		file("dir/plain"), file("not/mentioned/before"),
		tar.Header{Typeflag: tar.TypeReg, Name: "run", Mode: 0o6755},
		link("dir/link", "../run"), link("dangling", "nowhere"), link("outward", "/etc/passwd"),
	)), root, "c1")
	if err != nil || n != 6 {
		t.Fatalf("%d files, %v", n, err)
	}
	work := filepath.Join(outer, "work")
	for name, mode := range map[string]fs.FileMode{"dir/plain": 0o644, "not/mentioned/before": 0o644, "run": 0o755} {
		st, err := os.Stat(filepath.Join(work, name))
		must(t, err)
		if st.Mode()&^0o022 != mode&^0o022 {
			t.Errorf("%s has mode %v", name, st.Mode())
		}
		if b, err := os.ReadFile(filepath.Join(work, name)); err != nil || string(b) != "content of "+name {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	if to, err := os.Readlink(filepath.Join(work, "dir/link")); err != nil || to != "../run" {
		t.Errorf("link: %q, %v", to, err)
	}
	untouched(t, outer)
}

// hostile archives: none of them may touch anything outside, nor be accepted.
var hostile = map[string][]tar.Header{
	"parent":             {file("../secret")},
	"parent deep":        {file("a/../../secret")},
	"absolute":           {file("/secret")},
	"dots":               {file("..")},
	"dir up":             {{Typeflag: tar.TypeDir, Name: "../other/"}},
	"link up, then file": {link("up", ".."), file("up/secret")},
	"link, then link":    {link("a", ".."), link("a/secret", "x")},
	"link below link":    {file("d/x"), link("a", "d"), link("a/y", "x")},
	"link named up":      {link("../secret", "x")},
	"hard link":          {{Typeflag: tar.TypeLink, Name: "hard", Linkname: "../secret"}},
	"device":             {{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3}},
	"fifo":               {{Typeflag: tar.TypeFifo, Name: "fifo"}},
	"twice":              {file("a"), file("a")},
	"file over dir":      {file("a/b"), file("a")},
	"dir over file":      {file("a"), file("a/b")},
	"link over file":     {file("a"), link("a", "b")},
	"git":                {file(".git/config")},
	"git below":          {file("sub/.GIT/hooks/post-checkout")},
}

func TestUntarHostile(t *testing.T) {
	for name, headers := range hostile {
		t.Run(name, func(t *testing.T) {
			outer, root := place(t)
			_, err := agent.Untar(bytes.NewReader(archive(t, headers...)), root, "")
			switch {
			case err == nil:
				t.Error("accepted")
			case agent.IsInfra(err):
				t.Errorf("taken for a failure of the machine: %v", err)
			}
			untouched(t, outer)
		})
	}
}

// TestUntarBroken: a transfer that breaks is not the repository's fault,
// wherever it does.
func TestUntarBroken(t *testing.T) {
	data := archive(t, file("a"), file("b"), link("c", "a"))
	for _, at := range []int{0, 100, 512, 700, 1024, len(data) - 600, len(data) - 1} {
		_, root := place(t)
		broken := io.MultiReader(bytes.NewReader(data[:at]), iotest.ErrReader(io.ErrUnexpectedEOF))
		if _, err := agent.Untar(broken, root, ""); !agent.IsInfra(err) || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("broken after %d bytes: %v", at, err)
		}
	}
	_, root := place(t)
	other := archive(t, tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "c2"}}, file("a"))
	if _, err := agent.Untar(bytes.NewReader(other), root, "c1"); !agent.IsInfra(err) || !strings.Contains(err.Error(), "c2") {
		t.Errorf("archive of another commit: %v", err)
	}
}

func FuzzUntar(f *testing.F) {
	f.Add(archive(f, file("a"), link("b", "a"), tar.Header{Typeflag: tar.TypeDir, Name: "d/"}))
	for _, headers := range hostile {
		f.Add(archive(f, headers...))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		outer, root := place(t)
		_, _ = agent.Untar(bytes.NewReader(data), root, "")
		untouched(t, outer)
	})
}
