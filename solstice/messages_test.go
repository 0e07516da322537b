package solstice_test

import (
	"bytes"
	"strings"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/amqpqueue"
	"github.com/solstice-ci/solstice-go/queue/memqueue"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
)

// TestUnknownMessages: a run request that the engine cannot read goes to the dead
// letters with the reason, and the good one behind it runs. A wake-up that it
// cannot read does no harm.
func TestUnknownMessages(t *testing.T) {
	t.Run("memqueue", func(t *testing.T) {
		q := memqueue.New()
		t.Cleanup(func() { _ = q.Close() })
		unknownMessages(t, testenv.SQLite(t), func(c *solstice.Config) { c.Queue = q })
	})
	t.Run("amqpqueue", func(t *testing.T) {
		q, err := amqpqueue.Open(t.Context(), amqpqueue.Options{URL: testenv.RabbitMQ(t)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = q.Close() })
		unknownMessages(t, testenv.SQLite(t), func(c *solstice.Config) { c.Queue = q })
	})
	testenv.Databases(t, func(t *testing.T, url string) {
		unknownMessages(t, url, func(*solstice.Config) {}) // sqlqueue
	})
}

func unknownMessages(t *testing.T, url string, edit func(*solstice.Config)) {
	p := newPlant(t, url)
	var q queue.Queue
	eng, _ := p.start(t, edit, func(c *solstice.Config) { q = c.Queue })
	commit := p.commit(t, map[string]string{".solstice/workflow.yaml": trivial})
	good, err := messages.Encode(messages.RunRequest{Repo: forge.Repo{Name: "repo"}, Commit: commit})
	if err != nil {
		t.Fatal(err)
	}
	as := func(id, contentType, schema string, body []byte) queue.Message {
		return queue.Message{ID: id, ContentType: contentType, Body: body, Attributes: map[string]string{messages.AttributeSchema: schema}}
	}
	good.ID = "good"
	unread := map[string]string{
		"newer":   `unknown major version: "runrequest.v2"`,
		"status":  `"status.v1"; want runrequest.v1`,
		"unnamed": "neither solstice-schema nor the content type",
		"lacking": "repo.name is missing",
	}
	publish := func(topic string, msgs ...queue.Message) {
		t.Helper()
		if err := q.Publish(t.Context(), topic, msgs, queue.PublishOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	publish(messages.TopicWake, as("", "application/vnd.solstice.wake.v2+json", "wake.v2", []byte("?")))
	publish(messages.TopicRunRequest,
		as("newer", "application/vnd.solstice.runrequest.v2+json", "runrequest.v2", good.Body),
		as("status", "application/vnd.solstice.status.v1+json", "status.v1", good.Body),
		as("unnamed", "application/json", "", good.Body),
		as("lacking", good.ContentType, "runrequest.v1", bytes.Replace(good.Body, []byte(`"name"`), []byte(`"nom"`), 1)),
		good)

	eventually(t, "a run", func() bool {
		runs, err := eng.Runs(t.Context(), solstice.RunFilter{})
		if err != nil {
			t.Fatal(err)
		}
		return len(runs) == 1 && runs[0].State == solstice.RunSucceeded && runs[0].Commit == commit
	})
	letterer, ok := queue.As[queue.DeadLetterer](q)
	if !ok {
		t.Fatal("the queue has no dead letters")
	}
	var letters []queue.DeadLetter
	eventually(t, "the dead letters", func() bool {
		var err error
		if letters, err = letterer.DeadLetters(t.Context(), messages.TopicRunRequest, messages.Group, 10); err != nil {
			t.Fatal(err)
		}
		return len(letters) == len(unread)
	})
	for _, l := range letters {
		if want := unread[l.Message.ID]; want == "" || !strings.Contains(l.Reason, want) || l.Attempt != 1 {
			t.Errorf("dead letter %q after attempt %d, %q; want %q", l.Message.ID, l.Attempt, l.Reason, want)
		}
	}
	if runs, err := eng.Runs(t.Context(), solstice.RunFilter{}); err != nil || len(runs) != 1 {
		t.Errorf("%d runs, %v", len(runs), err)
	}
}

// TestRunRequestWithoutID: foreign programs may leave a message's ID out. Then
// nothing tells a repeat, so it is refused, and not taken for another one.
func TestRunRequestWithoutID(t *testing.T) {
	url := testenv.RabbitMQ(t)
	q, err := amqpqueue.Open(t.Context(), amqpqueue.Options{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = q.Close() })
	p := newPlant(t, testenv.SQLite(t))
	eng, _ := p.start(t, func(c *solstice.Config) { c.Queue = q })
	commit := p.commit(t, map[string]string{".solstice/workflow.yaml": trivial})
	conn, err := amqp.Dial(url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ch, err := conn.Channel()
	if err == nil {
		err = ch.Confirm(false)
	}
	if err != nil {
		t.Fatal(err)
	}
	returned := ch.NotifyReturn(make(chan amqp.Return, 1)) // comes before the confirm
	for _, key := range []string{"", "", "its own"} {
		m, err := messages.Encode(messages.RunRequest{Repo: forge.Repo{Name: "repo"}, Commit: commit, IdempotencyKey: key})
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "a queue for run requests", func() bool {
			sent, err := ch.PublishWithDeferredConfirm("solstice.jobs", messages.TopicRunRequest, true, false, amqp.Publishing{ContentType: m.ContentType, Body: m.Body})
			if err != nil || !sent.Wait() {
				t.Fatalf("not published: %v", err)
			}
			select {
			case <-returned:
				return false // nobody subscribed yet
			default:
				return true
			}
		})
	}
	eventually(t, "a run and two dead letters", func() bool {
		runs, err := eng.Runs(t.Context(), solstice.RunFilter{})
		if err != nil || len(runs) > 1 {
			t.Fatalf("%d runs, %v", len(runs), err)
		}
		letters, err := q.DeadLetters(t.Context(), messages.TopicRunRequest, messages.Group, 10)
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range letters {
			if !strings.Contains(l.Reason, "needs a message ID") {
				t.Errorf("dead letter: %s", l.Reason)
			}
		}
		return len(letters) == 2 && len(runs) == 1 && runs[0].State == solstice.RunSucceeded
	})
}

// TestStatusesAreMessages: what goes to a forge integration is what is published
// of statuses, in the run's trace.
func TestStatusesAreMessages(t *testing.T) { onBoth(t, testStatusesAreMessages) }

func testStatusesAreMessages(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	var q queue.Queue
	eng, _ := p.start(t, func(c *solstice.Config) { q = c.Queue })
	sub, err := q.Subscribe(t.Context(), messages.StatusTopic("local"), queue.SubscribeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Close()
	run := finish(t, eng, p.submit(t, eng, trivial).ID)
	for {
		d, err := sub.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		m := d.Message()
		s, err := messages.Decode[messages.Status](m)
		if err != nil || m.Attributes[messages.AttributeSchema] != "status.v1" || m.ContentType != "application/vnd.solstice.status.v1+json" {
			t.Fatalf("%+v, %v of %+v", s, err, m)
		}
		if s.Commit != run.Commit || s.Forge != "local" {
			t.Errorf("status %+v of run %+v", s, run)
		}
		if s.Status.ExternalID == run.ID && s.Status.State == forge.StatusSuccess {
			return
		}
	}
}
