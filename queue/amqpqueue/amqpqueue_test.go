package amqpqueue_test

import (
	"context"
	"log/slog"
	"testing"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/amqpqueue"
	"github.com/solstice-ci/solstice-go/queue/queuetest"
)

func open(tb queuetest.TB, url string) *amqpqueue.Queue {
	tb.Helper()
	o := amqpqueue.Options{URL: url, ConnectionName: "test"}
	if t, ok := tb.(testing.TB); ok {
		o.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	q, err := amqpqueue.Open(context.Background(), o)
	if err != nil {
		tb.Fatalf("Open: %v", err)
	}
	return q
}

func TestConformance(t *testing.T) {
	testenv.RabbitMQ(t) // which may take longer to start than the suite waits
	urls := map[queue.Queue]string{}
	at := func(tb queuetest.TB, url string) queue.Queue {
		q := open(tb, url)
		urls[q] = url
		return q
	}
	again := func(tb queuetest.TB, q queue.Queue) queue.Queue { return at(tb, urls[q]) }
	queuetest.Run(t, queuetest.Harness{
		New:    func(tb queuetest.TB) queue.Queue { return at(tb, testenv.RabbitMQ(tb.(testing.TB))) },
		Reopen: again,
		Second: again,
	})
}
