// Package gitserve lets guests read the one repository of their attempt, over
// HTTP, and nothing else:
//
//	GET  /git/<attempt>/info/refs?service=git-upload-pack
//	POST /git/<attempt>/git-upload-pack
//	GET  /git/<attempt>.tar
//
// The first two are git's smart protocol, versions 0 to 2 (see
// gitprotocol-http(5)); any commit can be fetched by name, also at depth 1. The
// third is the commit's tree for guests without git. Repositories on this
// machine are served by git upload-pack, those of a forge are passed through
// with the credentials added here, so that a guest holds none.
//
// Whatever is not exactly one of these requests, or not authorised, is a plain
// 404; the log has the reason. A failure to serve is a plain 502, or 503 where a
// retry may help.
package gitserve

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// Source is what an attempt may read.
type Source struct {
	Clone  forge.Clone
	Commit string // full object name; what the tar holds
}

// AuthorizeFunc gives what the request may read, by the credential in it. An
// error is a refusal; one that wraps ErrUnavailable or forge.ErrUnavailable asks
// the guest to come back.
type AuthorizeFunc func(ctx context.Context, r *http.Request, attempt string) (Source, error)

// ErrUnavailable: who may read what cannot be told now.
var ErrUnavailable = errors.New("gitserve: unavailable")

// Config configures a Handler; Git and Authorize are required.
type Config struct {
	Git       *gitcmd.Git
	Authorize AuthorizeFunc
	// Transport reaches forges; nil: one without a proxy. Redirects are never
	// followed, whatever it does.
	Transport http.RoundTripper
	// TempDir holds a repository while the tar of a forge's commit is made;
	// empty: the system's directory for temporary files.
	TempDir string
	// MaxRequestBytes bounds a request's body, also when it is unpacked;
	// 0: 32 MiB. Bodies name commits, 50 bytes each.
	MaxRequestBytes int64
	// MaxConcurrent bounds the requests that are served at once, others wait;
	// 0: 16.
	MaxConcurrent int
	// MaxPerAttempt bounds those of one attempt, waiting or served; more are
	// refused, so that no guest takes all places; 0: 4.
	MaxPerAttempt int
	// Timeout bounds one request, waiting included; 0: 30 minutes.
	Timeout time.Duration
	// Stall is how long a guest may take to accept what it is sent next, at
	// most some 32 KiB; 0: 1 minute.
	Stall  time.Duration
	Logger *slog.Logger // nil: discards
}

// Handler serves guests; see the package comment.
type Handler struct {
	c     Config
	slots *semaphore.Weighted

	mu   sync.Mutex
	busy map[string]int // requests by attempt
}

// New checks the configuration.
func New(c Config) (*Handler, error) {
	if c.Git == nil || c.Authorize == nil {
		return nil, errors.New("gitserve: Git and Authorize are required")
	}
	if c.Transport == nil {
		t := http.DefaultTransport.(*http.Transport).Clone()
		t.Proxy = nil // the default asks the environment
		c.Transport = t
	}
	if c.MaxRequestBytes <= 0 {
		c.MaxRequestBytes = 32 << 20
	}
	if c.MaxConcurrent <= 0 {
		c.MaxConcurrent = 16
	}
	if c.MaxPerAttempt <= 0 {
		c.MaxPerAttempt = 4
	}
	if c.Timeout <= 0 {
		c.Timeout = 30 * time.Minute
	}
	if c.Stall <= 0 {
		c.Stall = time.Minute
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return &Handler{c: c, slots: semaphore.NewWeighted(int64(c.MaxConcurrent)), busy: map[string]int{}}, nil
}

// Close releases idle connections to forges.
func (h *Handler) Close() {
	if t, ok := h.c.Transport.(interface{ CloseIdleConnections() }); ok {
		t.CloseIdleConnections()
	}
}

const (
	uploadPack          = "git-upload-pack"
	requestType         = "application/x-git-upload-pack-request"
	resultType          = "application/x-git-upload-pack-result"
	advertisementType   = "application/x-git-upload-pack-advertisement"
	maxAttempt          = 64
	advertisementsQuery = "service=" + uploadPack
)

type action int

const (
	deny action = iota
	advertise
	upload
	archive
)

// route recognises the requests that are served, by their exact spelling: a
// path that would change by decoding or cleaning is none of them.
func route(method string, u *url.URL) (attempt string, a action) {
	if u.RawPath != "" || u.EscapedPath() != u.Path {
		return "", deny
	}
	rest, ok := strings.CutPrefix(u.Path, "/git/")
	if !ok {
		return "", deny
	}
	if name, ok := strings.CutSuffix(rest, ".tar"); ok {
		attempt, a = name, archive
		ok = method == http.MethodGet && u.RawQuery == ""
		if !ok {
			return "", deny
		}
	} else {
		attempt, rest, _ = strings.Cut(rest, "/")
		switch {
		case method == http.MethodGet && rest == "info/refs" && u.RawQuery == advertisementsQuery:
			a = advertise
		case method == http.MethodPost && rest == uploadPack && u.RawQuery == "":
			a = upload
		default:
			return "", deny
		}
	}
	if !validAttempt(attempt) {
		return "", deny
	}
	return attempt, a
}

func validAttempt(s string) bool {
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return false
		}
	}
	return s != "" && len(s) <= maxAttempt
}

// enter takes a place for a request of an attempt, if it has one left.
func (h *Handler) enter(attempt string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.busy[attempt] >= h.c.MaxPerAttempt {
		return false
	}
	h.busy[attempt]++
	return true
}

func (h *Handler) leave(attempt string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.busy[attempt]--; h.busy[attempt] == 0 {
		delete(h.busy, attempt)
	}
}

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	out := &response{ResponseWriter: w, stall: h.c.Stall}
	defer out.patience(h.c.Stall) // the server sends the end of the answer
	attempt, a := route(r.Method, r.URL)
	if a == deny {
		h.c.Logger.DebugContext(r.Context(), "git request refused", "method", r.Method, "path", clip(r.URL.Path))
		http.Error(w, "not found", http.StatusNotFound)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), h.c.Timeout)
	defer cancel()
	log := h.c.Logger.With("attempt", attempt, "request", a.String())
	src, err := h.c.Authorize(ctx, r, attempt)
	if err == nil {
		err = src.check()
	}
	if err != nil {
		code := http.StatusNotFound
		if errors.Is(err, ErrUnavailable) || errors.Is(err, forge.ErrUnavailable) {
			code = http.StatusServiceUnavailable
		}
		log.WarnContext(ctx, "git request not authorised", "error", err)
		plain(w, code)
		return
	}
	if !h.enter(attempt) {
		log.WarnContext(ctx, "git request refused: the attempt has too many")
		plain(w, http.StatusServiceUnavailable)
		return
	}
	defer h.leave(attempt)
	if err := h.slots.Acquire(ctx, 1); err != nil {
		log.WarnContext(ctx, "git request gave up waiting", "error", err)
		plain(w, http.StatusServiceUnavailable)
		return
	}
	defer h.slots.Release(1)
	switch {
	case a == archive && src.Clone.Dir != "":
		err = h.archive(ctx, out, src.Clone.Dir, src.Commit)
	case a == archive:
		err = h.archiveURL(ctx, out, src)
	case src.Clone.Dir != "":
		err = h.uploadPack(ctx, out, r, a, src.Clone.Dir)
	default:
		err = h.proxy(ctx, out, r, a, src.Clone)
	}
	if err == nil {
		return
	}
	if r.Context().Err() != nil {
		log.InfoContext(ctx, "git request ended by the guest", "error", err)
	} else {
		log.WarnContext(ctx, "git request failed", "error", err)
	}
	if out.begun {
		panic(http.ErrAbortHandler) // what was sent must not look complete
	}
	plain(w, statusOf(err))
}

// errRefused: the request itself is at fault.
var errRefused = errors.New("gitserve: request refused")

func statusOf(err error) int {
	switch {
	case errors.Is(err, errRefused), errors.Is(err, forge.ErrNotFound), errors.Is(err, forge.ErrPermission):
		return http.StatusNotFound
	case errors.Is(err, forge.ErrUnavailable), errors.Is(err, context.DeadlineExceeded):
		return http.StatusServiceUnavailable
	default:
		return http.StatusBadGateway
	}
}

func plain(w http.ResponseWriter, code int) {
	http.Error(w, strings.ToLower(http.StatusText(code)), code)
}

func (s Source) check() error {
	switch {
	case (s.Clone.Dir == "") == (s.Clone.URL == ""):
		return errors.New("gitserve: the source has to be one of directory and URL")
	case s.Clone.Dir != "" && !strings.HasPrefix(s.Clone.Dir, "/"):
		return fmt.Errorf("gitserve: the directory %q is not absolute", s.Clone.Dir)
	case s.Clone.URL != "":
		if err := gitcmd.CheckURL(s.Clone.URL, "https", "http"); err != nil {
			return fmt.Errorf("gitserve: source: %w", err)
		}
	}
	if err := gitcmd.CheckObject(s.Commit); err != nil {
		return fmt.Errorf("gitserve: source: %w", err)
	}
	return nil
}

func (a action) String() string {
	return [...]string{"denied", "advertise", "upload", "archive"}[a]
}

// response knows whether anything was sent, and sends it at once: git waits for
// what stands in a buffer.
type response struct {
	http.ResponseWriter
	begun bool
	stall time.Duration
}

// patience sets for how long the guest may take to accept what is sent next,
// 0: for ever. One that does not take it would keep a place that others wait
// for.
func (w *response) patience(d time.Duration) {
	var end time.Time
	if d > 0 {
		end = time.Now().Add(d)
	}
	// Where there are no deadlines, as in a test's recorder, nobody stalls.
	_ = http.NewResponseController(w.ResponseWriter).SetWriteDeadline(end)
}

func (w *response) Write(p []byte) (int, error) {
	w.begun = true
	w.patience(w.stall)
	n, err := w.ResponseWriter.Write(p)
	if err == nil {
		err = http.NewResponseController(w.ResponseWriter).Flush()
	}
	if err == nil {
		w.patience(0) // git may think for long about what comes next
	}
	return n, err
}

func (w *response) head(contentType string) {
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Cache-Control", "no-cache, max-age=0, must-revalidate")
	w.Header().Set("X-Content-Type-Options", "nosniff")
}

var _ io.Writer = (*response)(nil)

func clip(s string) string {
	if len(s) > 200 {
		return s[:200] + "..."
	}
	return s
}
