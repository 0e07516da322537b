package queue

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"runtime/debug"
	"sync"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

const instrumentation = "github.com/solstice-ci/solstice-go/queue"

// settleTimeout bounds a settlement: it outlives the context of Run.
const settleTimeout = 10 * time.Second

// Consumer receives the messages of one topic and calls Handler for each. Fill
// in Queue, Topic and Handler; every other field has a default. It must not be
// changed or copied once Run was called.
//
// What the handler returns decides what becomes of a message of a group: nil
// acks it, [RetryAfter] delivers it again after that time, [Discard]
// dead-letters it, any other error delivers it again after Backoff. A panic is
// logged with its stack and costs one delivery. Messages of a broadcast are
// never delivered twice, whatever the handler returns.
//
// Each message has a consumer span "process TOPIC" below the trace that
// [Inject] put into it, with the attributes of OTel's messaging conventions
// (https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/).
// Metrics: the counters solstice.queue.handled and solstice.queue.failed (by
// outcome) and the histogram messaging.process.duration in seconds, each by
// destination and group.
type Consumer struct {
	Queue Queue
	Topic string
	// Group of competing consumers; empty hears the broadcast.
	Group string
	// Handler gets one message; its context carries the span and is cancelled
	// Grace after Run's.
	Handler func(ctx context.Context, m Message) error
	// Concurrency is how many handlers run at once; 0 means 1. The consumer
	// holds no further messages than these.
	Concurrency int
	// MaxAttempts as in SubscribeOptions.
	MaxAttempts int
	// Backoff is the delay before the delivery after the given one, counted
	// from 1. Nil: 1 s doubled per attempt up to 5 minutes, of which a random
	// fifth is left out.
	Backoff func(attempt int) time.Duration
	// Grace is how long handlers go on after Run's context ended, before
	// theirs is cancelled; 0 means 10 s, negative means not at all.
	Grace time.Duration
	// System is messaging.system of spans and metrics; empty means solstice.
	System string
	// Logger: nil discards.
	Logger *slog.Logger
	// TracerProvider and MeterProvider: nil means OTel's global one.
	TracerProvider trace.TracerProvider
	MeterProvider  metric.MeterProvider
}

type retryError struct {
	delay time.Duration
	err   error
}

func (e *retryError) Error() string { return fmt.Sprintf("retry after %v: %v", e.delay, e.err) }
func (e *retryError) Unwrap() error { return e.err }

type discardError struct{ err error }

func (e *discardError) Error() string { return fmt.Sprintf("discard: %v", e.err) }
func (e *discardError) Unwrap() error { return e.err }

// RetryAfter is what a handler returns to get the message again after d,
// because of err.
func RetryAfter(d time.Duration, err error) error { return &retryError{max(d, 0), err} }

// Discard is what a handler returns to have the message dead-lettered, with
// err as the reason.
func Discard(err error) error { return &discardError{err} }

// Inject puts the trace context of ctx into m's attributes (W3C Trace Context,
// https://www.w3.org/TR/trace-context/). The attributes are copied first.
func Inject(ctx context.Context, m *Message) {
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	if len(carrier) == 0 {
		return
	}
	attributes := make(map[string]string, len(m.Attributes)+len(carrier))
	maps.Copy(attributes, m.Attributes)
	maps.Copy(attributes, carrier)
	m.Attributes = attributes
}

// Run subscribes and handles messages until ctx ends. It returns nil once every
// handler under way has returned and its message is settled. A handler that
// ignores the end of its own context is waited for at most another Grace; then
// its message is given back and the error says so. Without an end of ctx Run
// returns only when the queue fails, with that error.
func (c *Consumer) Run(ctx context.Context) error {
	if c.Queue == nil || c.Handler == nil {
		return fmt.Errorf("%w: a consumer needs a queue and a handler", ErrInvalid)
	}
	r, err := newRunner(c)
	if err != nil {
		return err
	}
	sub, err := c.Queue.Subscribe(ctx, c.Topic, SubscribeOptions{Group: c.Group, Prefetch: r.concurrency, MaxAttempts: c.MaxAttempts})
	if err != nil {
		if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
			return nil
		}
		return fmt.Errorf("subscribe to %s: %w", c.Topic, err)
	}

	next, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	hctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var wg sync.WaitGroup
	for range r.concurrency {
		wg.Go(func() {
			if err := r.loop(next, hctx, sub); err != nil {
				stop(err)
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()

	<-next.Done()
	abandoned := !waitFor(done, r.grace)
	if abandoned {
		cancel()
		abandoned = !waitFor(done, max(r.grace, settleTimeout))
	}
	err = sub.Close()
	if cause := context.Cause(next); ctx.Err() == nil {
		err = cause
	} else if abandoned {
		err = fmt.Errorf("queue: a handler of %s did not return when its context ended: %w", c.Topic, context.DeadlineExceeded)
	}
	return err
}

func waitFor(done <-chan struct{}, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-done:
		return true
	case <-t.C:
		return false
	}
}

// runner is a consumer with its defaults filled in.
type runner struct {
	*Consumer
	concurrency int
	grace       time.Duration
	log         *slog.Logger
	tracer      trace.Tracer
	attrs       attribute.Set
	handled     metric.Int64Counter
	failed      metric.Int64Counter
	duration    metric.Float64Histogram
}

func newRunner(c *Consumer) (*runner, error) {
	r := &runner{Consumer: c, concurrency: max(c.Concurrency, 1), grace: c.Grace, log: c.Logger}
	if r.grace == 0 {
		r.grace = 10 * time.Second
	}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	r.log = r.log.With("topic", c.Topic, "group", c.Group)
	tp, mp, system := c.TracerProvider, c.MeterProvider, c.System
	if tp == nil {
		tp = otel.GetTracerProvider()
	}
	if mp == nil {
		mp = otel.GetMeterProvider()
	}
	if system == "" {
		system = "solstice"
	}
	r.tracer = tp.Tracer(instrumentation)
	r.attrs = attribute.NewSet(
		attribute.String("messaging.system", system),
		attribute.String("messaging.destination.name", c.Topic),
		attribute.String("messaging.consumer.group.name", c.Group),
		attribute.String("messaging.operation.name", "process"),
		attribute.String("messaging.operation.type", "process"),
	)
	m := mp.Meter(instrumentation)
	var errs [3]error
	r.handled, errs[0] = m.Int64Counter("solstice.queue.handled", metric.WithUnit("{message}"),
		metric.WithDescription("Messages handled with success."))
	r.failed, errs[1] = m.Int64Counter("solstice.queue.failed", metric.WithUnit("{message}"),
		metric.WithDescription("Messages whose handler failed, by outcome: retry, discard or panic."))
	r.duration, errs[2] = m.Float64Histogram("messaging.process.duration", metric.WithUnit("s"),
		metric.WithDescription("Time spent in handlers."),
		metric.WithExplicitBucketBoundaries(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60))
	return r, errors.Join(errs[:]...)
}

// loop is one worker: it returns nil when next ends and the queue's error
// otherwise.
func (r *runner) loop(next, hctx context.Context, sub Subscription) error {
	for {
		d, err := sub.Next(next)
		switch {
		case err == nil:
		case next.Err() != nil:
			return nil //nolint:nilerr // the end was asked for: what Next says about it is no failure
		default:
			return fmt.Errorf("receive from %s: %w", r.Topic, err)
		}
		r.handle(hctx, d)
	}
}

func (r *runner) handle(ctx context.Context, d Delivery) {
	m := d.Message()
	ctx = propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier(m.Attributes))
	ctx, span := r.tracer.Start(ctx, "process "+r.Topic, trace.WithSpanKind(trace.SpanKindConsumer),
		trace.WithAttributes(r.attrs.ToSlice()...),
		trace.WithAttributes(
			attribute.String("messaging.message.id", m.ID),
			attribute.Int("messaging.message.body.size", len(m.Body)),
			attribute.Int("solstice.queue.attempt", d.Attempt())))
	defer span.End()
	start := time.Now()
	outcome, err := r.call(ctx, m)
	byDestination := metric.WithAttributeSet(r.attrs)
	r.duration.Record(ctx, time.Since(start).Seconds(), byDestination)
	if err == nil {
		r.handled.Add(ctx, 1, byDestination)
	} else {
		r.failed.Add(ctx, 1, byDestination, metric.WithAttributes(attribute.String("outcome", outcome)))
		span.RecordError(err)
		span.SetStatus(codes.Error, outcome)
		r.log.WarnContext(ctx, "message not handled", "message_id", m.ID, "attempt", d.Attempt(), "outcome", outcome, "error", err)
	}
	sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	if serr := r.settle(sctx, d, err); serr != nil {
		span.RecordError(serr)
		r.log.ErrorContext(ctx, "message not settled", "message_id", m.ID, "attempt", d.Attempt(), "error", serr)
	}
}

// call runs the handler and names the outcome of an error.
func (r *runner) call(ctx context.Context, m Message) (outcome string, err error) {
	defer func() {
		if p := recover(); p != nil {
			r.log.ErrorContext(ctx, "handler panicked", "message_id", m.ID, "panic", p, "stack", string(debug.Stack()))
			outcome, err = "panic", fmt.Errorf("handler panicked: %v", p)
		}
	}()
	err = r.Handler(ctx, m)
	if _, ok := errors.AsType[*discardError](err); ok {
		return "discard", err
	}
	return "retry", err
}

func (r *runner) settle(ctx context.Context, d Delivery, err error) error {
	if err == nil {
		return d.Ack(ctx)
	}
	if e, ok := errors.AsType[*discardError](err); ok {
		return d.Nack(ctx, NackOptions{DeadLetter: true, Reason: fmt.Sprint(e.err)})
	}
	o := NackOptions{Reason: err.Error()}
	if e, ok := errors.AsType[*retryError](err); ok {
		o.Delay, o.Reason = e.delay, fmt.Sprint(e.err)
	} else if r.Backoff != nil {
		o.Delay = r.Backoff(d.Attempt())
	} else {
		o.Delay = defaultBackoff(d.Attempt())
	}
	return d.Nack(ctx, o)
}

func defaultBackoff(attempt int) time.Duration {
	d := min(time.Second<<min(max(attempt, 1)-1, 9), 5*time.Minute)
	return d - rand.N(d/5)
}
