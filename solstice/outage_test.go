package solstice_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/memqueue"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

// heardLog collects what an engine logs, to wait for a record.
type heardLog struct {
	testLog
	mu  sync.Mutex
	all bytes.Buffer
}

func (l *heardLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	l.all.Write(b)
	l.mu.Unlock()
	return l.testLog.Write(b)
}

func (l *heardLog) said(text string) bool { return l.count(text) > 0 }

func (l *heardLog) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.all.String(), text)
}

func hear(t *testing.T) (*heardLog, func(*solstice.Config)) {
	l := &heardLog{testLog: testLog{t: t}}
	return l, func(c *solstice.Config) { c.Logger = slog.New(slog.NewTextHandler(l, nil)) }
}

const echo = "checkout: false\njobs: { a: { steps: [ { run: echo hi } ] } }\n"

// gated is a workflow of n jobs that say that they run, and end once the gate
// is there.
func gated(p *plant, n int) (workflow string, begun func() int, open func()) {
	ids := make([]string, n)
	for i := range ids {
		ids[i] = fmt.Sprint(i)
	}
	gate := filepath.Join(p.Dir, "gate")
	workflow = `
checkout: false
jobs:
  a:
    matrix: { n: [` + strings.Join(ids, ",") + `] }
    steps:
      - run: |
          seq 1 1000
          echo x >> ` + p.Dir + `/begun-${{ matrix.n }}
          while [ ! -e ` + gate + ` ]; do sleep 0.05; done
          seq 1001 2000
`
	begun = func() int {
		all, _ := filepath.Glob(filepath.Join(p.Dir, "begun-*"))
		return len(all)
	}
	return workflow, begun, func() { _ = os.WriteFile(gate, nil, 0o600) }
}

// quiet waits until all that the jobs of a gated run print before the gate is
// stored.
func quiet(t *testing.T, eng *solstice.Engine, r solstice.Run) {
	t.Helper()
	eventually(t, "the logs are stored", func() bool {
		for _, j := range r.Jobs {
			as, err := eng.Attempts(t.Context(), j.ID)
			if err != nil || len(as) == 0 || as[0].LogSize < 3893 { // seq 1 1000
				return false
			}
		}
		return true
	})
}

// ranOnce checks that every job of a gated run succeeded in its only attempt.
func ranOnce(t *testing.T, p *plant, eng *solstice.Engine, r solstice.Run) {
	t.Helper()
	var want strings.Builder
	for i := 1; i <= 2000; i++ {
		fmt.Fprintln(&want, i)
	}
	if r.State != solstice.RunSucceeded {
		t.Errorf("run is %s: %s", r.State, r.Reason)
	}
	for i, j := range r.Jobs {
		as, err := eng.Attempts(t.Context(), j.ID)
		if err != nil || len(as) != 1 || as[0].State != solstice.AttemptFinished {
			t.Errorf("%s: attempts %+v, %v", j.Name, as, err)
		}
		if b, err := os.ReadFile(filepath.Join(p.Dir, fmt.Sprintf("begun-%d", i))); err != nil || string(b) != "x\n" {
			t.Errorf("%s ran %d times, %v", j.Name, len(b)/2, err)
		}
		if got := jobLog(t, eng, j.ID); got != want.String() {
			t.Errorf("%s: log of %d bytes, want %d", j.Name, len(got), want.Len())
		}
	}
}

// TestDatabaseOutage takes the database away for longer than leases and the
// agent deadline last, while jobs run: when it is back nothing is given up.
func TestDatabaseOutage(t *testing.T) {
	for name, away := range map[string]func(*testing.T, *testenv.PostgresServer) (back func()){
		"killed":  func(t *testing.T, s *testenv.PostgresServer) func() { s.Kill(t); return func() { s.Start(t) } },
		"stopped": func(t *testing.T, s *testenv.PostgresServer) func() { s.Pause(t); return func() { s.Resume(t) } },
	} {
		t.Run(name, func(t *testing.T) {
			server := testenv.StartPostgres(t)
			p := newPlant(t, server.Database(t))
			heard, log := hear(t)
			eng, _ := p.start(t, log)
			workflow, begun, open := gated(p, 3)
			r := p.submit(t, eng, workflow)
			eventually(t, "the jobs run", func() bool { return begun() == 3 })
			// An agent that has something to say hears nothing until it is stored, and
			// gives up after its deadline; one that is quiet is in contact.
			quiet(t, eng, r)
			back := away(t, server)
			since := time.Now()
			eventually(t, "the engine notices", func() bool { return heard.said("sweep failed") })
			// The fault itself is that time passes.
			eventually(t, "all leases and contacts are too old", func() bool {
				return time.Since(since) > p.Timing.AgentDeadline+p.Timing.DeadlineMargin+time.Second
			})
			back()
			eventually(t, "the engine notices that it was away", func() bool { return heard.said("state is back") })
			open()
			ranOnce(t, p, eng, finish(t, eng, r.ID))
		})
	}
}

// onceQueue counts the messages that are not settled when they are delivered
// first.
type onceQueue struct {
	queue.Queue
	again atomic.Int64
}

func (q *onceQueue) Subscribe(ctx context.Context, topic string, o queue.SubscribeOptions) (queue.Subscription, error) {
	sub, err := q.Queue.Subscribe(ctx, topic, o)
	return onceSubscription{sub, q}, err
}

type onceSubscription struct {
	queue.Subscription
	q *onceQueue
}

func (s onceSubscription) Next(ctx context.Context) (queue.Delivery, error) {
	d, err := s.Subscription.Next(ctx)
	if err == nil && d.Attempt() > 1 {
		s.q.again.Add(1)
	}
	return d, err
}

// TestRunRequestInOutage: a request that comes while the database is away waits,
// and has none of its deliveries used up.
func TestRunRequestInOutage(t *testing.T) {
	server := testenv.StartPostgres(t)
	p := newPlant(t, server.Database(t))
	heard, log := hear(t)
	q := &onceQueue{Queue: memqueue.New()}
	eng, _ := p.start(t, log, func(c *solstice.Config) { c.Queue = q })
	commit := p.commit(t, map[string]string{".solstice/workflow.yaml": echo})
	m, err := messages.Encode(messages.RunRequest{Repo: forge.Repo{Name: "repo"}, Commit: commit, IdempotencyKey: "key"})
	if err != nil {
		t.Fatal(err)
	}
	server.Kill(t)
	if err := q.Publish(t.Context(), messages.TopicRunRequest, []queue.Message{m}, queue.PublishOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it waits", func() bool { return heard.said("run request waits") })
	server.Start(t)
	eventually(t, "it is accepted", func() bool {
		runs, err := eng.Runs(t.Context(), solstice.RunFilter{})
		return err == nil && len(runs) == 1 && finish(t, eng, runs[0].ID).State == solstice.RunSucceeded
	})
	if n := q.again.Load(); n != 0 {
		t.Errorf("delivered %d times more", n)
	}
}

// TestClockJump makes agents seem dead, as the database's clock does that jumps
// by a day: nothing is given up.
func TestClockJump(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		p := newPlant(t, url)
		eng, _ := p.start(t)
		workflow, begun, open := gated(p, 3)
		r := p.submit(t, eng, workflow)
		eventually(t, "the jobs run", func() bool { return begun() == 3 })
		db := p.openDB(t)
		stale := func() int {
			n, err := db.NewSelect().Table("attempts").Where("contact_at < ?", time.Now().Add(-time.Hour).UnixMicro()).Count(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return int(n)
		}
		for range 3 {
			eventually(t, "the jump is there", func() bool {
				// A deadlock with the engine's own writes is not the point here.
				_, err := db.NewRaw("UPDATE attempts SET contact_at = contact_at - 86400000000").Exec(t.Context())
				return err == nil
			})
			eventually(t, "all agents were heard of again", func() bool { return stale() == 0 })
		}
		open()
		ranOnce(t, p, eng, finish(t, eng, r.ID))
	})
}

// TestCircuitBreaker has all agents fall silent at once: they are given up one
// deadline later than a single one would be, and their jobs run again.
func TestCircuitBreaker(t *testing.T) { onBoth(t, testCircuitBreaker) }

func testCircuitBreaker(t *testing.T, db func(testing.TB) string) {
	if runtime.GOOS != "linux" {
		testenv.Missing(t, "/proc", "the agents' processes are found by it, on Linux")
	}
	p := newPlant(t, db(t))
	p.Capacity = 5
	p.Timing.AgentDeadline = 8 * time.Second // a busy machine answers its agents within it
	heard, log := hear(t)
	eng, _ := p.start(t, log)
	workflow, begun, open := gated(p, 5)
	r := p.submit(t, eng, workflow)
	eventually(t, "the jobs run", func() bool { return begun() == 5 })
	for _, j := range r.Jobs {
		as, err := eng.Attempts(t.Context(), j.ID)
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(agentPID(t, p, as[0].MachineID), syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the breaker trips", func() bool { return heard.said("too many agents seem dead at once") })
	if heard.said("attempt lost") {
		t.Error("an attempt was given up before the breaker tripped")
	}
	open()
	r = finish(t, eng, r.ID)
	if r.State != solstice.RunSucceeded {
		t.Errorf("run is %s", r.State)
	}
	for _, j := range r.Jobs {
		as, err := eng.Attempts(t.Context(), j.ID)
		if err != nil || len(as) != 2 || as[0].Class != solstice.ClassAgentLost || as[1].State != solstice.AttemptFinished {
			t.Errorf("%s: %+v, %v", j.Name, as, err)
		}
	}
}

// stuck is a provider that cannot be reached for destroying.
type stuck struct {
	fullOnce
	stuck    atomic.Bool
	refusals atomic.Int64
}

func (s *stuck) Destroy(ctx context.Context, id string, o vmprovider.DestroyOptions) error {
	if s.stuck.Load() {
		s.refusals.Add(1)
		return errors.New("test: the hypervisor cannot be reached")
	}
	return s.Provider.Destroy(ctx, id, o)
}

// TestHold: a retry waits for the lost attempt's machine to be destroyed, for
// at most HoldTimeout.
func TestHold(t *testing.T) { onBoth(t, testHold) }

func testHold(t *testing.T, db func(testing.TB) string) {
	for name, timeout := range map[string]time.Duration{"destroyed": time.Hour, "timeout": 2 * time.Second} {
		t.Run(name, func(t *testing.T) {
			p := newPlant(t, db(t))
			p.Timing.HoldTimeout = timeout
			heard, log := hear(t)
			prov := &stuck{}
			prov.stuck.Store(true)
			eng, _ := p.start(t, log, func(c *solstice.Config) {
				prov.Provider = c.Pools[0].Provider
				c.Pools[0].Provider = prov
			})
			workflow, begun, open := gated(p, 1)
			r := p.submit(t, eng, workflow)
			eventually(t, "the job runs", func() bool { return begun() == 1 })
			first, err := eng.Attempts(t.Context(), r.Jobs[0].ID)
			if err != nil {
				t.Fatal(err)
			}
			if err := syscall.Kill(agentPID(t, p, first[0].MachineID), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			open()
			attempts := func() []solstice.Attempt {
				as, err := eng.Attempts(t.Context(), r.Jobs[0].ID)
				if err != nil {
					t.Fatal(err)
				}
				return as
			}
			eventually(t, "the provider refuses", func() bool { return prov.refusals.Load() > 2 })
			if timeout < time.Minute {
				eventually(t, "the retry begins all the same", func() bool { return len(attempts()) == 2 })
				if !heard.said("retries begin though their old machines could not be destroyed") {
					t.Error("the possible overlap is not said")
				}
			} else if n := len(attempts()); n != 1 {
				t.Errorf("%d attempts while the old machine may still run", n)
			}
			prov.stuck.Store(false)
			r = finish(t, eng, r.ID)
			as := attempts()
			if r.State != solstice.RunSucceeded || len(as) != 2 || as[0].Class != solstice.ClassAgentLost {
				t.Errorf("run is %s, attempts: %+v", r.State, as)
			}
			eventually(t, "both machines are gone", func() bool { return len(machinesOf(t, prov)) == 0 })
		})
	}
}

// wire is a proxy in front of PostgreSQL that reads along, and acts when a COMMIT
// of a transaction that it looks for is on its way: the server gets it, and the
// client no answer.
type wire struct {
	upstream, addr string
	// lose decides about a transaction whose statements are in text; it is called
	// for one at a time.
	lose func(text string) bool
	// lost is called when the server has the COMMIT and the client's connection
	// is closed; nil: the server's answer is waited for.
	lost   func()
	losing sync.Mutex

	mu            sync.Mutex
	commits, cuts int
}

func newWire(t *testing.T, upstream string, lost func(), lose func(text string) bool) *wire {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{upstream: upstream, addr: l.Addr().String(), lost: lost, lose: lose}
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns.Go(func() { w.serve(c) })
		}
	})
	t.Cleanup(func() { _ = l.Close(); conns.Wait() })
	return w
}

func (w *wire) serve(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("tcp", w.upstream)
	if err != nil {
		return
	}
	defer server.Close()
	var deaf atomic.Bool
	answered := make(chan struct{}, 1)
	var back sync.WaitGroup
	defer back.Wait()
	back.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			n, err := server.Read(buf)
			if deaf.Load() {
				answered <- struct{}{}
				return
			}
			if err != nil {
				_ = client.Close()
				return
			}
			if _, err := client.Write(buf[:n]); err != nil {
				_ = server.Close()
				return
			}
		}
	})
	// https://www.postgresql.org/docs/current/protocol-message-formats.html: the
	// first message has no type, all others one byte of it before the length.
	var text strings.Builder
	for first := true; ; first = false {
		head := make([]byte, 5)
		if first {
			head = head[:4]
		}
		if _, err := io.ReadFull(client, head); err != nil {
			_ = server.Close()
			return
		}
		body := make([]byte, binary.BigEndian.Uint32(head[len(head)-4:])-4)
		if _, err := io.ReadFull(client, body); err != nil {
			_ = server.Close()
			return
		}
		cut := false
		if !first && head[0] == 'Q' {
			switch query := strings.TrimRight(string(body), "\x00; "); query {
			case "begin":
				text.Reset()
			case "commit":
				w.mu.Lock()
				w.commits++
				if cut = w.lose(text.String()); cut {
					w.cuts++
				}
				w.mu.Unlock()
			default:
				text.WriteString(query + ";\n")
			}
		}
		deaf.Store(cut)
		if _, err := server.Write(append(head, body...)); err != nil {
			_ = client.Close()
			return
		}
		if cut {
			if w.lost == nil {
				<-answered
				_ = server.Close()
				return
			}
			_ = client.Close()
			w.losing.Lock()
			w.lost()
			w.losing.Unlock()
			<-answered
			return
		}
	}
}

// transactions that matter, by what they say to the database; the first that
// fits counts.
var transactions = []struct {
	name string
	is   func(text string) bool
}{
	{"submit", says(`INSERT INTO "runs"`)},
	{"claim", says(`INSERT INTO "attempts"`)},
	{"enrol", says(`"cred_hash" = `)},
	{"attach", says(`"state" = 'bound'`)},
	{"finish", says(`UPDATE "attempts"`, `"state" = 'finished'`)},
	{"start", says(`UPDATE "attempts"`, `"state" = 'running'`)},
	{"ack", says(`UPDATE "attempts"`, `SET acked_seq = `)},
	{"log", says(`INSERT INTO "log_entries"`)},
	{"seal", says(`UPDATE "log_streams"`, `"sealed" = TRUE`)},
	{"destroy", says(`UPDATE "machines"`, `'gone'`)},
	{"status", says(`DELETE FROM "outbox"`)},
}

func transaction(text string) string {
	for _, x := range transactions {
		if x.is(text) {
			return x.name
		}
	}
	return ""
}

func says(words ...string) func(string) bool {
	return func(text string) bool {
		for _, w := range words {
			if !strings.Contains(text, w) {
				return false
			}
		}
		return true
	}
}

// TestCommitReplyLost: whoever does not learn whether its COMMIT succeeded looks
// before it tries again. The first two of every kind of transaction get no
// answer, and some of the rest.
func TestCommitReplyLost(t *testing.T) {
	lost := map[string]int{}
	rest := 0
	commitsLost(t, testenv.Postgres(t), nil, func(name string) bool {
		if name == "" {
			rest++
			return rest%7 == 0
		}
		lost[name]++
		return lost[name] <= 2
	})
	for _, x := range transactions {
		if lost[x.name] == 0 {
			t.Errorf("no reply to a COMMIT of %s was lost", x.name)
		}
	}
}

// TestKilledWhileCommitting: PostgreSQL is killed with a COMMIT in hand, which it
// may or may not have carried out.
func TestKilledWhileCommitting(t *testing.T) {
	s := testenv.StartPostgres(t)
	left := map[string]bool{"submit": true, "claim": true, "attach": true, "start": true, "ack": true, "finish": true}
	commitsLost(t, s.Database(t), func() { s.Kill(t); s.Start(t) }, func(name string) bool {
		defer delete(left, name)
		return left[name]
	})
	for name := range left {
		t.Errorf("PostgreSQL was not killed in %s", name)
	}
}

// commitsLost runs jobs while lose says which COMMITs get no answer, and checks
// that nothing is lost and nothing doubled.
func commitsLost(t *testing.T, dsn string, lost func(), lose func(name string) bool) {
	direct, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	p := newPlant(t, direct.String())
	p.Capacity = 6
	p.Timing.AgentDeadline = time.Minute // not what this is about
	over := false
	wire := newWire(t, direct.Host, lost, func(text string) bool { return !over && lose(transaction(text)) })
	through := *direct
	through.Host = wire.addr
	p.DBURL = through.String()
	eng, _ := p.start(t)
	workflow, begun, open := gated(p, 6)
	commit := p.commit(t, map[string]string{".solstice/workflow.yaml": workflow})
	var r solstice.Run
	for i := range 5 { // a client that repeats itself
		eventually(t, "the run is accepted", func() bool {
			runs, err := eng.Submit(t.Context(), solstice.RunRequest{Repo: forge.Repo{Name: "repo"}, Commit: commit, IdempotencyKey: "one"})
			if err != nil {
				t.Logf("submit: %v", err)
				return false
			}
			if i > 0 && runs[0].ID != r.ID {
				t.Fatalf("a second run %s beside %s", runs[0].ID, r.ID)
			}
			r = runs[0]
			return true
		})
	}
	eventually(t, "the jobs run", func() bool { return begun() == 6 })
	open()
	eventually(t, "the run is over", func() bool {
		now, err := eng.GetRun(t.Context(), r.ID)
		if err != nil {
			return false
		}
		r = now
		return r.State.Terminal()
	})
	eventually(t, "its machines are gone", func() bool {
		left, err := eng.Machines(t.Context(), solstice.MachineFilter{})
		return err == nil && len(left) == 0
	})
	wire.mu.Lock()
	over = true
	t.Logf("%d of %d COMMITs had no answer", wire.cuts, wire.commits)
	wire.mu.Unlock()
	ranOnce(t, p, eng, r)
	runs, err := eng.Runs(t.Context(), solstice.RunFilter{})
	if err != nil || len(runs) != 1 {
		t.Errorf("%d runs, %v, want one", len(runs), err)
	}
}

// TestAgentKilledTwoEngines: whichever engine notices, the job runs again, and
// nothing is left of the first machine.
func TestAgentKilledTwoEngines(t *testing.T) {
	p := newPlant(t, testenv.Postgres(t))
	addrs := []string{freeAddr(t), freeAddr(t)}
	p.Contacts = addrs
	first, _ := p.start(t, func(c *solstice.Config) { c.AgentAddr = addrs[0] })
	second, _ := p.start(t, func(c *solstice.Config) { c.AgentAddr = addrs[1] })
	workflow, begun, open := gated(p, 2)
	r := p.submit(t, first, workflow)
	eventually(t, "the jobs run", func() bool { return begun() == 2 })
	var machines []string
	for _, j := range r.Jobs {
		as, err := second.Attempts(t.Context(), j.ID)
		if err != nil {
			t.Fatal(err)
		}
		machines = append(machines, as[0].MachineID)
		if err := syscall.Kill(agentPID(t, p, as[0].MachineID), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	open()
	r = finish(t, second, r.ID)
	if r.State != solstice.RunSucceeded {
		t.Errorf("run is %s", r.State)
	}
	for i, j := range r.Jobs {
		as, err := first.Attempts(t.Context(), j.ID)
		if err != nil || len(as) != 2 || as[0].Class != solstice.ClassAgentLost {
			t.Errorf("%s: %+v, %v", j.Name, as, err)
		}
		eventually(t, "the first machine is gone", func() bool {
			_, err := os.Stat(filepath.Join(p.machinesDir(), machines[i]))
			return os.IsNotExist(err)
		})
	}
}

// deafQueue breaks the first subscription to wake-ups, and counts them.
type deafQueue struct {
	queue.Queue
	subscribed atomic.Int64
}

func (q *deafQueue) Subscribe(ctx context.Context, topic string, o queue.SubscribeOptions) (queue.Subscription, error) {
	sub, err := q.Queue.Subscribe(ctx, topic, o)
	if topic == messages.TopicWake && err == nil && q.subscribed.Add(1) == 1 {
		err = sub.Close() // so that Next fails
	}
	return sub, err
}

// TestWakeUpsComeBack: an engine whose subscription failed hears of work again.
func TestWakeUpsComeBack(t *testing.T) { onBoth(t, testWakeUpsComeBack) }

func testWakeUpsComeBack(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	p.Timing.Tick = time.Hour // nothing but a wake-up finds work
	q := &deafQueue{}
	p.start(t, func(c *solstice.Config) {
		q.Queue = c.Queue
		c.Queue = q
	})
	other, _ := p.start(t, func(c *solstice.Config) { c.Pools = nil })
	eventually(t, "the engine subscribes again", func() bool { return q.subscribed.Load() > 1 })
	r := finish(t, other, p.submit(t, other, "checkout: false\njobs: { a: { steps: [ { run: echo hi } ] } }\n").ID)
	if r.State != solstice.RunSucceeded {
		t.Errorf("run is %s", r.State)
	}
	eventually(t, "its machine is gone", func() bool {
		left, err := other.Machines(t.Context(), solstice.MachineFilter{})
		return err == nil && len(left) == 0
	})
}
