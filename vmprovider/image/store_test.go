package image_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/vmprovider/image"
)

// TestCompressions unpacks what the real programs made, from a URL and a path.
func TestCompressions(t *testing.T) {
	t.Parallel()
	disk := append([]byte("QFI\xfb"), content(300_000)...)
	disk = append(append(disk, make([]byte, 3<<20)...), content(1000)...) // a hole
	disk = append(disk, make([]byte, 100_000)...)
	for compression, program := range map[string]string{image.None: "cat", image.XZ: "xz", image.Zstd: "zstd", image.Gzip: "gzip"} {
		t.Run(compression, func(t *testing.T) {
			t.Parallel()
			if _, err := exec.LookPath(program); err != nil {
				testenv.Missing(t, program, "install the package of that name")
			}
			cmd := exec.CommandContext(t.Context(), program)
			if compression != image.None {
				cmd.Args = append(cmd.Args, "-c")
			}
			cmd.Stdin = bytes.NewReader(disk)
			packed, err := cmd.Output()
			if err != nil {
				t.Fatal(err)
			}
			srv := serve(t, packed)
			for _, source := range []string{srv.URL + "/a?token=secret", write(t, "a", packed)} {
				img := image.Image{Label: "a", Source: source, SHA256: sum(packed), ImageSHA256: sum(disk), Compression: compression, Format: image.QCOW2}
				dir := t.TempDir()
				s := open(t, dir, image.Options{})
				phases := map[string]bool{}
				pin, err := s.Ensure(t.Context(), img, func(p image.Progress) { phases[p.Phase] = true })
				if err != nil {
					t.Fatal(err)
				}
				holds(t, pin.Path(), disk)
				if want := "img json lock"; strings.TrimLeft(strings.ReplaceAll(strings.Join(names(t, dir), " "), compression+".", ""), " ") != want {
					t.Errorf("the store has %q, want %s", names(t, dir), want)
				}
				if !phases[image.Downloading] || phases[image.Unpacking] != (compression != image.None) {
					t.Errorf("phases %v", phases)
				}
				if v := pin.Image(); v.Path != pin.Path() || v.Digest != "sha256:"+sum(disk) || v.Format != image.QCOW2 {
					t.Errorf("for a machine: %+v", v)
				}
				n := len(srv.requests())
				ensure(t, s, img)
				if len(srv.requests()) != n {
					t.Error("it was downloaded again")
				}
				record, err := filepath.Glob(filepath.Join(dir, "*.json"))
				if err != nil || len(record) != 1 {
					t.Fatal(record, err)
				}
				if data, _ := os.ReadFile(record[0]); bytes.Contains(data, []byte("secret")) {
					t.Error("what a URL asks for is kept")
				}
			}
		})
	}
}

// TestCut resumes over a connection that breaks again and again.
func TestCut(t *testing.T) {
	t.Parallel()
	srv := serve(t, content(1<<20))
	proxy := testenv.NewProxy(t, srv.Listener.Addr().String())
	proxy.Add(t, "limit_data", testenv.ToClient, map[string]any{"bytes": 400_000})
	img := srv.image()
	img.Source = "http://" + proxy.Addr() + "/x.img"
	s := open(t, t.TempDir(), image.Options{Attempts: 3})
	holds(t, ensure(t, s, img).Path(), srv.body)
	got := srv.requests()
	if len(got) != 3 || got[0] != "" {
		t.Fatalf("ranges %q, want three", got)
	}
	var second, third int
	if _, err := fmt.Sscanf(got[1]+got[2], "bytes=%d-bytes=%d-", &second, &third); err != nil || second < 300_000 || third < second+300_000 {
		t.Errorf("ranges %q do not go on where the last one ended", got)
	}
}

// TestChanged downloads a file that is replaced while half of it is there.
func TestChanged(t *testing.T) {
	t.Parallel()
	for _, etag := range []string{`"two"`, `W/"weak"`, ""} {
		for _, size := range []int{500_000, 1000} {
			t.Run(fmt.Sprint(etag, size), func(t *testing.T) {
				t.Parallel()
				old, body := content(400_000), content(size)
				srv := serve(t, old)
				srv.set(func() {
					srv.before = func(w http.ResponseWriter, _ *http.Request) bool {
						if etag != "" {
							w.Header().Set("ETag", `"one"`)
						}
						w.Header().Set("Content-Length", fmt.Sprint(len(old)))
						_, _ = w.Write(old[:200_000])
						srv.set(func() { srv.before, srv.body, srv.etag = nil, body, etag })
						panic(http.ErrAbortHandler)
					}
				})
				img := srv.image()
				img.SHA256 = sum(body)
				s := open(t, t.TempDir(), image.Options{Attempts: 4})
				holds(t, ensure(t, s, img).Path(), body)
			})
		}
	}
}

// TestRefused: what only a person can help leaves nothing.
func TestRefused(t *testing.T) {
	t.Parallel()
	srv := serve(t, content(100_000))
	before := func(w http.ResponseWriter, r *http.Request) bool {
		switch r.URL.Path {
		case "/none":
			http.NotFound(w, r)
		case "/circle":
			http.Redirect(w, r, "/circle", http.StatusFound)
		case "/file":
			http.Redirect(w, r, "file:///etc/passwd", http.StatusFound)
		default:
			return false
		}
		return true
	}
	srv.set(func() { srv.before = before })
	bomb := func(n int) []byte {
		z, err := zstd.NewWriter(nil)
		if err != nil {
			t.Fatal(err)
		}
		return z.EncodeAll(make([]byte, n), nil)
	}(64 << 20)
	for name, c := range map[string]struct {
		change func(*image.Image)
		want   error
	}{
		"wrong hash":       {func(i *image.Image) { i.SHA256 = sum([]byte("x")) }, image.ErrChecksum},
		"not found":        {func(i *image.Image) { i.Source = srv.URL + "/none" }, image.ErrSource},
		"circle":           {func(i *image.Image) { i.Source = srv.URL + "/circle" }, image.ErrSource},
		"redirect to file": {func(i *image.Image) { i.Source = srv.URL + "/file" }, image.ErrSource},
		"no file":          {func(i *image.Image) { i.Source = filepath.Join(t.TempDir(), "none") }, image.ErrSource},
		"directory":        {func(i *image.Image) { i.Source = t.TempDir() }, image.ErrSource},
		"device":           {func(i *image.Image) { i.Source = "/dev/zero" }, image.ErrSource},
		"other scheme":     {func(i *image.Image) { i.Source = "file:///etc/passwd" }, image.ErrInvalid},
		"relative":         {func(i *image.Image) { i.Source = "../x" }, image.ErrInvalid},
		"credentials":      {func(i *image.Image) { i.Source = "http://me:secret@127.0.0.1/" }, image.ErrInvalid},
		"not packed":       {func(i *image.Image) { i.Compression = image.XZ }, image.ErrInvalid},
		"no qcow2":         {func(i *image.Image) { i.Format = image.QCOW2 }, image.ErrInvalid},
		"too large":        {func(i *image.Image) { i.MaxBytes = 99_999 }, image.ErrTooLarge},
		"hash leads out":   {func(i *image.Image) { i.SHA256 = "../" + i.SHA256[3:] }, image.ErrInvalid},
		"hash of nothing":  {func(i *image.Image) { i.SHA256 = sum(nil) }, image.ErrInvalid},
		"compression":      {func(i *image.Image) { i.Compression = "/../x" }, image.ErrInvalid},
		"bomb": {func(i *image.Image) {
			*i = image.Image{Source: write(t, "bomb", bomb), SHA256: sum(bomb), Compression: image.Zstd, MaxBytes: 32 << 20}
		}, image.ErrTooLarge},
		"cut archive": {func(i *image.Image) {
			short := bomb[:len(bomb)-1]
			*i = image.Image{Source: write(t, "short", short), SHA256: sum(short), Compression: image.Zstd}
		}, image.ErrInvalid},
		"other image": {func(i *image.Image) {
			*i = image.Image{Source: write(t, "bomb", bomb), SHA256: sum(bomb), ImageSHA256: sum([]byte("x")), Compression: image.Zstd}
		}, image.ErrChecksum},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			img := srv.image()
			c.change(&img)
			fails(t, open(t, dir, image.Options{}), dir, img, c.want)
		})
	}
}

// TestServerTroubles: what may pass is tried again, so often.
func TestServerTroubles(t *testing.T) {
	t.Parallel()
	srv := serve(t, content(100_000))
	dir := t.TempDir()
	s := open(t, dir, image.Options{Attempts: 2, StallTimeout: time.Second})
	broken := func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	}
	srv.set(func() { srv.before = broken })
	if _, err := s.Ensure(t.Context(), srv.image(), nil); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("error %v, want what the server said", err)
	}
	if n := len(srv.requests()); n != 2 {
		t.Errorf("%d attempts, want 2", n)
	}
	// A server that stands still, after half of it: that half is kept.
	hold := make(chan struct{})
	srv.set(func() { srv.before, srv.hold = nil, hold })
	if _, err := s.Ensure(t.Context(), srv.image(), nil); err == nil || !strings.Contains(err.Error(), "nothing came") {
		t.Errorf("error %v, want that nothing came", err)
	}
	if got := strings.Join(names(t, dir), " "); got != "lock part part.json" {
		t.Errorf("left %s", got)
	}
	// One that is slow, but gets on, is waited for; this one redirects as well.
	srv.set(func() {
		srv.hold = nil
		srv.before = func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path == "/x.img" {
				http.Redirect(w, r, "/slow", http.StatusFound)
				return true
			}
			w.Header().Set("ETag", `"new"`)
			for piece := range slices.Chunk(srv.body, len(srv.body)/6) {
				_, _ = w.Write(piece)
				_ = http.NewResponseController(w).Flush()
				time.Sleep(250 * time.Millisecond)
			}
			return true
		}
	})
	patient := open(t, dir, image.Options{StallTimeout: time.Second})
	holds(t, ensure(t, patient, srv.image()).Path(), srv.body)
}

// TestCancelled keeps what can be resumed.
func TestCancelled(t *testing.T) {
	t.Parallel()
	srv := serve(t, content(1<<20))
	srv.set(func() { srv.hold = make(chan struct{}) })
	dir := t.TempDir()
	s := open(t, dir, image.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	_, err := s.Ensure(ctx, srv.image(), func(p image.Progress) {
		if p.Done > 0 && p.Total == 1<<20 {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	srv.set(func() { srv.hold = nil })
	holds(t, ensure(t, s, srv.image()).Path(), srv.body)
	if got := srv.requests(); len(got) != 2 || got[1] == "" {
		t.Errorf("ranges %q, want that it goes on", got)
	}
}

// TestOneDownload: several processes and goroutines want the same image.
func TestOneDownload(t *testing.T) {
	t.Parallel()
	srv := serve(t, content(4<<20))
	hold := make(chan struct{})
	srv.set(func() { srv.hold = hold })
	dir := t.TempDir()
	var all []*process
	for range 4 {
		all = append(all, start(t, dir, srv.image()))
	}
	s := open(t, dir, image.Options{})
	for _, p := range all { // also those who wait see how far it is
		p.says("downloading")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := s.Ensure(ctx, srv.image(), nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting ended with %v", err)
	}
	if err := s.Remove(t.Context(), srv.image()); !errors.Is(err, image.ErrInUse) {
		t.Errorf("removed while it is made: %v", err)
	}
	close(hold)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			pin, err := s.Ensure(t.Context(), srv.image(), nil)
			if err != nil {
				t.Error(err)
				return
			}
			_ = pin.Release()
		})
	}
	wg.Wait()
	for _, p := range all {
		p.says("pinned")
	}
	if n := len(srv.requests()); n != 1 {
		t.Errorf("%d downloads, want one", n)
	}
	if err := s.Remove(t.Context(), srv.image()); !errors.Is(err, image.ErrInUse) {
		t.Errorf("removed while others use it: %v", err)
	}
	for _, p := range all {
		p.end()
	}
	if err := s.Remove(t.Context(), srv.image()); err != nil {
		t.Error(err)
	}
	if got := names(t, dir); len(got) > 0 {
		t.Errorf("left %q", got)
	}
	if err := s.Remove(t.Context(), srv.image()); !errors.Is(err, image.ErrNotFound) {
		t.Errorf("removed twice: %v", err)
	}
}

// TestKilled: who waits takes over from a process that is killed, and goes on.
func TestKilled(t *testing.T) {
	t.Parallel()
	srv := serve(t, content(4<<20))
	srv.set(func() { srv.hold = make(chan struct{}) })
	dir := t.TempDir()
	first := start(t, dir, srv.image())
	until(t, "half of it is there", func() bool {
		info, err := os.Stat(filepath.Join(dir, srv.image().SHA256+".part"))
		return err == nil && info.Size() == 2<<20
	})
	second := start(t, dir, srv.image())
	second.says("downloading")
	srv.set(func() { srv.hold = nil })
	first.kill()
	second.says("pinned")
	if got := srv.requests(); len(got) != 2 || got[1] != fmt.Sprintf("bytes=%d-", 2<<20) {
		t.Errorf("ranges %q, want that the second goes on", got)
	}
	s := open(t, dir, image.Options{})
	holds(t, ensure(t, s, srv.image()).Path(), srv.body)
}

// TestEvict: by size and age, and never what a process uses that lives.
func TestEvict(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir, image.Options{MaxBytes: 250_000})
	var imgs []image.Image
	for n := range 3 {
		b := content(100_000 + n)
		imgs = append(imgs, image.Image{Label: fmt.Sprint(n), Source: write(t, "x", b), SHA256: sum(b), Format: image.Raw})
	}
	user := start(t, dir, imgs[0])
	user.says("pinned")
	for _, img := range imgs[1:] {
		if err := ensure(t, s, img).Release(); err != nil {
			t.Fatal(err)
		}
	}
	there := func(s *image.Store) string {
		t.Helper()
		list, err := s.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		out := []string{}
		for _, e := range list {
			used := ""
			if e.InUse {
				used = "*"
			}
			n := slices.IndexFunc(imgs, func(i image.Image) bool { return i.SHA256 == e.Image.SHA256 })
			out = append(out, fmt.Sprintf("%d%s%s", n, e.State, used))
		}
		return strings.Join(out, " ")
	}
	// The oldest is in use, so the second had to go.
	if got := there(s); got != "2ready 0ready*" {
		t.Errorf("in the store: %s", got)
	}
	if _, err := s.Pin(t.Context(), imgs[1]); !errors.Is(err, image.ErrNotFound) {
		t.Errorf("pinned what is not there: %v", err)
	}
	if pin, err := s.Pin(t.Context(), imgs[2]); err != nil {
		t.Error(err)
	} else if err := errors.Join(pin.Release(), pin.Release()); err != nil {
		t.Error(err)
	}
	aged := open(t, dir, image.Options{MaxAge: time.Nanosecond})
	user.kill() // and its pin goes
	if err := aged.Evict(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := names(t, dir); len(got) > 0 {
		t.Errorf("left %q", got)
	}
}

// TestDamage is found by verify, or at a glance where size or time give it away,
// and mended.
func TestDamage(t *testing.T) {
	t.Parallel()
	srv := serve(t, content(200_000))
	dir := t.TempDir()
	s := open(t, dir, image.Options{})
	img := srv.image()
	if err := s.Verify(t.Context(), img, nil); !errors.Is(err, image.ErrNotFound) {
		t.Errorf("verified what is not there: %v", err)
	}
	pin := ensure(t, s, img)
	path := pin.Path()
	state := func() image.State {
		t.Helper()
		list, err := s.List(t.Context())
		if err != nil || len(list) != 1 {
			t.Fatal(list, err)
		}
		return list[0].State
	}
	// As a backup may restore it: another time, the same content.
	if err := os.Chtimes(path, time.Now(), time.Now()); err != nil {
		t.Fatal(err)
	}
	if got := state(); got != image.Damaged {
		t.Errorf("state %s, want that it looks damaged", got)
	}
	again := ensure(t, s, img)
	if n := len(srv.requests()); n != 1 || state() != image.Ready {
		t.Errorf("%d downloads and %s, want that it is found good", n, state())
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	// A bit that has changed where nobody looks.
	bad := bytes.Clone(srv.body)
	bad[100_000] ^= 1
	if err := errors.Join(os.Chmod(path, 0o600), os.WriteFile(path, bad, 0o600), os.Chmod(path, 0o444), os.Chtimes(path, info.ModTime(), info.ModTime())); err != nil {
		t.Fatal(err)
	}
	if state() != image.Ready {
		t.Error("a glance saw a bit")
	}
	if err := s.Verify(t.Context(), img, nil); !errors.Is(err, image.ErrCorrupt) || state() != image.Damaged {
		t.Errorf("verified a damaged image: %v, %s", err, state())
	}
	// It is not replaced while somebody uses it.
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := s.Ensure(ctx, img, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a damaged image in use: %v", err)
	}
	if err := errors.Join(pin.Release(), again.Release()); err != nil {
		t.Fatal(err)
	}
	holds(t, ensure(t, s, img).Path(), srv.body)
	if err := s.Verify(t.Context(), img, nil); err != nil {
		t.Error(err)
	}
	if n := len(srv.requests()); n != 2 {
		t.Errorf("%d downloads, want a second one", n)
	}
}

// TestTLS: a certificate that is not trusted is not tried again.
func TestTLS(t *testing.T) {
	t.Parallel()
	body := content(1000)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(body) }))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	img := image.Image{Label: "test", Source: srv.URL, SHA256: sum(body), Format: image.Raw}
	dir := t.TempDir()
	_, err := open(t, dir, image.Options{}).Ensure(t.Context(), img, nil)
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); !ok || strings.Contains(err.Error(), "attempts") || len(names(t, dir)) > 0 {
		t.Errorf("error %v, left %q", err, names(t, dir))
	}
	trusting := &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS13}
	trusting.RootCAs.AddCert(srv.Certificate())
	holds(t, ensure(t, open(t, dir, image.Options{TLS: trusting}), img).Path(), body)
}

// TestNoProxy: the environment says nothing to a store.
func TestNoProxy(t *testing.T) {
	for _, name := range []string{"HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"} {
		t.Setenv(name, "http://127.0.0.1:1")
	}
	img := image.Image{Label: "test", Source: "http://image.invalid/x", SHA256: sum([]byte("x")), Format: image.Raw}
	_, err := open(t, t.TempDir(), image.Options{Attempts: 1}).Ensure(t.Context(), img, nil)
	if _, ok := errors.AsType[*net.DNSError](err); !ok {
		t.Errorf("error %v, want that the name does not resolve", err)
	}
}

// TestRemoveRace: while some remove an image and its lock, whoever has it pinned
// has it whole.
func TestRemoveRace(t *testing.T) {
	t.Parallel()
	body := content(10_000)
	img := image.Image{Label: "test", Source: write(t, "x", body), SHA256: sum(body), Format: image.Raw}
	dir := t.TempDir()
	var removed atomic.Int64
	done := make(chan struct{})
	var users, removers sync.WaitGroup
	for range 2 {
		s := open(t, dir, image.Options{}) // as another process has it
		removers.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				err := s.Remove(t.Context(), img)
				switch {
				case err == nil:
					removed.Add(1)
				case !errors.Is(err, image.ErrInUse) && !errors.Is(err, image.ErrNotFound):
					t.Error(err)
				}
			}
		})
	}
	for range 3 {
		s := open(t, dir, image.Options{})
		users.Go(func() {
			for range 20 {
				pin, err := s.Ensure(t.Context(), img, nil)
				if err != nil {
					t.Error(err)
					return
				}
				if got, err := os.ReadFile(pin.Path()); err != nil || !bytes.Equal(got, body) {
					t.Errorf("pinned, there are %d bytes and %v", len(got), err)
				}
				if err := pin.Release(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	users.Wait()
	close(done)
	removers.Wait()
	if removed.Load() == 0 {
		t.Error("nothing was ever removed: there was no race")
	}
}
