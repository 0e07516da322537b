package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider/image"
)

// TestImages lists, pulls, verifies and removes images.
func TestImages(t *testing.T) {
	t.Parallel()
	body := bytes.Repeat([]byte("an image "), 100_000)
	digest := sha256.Sum256(body)
	sum := hex.EncodeToString(digest[:])
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/disk" {
			http.NotFound(w, r)
			return
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
	}))
	t.Cleanup(srv.Close)
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"images.yaml": `
aliases: { it: disk }
images:
  disk: { source: "` + srv.URL + `/disk", sha256: ` + sum + `, format: raw, os: linux, arch: amd64 }
  gone: { source: "` + srv.URL + `/gone", sha256: ` + strings.Repeat("0123456789abcdef", 4) + `, format: raw, os: linux, arch: amd64 }
`,
		"broken.yaml": "imags: {}\n",
	})
	u := newUser(t, dir)
	store := filepath.Join(dir, "store")
	u.env = []string{"IMAGE_CATALOGUE=images.yaml", "IMAGE_DIR=" + store}
	list := func() []imageJSON {
		t.Helper()
		return decoded[struct {
			Images []imageJSON `json:"images"`
		}](t, u.ok("image", "list", "--json")).Images
	}
	if l := list(); len(l) != 2 || l[0].Label != "disk" || l[0].State != "absent" || !l[0].Catalogued {
		t.Fatalf("%+v", l)
	}
	out := u.ok("image", "pull", "IT")
	if path := filepath.Join(store, sum+".img"); !strings.HasPrefix(out, "disk 878.9 KiB "+path) {
		t.Errorf("pull prints %q", out)
	}
	var pulled imageJSON
	if err := json.Unmarshal([]byte(u.ok("image", "pull", "disk", "it", "--json")), &pulled); err != nil || pulled.State != "ready" || pulled.Bytes != int64(len(body)) {
		t.Errorf("%+v, %v", pulled, err)
	}
	table := u.ok("image", "list")
	has(t, "table", table, "LABEL", "disk", "ready", "878.9 KiB", "absent", sum[:12])
	if l := list()[0]; l.State != "ready" || l.InUse || l.LastUse.IsZero() || l.Path != pulled.Path {
		t.Errorf("%+v", l)
	}

	r := u.solstice("image", "pull")
	r.want(t, exitCouldNotRun)
	has(t, "stderr", r.stderr, "cannot get the image gone", "404")
	r = u.solstice("image", "pull", "dsik")
	r.want(t, exitFailed)
	has(t, "stderr", r.stderr, `did you mean "disk"?`)
	r = u.solstice("image", "list", "--catalogue", "broken.yaml")
	r.want(t, exitCouldNotRun)
	has(t, "stderr", r.stderr, `broken.yaml:1:1: unknown key "imags" (did you mean "images"?)`)

	if got := u.ok("image", "verify"); got != "disk ready\n" {
		t.Errorf("verify prints %q", got)
	}
	info, err := os.Stat(pulled.Path)
	if err != nil {
		t.Fatal(err)
	}
	body[0] ^= 1
	for _, err := range []error{os.Chmod(pulled.Path, 0o600), os.WriteFile(pulled.Path, body, 0o600), os.Chtimes(pulled.Path, info.ModTime(), info.ModTime())} {
		if err != nil {
			t.Fatal(err)
		}
	}
	body[0] ^= 1
	r = u.solstice("image", "verify", "disk")
	r.want(t, exitFailed)
	has(t, "stdout", r.stdout, "disk damaged")
	u.ok("image", "pull", "disk")
	u.ok("image", "verify", "disk")

	s, err := image.Open(store, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	pin, err := s.Pin(t.Context(), pulled.Image)
	if err != nil {
		t.Fatal(err)
	}
	r = u.solstice("image", "remove", "disk")
	r.want(t, exitFailed)
	has(t, "stderr", r.stderr, "in use")
	if !list()[0].InUse {
		t.Error("it is not shown that the image is in use")
	}
	if err := pin.Release(); err != nil {
		t.Fatal(err)
	}
	u.solstice("image", "evict").want(t, exitCouldNotRun)
	if got := u.ok("image", "evict", "--max-size", "1GiB", "--max-age", "1h"); got != "" {
		t.Errorf("evicted: %s", got)
	}
	if got := u.ok("image", "evict", "--max-size", "1KiB"); got != "removed disk\n" {
		t.Errorf("evict prints %q", got)
	}
	if got := list()[0].State; got != "absent" {
		t.Errorf("after the eviction it is %s", got)
	}
	u.ok("image", "pull", "disk")
	u.env = u.env[1:] // also what is not in a catalogue, by its hash
	has(t, "table", u.ok("image", "list"), "disk (not in the catalogue)")
	u.ok("image", "remove", sum[:12])
	u.solstice("image", "remove", sum[:12]).want(t, exitFailed)
	u.solstice("image", "pull").want(t, exitCouldNotRun)
	if l := list(); len(l) != 0 {
		t.Errorf("left %+v", l)
	}
	state := filepath.Join(dir, "state") // of whoever has no store of their own
	u.env = []string{"STATE_DIR=" + state}
	if l := list(); len(l) != 0 {
		t.Errorf("in another store: %+v", l)
	}
	if info, err := os.Stat(state); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the state directory: %v, %v", info, err)
	}
}
