package s3blob

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// newTransport returns one that uses no proxy and gives stalled connections up.
func newTransport(o Options) *http.Transport {
	dialer := &net.Dialer{Timeout: o.ConnectTimeout, KeepAlive: 15 * time.Second}
	tlsConfig := o.TLS.Clone()
	if tlsConfig == nil {
		tlsConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	return &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := dialer.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return &conn{Conn: c, stall: o.StallTimeout}, nil
		},
		TLSClientConfig:     tlsConfig,
		TLSHandshakeTimeout: o.ConnectTimeout,
		TLSNextProto:        map[string]func(string, *tls.Conn) http.RoundTripper{}, // S3 speaks HTTP/1.1
		MaxIdleConnsPerHost: 64,
		IdleConnTimeout:     min(o.StallTimeout*3/4, time.Minute),
		DisableCompression:  true, // content comes as it was stored
		ReadBufferSize:      16 << 10,
	}
}

// conn fails when nothing moved for some time in either direction.
type conn struct {
	net.Conn
	stall time.Duration
}

func (c *conn) Read(p []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(c.stall)); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

// Write goes in pieces, each of which is progress, also for a pending Read.
func (c *conn) Write(p []byte) (n int, err error) {
	const piece = 256 << 10
	for first := true; first || n < len(p); first = false {
		if err := c.SetDeadline(time.Now().Add(c.stall)); err != nil {
			return n, err
		}
		m, err := c.Conn.Write(p[n:min(n+piece, len(p))])
		n += m
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// record is what is known of a request besides what minio returns of it.
type record struct {
	err        error          // of the connection, with its type
	answered   bool           // a response came
	date       time.Time      // of the server
	retryAfter time.Duration  // that it asks for
	page       bool           // an error for people, as web servers give
	sending    sync.WaitGroup // of the content, which may outlast an answer
}

type recordKey struct{}

// recorder fills the record of a request's context.
type recorder struct{ next http.RoundTripper }

func (r recorder) RoundTrip(req *http.Request) (*http.Response, error) {
	rec, _ := req.Context().Value(recordKey{}).(*record)
	if rec == nil {
		return r.next.RoundTrip(req)
	}
	if req.Body != nil {
		rec.sending.Add(1)
		req.Body = &sentBody{ReadCloser: req.Body, closed: sync.OnceFunc(rec.sending.Done)}
	}
	resp, err := r.next.RoundTrip(req)
	rec.err, rec.answered = err, resp != nil
	if resp == nil {
		return nil, err
	}
	contentType := resp.Header.Get("Content-Type")
	rec.page = resp.StatusCode >= 400 && req.Method != http.MethodHead &&
		strings.HasPrefix(contentType, "text/") && !strings.Contains(contentType, "xml")
	rec.date, _ = http.ParseTime(resp.Header.Get("Date")) // zero where there is none
	if s, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && s > 0 {
		rec.retryAfter = time.Duration(min(s, 3600)) * time.Second
	}
	return resp, nil
}

// sentBody says when the transport is done with it.
type sentBody struct {
	io.ReadCloser
	closed func()
}

func (b *sentBody) Close() error {
	defer b.closed()
	return b.ReadCloser.Close()
}
