// Package memqueue is a queue.Queue in the memory of one process. Nothing
// survives the process. It serves tests, programs that need no more, and as the
// reference for what other drivers do.
package memqueue

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/queue"
)

// Queue is an in-memory queue. Make it with New.
type Queue struct {
	mu     sync.Mutex
	closed bool
	seq    int64
	topics map[string]*topic
}

// New returns an empty queue.
func New() *Queue { return &Queue{topics: map[string]*topic{}} }

type topic struct {
	groups     map[string]*group
	kept       *group // for the first group; nil once there was any reader
	broadcasts map[*subscription]bool
	heard      bool // a broadcast reader was here: nothing is kept any more
}

// group holds one group's messages. Each is in exactly one of ready, a timer's
// closure, a subscription's hand, or dead.
type group struct {
	topic, name string
	ready       []*entry // by seq
	delayed     map[*entry]*time.Timer
	subs        map[*subscription]bool
	waiters     []*waiter // Next calls, first come first served
	dead        []queue.DeadLetter
}

type entry struct {
	seq     int64
	msg     queue.Message
	attempt int
}

type waiter struct {
	sub *subscription
	got chan *delivery // capacity 1; closed when the subscription is
}

// Capabilities implements queue.Queue: delays are timers of this process; nothing is durable.
func (q *Queue) Capabilities() queue.Capabilities {
	return queue.Capabilities{Delay: 5 * time.Millisecond, DeadLetters: true}
}

// Publish implements queue.Queue.
func (q *Queue) Publish(ctx context.Context, name string, msgs []queue.Message, _ queue.PublishOptions) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	msgs, err := queue.Prepare(name, msgs)
	if err != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return queue.ErrClosed
	}
	t := q.topic(name)
	for _, m := range msgs {
		for _, g := range t.groups {
			q.add(g, m)
		}
		if len(t.groups) == 0 && !t.heard {
			if t.kept == nil {
				t.kept = newGroup(name, "")
			}
			q.add(t.kept, m)
		}
		for s := range t.broadcasts {
			s.hear(m.Clone())
		}
	}
	return nil
}

// add gives g its own copy of m.
func (q *Queue) add(g *group, m queue.Message) {
	q.seq++
	q.put(g, &entry{seq: q.seq, msg: m.Clone()}, time.Until(m.NotBefore))
}

// put makes e ready after delay.
func (q *Queue) put(g *group, e *entry, delay time.Duration) {
	if delay <= 0 {
		g.insert(e)
		q.serve(g)
		return
	}
	g.delayed[e] = time.AfterFunc(delay, func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		if _, ok := g.delayed[e]; ok {
			delete(g.delayed, e)
			g.insert(e)
			q.serve(g)
		}
	})
}

// serve hands ready messages to waiting readers.
func (q *Queue) serve(g *group) {
	for len(g.waiters) > 0 && len(g.ready) > 0 {
		w, e := g.waiters[0], g.ready[0]
		g.ready = g.ready[1:]
		if e.attempt >= w.sub.o.MaxAttempts { // given back by readers that closed
			g.bury(e, fmt.Sprintf("delivered %d times without being settled", e.attempt))
			continue
		}
		g.waiters = g.waiters[1:]
		e.attempt++
		d := &delivery{sub: w.sub, e: e, msg: e.msg.Clone(), attempt: e.attempt}
		w.sub.hand[d] = true
		w.got <- d
	}
}

func newGroup(topic, name string) *group {
	return &group{topic: topic, name: name, delayed: map[*entry]*time.Timer{}, subs: map[*subscription]bool{}}
}

func (g *group) insert(e *entry) {
	i, _ := slices.BinarySearchFunc(g.ready, e, func(a, b *entry) int { return cmp.Compare(a.seq, b.seq) })
	g.ready = slices.Insert(g.ready, i, e)
}

func (g *group) bury(e *entry, reason string) {
	g.dead = append(g.dead, queue.DeadLetter{
		Message: e.msg, Topic: g.topic, Group: g.name, Reason: reason, Attempt: e.attempt, Time: time.Now(),
	})
}

func (q *Queue) topic(name string) *topic {
	t := q.topics[name]
	if t == nil {
		t = &topic{groups: map[string]*group{}, broadcasts: map[*subscription]bool{}}
		q.topics[name] = t
	}
	return t
}

// Subscribe implements queue.Queue.
func (q *Queue) Subscribe(ctx context.Context, name string, o queue.SubscribeOptions) (queue.Subscription, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := o.Validate(name); err != nil {
		return nil, err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return nil, queue.ErrClosed
	}
	t := q.topic(name)
	s := &subscription{q: q, t: t, o: o, closed: make(chan struct{})}
	if o.Group == "" {
		t.heard = true
		t.broadcasts[s] = true
		s.heard = make(chan queue.Message, queue.BroadcastBacklog)
		return s, nil
	}
	g := t.groups[o.Group]
	if g == nil {
		g = newGroup(name, o.Group)
		if t.kept != nil {
			g, t.kept = t.kept, nil
			g.name = o.Group
		}
		t.groups[o.Group] = g
	}
	g.subs[s] = true
	s.g, s.hand, s.slots = g, map[*delivery]bool{}, make(chan struct{}, o.Prefetch)
	return s, nil
}

// Close implements queue.Queue.
func (q *Queue) Close() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	for _, t := range q.topics {
		for s := range t.broadcasts {
			s.close()
		}
		for _, g := range t.groups {
			for s := range g.subs {
				s.close()
			}
		}
		for _, g := range t.groups {
			g.stop()
		}
		if t.kept != nil {
			t.kept.stop()
		}
	}
	return nil
}

func (g *group) stop() {
	for e, timer := range g.delayed {
		timer.Stop()
		delete(g.delayed, e)
	}
}

// DeadLetters implements queue.DeadLetterer.
func (q *Queue) DeadLetters(ctx context.Context, topic, name string, limit int) ([]queue.DeadLetter, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return nil, queue.ErrClosed
	}
	g := q.group(topic, name)
	if g == nil {
		return nil, nil
	}
	out := slices.Clone(g.dead[:min(max(limit, 0), len(g.dead))])
	for i := range out {
		out[i].Message = out[i].Message.Clone()
	}
	return out, nil
}

// Replay implements queue.DeadLetterer.
func (q *Queue) Replay(ctx context.Context, topic, name string, ids ...string) (int, error) {
	return q.unbury(ctx, topic, name, ids, func(g *group, l queue.DeadLetter) {
		q.seq++
		q.put(g, &entry{seq: q.seq, msg: l.Message}, 0)
	})
}

// Drop implements queue.DeadLetterer.
func (q *Queue) Drop(ctx context.Context, topic, name string, ids ...string) (int, error) {
	return q.unbury(ctx, topic, name, ids, func(*group, queue.DeadLetter) {})
}

// unbury takes the letters named by ids out of a group's dead ones.
func (q *Queue) unbury(ctx context.Context, topic, name string, ids []string, do func(*group, queue.DeadLetter)) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return 0, queue.ErrClosed
	}
	g := q.group(topic, name)
	if g == nil {
		return 0, nil
	}
	var taken []queue.DeadLetter
	g.dead = slices.DeleteFunc(g.dead, func(l queue.DeadLetter) bool {
		hit := slices.Contains(ids, l.Message.ID)
		if hit {
			taken = append(taken, l)
		}
		return hit
	})
	for _, l := range taken {
		do(g, l)
	}
	return len(taken), nil
}

func (q *Queue) group(topic, name string) *group {
	if t := q.topics[topic]; t != nil {
		return t.groups[name]
	}
	return nil
}
