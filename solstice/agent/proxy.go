package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// A sourceProxy lets this machine's git fetch one repository from the agent
// endpoint. It listens on the loopback interface and adds TLS and the session
// credential, so that git needs neither, and no secret is in arguments, URLs or
// on disk. It knows the two requests of a fetch and lives as long as one.
type sourceProxy struct {
	url    string
	base   string // path of the repository
	client *http.Client
	server *http.Server
	served sync.WaitGroup

	mu      sync.Mutex
	broken  error
	refused string
}

func startProxy(ctx context.Context, client *http.Client, base string) (*sourceProxy, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		if ln, err = lc.Listen(ctx, "tcp", "[::1]:0"); err != nil {
			return nil, fmt.Errorf("agent: source proxy: %w", err)
		}
	}
	p := &sourceProxy{url: "http://" + ln.Addr().String() + base, base: base, client: client}
	p.server = &http.Server{
		Handler: p, ReadHeaderTimeout: 30 * time.Second, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0),
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	p.served.Go(func() { _ = p.server.Serve(ln) }) // ends with close
	return p, nil
}

func (p *sourceProxy) close() {
	_ = p.server.Close()
	p.served.Wait()
}

// failure is what went wrong between the agent and the endpoint.
func (p *sourceProxy) failure() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.broken
}

// refusal is what the repository's side said against the fetch.
func (p *sourceProxy) refusal() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.refused
}

func (p *sourceProxy) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.broken == nil {
		p.broken = err
	}
}

// ServeHTTP forwards the requests of a fetch.
func (p *sourceProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	rest, ok := strings.CutPrefix(r.URL.Path, p.base)
	refs := r.Method == http.MethodGet && rest == "/info/refs" && r.URL.RawQuery == "service=git-upload-pack"
	pack := r.Method == http.MethodPost && rest == "/git-upload-pack" && r.URL.RawQuery == ""
	if !ok || !refs && !pack {
		http.NotFound(w, r)
		return
	}
	// The answer may begin before the transport has looked for the end of the
	// request, which would then be closed under it and break the connection.
	if err := http.NewResponseController(w).EnableFullDuplex(); err != nil {
		p.fail(err)
		http.Error(w, "cannot answer", http.StatusInternalServerError)
		return
	}
	u := "https://" + ServerName + r.URL.Path
	if refs {
		u += "?" + r.URL.RawQuery
	}
	req, err := http.NewRequestWithContext(r.Context(), r.Method, u, r.Body)
	if err != nil {
		http.Error(w, "bad request", http.StatusBadRequest)
		return
	}
	req.ContentLength = r.ContentLength
	for _, h := range []string{"Accept", "Content-Type", "Content-Encoding", "Git-Protocol"} {
		if v := r.Header.Get(h); v != "" {
			req.Header.Set(h, v)
		}
	}
	resp, err := p.client.Do(req)
	if err != nil {
		p.fail(err)
		http.Error(w, "the agent endpoint is not reachable", http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		p.fail(fmt.Errorf("the endpoint answered %s", resp.Status))
	}
	w.Header().Set("Content-Type", resp.Header.Get("Content-Type"))
	w.WriteHeader(resp.StatusCode)
	body := io.Reader(resp.Body)
	if pack && resp.StatusCode == http.StatusOK {
		sniffed := &sniffer{r: resp.Body}
		defer func() { p.heard(sniffed.head) }()
		body = sniffed
	}
	if err := copyFlush(w, body); err != nil {
		if r.Context().Err() == nil {
			p.fail(err)
		}
		panic(http.ErrAbortHandler) // so that git sees a broken answer, not a short one
	}
}

// heard looks for an error packet at the beginning of an answer: "ERR" and what
// upload-pack has to say, see gitprotocol-pack(5).
func (p *sourceProxy) heard(head []byte) {
	if len(head) < 8 || string(head[4:8]) != "ERR " {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refused = strings.TrimSpace(clean(string(head[8:])))
}

// sniffer keeps the first bytes of what is read through it.
type sniffer struct {
	r    io.Reader
	head []byte
}

func (s *sniffer) Read(b []byte) (int, error) {
	n, err := s.r.Read(b)
	if room := 512 - len(s.head); room > 0 {
		s.head = append(s.head, b[:min(n, room)]...)
	}
	return n, err
}

// copyFlush copies and sends each piece on at once: git shows progress. The
// error is the reader's; a writer that is gone is git's own doing.
func copyFlush(w http.ResponseWriter, r io.Reader) error {
	rc := http.NewResponseController(w)
	buf := make([]byte, 32<<10)
	for {
		n, err := r.Read(buf)
		if n > 0 {
			if _, werr := w.Write(buf[:n]); werr != nil {
				return nil //nolint:nilerr // the reader of w went away, and git knows
			}
			_ = rc.Flush() // an error shows in the next write
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}
