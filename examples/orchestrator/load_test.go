package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/uptrace/bun"

	fake "github.com/solstice-ci/solstice-go/internal/fakeforge/forgejo" //nolint:depguard // the test is not part of the main that is copied
	"github.com/solstice-ci/solstice-go/internal/testenv"                //nolint:depguard // the same
	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
)

// ".mise/tasks/test/load" has a minute of 200 a second, 10,000 forged ones and more
// kills.
var (
	loadFor    = flag.Duration("load-for", 2*time.Second, "how long the load tests send webhooks")
	loadRate   = flag.Int("load-rate", 50, "how many a second")
	loadForged = flag.Int("load-forged", 500, "how many forged webhooks TestWebhookFloods sends")
	loadSlow   = flag.Int("load-slow", 1200, "how many slow ones at once; more than 1,024, and some have to make way")
	loadKills  = flag.Int("load-kills", 2, "how often TestWebhooksUnderFire kills the orchestrator")
)

// load is a forge with several repositories, whose webhooks come to an orchestrator.
type load struct {
	*forgejo
	dir      string // of the orchestrator's state
	database string
	http     string // where webhooks go
	client   *http.Client
	repos    []string
	pushes   [][]byte // by repository: the body of one push
	commits  [][]string
	sent     int // hooks made
}

// skipped is a workflow that takes no machine: what is measured is what is before that.
const skipped = "jobs: { test: { if: \"false\", steps: [{ run: 'true' }] } }\n"

// newLoad has n commits for webhooks.
func newLoad(t *testing.T, n int, database string, args ...string) *load {
	t.Helper()
	var repos []string
	for i := range 8 {
		repos = append(repos, fmt.Sprint("acme/widget", i))
	}
	l := &load{forgejo: newForgejo(t, repos...), repos: repos, dir: filepath.Join(t.TempDir(), "state"), database: database, http: freeAddr(t)}
	l.args = append(append(l.args, "--http-addr="+l.http), args...)
	l.client = &http.Client{Timeout: time.Minute, Transport: &http.Transport{MaxIdleConns: 1024, MaxIdleConnsPerHost: 1024}}
	t.Cleanup(l.client.CloseIdleConnections)
	for _, repo := range repos {
		var in strings.Builder
		for i := range n/len(repos) + 1 {
			message := fmt.Sprintf("change %d\n", i)
			fmt.Fprintf(&in, "commit refs/heads/main\ncommitter A <a@example.org> 1700000000 +0000\ndata %d\n%s\n", len(message), message)
			fmt.Fprintf(&in, "M 100644 inline .solstice/workflow.yaml\ndata %d\n%s\n", len(skipped), skipped)
		}
		if _, err := l.server.Repos.Git(t.Context(), repo, in.String(), "fast-import", "--quiet"); err != nil {
			t.Fatal(err)
		}
		all, err := l.server.Repos.Git(t.Context(), repo, "", "rev-list", "--reverse", "main")
		if err != nil {
			t.Fatal(err)
		}
		commits := strings.Fields(all)
		body, err := l.server.Push(t.Context(), l.web.URL, repo, "refs/heads/main", strings.Repeat("0", 40), commits[0])
		if err != nil {
			t.Fatal(err)
		}
		l.commits, l.pushes = append(l.commits, commits), append(l.pushes, body)
	}
	return l
}

// withParts are the arguments for PostgreSQL and RabbitMQ, and the database.
func withParts(t *testing.T) (database string, args []string) {
	t.Helper()
	database = testenv.Postgres(t)
	ca := testenv.NewAuthority(t)
	cert := ca.Issue(t, "orchestrator", "127.0.0.1", agent.ServerName)
	return database, []string{
		"--database-url", database, "--auto-migrate", "--amqp-url", testenv.SharedRabbitMQ(t).VHost(t),
		"--grpc-tls-cert", cert.Cert, "--grpc-tls-key", cert.Key,
		"--agent-tls-cert", cert.Cert, "--agent-tls-key", cert.Key, "--agent-tls-ca", cert.CA,
	}
}

// hook is a webhook.
type hook struct {
	delivery string
	body     []byte
}

// hooks are n that were not made before.
func (l *load) hooks(n int) []hook {
	out := make([]hook, n)
	for i := range out {
		repo, at := l.sent%len(l.repos), l.sent/len(l.repos)
		body := bytes.ReplaceAll(l.pushes[repo], []byte(l.commits[repo][0]), []byte(l.commits[repo][at]))
		out[i] = hook{fmt.Sprintf("00000000-0000-4000-8000-%012d", l.sent), body}
		l.sent++
	}
	return out
}

// answer to a webhook; status 0: there was none.
type answer struct {
	status int
	took   time.Duration // since the webhook was to be sent
}

// post sends a webhook to a host.
func (l *load) post(h hook, host, secret string) (status int) {
	r, err := fake.Request(context.Background(), "http://"+host+"/webhooks/codeberg", "push", h.delivery, h.body, []byte(secret))
	if err != nil {
		return 0
	}
	resp, err := l.client.Do(r)
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil { // cut off: who knows what it would have said
		return 0
	}
	return resp.StatusCode
}

// offer sends webhooks each at its time, however long others take, until over.
func offer(hooks []hook, rate int, over <-chan struct{}, send func(hook) int) []answer {
	out := make([]answer, len(hooks))
	began := time.Now()
	var wg sync.WaitGroup
	defer wg.Wait()
	for i, h := range hooks {
		at := began.Add(time.Duration(i) * time.Second / time.Duration(rate))
		select {
		case <-over:
			return out[:i]
		case <-time.After(time.Until(at)):
		}
		wg.Go(func() { out[i] = answer{send(h), time.Since(at)} })
	}
	return out
}

// figures of answers, for people.
func figures(answers []answer) (text string, p99 time.Duration) {
	took := make([]time.Duration, len(answers))
	status := map[int]int{}
	for i, a := range answers {
		took[i] = a.took
		status[a.status]++
	}
	slices.Sort(took)
	at := func(q float64) time.Duration { return took[int(q*float64(len(took)-1))].Round(10 * time.Microsecond) }
	return fmt.Sprintf("%v, p50 %v, p90 %v, p99 %v, most %v", status, at(.5), at(.9), at(.99), at(1)), at(.99)
}

// bare answers a webhook as cheaply as one can: the body is read and its signature
// computed.
func bare() *httptest.Server {
	return httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		mac := hmac.New(sha256.New, []byte("s3cret"))
		mac.Write(body)
		w.Header().Set("X-Sum", fmt.Sprintf("%x", mac.Sum(nil)))
		w.WriteHeader(http.StatusAccepted)
	}))
}

func (l *load) open() *bun.DB {
	db, err := storage.Database{DatabaseURL: l.database, DBPoolMaxSize: 2, DBPoolTimeoutMS: 60000}.Open(context.WithoutCancel(l.t.Context()), l.dir, nil)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { _ = db.Close() })
	return db
}

// counts gives how many rows of a table each delivery has.
func (l *load) counts(db *bun.DB, from string) map[string]int {
	l.t.Helper()
	var rows []struct {
		Delivery string
		N        int
	}
	if err := db.NewRaw("SELECT delivery, count(*) AS n FROM "+from+" GROUP BY delivery").Scan(l.t.Context(), &rows); err != nil {
		l.t.Fatal(err)
	}
	out := map[string]int{}
	for _, r := range rows {
		out[r.Delivery] = r.N
	}
	return out
}

func (l *load) count(db *bun.DB, from string) (n int) {
	l.t.Helper()
	if err := db.NewRaw("SELECT count(*) FROM "+from).Scan(l.t.Context(), &n); err != nil {
		l.t.Fatal(err)
	}
	return n
}

// settle waits while what left still gets less.
func (l *load) settle(what string, left func() int) time.Duration {
	l.t.Helper()
	began := time.Now()
	last, since := left(), began
	for n := last; n > 0; n = left() {
		if n < last {
			last, since = n, time.Now()
		} else if time.Since(since) > patience {
			l.t.Fatalf("%d %s do not go away", n, what)
		}
		time.Sleep(20 * time.Millisecond)
	}
	return time.Since(began)
}

// cpu is what the orchestrator has used of CPUs, with its kernel's work: fields 14 and
// 15 of /proc/PID/stat, in hundredths of a second, see proc(5).
func (l *load) cpu() time.Duration {
	l.t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", l.Cmd.Process.Pid))
	if err != nil {
		l.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	f := strings.Fields(rest)
	user, err := strconv.Atoi(f[11])
	system, err2 := strconv.Atoi(f[12])
	if err := errors.Join(err, err2); err != nil {
		l.t.Fatal(err)
	}
	return time.Duration(user+system) * 10 * time.Millisecond
}

// limit is of memory that may come on top, without the race detector.
func limit(bytes int64) int64 {
	if info, ok := debug.ReadBuildInfo(); ok && strings.Contains(fmt.Sprint(info.Settings), "{-race true}") {
		return bytes * 4 // the detector keeps a shadow of all memory
	}
	return bytes
}

// TestLoad: of many webhooks each is written down once and has one run, while the
// engine works in the same process; how long the answers take is for people to read.
func TestLoad(t *testing.T) {
	for _, kind := range []string{"postgres", "sqlite"} {
		t.Run(kind, func(t *testing.T) {
			database, args := "", []string{"--amqp-url", testenv.SharedRabbitMQ(t).VHost(t)}
			if kind == "postgres" {
				database, args = withParts(t)
			}
			n := int(loadFor.Seconds() * float64(*loadRate))
			l := newLoad(t, n+1, database, args...)
			l.process = start(t, l.dir, l.args...)
			db := l.open()
			if s := l.post(l.hooks(1)[0], l.http, "s3cret"); s != http.StatusAccepted {
				t.Fatalf("the first: %d", s)
			}
			l.settle("first runs", func() int { return 1 - l.count(db, "runs") })

			floor := bare()
			defer floor.Close()
			at := floor.Listener.Addr().String()
			hooks := l.hooks(n)
			before, cpu := l.resident("VmRSS"), l.cpu()
			l.forgetPeak()
			began := time.Now()
			var cheapest []answer
			var beside sync.WaitGroup
			beside.Go(func() { cheapest = offer(hooks, *loadRate, nil, func(h hook) int { return l.post(h, at, "s3cret") }) })
			answers := offer(hooks, *loadRate, nil, func(h hook) int { return l.post(h, l.http, "s3cret") })
			beside.Wait()
			sent, have := time.Since(began), l.count(db, "runs")-1
			text, p99 := figures(answers)
			floorText, floorP99 := figures(cheapest)
			t.Logf("%d webhooks at %d/s: %s", n, *loadRate, text)
			t.Logf("without a database: %s; p99 is %.1f times that", floorText, float64(p99)/float64(max(floorP99, 1)))
			for i, a := range answers { // what it was too slow for comes again
				for again := 0; a.status == http.StatusServiceUnavailable && again < 100; again++ {
					a.status = l.post(hooks[i], l.http, "s3cret")
				}
				if a.status != http.StatusAccepted {
					t.Fatalf("webhook %d: %d", i, a.status)
				}
			}
			caught := l.settle("runs", func() int { return n + 1 - l.count(db, "runs") })
			peak := l.resident("VmHWM")
			t.Logf("%d runs when the last was answered after %v, the others %v later: %.0f/s", have, sent.Round(time.Millisecond), caught.Round(time.Millisecond), float64(n)/(sent+caught).Seconds())
			t.Logf("memory: %d MiB before, %d MiB at most", before>>20, peak>>20)
			if peak > before+limit(150<<20) {
				t.Errorf("%d MiB before, %d MiB at most", before>>20, peak>>20)
			}
			l.settle("messages", func() int { return l.count(db, "outbox") })
			l.once(db, hooks)
			if told := l.settle("statuses", func() int { return l.count(db, "reports WHERE due_at > 0") }); told > 0 {
				t.Logf("the forge was told all %v later", told.Round(time.Millisecond))
			}
			t.Logf("the orchestrator had %v of a CPU for each", ((l.cpu() - cpu) / time.Duration(n)).Round(10*time.Microsecond))
		})
	}
}

// once checks that each webhook is accepted once and has one run.
func (l *load) once(db *bun.DB, hooks []hook) {
	l.t.Helper()
	accepted, runs := l.counts(db, "deliveries WHERE state = 'accepted'"), l.counts(db, "runs")
	for _, h := range hooks {
		if a, r := accepted[h.delivery], runs[h.delivery]; a != 1 || r != 1 {
			l.t.Errorf("webhook %s was accepted %d times and has %d runs", h.delivery, a, r)
		}
	}
}

// TestWebhookFloods: bodies of a gigabyte, more slow ones than there are places, and
// forged ones by the thousand leave the memory as it is, and genuine webhooks are
// taken meanwhile.
func TestWebhookFloods(t *testing.T) {
	l := newLoad(t, 2000, "")
	l.process = start(t, l.dir, l.args...)
	genuine := l.hooks(2000)
	forged := bytes.Repeat([]byte("x"), 16<<10)
	forge := func(n int) {
		var workers sync.WaitGroup
		for range 4 {
			workers.Go(func() {
				for range n / 4 {
					if s := l.post(hook{"forged", forged}, l.http, "another secret"); s != http.StatusUnauthorized && s != http.StatusServiceUnavailable {
						t.Errorf("forged: %d", s)
					}
				}
			})
		}
		workers.Wait()
	}
	forge(100)
	before := l.resident("VmRSS")
	l.forgetPeak()

	over := make(chan struct{})
	var taken, posts atomic.Int64
	var others sync.WaitGroup
	others.Go(func() { // one after the other, each until it is taken
		for _, h := range genuine {
			for s := 0; s != http.StatusAccepted; posts.Add(1) {
				if s = l.post(h, l.http, "s3cret"); s != http.StatusAccepted && s != http.StatusServiceUnavailable {
					t.Errorf("a genuine webhook: %d", s)
					return
				}
			}
			taken.Add(1)
			select {
			case <-over:
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	})
	slow := make(chan struct{}) // closed when they are to go
	var refused atomic.Int64
	for i := range *loadSlow {
		others.Go(func() {
			if l.drip(i%2 == 0, slow) == http.StatusServiceUnavailable {
				refused.Add(1)
			}
		})
	}
	for what, length := range map[string]int64{"said to be a gigabyte": 1 << 30, "a gigabyte that does not say so": -1} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+l.http+"/webhooks/codeberg", io.LimitReader(zeros{}, 1<<30))
		if err != nil {
			t.Fatal(err)
		}
		r.ContentLength = length
		resp, err := l.client.Do(r)
		if err != nil { // it was refused while it was sent
			t.Logf("%s: %v", what, err)
			continue
		}
		_ = resp.Body.Close()
		if s := resp.StatusCode; s != http.StatusRequestEntityTooLarge && s != http.StatusRequestTimeout {
			t.Errorf("%s: %d", what, s)
		}
	}
	forge(*loadForged)
	l.eventually("genuine webhooks among the others", func() bool { return taken.Load() >= 10 })
	close(over)
	close(slow)
	others.Wait()

	t.Logf("%d genuine webhooks, sent %d times", taken.Load(), posts.Load())
	peak := l.resident("VmHWM")
	t.Logf("%d slow ones, %d of which had to make way; memory: %d MiB before, %d MiB at most", *loadSlow, refused.Load(), before>>20, peak>>20)
	if peak > before+limit(150<<20) {
		t.Errorf("%d MiB before, %d MiB at most", before>>20, peak>>20)
	}
	db := l.open()
	l.settle("runs", func() int { return int(taken.Load()) - l.count(db, "runs") })
	l.once(db, genuine[:taken.Load()])
	if n := l.count(db, "deliveries"); int64(n) != taken.Load() {
		t.Errorf("%d deliveries of %d genuine webhooks", n, taken.Load())
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// drip sends a body a byte at a time, until it is over or there is an answer, which it
// gives.
func (l *load) drip(sized bool, over <-chan struct{}) (status int) {
	c, err := net.Dial("tcp", l.http)
	if err != nil {
		return 0
	}
	defer c.Close()
	head, piece := "Transfer-Encoding: chunked", "1\r\nx\r\n"
	if sized {
		head, piece = "Content-Length: 20000000", "x"
	}
	if _, err := io.WriteString(c, "POST /webhooks/codeberg HTTP/1.1\r\nHost: x\r\n"+head+"\r\n\r\n"); err != nil {
		return 0
	}
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		_, _ = fmt.Fscanf(c, "HTTP/1.1 %d", &status)
	}()
	for {
		select {
		case <-over:
			_ = c.Close()
			<-answered
			return status
		case <-answered:
			return status
		case <-time.After(200 * time.Millisecond):
			_, _ = io.WriteString(c, piece) // it may be over
		}
	}
}

// shortLeases is what differs in a program that is killed: what it had claimed is free
// after seconds.
var shortLeases = []edit{
	{file: "main.go", old: startOfConfig, new: shortTiming + startOfConfig},
	{file: "../../solstice/integration/integration.go", old: "const lease = 30 * time.Second", new: "const lease = 2 * time.Second"},
}

// underFire kills orchestrators while webhooks come, some of which are delivered again
// where there was no answer, and gives what is wrong in the end.
func (l *load) underFire(t *testing.T, exe string, kills int) (wrong []string) {
	t.Helper()
	hooks := l.hooks(4000)
	var mu sync.Mutex
	sent, accepted, times := 0, map[string]bool{}, 0
	var again []hook
	next := func(anew bool) (h hook, ok bool) {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case anew && sent < len(hooks) && len(again) < 32: // more than that says nothing more
			h, ok = hooks[sent], true
			sent++
		case len(again) > 0:
			h, again, ok = again[0], again[1:], true
		}
		return h, ok
	}
	send := func(h hook) (taken bool) {
		taken = l.post(h, l.http, "s3cret") == http.StatusAccepted
		mu.Lock()
		defer mu.Unlock()
		times++
		if taken {
			accepted[h.delivery] = true
		} else if !strings.HasSuffix(h.delivery, "0") { // nobody cares for every tenth
			again = append(again, h)
		}
		return taken
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var load sync.WaitGroup
	for range 16 {
		load.Go(func() {
			for anew := true; ; anew = !anew {
				if h, ok := next(anew); ok && send(h) && ctx.Err() == nil {
					continue
				}
				if wait(ctx, 20*time.Millisecond); ctx.Err() != nil { // it is down
					return
				}
			}
		})
	}
	for range kills {
		v := launch(t, exe, l.dir, l.args...)
		mu.Lock()
		enough := len(accepted) + 1 + rand.IntN(50) //nolint:gosec // an instant of its life
		mu.Unlock()
		for began := time.Now(); time.Since(began) < patience; time.Sleep(time.Millisecond) {
			mu.Lock()
			n := len(accepted)
			mu.Unlock()
			if n >= enough {
				break
			}
		}
		v.Stop(syscall.SIGKILL)
	}
	l.process = launch(t, exe, l.dir, l.args...)
	l.Await()
	stop()
	load.Wait()
	for h, ok := next(false); ok; h, ok = next(false) {
		send(h)
	}

	db := l.open()
	rows := l.counts(db, "deliveries WHERE state = 'accepted'")
	var runs map[string]int
	l.settle("webhooks without a run", func() (n int) {
		runs = l.counts(db, "runs")
		for d := range rows {
			if runs[d] == 0 {
				n++
			}
		}
		return n
	})
	for _, h := range hooks[:sent] {
		d := h.delivery
		if n := rows[d]; n > 1 || n == 0 && accepted[d] {
			wrong = append(wrong, fmt.Sprintf("webhook %s (answered: %v) was written down %d times", d, accepted[d], n))
		}
		if n := runs[d]; n > 1 || n == 0 && accepted[d] {
			wrong = append(wrong, fmt.Sprintf("webhook %s (answered: %v) has %d runs", d, accepted[d], n))
		}
	}
	t.Logf("%d webhooks, sent %d times, %d kills: %d taken in the end", sent, times, kills, len(accepted))
	return wrong
}

// TestWebhooksUnderFire: whenever it is killed, each webhook that it answered with 202
// has one run, and none has two; and an orchestrator that answers first is found out.
func TestWebhooksUnderFire(t *testing.T) {
	answersFirst := edit{
		file: "../../solstice/integration/webhook.go",
		old:  "	o, err := in.handle(ctx, r.Header, body, name, f)\n",
		new: `	header := r.Header.Clone()
	go func() {
		time.Sleep(100 * time.Millisecond)
		_, _ = in.handle(context.WithoutCancel(ctx), header, body, name, f)
	}()
	var err error
	o = outcome{http.StatusAccepted, "accepted", "", false}
`,
	}
	for _, c := range []struct {
		name  string
		edits []edit
		kills int
		finds string
	}{
		{"as-it-is", shortLeases, *loadKills, ""},
		{"answers-first", append(slices.Clone(shortLeases), answersFirst), 2, "answered: true) was written down 0 times"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel() // most of the time one or the other starts
			exe, err := plant(t, "hooks-"+c.name, c.edits...)
			if err != nil {
				t.Fatal(err)
			}
			database, args := withParts(t)
			l := newLoad(t, 4000, database, args...)
			wrong := strings.Join(l.underFire(t, exe, c.kills), "\n")
			if c.finds == "" && wrong != "" || !strings.Contains(wrong, c.finds) {
				t.Errorf("want %q, found:\n%s", c.finds, wrong)
			}
		})
	}
}
