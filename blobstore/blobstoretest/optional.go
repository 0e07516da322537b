package blobstoretest

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/blobstore"
)

// patience bounds waiting for what has to come about by itself; a variable for
// the tests of the suite.
var patience = time.Minute

// follow sends a request to a presigned URL.
func follow(tb testing.TB, h Harness, method, url, content string) (status int, body string) {
	tb.Helper()
	client := h.Client
	if client == nil {
		client = &http.Client{Transport: &http.Transport{DialContext: (&net.Dialer{}).DialContext, DisableKeepAlives: true}}
	}
	ctx, cancel := context.WithTimeout(tb.Context(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(content))
	if err != nil {
		tb.Fatalf("a presigned URL is not one: %v", err)
	}
	resp, err := client.Do(req)
	if err != nil {
		tb.Fatalf("%s of a presigned URL: %v", method, err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		tb.Fatalf("%s of a presigned URL: %v", method, err)
	}
	return resp.StatusCode, string(data)
}

func checkPresign(tb testing.TB, h Harness) {
	s := open(tb, h)
	p, ok := blobstore.As[blobstore.Presigner](s)
	if !ok {
		return
	}
	for _, key := range []string{"k", "dir/a b+c%2f&é?.txt"} {
		put(tb, s, key, "content")
		read, err := p.PresignGet(tb.Context(), key, time.Hour)
		if err != nil {
			tb.Fatalf("PresignGet(%q): %v", key, err)
		}
		if status, body := follow(tb, h, http.MethodGet, read, ""); status != http.StatusOK || body != "content" {
			tb.Fatalf("the URL of PresignGet(%q) gave %d %s", key, status, brief(body))
		}
		if status, _ := follow(tb, h, http.MethodPut, read, "evil"); status < 400 {
			tb.Fatalf("the URL of PresignGet(%q) took an upload: %d", key, status)
		}
		want(tb, s, key, "content")

		write, err := p.PresignPut(tb.Context(), key, time.Hour)
		if err != nil {
			tb.Fatalf("PresignPut(%q): %v", key, err)
		}
		if status, body := follow(tb, h, http.MethodGet, write, ""); status < 400 {
			tb.Fatalf("the URL of PresignPut(%q) was read: %d %s", key, status, brief(body))
		}
		if status, body := follow(tb, h, http.MethodPut, write, "uploaded"); status >= 300 {
			tb.Fatalf("the URL of PresignPut(%q) answered %d %s", key, status, brief(body))
		}
		want(tb, s, key, "uploaded")
	}
	// A URL is for one object.
	put(tb, s, "mine-1", "mine")
	put(tb, s, "other2", "other")
	url, err := p.PresignGet(tb.Context(), "mine-1", time.Hour)
	if err != nil {
		tb.Fatalf("PresignGet: %v", err)
	}
	if status, body := follow(tb, h, http.MethodGet, strings.ReplaceAll(url, "mine-1", "other2"), ""); status < 300 && body != "mine" {
		tb.Fatalf("the URL of an object was changed into another's: %d %s", status, brief(body))
	}
}

func checkPresignExpires(tb testing.TB, h Harness) {
	s := open(tb, h)
	p, ok := blobstore.As[blobstore.Presigner](s)
	if !ok {
		return
	}
	put(tb, s, "k", "content")
	read, err := p.PresignGet(tb.Context(), "k", time.Second)
	if err != nil {
		tb.Fatalf("PresignGet: %v", err)
	}
	write, err := p.PresignPut(tb.Context(), "k", time.Second)
	if err != nil {
		tb.Fatalf("PresignPut: %v", err)
	}
	for method, url := range map[string]string{http.MethodGet: read, http.MethodPut: write} {
		for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
			status, _ := follow(tb, h, method, url, "content")
			if status >= 400 {
				break
			}
			if time.Now().After(deadline) {
				tb.Fatalf("%s of a URL for one second still answers %d", method, status)
			}
		}
	}
	want(tb, s, "k", "content")
}

func checkPresignErrors(tb testing.TB, h Harness) {
	s := open(tb, h)
	p, ok := blobstore.As[blobstore.Presigner](s)
	if !ok {
		return
	}
	ended, cancel := context.WithCancel(tb.Context())
	cancel()
	all := func(what string, target error, ctx context.Context, key string, expires time.Duration) {
		_, err := p.PresignGet(ctx, key, expires)
		wantErr(tb, "PresignGet "+what, err, target)
		_, err = p.PresignPut(ctx, key, expires)
		wantErr(tb, "PresignPut "+what, err, target)
	}
	for _, key := range []string{"", "../a", "a//b"} {
		all(fmt.Sprintf("of key %q", key), blobstore.ErrInvalid, tb.Context(), key, time.Hour)
	}
	all("for no time", blobstore.ErrInvalid, tb.Context(), "k", 0)
	all("for less than no time", blobstore.ErrInvalid, tb.Context(), "k", -time.Hour)
	all("with an ended context", context.Canceled, ended, "k", time.Hour)
	if err := s.Close(); err != nil {
		tb.Fatalf("Close: %v", err)
	}
	all("after Close", blobstore.ErrClosed, tb.Context(), "k", time.Hour)
}

func checkSweep(tb testing.TB, h Harness) {
	s := open(tb, h)
	sweeper, ok := blobstore.As[blobstore.Sweeper](s)
	if !ok {
		return
	}
	if h.Abandon == nil || h.Leftovers == nil {
		tb.Fatalf("the store can be swept; its Harness needs Abandon and Leftovers")
	}
	put(tb, s, "k", "content")
	h.Abandon(tb, s)
	if removed, err := sweeper.Sweep(tb.Context(), time.Hour); err != nil || removed != 0 {
		tb.Fatalf("Sweep of what is older than an hour removed %d, error %v", removed, err)
	}
	if left := h.Leftovers(tb, s); len(left) != 1 {
		tb.Fatalf("after a Sweep of what is older than an hour %q is left, want what was abandoned just now", left)
	}
	ctx, cancel := context.WithCancel(tb.Context())
	cancel()
	_, err := sweeper.Sweep(ctx, 0)
	wantErr(tb, "Sweep with an ended context", err, context.Canceled)
	removed := 0
	for deadline := time.Now().Add(patience); removed == 0 && time.Now().Before(deadline); { // its clock may be coarse
		if removed, err = sweeper.Sweep(tb.Context(), 0); err != nil {
			tb.Fatalf("Sweep: %v", err)
		}
	}
	if removed != 1 {
		tb.Fatalf("Sweep removed %d, want the one that was abandoned", removed)
	}
	nothingLeft(tb, h, s, "k")
	want(tb, s, "k", "content")
	if err := s.Close(); err != nil {
		tb.Fatalf("Close: %v", err)
	}
	_, err = sweeper.Sweep(tb.Context(), 0)
	wantErr(tb, "Sweep after Close", err, blobstore.ErrClosed)
}

// checkSweepSparesPut sweeps in the middle of a Put.
func checkSweepSparesPut(tb testing.TB, h Harness) {
	s := open(tb, h)
	sweeper, ok := blobstore.As[blobstore.Sweeper](s)
	if !ok {
		return
	}
	const size = 12 << 20
	swept := false
	r := &watched{r: io.LimitReader(rand.NewChaCha8([32]byte{2}), size), at: size * 3 / 4, do: func() {
		swept = true
		if _, err := sweeper.Sweep(tb.Context(), time.Hour); err != nil {
			tb.Errorf("Sweep beside a Put: %v", err)
		}
	}}
	info, err := s.Put(tb.Context(), "k", r, blobstore.PutOptions{})
	if err != nil || info.Size != size || !swept {
		tb.Fatalf("Put beside a Sweep: %d bytes, error %v", info.Size, err)
	}
	nothingLeft(tb, h, s, "k")
}

// watched does something once, when so many bytes were read.
type watched struct {
	r  io.Reader
	at int
	do func()
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	if w.at -= n; w.at <= 0 && w.do != nil {
		w.do()
		w.do = nil
	}
	return n, err
}
