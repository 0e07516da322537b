package amqpqueue_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/amqpqueue"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
)

const secret = "what only the body says"

// attributesOf is a span's attributes as text.
func attributesOf(s sdktrace.ReadOnlySpan) map[string]string {
	out := map[string]string{}
	for _, a := range s.Attributes() {
		out[string(a.Key)] = a.Value.String()
	}
	return out
}

// TestSpans: one trace from who publishes to who settles, through the broker.
func TestSpans(t *testing.T) {
	spans := tracetest.NewSpanRecorder()
	tp := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans))
	url := testenv.RabbitMQ(t)
	producer := withURL(t, amqpqueue.Options{URL: url, TracerProvider: tp})
	consumer := withURL(t, amqpqueue.Options{URL: url, TracerProvider: tp})
	sub := subscribe(t, consumer, "t", queue.SubscribeOptions{Group: "g"})

	ctx, publisher := tp.Tracer("test").Start(t.Context(), "publisher")
	m := queue.Message{ID: "traced", Body: []byte(secret)}
	queue.Inject(ctx, &m)
	if err := producer.Publish(ctx, "t", []queue.Message{m}, queue.PublishOptions{}); err != nil {
		t.Fatal(err)
	}
	publisher.End()
	settle := func(key string, settle func(context.Context, queue.Delivery) error) trace.SpanContext {
		d := expect(t, sub, "traced")
		if d.Message().Attributes["traceparent"] != m.Attributes["traceparent"] {
			t.Errorf("%s: trace context %v became %v", key, m.Attributes, d.Message().Attributes)
		}
		ctx, handler := tp.Tracer("test").Start(t.Context(), "handler")
		defer handler.End()
		if err := settle(ctx, d); err != nil {
			t.Fatal(err)
		}
		return handler.SpanContext()
	}
	nack := func(o queue.NackOptions) func(context.Context, queue.Delivery) error {
		return func(ctx context.Context, d queue.Delivery) error { return d.Nack(ctx, o) }
	}
	again := settle("again", nack(queue.NackOptions{}))
	delayed := settle("delayed", nack(queue.NackOptions{Delay: time.Millisecond}))
	dead := settle("dead", nack(queue.NackOptions{DeadLetter: true, Reason: "no"}))
	if n, err := consumer.Replay(t.Context(), "t", "g", "traced"); n != 1 || err != nil {
		t.Fatalf("Replay: %d, %v", n, err)
	}
	acked := settle("acked", func(ctx context.Context, d queue.Delivery) error { return d.Ack(ctx) })

	type want struct {
		kind                         trace.SpanKind
		name, operation, destination string
		key, attempt                 string
		parent                       trace.SpanContext
	}
	const exchange, q = "solstice.jobs", "solstice.t.v1"
	from := publisher.SpanContext()
	client, direct := trace.SpanKindClient, "t@g"
	wants := []want{
		{trace.SpanKindProducer, "publish t", "send", exchange + ":t", "t", "", from},
		{client, "receive t", "receive", exchange + ":t:" + q, "t", "1", from},
		{client, "nack t", "settle", exchange + ":t:" + q, "t", "1", again},
		{client, "receive t", "receive", exchange + ":t:" + q, "t", "2", from},
		{client, "nack t", "settle", exchange + ":t:" + q, "t", "2", delayed},
		{client, "receive t", "receive", exchange + ":" + direct + ":" + q, direct, "3", from},
		{client, "nack t", "settle", exchange + ":" + direct + ":" + q, direct, "3", dead},
		{client, "receive t", "receive", exchange + ":" + direct + ":" + q, direct, "1", from},
		{client, "ack t", "settle", exchange + ":" + direct + ":" + q, direct, "1", acked},
	}
	var got []sdktrace.ReadOnlySpan
	for _, s := range spans.Ended() {
		if s.Name() != "publisher" && s.Name() != "handler" {
			got = append(got, s)
		}
		if text := fmt.Sprint(s.Name(), s.Attributes(), s.Events(), s.Status()); strings.Contains(text, secret) {
			t.Errorf("the span shows the body: %s", text)
		}
	}
	if len(got) != len(wants) {
		t.Fatalf("%d spans, want %d", len(got), len(wants))
	}
	for i, w := range wants {
		s, a := got[i], attributesOf(got[i])
		if s.SpanKind() != w.kind || s.Name() != w.name || s.Parent().SpanID() != w.parent.SpanID() || s.SpanContext().TraceID() != w.parent.TraceID() {
			t.Errorf("span %d: %s, kind %v, below %v, want %+v", i, s.Name(), s.SpanKind(), s.Parent().SpanID(), w)
		}
		if a["messaging.system"] != "rabbitmq" || a["messaging.operation.type"] != w.operation || a["messaging.operation.name"]+" t" != w.name ||
			a["messaging.destination.name"] != w.destination || a["messaging.rabbitmq.destination.routing_key"] != w.key ||
			a["messaging.message.id"] != "traced" || a["messaging.message.body.size"] != fmt.Sprint(len(secret)) || a["solstice.queue.attempt"] != w.attempt {
			t.Errorf("span %d: attributes %v, want %+v", i, a, w)
		}
		if s.Status().Code == codes.Error {
			t.Errorf("span %d failed: %v", i, s.Status())
		}
	}
}

// TestConsumerSpans: the trace of a handler is that of who published.
func TestConsumerSpans(t *testing.T) {
	spans := tracetest.NewSpanRecorder()
	tp := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans))
	q := withURL(t, amqpqueue.Options{URL: testenv.RabbitMQ(t), TracerProvider: tp})
	ctx, publisher := tp.Tracer("test").Start(t.Context(), "publisher")
	m := queue.Message{ID: "m", Body: []byte(secret)}
	queue.Inject(ctx, &m)
	if err := q.Publish(ctx, "t", []queue.Message{m}, queue.PublishOptions{}); err != nil {
		t.Fatal(err)
	}
	handled, stop := context.WithCancel(t.Context())
	c := &queue.Consumer{Queue: q, Topic: "t", Group: "g", System: "rabbitmq", TracerProvider: tp, Handler: func(ctx context.Context, _ queue.Message) error {
		if id := trace.SpanContextFromContext(ctx).TraceID(); id != publisher.SpanContext().TraceID() {
			t.Errorf("trace %v, want the publisher's", id)
		}
		stop()
		return nil
	}}
	if err := c.Run(handled); err != nil {
		t.Fatal(err)
	}
	var process, ack sdktrace.ReadOnlySpan
	for _, s := range spans.Ended() {
		switch s.Name() {
		case "process t":
			process = s
		case "ack t":
			ack = s
		}
	}
	if process == nil || ack == nil || ack.Parent().SpanID() != process.SpanContext().SpanID() {
		t.Errorf("spans %v and %v, want the ack below the processing", process, ack)
	}
}

func TestMetrics(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	mp := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
	url := testenv.RabbitMQ(t)
	broker := strings.TrimSuffix(url[strings.Index(url, "@")+1:], url[strings.LastIndex(url, "/"):])
	proxy := testenv.NewProxy(t, broker)
	q := withURL(t, amqpqueue.Options{URL: strings.Replace(url, broker, proxy.Addr(), 1), MeterProvider: mp})
	publish(t, q, "t", "kept") // for which there is no queue at first
	sub := subscribe(t, q, "t", queue.SubscribeOptions{Group: "g"})
	heard := subscribe(t, q, "t", queue.SubscribeOptions{})
	expect(t, sub, "kept")
	if err := q.Publish(t.Context(), "t", append(message("a"), message("b")...), queue.PublishOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"a", "b"} {
		expect(t, sub, id)
		expect(t, heard, id)
	}
	check := func(want map[string]float64) {
		t.Helper()
		got := collect(t, reader)
		for k, v := range want {
			if got[k] != v {
				t.Errorf("%s is %v, want %v; of %v", k, got[k], v, got)
			}
		}
	}
	check(map[string]float64{
		"messaging.client.sent.messages t":       3,
		"messaging.client.operation.duration t":  2,
		"messaging.client.consumed.messages t g": 3,
		"messaging.client.consumed.messages t":   2,
		"solstice.amqp.returned t":               1,
		"solstice.amqp.connected":                1,
		"solstice.amqp.blocked":                  0,
	})
	proxy.Cut()
	until(t, "the cut is noticed", func() bool { return q.Ready(t.Context()) != nil })
	check(map[string]float64{"solstice.amqp.connected": 0})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := q.Publish(ctx, "t", append(message("c"), message("d")...), queue.PublishOptions{}); err == nil {
		t.Error("published without a connection")
	}
	proxy.Restore(t)
	publish(t, q, "t", "e")
	until(t, "the readers have gone on", func() bool { return collect(t, reader)["solstice.amqp.resubscribes t"] >= 2 })
	check(map[string]float64{
		"messaging.client.sent.messages t":         4,
		"messaging.client.sent.messages t timeout": 2,
		"solstice.amqp.connected":                  1,
		"solstice.amqp.reconnects":                 1,
	})
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	if got := collect(t, reader); len(got) == 0 {
		t.Error("no metrics")
	} else if _, ok := got["solstice.amqp.connected"]; ok {
		t.Error("a closed queue says whether it is connected")
	}
}

// collect is every metric's value, or number of values, by name, topic, group and
// type of error.
func collect(t *testing.T, reader *sdkmetric.ManualReader) map[string]float64 {
	t.Helper()
	var rm metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &rm); err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, sm := range rm.ScopeMetrics {
		for _, m := range sm.Metrics {
			add := func(s attribute.Set, n float64) {
				name := m.Name
				for _, k := range []attribute.Key{"messaging.destination.name", "messaging.consumer.group.name", "error.type"} {
					if v, ok := s.Value(k); ok {
						name += " " + v.String()
					}
				}
				out[name] += n
			}
			switch d := m.Data.(type) {
			case metricdata.Sum[int64]:
				for _, p := range d.DataPoints {
					add(p.Attributes, float64(p.Value))
				}
			case metricdata.Gauge[int64]:
				for _, p := range d.DataPoints {
					add(p.Attributes, float64(p.Value))
				}
			case metricdata.Histogram[float64]:
				for _, p := range d.DataPoints {
					add(p.Attributes, float64(p.Count))
				}
			}
		}
	}
	return out
}

// TestForeignPublishers: what others publish is delivered, and what nobody
// understands is put aside with the reason.
func TestForeignPublishers(t *testing.T) {
	url := testenv.RabbitMQ(t)
	q := withURL(t, amqpqueue.Options{URL: url})
	sub := subscribe(t, q, "wake", queue.SubscribeOptions{Group: "g"})
	if err := sub.Close(); err != nil {
		t.Fatal(err)
	}
	odd := amqp.Table{"n": int32(1), "list": []any{"x"}, "bytes": []byte{1}, "at": time.Now(), "x-solstice-attempt": int64(-5), "x-solstice-not-before": "soon"}
	with := func(schema any) amqp.Table {
		out := amqp.Table{"solstice-schema": schema}
		for k, v := range odd {
			out[k] = v
		}
		return out
	}
	ch := bare(t, url)
	body := []byte(`{"from":"somebody","labels":["x"],"more":1}`)
	for _, p := range []amqp.Publishing{
		{Body: body, Headers: with("wake.v1")}, // without an ID
		{MessageId: "later", Body: body, Headers: with("wake.v9")},
		{MessageId: "other", Body: body, Headers: with("status.v1")},
		{MessageId: "odd", Body: body, Headers: with(int32(1))},
		{MessageId: "bytes", Body: []byte("\xff\x00"), Headers: with("wake.v1")},
	} {
		if err := ch.PublishWithContext(t.Context(), "solstice.jobs", "wake", true, false, p); err != nil {
			t.Fatal(err)
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	understood := make(chan queue.Message, 10)
	c := &queue.Consumer{Queue: q, Topic: "wake", Group: "g", Handler: messages.Handler(func(_ context.Context, m queue.Message, w messages.Wake) error {
		if w.From != "somebody" {
			t.Errorf("wake-up %+v", w)
		}
		understood <- m
		return nil
	})}
	go func() { done <- c.Run(ctx) }()
	defer func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	m := <-understood
	if m.ID != "" || len(m.Attributes) != 1 {
		t.Errorf("received %+v", m)
	}
	var ls []queue.DeadLetter
	until(t, "the others are put aside", func() bool {
		var err error
		if ls, err = q.DeadLetters(t.Context(), "wake", "g", 10); err != nil {
			t.Fatal(err)
		}
		return len(ls) == 4
	})
	for i, want := range []struct{ id, reason string }{{"later", "wake.v9"}, {"other", "status.v1"}, {"odd", "schema"}, {"bytes", "body"}} {
		if l := ls[i]; l.Message.ID != want.id || !strings.Contains(l.Reason, want.reason) || l.Attempt != 1 {
			t.Errorf("letter %d: %s, attempt %d: %s", i, l.Message.ID, l.Attempt, l.Reason)
		}
		t.Log(ls[i].Reason)
	}
	if len(understood) > 0 {
		t.Errorf("understood, too: %+v", <-understood)
	}
}
