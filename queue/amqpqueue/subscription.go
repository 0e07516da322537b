package amqpqueue

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/solstice-ci/solstice-go/queue"
)

// hold is how long settlements wait for a call of Next, and how long the broker
// may go on sending for calls that gave up.
const hold = 20 * time.Millisecond

// A quorum queue that elects its leader while a consumer subscribes may count
// messages as sent that never were (seen with RabbitMQ 3.10.8), and they stay
// with the consumer until its channel ends. So a channel on which nothing came for
// firstDoubt is replaced, the next one after twice the time, and so on.
const (
	firstDoubt = 5 * time.Second
	lastDoubt  = 5 * time.Minute
)

// errDoubt ends a channel that is replaced.
var errDoubt = errors.New("amqpqueue: nothing came")

// subscription reads a group's queue.
//
// The broker is asked for as many messages as calls of Next wait, never more:
// what it has sent to one reader it cannot give to another. A consumer with a
// prefetch of n lets the broker send n messages, and a further one for each
// that is settled; together that is the credit, kept equal to the number of
// waiting calls. A settlement for whose credit there is no such call is held
// back: the next call releases it, which is all that happens in a loop of Next
// and Ack. Calls that find no credit start a consumer for what is missing. When
// a settlement was held for too long, or there has been credit and no call, all
// consumers are cancelled and what was held is sent.
type subscription struct {
	*reader
	o      queue.SubscribeOptions
	kick   chan struct{} // capacity 1: serve has something to do
	timer  *time.Timer
	served *session      // serve's: the latest
	doubt  time.Duration // serve's: how long nothing may come

	mu      sync.Mutex
	feed    *feed // nil while there is none
	waiters []*waiter
	idle    time.Time // since when there are none
	out     int       // handed out and not settled
	surplus []*delivery
	held    []settlement
	armed   bool // the timer runs
}

// feed is what a subscription has of one channel. It ends with the channel, and
// with it the claim to all deliveries. Guarded by subscription.mu.
type feed struct {
	ses       *session
	ch        *amqp.Channel
	queue     string
	ended     bool
	consumers map[*consumer]struct{}
	serial    int
	credit    int       // what the broker may send now
	growing   int       // what it is being asked for
	moving    int       // deliveries that go elsewhere, whose credit will be back
	latest    time.Time // when something came, or the channel was opened
	came      bool
	broken    chan struct{} // capacity 1: the broker cancelled a consumer
	work      sync.WaitGroup
}

type consumer struct {
	tag       string
	prefetch  int
	unsettled int
	leaving   bool          // it is being cancelled, by us
	cancelled bool          // and sends no more
	drained   chan struct{} // all its deliveries arrived
}

type waiter struct{ got chan *delivery }

type settlement struct {
	d       *delivery
	requeue bool
	since   time.Time
}

func newSubscription(r *reader, o queue.SubscribeOptions) *subscription {
	s := &subscription{reader: r, o: o, kick: make(chan struct{}, 1), idle: time.Now()}
	s.timer = time.AfterFunc(time.Hour, s.due)
	s.timer.Stop()
	return s
}

func (s *subscription) wake() {
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

func (s *subscription) due() {
	s.mu.Lock()
	s.armed = false
	s.mu.Unlock()
	s.wake()
}

// Next implements queue.Subscription.
func (s *subscription) Next(ctx context.Context) (queue.Delivery, error) {
	d, err := s.next(ctx)
	if err != nil {
		return nil, err
	}
	s.q.m.received(ctx, d)
	return d, nil
}

func (s *subscription) next(ctx context.Context) (*delivery, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	if s.ctx.Err() != nil {
		s.mu.Unlock()
		return nil, errClosed
	}
	if len(s.surplus) > 0 && s.out < s.o.Prefetch {
		d := s.surplus[0]
		s.surplus = s.surplus[1:]
		s.out++
		s.settled()
		s.mu.Unlock()
		return d, nil
	}
	w := &waiter{got: make(chan *delivery, 1)}
	s.waiters = append(s.waiters, w)
	s.balance()
	s.mu.Unlock()
	select {
	case d := <-w.got:
		return d, nil
	case <-s.ctx.Done():
		return s.abandon(w, errClosed)
	case <-ctx.Done():
		return s.abandon(w, ctx.Err())
	}
}

// abandon ends a wait; a delivery that came in the same moment wins.
func (s *subscription) abandon(w *waiter, err error) (*delivery, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, x := range s.waiters {
		if x == w {
			s.waiters = append(s.waiters[:i], s.waiters[i+1:]...)
			s.settled()
			return nil, err
		}
	}
	if d := <-w.got; s.ctx.Err() == nil {
		return d, nil
	}
	return nil, err // given back with everything else
}

// missing is the credit that waiting calls lack. The caller holds s.mu.
func (s *subscription) missing() int {
	f := s.feed
	return min(len(s.waiters), s.o.Prefetch-s.out) - f.credit - f.growing - f.moving
}

// balance sees to it that waiting calls have credit. The caller holds s.mu.
func (s *subscription) balance() {
	if s.feed == nil {
		return
	}
	for len(s.held) > 0 && s.missing() > 0 {
		s.release()
	}
	if s.missing() > 0 {
		s.wake()
	}
	s.settled()
}

// settled has run look again where something should not last. The caller holds
// s.mu.
func (s *subscription) settled() {
	if len(s.waiters) > 0 {
		s.idle = time.Time{}
	} else if s.idle.IsZero() {
		s.idle = time.Now()
	}
	if !s.armed && s.feed != nil && (len(s.held) > 0 || s.wasteful()) {
		s.armed = true
		s.timer.Reset(hold)
	}
}

// wasteful says that this reader keeps messages from others and nobody asks for
// them. The caller holds s.mu.
func (s *subscription) wasteful() bool {
	return len(s.waiters) == 0 && (s.feed.credit > 0 || len(s.surplus) > 0)
}

// release sends the oldest settlement that was held back. The caller holds s.mu.
func (s *subscription) release() {
	x := s.held[0]
	s.held = s.held[1:]
	if len(s.held) == 0 {
		s.held = nil
	}
	s.send(x.d, x.requeue)
}

// send tells the broker about a delivery. It does not block, see transport; a
// failure ends the channel, and the message is delivered again. The caller
// holds s.mu.
func (s *subscription) send(d *delivery, requeue bool) {
	f := d.feed
	if f.ended {
		return
	}
	if requeue {
		_ = f.ch.Nack(d.tag, false, true)
	} else {
		_ = f.ch.Ack(d.tag, false)
	}
	d.from.unsettled--
	if !d.from.cancelled {
		f.credit++
	}
}

// serve reads through one channel until that ends, or the subscription does.
func (s *subscription) serve(ses *session) error {
	name, err := s.q.enter(s.ctx, ses, s.topic, s.group)
	if err != nil {
		return err
	}
	ch, err := ses.channel(s.ctx)
	if err != nil {
		return err
	}
	if s.served != ses {
		s.served, s.doubt = ses, firstDoubt
	}
	closes := ch.NotifyClose(make(chan *amqp.Error, 1))
	f := &feed{latest: time.Now(), ses: ses, ch: ch, queue: name, consumers: map[*consumer]struct{}{}, broken: make(chan struct{}, 1)}
	s.mu.Lock()
	s.feed = f
	s.balance()
	s.mu.Unlock()
	defer s.end(f)
	s.begin(nil)
	silence := time.NewTimer(s.doubt)
	defer silence.Stop()
	for {
		var err error
		select {
		case err := <-closes:
			if err == nil {
				err = amqp.ErrClosed
			}
			return ses.lost(err)
		case <-s.ctx.Done():
			return s.wind(f)
		case <-f.broken:
			// The channel remembers the queue, which does no good to its namesake.
			s.doubt = firstDoubt
			return fmt.Errorf("%w: queue deleted", ErrConnectionLost)
		case <-silence.C:
			if s.doubtful(f) {
				return errDoubt
			}
			silence.Reset(s.doubt)
		case <-s.kick:
			err = s.adjust(f)
		}
		if err != nil {
			return ses.lost(err)
		}
	}
}

// doubtful says that nothing came for long while somebody waited, and that
// nothing is in hand that would be delivered again if the channel ended.
func (s *subscription) doubtful(f *feed) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.waiters) == 0 || s.out+len(s.surplus)+len(s.held)+f.moving > 0 {
		return false
	}
	return f.credit > 0 && time.Since(f.latest) >= s.doubt
}

// wind gives back what the subscription holds.
func (s *subscription) wind(f *feed) error {
	if err := s.cancelAll(f); err != nil {
		return err
	}
	f.work.Wait()
	return nil
}

// end drops the claim to what came through the channel, and closes it.
func (s *subscription) end(f *feed) {
	s.mu.Lock()
	for len(s.held) > 0 {
		s.release()
	}
	f.ended = true
	s.feed = nil
	s.out = 0
	s.surplus = nil
	if s.doubt = min(2*s.doubt, lastDoubt); f.came {
		s.doubt = firstDoubt
	}
	s.mu.Unlock()
	_ = f.ch.Close() // where the broker does not answer, until the session ends
}

// adjust does what needs answers of the broker.
func (s *subscription) adjust(f *feed) error {
	s.mu.Lock()
	now := time.Now()
	stale := len(s.held) > 0 && now.Sub(s.held[0].since) >= hold
	idle := s.wasteful() && now.Sub(s.idle) >= hold
	if !stale && !idle {
		s.settled() // the timer again, where it was early
	}
	s.mu.Unlock()
	if stale || idle {
		if err := s.cancelAll(f); err != nil {
			return err
		}
	}
	return s.grow(f)
}

// grow starts a consumer for calls without credit.
func (s *subscription) grow(f *feed) error {
	s.mu.Lock()
	n := min(s.missing(), math.MaxUint16)
	if n <= 0 {
		s.mu.Unlock()
		return nil
	}
	f.growing += n
	f.serial++
	c := &consumer{tag: strconv.Itoa(f.serial), prefetch: n, drained: make(chan struct{})}
	s.mu.Unlock()
	err := f.ch.Qos(n, 0, false)
	var deliveries <-chan amqp.Delivery
	if err == nil {
		deliveries, err = f.ch.Consume(f.queue, c.tag, false, false, false, false, nil)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f.growing -= n
	if err != nil {
		return err
	}
	f.credit += n
	f.consumers[c] = struct{}{}
	f.ses.spawn(func() {
		for d := range deliveries {
			s.arrive(f, c, &d)
		}
		close(c.drained)
		s.mu.Lock()
		defer s.mu.Unlock()
		if !c.leaving && !f.ended {
			s.forget(f, c)
			select {
			case f.broken <- struct{}{}:
			default:
			}
		}
	})
	s.settled() // whoever asked for it may have gone
	return nil
}

// forget takes the credit of a consumer that is no more. The caller holds s.mu.
func (s *subscription) forget(f *feed, c *consumer) {
	c.cancelled = true
	f.credit -= c.prefetch - c.unsettled
	delete(f.consumers, c)
}

// cancelAll ends all consumers, sends the settlements that were held back, and
// gives back deliveries that nobody asks for.
func (s *subscription) cancelAll(f *feed) error {
	s.mu.Lock()
	var all []*consumer
	for c := range f.consumers {
		c.leaving = true
		all = append(all, c)
	}
	s.mu.Unlock()
	for _, c := range all {
		if err := f.ch.Cancel(c.tag, false); err != nil {
			return err
		}
		select {
		case <-c.drained:
		case <-f.ses.ctx.Done():
			return context.Cause(f.ses.ctx)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range all {
		if !c.cancelled {
			s.forget(f, c)
		}
	}
	for len(s.held) > 0 {
		s.release()
	}
	for len(s.surplus) > 0 && len(s.waiters) > 0 {
		d := s.surplus[0]
		s.surplus = s.surplus[1:]
		s.hand(d)
	}
	for _, d := range s.surplus {
		s.move(d, outgoing{
			exchange: s.q.o.Exchange, key: toGroup(s.topic, s.group), declare: s.redeclare(f.ses),
			msg: encode(&d.msg, amqp.Table{headerAttempt: int64(d.attempt - 1)}),
		})
	}
	s.surplus = nil
	return nil
}
