package amqpqueue

import (
	"context"
	"crypto/rand"
	"strings"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/solstice-ci/solstice-go/queue"
)

// listener hears a broadcast.
type listener struct {
	*reader
	heard chan queue.Message
}

func newListener(r *reader) *listener {
	return &listener{reader: r, heard: make(chan queue.Message, queue.BroadcastBacklog)}
}

// Next implements queue.Subscription.
func (l *listener) Next(ctx context.Context) (queue.Delivery, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if l.ctx.Err() != nil {
		return nil, errClosed
	}
	select {
	case m := <-l.heard:
		l.q.m.consumed.Add(ctx, 1, l.consumes)
		return heard{m}, nil
	case <-l.ctx.Done():
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

// serve listens on one channel until that ends, or the listener does.
func (l *listener) serve(ses *session) error {
	if err := l.q.hear(l.ctx, ses, l.topic); err != nil {
		return err
	}
	ch, err := ses.channel(l.ctx)
	if err != nil {
		return err
	}
	type result struct {
		in  <-chan amqp.Delivery
		err error
	}
	done, leave, left := make(chan result, 1), make(chan struct{}), make(chan struct{})
	ses.spawn(func() {
		in, err := l.listen(ch)
		done <- result{in, err}
		<-leave
		_ = ch.Close() // its queue goes with it
		close(left)
	})
	defer func() {
		close(leave)
		select {
		case <-left:
		case <-ses.ctx.Done():
		}
	}()
	var in <-chan amqp.Delivery
	select {
	case r := <-done:
		if r.err != nil {
			return ses.lost(classify(r.err))
		}
		in = r.in
	case <-l.ctx.Done():
		return errClosed
	case <-ses.ctx.Done():
		return context.Cause(ses.ctx)
	}
	l.begin(nil)
	for {
		select {
		case d, ok := <-in:
			if !ok { // the channel ended, or the queue was deleted
				return ses.lost(amqp.ErrClosed)
			}
			l.hear(decode(&d))
		case <-l.ctx.Done():
			return errClosed
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
