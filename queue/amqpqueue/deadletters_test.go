package amqpqueue_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/amqpqueue"
)

// bury makes n dead letters of topic t and group g, and returns their IDs.
func bury(t *testing.T, q queue.Queue, sub queue.Subscription, n int) (ids []string) {
	t.Helper()
	for i := range n {
		id := fmt.Sprint("letter-", i)
		publish(t, q, "t", id)
		if err := expect(t, sub, id).Nack(t.Context(), queue.NackOptions{DeadLetter: true, Reason: "no"}); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	return ids
}

func letters(t *testing.T, q *amqpqueue.Queue, limit int) (ids []string) {
	t.Helper()
	ls, err := q.DeadLetters(t.Context(), "t", "g", limit)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range ls {
		ids = append(ids, l.Message.ID)
	}
	return ids
}

// bare is a channel past the driver.
func bare(t *testing.T, url string) *amqp.Channel {
	t.Helper()
	conn, err := amqp.Dial(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	return ch
}

// TestLettersKeepTheirOrder: whoever looked at them, and however that ended.
func TestLettersKeepTheirOrder(t *testing.T) {
	url := testenv.RabbitMQ(t)
	q, other := withURL(t, amqpqueue.Options{URL: url}), withURL(t, amqpqueue.Options{URL: url})
	sub := subscribe(t, q, "t", queue.SubscribeOptions{Group: "g"})
	want := bury(t, q, sub, 70) // of more than 32 that come back at once RabbitMQ forgets the order
	check := func(q *amqpqueue.Queue, limit int) {
		t.Helper()
		if got := letters(t, q, limit); !slices.Equal(got, want[:min(limit, len(want))]) {
			t.Errorf("%d letters: %v", limit, got)
		}
	}
	for _, limit := range []int{1, 50, 3, 1000, 1, 69, 70, 71} {
		check(q, limit)
		check(other, limit)
	}
	if n, err := other.Drop(t.Context(), "t", "g", "letter-3"); n != 1 || err != nil {
		t.Errorf("Drop: %d, %v", n, err)
	}
	want = slices.Delete(want, 3, 4)
	check(q, 5)

	// One that dies in the middle has its letters come last.
	ch := bare(t, url)
	for range 40 {
		if _, ok, err := ch.Get("solstice.t.v1.dlq", false); err != nil || !ok {
			t.Fatalf("get a letter: %v, %v", ok, err)
		}
	}
	if err := ch.Close(); err != nil {
		t.Fatal(err)
	}
	until(t, "the broker has them back", func() bool { return len(letters(t, q, 100)) == len(want) })
	check(q, 2)
	check(other, 100)

	// New ones come behind those that were looked at.
	for _, id := range []string{"new", "newer"} {
		publish(t, q, "t", id)
		if err := expect(t, sub, id).Nack(t.Context(), queue.NackOptions{DeadLetter: true}); err != nil {
			t.Fatal(err)
		}
		want = append(want, id)
		check(q, 1)
	}
	check(q, 100)
	if n, err := q.Replay(t.Context(), "t", "g", want...); n != len(want) || err != nil {
		t.Fatalf("Replay: %d, %v", n, err)
	}
	for _, id := range want {
		if err := expect(t, sub, id).Ack(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestWalksAtOnce: each letter is replayed by one of those who replay, and
// nobody is held up for good.
func TestWalksAtOnce(t *testing.T) {
	url := testenv.RabbitMQ(t)
	q, other := withURL(t, amqpqueue.Options{URL: url}), withURL(t, amqpqueue.Options{URL: url})
	sub := subscribe(t, q, "t", queue.SubscribeOptions{Group: "g"})
	ids := bury(t, q, sub, 60)

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	h := newHistory()
	for _, id := range ids {
		h.confirmed[id] = true
	}
	var readers, lookers, replayers sync.WaitGroup
	h.consume(ctx, t, &readers, sub, 4)
	for _, q := range []*amqpqueue.Queue{q, other} {
		lookers.Go(func() {
			for ctx.Err() == nil {
				ls, err := q.DeadLetters(ctx, "t", "g", 100)
				if err != nil && !errors.Is(err, context.Canceled) {
					t.Errorf("DeadLetters: %v", err)
				}
				if !slices.IsSortedFunc(ls, func(a, b queue.DeadLetter) int { return a.Time.Compare(b.Time) }) {
					t.Error("letters out of order")
				}
			}
		})
	}
	var replayed atomic.Int64
	for i, q := range []*amqpqueue.Queue{q, q, other, other} {
		replayers.Go(func() {
			mine := slices.Clone(ids)
			if i%2 == 1 {
				mine = mine[:30]
			}
			n, err := q.Replay(ctx, "t", "g", mine...)
			if err != nil {
				t.Errorf("Replay: %v", err)
			}
			replayed.Add(int64(n))
		})
	}
	replayers.Wait()
	until(t, "all were received", func() bool { return len(h.lost()) == 0 })
	stop()
	lookers.Wait()
	readers.Wait()
	if replayed.Load() != int64(len(ids)) {
		t.Errorf("%d replayed of %d", replayed.Load(), len(ids))
	}
	for id, n := range h.received {
		if n != 1 {
			t.Errorf("%s was received %d times", id, n)
		}
	}
	if got := letters(t, q, 100); got != nil {
		t.Errorf("letters left: %v", got)
	}
}

// TestReplayOfWhatDiesAgain ends, although the letters are there again.
func TestReplayOfWhatDiesAgain(t *testing.T) {
	q := withURL(t, amqpqueue.Options{URL: testenv.RabbitMQ(t)})
	sub := subscribe(t, q, "t", queue.SubscribeOptions{Group: "g"})
	ids := bury(t, q, sub, 20)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			d, err := sub.Next(ctx)
			if err != nil {
				return
			}
			if err := d.Nack(ctx, queue.NackOptions{DeadLetter: true}); err != nil && ctx.Err() == nil {
				t.Errorf("Nack: %v", err)
			}
		}
	})
	if n, err := q.Replay(ctx, "t", "g", ids...); n != len(ids) || err != nil {
		t.Errorf("Replay: %d, %v, want %d", n, err, len(ids))
	}
	until(t, "all are dead letters again", func() bool { return len(letters(t, q, 100)) == len(ids) })
	stop()
	wg.Wait()
}

// TestReplayCutShort: what was not replayed is a dead letter still.
func TestReplayCutShort(t *testing.T) {
	q := withURL(t, amqpqueue.Options{URL: testenv.RabbitMQ(t)})
	sub := subscribe(t, q, "t", queue.SubscribeOptions{Group: "g"})
	ids := bury(t, q, sub, 100)
	ctx, stop := context.WithCancel(t.Context())
	reading, stopReading := context.WithCancel(t.Context())
	var readers sync.WaitGroup
	defer func() { stop(); stopReading(); readers.Wait() }()
	h := newHistory()
	for _, id := range ids {
		h.confirmed[id] = true
	}
	h.consume(reading, t, &readers, sub, 1)
	var call sync.WaitGroup
	call.Go(func() {
		n, err := q.Replay(ctx, "t", "g", ids...)
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("Replay: %v", err)
		}
		t.Logf("%d replayed, then %v", n, err)
	})
	until(t, "some are replayed", func() bool { _, n := h.count(); return n >= 10 })
	stop()
	call.Wait()
	until(t, "nothing is lost", func() bool {
		left := letters(t, q, 1000)
		h.mu.Lock()
		defer h.mu.Unlock()
		for _, id := range ids {
			if h.received[id] == 0 && !slices.Contains(left, id) {
				return false
			}
		}
		return true
	})
}
