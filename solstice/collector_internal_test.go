package solstice

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

// TestOldDeadLettersGo: those of the topics that the engine consumes.
func TestOldDeadLettersGo(t *testing.T) {
	a := newArchive(t, testenv.SQLite(t))
	rules := testRules
	rules.DeliveryAge = 24 * time.Hour
	e := a.engine(a.db, rules, nil)
	ctx := t.Context()
	letters, ok := queue.As[queue.DeadLetterer](a.queue)
	if !ok {
		t.Fatal("the queue has no dead letters")
	}
	topics := []string{messages.TopicRunRequest, messages.StatusTopic("local"), messages.StatusTopic("elsewhere")}
	for _, topic := range topics {
		sub, err := a.queue.Subscribe(ctx, topic, queue.SubscribeOptions{Group: messages.Group})
		a.must(err)
		a.must(a.queue.Publish(ctx, topic, []queue.Message{{Body: []byte("x")}, {Body: []byte("y")}}, queue.PublishOptions{}))
		for range 2 {
			d, err := sub.Next(ctx)
			a.must(err)
			a.must(d.Nack(ctx, queue.NackOptions{DeadLetter: true}))
		}
		a.must(sub.Close())
	}
	left := func(want ...int) {
		t.Helper()
		for i, topic := range topics {
			if got, err := letters.DeadLetters(ctx, topic, messages.Group, 10); err != nil || len(got) != want[i] {
				t.Errorf("%d dead letters of %s, %v, want %d", len(got), topic, err, want[i])
			}
		}
	}
	a.collect(e)
	left(2, 2, 2)
	a.pass(25 * time.Hour)
	if c := a.collect(e); c.messages != 4 {
		t.Errorf("%d messages were removed", c.messages)
	}
	left(0, 0, 2)
}

// swept counts the searches for what nothing lists.
type swept struct {
	logstream.Store
	n   int
	err error
}

func (s *swept) Sweep(context.Context, time.Duration) (int, error) {
	s.n++
	return 3, s.err
}

// TestBlobsAreSweptOnceADay: over all engines.
func TestBlobsAreSweptOnceADay(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		a := newArchive(t, url)
		s := &swept{}
		wrap := func(logs logstream.Store) logstream.Store { s.Store = logs; return s }
		first, second := a.engine(a.db, testRules, wrap), a.engine(a.db, testRules, wrap)
		for range 3 {
			a.collect(first)
			a.collect(second)
		}
		if s.n != 1 {
			t.Errorf("%d searches", s.n)
		}
		a.pass(lookAgain + time.Minute)
		if c := a.collect(second); s.n != 2 || c.objects != 3 {
			t.Errorf("%d searches, %d objects", s.n, c.objects)
		}
		a.pass(lookAgain + time.Minute)
		s.err = errors.New("the blob store is away")
		if _, err := (&collector{e: first}).pass(t.Context()); !errors.Is(err, s.err) {
			t.Errorf("a search that fails: %v", err)
		}
	})
}

// TestUndeletableLogKeepsNoOther: a run that cannot be removed is tried again.
func TestUndeletableLogKeepsNoOther(t *testing.T) {
	a := newArchive(t, testenv.SQLite(t))
	e := a.engine(a.db, testRules, nil)
	bad := a.ended(e, "a")
	a.ended(e, "a")
	a.ended(e, "b")
	a.pass(1000 * time.Hour)
	broken := errors.New("the disk is broken")
	logs := e.logs
	e.logs = refusing{logs, bad.ID, broken}
	c := &collector{e: e}
	for range 2 {
		if _, err := c.pass(t.Context()); !errors.Is(err, broken) || !strings.Contains(err.Error(), bad.ID) {
			t.Errorf("pass: %v", err)
		}
	}
	if n := a.count("runs"); n != 1 {
		t.Errorf("%d runs are left", n)
	}
	e.logs = logs
	_, err := c.pass(t.Context())
	a.must(err)
	a.sound("the disk is repaired", 0, 0)
}

type refusing struct {
	logstream.Store
	run string
	err error
}

func (r refusing) Delete(ctx context.Context, stream string) error {
	if strings.Contains(stream, r.run) {
		return r.err
	}
	return r.Store.Delete(ctx, stream)
}

// said collects what an engine logs.
type said struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *said) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *said) lines(with string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Count(s.b.String(), with)
}

// TestEngineCollects: a running engine does so by itself, counts it, and says so
// once.
func TestEngineCollects(t *testing.T) {
	a := newArchive(t, testenv.SQLite(t))
	filler := a.engine(a.db, testRules, nil)
	a.ended(filler, "a")
	a.ended(filler, "b")
	var log said
	reader := sdkmetric.NewManualReader()
	a.forge.Forge = nil // no source is asked for
	e, err := New(Config{
		DB: a.db, Queue: a.queue, Logs: filler.logs, Retention: testRules, clock: a.clock(a.db), Timing: Timing{Collect: 5 * time.Millisecond},
		Logger: slog.New(slog.NewTextHandler(&log, nil)), MeterProvider: sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)),
	})
	a.must(err)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- e.Run(ctx) }()
	a.pass(1000 * time.Hour)
	tick, late := time.NewTicker(5*time.Millisecond), time.After(time.Minute)
	defer tick.Stop()
	for a.count("runs")+a.count("machines") > 0 {
		select {
		case <-tick.C:
		case <-late:
			t.Fatal("not removed within a minute")
		}
	}
	cancel()
	a.must(<-ended)
	if n := log.lines("removed by retention"); n != 1 {
		t.Errorf("%d lines about what was removed", n)
	}
	var rm metricdata.ResourceMetrics
	a.must(reader.Collect(t.Context(), &rm))
	got := map[string]int64{}
	for _, s := range rm.ScopeMetrics {
		for _, m := range s.Metrics {
			sum, ok := m.Data.(metricdata.Sum[int64])
			if m.Name != "solstice.retention.removed" || !ok {
				continue
			}
			for _, p := range sum.DataPoints {
				kind, _ := p.Attributes.Value("kind")
				got[kind.AsString()] += p.Value
			}
		}
	}
	if got["runs"] != 2 || got["machines"] != 4 {
		t.Errorf("counted %v", got)
	}
}
