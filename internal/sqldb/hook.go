package sqldb

import (
	"context"
	"database/sql"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/uptrace/bun"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

const (
	// logEvery is which part of the statements is logged above logBurst of them
	// in one second.
	logEvery = 100
	logBurst = 50
)

// hook traces statements below recorded spans, and logs them at debug level.
// Neither holds the statement's text: bun puts values into it.
type hook struct {
	system string
	tracer trace.Tracer
	log    *slog.Logger
	sample sampler
}

func newHook(o Options, postgres bool) *hook {
	tp := o.TracerProvider
	if tp == nil {
		tp = noop.NewTracerProvider()
	}
	h := &hook{system: "sqlite", tracer: tp.Tracer("github.com/solstice-ci/solstice-go/internal/sqldb"), log: o.Logger}
	if postgres {
		h.system = "postgresql"
	}
	return h
}

// BeforeQuery implements bun.QueryHook.
func (h *hook) BeforeQuery(ctx context.Context, e *bun.QueryEvent) context.Context {
	if !trace.SpanFromContext(ctx).IsRecording() {
		return ctx
	}
	op, table := describe(e)
	name := op
	if table != "" {
		name += " " + table
	}
	// https://opentelemetry.io/docs/specs/semconv/database/database-spans/
	ctx, span := h.tracer.Start(ctx, name, trace.WithSpanKind(trace.SpanKindClient), trace.WithAttributes(
		attribute.String("db.system.name", h.system),
		attribute.String("db.operation.name", op),
		attribute.String("db.collection.name", table),
	))
	if e.Stash == nil {
		e.Stash = map[any]any{}
	}
	e.Stash[h] = span
	return ctx
}

// AfterQuery implements bun.QueryHook.
func (h *hook) AfterQuery(ctx context.Context, e *bun.QueryEvent) {
	err := e.Err
	if errors.Is(err, sql.ErrNoRows) {
		err = nil
	}
	if span, ok := e.Stash[h].(trace.Span); ok {
		if err != nil {
			span.RecordError(err)
			span.SetStatus(codes.Error, "statement failed")
		}
		span.End()
	}
	if !h.log.Enabled(ctx, slog.LevelDebug) || !h.sample.take(e.StartTime) {
		return
	}
	op, table := describe(e)
	attrs := []slog.Attr{
		slog.String("op", op), slog.String("table", table),
		slog.Duration("took", time.Since(e.StartTime)),
	}
	if err != nil {
		attrs = append(attrs, slog.Any("err", err))
	}
	h.log.LogAttrs(ctx, slog.LevelDebug, "sql", attrs...)
}

func describe(e *bun.QueryEvent) (op, table string) {
	if e.IQuery != nil {
		table = e.IQuery.GetTableName()
	}
	return e.Operation(), table
}

// sampler lets the first logBurst statements of a second through, then one in
// logEvery. Races between seconds cost a line more or less.
type sampler struct {
	second, count atomic.Int64
}

func (s *sampler) take(t time.Time) bool {
	if now := t.Unix(); s.second.Swap(now) != now {
		s.count.Store(0)
	}
	n := s.count.Add(1)
	return n <= logBurst || n%logEvery == 0
}
