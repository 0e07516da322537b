package amqpqueue

import (
	"cmp"
	"context"
	"fmt"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/solstice-ci/solstice-go/queue"
)

// moveRetry is how long a message rests that could not be moved elsewhere.
const moveRetry = time.Second

type delivery struct {
	sub     *subscription
	feed    *feed
	from    *consumer
	tag     uint64
	msg     queue.Message
	attempt int
	settled bool // guarded by subscription.mu

	exchange, key string // it came through, for spans
	came          time.Time
}

// arrive takes a delivery from the broker: to a call that waits for it, or, when
// it is not to be delivered, elsewhere.
func (s *subscription) arrive(f *feed, c *consumer, in *amqp.Delivery) {
	d := &delivery{sub: s, feed: f, from: c, tag: in.DeliveryTag, msg: decode(in), attempt: attempt(in), exchange: in.Exchange, key: in.RoutingKey, came: time.Now()}
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.ended {
		return
	}
	c.unsettled++
	f.latest, f.came = d.came, true
	if !c.cancelled {
		f.credit--
	}
	switch rest := time.Until(d.msg.NotBefore); {
	case d.attempt > s.o.MaxAttempts:
		s.move(d, s.burial(d, fmt.Sprintf("delivered %d times without being settled", d.attempt-1), d.attempt-1))
	case !d.msg.NotBefore.IsZero() && rest > accuracy/2:
		s.postpone(d, rest)
	case len(s.waiters) > 0 && s.out < s.o.Prefetch:
		s.hand(d)
	default:
		s.surplus = append(s.surplus, d)
	}
	s.settled()
}

// hand gives a delivery to the call that waits longest. The caller holds s.mu.
func (s *subscription) hand(d *delivery) {
	w := s.waiters[0]
	s.waiters[0] = nil
	if s.waiters = s.waiters[1:]; len(s.waiters) == 0 {
		s.waiters = nil
	}
	s.out++
	w.got <- d
}

// burial is the message of d as a dead letter.
func (s *subscription) burial(d *delivery, reason string, attempts int) outgoing {
	return outgoing{
		exchange: s.q.deadExchange(), key: d.feed.queue, declare: s.redeclare(d.feed.ses),
		msg: encode(&d.msg, letterHeaders(reason, attempts)),
	}
}

// move publishes what became of a delivery, and settles it. The caller holds
// s.mu.
func (s *subscription) move(d *delivery, o outgoing) {
	o.patient = true
	s.moving(d, func(ctx context.Context) error { return d.feed.ses.insist(ctx, &o) })
}

// postpone sends a message that is not due yet through another tier. The caller
// holds s.mu.
func (s *subscription) postpone(d *delivery, rest time.Duration) {
	s.moving(d, func(ctx context.Context) error {
		return s.delay(ctx, d, rest, d.attempt-1)
	})
}

func (s *subscription) moving(d *delivery, publish func(ctx context.Context) error) {
	f := d.feed
	f.moving++
	f.work.Add(1)
	ok := f.ses.spawn(func() {
		defer f.work.Done()
		err := publish(f.ses.ctx)
		if err != nil {
			s.q.log.Warn("amqpqueue: message not moved, it will be delivered again", "queue", f.queue, "message_id", d.msg.ID, "error", err)
			select {
			case <-time.After(moveRetry):
			case <-s.ctx.Done():
			case <-f.ses.ctx.Done():
			}
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		f.moving--
		s.send(d, err != nil)
		if s.feed == f {
			s.balance()
		}
	})
	if !ok {
		f.work.Done() // the channel has ended, too
	}
}

// delay publishes d's message so that it comes to the group after a time.
func (s *subscription) delay(ctx context.Context, d *delivery, after time.Duration, attempts int) error {
	ses := d.feed.ses
	o, err := s.q.delayed(ctx, ses, after, toGroup(s.topic, s.group), encode(&d.msg, amqp.Table{
		headerAttempt: int64(attempts), headerNotBefore: time.Now().Add(after).UnixMicro(),
	}))
	if err != nil {
		return err
	}
	return ses.insist(ctx, &o)
}

// redeclare makes the group's queues again.
func (s *subscription) redeclare(ses *session) func(ctx context.Context) error {
	return func(ctx context.Context) error {
		_, err := s.q.enter(ctx, ses, s.topic, s.group)
		return err
	}
}

// Message implements queue.Delivery.
func (d *delivery) Message() queue.Message { return d.msg }

// Attempt implements queue.Delivery.
func (d *delivery) Attempt() int { return d.attempt }

// Ack implements queue.Delivery. It does not wait for the broker, which does not
// answer; see the package's documentation.
func (d *delivery) Ack(ctx context.Context) error {
	if err := d.take(ctx); err != nil {
		return err
	}
	_, end := d.sub.q.m.settling(ctx, d, "ack")
	return end(d.settle(false))
}

// Nack implements queue.Delivery. When a message with a delay, or a dead letter,
// could not be published, it is delivered again at once.
func (d *delivery) Nack(ctx context.Context, o queue.NackOptions) error {
	if err := d.take(ctx); err != nil {
		return err
	}
	ctx, end := d.sub.q.m.settling(ctx, d, "nack")
	return end(d.refuse(ctx, o))
}

func (d *delivery) refuse(ctx context.Context, o queue.NackOptions) error {
	s := d.sub
	var err error
	switch {
	case o.DeadLetter, d.attempt >= s.o.MaxAttempts:
		letter := s.burial(d, cmp.Or(o.Reason, fmt.Sprintf("refused at delivery %d", d.attempt)), d.attempt)
		err = d.feed.ses.insist(ctx, &letter)
	case o.Delay > 0:
		err = s.delay(ctx, d, o.Delay, d.attempt)
	default:
		return d.settle(true)
	}
	if err == nil {
		return d.settle(false)
	}
	if serr := d.settle(true); serr != nil {
		return serr // the connection is gone, and the message delivered again anyhow
	}
	return err
}

// take makes the caller the one who settles.
func (d *delivery) take(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s := d.sub
	s.mu.Lock()
	defer s.mu.Unlock()
	if d.settled {
		return queue.ErrSettled
	}
	if d.feed.ended {
		d.settled = true
		return d.gone()
	}
	d.settled = true
	return nil
}

func (d *delivery) gone() error {
	return fmt.Errorf("%w: its channel ended, so it is delivered again", queue.ErrSettled)
}

// settle hands the outcome to the subscription.
func (d *delivery) settle(requeue bool) error {
	s := d.sub
	s.mu.Lock()
	defer s.mu.Unlock()
	if d.feed.ended {
		return d.gone()
	}
	s.out--
	s.held = append(s.held, settlement{d, requeue, time.Now()})
	s.balance()
	return nil
}
