package solstice

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/solstice-ci/solstice-go/internal/store"
)

// traceJob emits a job's spans once it is over: the phases of its life come
// from the rows, so they are whole even if several engines had the job. The
// trace is the run's, in which the steps' own programs go on by TRACEPARENT. What
// an engine does for a machine, from machine.create to machine.destroy, is in
// it as it happens.
func (e *Engine) traceJob(run *store.Run, j *store.Job) {
	if j.CopiedFrom != "" || run == nil {
		return
	}
	ctx := withTraceParent(context.Background(), run.Trace)
	ctx, span := e.tracer.Start(ctx, "job", trace.WithTimestamp(spanTime(j.QueuedAt, run.CreatedAt)), trace.WithAttributes(
		attribute.String("run_id", run.ID), attribute.String("job_id", j.ID), attribute.String("job", j.Name),
		attribute.String("label", j.Label), attribute.String("state", string(j.State)), attribute.String("class", j.Class),
	))
	if !span.IsRecording() {
		span.End()
		return
	}
	e.background(func() {
		if j.State != store.JobSucceeded && j.State != store.JobSkipped {
			span.SetStatus(codes.Error, j.Reason)
		}
		defer span.End(trace.WithTimestamp(spanTime(j.FinishedAt, 0)))
		if err := e.tracePhases(ctx, j); err != nil {
			e.log.WarnContext(ctx, "phases of a job not traced", "job_id", j.ID, "error", err)
		}
	})
}

func (e *Engine) tracePhases(ctx context.Context, j *store.Job) error {
	phase := func(ctx context.Context, name string, from, to int64, attrs ...attribute.KeyValue) context.Context {
		if from == 0 || to < from {
			return ctx
		}
		ctx, span := e.tracer.Start(ctx, name, trace.WithTimestamp(timeOf(from)), trace.WithAttributes(attrs...))
		span.End(trace.WithTimestamp(timeOf(to)))
		return ctx
	}
	attempts, err := e.store.Attempts(ctx, j.ID)
	if err != nil {
		return err
	}
	waited := j.QueuedAt
	for _, a := range attempts {
		phase(ctx, "queued", waited, a.CreatedAt)
		waited = a.FinishedAt
		at := phase(ctx, "attempt", a.CreatedAt, a.FinishedAt, attribute.Int("attempt", a.Number), attribute.String("class", a.Class), attribute.String("machine", a.MachineID))
		if m, err := e.store.Machine(ctx, a.MachineID); err == nil && m.CreatedAt >= a.CreatedAt {
			phase(at, "boot", m.CreatedAt, m.ReadyAt)
		}
		steps, err := e.store.Steps(ctx, a.ID)
		if err != nil {
			return err
		}
		last := int64(0)
		for _, s := range steps {
			last = max(last, s.FinishedAt)
			phase(at, "step", s.StartedAt, s.FinishedAt, attribute.Int("step", s.Idx), attribute.String("step.name", s.Name), attribute.String("result", s.Result))
		}
		phase(at, "upload", last, a.FinishedAt) // of what the journal had yet to say
	}
	return nil
}

// traceEnrol notes in the run's trace that the agent of an attempt has enrolled.
func (e *Engine) traceEnrol(ctx context.Context, m *store.Machine, began time.Time) {
	if m.AttemptID == "" || !trace.SpanFromContext(ctx).IsRecording() {
		return // nobody traces, so the rows are not worth reading
	}
	a, err := e.store.Attempt(ctx, m.AttemptID)
	if err != nil {
		return // the span alone is lost
	}
	if run, err := e.store.Run(ctx, a.RunID); err == nil {
		_, span := e.tracer.Start(withTraceParent(ctx, run.Trace), "enrol", trace.WithTimestamp(began),
			trace.WithAttributes(attribute.Int("attempt", a.Number), attribute.String("machine", m.ID)))
		span.End()
	}
}

func spanTime(micros, otherwise int64) time.Time {
	if micros == 0 {
		micros = otherwise
	}
	return timeOf(micros)
}
