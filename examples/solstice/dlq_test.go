package main

import (
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/testenv" //nolint:depguard // the test is not part of the main that is copied
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
)

// TestDLQ lists, replays and drops dead letters in each queue, from outside.
func TestDLQ(t *testing.T) {
	t.Parallel()
	t.Run("sqlite", func(t *testing.T) { testDLQ(t, "DATABASE_URL", testenv.SQLite(t)) })
	t.Run("postgres", func(t *testing.T) { testDLQ(t, "DATABASE_URL", testenv.Postgres(t)) })
	t.Run("rabbitmq", func(t *testing.T) { testDLQ(t, "AMQP_URL", testenv.RabbitMQ(t)) })
}

func testDLQ(t *testing.T, variable, url string) {
	const topic = "runrequest"
	log := slog.New(slog.DiscardHandler)
	var db *bun.DB
	b := storage.Broker{AMQPPrefetch: 64, AMQPExchange: "solstice.jobs", AMQPQueue: "solstice"}
	if variable == "AMQP_URL" {
		b.AMQPURL = url
	} else {
		var err error
		if db, err = (storage.Database{DatabaseURL: url, DBPoolMaxSize: 4, DBPoolTimeoutMS: 30_000}).Open(t.Context(), "", log); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = db.Close() }()
	}
	q, err := b.Open(t.Context(), db, log)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = q.Close() }()
	sub, err := q.Subscribe(t.Context(), topic, queue.SubscribeOptions{Group: "solstice"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sub.Close() }()
	next := func() queue.Delivery {
		t.Helper()
		d, err := sub.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	msgs := []queue.Message{
		{ID: "one", Body: []byte(`{"n":1}`), Attributes: map[string]string{"solstice-schema": "runrequest.v9"}},
		{ID: "two", Body: []byte("\xff")},
		{ID: "three", Body: []byte(`{"n":3}`)},
	}
	for _, m := range msgs { // one after the other, for their order
		if err := q.Publish(t.Context(), topic, []queue.Message{m}, queue.PublishOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := next().Nack(t.Context(), queue.NackOptions{DeadLetter: true, Reason: "no \x1b[31m" + m.ID}); err != nil {
			t.Fatal(err)
		}
	}

	u := newUser(t, t.TempDir())
	u.env = []string{variable + "=" + url}
	list := func(args ...string) []letterJSON {
		t.Helper()
		return decoded[struct {
			Letters []letterJSON `json:"dead_letters"`
		}](t, u.ok(append([]string{"dlq", "list", topic, "--json"}, args...)...)).Letters
	}
	ids := func(ls []letterJSON) string {
		var out []string
		for _, l := range ls {
			out = append(out, l.ID)
		}
		return strings.Join(out, " ")
	}
	for len(list()) < len(msgs) && t.Context().Err() == nil { // until go test's own timeout: RabbitMQ moves them by itself
	}
	all := list("--body")
	if ids(all) != "one two three" || all[0].Attempts != 1 || all[0].Size != 7 || all[0].Attributes["solstice-schema"] != "runrequest.v9" || !strings.Contains(all[0].Reason, "one") {
		t.Errorf("letters: %+v", all)
	}
	body, err := json.Marshal(all[0].Body)
	if err != nil || string(body) != `{"n":1}` || all[1].Body != "/w==" {
		t.Errorf("bodies: %s, %v; %v", body, err, all[1].Body)
	}
	if ls := list(); ids(ls) != "one two three" || ls[0].Body != nil {
		t.Errorf("a body that was not asked for: %v", ls[0].Body)
	}
	for _, c := range []struct{ n, want string }{{"1", "one"}, {"2", "one two"}, {"1", "one"}, {"50", "one two three"}} {
		if got := ids(list("-n", c.n)); got != c.want { // looking at some changes no order
			t.Errorf("the first %s: %s", c.n, got)
		}
	}
	out := u.ok("dlq", "list", topic)
	has(t, "list", out, "ID", "REASON", "runrequest.v9", "two")
	if strings.Contains(out, "\x1b") {
		t.Errorf("control characters are shown: %q", out)
	}

	for _, args := range [][]string{{"dlq", "drop", topic}, {"dlq", "drop", topic, "one", "--all"}, {"dlq", "list", "No Topic"}, {"dlq", "list", topic, "-n", "0"}} {
		u.solstice(args...).want(t, exitCouldNotRun)
	}
	u.solstice("dlq", "drop", topic, "none").want(t, exitCouldNotRun)
	if variable == "DATABASE_URL" {
		dir := t.TempDir()
		u.env = []string{"STATE_DIR=" + dir}
		u.solstice("dlq", "list", topic).want(t, exitCouldNotRun)
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("where there is no queue it made %v, %v", left, err)
		}
		u.env = []string{variable + "=" + url}
	}
	if got := ids(list()); got != "one two three" {
		t.Errorf("after refusals: %s", got)
	}
	if got := ids(list("--group", "other")); got != "" {
		t.Errorf("another group's: %s", got)
	}
	if out := u.ok("dlq", "replay", topic, "two", "two"); out != "1 replayed\n" {
		t.Errorf("replay: %q", out)
	}
	d := next()
	if d.Message().ID != "two" || d.Attempt() != 1 {
		t.Errorf("replayed: %s, attempt %d", d.Message().ID, d.Attempt())
	}
	if err := d.Ack(t.Context()); err != nil && !errors.Is(err, queue.ErrSettled) {
		t.Error(err)
	}
	if out := u.ok("dlq", "drop", topic, "--all"); out != "2 dropped\n" || len(list()) != 0 {
		t.Errorf("drop: %q, %s are left", out, ids(list()))
	}
}
