package image_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider/image"
)

// patience bounds every wait for a condition; it only ends what hangs.
const patience = time.Minute

// TestMain can be another process that works on a store: "pull DIR SOURCE SHA256"
// pins the image until its standard input ends.
func TestMain(m *testing.M) {
	if len(os.Args) == 5 && os.Args[1] == "pull" {
		if err := pull(os.Args[2], os.Args[3], os.Args[4]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func pull(dir, source, sum string) error {
	s, err := image.Open(dir, image.Options{})
	if err != nil {
		return err
	}
	img := image.Image{Label: "test", Source: source, SHA256: sum, Format: image.Raw}
	pin, err := s.Ensure(context.Background(), img, func(p image.Progress) { fmt.Println(p.Phase, p.Done, p.Total) })
	if err != nil {
		return err
	}
	fmt.Println("pinned", pin.Path())
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	return pin.Release()
}

// process is another process that pulls.
type process struct {
	t     *testing.T
	cmd   *exec.Cmd
	in    io.Closer
	lines chan string
}

func start(t *testing.T, dir string, img image.Image) *process {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, cmd: exec.CommandContext(t.Context(), exe, "pull", dir, img.Source, img.SHA256), lines: make(chan string, 10_000)}
	in, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.in, p.cmd.Stderr = in, os.Stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for sc := bufio.NewScanner(out); sc.Scan(); {
			p.lines <- sc.Text()
		}
		close(p.lines)
	}()
	t.Cleanup(p.kill)
	return p
}

// says waits for a line that begins so.
func (p *process) says(prefix string) {
	p.t.Helper()
	end := time.After(patience)
	for {
		select {
		case l, ok := <-p.lines:
			if strings.HasPrefix(l, prefix) {
				return
			}
			if !ok {
				p.t.Fatalf("the process ended and never said %q", prefix)
			}
		case <-end:
			p.t.Fatalf("the process does not say %q", prefix)
		}
	}
}

// kill is kill -9.
func (p *process) kill() {
	_ = p.cmd.Process.Kill() // it may have ended
	_ = p.cmd.Wait()
}

func (p *process) end() {
	p.t.Helper()
	_ = p.in.Close()
	for range p.lines { // until its output ends
	}
	if err := p.cmd.Wait(); err != nil {
		p.t.Error(err)
	}
}

// server gives one file, with ranges.
type server struct {
	*httptest.Server
	mu     sync.Mutex
	body   []byte
	etag   string
	hold   chan struct{} // not nil: half of the body, then nothing until it is closed
	ranges []string      // of each request
	before func(w http.ResponseWriter, r *http.Request) bool
}

func serve(t *testing.T, body []byte) *server {
	t.Helper()
	s := &server{body: body, etag: `"one"`}
	s.Server = httptest.NewServer(s)
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return s
}

func (s *server) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.ranges = append(s.ranges, r.Header.Get("Range"))
	body, etag, hold, before := s.body, s.etag, s.hold, s.before
	s.mu.Unlock()
	if before != nil && before(w, r) {
		return
	}
	if etag != "" {
		w.Header().Set("ETag", etag)
	}
	if hold == nil {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
		return
	}
	w.Header().Set("Content-Length", fmt.Sprint(len(body)))
	_, _ = w.Write(body[:len(body)/2])
	_ = http.NewResponseController(w).Flush()
	select {
	case <-hold:
		_, _ = w.Write(body[len(body)/2:])
	case <-r.Context().Done():
	}
}

func (s *server) requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.ranges...)
}

func (s *server) image() image.Image {
	return image.Image{Label: "test", Source: s.URL + "/x.img", SHA256: sum(s.body), Format: image.Raw}
}

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

// content is no zeros, and cannot be compressed.
func content(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n)}).Read(b) // never fails
	return b
}

func open(t *testing.T, dir string, o image.Options) *image.Store {
	t.Helper()
	s, err := image.Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func ensure(t *testing.T, s *image.Store, img image.Image) *image.Pin {
	t.Helper()
	pin, err := s.Ensure(t.Context(), img, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = pin.Release() })
	return pin
}

// fails wants an error of the kind that leaves the files named.
func fails(t *testing.T, s *image.Store, dir string, img image.Image, kind error, left ...string) {
	t.Helper()
	pin, err := s.Ensure(t.Context(), img, nil)
	if err == nil {
		_ = pin.Release()
	}
	if !errors.Is(err, kind) {
		t.Errorf("error %v, want %v", err, kind)
	}
	if got := strings.Join(names(t, dir), " "); got != strings.Join(left, " ") {
		t.Errorf("left %q, want %q", got, left)
	}
}

// names of the files in a store, the hashes left out.
func names(t *testing.T, dir string) []string {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, f := range files {
		_, suffix, _ := strings.Cut(f.Name(), ".")
		out = append(out, suffix)
	}
	return out
}

func holds(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes and %v, want %d bytes of content", len(got), err, len(want))
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != 0o444 {
		t.Errorf("mode %v, want 0444", info.Mode())
	}
}

// until waits for a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it never came that %s", what)
		}
	}
}

func write(t *testing.T, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
