package amqpqueue

import (
	"context"
	"fmt"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	// routeTries is how often a queue that has gone is declared again for one
	// message.
	routeTries = 3
	// deliveryLimit is when the broker itself gives up on a message, which is
	// for readers that die of it before this package can count; RabbitMQ 4
	// would assume 20.
	deliveryLimit = 1000
	// noLimit is for dead letters, which looking at them delivers. Nothing is
	// counted further.
	noLimit = 1 << 30
	// The delays of the tiers: from the first, each the double of the one before.
	firstTier = 100 * time.Millisecond
	lastTier  = firstTier << 15
	// accuracy is what a delay may be wrong by: too early by half of it.
	accuracy = firstTier
)

// Routing keys: a topic's name reaches all its readers. Names contain no '@'.
func toGroups(topic string) string       { return topic + "@*" }
func toGroup(topic, group string) string { return topic + "@" + group }
func toHearers(topic string) string      { return topic + "@" }

// mainQueue holds what a topic keeps for its first group, whose queue it then
// is. The exchange of the same name says which group that was.
func (q *Queue) mainQueue(topic string) string { return q.o.Prefix + "." + topic + ".v1" }

// groupQueue is the queue of any later group.
func (q *Queue) groupQueue(topic, group string) string {
	return q.o.Prefix + "." + topic + ":" + group + ".v1"
}

// sinkQueue drops everything. It exists where a topic has had a broadcast reader,
// so that messages for no reader are not unroutable.
func (q *Queue) sinkQueue(topic string) string { return q.o.Prefix + "." + topic + ".sink" }

func (q *Queue) deadExchange() string { return q.o.Prefix + ".dlx" }
func deadQueue(queue string) string   { return queue + ".dlq" }
func (q *Queue) tier(d time.Duration) string {
	return fmt.Sprintf("%s.delay.%d", q.o.Prefix, d.Milliseconds())
}

func (q *Queue) declareExchanges(ch *amqp.Channel) error {
	if err := ch.ExchangeDeclare(q.o.Exchange, amqp.ExchangeDirect, true, false, false, false, nil); err != nil {
		return err
	}
	return ch.ExchangeDeclare(q.deadExchange(), amqp.ExchangeDirect, true, false, false, false, nil)
}

// declareQueue declares the queue of a group, and binds it to keys.
func (q *Queue) declareQueue(ch *amqp.Channel, name string, keys ...string) error {
	_, err := ch.QueueDeclare(name, true, false, false, false, amqp.Table{
		amqp.QueueTypeArg:           amqp.QueueTypeQuorum,
		"x-delivery-limit":          deliveryLimit,
		"x-dead-letter-exchange":    q.deadExchange(),
		"x-dead-letter-routing-key": name,
		"x-dead-letter-strategy":    "at-least-once",
		amqp.QueueOverflowArg:       amqp.QueueOverflowRejectPublish, // without a length: what at-least-once asks for
	})
	for _, key := range keys {
		if err == nil {
			err = ch.QueueBind(name, key, q.o.Exchange, false, nil)
		}
	}
	return err
}

// enter makes the group known, for ever, and returns its queue.
func (q *Queue) enter(ctx context.Context, s *session, topic, group string) (string, error) {
	name, err := q.claim(ctx, s, topic, group)
	if err != nil {
		return "", err
	}
	err = s.do(ctx, func(ch *amqp.Channel) error {
		_, err := ch.QueueDeclare(deadQueue(name), true, false, false, false, amqp.Table{
			amqp.QueueTypeArg: amqp.QueueTypeQuorum, "x-delivery-limit": noLimit,
		})
		if err == nil {
			err = ch.QueueBind(deadQueue(name), name, q.deadExchange(), false, nil)
		}
		if err != nil {
			return err
		}
		return q.declareQueue(ch, name, topic, toGroups(topic), toGroup(topic, group))
	})
	return name, classify(err)
}

// claim decides which queue is the group's. An exchange serves as a register
// that can be written once: declaring it again with another alternate exchange,
// which is what holds the group's name here, is refused. Nothing is published
// to it.
func (q *Queue) claim(ctx context.Context, s *session, topic, group string) (string, error) {
	name := q.mainQueue(topic)
	err := s.do(ctx, func(ch *amqp.Channel) error {
		return ch.ExchangeDeclare(name, amqp.ExchangeDirect, true, false, true, false, amqp.Table{
			"alternate-exchange": q.o.Prefix + ".group." + group,
		})
	})
	if hasCode(err, amqp.PreconditionFailed) {
		return q.groupQueue(topic, group), nil
	}
	return name, classify(err)
}

// claimed reports whether the topic ever had a group.
func (q *Queue) claimed(ctx context.Context, s *session, topic string) (bool, error) {
	err := s.do(ctx, func(ch *amqp.Channel) error {
		return ch.ExchangeDeclarePassive(q.mainQueue(topic), amqp.ExchangeDirect, true, false, true, false, nil)
	})
	if hasCode(err, amqp.NotFound) {
		return false, nil
	}
	return err == nil, classify(err)
}

// keep makes a queue for what nobody reads yet, which the first group takes.
func (q *Queue) keep(ctx context.Context, s *session, topic string) error {
	return classify(s.do(ctx, func(ch *amqp.Channel) error {
		return q.declareQueue(ch, q.mainQueue(topic), toGroups(topic))
	}))
}

// wanted reports whether delayed messages of the topic have a reader, or may
// come to have one, and makes sure that they find a queue.
func (q *Queue) wanted(ctx context.Context, s *session, topic string) (bool, error) {
	if s.knows(topic) {
		return true, nil
	}
	switch claimed, err := q.claimed(ctx, s, topic); {
	case err != nil:
		return false, err
	case claimed:
		s.learn(topic) // that does not change
		return true, nil
	}
	err := s.do(ctx, func(ch *amqp.Channel) error {
		_, err := ch.QueueDeclarePassive(q.sinkQueue(topic), true, false, false, false, nil)
		return err
	})
	switch {
	case err == nil: // only broadcasts
		return false, nil
	case hasCode(err, amqp.NotFound):
		return true, q.keep(ctx, s, topic)
	}
	return false, classify(err)
}

// hear makes known that the topic has a broadcast reader.
func (q *Queue) hear(ctx context.Context, s *session, topic string) error {
	return classify(s.do(ctx, func(ch *amqp.Channel) error {
		name := q.sinkQueue(topic)
		_, err := ch.QueueDeclare(name, true, false, false, false, amqp.Table{amqp.QueueTypeArg: amqp.QueueTypeClassic, amqp.QueueMaxLenArg: 0})
		if err == nil {
			err = ch.QueueBind(name, topic, q.o.Exchange, false, nil)
		}
		return err
	}))
}

// delayed is a message that reaches the routing key no sooner than in d, unless
// the longest tier is shorter: whoever receives it delays it for the rest.
func (q *Queue) delayed(ctx context.Context, s *session, d time.Duration, key string, msg amqp.Publishing) (outgoing, error) {
	t := firstTier
	for t < lastTier && t*2 <= d {
		t *= 2
	}
	name := q.tier(t)
	o := outgoing{exchange: name, key: key, msg: msg, declare: func(ctx context.Context) error { return q.declareTier(ctx, s, name, t) }}
	if s.knows(name) {
		return o, nil
	}
	return o, o.declare(ctx)
}

func (q *Queue) declareTier(ctx context.Context, s *session, name string, t time.Duration) error {
	err := s.do(ctx, func(ch *amqp.Channel) error {
		// Messages keep their routing key on the way through.
		if err := ch.ExchangeDeclare(name, amqp.ExchangeFanout, true, false, false, false, nil); err != nil {
			return err
		}
		_, err := ch.QueueDeclare(name, true, false, false, false, amqp.Table{
			amqp.QueueTypeArg:        amqp.QueueTypeQuorum,
			amqp.QueueMessageTTLArg:  t.Milliseconds(),
			"x-dead-letter-exchange": q.o.Exchange,
			"x-dead-letter-strategy": "at-least-once",
			amqp.QueueOverflowArg:    amqp.QueueOverflowRejectPublish,
		})
		if err != nil {
			return err
		}
		return ch.QueueBind(name, "", name, false, nil)
	})
	if err == nil {
		s.learn(name)
	}
	return classify(err)
}
