// Package rest is the HTTP client under the drivers of forges: it talks to one
// host, bounds time and size, follows no redirect elsewhere, and says what went
// wrong in the terms of package forge.
package rest

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
)

const (
	// DefaultTimeout bounds one call, with its redirects and its body.
	DefaultTimeout = 30 * time.Second
	// DefaultMaxBytes bounds an answer: 16 MiB.
	DefaultMaxBytes = 16 << 20

	maxRedirects = 5
	maxError     = 16 << 10       // of an answer that is an error
	maxWait      = 24 * time.Hour // what a forge may ask for
)

// Config says which forge; Name and BaseURL are required.
type Config struct {
	Name    string // in errors: "forgejo"
	BaseURL string // http or https, a path is allowed
	API     string // path of the API below BaseURL: "api/v1"
	// Authorize adds the credentials.
	Authorize func(ctx context.Context, h http.Header) error
	Transport http.RoundTripper // nil: one of its own, without a proxy
	Timeout   time.Duration     // of one call; 0: DefaultTimeout
}

// Client makes calls; safe for concurrent use.
type Client struct {
	c    Config
	base string
	http http.Client
	own  *http.Transport
}

// New checks the configuration; a bad one wraps forge.ErrInvalid.
func New(c Config) (*Client, error) {
	u, err := url.Parse(c.BaseURL)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		// Not repeated: it may hold a password.
		return nil, fmt.Errorf("%w: %s needs a base URL such as https://git.example.org, without user, query or fragment", forge.ErrInvalid, c.Name)
	}
	if c.Timeout <= 0 {
		c.Timeout = DefaultTimeout
	}
	cl := &Client{c: c, base: strings.TrimRight(u.String(), "/")}
	if c.Transport == nil {
		cl.own = &http.Transport{ // Proxy nil: never from the environment
			DialContext:           (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
			TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS12},
			TLSHandshakeTimeout:   10 * time.Second,
			MaxIdleConnsPerHost:   8,
			MaxConnsPerHost:       32,
			IdleConnTimeout:       90 * time.Second,
			ExpectContinueTimeout: time.Second,
			ForceAttemptHTTP2:     true,
		}
		c.Transport = cl.own
	}
	cl.http = http.Client{Transport: c.Transport, CheckRedirect: sameOrigin}
	return cl, nil
}

// errRedirect is a redirect that is not followed.
var errRedirect = errors.New("redirect refused")

// sameOrigin lets only redirects pass that neither lead elsewhere nor turn a
// write into a read.
func sameOrigin(req *http.Request, via []*http.Request) error {
	first := via[0]
	switch {
	case len(via) > maxRedirects:
		return fmt.Errorf("%w: more than %d of them", errRedirect, maxRedirects)
	case req.URL.Scheme != first.URL.Scheme || req.URL.Host != first.URL.Host || req.URL.User != nil:
		return fmt.Errorf("%w: it leads to %.100s://%.200s: correct the base URL", errRedirect, req.URL.Scheme, req.URL.Host)
	case req.Method != first.Method:
		return fmt.Errorf("%w: it answers a %s: correct the base URL or the repository's name", errRedirect, first.Method)
	}
	return nil
}

// Base is the base URL without a slash at its end.
func (c *Client) Base() string { return c.base }

// Close ends idle connections of the client's own transport.
func (c *Client) Close() {
	if c.own != nil {
		c.own.CloseIdleConnections()
	}
}

// Call is one request.
type Call struct {
	Method string   // empty: GET
	Path   []string // elements below the API, not yet escaped
	Query  url.Values
	Body   any   // sent as JSON; nil: none
	Out    any   // gets the JSON of the answer; nil: it is not read
	Max    int64 // of the answer, in bytes; 0: DefaultMaxBytes
}

// Error is an answer that is not a success. It unwraps to the sentinel of
// package forge that it stands for, if there is one.
type Error struct {
	Forge   string
	Method  string
	Path    string
	Status  int
	Message string // the forge's, at most 200 bytes
	Kind    error
}

func (e *Error) Error() string {
	s := fmt.Sprintf("%s: %s %s: %d %s", e.Forge, e.Method, e.Path, e.Status, http.StatusText(e.Status))
	if e.Message != "" {
		s += ": " + e.Message
	}
	if errors.Is(e.Kind, forge.ErrPermission) {
		s += " (check the token, its scopes and what its user may do there)"
	}
	return s
}

// Unwrap gives the sentinel.
func (e *Error) Unwrap() error { return e.Kind }

// Status gives the status code of the answer that err came from, or 0.
func Status(err error) int {
	var e *Error
	if errors.As(err, &e) {
		return e.Status
	}
	return 0
}

// Do makes a call. What the network does wraps forge.ErrUnavailable, an answer
// gives an *Error, which a *forge.RetryError wraps where the forge said when to
// come again; an end of ctx gives its error.
func (c *Client) Do(ctx context.Context, call Call) (http.Header, error) {
	if call.Method == "" {
		call.Method = http.MethodGet
	}
	path := escape(call.Path)
	target := c.base + "/" + c.c.API + path
	if len(call.Query) > 0 {
		target += "?" + call.Query.Encode()
	}
	var body io.Reader
	if call.Body != nil {
		data, err := json.Marshal(call.Body)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", c.c.Name, err)
		}
		body = bytes.NewReader(data)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	timed, cancel := context.WithTimeout(ctx, c.c.Timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(timed, call.Method, target, body)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", forge.ErrInvalid, c.c.Name, err)
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "solstice")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.c.Authorize != nil {
		if err := c.c.Authorize(timed, req.Header); err != nil {
			return nil, fmt.Errorf("%s: credentials: %w", c.c.Name, err)
		}
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.broken(ctx, call.Method, path, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return resp.Header, c.refused(call.Method, path, resp)
	}
	if call.Out == nil {
		return resp.Header, nil
	}
	limit := call.Max
	if limit <= 0 {
		limit = DefaultMaxBytes
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return resp.Header, c.broken(ctx, call.Method, path, err)
	}
	if int64(len(data)) > limit {
		return resp.Header, fmt.Errorf("%w: %s: %s %s: the answer is over %d bytes", forge.ErrTooLarge, c.c.Name, call.Method, path, limit)
	}
	if err := json.Unmarshal(data, call.Out); err != nil {
		return resp.Header, fmt.Errorf("%w: %s: %s %s: the answer is not what the API gives (is the base URL right?): %w",
			forge.ErrUnavailable, c.c.Name, call.Method, path, err)
	}
	return resp.Header, nil
}

func escape(elements []string) string {
	var b strings.Builder
	for _, e := range elements {
		b.WriteByte('/')
		b.WriteString(url.PathEscape(e))
	}
	return b.String()
}

// broken is an error without an answer.
func (c *Client) broken(ctx context.Context, method, path string, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err // without the URL, which path says
	}
	if errors.Is(err, errRedirect) {
		return fmt.Errorf("%s: %s %s: %w", c.c.Name, method, path, err)
	}
	return fmt.Errorf("%w: %s: %s %s: %w", forge.ErrUnavailable, c.c.Name, method, path, err)
}

// refused is the error for an answer.
func (c *Client) refused(method, path string, resp *http.Response) error {
	data, _ := io.ReadAll(io.LimitReader(resp.Body, maxError))
	e := &Error{Forge: c.c.Name, Method: method, Path: path, Status: resp.StatusCode, Message: message(data)}
	wait, told := retryAfter(resp.Header, time.Now())
	limited := resp.StatusCode == http.StatusTooManyRequests
	switch code := resp.StatusCode; {
	case code == http.StatusForbidden && told, limited, code == http.StatusRequestTimeout, code >= 500:
		e.Kind = forge.ErrUnavailable
		if told {
			return &forge.RetryError{After: wait, Err: e}
		}
	case code == http.StatusNotFound || code == http.StatusGone:
		e.Kind = forge.ErrNotFound
	case code == http.StatusUnauthorized || code == http.StatusForbidden:
		e.Kind = forge.ErrPermission
	case code == http.StatusBadRequest || code == http.StatusUnprocessableEntity:
		e.Kind = forge.ErrInvalid
	}
	return e
}

// message is what the forge says went wrong: "message" or "error" of JSON.
func message(data []byte) string {
	var body struct {
		Message json.RawMessage `json:"message"`
		Error   json.RawMessage `json:"error"`
	}
	if json.Unmarshal(data, &body) != nil {
		return ""
	}
	raw := body.Message
	if len(raw) == 0 {
		raw = body.Error
	}
	var text string
	if json.Unmarshal(raw, &text) != nil {
		text = string(raw)
	}
	text = strings.ToValidUTF8(strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, text), "")
	return Cut(text, 200)
}

// Cut shortens s to at most n bytes, between characters.
func Cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	const dots = "…"
	s = s[:n-len(dots)]
	return strings.ToValidUTF8(s, "") + dots
}

// retryAfter reads when to come again: Retry-After in seconds or as a date (RFC
// 9110), or the time at which an exhausted quota is renewed.
func retryAfter(h http.Header, now time.Time) (time.Duration, bool) {
	if v := h.Get("Retry-After"); v != "" {
		if n, err := strconv.ParseInt(v, 10, 64); err == nil && n >= 0 {
			return time.Duration(min(n, int64(maxWait/time.Second))) * time.Second, true
		}
		if t, err := http.ParseTime(v); err == nil {
			return min(max(t.Sub(now), 0), maxWait), true
		}
	}
	for _, prefix := range []string{"RateLimit-", "X-RateLimit-"} {
		if h.Get(prefix+"Remaining") != "0" {
			continue
		}
		if n, err := strconv.ParseInt(h.Get(prefix+"Reset"), 10, 64); err == nil {
			return min(max(time.Unix(n, 0).Sub(now), 0), maxWait), true
		}
	}
	return 0, false
}
