package amqpqueue_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/amqpqueue"
)

// patience bounds the wait for what has to come.
const patience = 2 * time.Minute

// until polls for a condition that no call waits for.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	timeout := time.After(patience)
	for !ok() {
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatalf("never: %s", what)
		}
	}
}

// withReasons fails the test where a record has an error that is none: it has to
// say why.
type withReasons struct {
	slog.Handler
	t *testing.T
}

func (h withReasons) Handle(ctx context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "error" && a.Value.Any() == nil {
			h.t.Errorf("logged without a reason: %s", r.Message)
		}
		return true
	})
	return h.Handler.Handle(ctx, r)
}

func withURL(t *testing.T, o amqpqueue.Options) *amqpqueue.Queue {
	t.Helper()
	o.Logger = slog.New(withReasons{slog.NewTextHandler(t.Output(), nil), t})
	q, err := amqpqueue.Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = q.Close() }) // whether it can say goodbye is for those tests that look
	return q
}

func subscribe(t *testing.T, q queue.Queue, topic string, o queue.SubscribeOptions) queue.Subscription {
	t.Helper()
	sub, err := q.Subscribe(t.Context(), topic, o)
	if err != nil {
		t.Fatal(err)
	}
	return sub
}

func message(id string) []queue.Message { return []queue.Message{{ID: id, Body: []byte(id)}} }

// publish insists: after an error the outcome is unknown, so it publishes again.
func publish(t *testing.T, q queue.Queue, topic, id string) {
	t.Helper()
	until(t, "publish "+id, func() bool { return q.Publish(t.Context(), topic, message(id), queue.PublishOptions{}) == nil })
}

func expect(t *testing.T, sub queue.Subscription, id string) queue.Delivery {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	d, err := sub.Next(ctx)
	if err != nil {
		t.Fatalf("Next: %v, want %s", err, id)
	}
	if d.Message().ID != id {
		t.Fatalf("received %s, want %s", d.Message().ID, id)
	}
	return d
}

// history is what producers and consumers saw, kept apart from the broker.
type history struct {
	mu        sync.Mutex
	confirmed map[string]bool
	received  map[string]int
}

func newHistory() *history { return &history{confirmed: map[string]bool{}, received: map[string]int{}} }

func (h *history) count() (confirmed, received int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.confirmed), len(h.received)
}

// lost are the confirmed messages that nobody received so far.
func (h *history) lost() (out []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for id := range h.confirmed {
		if h.received[id] == 0 {
			out = append(out, id)
		}
	}
	return out
}

// produce publishes with n goroutines until ctx ends.
func (h *history) produce(ctx context.Context, wg *sync.WaitGroup, q queue.Queue, topic string, n int, body []byte) {
	for p := range n {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				id := fmt.Sprintf("%d-%d", p, i)
				err := q.Publish(ctx, topic, []queue.Message{{ID: id, Body: body}}, queue.PublishOptions{})
				if err != nil {
					continue // unknown: it may arrive, or not
				}
				h.mu.Lock()
				h.confirmed[id] = true
				h.mu.Unlock()
			}
		})
	}
}

// consume receives and acks with n goroutines until ctx ends.
func (h *history) consume(ctx context.Context, t *testing.T, wg *sync.WaitGroup, sub queue.Subscription, n int) {
	for range n {
		wg.Go(func() {
			for {
				d, err := sub.Next(ctx)
				if err != nil {
					if ctx.Err() == nil {
						t.Errorf("Next: %v", err)
					}
					return
				}
				h.mu.Lock()
				h.received[d.Message().ID]++
				h.mu.Unlock()
				if err := d.Ack(ctx); err != nil && !errors.Is(err, queue.ErrSettled) && ctx.Err() == nil {
					t.Errorf("Ack: %v", err)
				}
			}
		})
	}
}

// work is a producer and a consumer, each on a connection of its own.
func work(t *testing.T, producer, consumer queue.Queue, body []byte, faults func(h *history)) {
	t.Helper()
	sub := subscribe(t, consumer, "t", queue.SubscribeOptions{Group: "g"})
	h := newHistory()
	var producers, consumers sync.WaitGroup
	pctx, stopProducers := context.WithCancel(t.Context())
	cctx, stopConsumers := context.WithCancel(t.Context())
	defer func() { stopProducers(); stopConsumers(); producers.Wait(); consumers.Wait() }()
	h.produce(pctx, &producers, producer, "t", 8, body)
	h.consume(cctx, t, &consumers, sub, 4)
	faults(h)
	stopProducers()
	producers.Wait()
	t.Cleanup(func() {
		if lost := h.lost(); len(lost) > 0 {
			slices.Sort(lost)
			t.Logf("lost: %d of %d: %s", len(lost), len(h.confirmed), lost[:min(50, len(lost))])
		}
	})
	for left := h.lost(); len(left) > 0; left = h.lost() { // a busy machine takes its time for all of them
		until(t, "one more confirmed message is received", func() bool { return len(h.lost()) < len(left) })
	}
	confirmed, received := h.count()
	t.Logf("%d messages confirmed, %d received", confirmed, received)
}

// more waits until that many further messages were confirmed and received.
func (h *history) more(t *testing.T, n int) {
	t.Helper()
	confirmed, received := h.count()
	until(t, "messages flow", func() bool {
		c, r := h.count()
		return c >= confirmed+n && r >= received+n
	})
}

// TestFaults makes faults on a broker of its own, one after the other.
func TestFaults(t *testing.T) {
	broker := testenv.StartRabbitMQ(t, testenv.RabbitMQOptions{})
	leaks := []goleak.Option{goleak.IgnoreCurrent()}
	for _, f := range []string{ // of the broker's keeper and of the proxy
		"github.com/solstice-ci/solstice-go/internal/testenv.spawn.func1",
		"github.com/Shopify/toxiproxy/v2/toxics.(*ToxicStub).Run",
		"github.com/Shopify/toxiproxy/v2.(*ToxicLink).read",
		"github.com/Shopify/toxiproxy/v2.(*ToxicLink).write",
	} {
		leaks = append(leaks, goleak.IgnoreAnyFunction(f))
	}
	for _, c := range []struct {
		name string
		run  func(t *testing.T, broker *testenv.RabbitMQServer)
	}{
		{"KilledWhilePublishingAndConsuming", killed},
		{"QueueDeletedWhilePublishing", queueDeleted},
		{"QueueDeletedWithoutReaders", queueDeletedWithoutReaders},
		{"ExchangesDeleted", exchangesDeleted},
		{"Purged", purged},
		{"MemoryAlarm", memoryAlarm},
		{"Stopped", stopped},
		{"ClosedWhileStopped", closedWhileStopped},
		{"CutInTheMiddleOfAFrame", cut},
		{"ConnectionsClosedByTheBroker", connectionsClosed},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Cleanup(func() { goleak.VerifyNone(t, leaks...) }) // after the queues were closed
			c.run(t, broker)
		})
	}
}

func killed(t *testing.T, broker *testenv.RabbitMQServer) {
	url := broker.VHost(t)
	producer, consumer := withURL(t, amqpqueue.Options{URL: url}), withURL(t, amqpqueue.Options{URL: url})
	heard := subscribe(t, consumer, "wake", queue.SubscribeOptions{})
	t.Cleanup(func() {
		if t.Failed() {
			for _, q := range broker.Queues(t, url) {
				t.Logf("queue %+v", q)
			}
		}
	})
	work(t, producer, consumer, []byte("x"), func(h *history) {
		for range 2 {
			h.more(t, 100)
			// The broker confirms messages before it has the queue itself on disk,
			// which here is seconds old: it would be forgotten, with what is in it.
			broker.Ctl(t, "eval", "mnesia:sync_log().")
			broker.Kill(t)
			until(t, "the loss is noticed", func() bool { return errors.Is(producer.Ready(t.Context()), amqpqueue.ErrNotConnected) })
			broker.Start(t)
			h.more(t, 100)
		}
	})
	// Broadcasts are heard again, too, once their queue is there again.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			_ = producer.Publish(ctx, "wake", message("w"), queue.PublishOptions{})
		}
	})
	expect(t, heard, "w")
	cancel()
	wg.Wait()
}

// A queue that is deleted takes what waits in it along. Everything that is
// published from then on arrives.
func queueDeleted(t *testing.T, broker *testenv.RabbitMQServer) {
	url := broker.VHost(t)
	producer, consumer := withURL(t, amqpqueue.Options{URL: url}), withURL(t, amqpqueue.Options{URL: url})
	sub := subscribe(t, consumer, "t", queue.SubscribeOptions{Group: "g"})
	ctx, cancel := context.WithCancel(t.Context())
	var producers, consumers sync.WaitGroup
	defer func() { cancel(); producers.Wait(); consumers.Wait() }()
	all := newHistory()
	all.consume(ctx, t, &consumers, sub, 4)
	for round := range 3 {
		before := newHistory() // what is published while the queue goes may be in it
		pctx, stop := context.WithCancel(ctx)
		before.produce(pctx, &producers, producer, "t", 8, []byte("x"))
		until(t, "messages flow", func() bool { c, _ := before.count(); return c >= 50 })
		broker.DeleteQueue(t, url, "solstice.t.v1")
		for i := range 50 {
			id := fmt.Sprintf("after-%d-%d", round, i)
			if err := producer.Publish(ctx, "t", message(id), queue.PublishOptions{}); err == nil {
				all.mu.Lock()
				all.confirmed[id] = true
				all.mu.Unlock()
			}
		}
		stop()
		producers.Wait()
		last := fmt.Sprint("last-", round)
		publish(t, producer, "t", last)
		all.mu.Lock()
		all.confirmed[last] = true
		all.mu.Unlock()
		until(t, "what was published after the deletion arrives", func() bool { return len(all.lost()) == 0 })
	}
}

func queueDeletedWithoutReaders(t *testing.T, broker *testenv.RabbitMQServer) {
	url := broker.VHost(t)
	q := withURL(t, amqpqueue.Options{URL: url})
	if err := subscribe(t, q, "t", queue.SubscribeOptions{Group: "g"}).Close(); err != nil {
		t.Fatal(err)
	}
	publish(t, q, "t", "gone")
	broker.DeleteQueue(t, url, "solstice.t.v1")
	if err := q.Publish(t.Context(), "t", message("kept"), queue.PublishOptions{}); err != nil {
		t.Fatal(err)
	}
	expect(t, subscribe(t, q, "t", queue.SubscribeOptions{Group: "g"}), "kept")
}

func exchangesDeleted(t *testing.T, broker *testenv.RabbitMQServer) {
	url := broker.VHost(t)
	q := withURL(t, amqpqueue.Options{URL: url})
	sub := subscribe(t, q, "t", queue.SubscribeOptions{Group: "g"})
	vhost := url[strings.LastIndex(url, "/")+1:]
	broker.Manage(t, "DELETE", "/exchanges/"+vhost+"/solstice.jobs", nil, nil)
	publish(t, q, "t", "m") // which fails until all is declared anew
	d := expect(t, sub, "m")
	broker.Manage(t, "DELETE", "/exchanges/"+vhost+"/solstice.dlx", nil, nil)
	broker.DeleteQueue(t, url, "solstice.t.v1.dlq")
	until(t, "the letter is put aside", func() bool {
		if d == nil {
			d = expect(t, sub, "m")
		}
		if d.Nack(t.Context(), queue.NackOptions{DeadLetter: true, Reason: "no"}) == nil {
			ls, err := q.DeadLetters(t.Context(), "t", "g", 10)
			return err == nil && len(ls) == 1
		}
		d = nil
		return false
	})
}

func purged(t *testing.T, broker *testenv.RabbitMQServer) {
	url := broker.VHost(t)
	q := withURL(t, amqpqueue.Options{URL: url})
	sub := subscribe(t, q, "t", queue.SubscribeOptions{Group: "g"})
	for i := range 20 {
		publish(t, q, "t", fmt.Sprint(i))
	}
	held := expect(t, sub, "0")
	broker.PurgeQueue(t, url, "solstice.t.v1")
	publish(t, q, "t", "later")
	d := expect(t, sub, "later")
	for _, d := range []queue.Delivery{held, d} {
		if err := d.Ack(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// calls makes every call there is, each with a context that ends soon.
func calls(t *testing.T, q *amqpqueue.Queue, sub queue.Subscription, d queue.Delivery) {
	t.Helper()
	for what, call := range map[string]func(ctx context.Context) error{
		"Publish": func(ctx context.Context) error {
			return q.Publish(ctx, "t", message("lost or not"), queue.PublishOptions{})
		},
		"Publish much": func(ctx context.Context) error { // more than the window and all buffers on the way take
			msgs := make([]queue.Message, 64)
			for i := range msgs {
				msgs[i].Body = make([]byte, queue.MaxBodyBytes)
			}
			return q.Publish(ctx, "void", msgs, queue.PublishOptions{})
		},
		"Publish delayed": func(ctx context.Context) error {
			return q.Publish(ctx, "new", []queue.Message{{NotBefore: time.Now().Add(time.Hour)}}, queue.PublishOptions{})
		},
		"Subscribe": func(ctx context.Context) error {
			_, err := q.Subscribe(ctx, "other", queue.SubscribeOptions{Group: "g"})
			return err
		},
		"Subscribe to broadcast": func(ctx context.Context) error {
			_, err := q.Subscribe(ctx, "other", queue.SubscribeOptions{})
			return err
		},
		"Next":        func(ctx context.Context) error { _, err := sub.Next(ctx); return err },
		"Nack":        func(ctx context.Context) error { return d.Nack(ctx, queue.NackOptions{Delay: time.Second}) },
		"DeadLetters": func(ctx context.Context) error { _, err := q.DeadLetters(ctx, "t", "g", 1); return err },
		"Replay":      func(ctx context.Context) error { _, err := q.Replay(ctx, "t", "g", "x"); return err },
		"Drop":        func(ctx context.Context) error { _, err := q.Drop(ctx, "t", "g", "x"); return err },
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		err := call(ctx)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, queue.ErrSettled) && !errors.Is(err, amqpqueue.ErrConnectionLost) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func memoryAlarm(t *testing.T, broker *testenv.RabbitMQServer) {
	url := broker.VHost(t)
	q := withURL(t, amqpqueue.Options{URL: url})
	sub := subscribe(t, q, "t", queue.SubscribeOptions{Group: "g"})
	publish(t, q, "t", "before")
	d := expect(t, sub, "before")
	broker.MemoryAlarm(t, true)
	t.Cleanup(func() { broker.MemoryAlarm(t, false) })
	until(t, "the alarm shows", func() bool { // once something is published
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_ = q.Publish(ctx, "t", message("blocked"), queue.PublishOptions{})
		return errors.Is(q.Ready(t.Context()), amqpqueue.ErrBlocked)
	})
	calls(t, q, sub, d)
	broker.MemoryAlarm(t, false)
	publish(t, q, "after", "after")
	expect(t, subscribe(t, q, "after", queue.SubscribeOptions{Group: "g"}), "after")
	if err := q.Ready(t.Context()); err != nil {
		t.Error(err)
	}
	if err := q.Close(); err != nil {
		t.Error(err)
	}
}

// stopped keeps the broker from running for longer than heartbeats may be
// missing.
func stopped(t *testing.T, broker *testenv.RabbitMQServer) {
	url := broker.VHost(t)
	producer := withURL(t, amqpqueue.Options{URL: url, Heartbeat: 4 * time.Second, ConnectTimeout: 2 * time.Second})
	consumer := withURL(t, amqpqueue.Options{URL: url})
	other := withURL(t, amqpqueue.Options{URL: url, Heartbeat: 4 * time.Second, ConnectTimeout: 2 * time.Second})
	sub := subscribe(t, other, "t2", queue.SubscribeOptions{Group: "g"})
	publish(t, other, "t2", "m")
	d := expect(t, sub, "m")
	work(t, producer, consumer, []byte("x"), func(h *history) {
		h.more(t, 100)
		broker.Pause(t)
		defer broker.Resume(t)
		ended := time.After(20 * time.Second) // how long a broker stops is what this is about
		calls(t, other, sub, d)
		until(t, "the silence is noticed", func() bool { return errors.Is(other.Ready(t.Context()), amqpqueue.ErrNotConnected) })
		calls(t, other, sub, d)
		<-ended
		broker.Resume(t)
		h.more(t, 100)
	})
	until(t, "the delivery comes again", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		d, err := sub.Next(ctx)
		return err == nil && d.Message().ID == "m" && d.Attempt() > 1
	})
}

func closedWhileStopped(t *testing.T, broker *testenv.RabbitMQServer) {
	url := broker.VHost(t)
	q := withURL(t, amqpqueue.Options{URL: url})
	sub := subscribe(t, q, "t", queue.SubscribeOptions{Group: "g"})
	subscribe(t, q, "t", queue.SubscribeOptions{})
	publish(t, q, "t", "m")
	expect(t, sub, "m")
	broker.Pause(t)
	defer broker.Resume(t)
	blocked := make(chan error, 1)
	go func() { blocked <- q.Publish(context.Background(), "t", message("x"), queue.PublishOptions{}) }()
	if err := q.Close(); !errors.Is(err, amqpqueue.ErrUnreachable) {
		t.Errorf("Close: %v", err)
	}
	if err := <-blocked; !errors.Is(err, queue.ErrClosed) {
		t.Errorf("Publish: %v", err)
	}
	broker.Resume(t)
	d := expect(t, subscribe(t, withURL(t, amqpqueue.Options{URL: url}), "t", queue.SubscribeOptions{Group: "g"}), "m")
	if d.Attempt() != 2 {
		t.Errorf("attempt %d, want 2", d.Attempt())
	}
}

func cut(t *testing.T, broker *testenv.RabbitMQServer) {
	url := broker.VHost(t)
	proxy := testenv.NewProxy(t, fmt.Sprintf("127.0.0.1:%d", broker.Port))
	through := strings.Replace(url, fmt.Sprintf("127.0.0.1:%d", broker.Port), proxy.Addr(), 1)
	producer, consumer := withURL(t, amqpqueue.Options{URL: through}), withURL(t, amqpqueue.Options{URL: through})
	body := bytes.Repeat([]byte("0123456789"), 10_000)
	work(t, producer, consumer, body, func(h *history) {
		for _, d := range []testenv.Direction{testenv.ToServer, testenv.ToClient} {
			h.more(t, 20)
			remove := proxy.Add(t, "limit_data", d, map[string]any{"bytes": 1_234_567})
			until(t, "the cut is noticed", func() bool {
				return producer.Ready(t.Context()) != nil || consumer.Ready(t.Context()) != nil
			})
			remove()
			h.more(t, 20)
		}
		proxy.Cut()
		until(t, "the cut is noticed", func() bool { return producer.Ready(t.Context()) != nil })
		proxy.Restore(t)
		h.more(t, 20)
	})
}

func connectionsClosed(t *testing.T, broker *testenv.RabbitMQServer) {
	url := broker.VHost(t)
	producer, consumer := withURL(t, amqpqueue.Options{URL: url}), withURL(t, amqpqueue.Options{URL: url})
	work(t, producer, consumer, []byte("x"), func(h *history) {
		h.more(t, 100)
		broker.Ctl(t, "close_all_connections", "for maintenance")
		h.more(t, 100)
	})
}

// TestConsumerTimeout: the broker takes deliveries from who holds them too long.
func TestConsumerTimeout(t *testing.T) {
	broker := testenv.StartRabbitMQ(t, testenv.RabbitMQOptions{
		Config: "consumer_timeout = 5000", Advanced: "[{rabbit,[{channel_tick_interval,1000}]}].",
	})
	q := withURL(t, amqpqueue.Options{URL: broker.VHost(t)})
	t.Run("held", func(t *testing.T) {
		sub := subscribe(t, q, "held", queue.SubscribeOptions{Group: "g"})
		publish(t, q, "held", "m")
		first := expect(t, sub, "m")
		second := expect(t, sub, "m")
		if second.Attempt() != 2 {
			t.Errorf("attempt %d, want 2", second.Attempt())
		}
		if err := first.Ack(t.Context()); !errors.Is(err, queue.ErrSettled) {
			t.Errorf("Ack of what was taken away: %v", err)
		}
		if err := second.Ack(t.Context()); err != nil {
			t.Error(err)
		}
		publish(t, q, "held", "next")
		expect(t, sub, "next")
	})
	t.Run("acked before a long job", func(t *testing.T) {
		long := subscribe(t, q, "long", queue.SubscribeOptions{Group: "g"})
		watch := subscribe(t, q, "watch", queue.SubscribeOptions{Group: "g"})
		publish(t, q, "long", "job")
		if err := expect(t, long, "job").Ack(t.Context()); err != nil {
			t.Fatal(err)
		}
		// The job goes on for longer than the timeout, as another delivery shows
		// that is not acked.
		publish(t, q, "watch", "w")
		expect(t, watch, "w")
		expect(t, watch, "w")
		publish(t, q, "long", "next")
		d := expect(t, long, "next") // and not the job again
		if d.Attempt() != 1 {
			t.Errorf("attempt %d", d.Attempt())
		}
	})
}
