package queue_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/memqueue"
)

// consume runs c until everything in the bubble is blocked for good, then stops
// it and returns what Run returned.
func consume(t *testing.T, c *queue.Consumer, d time.Duration) error {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	<-time.After(d) // the bubble's clock
	synctest.Wait()
	cancel()
	return <-done
}

func publish(t *testing.T, q queue.Queue, msgs ...queue.Message) {
	t.Helper()
	if err := q.Publish(t.Context(), "t", msgs, queue.PublishOptions{}); err != nil {
		t.Fatal(err)
	}
}

func TestConsumerOutcomes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := memqueue.New()
		defer q.Close()
		for _, id := range []string{"ok", "retry", "later", "discard", "panic"} {
			publish(t, q, queue.Message{ID: id})
		}
		start := time.Now()
		calls := map[string][]time.Duration{}
		var logs bytes.Buffer
		boom := errors.New("boom")
		c := &queue.Consumer{
			Queue: q, Topic: "t", Group: "g", MaxAttempts: 3,
			Backoff: func(attempt int) time.Duration { return time.Duration(attempt) * time.Second },
			Logger:  slog.New(slog.NewTextHandler(&logs, nil)),
			Handler: func(_ context.Context, m queue.Message) error {
				calls[m.ID] = append(calls[m.ID], time.Since(start))
				switch m.ID {
				case "retry":
					return boom
				case "later":
					if len(calls[m.ID]) == 1 {
						return queue.RetryAfter(time.Minute, boom)
					}
				case "discard":
					return queue.Discard(boom)
				case "panic":
					if len(calls[m.ID]) == 1 {
						panic("at the handler")
					}
				}
				return nil
			},
		}
		if err := consume(t, c, time.Hour); err != nil {
			t.Fatalf("Run: %v", err)
		}
		want := map[string][]time.Duration{
			"ok": {0}, "retry": {0, time.Second, 3 * time.Second}, "later": {0, time.Minute},
			"discard": {0}, "panic": {0, time.Second},
		}
		for id, times := range want {
			if len(calls[id]) != len(times) {
				t.Errorf("%s: called at %v, want %v", id, calls[id], times)
				continue
			}
			for i := range times {
				if calls[id][i] != times[i] {
					t.Errorf("%s: called at %v, want %v", id, calls[id], times)
				}
			}
		}
		letters, err := q.DeadLetters(t.Context(), "t", "g", 10)
		if err != nil || len(letters) != 2 {
			t.Fatalf("letters %v, %v", letters, err)
		}
		for _, l := range letters {
			if l.Reason != "boom" {
				t.Errorf("letter %s: reason %q", l.Message.ID, l.Reason)
			}
		}
		if s := logs.String(); !strings.Contains(s, "at the handler") || !strings.Contains(s, "consumer_test.go") {
			t.Errorf("the log lacks the panic or its stack:\n%s", s)
		}
	})
}

func TestConsumerDefaultBackoffGrows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := memqueue.New()
		defer q.Close()
		publish(t, q, queue.Message{ID: "m"})
		var at []time.Time
		c := &queue.Consumer{Queue: q, Topic: "t", Group: "g", MaxAttempts: 15, Handler: func(context.Context, queue.Message) error {
			at = append(at, time.Now())
			return errors.New("no")
		}}
		if err := consume(t, c, 24*time.Hour); err != nil {
			t.Fatal(err)
		}
		if len(at) != 15 {
			t.Fatalf("%d deliveries, want 15", len(at))
		}
		for i := 1; i < len(at); i++ {
			full := min(time.Second<<(i-1), 5*time.Minute)
			if d := at[i].Sub(at[i-1]); d > full || d < full*4/5 {
				t.Errorf("delay %d is %v, want %v less at most a fifth", i, d, full)
			}
		}
	})
}

func TestConsumerConcurrency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := memqueue.New()
		defer q.Close()
		for range 10 {
			publish(t, q, queue.Message{})
		}
		var now, most, all atomic.Int64
		c := &queue.Consumer{Queue: q, Topic: "t", Group: "g", Concurrency: 3, Handler: func(context.Context, queue.Message) error {
			n := now.Add(1)
			for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
			}
			<-time.After(time.Second)
			now.Add(-1)
			all.Add(1)
			return nil
		}}
		if err := consume(t, c, time.Minute); err != nil {
			t.Fatal(err)
		}
		if most.Load() != 3 || all.Load() != 10 {
			t.Fatalf("%d handled, %d at once: want 10 and 3", all.Load(), most.Load())
		}
	})
}

func TestConsumerStops(t *testing.T) {
	for name, tc := range map[string]struct {
		handler func(ctx context.Context) error
		settled bool          // its message is acked
		takes   time.Duration // from the end of Run's context
		err     error
	}{
		"after the handler under way": {func(context.Context) error { <-time.After(5 * time.Second); return nil }, true, 4 * time.Second, nil},
		"cancelling it after Grace":   {func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }, false, 10 * time.Second, nil},
		"leaving one that does not return": {
			func(context.Context) error { <-time.After(time.Hour); return nil }, false,
			20 * time.Second, context.DeadlineExceeded,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				q := memqueue.New()
				defer q.Close()
				publish(t, q, queue.Message{ID: "m"})
				c := &queue.Consumer{
					Queue: q, Topic: "t", Group: "g", Backoff: func(int) time.Duration { return 0 },
					Handler: func(ctx context.Context, _ queue.Message) error { return tc.handler(ctx) },
				}
				start := time.Now()
				err := consume(t, c, time.Second)
				if !errors.Is(err, tc.err) {
					t.Errorf("Run: %v, want %v", err, tc.err)
				}
				if d := time.Since(start) - time.Second; d != tc.takes {
					t.Errorf("Run took %v to stop, want %v", d, tc.takes)
				}
				sub, err := q.Subscribe(t.Context(), "t", queue.SubscribeOptions{Group: "g"})
				if err != nil {
					t.Fatal(err)
				}
				publish(t, q, queue.Message{ID: "end"})
				d, err := sub.Next(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if settled := d.Message().ID == "end"; settled != tc.settled {
					t.Errorf("next message is %s; settled should be %v", d.Message().ID, tc.settled)
				}
				<-time.After(2 * time.Hour) // lets the stuck handler end
			})
		})
	}
}

func TestConsumerOfClosedQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := memqueue.New()
		c := &queue.Consumer{Queue: q, Topic: "t", Group: "g", Concurrency: 4, Handler: func(context.Context, queue.Message) error { return nil }}
		done := make(chan error, 1)
		go func() { done <- c.Run(t.Context()) }()
		synctest.Wait()
		q.Close()
		if err := <-done; !errors.Is(err, queue.ErrClosed) {
			t.Fatalf("Run: %v", err)
		}
		if err := c.Run(t.Context()); !errors.Is(err, queue.ErrClosed) {
			t.Fatalf("Run again: %v", err)
		}
	})
	if err := (&queue.Consumer{}).Run(t.Context()); !errors.Is(err, queue.ErrInvalid) {
		t.Fatalf("Run of nothing: %v", err)
	}
}

func TestConsumerTelemetry(t *testing.T) {
	spans := tracetest.NewSpanRecorder()
	tp := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans))
	reader := sdkmetric.NewManualReader()
	mp := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
	synctest.Test(t, func(t *testing.T) {
		q := memqueue.New()
		defer q.Close()
		ctx, parent := tp.Tracer("test").Start(t.Context(), "publisher")
		attributes := map[string]string{"own": "kept"}
		m := queue.Message{ID: "traced", Attributes: attributes}
		queue.Inject(ctx, &m)
		if len(attributes) != 1 || m.Attributes["own"] != "kept" {
			t.Fatalf("Inject changed the caller's map to %v, message has %v", attributes, m.Attributes)
		}
		parent.End()
		publish(t, q, m, queue.Message{ID: "failing"})
		var inside trace.SpanContext
		c := &queue.Consumer{Queue: q, Topic: "t", Group: "g", System: "memory", TracerProvider: tp, MeterProvider: mp, Handler: func(ctx context.Context, m queue.Message) error {
			if m.ID == "failing" {
				return queue.Discard(errors.New("no"))
			}
			inside = trace.SpanContextFromContext(ctx)
			return nil
		}}
		if err := consume(t, c, time.Second); err != nil {
			t.Fatal(err)
		}
		if inside.TraceID() != parent.SpanContext().TraceID() {
			t.Errorf("the handler's trace is %v, the publisher's %v", inside.TraceID(), parent.SpanContext().TraceID())
		}
		for _, s := range spans.Ended() {
			if s.SpanContext().SpanID() != inside.SpanID() {
				continue
			}
			got := map[string]string{}
			for _, a := range s.Attributes() {
				got[string(a.Key)] = a.Value.String()
			}
			if s.Name() != "process t" || s.SpanKind() != trace.SpanKindConsumer || s.Parent().SpanID() != parent.SpanContext().SpanID() ||
				got["messaging.system"] != "memory" || got["messaging.destination.name"] != "t" || got["messaging.message.id"] != "traced" {
				t.Errorf("span %q, kind %v, parent %v, attributes %v", s.Name(), s.SpanKind(), s.Parent().SpanID(), got)
			}
		}
	})
	var rm metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &rm); err != nil {
		t.Fatal(err)
	}
	got := map[string]int64{}
	for _, sm := range rm.ScopeMetrics {
		for _, m := range sm.Metrics {
			switch d := m.Data.(type) {
			case metricdata.Sum[int64]:
				got[m.Name] = d.DataPoints[0].Value
			case metricdata.Histogram[float64]:
				got[m.Name] = int64(d.DataPoints[0].Count)
			}
		}
	}
	if got["solstice.queue.handled"] != 1 || got["solstice.queue.failed"] != 1 || got["messaging.process.duration"] != 2 {
		t.Errorf("metrics %v", got)
	}
}
