package rest

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/solstice-ci/solstice-go/forge"
)

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for name, tc := range map[string]struct {
		header map[string]string
		want   time.Duration
		told   bool
	}{
		"nothing":          {nil, 0, false},
		"seconds":          {map[string]string{"Retry-After": "30"}, 30 * time.Second, true},
		"a date":           {map[string]string{"Retry-After": "Fri, 02 Jan 2026 03:05:05 GMT"}, time.Minute, true},
		"a date that was":  {map[string]string{"Retry-After": "Fri, 02 Jan 2026 03:03:05 GMT"}, 0, true},
		"years":            {map[string]string{"Retry-After": "9223372036854775807"}, maxWait, true},
		"negative":         {map[string]string{"Retry-After": "-1"}, 0, false},
		"no number":        {map[string]string{"Retry-After": "soon"}, 0, false},
		"a quota that is":  {map[string]string{"RateLimit-Remaining": "7", "RateLimit-Reset": "1767323105"}, 0, false},
		"a quota that was": {map[string]string{"RateLimit-Remaining": "0", "RateLimit-Reset": "1767323105"}, time.Minute, true},
		"with X":           {map[string]string{"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1767323105"}, time.Minute, true},
	} {
		h := http.Header{}
		for k, v := range tc.header {
			h.Set(k, v)
		}
		if got, told := retryAfter(h, now); got != tc.want || told != tc.told {
			t.Errorf("%s: %v, %v, want %v, %v", name, got, told, tc.want, tc.told)
		}
	}
}

// Elements of a path stay elements, whatever is in them, and redirects neither
// turn a write into a read nor go on for ever.
func TestDo(t *testing.T) {
	var seen []string
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen = append(seen, r.Method+" "+r.URL.EscapedPath()+"?"+r.URL.RawQuery)
		switch r.URL.Path {
		case "/base/api/moved":
			http.Redirect(w, r, "/base/api/there", http.StatusMovedPermanently)
		case "/base/api/loop":
			http.Redirect(w, r, "/base/api/loop", http.StatusFound)
		case "/base/api/long":
			_, _ = w.Write([]byte(`"` + strings.Repeat("x", 100) + `"`))
		case "/base/api/bad":
			w.WriteHeader(http.StatusUnprocessableEntity)
			_, _ = w.Write([]byte(`{"message":{"state":["is\nwrong"]}}`))
		default:
			_, _ = w.Write([]byte(`"fine"`))
		}
	}))
	defer s.Close()
	c, err := New(Config{Name: "test", BaseURL: s.URL + "/base/", API: "api"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	do := func(call Call) (string, error) {
		var out string
		call.Out = &out
		_, err := c.Do(t.Context(), call)
		return out, err
	}
	if _, err := do(Call{Path: []string{"a/b", "c%2f?#", "ü"}}); err != nil || seen[0] != "GET /base/api/a%2Fb/c%252f%3F%23/%C3%BC?" {
		t.Errorf("a path: %v, %q", err, seen)
	}
	if got, err := do(Call{Path: []string{"moved"}}); err != nil || got != "fine" {
		t.Errorf("a read that is redirected: %q, %v", got, err)
	}
	seen = nil
	if _, err := do(Call{Method: http.MethodPost, Path: []string{"moved"}, Body: "x"}); !errors.Is(err, errRedirect) || len(seen) != 1 {
		t.Errorf("a write that is redirected: %v, %q", err, seen)
	}
	if _, err := do(Call{Path: []string{"loop"}}); !errors.Is(err, errRedirect) {
		t.Errorf("a loop: %v", err)
	}
	if _, err := do(Call{Path: []string{"long"}, Max: 50}); !errors.Is(err, forge.ErrTooLarge) {
		t.Errorf("a long answer: %v", err)
	}
	_, err = do(Call{Path: []string{"bad"}})
	if !errors.Is(err, forge.ErrInvalid) || Status(err) != 422 || !strings.Contains(err.Error(), "wrong") || strings.Contains(err.Error(), "\n") {
		t.Errorf("a refusal: %v", err)
	}
}

func FuzzRefused(f *testing.F) {
	f.Add(429, "30", `{"message":"slow down"}`)
	f.Add(403, "", `{"error":{"a":1}}`)
	f.Fuzz(func(t *testing.T, code int, after, body string) {
		c := &Client{c: Config{Name: "test"}}
		r := &http.Response{StatusCode: code, Header: http.Header{"Retry-After": {after}}, Body: http.NoBody}
		if err := c.refused("GET", "/", r); err == nil || Status(err) != code {
			t.Errorf("%v", err)
		}
		if m := message([]byte(body)); len(m) > 200 || !utf8.ValidString(m) {
			t.Errorf("message %q", m)
		}
	})
}
