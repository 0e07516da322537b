package github

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/internal/lru"
)

const (
	maxAnswer = 64 << 20  // a comparison holds patches, a tree 7 MB
	maxCached = 512 << 10 // of one answer
)

// bounded ends a request that takes too long, and an answer that does not end.
// Not http.Client.Timeout: the library does not close the bodies of errors, whose
// timers would go on.
type bounded struct {
	next    http.RoundTripper
	timeout time.Duration
}

func (b *bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithTimeout(r.Context(), b.timeout)
	resp, err := b.next.RoundTrip(r.WithContext(ctx))
	if err != nil {
		cancel()
		return nil, err
	}
	resp.Body = &boundedBody{resp.Body, maxAnswer, cancel}
	return resp, nil
}

type boundedBody struct {
	io.ReadCloser
	left   int
	cancel context.CancelFunc
}

func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, fmt.Errorf("%w: the answer is over %d bytes", forge.ErrTooLarge, maxAnswer)
	}
	n, err := b.ReadCloser.Read(p[:min(len(p), b.left)])
	b.left -= n
	if err != nil {
		b.cancel()
	}
	return n, err
}

func (b *boundedBody) Close() error {
	b.cancel()
	return b.ReadCloser.Close()
}

// bearer adds a token.
type bearer struct {
	token string
	next  http.RoundTripper
}

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+b.token)
	return b.next.RoundTrip(r)
}

// answer is what was said under an ETag.
type answer struct {
	etag   string
	header http.Header
	body   []byte
}

// conditional asks again with the ETag of the last answer: one that has not
// changed costs nothing of the rate limit.
type conditional struct {
	credential string
	answers    *lru.Cache[string, *answer]
	next       http.RoundTripper
}

func (c *conditional) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method != http.MethodGet {
		return c.next.RoundTrip(r)
	}
	key := c.credential + " " + r.Header.Get("Accept") + " " + r.URL.String()
	last, ok := c.answers.Get(key)
	if ok {
		r = r.Clone(r.Context())
		r.Header.Set("If-None-Match", last.etag)
	}
	resp, err := c.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	if ok && resp.StatusCode == http.StatusNotModified {
		_ = resp.Body.Close()
		header := last.header.Clone()
		maps.Copy(header, resp.Header) // what is left of the rate limit
		resp.Status, resp.StatusCode, resp.Header = "200 OK", http.StatusOK, header
		resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(last.body)), int64(len(last.body))
		return resp, nil
	}
	etag := resp.Header.Get("ETag")
	if resp.StatusCode != http.StatusOK || etag == "" {
		return resp, nil
	}
	head, err := io.ReadAll(io.LimitReader(resp.Body, maxCached+1))
	if err != nil {
		_ = resp.Body.Close()
		return nil, err
	}
	if len(head) > maxCached {
		resp.Body = readCloser{io.MultiReader(bytes.NewReader(head), resp.Body), resp.Body}
		return resp, nil
	}
	_ = resp.Body.Close()
	resp.Body = io.NopCloser(bytes.NewReader(head))
	c.answers.Put(key, &answer{etag, resp.Header.Clone(), head}, len(key)+len(head)+1024)
	return resp, nil
}

type readCloser struct {
	io.Reader
	io.Closer
}
