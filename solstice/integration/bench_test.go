package integration_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/testenv"
)

// BenchmarkWebhook takes webhooks of 8 KiB, several at once, until they are written
// down; x-bare is how many times as long that takes as reading them and computing their
// signatures alone.
func BenchmarkWebhook(b *testing.B) {
	for _, c := range []struct {
		name string
		url  func(testing.TB) string
	}{{"sqlite", testenv.SQLite}, {"postgres", testenv.Postgres}} {
		b.Run(c.name, func(b *testing.B) {
			r := newRig(b, c.url(b), nil)
			bare := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, err := io.ReadAll(r.Body)
				if err != nil || r.Header.Get("X-Signature") != sign(body) {
					w.WriteHeader(http.StatusUnauthorized)
					return
				}
				w.WriteHeader(http.StatusAccepted)
			}))
			defer bare.Close()
			padding := strings.Repeat("x", 8<<10)
			var n atomic.Int64
			post := func(url string) func(*testing.PB) {
				return func(pb *testing.PB) {
					for pb.Next() {
						i := n.Add(1)
						body := fmt.Appendf(nil, `{"kind": "push", "repo": {"owner": "acme", "name": "widget%d"}, "ref": "refs/heads/main", "commit": "%d", "padding": "%s"}`, i%8, i, padding)
						req, err := http.NewRequestWithContext(b.Context(), http.MethodPost, url+"/webhooks/f", strings.NewReader(string(body)))
						if err != nil {
							b.Error(err)
							return
						}
						req.Header.Set("X-Delivery", fmt.Sprint(i))
						req.Header.Set("X-Signature", sign(body))
						resp, err := http.DefaultClient.Do(req)
						if err != nil {
							b.Error(err)
							return
						}
						_, _ = io.Copy(io.Discard, resp.Body)
						_ = resp.Body.Close()
						if resp.StatusCode != http.StatusAccepted {
							b.Errorf("%d", resp.StatusCode)
						}
					}
				}
			}
			http.DefaultTransport.(*http.Transport).MaxIdleConnsPerHost = 64
			b.SetParallelism(8)
			b.ResetTimer()
			began := time.Now()
			b.RunParallel(post(bare.URL))
			floor := time.Since(began)
			b.ResetTimer()
			began = time.Now()
			b.RunParallel(post(r.srv.URL))
			b.ReportMetric(float64(time.Since(began))/float64(floor), "x-bare")
			b.StopTimer()
		})
	}
}
