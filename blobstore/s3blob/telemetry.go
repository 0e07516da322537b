package s3blob

import (
	"context"
	"errors"
	"strings"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/solstice-ci/solstice-go/blobstore"
)

type telemetry struct {
	tracer   trace.Tracer
	duration metric.Float64Histogram
	bytes    metric.Int64Counter
	retries  metric.Int64Counter
}

func newTelemetry(o Options) (*telemetry, error) {
	const name = "github.com/solstice-ci/solstice-go/blobstore/s3blob"
	tp, mp := o.TracerProvider, o.MeterProvider
	if tp == nil {
		tp = otel.GetTracerProvider()
	}
	if mp == nil {
		mp = otel.GetMeterProvider()
	}
	t := &telemetry{tracer: tp.Tracer(name)}
	m := mp.Meter(name)
	var errs [3]error
	t.duration, errs[0] = m.Float64Histogram("solstice.blob.duration", metric.WithUnit("s"), metric.WithDescription("time of an operation on the blob store, by op and outcome"))
	t.bytes, errs[1] = m.Int64Counter("solstice.blob.bytes", metric.WithUnit("By"), metric.WithDescription("bytes stored in and read from the blob store, by op"))
	t.retries, errs[2] = m.Int64Counter("solstice.blob.retries", metric.WithDescription("requests to the blob store that were repeated, by op"))
	return t, errors.Join(errs[:]...)
}

func (t *telemetry) begin(ctx context.Context, c *call) (context.Context, trace.Span) {
	ctx, span := t.tracer.Start(ctx, "s3blob."+strings.ToUpper(c.op[:1])+c.op[1:], trace.WithSpanKind(trace.SpanKindClient))
	if span.IsRecording() {
		span.SetAttributes(attribute.String("s3.bucket", c.s.o.Bucket), attribute.String("s3.key", c.key))
	}
	return ctx, span
}

func (t *telemetry) end(c *call, err error) {
	outcome := "ok"
	switch {
	case err == nil:
	case errors.Is(err, blobstore.ErrNotFound):
		outcome = "not_found"
	case errors.Is(err, blobstore.ErrExists):
		outcome = "exists"
	case c.parent.Err() != nil:
		outcome = "cancelled"
	default:
		outcome = "error"
		c.span.RecordError(err)
		c.span.SetStatus(codes.Error, "operation failed")
	}
	if c.span.IsRecording() {
		c.span.SetAttributes(attribute.Int64("size", c.size), attribute.String("outcome", outcome))
	}
	c.span.End()
	ctx := context.WithoutCancel(c.parent)
	op := attribute.String("op", c.op)
	t.duration.Record(ctx, time.Since(c.start).Seconds(), metric.WithAttributes(op, attribute.String("outcome", outcome)))
	if c.size > 0 {
		t.bytes.Add(ctx, c.size, metric.WithAttributes(op))
	}
}

func (t *telemetry) retry(c *call, attempt int, err error) {
	c.s.o.Logger.DebugContext(c.ctx, "s3blob: again", "op", c.op, "key", c.key, "attempt", attempt, "error", err)
	c.span.AddEvent("again", trace.WithAttributes(attribute.Int("attempt", attempt), attribute.String("error", err.Error())))
	t.retries.Add(c.ctx, 1, metric.WithAttributes(attribute.String("op", c.op)))
}
