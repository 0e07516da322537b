package sqlqueue_test

import (
	"context"
	"net/url"
	"testing"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/sqlqueue"
)

// deaf are options of a process that hears of others' messages by notifications
// or not within the time of a test.
var deaf = sqlqueue.Options{Poll: time.Hour, Lease: time.Hour}

// listener is a queue whose reader of group g waits in Next.
type listener struct {
	*sqlqueue.Queue
	sub queue.Subscription
	got chan string
}

func listen(t *testing.T, url string) *listener {
	t.Helper()
	l := &listener{Queue: newQueue(t, open(t, url), deaf), got: make(chan string, 100)}
	t.Cleanup(func() { _ = l.Close() })
	var err error
	if l.sub, err = l.Subscribe(t.Context(), "t", queue.SubscribeOptions{Group: "g"}); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			d, err := l.sub.Next(context.Background()) // ends with Close
			if err != nil {
				return
			}
			if d.Ack(context.Background()) == nil {
				l.got <- d.Message().ID
			}
		}
	}()
	return l
}

func (l *listener) wants(t *testing.T, id string) {
	t.Helper()
	select {
	case got := <-l.got:
		if got != id {
			t.Fatalf("got %s, want %s", got, id)
		}
	case <-time.After(time.Minute):
		t.Fatalf("no wake-up for %s", id)
	}
}

func publish(t *testing.T, q queue.Queue, id string) {
	t.Helper()
	if err := q.Publish(t.Context(), "t", []queue.Message{{ID: id}}, queue.PublishOptions{}); err != nil {
		t.Fatal(err)
	}
}

// listening waits until n sessions listen.
func listening(t *testing.T, db *bun.DB, n int) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		var have int
		err := db.NewRaw("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'").Scan(t.Context(), &have)
		if err == nil && have == n {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d sessions listen, want %d: %v", have, n, err)
		}
	}
}

// TestNotified: another process's messages are heard of at once, before and
// after the server was restarted, orderly or not.
func TestNotified(t *testing.T) {
	s := testenv.StartPostgres(t)
	url := s.Database(t)
	l := listen(t, url)
	db := open(t, url)
	other := newQueue(t, db, deaf)
	t.Cleanup(func() { _ = other.Close() })
	listening(t, db, 1)
	publish(t, other, "1")
	l.wants(t, "1")
	s.Restart(t)
	listening(t, db, 1)
	publish(t, other, "2")
	l.wants(t, "2")
	s.Kill(t)
	s.Start(t)
	listening(t, db, 1)
	publish(t, other, "3")
	l.wants(t, "3")
}

// TestNotificationLost: what was published while a reader had no connection is
// found when it has one again.
func TestNotificationLost(t *testing.T) {
	direct, err := url.Parse(testenv.Postgres(t))
	if err != nil {
		t.Fatal(err)
	}
	proxy := testenv.NewProxy(t, direct.Host)
	through := *direct
	through.Host = proxy.Addr()
	l := listen(t, through.String())
	db := open(t, direct.String())
	other := newQueue(t, db, deaf)
	t.Cleanup(func() { _ = other.Close() })
	listening(t, db, 1)
	publish(t, other, "1")
	l.wants(t, "1")
	proxy.Cut()
	listening(t, db, 0)
	publish(t, other, "2")
	if len(l.got) > 0 {
		t.Fatal("the reader still has a connection")
	}
	proxy.Restore(t)
	l.wants(t, "2")
	publish(t, other, "3")
	l.wants(t, "3")
}
