package amqpqueue

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cenkalti/backoff/v5"
	"go.opentelemetry.io/otel/metric"
)

// reader is what subscriptions of both kinds have in common: they begin, are
// mended, and end.
type reader struct {
	q            *Queue
	topic, group string
	consumes     metric.MeasurementOption
	ctx          context.Context // ended by Close
	cancel       context.CancelFunc
	begun        chan error    // capacity 1: nil once it reads, or why it can't
	finished     chan struct{} // everything was given back
}

func newReader(q *Queue, topic, group string) *reader {
	r := &reader{q: q, topic: topic, group: group, consumes: consumption(topic, group), begun: make(chan error, 1), finished: make(chan struct{})}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r
}

// start runs the reader, and waits until it reads. serve does so through one
// session until that, its channel or the reader ends.
func (r *reader) start(ctx context.Context, serve func(*session) error) error {
	q := r.q
	q.mu.Lock()
	if q.ctx.Err() != nil {
		q.mu.Unlock()
		r.cancel()
		return errClosed
	}
	q.readers[r] = struct{}{}
	q.mu.Unlock()
	go r.run(serve)
	var err error
	select {
	case err = <-r.begun:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		r.cancel()
	}
	return err
}

func (r *reader) run(serve func(*session) error) {
	defer func() {
		r.begin(errClosed)
		r.q.mu.Lock()
		delete(r.q.readers, r)
		r.q.mu.Unlock()
		close(r.finished)
	}()
	retry := backoff.NewExponentialBackOff()
	retry.InitialInterval, retry.MaxInterval = 50*time.Millisecond, 5*time.Second
	for {
		ses, err := r.q.session(r.ctx)
		if err != nil {
			return // closed, the one or the other
		}
		began := time.Now()
		err = serve(ses)
		if r.ctx.Err() != nil {
			return
		}
		if errors.Is(err, errDoubt) {
			continue
		}
		if errors.Is(err, ErrTopology) || errors.Is(err, ErrPermission) {
			r.begin(err) // Subscribe says so; a reader that once read goes on trying
		}
		r.resumed("interrupted", err)
		if time.Since(began) > retry.MaxInterval {
			retry.Reset()
		}
		select {
		case <-ses.ctx.Done(): // the next one is backoff enough
		case <-time.After(retry.NextBackOff()):
		case <-r.ctx.Done():
			return
		}
	}
}

// begin tells start how it began; what comes later is of no interest.
func (r *reader) begin(err error) {
	select {
	case r.begun <- err:
	default:
	}
}

// resumed notes that the reader has to begin again.
func (r *reader) resumed(why string, err error) {
	r.q.m.resubscribes.Add(r.ctx, 1, r.q.m.destination(r.topic))
	r.q.log.Warn("amqpqueue: subscription "+why, "topic", r.topic, "group", r.group, "error", err)
}

// Close implements queue.Subscription.
func (r *reader) Close() error {
	r.cancel()
	t := time.NewTimer(closeTimeout)
	defer t.Stop()
	select {
	case <-r.finished:
		return nil
	case <-r.q.ctx.Done(): // which gives everything back
		return nil
	case <-t.C:
		return fmt.Errorf("amqpqueue: unsubscribe from %s: %w", r.topic, ErrUnreachable)
	}
}
