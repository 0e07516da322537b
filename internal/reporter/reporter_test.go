package reporter_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/reporter"
	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
)

// board is a forge that answers as the test says.
type board struct {
	forge.Forge
	mu      sync.Mutex
	answers []error // of the next calls; then nil
	calls   int
	busy    map[string]bool
	has     map[string][]forge.Status
	hold    chan struct{}
	t       *testing.T
}

func (b *board) ReportStatus(ctx context.Context, _ forge.Repo, commit string, s forge.Status) error {
	key := commit + " " + s.Key
	b.mu.Lock()
	b.calls++
	if b.busy[key] {
		b.t.Errorf("%s is told twice at once", key)
	}
	b.busy[key] = true
	hold := b.hold
	var answer error
	if len(b.answers) > 0 {
		answer, b.answers = b.answers[0], b.answers[1:]
	}
	b.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.busy[key] = false
	if answer != nil {
		return answer
	}
	b.has[key] = append(b.has[key], s)
	return nil
}

func (b *board) seen(key string) (out []int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range b.has[key] {
		out = append(out, s.Version)
	}
	return out
}

func rig(t *testing.T, url string) (*store.Store, *board) {
	t.Helper()
	db, err := sqldb.Open(t.Context(), url, sqldb.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	if err := store.Migrate(t.Context(), db); err != nil {
		t.Fatal(err)
	}
	s, err := store.New(t.Context(), db, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s, &board{busy: map[string]bool{}, has: map[string][]forge.Status{}, t: t}
}

// begin runs a reporter until the test ends, or what it gives is called.
func begin(t *testing.T, s *store.Store, b *board, owner string) (*reporter.Reporter, func()) {
	t.Helper()
	r := &reporter.Reporter{Store: s, Forges: map[string]forge.Forge{"f": b}, Owner: owner, Lease: 30 * time.Second, Tick: 20 * time.Millisecond, Logger: slog.New(slog.DiscardHandler)}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); r.Run(ctx) }()
	stop := func() { cancel(); <-done }
	t.Cleanup(stop)
	return r, stop
}

func accept(t *testing.T, r *reporter.Reporter, key string, version int64) {
	t.Helper()
	s := forge.Status{Key: key, Version: version, State: forge.StatusRunning, Description: fmt.Sprint(version)}
	if err := r.Accept(t.Context(), messages.Status{Forge: "f", Repo: forge.Repo{Owner: "o", Name: "r"}, Commit: "c", Status: s}); err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 3000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("in vain: %s", what)
}

func last(v []int64) int64 {
	if len(v) == 0 {
		return 0
	}
	return v[len(v)-1]
}

func TestReports(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		s, b := rig(t, url)
		one, stop := begin(t, s, b, "one")
		two, _ := begin(t, s, b, "two")

		// What comes while one is on its way is merged, the newest wins, and what is
		// late is dropped; two reporters do not tell the same at once.
		b.hold = make(chan struct{})
		accept(t, one, "k", 1)
		eventually(t, "a first call", func() bool { b.mu.Lock(); defer b.mu.Unlock(); return b.calls == 1 })
		for v := int64(2); v <= 20; v++ {
			accept(t, []*reporter.Reporter{one, two}[v%2], "k", v)
		}
		accept(t, two, "k", 7)
		b.mu.Lock()
		close(b.hold)
		b.hold = nil
		b.mu.Unlock()
		eventually(t, "the newest", func() bool { return last(b.seen("c k")) == 20 })
		if got := b.seen("c k"); len(got) != 2 || got[0] != 1 {
			t.Errorf("the forge was told %v", got)
		}

		// A failure is tried again, a refusal not, but for what is newer.
		b.mu.Lock()
		b.answers = []error{fmt.Errorf("%w: 502", forge.ErrUnavailable), &forge.RetryError{After: time.Millisecond, Err: errors.New("429")}}
		b.mu.Unlock()
		accept(t, one, "retry", 1)
		eventually(t, "a status in spite of two failures", func() bool { return last(b.seen("c retry")) == 1 })
		b.mu.Lock()
		b.answers = []error{fmt.Errorf("%w: no such commit", forge.ErrNotFound)}
		b.mu.Unlock()
		accept(t, one, "gone", 1)
		eventually(t, "it is left", func() bool {
			r, err := s.Report(t.Context(), "f", "o/r", "c", "gone")
			return err == nil && r.DueAt == 0 && r.Failures == 1 && r.Reported == 0 && r.ClaimedBy == ""
		})
		accept(t, one, "gone", 2)
		eventually(t, "the next one is told", func() bool { return last(b.seen("c gone")) == 2 })

		// One that stops in a call gives it back.
		b.mu.Lock()
		b.hold = make(chan struct{})
		b.answers = []error{errors.New("stopped")}
		before := b.calls
		b.mu.Unlock()
		stop()
		three, stop := begin(t, s, b, "three")
		accept(t, three, "stop", 1)
		eventually(t, "a call", func() bool { b.mu.Lock(); defer b.mu.Unlock(); return b.calls > before })
		stop()
		b.mu.Lock()
		close(b.hold)
		b.hold = nil
		b.mu.Unlock()
		eventually(t, "another goes on with it", func() bool { return last(b.seen("c stop")) == 1 })

		if n, err := s.RemoveLeftovers(t.Context(), store.Leftovers{}, 2); err != nil || n.Others != 2 {
			t.Errorf("%+v removed, %v", n, err)
		}
	})
}
