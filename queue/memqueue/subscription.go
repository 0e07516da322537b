package memqueue

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/solstice-ci/solstice-go/queue"
)

// subscription is one reader: of a group (g, hand, slots) or of the broadcast
// (heard). Its fields are guarded by the queue's mutex, except the channels.
type subscription struct {
	q      *Queue
	t      *topic
	o      queue.SubscribeOptions
	closed chan struct{}

	g     *group
	hand  map[*delivery]bool
	slots chan struct{} // a token per delivery out or awaited

	heard chan queue.Message
}

// hear buffers a broadcast, dropping the oldest when the reader lags. The
// caller holds the mutex, so it is the only sender.
func (s *subscription) hear(m queue.Message) {
	for {
		select {
		case s.heard <- m:
			return
		default:
		}
		select {
		case <-s.heard:
		default:
		}
	}
}

// Next implements queue.Subscription.
func (s *subscription) Next(ctx context.Context) (queue.Delivery, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case <-s.closed:
		return nil, queue.ErrClosed
	default:
	}
	if s.g == nil {
		select {
		case m := <-s.heard:
			return &delivery{sub: s, msg: m, attempt: 1}, nil
		case <-s.closed:
			return nil, queue.ErrClosed
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	select {
	case s.slots <- struct{}{}:
	case <-s.closed:
		return nil, queue.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	w, ok := s.wait()
	if !ok {
		return nil, queue.ErrClosed
	}
	select {
	case d, ok := <-w.got:
		if !ok {
			return nil, queue.ErrClosed
		}
		return d, nil
	case <-ctx.Done():
		return s.abandon(w, ctx.Err())
	}
}

func (s *subscription) wait() (*waiter, bool) {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	if s.isClosed() {
		return nil, false
	}
	w := &waiter{sub: s, got: make(chan *delivery, 1)}
	s.g.waiters = append(s.g.waiters, w)
	s.q.serve(s.g)
	return w, true
}

// abandon ends a wait; a delivery that came in the same moment wins.
func (s *subscription) abandon(w *waiter, err error) (queue.Delivery, error) {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	select {
	case d, ok := <-w.got:
		if ok {
			return d, nil
		}
		return nil, queue.ErrClosed
	default:
	}
	s.g.waiters = slices.DeleteFunc(s.g.waiters, func(x *waiter) bool { return x == w })
	<-s.slots
	return nil, err
}

func (s *subscription) isClosed() bool {
	select {
	case <-s.closed:
		return true
	default:
		return false
	}
}

// Close implements queue.Subscription.
func (s *subscription) Close() error {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	s.close()
	return nil
}

func (s *subscription) close() {
	if s.isClosed() {
		return
	}
	close(s.closed)
	if s.g == nil {
		delete(s.t.broadcasts, s)
		return
	}
	delete(s.g.subs, s)
	s.g.waiters = slices.DeleteFunc(s.g.waiters, func(w *waiter) bool {
		if w.sub == s {
			close(w.got)
		}
		return w.sub == s
	})
	for d := range s.hand {
		s.g.insert(d.e)
	}
	s.hand = nil
	s.q.serve(s.g)
}

type delivery struct {
	sub     *subscription
	e       *entry // nil for a broadcast
	msg     queue.Message
	attempt int
}

func (d *delivery) Message() queue.Message { return d.msg }
func (d *delivery) Attempt() int           { return d.attempt }

func (d *delivery) Ack(ctx context.Context) error {
	return d.settle(ctx, func(*group) {})
}

func (d *delivery) Nack(ctx context.Context, o queue.NackOptions) error {
	return d.settle(ctx, func(g *group) {
		if o.DeadLetter || d.attempt >= d.sub.o.MaxAttempts {
			g.bury(d.e, cmp.Or(o.Reason, fmt.Sprintf("refused at delivery %d", d.attempt)))
			return
		}
		d.sub.q.put(g, d.e, max(o.Delay, 0))
	})
}

func (d *delivery) settle(ctx context.Context, do func(*group)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if d.e == nil {
		return nil
	}
	s := d.sub
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	if !s.hand[d] {
		return queue.ErrSettled
	}
	delete(s.hand, d)
	<-s.slots
	do(s.g)
	return nil
}

var (
	_ queue.Queue        = (*Queue)(nil)
	_ queue.DeadLetterer = (*Queue)(nil)
	_ queue.Delivery     = (*delivery)(nil)
)
