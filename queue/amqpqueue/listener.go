package amqpqueue

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/solstice-ci/solstice-go/queue"
)

// listener hears a broadcast.
type listener struct {
	q        *Queue
	topic    string
	heard    chan queue.Message
	begun    chan error // capacity 1
	finished chan struct{}
	closed   chan struct{}
	once     sync.Once
}

func newListener(q *Queue, topic string) *listener {
	return &listener{
		q: q, topic: topic, heard: make(chan queue.Message, queue.BroadcastBacklog),
		begun: make(chan error, 1), finished: make(chan struct{}), closed: make(chan struct{}),
	}
}

// Next implements queue.Subscription.
func (l *listener) Next(ctx context.Context) (queue.Delivery, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case <-l.closed:
		return nil, errClosed
	default:
	}
	select {
	case m := <-l.heard:
		return heard{m}, nil
	case <-l.closed:
		return nil, errClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// heard is a delivery of a broadcast; it needs no settling.
type heard struct{ msg queue.Message }

func (h heard) Message() queue.Message                              { return h.msg }
func (h heard) Attempt() int                                        { return 1 }
func (h heard) Ack(ctx context.Context) error                       { return ctx.Err() }
func (h heard) Nack(ctx context.Context, _ queue.NackOptions) error { return ctx.Err() }

func (l *listener) shut()                  { l.once.Do(func() { close(l.closed) }) }
func (l *listener) ended() <-chan struct{} { return l.finished }

// Close implements queue.Subscription.
func (l *listener) Close() error {
	l.shut()
	t := time.NewTimer(closeTimeout)
	defer t.Stop()
	select {
	case <-l.finished:
		return nil
	case <-l.q.closing:
		return nil
	case <-t.C:
		return fmt.Errorf("amqpqueue: unsubscribe from %s: %w", l.topic, ErrUnreachable)
	}
}

// run listens until the listener is closed.
func (l *listener) run() {
	defer close(l.finished)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-l.closed:
			cancel()
		case <-stop:
		}
	}()
	retry := backoff.NewExponentialBackOff()
	retry.InitialInterval, retry.MaxInterval = 50*time.Millisecond, 5*time.Second
	for {
		ses, err := l.q.session(ctx)
		if err == nil {
			err = l.serve(ctx, ses, retry.Reset)
		}
		l.begin(err)
		if ctx.Err() != nil || errors.Is(err, errClosed) {
			return
		}
		l.q.m.resubscribes.Add(ctx, 1, l.q.m.destination(l.topic))
		l.q.log.Warn("amqpqueue: broadcast interrupted", "topic", l.topic, "error", err)
		select {
		case <-ses.done():
		case <-time.After(retry.NextBackOff()):
		case <-l.closed:
			return
		}
	}
}

func (l *listener) begin(err error) {
	select {
	case l.begun <- err:
	default:
	}
}

// serve listens on one channel until that ends, or the listener does.
func (l *listener) serve(ctx context.Context, ses *session, began func()) error {
	if err := l.q.hear(ctx, ses, l.topic); err != nil {
		return err
	}
	ch, err := ses.channel(ctx)
	if err != nil {
		return err
	}
	closes := ch.NotifyClose(make(chan *amqp.Error, 1))
	defer func() { ses.work.Go(func() { _ = ch.Close() }) }()
	type result struct {
		in  <-chan amqp.Delivery
		err error
	}
	done := make(chan result, 1)
	ses.work.Go(func() {
		in, err := l.listen(ch)
		done <- result{in, err}
	})
	var r result
	select {
	case r = <-done:
	case <-l.closed:
		return errClosed
	}
	if r.err != nil {
		return ses.lost(classify(r.err))
	}
	began()
	l.begin(nil)
	for {
		select {
		case d, ok := <-r.in:
			if !ok {
				return ses.lost(amqp.ErrClosed)
			}
			m := decode(&d)
			l.hear(m)
		case err := <-closes:
			if err == nil {
				err = amqp.ErrClosed
			}
			return ses.lost(err)
		case <-l.closed:
			return ch.Close() // and its queue goes
		}
	}
}

// listen makes a queue that goes with the connection or the consumer.
func (l *listener) listen(ch *amqp.Channel) (<-chan amqp.Delivery, error) {
	name := l.q.o.Prefix + "." + l.topic + ".broadcast." + strings.ToLower(rand.Text())
	_, err := ch.QueueDeclare(name, false, true, true, false, amqp.Table{
		amqp.QueueMaxLenArg: queue.BroadcastBacklog, amqp.QueueOverflowArg: amqp.QueueOverflowDropHead,
	})
	for _, key := range []string{l.topic, toHearers(l.topic)} {
		if err == nil {
			err = ch.QueueBind(name, key, l.q.o.Exchange, false, nil)
		}
	}
	if err != nil {
		return nil, err
	}
	return ch.Consume(name, "", true, true, false, false, nil)
}

// hear keeps a message, in place of the oldest where the reader lags. It has one
// caller at a time.
func (l *listener) hear(m queue.Message) {
	for {
		select {
		case l.heard <- m:
			return
		default:
		}
		select {
		case <-l.heard:
		default:
		}
	}
}
