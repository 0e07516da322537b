package amqpqueue_test

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
)

// windows are how many messages are under way at once.
var windows = []int{1, 64, 256}

// bareQueue is a quorum queue without this package.
func bareQueue(b *testing.B, url string) *amqp.Channel {
	b.Helper()
	conn, err := amqp.Dial(url)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = conn.Close() })
	ch, err := conn.Channel()
	if err == nil {
		_, err = ch.QueueDeclare("bare", true, false, false, false, amqp.Table{amqp.QueueTypeArg: amqp.QueueTypeQuorum})
	}
	if err == nil {
		err = ch.Confirm(false)
	}
	if err != nil {
		b.Fatal(err)
	}
	return ch
}

// barePublish publishes n messages, of which at most window are not confirmed.
func barePublish(b *testing.B, ch *amqp.Channel, n, window int, body []byte) {
	b.Helper()
	var pending []*amqp.DeferredConfirmation
	wait := func() {
		if !pending[0].Wait() {
			b.Fatal("not confirmed")
		}
		pending = pending[1:]
	}
	for range n {
		if len(pending) == window {
			wait()
		}
		c, err := ch.PublishWithDeferredConfirm("", "bare", true, false, amqp.Publishing{DeliveryMode: amqp.Persistent, Body: body})
		if err != nil {
			b.Fatal(err)
		}
		pending = append(pending, c)
	}
	for len(pending) > 0 {
		wait()
	}
}

// parallel runs n calls of f on so many goroutines.
func parallel(workers, n int, f func()) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for next.Add(1) <= int64(n) {
				f()
			}
		})
	}
	wg.Wait()
}

// rounds are how often both sides take their turn, since the machine's speed
// changes over time.
const rounds = 8

// BenchmarkPublish compares Publish, called by as many goroutines as the window
// has places, with bare amqp091-go: 1 KiB, persistent, quorum queue.
func BenchmarkPublish(b *testing.B) {
	body := bytes.Repeat([]byte("x"), 1024)
	for _, window := range windows {
		b.Run(fmt.Sprint("window=", window), func(b *testing.B) {
			url := testenv.RabbitMQ(b)
			ch := bareQueue(b, url)
			q := open(b, url)
			defer q.Close()
			sub, err := q.Subscribe(b.Context(), "t", queue.SubscribeOptions{Group: "g"})
			if err != nil {
				b.Fatal(err)
			}
			defer sub.Close()
			n := max(b.N/rounds, 1)
			compare(b, n, func() { barePublish(b, ch, n, window, body) }, func() {
				parallel(window, n, func() {
					if err := q.Publish(context.Background(), "t", []queue.Message{{ID: "m", Body: body}}, queue.PublishOptions{}); err != nil {
						b.Error(err)
					}
				})
			})
		})
	}
}

// BenchmarkConsume compares Next and Ack, called by as many goroutines as the
// window has places, with bare amqp091-go and a prefetch of the window.
func BenchmarkConsume(b *testing.B) {
	body := bytes.Repeat([]byte("x"), 1024)
	for _, window := range windows {
		b.Run(fmt.Sprint("window=", window), func(b *testing.B) {
			url := testenv.RabbitMQ(b)
			ch := bareQueue(b, url)
			q := open(b, url)
			defer q.Close()
			sub, err := q.Subscribe(b.Context(), "t", queue.SubscribeOptions{Group: "g", Prefetch: window})
			if err != nil {
				b.Fatal(err)
			}
			defer sub.Close()
			n := max(b.N/rounds, 1)
			barePublish(b, ch, (rounds+1)*n, 256, body)
			for chunk := range slices.Chunk(slices.Repeat([]queue.Message{{ID: "m", Body: body}}, (rounds+1)*n), 1000) {
				if err := q.Publish(b.Context(), "t", chunk, queue.PublishOptions{}); err != nil {
					b.Fatal(err)
				}
			}
			if err := ch.Qos(window, 0, false); err != nil {
				b.Fatal(err)
			}
			in, err := ch.Consume("bare", "", false, false, false, false, nil)
			if err != nil {
				b.Fatal(err)
			}
			compare(b, n, func() {
				for range n {
					d := <-in
					if err := d.Ack(false); err != nil {
						b.Fatal(err)
					}
				}
			}, func() {
				parallel(window, n, func() {
					d, err := sub.Next(context.Background())
					if err == nil {
						err = d.Ack(context.Background())
					}
					if err != nil {
						b.Error(err)
					}
				})
			})
		})
	}
}

// compare lets both take turns of n messages, and reports rates and the ratio of
// the times.
func compare(b *testing.B, n int, bare, ours func()) {
	b.Helper()
	bare() // warm up
	ours()
	var tb, to time.Duration
	b.ResetTimer()
	for range rounds {
		start := time.Now()
		bare()
		tb += time.Since(start)
		start = time.Now()
		ours()
		to += time.Since(start)
	}
	b.StopTimer()
	b.ReportMetric(float64(rounds*n)/tb.Seconds(), "bare/s")
	b.ReportMetric(float64(rounds*n)/to.Seconds(), "msgs/s")
	b.ReportMetric(tb.Seconds()/to.Seconds(), "ratio")
}
