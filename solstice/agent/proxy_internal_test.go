package agent

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"
	"time"
)

// to sends every request to one server.
type to struct {
	host string
	via  http.RoundTripper
}

func (t to) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.URL.Scheme, r.URL.Host = "http", t.host
	return t.via.RoundTrip(r)
}

// The endpoint answers while the request is still being sent, as git
// upload-pack may.
func TestProxyAnswersBeforeTheRequestEnds(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	echo := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := http.NewResponseController(w).EnableFullDuplex(); err != nil {
			t.Error(err)
		}
		_ = copyFlush(w, r.Body)
	}))
	defer echo.Close()
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	at, err := url.Parse(echo.URL)
	if err != nil {
		t.Fatal(err)
	}
	p, err := startProxy(ctx, &http.Client{Transport: to{at.Host, transport}}, "/git/x")
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()

	body, send := io.Pipe()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.url+"/git-upload-pack", body)
	if err != nil {
		t.Fatal(err)
	}
	req.ContentLength = 6
	sent := make(chan error, 1)
	go func() {
		_, err := io.WriteString(send, "one")
		sent <- err
	}()
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got := make([]byte, 3)
	if _, err := io.ReadFull(resp.Body, got); err != nil || string(got) != "one" {
		t.Fatalf("%q, %v", got, err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(send, "two"); err != nil {
		t.Fatal(err)
	}
	_ = send.Close() // never fails
	rest, err := io.ReadAll(resp.Body)
	if err != nil || string(rest) != "two" {
		t.Fatalf("%q, %v", rest, err)
	}
	if err := p.failure(); err != nil {
		t.Error(err)
	}
}
