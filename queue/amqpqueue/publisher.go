package amqpqueue

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"

	amqp "github.com/rabbitmq/amqp091-go"
	"golang.org/x/sync/semaphore"
)

// The window bounds what is published and not yet confirmed, and with it what
// waits to be written while the broker does not read.
const (
	windowMessages = 1024
	windowUnit     = 16 << 10 // bytes of a message that count as one
)

// publisher shares one channel among all who publish. Every message is
// mandatory unless it says otherwise; the broker sends what it could not route
// back before it confirms it.
type publisher struct {
	ses    *session
	ch     *amqp.Channel
	window *semaphore.Weighted
	serial atomic.Uint64

	// returns never is full, which would stop the connection's reader: it has
	// room for the window, which a message leaves after its return was read.
	returns chan amqp.Return
	mu      sync.Mutex
	back    map[string]struct{} // returned, by correlation ID
	refused error               // why the broker closed the channel; nil: it did not

	over chan struct{} // closed when another took its place, or the session ends
}

// outgoing is a message on its way.
type outgoing struct {
	exchange, key string
	optional      bool // may go nowhere
	patient       bool // goes on while the queue closes
	msg           amqp.Publishing
	declare       func(ctx context.Context) error // what it should find and perhaps does not

	weight  int64
	confirm *amqp.DeferredConfirmation
}

func newPublisher(ses *session, ch *amqp.Channel) (*publisher, error) {
	if err := ch.Confirm(false); err != nil {
		return nil, err
	}
	p := &publisher{
		ses: ses, ch: ch, window: semaphore.NewWeighted(windowMessages),
		returns: make(chan amqp.Return, windowMessages), back: map[string]struct{}{},
		over: make(chan struct{}),
	}
	ch.NotifyReturn(p.returns)
	return p, nil
}

// send publishes without waiting for the confirm, which await does. After an
// error nothing was published.
func (p *publisher) send(ctx context.Context, o *outgoing) error {
	o.weight = 1 + int64(len(o.msg.Body))/windowUnit
	if !p.window.TryAcquire(o.weight) {
		if err := p.waitForRoom(ctx, o); err != nil {
			return err
		}
	}
	if !o.optional {
		o.msg.CorrelationId = strconv.FormatUint(p.serial.Add(1), 36)
	}
	var err error
	if o.confirm, err = p.ch.PublishWithDeferredConfirm(o.exchange, o.key, !o.optional, false, o.msg); err != nil {
		p.window.Release(o.weight)
		if p.ch.IsClosed() {
			return p.ended()
		}
		return p.ses.lost(err)
	}
	return nil
}

// waitForRoom waits until enough is confirmed for o to be under way.
func (p *publisher) waitForRoom(ctx context.Context, o *outgoing) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(p.ses.ctx, func() { cancel(context.Cause(p.ses.ctx)) })()
	if !o.patient {
		defer context.AfterFunc(p.ses.q.ctx, func() { cancel(errClosed) })()
	}
	if p.window.Acquire(ctx, o.weight) != nil {
		return context.Cause(ctx)
	}
	return nil
}

// await returns nil once the broker has the message on disk, in every queue it
// was routed to.
func (p *publisher) await(ctx context.Context, o *outgoing) error {
	select {
	case <-o.confirm.Done():
		return p.outcome(o)
	default:
	}
	closing := p.ses.q.ctx.Done()
	if o.patient {
		closing = nil
	}
	select {
	case <-o.confirm.Done():
		return p.outcome(o)
	case <-ctx.Done():
		p.abandon(o)
		return context.Cause(ctx)
	case <-closing:
		p.abandon(o)
		return errClosed
	}
}

// abandon leaves a message to itself. It keeps its place in the window until
// the broker, or the end of the connection, decides about it.
func (p *publisher) abandon(o *outgoing) {
	p.ses.spawn(func() {
		<-o.confirm.Done()
		_ = p.outcome(o) // nobody asks any more
	})
}

func (p *publisher) outcome(o *outgoing) error {
	returned := p.wasReturned(o)
	p.window.Release(o.weight)
	switch {
	case !o.confirm.Acked() && p.ch.IsClosed():
		return p.ended()
	case !o.confirm.Acked():
		return ErrRejected
	case returned:
		return errReturned
	}
	return nil
}

// refuse notes that the broker did not like something that was published.
func (p *publisher) refuse(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refused = fmt.Errorf("%w: publishing: %w", ErrConnectionLost, classify(err))
}

// ended says why nothing can be published any more.
func (p *publisher) ended() error {
	select {
	case <-p.over:
	case <-p.ses.ctx.Done():
	}
	p.mu.Lock()
	refused := p.refused
	p.mu.Unlock()
	if refused != nil {
		return refused
	}
	<-p.ses.ctx.Done() // the channel ended with the connection
	return context.Cause(p.ses.ctx)
}

// wasReturned reads the returns that came so far: that of a confirmed message
// is among them.
func (p *publisher) wasReturned(o *outgoing) bool {
	if o.optional {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		select {
		case r, ok := <-p.returns:
			if ok {
				p.back[r.CorrelationId] = struct{}{}
				continue
			}
		default:
		}
		break
	}
	if len(p.back) == 0 {
		return false
	}
	_, returned := p.back[o.msg.CorrelationId]
	delete(p.back, o.msg.CorrelationId)
	return returned
}

// publish sends one message and waits for its confirm.
func (p *publisher) publish(ctx context.Context, o *outgoing) error {
	if err := p.send(ctx, o); err != nil {
		return err
	}
	return p.await(ctx, o)
}

// insist is publish for a message that has a queue, or will once declare made
// it again.
func (p *publisher) insist(ctx context.Context, o *outgoing) error {
	err := p.publish(ctx, o)
	for tries := 0; errors.Is(err, errReturned); tries++ {
		if tries == routeTries {
			return fmt.Errorf("%w: %s", ErrUnroutable, o.key)
		}
		if err = o.declare(ctx); err == nil {
			err = p.publish(ctx, o)
		}
	}
	return err
}

// insist is the same on the channel that the session publishes on now.
func (s *session) insist(ctx context.Context, o *outgoing) error {
	p, err := s.publisher(ctx)
	if err != nil {
		return err
	}
	return p.insist(ctx, o)
}
