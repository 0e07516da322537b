package fakeforge

import (
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
)

// Fault is what goes wrong with calls; exactly one of Status, Lose, Slow and
// Redirect is set.
type Fault struct {
	Method string // empty: any
	Path   string // what the path contains; empty: any
	Times  int    // how many calls; 0: one

	Status   int // answered instead, with Header
	Header   map[string]string
	Lose     bool   // the call is carried out, and never answered
	Slow     bool   // half an answer comes, and then nothing more
	Redirect string // a 307 to there
}

// Faults are those to come; the zero value has none. Safe for concurrent use.
type Faults struct {
	mu    sync.Mutex
	next  []Fault
	calls map[string]int
}

// Add adds a fault after those that are still to come.
func (f *Faults) Add(fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	fault.Times = max(fault.Times, 1)
	f.next = append(f.next, fault)
}

// Clear forgets those that have not happened yet.
func (f *Faults) Clear() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.next = nil
}

// Pending is how many calls still go wrong.
func (f *Faults) Pending() (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, fault := range f.next {
		n += fault.Times
	}
	return n
}

// Calls is how often "METHOD /path" was called.
func (f *Faults) Calls(call string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[call]
}

func (f *Faults) take(r *http.Request) (Fault, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.calls == nil {
		f.calls = map[string]int{}
	}
	f.calls[r.Method+" "+r.URL.Path]++
	for i, fault := range f.next {
		if fault.Method != "" && fault.Method != r.Method || !strings.Contains(r.URL.Path, fault.Path) {
			continue
		}
		if f.next[i].Times--; f.next[i].Times == 0 {
			f.next = slices.Delete(f.next, i, i+1)
		}
		return fault, true
	}
	return Fault{}, false
}

// Handler lets faults happen to the calls of h.
func (f *Faults) Handler(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fault, ok := f.take(r)
		if !ok {
			h.ServeHTTP(w, r)
			return
		}
		for name, value := range fault.Header {
			w.Header().Set(name, value)
		}
		switch {
		case fault.Lose:
			h.ServeHTTP(httptest.NewRecorder(), r)
			waitGone(r)
		case fault.Slow:
			rec := httptest.NewRecorder()
			h.ServeHTTP(rec, r)
			w.WriteHeader(rec.Code)
			w.Write(rec.Body.Bytes()[:rec.Body.Len()/2])
			_ = http.NewResponseController(w).Flush()
			waitGone(r)
		case fault.Redirect != "":
			w.Header().Set("Location", fault.Redirect)
			w.WriteHeader(http.StatusTemporaryRedirect)
		default:
			w.WriteHeader(fault.Status)
			_, _ = io.WriteString(w, `{"message":"injected"}`)
		}
	})
}

// waitGone waits until the client gives up, which the server sees only after
// the body.
func waitGone(r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	<-r.Context().Done()
}
