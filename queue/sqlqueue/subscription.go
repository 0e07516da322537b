package sqlqueue

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/solstice-ci/solstice-go/queue"
)

// group is a group that this process reads, or, without a name, the row that
// collects broadcasts of a topic for this process. Guarded by Queue.mu.
type group struct {
	id          int64
	topic, name string
	subs        map[*subscription]struct{}
	waiters     []*waiter // Next calls, first come first served
	dirty       bool      // there may be ready messages
}

// hearers are the broadcast readers of a topic in this process.
type hearers struct {
	subs    map[*subscription]struct{}
	pending int   // Subscribe calls under way
	gid     int64 // the row that collects broadcasts for them
}

type waiter struct {
	sub *subscription
	got chan *delivery // capacity 1
}

// subscription is one reader, of a group (hand, slots) or a broadcast (heard).
type subscription struct {
	q      *Queue
	topic  string
	o      queue.SubscribeOptions
	closed chan struct{}

	g     *group
	hand  map[*delivery]struct{} // guarded by Queue.mu
	slots chan struct{}          // a token per delivery out or awaited

	heard chan queue.Message
}

// Subscribe implements queue.Queue.
func (q *Queue) Subscribe(ctx context.Context, topic string, o queue.SubscribeOptions) (queue.Subscription, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := o.Validate(topic); err != nil {
		return nil, err
	}
	s := &subscription{q: q, topic: topic, o: o, closed: make(chan struct{})}
	if o.Group == "" {
		s.heard = make(chan queue.Message, queue.BroadcastBacklog)
	} else {
		s.hand, s.slots = map[*delivery]struct{}{}, make(chan struct{}, o.Prefetch)
	}
	gid, err := q.enter(ctx, topic, o.Group)
	if err != nil {
		return nil, err
	}
	defer q.mu.Unlock() // enter locked it
	if q.isClosed() {
		return nil, queue.ErrClosed
	}
	g := q.groups[gid]
	if g == nil {
		g = &group{id: gid, topic: topic, name: o.Group, subs: map[*subscription]struct{}{}}
		q.groups[gid] = g
	}
	g.dirty = true
	if o.Group == "" {
		h := q.hearers[topic]
		h.subs[s], h.gid = struct{}{}, gid
		q.claiming.wake()
	} else {
		s.g = g
		g.subs[s] = struct{}{}
	}
	q.known[topic] = true
	if !q.started {
		q.started = true
		q.background()
	}
	return s, nil
}

// enter registers a reader in the database. Without an error it returns with
// Queue.mu held.
func (q *Queue) enter(ctx context.Context, topic, name string) (gid int64, err error) {
	q.mu.Lock()
	h := q.hearers[topic]
	if name == "" {
		if h == nil {
			h = &hearers{subs: map[*subscription]struct{}{}}
			q.hearers[topic] = h
		}
		h.pending++
	}
	me := q.reader
	q.mu.Unlock()
	for {
		var id int64
		err = q.settling.do(ctx, &op{task: func(ctx context.Context, tx execer) (err error) {
			id, err = q.register(ctx, tx, topic, name, me)
			return err
		}})
		q.mu.Lock()
		if err == nil && me == q.reader {
			gid = id
			break
		}
		if err != nil {
			break
		}
		me = q.reader // taken for dead in between
		q.mu.Unlock()
	}
	if name == "" {
		h.pending--
		if err != nil {
			q.leave(topic, h)
		}
	}
	if err != nil {
		q.mu.Unlock()
	}
	return gid, err
}

// leave ends the collection of broadcasts when nobody hears them any more. The
// caller holds Queue.mu.
func (q *Queue) leave(topic string, h *hearers) *op {
	if len(h.subs) > 0 || h.pending > 0 {
		return nil
	}
	delete(q.hearers, topic)
	delete(q.groups, h.gid)
	me := q.reader
	o := &op{done: make(chan struct{}), task: func(ctx context.Context, tx execer) error {
		return q.unhear(ctx, tx, topic, me)
	}}
	if q.settling.add(o) != nil {
		return nil // Close gives up everything
	}
	return o
}

// shut ends the subscription's calls. The caller holds Queue.mu; what is in
// hand is returned.
func (s *subscription) shut() (hand []*delivery) {
	select {
	case <-s.closed:
		return nil
	default:
	}
	close(s.closed)
	if s.g == nil {
		return nil
	}
	delete(s.g.subs, s)
	s.g.waiters = slices.DeleteFunc(s.g.waiters, func(w *waiter) bool { return w.sub == s })
	for d := range s.hand {
		if d.settled.CompareAndSwap(false, true) {
			hand = append(hand, d)
		}
	}
	clear(s.hand)
	return hand
}

// Close implements queue.Subscription.
func (s *subscription) Close() error {
	q := s.q
	q.mu.Lock()
	hand := s.shut()
	ops := make([]*op, 0, len(hand)+1)
	if h := q.hearers[s.topic]; h != nil && s.g == nil {
		delete(h.subs, s)
		if o := q.leave(s.topic, h); o != nil {
			ops = append(ops, o)
		}
	}
	q.mu.Unlock()

	ctx, cancel := context.WithTimeout(q.watching, closeTimeout)
	defer cancel()
	for _, d := range hand {
		o := &op{settle: &settlement{id: d.id, gid: s.g.id, reader: d.reader, verdict: retry}, done: make(chan struct{})}
		if q.settling.add(o) != nil {
			break // the whole queue is closing and gives everything back
		}
		ops = append(ops, o)
	}
	for _, o := range ops {
		select {
		case <-o.done:
			if o.settle != nil {
				q.unhold(o.settle.id)
			}
		case <-ctx.Done():
			if q.isClosed() {
				return nil
			}
			return fmt.Errorf("sqlqueue: unsubscribe from %s: %w", s.topic, ctx.Err())
		}
	}
	return nil
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
	if s.heard != nil {
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
	w := &waiter{sub: s, got: make(chan *delivery, 1)}
	s.q.mu.Lock()
	s.g.waiters = append(s.g.waiters, w)
	dirty := s.g.dirty
	s.q.mu.Unlock()
	if dirty {
		s.q.claiming.wake()
	}
	select {
	case d := <-w.got:
		return d, nil
	case <-s.closed:
		return s.abandon(w, queue.ErrClosed)
	case <-ctx.Done():
		return s.abandon(w, ctx.Err())
	}
}

// abandon ends a wait; a delivery that came in the same moment wins.
func (s *subscription) abandon(w *waiter, err error) (queue.Delivery, error) {
	s.q.mu.Lock()
	defer s.q.mu.Unlock()
	s.g.waiters = slices.DeleteFunc(s.g.waiters, func(x *waiter) bool { return x == w })
	select {
	case d := <-w.got:
		if !d.settled.Load() {
			return d, nil
		}
	default:
		<-s.slots
	}
	return nil, err
}

// wants lists the claims worth making: readers wait, and there may be
// messages, since topics are just being published to or for another reason.
func (q *Queue) wants(topics map[string]struct{}) (out []want) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, g := range q.groups {
		if _, ok := topics[g.topic]; ok && g.name != "" {
			g.dirty = true
		}
		n := min(len(g.waiters), claimMax)
		if g.name == "" {
			n = claimMax
		}
		if g.dirty && n > 0 {
			g.dirty = false
			out = append(out, want{g: g, n: n})
		}
	}
	return out
}

// deliver hands claimed messages to waiting readers, and gives back those that
// nobody waits for any more.
func (q *Queue) deliver(w want, got []claimed, reader string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	g := w.g
	if len(got) == w.n {
		g.dirty = true // there may be more
		q.claiming.wake()
	}
	if g.name == "" {
		if h := q.hearers[g.topic]; h != nil {
			for _, c := range got {
				h.hear(c.msg)
			}
		}
		return
	}
	for _, c := range got {
		q.held[c.id] = struct{}{}
		if len(g.waiters) == 0 {
			q.giveBack(&settlement{id: c.id, gid: g.id, reader: reader, verdict: unclaimed})
			continue
		}
		x := g.waiters[0]
		if c.attempt > x.sub.o.MaxAttempts {
			q.giveBack(&settlement{
				id: c.id, gid: g.id, reader: reader, verdict: bury,
				reason: fmt.Sprintf("delivered %d times without being settled", c.attempt-1),
			})
			continue
		}
		g.waiters = g.waiters[1:]
		d := &delivery{sub: x.sub, id: c.id, reader: reader, msg: c.msg, attempt: c.attempt}
		x.sub.hand[d] = struct{}{}
		x.got <- d
	}
}

// giveBack settles without a caller.
func (q *Queue) giveBack(s *settlement) {
	delete(q.held, s.id) // should it fail, the audit of the claims finds it
	_ = q.settling.add(&op{settle: s})
}

func (q *Queue) unhold(id int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.held, id)
}

// hear hands a message to every reader, dropping the oldest where one lags. The
// caller holds Queue.mu, so it is the only sender.
func (h *hearers) hear(m queue.Message) {
	for s := range h.subs {
		c := m.Clone()
		for sent := false; !sent; {
			select {
			case s.heard <- c:
				sent = true
			default:
				select {
				case <-s.heard:
				default:
				}
			}
		}
	}
}

// announce wakes the readers in this process after a publication.
func (q *Queue) announce(p *publication, now int64) {
	first := time.Duration(-1)
	for i := range p.msgs {
		if nb := p.msgs[i].NotBefore; !nb.IsZero() && nb.UnixMicro() > now {
			if d := time.Duration(nb.UnixMicro()-now) * time.Microsecond; first < 0 || d < first {
				first = d
			}
		}
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if h := q.hearers[p.topic]; h != nil {
		for _, m := range p.msgs {
			h.hear(m)
		}
	}
	if first >= 0 && q.started {
		q.alarm.set(first)
	}
	if !q.pg {
		return // the same transaction has claimed for them
	}
	for _, g := range q.groups {
		if g.topic == p.topic && g.name != "" {
			g.dirty = true
			q.claiming.wake()
		}
	}
}

// stir marks groups that may have ready messages.
func (q *Queue) stir(gids map[int64]struct{}) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for id := range gids {
		if g := q.groups[id]; g != nil {
			g.dirty = true
			q.claiming.wake()
		}
	}
}

// dirtyAll marks every group. The caller holds Queue.mu.
func (q *Queue) dirtyAll() {
	for _, g := range q.groups {
		g.dirty = true
	}
	q.claiming.wake()
}

type delivery struct {
	sub     *subscription
	id      int64
	reader  string
	msg     queue.Message
	attempt int
	settled atomic.Bool
}

// Message implements queue.Delivery.
func (d *delivery) Message() queue.Message { return d.msg }

// Attempt implements queue.Delivery.
func (d *delivery) Attempt() int { return d.attempt }

// Ack implements queue.Delivery.
func (d *delivery) Ack(ctx context.Context) error {
	return d.settle(ctx, &settlement{verdict: ack})
}

// Nack implements queue.Delivery.
func (d *delivery) Nack(ctx context.Context, o queue.NackOptions) error {
	if o.DeadLetter || d.attempt >= d.sub.o.MaxAttempts {
		return d.settle(ctx, &settlement{verdict: bury, reason: cmp.Or(o.Reason, fmt.Sprintf("refused at delivery %d", d.attempt))})
	}
	return d.settle(ctx, &settlement{verdict: retry, delay: max(o.Delay, 0)})
}

func (d *delivery) settle(ctx context.Context, s *settlement) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if d.sub.heard != nil {
		return nil // a broadcast
	}
	if !d.settled.CompareAndSwap(false, true) {
		return queue.ErrSettled
	}
	q := d.sub.q
	s.id, s.gid, s.reader = d.id, d.sub.g.id, d.reader
	err := q.settling.do(ctx, &op{settle: s})
	q.mu.Lock()
	delete(d.sub.hand, d)
	delete(q.held, d.id)
	q.mu.Unlock()
	<-d.sub.slots
	return err
}
