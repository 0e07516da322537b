package amqpqueue

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/solstice-ci/solstice-go/queue"
)

const instrumentation = "github.com/solstice-ci/solstice-go/queue/amqpqueue"

type metrics struct {
	exchange     string
	tracer       trace.Tracer
	sent         metric.Int64Counter
	consumed     metric.Int64Counter
	duration     metric.Float64Histogram
	reconnects   metric.Int64Counter
	returned     metric.Int64Counter
	resubscribes metric.Int64Counter
	unregister   func()
	topics       sync.Map // topic → metric.MeasurementOption, see destination
}

func newMetrics(q *Queue) (*metrics, error) {
	tp, mp := q.o.TracerProvider, q.o.MeterProvider
	if tp == nil {
		tp = otel.GetTracerProvider()
	}
	if mp == nil {
		mp = otel.GetMeterProvider()
	}
	meter := mp.Meter(instrumentation)
	m := &metrics{exchange: q.o.Exchange, tracer: tp.Tracer(instrumentation)}
	var errs [8]error
	m.sent, errs[0] = meter.Int64Counter("messaging.client.sent.messages", metric.WithUnit("{message}"),
		metric.WithDescription("Messages that were to be published, by topic and kind of failure."))
	m.consumed, errs[7] = meter.Int64Counter("messaging.client.consumed.messages", metric.WithUnit("{message}"),
		metric.WithDescription("Messages that readers were given, by topic and group."))
	m.duration, errs[1] = meter.Float64Histogram("messaging.client.operation.duration", metric.WithUnit("s"),
		metric.WithDescription("Time from Publish to the last confirm."),
		metric.WithExplicitBucketBoundaries(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 10))
	m.reconnects, errs[2] = meter.Int64Counter("solstice.amqp.reconnects", metric.WithDescription("Connections after the first."))
	m.returned, errs[3] = meter.Int64Counter("solstice.amqp.returned", metric.WithUnit("{message}"),
		metric.WithDescription("Messages that found no queue at first."))
	m.resubscribes, errs[4] = meter.Int64Counter("solstice.amqp.resubscribes",
		metric.WithDescription("Readers that lost their channel or queue and got another."))
	connected, err := meter.Int64ObservableGauge("solstice.amqp.connected", metric.WithDescription("1 while the broker is connected."))
	errs[5] = err
	blocked, err := meter.Int64ObservableGauge("solstice.amqp.blocked", metric.WithDescription("1 while the broker takes no messages."))
	errs[6] = err
	if err := errors.Join(errs[:]...); err != nil {
		return nil, err
	}
	reg, err := meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		q.mu.Lock()
		s := q.live
		q.mu.Unlock()
		var c, b int64
		if s != nil {
			c = 1
			if s.blocked.Load() {
				b = 1
			}
		}
		o.ObserveInt64(connected, c)
		o.ObserveInt64(blocked, b)
		return nil
	}, connected, blocked)
	if err != nil {
		return nil, err
	}
	m.unregister = func() { _ = reg.Unregister() } // fails for callbacks that are not registered
	return m, nil
}

// destination is the attribute set of a topic, of which there are few.
func (m *metrics) destination(topic string) metric.MeasurementOption {
	if o, ok := m.topics.Load(topic); ok {
		return o.(metric.MeasurementOption)
	}
	o := metric.WithAttributeSet(attribute.NewSet(
		attribute.String("messaging.system", "rabbitmq"),
		attribute.String("messaging.operation.name", "publish"),
		attribute.String("messaging.destination.name", topic),
	))
	m.topics.Store(topic, o)
	return o
}

// publishing begins the span of a Publish call; end ends it and counts.
func (m *metrics) publishing(ctx context.Context, topic string, msgs []queue.Message) (_ context.Context, end func(error)) {
	start := time.Now()
	ctx, span := m.tracer.Start(ctx, "publish "+topic, trace.WithSpanKind(trace.SpanKindProducer))
	if span.IsRecording() {
		span.SetAttributes(
			attribute.String("messaging.system", "rabbitmq"),
			attribute.String("messaging.operation.name", "publish"),
			attribute.String("messaging.operation.type", "send"),
			attribute.String("messaging.destination.name", m.exchange+":"+topic),
			attribute.String("messaging.rabbitmq.destination.routing_key", topic),
		)
		if len(msgs) == 1 {
			span.SetAttributes(attribute.String("messaging.message.id", msgs[0].ID), attribute.Int("messaging.message.body.size", len(msgs[0].Body)))
		} else {
			span.SetAttributes(attribute.Int("messaging.batch.message_count", len(msgs)))
		}
	}
	return ctx, func(err error) {
		to := m.destination(topic)
		m.duration.Record(ctx, time.Since(start).Seconds(), to)
		failed := 0
		if err != nil {
			failed = len(msgs)
			if pe, ok := errors.AsType[*queue.PublishError](err); ok {
				failed = len(pe.Failed)
			}
			kind := kindOf(err)
			m.sent.Add(ctx, int64(failed), to, metric.WithAttributes(attribute.String("error.type", kind)))
			span.RecordError(err)
			span.SetStatus(codes.Error, strconv.Itoa(failed)+" messages: "+kind)
		}
		if failed < len(msgs) {
			m.sent.Add(ctx, int64(len(msgs)-failed), to)
		}
		span.End()
	}
}

// received counts a delivery that a reader was given, and makes its span, in the
// trace of the message where that has one.
func (m *metrics) received(ctx context.Context, d *delivery) {
	m.consumed.Add(ctx, 1, d.sub.consumes)
	if _, traced := d.msg.Attributes["traceparent"]; traced {
		ctx = propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier(d.msg.Attributes))
	}
	_, span := m.tracer.Start(ctx, "receive "+d.sub.topic, trace.WithSpanKind(trace.SpanKindClient), trace.WithTimestamp(d.came))
	d.describe(span, "receive", "receive")
	span.End()
}

// settling begins the span of an ack or nack, in the trace of the caller; end
// ends it.
func (m *metrics) settling(ctx context.Context, d *delivery, operation string) (_ context.Context, end func(error) error) {
	ctx, span := m.tracer.Start(ctx, operation+" "+d.sub.topic, trace.WithSpanKind(trace.SpanKindClient))
	d.describe(span, operation, "settle")
	return ctx, func(err error) error {
		if err != nil {
			span.RecordError(err)
			span.SetStatus(codes.Error, kindOf(err))
		}
		span.End()
		return err
	}
}

// describe sets the attributes of a delivery's span.
func (d *delivery) describe(span trace.Span, operation, kind string) {
	if !span.IsRecording() {
		return
	}
	span.SetAttributes(
		attribute.String("messaging.system", "rabbitmq"),
		attribute.String("messaging.operation.name", operation),
		attribute.String("messaging.operation.type", kind),
		attribute.String("messaging.destination.name", d.exchange+":"+d.key+":"+d.feed.queue),
		attribute.String("messaging.rabbitmq.destination.routing_key", d.key),
		attribute.Int64("messaging.rabbitmq.message.delivery_tag", int64(d.tag)), //nolint:gosec // counted from 1 per channel
		attribute.String("messaging.consumer.group.name", d.sub.group),
		attribute.String("messaging.message.id", d.msg.ID),
		attribute.Int("messaging.message.body.size", len(d.msg.Body)),
		attribute.Int("solstice.queue.attempt", d.attempt),
	)
}

// consumption is the attribute set of what a reader consumes.
func consumption(topic, group string) metric.MeasurementOption {
	attrs := []attribute.KeyValue{
		attribute.String("messaging.system", "rabbitmq"),
		attribute.String("messaging.operation.name", "receive"),
		attribute.String("messaging.destination.name", topic),
	}
	if group != "" {
		attrs = append(attrs, attribute.String("messaging.consumer.group.name", group))
	}
	return metric.WithAttributeSet(attribute.NewSet(attrs...))
}

// kindOf names a failure for metrics.
func kindOf(err error) string {
	for _, k := range []struct {
		is   error
		name string
	}{
		{context.Canceled, "cancelled"},
		{context.DeadlineExceeded, "timeout"},
		{queue.ErrClosed, "closed"},
		{ErrConnectionLost, "connection_lost"},
		{ErrRejected, "rejected"},
		{ErrUnroutable, "unroutable"},
	} {
		if errors.Is(err, k.is) {
			return k.name
		}
	}
	return "_OTHER"
}
