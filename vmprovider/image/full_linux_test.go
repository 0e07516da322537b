package image_test

import (
	"bytes"
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/vmprovider/image"
)

// tmpfs is a small file system.
func tmpfs(t *testing.T, size string, flags uintptr, dir string) string {
	t.Helper()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", flags, "size="+size); err != nil {
		testenv.Missing(t, "tmpfs", "run as root: "+err.Error())
	}
	return dir
}

func small(t *testing.T, size string) string {
	t.Helper()
	dir := tmpfs(t, size, 0, t.TempDir())
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	return dir
}

// TestDiskFull: what can be resumed is kept, and nothing else.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	body := content(2 << 20)
	t.Run("known beforehand", func(t *testing.T) {
		dir := small(t, "1m")
		fails(t, open(t, dir, image.Options{}), dir, serve(t, body).image(), syscall.ENOSPC)
	})
	t.Run("download", func(t *testing.T) {
		dir := small(t, "1m")
		srv := serve(t, body)
		before := func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Range") != "" {
				return false
			}
			w.Header().Set("ETag", srv.etag)
			_ = http.NewResponseController(w).Flush() // and no length
			_, _ = w.Write(body)
			return true
		}
		srv.set(func() { srv.before = before })
		s := open(t, dir, image.Options{})
		fails(t, s, dir, srv.image(), syscall.ENOSPC, "lock", "part", "part.json")
		tmpfs(t, "8m", syscall.MS_REMOUNT, dir)
		holds(t, ensure(t, s, srv.image()).Path(), body)
		if got := srv.requests(); len(got) != 2 || got[1] == "" {
			t.Errorf("ranges %q, want that it goes on", got)
		}
	})
	t.Run("unpack", func(t *testing.T) {
		z, err := zstd.NewWriter(nil)
		if err != nil {
			t.Fatal(err)
		}
		disk := bytes.Repeat([]byte("0123456789abcdef"), 1<<18)
		packed := z.EncodeAll(disk, nil)
		dir := small(t, "2m")
		srv := serve(t, packed)
		img := srv.image()
		img.Compression = image.Zstd
		s := open(t, dir, image.Options{})
		_, err = s.Ensure(t.Context(), img, nil)
		if want := fmt.Sprintf("no room in %s", dir); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
		if got := strings.Join(names(t, dir), " "); got != "zstd.lock zstd.part zstd.part.json" {
			t.Errorf("left %s", got)
		}
		tmpfs(t, "16m", syscall.MS_REMOUNT, dir)
		holds(t, ensure(t, s, img).Path(), disk)
		if n := len(srv.requests()); n != 1 {
			t.Errorf("%d downloads, want one", n)
		}
	})
}
