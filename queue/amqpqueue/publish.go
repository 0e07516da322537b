package amqpqueue

import (
	"context"
	"errors"
	"maps"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/solstice-ci/solstice-go/queue"
)

// part is a message of a Publish call on its way. A delayed one is two: at once
// to those that hear the broadcast, later to groups.
type part struct {
	outgoing
	index int
}

// Publish implements queue.Queue. All messages of a call are on their way at
// once; the confirms are waited for at the end.
func (q *Queue) Publish(ctx context.Context, topic string, msgs []queue.Message, _ queue.PublishOptions) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if q.ctx.Err() != nil {
		return errClosed
	}
	msgs, err := queue.Prepare(topic, msgs)
	if err != nil || len(msgs) == 0 {
		return err
	}
	ctx, end := q.m.publishing(ctx, topic, msgs)
	err = q.publish(ctx, topic, msgs)
	end(err)
	return err
}

func (q *Queue) publish(ctx context.Context, topic string, msgs []queue.Message) error {
	s, err := q.session(ctx)
	if err != nil {
		return err
	}
	pub, err := s.publisher(ctx)
	if err != nil {
		return err
	}
	var failed map[int]error
	fail := func(i int, err error) {
		if failed == nil {
			failed = map[int]error{}
		}
		failed[i] = err
	}
	parts := make([]part, 0, len(msgs))
	add := func(i int, o outgoing) error {
		parts = append(parts, part{o, i})
		err := pub.send(ctx, &parts[len(parts)-1].outgoing)
		if err != nil {
			parts = parts[:len(parts)-1]
		}
		return err
	}
	for i := range msgs {
		m := &msgs[i]
		var err error
		if m.NotBefore.IsZero() || time.Until(m.NotBefore) <= accuracy/2 {
			err = add(i, outgoing{exchange: q.o.Exchange, key: topic, msg: encode(m, nil)})
		} else {
			err = q.publishDelayed(ctx, s, topic, m, func(o outgoing) error { return add(i, o) })
		}
		if err != nil {
			for j := i; j < len(msgs); j++ {
				fail(j, err)
			}
			break
		}
	}
	for i := range parts {
		p := &parts[i]
		err := pub.await(ctx, &p.outgoing)
		if errors.Is(err, errReturned) {
			err = q.reroute(ctx, s, topic, &p.outgoing)
		}
		if err != nil {
			fail(p.index, err)
		}
	}
	if failed == nil {
		return nil
	}
	return &queue.PublishError{Failed: failed}
}

// publishDelayed publishes to those that hear the broadcast, and to the groups
// through a tier.
func (q *Queue) publishDelayed(ctx context.Context, s *session, topic string, m *queue.Message, add func(outgoing) error) error {
	wanted, err := q.wanted(ctx, s, topic)
	if err != nil {
		return err
	}
	extra := amqp.Table{headerNotBefore: m.NotBefore.UnixMicro()}
	err = add(outgoing{exchange: q.o.Exchange, key: toHearers(topic), optional: true, msg: encode(m, maps.Clone(extra))})
	if err != nil || !wanted {
		return err
	}
	o, err := q.delayed(ctx, s, time.Until(m.NotBefore), toGroups(topic), encode(m, extra))
	if err != nil {
		return err
	}
	return add(o)
}

// reroute publishes a message again for which there was no queue: nobody reads
// the topic yet, or somebody deleted the queue.
func (q *Queue) reroute(ctx context.Context, s *session, topic string, o *outgoing) error {
	q.m.returned.Add(ctx, 1, q.m.destination(topic))
	if o.declare == nil {
		o.key = toGroups(topic)
		o.declare = func(ctx context.Context) error { return q.keep(ctx, s, topic) }
	}
	if err := o.declare(ctx); err != nil {
		return err
	}
	return s.insist(ctx, o)
}
