package bench

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/ThreeDotsLabs/watermill"
	watermillamqp "github.com/ThreeDotsLabs/watermill-amqp/v3/pkg/amqp"
	"github.com/ThreeDotsLabs/watermill/message"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/amqpqueue"
)

// windows are how many messages are in flight at once.
var windows = []int{1, 64, 256}

// perRound is how many messages a contender moves in its turn.
func perRound(window int) int {
	if testing.Short() {
		return 2 * window
	}
	return min(8192, 512*window)
}

var quorum = amqp.Table{amqp.QueueTypeArg: amqp.QueueTypeQuorum}

// bare is amqp091-go as it is: a connection, and a channel in confirm mode.
type bare struct {
	conn     *amqp.Connection
	ch       *amqp.Channel
	queue    string
	returned atomic.Int64
}

func newBare(b *testing.B, url string) *bare {
	b.Helper()
	r := &bare{queue: "bare"}
	var err error
	if r.conn, err = amqp.Dial(url); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = r.conn.Close() })
	if r.ch, err = r.conn.Channel(); err != nil {
		b.Fatal(err)
	}
	if err := r.ch.Confirm(false); err != nil {
		b.Fatal(err)
	}
	returns := r.ch.NotifyReturn(make(chan amqp.Return, 1))
	go func() {
		for range returns {
			r.returned.Add(1)
		}
	}()
	r.declare(b, r.queue)
	return r
}

func (r *bare) declare(b *testing.B, name string) {
	b.Helper()
	if _, err := r.ch.QueueDeclare(name, true, false, false, false, quorum); err != nil {
		b.Fatal(err)
	}
}

func (r *bare) publish(queue string) (*amqp.DeferredConfirmation, error) {
	return r.ch.PublishWithDeferredConfirmWithContext(context.Background(), "", queue, true, false,
		amqp.Publishing{DeliveryMode: amqp.Persistent, Body: body})
}

// publishAll sends k messages, then waits for all of them.
func (r *bare) publishAll(queue string, k int) error {
	confirms := make([]*amqp.DeferredConfirmation, k)
	for i := range confirms {
		var err error
		if confirms[i], err = r.publish(queue); err != nil {
			return err
		}
	}
	for _, c := range confirms {
		if err := r.await(c); err != nil {
			return err
		}
	}
	return nil
}

// fill has n messages in a queue and nothing else.
func (r *bare) fill(queue string, n int) error {
	if err := r.empty(queue); err != nil {
		return err
	}
	return batches(256, n, func(k int) error { return r.publishAll(queue, k) })
}

func (r *bare) await(c *amqp.DeferredConfirmation) error {
	ok, err := c.WaitContext(context.Background())
	if err == nil && (!ok || r.returned.Load() > 0) {
		err = errors.New("not confirmed, or returned")
	}
	return err
}

// empty drops what was published, so that no round sees a fuller broker.
func (r *bare) empty(queues ...string) error {
	for _, q := range queues {
		if _, err := r.ch.QueuePurge(q, false); err != nil {
			return err
		}
	}
	return nil
}

func openAMQP(b *testing.B, url string) *amqpqueue.Queue {
	b.Helper()
	q, err := amqpqueue.Open(b.Context(), amqpqueue.Options{URL: url})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = q.Close() })
	return q
}

const (
	topic = "bench"
	group = "g"
	// amqpMain is the queue of a topic's first group.
	amqpMain = "solstice.bench.v1"
)

func subscribe(b *testing.B, q queue.Queue, prefetch int) queue.Subscription {
	b.Helper()
	sub, err := q.Subscribe(b.Context(), topic, queue.SubscribeOptions{Group: group, Prefetch: prefetch})
	if err != nil {
		b.Fatal(err)
	}
	return sub
}

// publish sends k messages in one call.
func publish(q queue.Queue, k int) error {
	msgs := make([]queue.Message, k)
	for i := range msgs {
		msgs[i].Body = body
	}
	return q.Publish(context.Background(), topic, msgs, queue.PublishOptions{})
}

func watermillConfig(url string, window int) watermillamqp.Config {
	c := watermillamqp.NewDurableQueueConfig(url)
	c.Queue.Arguments = quorum
	c.Publish.Mandatory, c.Publish.ConfirmDelivery, c.Publish.ChannelPoolSize = true, true, window
	c.Consume.Qos.PrefetchCount = window
	return c
}

func newWatermill(b *testing.B, url string, window int) (*watermillamqp.Publisher, string) {
	b.Helper()
	c := watermillConfig(url, window)
	sub, err := watermillamqp.NewSubscriber(c, watermill.NopLogger{})
	if err != nil {
		b.Fatal(err)
	}
	if err := sub.SubscribeInitialize("watermill"); err != nil {
		b.Fatal(err)
	}
	if err := sub.Close(); err != nil {
		b.Fatal(err)
	}
	pub, err := watermillamqp.NewPublisher(c, watermill.NopLogger{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = pub.Close() })
	return pub, "watermill"
}

func watermillMessages(k int) []*message.Message {
	msgs := make([]*message.Message, k)
	for i := range msgs {
		msgs[i] = message.NewMessage(watermill.NewUUID(), body)
	}
	return msgs
}

// BenchmarkAMQPPublish: 1 KiB, persistent, mandatory, to a quorum queue, until
// confirmed. callers=W: W goroutines with one message each on its way; watermill
// takes a channel for each. batch=W: one goroutine sends W messages and waits
// for all; watermill waits for each.
func BenchmarkAMQPPublish(b *testing.B) {
	url := testenv.RabbitMQ(b)
	q := openAMQP(b, url)
	_ = subscribe(b, q, 1).Close() // the group's queue
	raw := newBare(b, url)
	for _, w := range windows {
		pub, queueName := newWatermill(b, url, w)
		empty := func(int) error { return raw.empty(raw.queue, amqpMain, queueName) }
		b.Run(fmt.Sprintf("callers=%d", w), func(b *testing.B) {
			compare(b, perRound(w), contender{name: "amqpqueue", prepare: empty, run: func(n int) error {
				return parallel(w, n, func() error { return publish(q, 1) })
			}}, contender{name: "bare", prepare: empty, run: func(n int) error {
				return parallel(w, n, func() error { return raw.publishAll(raw.queue, 1) })
			}}, contender{name: "watermill", prepare: empty, run: func(n int) error {
				return parallel(w, n, func() error { return pub.Publish(queueName, watermillMessages(1)...) })
			}})
		})
		if w == 1 {
			continue
		}
		b.Run(fmt.Sprintf("batch=%d", w), func(b *testing.B) {
			compare(b, perRound(w), contender{name: "amqpqueue", prepare: empty, run: func(n int) error {
				return batches(w, n, func(k int) error { return publish(q, k) })
			}}, contender{name: "bare", prepare: empty, run: func(n int) error {
				return batches(w, n, func(k int) error { return raw.publishAll(raw.queue, k) })
			}}, contender{name: "watermill", prepare: empty, run: func(n int) error {
				return batches(w, n, func(k int) error { return pub.Publish(queueName, watermillMessages(k)...) })
			}})
		})
	}
}

// BenchmarkAMQPConsume: 1 KiB, persistent, from a quorum queue; window=W: W
// goroutines, each takes a message and acks it, with a prefetch of W. A
// subscription of watermill hands out the next message after the ack of the one
// before, whatever the prefetch. Subscribing is not timed.
func BenchmarkAMQPConsume(b *testing.B) {
	url := testenv.RabbitMQ(b)
	q := openAMQP(b, url)
	_ = subscribe(b, q, 1).Close()
	raw := newBare(b, url)
	for _, w := range windows {
		b.Run(fmt.Sprintf("window=%d", w), func(b *testing.B) {
			_, queueName := newWatermill(b, url, w)
			var sub queue.Subscription
			var consumer *amqp.Channel
			var deliveries <-chan amqp.Delivery
			var peer *watermillamqp.Subscriber
			var incoming <-chan *message.Message
			compare(b, perRound(w), contender{
				name: "amqpqueue",
				prepare: func(n int) error {
					sub = subscribe(b, q, w)
					return raw.fill(amqpMain, n)
				},
				run:    func(n int) error { return consume(sub, w, n) },
				finish: func() error { return sub.Close() },
			}, contender{
				name: "bare",
				prepare: func(n int) (err error) {
					if err = raw.fill(raw.queue, n); err != nil {
						return err
					}
					if consumer, err = raw.conn.Channel(); err != nil {
						return err
					}
					if err = consumer.Qos(w, 0, false); err != nil {
						return err
					}
					deliveries, err = consumer.Consume(raw.queue, "", false, false, false, false, nil)
					return err
				},
				run: func(n int) error {
					return parallel(w, n, func() error {
						d, ok := <-deliveries
						if !ok {
							return errors.New("the channel was closed")
						}
						return d.Ack(false)
					})
				},
				finish: func() error { return consumer.Close() },
			}, contender{
				name: "watermill",
				prepare: func(n int) (err error) {
					if err = raw.fill(queueName, n); err != nil {
						return err
					}
					if peer, err = watermillamqp.NewSubscriber(watermillConfig(url, w), watermill.NopLogger{}); err != nil {
						return err
					}
					incoming, err = peer.Subscribe(context.Background(), queueName)
					return err
				},
				run: func(n int) error {
					return parallel(w, n, func() error {
						m, ok := <-incoming
						if !ok || !m.Ack() {
							return errors.New("the subscription was closed")
						}
						return nil
					})
				},
				finish: func() error { return peer.Close() },
			})
		})
	}
}

// consume takes and acks n messages on so many goroutines.
func consume(sub queue.Subscription, workers, n int) error {
	return parallel(workers, n, func() error {
		d, err := sub.Next(context.Background())
		if err != nil {
			return err
		}
		return d.Ack(context.Background())
	})
}
