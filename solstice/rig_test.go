package solstice_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/blobstore/fsblob"
	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	"github.com/solstice-ci/solstice-go/internal/selfca"
	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/amqpqueue"
	"github.com/solstice-ci/solstice-go/queue/sqlqueue"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/memvm"
	"github.com/solstice-ci/solstice-go/vmprovider/processvm"
)

// engineArg makes the test binary an engine of its own that can be killed.
const engineArg = "__solstice-test-engine"

func TestMain(m *testing.M) {
	agent.Hook()
	if len(os.Args) == 3 && os.Args[1] == bareArg {
		if err := bareAgent(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) > 2 && os.Args[1] == pluginArg {
		if err := pluginMain(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) == 3 && os.Args[1] == engineArg {
		if err := engineMain(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// plant is what engines of one installation share, as data, so that an engine
// can be in this process or in one of its own.
type plant struct {
	DBURL    string
	Dir      string // blobs, machines, repository, statuses
	Timing   solstice.Timing
	Contacts []string // what agents dial; empty: the engine they were made by
	Capacity int
	Warm     int
	LogBytes int64
	Grace    time.Duration
	Inside   bool   // agents run inside the engine's process
	Handover string // a directory: who reads it runs the agents, see handover
	Broker   string // AMQP URL of the queue; empty: in the database
	Host     string // of the pool; empty: "test". Its machines have a directory of their own
	Quiet    bool   // an engine of its own process logs nothing below a warning
	Guests   *guests
}

// quick are clocks for tests: everything that waits for one is short.
var quick = solstice.Timing{
	Lease: 3 * time.Second, AgentDeadline: 6 * time.Second, DeadlineMargin: time.Second,
	Heartbeat: 300 * time.Millisecond, Tick: 300 * time.Millisecond, Boot: time.Minute,
}

func newPlant(t testing.TB, dbURL string) *plant {
	t.Helper()
	p := &plant{DBURL: dbURL, Dir: t.TempDir(), Timing: quick, Capacity: 4, Grace: time.Second}
	p.commit(t, map[string]string{"README": "test"})
	db := p.openDB(t)
	if err := solstice.Migrate(t.Context(), db); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.nothingLeft(t) })
	return p
}

// onBoth runs a test on both databases at once, since engines mostly wait; db
// makes a fresh one.
func onBoth(t *testing.T, test func(t *testing.T, db func(testing.TB) string)) {
	t.Helper()
	for name, db := range map[string]func(testing.TB) string{"sqlite": testenv.SQLite, "postgres": testenv.Postgres} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, db)
		})
	}
}

func (p *plant) openDB(t testing.TB) *bun.DB {
	t.Helper()
	db, err := sqldb.Open(t.Context(), p.DBURL, sqldb.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return db
}

func (p *plant) repoDir() string     { return filepath.Join(p.Dir, "repo") }
func (p *plant) machinesDir() string { return filepath.Join(p.Dir, "machines", p.Host) }

// nothingLeft is checked after every test: no machine, no directory of one.
func (p *plant) nothingLeft(t testing.TB) {
	t.Helper()
	entries, err := os.ReadDir(p.machinesDir())
	if err != nil && !os.IsNotExist(err) {
		t.Error(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "sol-") {
			t.Errorf("machine %s is left", e.Name())
		}
	}
}

func (p *plant) openQueue(ctx context.Context, db *bun.DB, log *slog.Logger) (queue.Queue, error) {
	if p.Broker != "" {
		return amqpqueue.Open(ctx, amqpqueue.Options{URL: p.Broker, Logger: log})
	}
	return sqlqueue.New(ctx, db, sqlqueue.Options{Logger: log})
}

// config builds an engine's parts from the plant.
func (p *plant) config(ctx context.Context, log *slog.Logger) (solstice.Config, func(), error) {
	var closers []func() error
	done := func() {
		for i := len(closers) - 1; i >= 0; i-- {
			_ = closers[i]()
		}
	}
	fail := func(err error) (solstice.Config, func(), error) { done(); return solstice.Config{}, nil, err }
	db, err := sqldb.Open(ctx, p.DBURL, sqldb.Options{})
	if err != nil {
		return fail(err)
	}
	closers = append(closers, db.Close)
	q, err := p.openQueue(ctx, db, log)
	if err != nil {
		return fail(err)
	}
	closers = append(closers, q.Close)
	blobs, err := fsblob.Open(filepath.Join(p.Dir, "blobs"), fsblob.Options{})
	if err != nil {
		return fail(err)
	}
	closers = append(closers, blobs.Close)
	repo, err := localgit.Open(ctx, localgit.Config{Dir: p.repoDir(), StatusDir: filepath.Join(p.Dir, "statuses")})
	if err != nil {
		return fail(err)
	}
	pool := processvm.Config{
		Root: p.machinesDir(), Command: agent.Command(), StepEnv: map[string]string{"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/nonexistent"}, Logger: log,
	}
	var local net.Listener
	if p.Inside {
		l, err := agent.NewLocal()
		if err != nil {
			return fail(err)
		}
		closers = append(closers, l.Close)
		pool.Command, pool.Runner, local = nil, l.Run, l.Listener()
	}
	machines, err := processvm.New(pool)
	if err != nil {
		return fail(err)
	}
	closers = append(closers, machines.Close)
	ca, err := selfca.LoadOrCreate(p.Dir, agent.ServerName)
	if err != nil {
		return fail(err)
	}
	var provider vmprovider.Provider = machines
	boots := 0
	if p.Handover != "" {
		provider = handover{memvm.New(memvm.Config{}), p.Handover}
		boots = p.Capacity // agents start once all machines are made
	}
	if p.Guests != nil {
		if provider, err = p.Guests.open(ctx); err != nil {
			return fail(err)
		}
		closers = append(closers, provider.Close)
	}
	tls := &solstice.AgentTLS{GetCertificate: ca.ServerConfig().GetCertificate, CA: ca.PEM()}
	cfg := solstice.Config{
		DB: db, Queue: q, Blobs: blobs, Logger: log, AgentTLS: tls, Contacts: p.Contacts, Timing: p.Timing, LocalAgents: local,
		Forges: map[string]forge.Forge{"local": repo}, MaxConcurrency: p.Capacity, LogBytes: p.LogBytes, CancelGrace: p.Grace,
		Pools: []solstice.Pool{{Labels: []string{"host"}, Provider: provider, Host: cmp.Or(p.Host, "test"), Capacity: p.Capacity, Warm: p.Warm, HostBoots: boots}},
	}
	if p.Guests != nil {
		p.Guests.serve(&cfg.Pools[0])
	}
	return cfg, done, nil
}

// start runs an engine in this process until the returned function is called
// or the test ends.
func (p *plant) start(t testing.TB, edit ...func(*solstice.Config)) (*solstice.Engine, func()) {
	t.Helper()
	cfg, done, err := p.config(t.Context(), slog.New(slog.NewTextHandler(&testLog{t: t}, &slog.HandlerOptions{Level: slog.LevelInfo})))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range edit {
		f(&cfg)
	}
	eng, err := solstice.New(cfg)
	if err != nil {
		done()
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- eng.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
		done()
	})
	t.Cleanup(stop)
	return eng, stop
}

// testLog shows an engine's records when the test fails.
type testLog struct{ t testing.TB }

func (l *testLog) Write(b []byte) (int, error) {
	l.t.Logf("%s", bytes.TrimRight(b, "\n"))
	return len(b), nil
}

// engineConfig is the file that an engine of its own process reads.
type engineConfig struct {
	Plant *plant
	Addr  string // of the agents' listener
}

// spawn starts an engine in a process of its own, to be killed.
func (p *plant) spawn(t testing.TB, addr string) *exec.Cmd {
	t.Helper()
	b, err := json.Marshal(engineConfig{Plant: p, Addr: addr})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "engine.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, engineArg, file)
	out := &testLog{t: t}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	waited := make(chan struct{})
	go func() { _ = cmd.Wait(); close(waited) }()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-waited })
	return cmd
}

func engineMain(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var c engineConfig
	if err := json.Unmarshal(b, &c); err != nil {
		return err
	}
	ctx := context.Background()
	level := slog.LevelInfo
	if c.Plant.Quiet {
		level = slog.LevelWarn
	}
	cfg, done, err := c.Plant.config(ctx, slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})))
	if err != nil {
		return err
	}
	defer done()
	cfg.AgentAddr = c.Addr
	eng, err := solstice.New(cfg)
	if err != nil {
		return err
	}
	return eng.Run(ctx)
}

// commit makes a repository of these files in the plant and returns the commit.
func (p *plant) commit(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := p.repoDir()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	p.git(t, "init", "-q")
	for name, content := range files {
		path := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p.git(t, "add", "-A")
	p.git(t, "commit", "-q", "-m", "test")
	return p.git(t, "rev-parse", "HEAD")
}

// git runs git in the repository of the plant.
func (p *plant) git(t testing.TB, args ...string) string {
	t.Helper()
	cmd := exec.Command("git", append([]string{"-C", p.repoDir(), "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// submit commits a workflow and submits it; it expects one run.
func (p *plant) submit(t testing.TB, eng *solstice.Engine, workflow string) solstice.Run {
	t.Helper()
	commit := p.commit(t, map[string]string{".solstice/workflow.yaml": workflow})
	runs, err := eng.Submit(t.Context(), solstice.RunRequest{Repo: forge.Repo{Name: "repo"}, Commit: commit, Ref: "refs/heads/main"})
	if err != nil {
		t.Fatal(err)
	}
	if len(runs) != 1 {
		t.Fatalf("%d runs, want 1", len(runs))
	}
	return runs[0]
}

// finish waits for a run's end.
func finish(t testing.TB, eng *solstice.Engine, id string) solstice.Run {
	t.Helper()
	return finishWithin(t, eng, id, 2*time.Minute)
}

func finishWithin(t testing.TB, eng *solstice.Engine, id string, bound time.Duration) solstice.Run {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	defer cancel()
	var last solstice.Run
	for r, err := range eng.Watch(ctx, id) {
		if err != nil {
			t.Fatalf("watch: %v; last seen: %+v", err, last)
		}
		last = r
	}
	return last
}

// jobLog reads a job's logs, all attempts.
func jobLog(t testing.TB, eng *solstice.Engine, jobID string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var b strings.Builder
	for c, err := range eng.FollowJob(ctx, jobID) {
		if err != nil {
			t.Fatalf("log: %v, after %q", err, b.String())
		}
		b.Write(c.Chunk.Data)
	}
	return b.String()
}

func job(t testing.TB, r solstice.Run, name string) solstice.Job {
	t.Helper()
	for _, j := range r.Jobs {
		if j.Name == name {
			return j
		}
	}
	t.Fatalf("no job %q in %+v", name, r.Jobs)
	return solstice.Job{}
}

// eventually waits for a condition; it fails the test only after a time that no
// healthy machine needs.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	eventuallyWithin(t, time.Minute, what, ok)
}

func eventuallyWithin(t testing.TB, bound time.Duration, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(bound)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("not within %s: %s", bound, what)
		case <-tick.C:
		}
	}
}

func machinesOf(t testing.TB, p vmprovider.Provider) []vmprovider.Instance {
	t.Helper()
	var out []vmprovider.Instance
	for m, err := range p.List(context.WithoutCancel(t.Context()), vmprovider.ListOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, m)
	}
	return out
}

// logFrom reads an attempt's log from an offset.
func logFrom(t testing.TB, eng *solstice.Engine, attemptID string, from int64) string {
	t.Helper()
	var b strings.Builder
	for c, err := range eng.Log(t.Context(), attemptID, from) {
		if err != nil {
			t.Fatal(err)
		}
		b.Write(c.Data)
	}
	return b.String()
}
