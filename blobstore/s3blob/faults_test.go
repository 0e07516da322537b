package s3blob

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

// gateway stands in front of the real server and makes faults. It forwards what
// fault, which gets the number of the request among those of its kind, does not
// answer.
type gateway struct {
	upstream *url.URL
	forward  *httputil.ReverseProxy
	over     chan struct{} // the test is

	mu    sync.Mutex
	count map[string]int
	fault func(w http.ResponseWriter, r *http.Request, n int) (handled bool)
}

// newGateway returns one in front of a fresh bucket, and options for it.
func newGateway(t *testing.T) (*gateway, Options) {
	b := testenv.S3(t)
	upstream, err := url.Parse(b.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	g := &gateway{upstream: upstream, over: make(chan struct{}), count: map[string]int{}}
	g.forward = &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", upstream.Host }, // and the Host that was signed
		Transport: transport, ErrorLog: log.New(io.Discard, "", 0),
	}
	server := httptest.NewServer(g)
	t.Cleanup(func() {
		close(g.over)
		server.Close()
		transport.CloseIdleConnections()
	})
	o := optionsFor(b)
	o.Endpoint, o.PartSize, o.Attempts, o.StallTimeout = server.URL, minPart, 4, 5*time.Second
	return g, o
}

// kind names a request as S3 does.
func kind(r *http.Request) string {
	q := r.URL.Query()
	switch {
	case r.Method == http.MethodPost && q.Has("uploads"):
		return "CreateMultipartUpload"
	case r.Method == http.MethodPost && q.Has("uploadId"):
		return "CompleteMultipartUpload"
	case r.Method == http.MethodPut && q.Has("uploadId"):
		return "UploadPart"
	case r.Method == http.MethodDelete && q.Has("uploadId"):
		return "AbortMultipartUpload"
	case r.Method == http.MethodGet && q.Has("uploads"):
		return "ListMultipartUploads"
	case r.Method == http.MethodGet && q.Has("list-type"):
		return "ListObjectsV2"
	default:
		return map[string]string{"PUT": "PutObject", "GET": "GetObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"}[r.Method]
	}
}

func (g *gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	g.mu.Lock()
	g.count[kind(r)]++
	n, fault := g.count[kind(r)], g.fault
	g.mu.Unlock()
	if fault == nil || !fault(w, r, n) {
		g.forward.ServeHTTP(w, r)
	}
}

// inject sets the fault of one kind of request ("" means of all).
func (g *gateway) inject(of string, fault func(w http.ResponseWriter, r *http.Request, n int) bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	clear(g.count)
	g.fault = func(w http.ResponseWriter, r *http.Request, n int) bool {
		return (of == "" || kind(r) == of) && fault(w, r, n)
	}
}

func (g *gateway) heal() {
	g.inject("", func(http.ResponseWriter, *http.Request, int) bool { return false })
}

func (g *gateway) seen(kind string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.count[kind]
}

// refuse answers as S3 does.
func refuse(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	fmt.Fprintf(w, "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>%s</Code><Message>made by the test</Message><RequestId>1</RequestId></Error>", code)
}

// cut breaks the client's connection.
func cut(w http.ResponseWriter) {
	if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
		conn.Close()
	}
}

// hang keeps the connection open and says nothing, until the client has gone.
func (g *gateway) hang(r *http.Request) {
	select {
	case <-r.Context().Done():
	case <-g.over:
	}
}

// lost lets a request have its effect and loses the answer.
func (g *gateway) lost(w http.ResponseWriter, r *http.Request) {
	g.forward.ServeHTTP(httptest.NewRecorder(), r)
	cut(w)
}

// noise is made once; the tests read its beginnings.
var noise = sync.OnceValue(func() []byte {
	p := make([]byte, 4*large)
	_, _ = rand.NewChaCha8([32]byte{7}).Read(p)
	return p
})

// content is a reader without a length.
func content(size int) io.Reader { return struct{ io.Reader }{bytes.NewReader(noise()[:size])} }

const (
	small = 1000
	large = 2*minPart + 1000
)

func has(t *testing.T, s *Store, key string, size int) {
	t.Helper()
	r, info, err := s.Get(t.Context(), key, blobstore.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	got, err := io.ReadAll(r)
	if err != nil || info.Size != int64(size) || !bytes.Equal(got, noise()[:size]) {
		t.Fatalf("%s: %d bytes (%d are said), error %v, want %d", key, len(got), info.Size, err, size)
	}
}

func hasNot(t *testing.T, s *Store, key string) {
	t.Helper()
	if info, err := s.Stat(t.Context(), key); !errors.Is(err, blobstore.ErrNotFound) {
		t.Fatalf("%s is there: %+v, error %v", key, info, err)
	}
	if left := uploads(t, s); len(left) > 0 {
		t.Fatalf("left: %q", left)
	}
}

// TestFaultsThatPass: a Put gets over a fault that comes once, and fails cleanly
// by one that stays.
func TestFaultsThatPass(t *testing.T) {
	g, o := newGateway(t)
	s := open(t, o)
	o.StallTimeout, o.Attempts = time.Second, 2
	hasty := open(t, o)
	half := func(r *http.Request) { _, _ = io.CopyN(io.Discard, r.Body, r.ContentLength/2) }
	for _, f := range []struct {
		name, of string
		size     int
		fault    func(w http.ResponseWriter, r *http.Request)
		want     error
	}{
		{"SlowDown", "PutObject", small, func(w http.ResponseWriter, _ *http.Request) { refuse(w, 503, "SlowDown") }, ErrThrottled},
		{"SlowDown when it begins", "CreateMultipartUpload", large, func(w http.ResponseWriter, _ *http.Request) { refuse(w, 503, "SlowDown") }, ErrThrottled},
		{"SlowDown for parts", "UploadPart", large, func(w http.ResponseWriter, _ *http.Request) { refuse(w, 503, "SlowDown") }, ErrThrottled},
		{"SlowDown at the end", "CompleteMultipartUpload", large, func(w http.ResponseWriter, _ *http.Request) { refuse(w, 503, "SlowDown") }, ErrThrottled},
		{"a status alone", "PutObject", small, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTooManyRequests) }, ErrThrottled},
		{"an error of the server", "UploadPart", large, func(w http.ResponseWriter, _ *http.Request) { refuse(w, 500, "InternalError") }, nil},
		{"a proxy's error page", "PutObject", small, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "<html>", http.StatusBadGateway) }, nil},
		{"an error inside a 200", "CompleteMultipartUpload", large, func(w http.ResponseWriter, _ *http.Request) { refuse(w, 200, "InternalError") }, nil},
		{"a 200 cut short", "CompleteMultipartUpload", large, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			_, _ = io.WriteString(w, "<?xml")
			http.NewResponseController(w).Flush()
			cut(w)
		}, nil},
		{"damage", "PutObject", small, func(w http.ResponseWriter, _ *http.Request) { refuse(w, 400, "XAmzContentSHA256Mismatch") }, blobstore.ErrChecksum},
		{"cut in an object", "PutObject", small, func(w http.ResponseWriter, r *http.Request) { half(r); cut(w) }, ErrUnreachable},
		{"cut in a part", "UploadPart", large, func(w http.ResponseWriter, r *http.Request) { half(r); cut(w) }, ErrUnreachable},
		{"stall in a part", "UploadPart", large, func(_ http.ResponseWriter, r *http.Request) { half(r); g.hang(r) }, ErrUnreachable},
		{"stall before the answer", "PutObject", small, func(_ http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			g.hang(r)
		}, ErrUnreachable},
		{"full", "PutObject", small, func(w http.ResponseWriter, _ *http.Request) { refuse(w, 507, "XMinioStorageFull") }, blobstore.ErrNoSpace},
	} {
		t.Run(f.name, func(t *testing.T) {
			g.inject(f.of, func(w http.ResponseWriter, r *http.Request, _ int) bool { f.fault(w, r); return true })
			_, err := hasty.Put(t.Context(), "k", content(f.size), blobstore.PutOptions{})
			if err == nil || f.want != nil && !errors.Is(err, f.want) {
				t.Fatalf("while it lasts: error %v, want %v", err, f.want)
			}
			if g.seen(f.of) == 0 {
				t.Fatalf("no %s was seen", f.of)
			}
			g.heal()
			hasNot(t, s, "k")

			if errors.Is(f.want, blobstore.ErrNoSpace) {
				return // is not waited for
			}
			g.inject(f.of, func(w http.ResponseWriter, r *http.Request, n int) bool {
				if n == 2 || f.of != "UploadPart" && n == 1 {
					f.fault(w, r)
					return true
				}
				return false
			})
			if _, err := s.Put(t.Context(), "k", content(f.size), blobstore.PutOptions{}); err != nil {
				t.Fatalf("when it passes: %v", err)
			}
			g.heal()
			has(t, s, "k", f.size)
			if left := uploads(t, s); len(left) > 0 {
				t.Fatalf("left: %q", left)
			}
			if err := s.Delete(t.Context(), "k", blobstore.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestRefusedInside200: a service that began its answer before it knew says
// no all the same.
func TestRefusedInside200(t *testing.T) {
	g, o := newGateway(t)
	s := open(t, o)
	g.inject("CompleteMultipartUpload", func(w http.ResponseWriter, _ *http.Request, _ int) bool {
		refuse(w, 200, "PreconditionFailed")
		return true
	})
	_, err := s.Put(t.Context(), "k", content(large), blobstore.PutOptions{IfAbsent: true})
	if n := g.seen("CompleteMultipartUpload"); !errors.Is(err, blobstore.ErrExists) || n != 1 {
		t.Fatalf("error %v after %d requests", err, n)
	}
	g.heal()
	hasNot(t, s, "k")
}

// TestThrottledReads: the other operations get over it, too.
func TestThrottledReads(t *testing.T) {
	g, o := newGateway(t)
	s := open(t, o)
	if _, err := s.Put(t.Context(), "k", content(small), blobstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	throttle := func() {
		g.inject("", func(w http.ResponseWriter, _ *http.Request, n int) bool {
			if n > 2 {
				return false
			}
			refuse(w, 503, "SlowDown")
			return true
		})
	}
	throttle()
	has(t, s, "k", small)
	throttle()
	if _, err := s.Stat(t.Context(), "k"); err != nil {
		t.Error(err)
	}
	throttle()
	n := 0
	for _, err := range s.List(t.Context(), blobstore.ListOptions{}) {
		if n++; err != nil {
			t.Error(err)
		}
	}
	if n != 1 {
		t.Errorf("%d objects are listed", n)
	}
	throttle()
	if _, err := s.Sweep(t.Context(), time.Hour); err != nil {
		t.Error(err)
	}
	throttle()
	if err := s.Check(t.Context()); err != nil {
		t.Error(err)
	}
	throttle()
	if err := s.Delete(t.Context(), "k", blobstore.DeleteOptions{}); err != nil {
		t.Error(err)
	}
}

// TestBackoffHonoursContext: a server that asks for an hour of patience does not
// get it.
func TestBackoffHonoursContext(t *testing.T) {
	g, o := newGateway(t)
	s := open(t, o)
	ctx, cancel := context.WithCancel(t.Context())
	g.inject("PutObject", func(w http.ResponseWriter, _ *http.Request, _ int) bool {
		w.Header().Set("Retry-After", "3600")
		refuse(w, 503, "SlowDown")
		time.AfterFunc(10*time.Millisecond, cancel)
		return true
	})
	if _, err := s.Put(ctx, "k", content(small), blobstore.PutOptions{}); !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
	if n := g.seen("PutObject"); n != 1 {
		t.Fatalf("%d requests", n)
	}
}

// TestLostAnswers: what was stored is known to be stored, also where a repeat of
// the request is refused for that very reason.
func TestLostAnswers(t *testing.T) {
	g, o := newGateway(t)
	s := open(t, o)
	for _, c := range []struct {
		of   string
		size int
	}{{"PutObject", small}, {"CompleteMultipartUpload", large}} {
		for _, ifAbsent := range []bool{false, true} {
			key := fmt.Sprintf("%s/%t", c.of, ifAbsent)
			g.inject(c.of, func(w http.ResponseWriter, r *http.Request, n int) bool {
				if n == 1 {
					g.lost(w, r)
				}
				return n == 1
			})
			info, err := s.Put(t.Context(), key, content(c.size), blobstore.PutOptions{IfAbsent: ifAbsent, ContentType: "text/plain"})
			if err != nil || info.Size != int64(c.size) || info.Key != key || info.ContentType != "text/plain" || g.seen(c.of) < 2 {
				t.Fatalf("%s: %+v, error %v, %d requests", key, info, err, g.seen(c.of))
			}
			g.heal()
			has(t, s, key, c.size)

			// Somebody else's is told apart from one's own.
			g.inject(c.of, func(w http.ResponseWriter, r *http.Request, n int) bool {
				if n == 1 {
					g.lost(w, r)
				}
				return n == 1
			})
			_, err = s.Put(t.Context(), key, strings.NewReader(strings.Repeat("x", c.size)), blobstore.PutOptions{IfAbsent: true})
			if !errors.Is(err, blobstore.ErrExists) {
				t.Fatalf("%s over an object: error %v", key, err)
			}
			g.heal()
			has(t, s, key, c.size)
		}
	}
	if left := uploads(t, s); len(left) > 0 {
		t.Fatalf("left: %q", left)
	}
}

// TestOrphans: an upload that cannot be aborted stays invisible, and a sweep
// removes it; those of other programs stay.
func TestOrphans(t *testing.T) {
	g, o := newGateway(t)
	o.Prefix = "ours"
	s := open(t, o)
	for _, foreign := range []string{"ours/made by hand", "elsewhere/k!"} {
		if _, err := s.s3.NewMultipartUpload(t.Context(), o.Bucket, foreign, minio.PutObjectOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	g.inject("", func(w http.ResponseWriter, r *http.Request, n int) bool {
		if k := kind(r); k != "AbortMultipartUpload" && (k != "UploadPart" || n < 3) {
			return false
		}
		refuse(w, 503, "SlowDown")
		return true
	})
	if _, err := s.Put(t.Context(), "k", content(large), blobstore.PutOptions{}); !errors.Is(err, ErrThrottled) {
		t.Fatalf("error %v", err)
	}
	g.heal()
	if _, err := s.Stat(t.Context(), "k"); !errors.Is(err, blobstore.ErrNotFound) {
		t.Fatalf("half an object is there: %v", err)
	}
	if left := uploads(t, s); len(left) != 3 {
		t.Fatalf("left: %q", left)
	}
	if n, err := s.Sweep(t.Context(), 0); err != nil || n != 1 {
		t.Fatalf("Sweep removed %d, error %v", n, err)
	}
	if left := uploads(t, s); len(left) != 2 {
		t.Fatalf("left: %q", left)
	}
}

// TestBrokenReads: a reader goes on where its connection broke, gives no bytes
// twice or of another object, and gives up when nothing comes any more.
func TestBrokenReads(t *testing.T) {
	g, o := newGateway(t)
	o.StallTimeout, o.VerifyReads = time.Second, true
	s := open(t, o)
	const size = 2 << 20
	data := noise()[:size]
	if _, err := s.Put(t.Context(), "k", bytes.NewReader(data), blobstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	// After some bytes each connection does end.
	part := func(end func(w http.ResponseWriter, r *http.Request)) func(w http.ResponseWriter, r *http.Request, n int) bool {
		return func(w http.ResponseWriter, r *http.Request, n int) bool {
			rec := httptest.NewRecorder()
			g.forward.ServeHTTP(rec, r)
			for k, v := range rec.Header() {
				w.Header()[k] = v
			}
			w.WriteHeader(rec.Code)
			body := rec.Body.Bytes()
			if len(body) <= 300_000 || n == 20 {
				_, _ = w.Write(body)
				return true
			}
			_, _ = w.Write(body[:300_000])
			_ = http.NewResponseController(w).Flush()
			end(w, r)
			return true
		}
	}
	cutting := func(w http.ResponseWriter, _ *http.Request) { cut(w) }
	g.inject("GetObject", part(cutting))
	has(t, s, "k", size)
	if n := g.seen("GetObject"); n < 6 {
		t.Fatalf("%d requests", n)
	}
	g.inject("GetObject", part(cutting))
	r, _, err := s.Get(t.Context(), "k", blobstore.GetOptions{Offset: 1000, Length: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(got, data[1000:1000+1<<20]) {
		t.Fatalf("a range in pieces: %d bytes, error %v", len(got), err)
	}
	r.Close()
	g.inject("GetObject", part(func(_ http.ResponseWriter, r *http.Request) { g.hang(r) }))
	has(t, s, "k", size)

	// Nothing comes any more.
	g.inject("GetObject", func(w http.ResponseWriter, r *http.Request, n int) bool {
		if n > 1 {
			cut(w)
			return true
		}
		return part(cutting)(w, r, n)
	})
	if r, _, err = s.Get(t.Context(), "k", blobstore.GetOptions{}); err != nil {
		t.Fatal(err)
	}
	if got, err = io.ReadAll(r); !errors.Is(err, ErrUnreachable) || !bytes.HasPrefix(data, got) {
		t.Fatalf("a connection that is gone: %d bytes, error %v", len(got), err)
	}
	r.Close()

	// The object is replaced between two connections.
	g.inject("GetObject", part(cutting))
	if r, _, err = s.Get(t.Context(), "k", blobstore.GetOptions{}); err != nil {
		t.Fatal(err)
	}
	head := make([]byte, 1000)
	if _, err := io.ReadFull(r, head); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(t.Context(), "k", strings.NewReader(strings.Repeat("x", size)), blobstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(r)
	if !errors.Is(err, io.ErrUnexpectedEOF) || !bytes.HasPrefix(data, append(head, rest...)) {
		t.Fatalf("an object that was replaced: %d bytes, error %v", len(rest), err)
	}
	r.Close()
}

// TestDamageIsNoticed: bytes that changed at rest or on their way.
func TestDamageIsNoticed(t *testing.T) {
	g, o := newGateway(t)
	o.VerifyReads = true
	s := open(t, o)
	if _, err := s.Put(t.Context(), "k", content(small), blobstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	g.inject("GetObject", func(w http.ResponseWriter, r *http.Request, _ int) bool {
		rec := httptest.NewRecorder()
		g.forward.ServeHTTP(rec, r)
		for k, v := range rec.Header() {
			w.Header()[k] = v
		}
		body := rec.Body.Bytes()
		body[small/2] ^= 1
		_, _ = w.Write(body)
		return true
	})
	r, _, err := s.Get(t.Context(), "k", blobstore.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.Copy(io.Discard, r); !errors.Is(err, blobstore.ErrChecksum) {
		t.Fatalf("error %v", err)
	}
}

// private is a store on a server of the test's own.
func private(t *testing.T, change func(*Options)) (*testenv.S3Server, *Store) {
	server := testenv.StartS3(t)
	o := optionsFor(server.Bucket(t))
	o.PartSize = minPart
	change(&o)
	return server, open(t, o)
}

// midway calls f when half of the content has been read.
func midway(size int, f func()) io.Reader {
	return io.MultiReader(content(size/2), &first{f: f}, bytes.NewReader(noise()[size/2:size]))
}

type first struct{ f func() }

func (f *first) Read([]byte) (int, error) { f.f(); return 0, io.EOF }

// TestReaderFailsUnderParts: what is under way is given up, not waited for.
func TestReaderFailsUnderParts(t *testing.T) {
	g, o := newGateway(t)
	o.StallTimeout = time.Hour
	s := open(t, o)
	stuck := make(chan struct{})
	g.inject("UploadPart", func(_ http.ResponseWriter, r *http.Request, n int) bool {
		if n == 1 {
			close(stuck)
		}
		g.hang(r)
		return true
	})
	boom := errors.New("boom")
	r := io.MultiReader(content(large), readerFunc(func([]byte) (int, error) { <-stuck; return 0, boom }))
	if _, err := s.Put(t.Context(), "k", r, blobstore.PutOptions{}); !errors.Is(err, boom) {
		t.Errorf("error %v", err)
	}
	g.heal()
	hasNot(t, s, "k")
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// TestServerKilled in the middle of a Put: it fails, or succeeds with a server
// that comes back in time; nothing half is seen.
func TestServerKilled(t *testing.T) {
	server, s := private(t, func(o *Options) { o.Attempts = 2 })
	if _, err := s.Put(t.Context(), "old", content(large), blobstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"new", "old"} {
		_, err := s.Put(t.Context(), key, midway(4*large, func() { server.Kill(t) }), blobstore.PutOptions{})
		if !errors.Is(err, ErrRefused) && !errors.Is(err, ErrUnreachable) {
			t.Fatalf("error %v", err)
		}
		if err := s.Check(t.Context()); !errors.Is(err, ErrRefused) {
			t.Fatalf("Check of a server that is gone: %v", err)
		}
		server.Start(t)
		if err := s.Check(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	has(t, s, "old", large)
	if _, err := s.Sweep(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	hasNot(t, s, "new")
	s.Close()

	patient := s.o
	patient.Attempts = 20
	s = open(t, patient)
	if _, err := s.Put(t.Context(), "new", midway(4*large, func() { server.Kill(t); server.Start(t) }), blobstore.PutOptions{}); err != nil {
		t.Fatalf("with a server that comes back: %v", err)
	}
	has(t, s, "new", 4*large)
}

// TestServerStopped (SIGSTOP): every call ends with its context, and afterwards
// all is as before.
func TestServerStopped(t *testing.T) {
	server, s := private(t, func(*Options) {})
	if _, err := s.Put(t.Context(), "k", content(large), blobstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	r, _, err := s.Get(t.Context(), "k", blobstore.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	for name, call := range map[string]func(ctx context.Context) error{
		"Put": func(ctx context.Context) error {
			_, err := s.Put(ctx, "new", content(small), blobstore.PutOptions{})
			return err
		},
		"large Put": func(ctx context.Context) error {
			_, err := s.Put(ctx, "new", content(large), blobstore.PutOptions{})
			return err
		},
		"Get": func(ctx context.Context) error {
			_, _, err := s.Get(ctx, "k", blobstore.GetOptions{})
			return err
		},
		"Stat":   func(ctx context.Context) error { _, err := s.Stat(ctx, "k"); return err },
		"Delete": func(ctx context.Context) error { return s.Delete(ctx, "k", blobstore.DeleteOptions{}) },
		"List": func(ctx context.Context) error {
			var err error
			for _, err = range s.List(ctx, blobstore.ListOptions{}) {
			}
			return err
		},
		"Sweep": func(ctx context.Context) error { _, err := s.Sweep(ctx, 0); return err },
		"Check": s.Check,
	} {
		server.Pause(t)
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		if err := call(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
		server.Resume(t)
		if name == "Delete" { // may have come through
			if _, err := s.Put(t.Context(), "k", content(large), blobstore.PutOptions{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	// In the middle of a Put, whose parts cannot be aborted then.
	ctx, cancel := context.WithCancel(t.Context())
	_, err = s.Put(ctx, "half", midway(4*large, func() { server.Pause(t); time.AfterFunc(100*time.Millisecond, cancel) }), blobstore.PutOptions{})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Put that is cancelled while the server stands still: %v", err)
	}
	server.Resume(t)
	s.calls.Wait() // the abort goes on by itself
	// What was asked for when the server stood still came about later.
	if _, err := s.Sweep(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	hasNot(t, s, "half")
	has(t, s, "k", large)
}

// TestCloseEndsCalls that wait for the server, and readers.
func TestCloseEndsCalls(t *testing.T) {
	g, o := newGateway(t)
	s := open(t, o)
	if _, err := s.Put(t.Context(), "k", content(large), blobstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	r, _, err := s.Get(t.Context(), "k", blobstore.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	asked := make(chan struct{})
	g.inject("HeadObject", func(_ http.ResponseWriter, r *http.Request, _ int) bool {
		close(asked)
		g.hang(r)
		return true
	})
	failed := make(chan error, 1)
	go func() { _, err := s.Stat(t.Context(), "k"); failed <- err }()
	<-asked
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-failed; !errors.Is(err, blobstore.ErrClosed) {
		t.Fatalf("a call under way at Close: %v", err)
	}
	if _, err := io.Copy(io.Discard, r); !errors.Is(err, blobstore.ErrClosed) {
		t.Fatalf("a reader open at Close: %v", err)
	}
}

// TestNetwork: connections that break again and again, a slow line, and a
// network that is away for a while.
func TestNetwork(t *testing.T) {
	b := testenv.S3(t)
	proxy := testenv.NewProxy(t, strings.TrimPrefix(b.Endpoint, "http://"))
	o := optionsFor(b)
	o.Endpoint, o.PartSize, o.Attempts, o.StallTimeout = "http://"+proxy.Addr(), minPart, 20, 5*time.Second
	s := open(t, o)
	put := func(key string, r io.Reader) {
		t.Helper()
		if _, err := s.Put(t.Context(), key, r, blobstore.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		has(t, s, key, large)
	}
	remove := proxy.Add(t, "limit_data", testenv.ToServer, map[string]any{"bytes": minPart + 100_000})
	put("limited", content(large))
	remove()
	remove = proxy.Add(t, "bandwidth", testenv.ToServer, map[string]any{"rate": 20_000})
	put("slow", content(large))
	remove()
	put("away", midway(large, func() {
		proxy.Cut()
		time.AfterFunc(300*time.Millisecond, func() { proxy.Restore(t) })
	}))

	o.Attempts, o.StallTimeout = 2, 2*time.Second
	hasty := open(t, o)
	remove = proxy.Add(t, "timeout", testenv.ToServer, map[string]any{"timeout": 0})
	if _, err := hasty.Put(t.Context(), "stalled", content(large), blobstore.PutOptions{}); !errors.Is(err, ErrUnreachable) {
		t.Fatalf("a network that stands still: %v", err)
	}
	remove()
	if _, err := hasty.Sweep(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	hasNot(t, hasty, "stalled")
}
