package integration_test

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/memqueue"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
	"github.com/solstice-ci/solstice-go/solstice/integration"
)

// plain is a forge whose webhooks are events as JSON, with an HMAC over the body.
type plain struct {
	forge.Forge
	mu       sync.Mutex
	statuses []forge.Status
}

func sign(body []byte) string {
	m := hmac.New(sha256.New, []byte("secret"))
	m.Write(body)
	return hex.EncodeToString(m.Sum(nil))
}

func (*plain) Capabilities() forge.Capabilities {
	return forge.Capabilities{Webhooks: true, Statuses: true}
}

func (*plain) ParseWebhook(ctx context.Context, r *http.Request, s forge.SecretFunc) (forge.Event, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return forge.Event{}, err
	}
	if _, err := s(ctx, ""); err != nil {
		return forge.Event{}, err
	}
	if !hmac.Equal([]byte(r.Header.Get("X-Signature")), []byte(sign(body))) {
		return forge.Event{}, forge.ErrSignature
	}
	if bytes.Contains(body, []byte("panic")) {
		panic("as asked")
	}
	var ev forge.Event
	if err := json.Unmarshal(body, &ev); err != nil {
		return forge.Event{}, fmt.Errorf("%w: %w", forge.ErrInvalid, err)
	}
	if ev.Kind == "star" {
		return forge.Event{}, fmt.Errorf("%w: stars", forge.ErrIgnored)
	}
	ev.Delivery = r.Header.Get("X-Delivery")
	return ev, nil
}

func (p *plain) ReportStatus(_ context.Context, _ forge.Repo, _ string, s forge.Status) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.statuses = append(p.statuses, s)
	return nil
}

type rig struct {
	t     testing.TB
	in    *integration.Integration
	forge *plain
	queue queue.Queue
	srv   *httptest.Server

	mu   sync.Mutex
	asks []messages.RunRequest
}

func newRig(t testing.TB, url string, edit func(*integration.Config)) *rig {
	t.Helper()
	db, err := sqldb.Open(t.Context(), url, sqldb.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	if err := solstice.Migrate(t.Context(), db); err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, forge: &plain{}, queue: memqueue.New()}
	t.Cleanup(func() { _ = r.queue.Close() })
	cfg := integration.Config{
		DB: db, Queue: r.queue, ReportStatuses: true, BodyTimeout: 2 * time.Second, Tick: 50 * time.Millisecond,
		Forges: map[string]integration.Instance{"f": {
			Forge: r.forge, Allow: []string{"Acme"}, Secret: func(context.Context, string) ([]byte, error) { return []byte("secret"), nil },
		}},
	}
	if edit != nil {
		edit(&cfg)
	}
	if r.in, err = integration.New(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{}, 2)
	go func() { _ = r.in.Run(ctx); done <- struct{}{} }()
	c := &queue.Consumer{Queue: r.queue, Topic: messages.TopicRunRequest, Group: messages.Group, Handler: messages.Handler(
		func(_ context.Context, _ queue.Message, m messages.RunRequest) error {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.asks = append(r.asks, m)
			return nil
		})}
	go func() { _ = c.Run(ctx); done <- struct{}{} }()
	r.srv = httptest.NewServer(r.in)
	t.Cleanup(func() { r.srv.Close(); cancel(); <-done; <-done })
	return r
}

func (r *rig) post(delivery string, body []byte, signature string) (int, string) {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.t.Context(), http.MethodPost, r.srv.URL+"/webhooks/f", bytes.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("X-Delivery", delivery)
	req.Header.Set("X-Signature", signature)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func (r *rig) good(delivery string, body []byte) (int, string) {
	return r.post(delivery, body, sign(body))
}

func (r *rig) asked() []messages.RunRequest {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.asks)
}

func (r *rig) eventually(what string, ok func() bool) {
	r.t.Helper()
	for range 3000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	r.t.Fatalf("in vain: %s", what)
}

func push(owner, commit string) []byte {
	b, _ := json.Marshal(forge.Event{Kind: forge.KindPush, Repo: forge.Repo{Owner: owner, Name: "widget"}, Ref: "refs/heads/main", Commit: commit})
	return b
}

// TestWebhooks: what is genuine and allowed asks for runs once, the rest never.
func TestWebhooks(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		r := newRig(t, url, nil)
		want := func(what string, status int, text string, gotStatus int, got string) {
			t.Helper()
			if gotStatus != status || !strings.Contains(got, text) {
				t.Errorf("%s: %d %s", what, gotStatus, got)
			}
		}
		do := func(what string, status int, text, delivery string, body []byte) {
			t.Helper()
			s, got := r.good(delivery, body)
			want(what, status, text, s, got)
		}
		one := push("acme", "1")
		do("a push", 202, "accepted", "d1", one)
		do("the same again", 202, "duplicate", "d1", one)
		do("the same body, as another delivery", 202, "duplicate", "d2", one)
		do("another body, as the same delivery", 202, "duplicate", "d1", push("acme", "2"))
		do("another", 202, "accepted", "d3", push("acme", "3"))
		do("of a stranger", 202, "not on the list", "d4", push("acme2", "1"))
		do("of a stranger, again", 202, "not on the list", "d4", push("acme2", "1"))
		do("a star", 202, "ignored", "d5", []byte(`{"kind": "star"}`))
		do("a ping", 202, "nothing to do", "d6", []byte(`{"kind": "ping"}`))
		do("no JSON", 400, "invalid", "d7", []byte("{"))
		do("a panic", 503, "", "d8", []byte("panic"))
		do("no repository", 400, "repo.name", "d9", []byte(`{"kind": "push", "repo": {"owner": "acme"}}`))
		s, got := r.post("d10", one, sign([]byte("other")))
		want("forged", 401, "signature", s, got)
		for what, req := range map[string]struct {
			method, path string
			status       int
		}{"another name": {http.MethodPost, "/webhooks/g", 404}, "below": {http.MethodPost, "/webhooks/f/x", 404}, "by GET": {http.MethodGet, "/webhooks/f", 405}} {
			hr, err := http.NewRequestWithContext(t.Context(), req.method, r.srv.URL+req.path, nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := http.DefaultClient.Do(hr)
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			want(what, req.status, "", resp.StatusCode, "")
		}

		r.eventually("two requests for runs", func() bool { return len(r.asked()) == 2 })
		asks := r.asked()
		if a := asks[0]; a.Forge != "f" || a.Repo.FullName() != "acme/widget" || a.Commit != "1" || a.Event.Delivery != "d1" || a.Event.Kind != forge.KindPush {
			t.Errorf("asked for %+v", a)
		}
		list, err := r.in.Deliveries().List(t.Context(), integration.DeliveryFilter{})
		if err != nil {
			t.Fatal(err)
		}
		var states []string
		for _, d := range list {
			states = append(states, d.State)
			if d.Headers != nil || d.Body != nil {
				t.Errorf("the list has %+v", d)
			}
		}
		if got := strings.Join(states, " "); got != "ignored ignored ignored ignored accepted duplicate duplicate duplicate accepted" {
			t.Errorf("deliveries: %s", got)
		}
		first, err := r.in.Deliveries().Get(t.Context(), list[len(list)-1].ID)
		if err != nil || !bytes.Equal(first.Body, one) || first.Headers["X-Delivery"] != "d1" || first.Headers["X-Signature"] != "" {
			t.Errorf("%+v, %v", first, err)
		}

		// Replayed it asks once more, as something new.
		again, err := r.in.Deliveries().Replay(t.Context(), first.ID)
		if err != nil || again.ReplayOf != first.ID {
			t.Fatalf("%+v, %v", again, err)
		}
		r.eventually("a third request", func() bool { return len(r.asked()) == 3 })
		if a := r.asked()[2]; a.Commit != "1" || a.Event.Delivery != "" || a.IdempotencyKey != "replay/"+again.ID {
			t.Errorf("replayed: %+v", a)
		}
		if _, err := r.in.Deliveries().Replay(t.Context(), list[0].ID); !errors.Is(err, integration.ErrInvalid) {
			t.Errorf("replay of what was ignored: %v", err)
		}
		if _, err := r.in.Deliveries().Replay(t.Context(), "none"); !errors.Is(err, integration.ErrNotFound) {
			t.Errorf("replay of nothing: %v", err)
		}

		// Statuses come by the queue.
		m, err := messages.Encode(messages.Status{Forge: "f", Repo: forge.Repo{Owner: "acme", Name: "widget"}, Commit: "1", Status: forge.Status{Key: "k", Version: 1, State: forge.StatusSuccess}})
		if err != nil {
			t.Fatal(err)
		}
		m.ID = "status"
		if err := r.queue.Publish(t.Context(), messages.StatusTopic("f"), []queue.Message{m}, queue.PublishOptions{}); err != nil {
			t.Fatal(err)
		}
		r.eventually("a status", func() bool { r.forge.mu.Lock(); defer r.forge.mu.Unlock(); return len(r.forge.statuses) == 1 })
	})
}

// away is a queue that takes nothing for a while.
type away struct {
	queue.Queue
	refuse atomic.Bool
}

func (a *away) Publish(ctx context.Context, topic string, msgs []queue.Message, o queue.PublishOptions) error {
	if a.refuse.Load() {
		return errors.New("the broker is away")
	}
	return a.Queue.Publish(ctx, topic, msgs, o)
}

// TestAway: while the queue is away webhooks are taken, and what they ask for comes
// later; while the database is, they are to be delivered again.
func TestAway(t *testing.T) {
	q := &away{}
	var db *bun.DB
	r := newRig(t, testenv.SQLite(t), func(c *integration.Config) {
		q.Queue, db = c.Queue, c.DB
		c.Queue = q
	})
	q.refuse.Store(true)
	if s, text := r.good("d1", push("acme", "1")); s != 202 || !strings.HasPrefix(text, "accepted") {
		t.Errorf("without the queue: %d %s", s, text)
	}
	if n := len(r.asked()); n != 0 {
		t.Errorf("%d requests went through a queue that is away", n)
	}
	q.refuse.Store(false)
	r.eventually("what was asked for", func() bool { return len(r.asked()) == 1 })
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if s, text := r.good("d2", push("acme", "2")); s != 503 {
		t.Errorf("without the database: %d %s", s, text)
	}
}

// TestSameAtOnce: of a webhook that comes several times at once one asks for runs,
// whether it is the same delivery or only the same body.
func TestSameAtOnce(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		r := newRig(t, url, func(c *integration.Config) {
			f := c.Forges["f"]
			f.Forge, f.Poll = &polled{plain: &plain{}}, -1
			c.Forges["f"] = f
		})
		for round := range 3 {
			body := push("acme", strconv.Itoa(round))
			var wg sync.WaitGroup
			var accepted atomic.Int32
			for n := range 16 {
				wg.Go(func() {
					if s, text := r.good(fmt.Sprint(round, "-", n/2), body); s == 202 && strings.HasPrefix(text, "accepted") {
						accepted.Add(1)
					} else if s != 202 {
						t.Errorf("%d %s", s, text)
					}
				})
			}
			wg.Wait()
			if n := accepted.Load(); n != 1 {
				t.Errorf("%d were accepted", n)
			}
		}
	})
}

// endless is a body of zeros.
type endless struct{ n int64 }

func (e *endless) Read(p []byte) (int, error) {
	if e.n <= 0 {
		return 0, io.EOF
	}
	n := min(int64(len(p)), e.n)
	e.n -= n
	clear(p[:n])
	return int(n), nil
}

// TestFloods: bodies that are large, slow or forged, in numbers, are refused and
// leave nothing in memory or in the database.
func TestFloods(t *testing.T) {
	r := newRig(t, testenv.SQLite(t), func(c *integration.Config) {
		c.MaxBodyBytes, c.BodyTimeout, c.MaxRequests = 1<<20, 300*time.Millisecond, 8
	})
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse
	}
	r.good("warm up", push("acme", "1"))
	before := heap()
	for what, length := range map[string]int64{"said to be a gigabyte": 1 << 30, "a gigabyte that does not say so": -1} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, r.srv.URL+"/webhooks/f", io.NopCloser(&endless{1 << 30}))
		if err != nil {
			t.Fatal(err)
		}
		req.ContentLength = length
		resp, err := http.DefaultClient.Do(req)
		if err != nil { // refused while it was being sent
			t.Logf("%s: %v", what, err)
			continue
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusRequestEntityTooLarge {
			t.Errorf("%s: %d", what, resp.StatusCode)
		}
	}
	forged := bytes.Repeat([]byte("x"), 64<<10)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 500 {
				if s, text := r.post("d", forged, "forged"); s != http.StatusUnauthorized && s != http.StatusServiceUnavailable {
					t.Errorf("forged: %d %s", s, text)
				}
			}
		})
	}
	wg.Wait()

	// Slow ones hold places for a moment only, and the rest is told to come again.
	var conns []net.Conn
	for range 8 {
		c, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", r.srv.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, "POST /webhooks/f HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nslow"); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	for _, c := range conns {
		b := make([]byte, 64)
		n, err := c.Read(b)
		if got := string(b[:n]); err != nil || !strings.HasPrefix(got, "HTTP/1.1 408") && !strings.HasPrefix(got, "HTTP/1.1 503") {
			t.Errorf("slow: %q, %v", got, err)
		}
	}
	if s, text := r.good("d2", push("acme", "2")); s != 202 {
		t.Errorf("afterwards: %d %s", s, text)
	}
	http.DefaultClient.CloseIdleConnections()
	if after := heap(); after > before+16<<20 {
		t.Errorf("the heap grew from %d to %d MiB", before>>20, after>>20)
	}
	list, err := r.in.Deliveries().List(t.Context(), integration.DeliveryFilter{})
	if err != nil || len(list) != 2 {
		t.Errorf("%d deliveries were written down, %v", len(list), err)
	}
}

// TestSlow: however many send slowly, and as often as they come again, a webhook that
// does not is taken.
func TestSlow(t *testing.T) {
	const places = 8
	r := newRig(t, testenv.SQLite(t), func(c *integration.Config) {
		c.MaxBodyBytes, c.BodyTimeout, c.MaxRequests = 256<<10, time.Hour, places
	})
	var slow sync.WaitGroup
	defer slow.Wait()
	var madeWay atomic.Int64
	begun := 0
	for round := range 3 {
		for what, part := range map[string]string{
			"a few bytes of many":    "Content-Length: 250000\r\n\r\nslow",
			"of who knows how many":  "Transfer-Encoding: chunked\r\n\r\n4\r\nslow\r\n",
			"nearly all, to be kept": "Content-Length: 250000\r\n\r\n" + strings.Repeat("x", 240<<10),
		} {
			for range 2 * places {
				begun++
				c, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", r.srv.Listener.Addr().String())
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				slow.Go(func() {
					_, _ = io.WriteString(c, "POST /webhooks/f HTTP/1.1\r\nHost: x\r\n"+part)
					b := make([]byte, 64)
					if n, err := c.Read(b); err == nil {
						if got := string(b[:n]); !strings.HasPrefix(got, "HTTP/1.1 503") {
							t.Errorf("%s: %q", what, got)
						}
						madeWay.Add(1)
					}
				})
			}
			r.eventually("only as many as there are places", func() bool { return madeWay.Load() >= int64(begun-places) })
			for i := range 3 {
				id := fmt.Sprint(what, round, i)
				if s, text := r.good(id, push("acme", id)); s != 202 || !strings.HasPrefix(text, "accepted") {
					t.Errorf("a webhook among those that send %s: %d %s", what, s, text)
				}
			}
		}
	}
	if n := madeWay.Load(); n == int64(begun) {
		t.Errorf("all %d had to make way", n)
	}
}

// TestConfig: what cannot be is said, all of it.
func TestConfig(t *testing.T) {
	_, err := integration.New(t.Context(), integration.Config{
		Forges: map[string]integration.Instance{"A b": {Forge: &plain{}}, "f": {Allow: []string{"acme/*"}, AllowAll: true}}, Prefix: "hooks", MaxRequests: -1,
	})
	if !errors.Is(err, integration.ErrInvalid) {
		t.Fatal(err)
	}
	for _, want := range []string{"DB and Config.Queue", `forge "A b"`, "forge f: Forge is nil", `"acme/*"`, `Prefix "hooks"`, "not negative"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v lacks %q", err, want)
		}
	}
}

// slow is a forge that takes a status when it is let.
type slow struct {
	plain
	asked, let chan struct{}
}

func (s *slow) ReportStatus(ctx context.Context, _ forge.Repo, _ string, st forge.Status) error {
	s.asked <- struct{}{}
	select {
	case <-s.let:
		return s.plain.ReportStatus(ctx, forge.Repo{}, "", st)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// TestGrace: what is under way when Run is to end has its time: a webhook that was
// taken is published, and a report that was begun is made.
func TestGrace(t *testing.T) {
	db, err := sqldb.Open(t.Context(), testenv.SQLite(t), sqldb.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := solstice.Migrate(t.Context(), db); err != nil {
		t.Fatal(err)
	}
	q := memqueue.New()
	defer q.Close()
	s := &slow{asked: make(chan struct{}), let: make(chan struct{})}
	in, err := integration.New(t.Context(), integration.Config{DB: db, Queue: q, ReportStatuses: true, Grace: time.Minute, Forges: map[string]integration.Instance{
		"f": {Forge: s, AllowAll: true, Secret: func(context.Context, string) ([]byte, error) { return []byte("secret"), nil }},
	}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan struct{})
	go func() { defer close(done); _ = in.Run(ctx) }()
	m, err := messages.Encode(messages.Status{Forge: "f", Repo: forge.Repo{Owner: "acme", Name: "widget"}, Commit: "1", Status: forge.Status{Key: "k", Version: 1, State: forge.StatusSuccess}})
	if err != nil {
		t.Fatal(err)
	}
	m.ID = "status"
	if err := q.Publish(t.Context(), messages.StatusTopic("f"), []queue.Message{m}, queue.PublishOptions{}); err != nil {
		t.Fatal(err)
	}
	<-s.asked
	cancel()
	close(s.let)
	<-done
	if len(s.statuses) != 1 {
		t.Errorf("a report that was begun was made %d times", len(s.statuses))
	}

	body := push("acme", "1")
	w, r := httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/webhooks/f", bytes.NewReader(body))
	r.Header.Set("X-Signature", sign(body))
	in.ServeHTTP(w, r)
	if w.Code != http.StatusAccepted {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	_ = in.Run(ctx) // which is over
	sub, err := q.Subscribe(t.Context(), messages.TopicRunRequest, queue.SubscribeOptions{Group: messages.Group})
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Close()
	if d, err := sub.Next(t.Context()); err != nil {
		t.Errorf("what a webhook asked for: %v, %v", d, err)
	}
}

// TestRetention: old webhooks go, but for those of a database on which an engine
// works, whose rules count.
func TestRetention(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		var db *bun.DB
		var cfg integration.Config
		r := newRig(t, url, func(c *integration.Config) { cfg, db = *c, c.DB })
		r.good("old", push("acme", "1"))
		r.good("new", push("acme", "2"))
		r.eventually("both requests", func() bool { return len(r.asked()) == 2 })
		exec := func(query string) {
			t.Helper()
			if _, err := db.NewRaw(query).Exec(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		exec("UPDATE deliveries SET received_at = 1 WHERE delivery = 'old'")
		exec("INSERT INTO orchestrators (id, addr, slots, seen_at, lease_until) VALUES ('o', '', 1, 1, 9000000000000000)")
		cfg.DeliveryAge = time.Hour
		in, err := integration.New(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		left := func() int {
			list, err := in.Deliveries().List(t.Context(), integration.DeliveryFilter{})
			if err != nil {
				t.Fatal(err)
			}
			return len(list)
		}
		if n, err := in.RemoveOld(t.Context()); n != 0 || err != nil || left() != 2 {
			t.Errorf("beside an engine %d went, %v", n, err)
		}
		exec("DELETE FROM orchestrators")
		if n, err := in.RemoveOld(t.Context()); n != 1 || err != nil || left() != 1 {
			t.Errorf("%d went, %v", n, err)
		}
	})
}
