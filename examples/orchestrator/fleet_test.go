package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"

	"github.com/solstice-ci/solstice-go/internal/testenv" //nolint:depguard // the test is not part of the main that is copied
	"github.com/solstice-ci/solstice-go/solstice/agent"
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
)

// "make crashtest" has 500 jobs.
var fleetJobs = flag.Int("fleet-jobs", 60, "how many jobs TestFleetCrashLoop brings to their end")

// fleet is orchestrators on one PostgreSQL, one RabbitMQ and one bucket, as
// their flags say. They share a computer, and so its machines.
type fleet struct {
	t        testing.TB
	exe      string
	dirs     []string // state directories
	addrs    []string // for clients and peers
	agents   []string // for agents
	args     []string
	trust    string // PEM file
	database string
	queued   func() int
	machines string
	capacity int
}

func newFleet(t testing.TB, exe string, n int) *fleet {
	t.Helper()
	f := &fleet{t: t, exe: exe, database: testenv.Postgres(t), capacity: 4}
	ca := testenv.NewAuthority(t)
	cert := ca.Issue(t, "orchestrator", "127.0.0.1", agent.ServerName)
	broker := testenv.SharedRabbitMQ(t)
	vhost := broker.VHost(t)
	bucket := testenv.S3(t)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte(bucket.SecretKey), 0o600); err != nil {
		t.Fatal(err)
	}
	base := t.TempDir()
	f.trust, f.machines = ca.File, filepath.Join(base, "machines")
	f.args = []string{
		"--database-url", f.database, "--auto-migrate", "--amqp-url", vhost,
		"--s3-endpoint", bucket.Endpoint, "--s3-bucket", bucket.Bucket, "--aws-region", bucket.Region,
		"--aws-access-key-id", bucket.AccessKey, "--aws-secret-access-key-file", secret,
		"--grpc-tls-cert", cert.Cert, "--grpc-tls-key", cert.Key, "--grpc-tls-ca", cert.CA, "--mtls-role=none",
		"--agent-tls-cert", cert.Cert, "--agent-tls-key", cert.Key, "--agent-tls-ca", cert.CA,
		"--machines-dir", f.machines, fmt.Sprint("--capacity-map=host=", f.capacity), "--max-concurrency=3", "--drain-timeout=200ms",
	}
	f.queued = func() (n int) {
		for _, q := range broker.Queues(t, vhost) {
			if !strings.Contains(q.Name, ".wake.") { // a wake-up that came before its first reader stays
				n += q.Messages
			}
		}
		return n
	}
	for i := range n {
		f.dirs = append(f.dirs, filepath.Join(base, fmt.Sprint("state", i)))
		f.addrs, f.agents = append(f.addrs, freeAddr(t)), append(f.agents, freeAddr(t))
	}
	return f
}

// launch starts the i-th orchestrator.
func (f *fleet) launch(i int, args ...string) *process {
	f.t.Helper()
	o := launch(f.t, f.exe, f.dirs[i], append(append(slices.Clone(f.args), "--grpc-addr="+f.addrs[i], "--peer-addr="+f.addrs[i], "--agent-addr="+f.agents[i]), args...)...)
	o.grpc = f.addrs[i]
	return o
}

// client talks to the i-th orchestrator, whether it is there or not, as admin.
func (f *fleet) client(ctx context.Context, i int) (pb.OrchestratorServiceClient, context.Context) {
	f.t.Helper()
	token := ""
	for token == "" {
		for _, dir := range f.dirs { // the first to come writes it
			b, err := os.ReadFile(filepath.Join(dir, "admin.token"))
			if err == nil && bytes.HasSuffix(b, []byte("\n")) {
				token = strings.TrimSpace(string(b))
			}
		}
		if wait(ctx, 20*time.Millisecond); ctx.Err() != nil {
			f.t.Fatalf("no orchestrator came up: %v", ctx.Err())
		}
	}
	o := &process{t: f.t, dir: f.dirs[i], grpc: f.addrs[i]}
	return pb.NewOrchestratorServiceClient(o.dial(f.trust)), metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
}

// overcommit looks until ctx ends for more machines than the host has room for.
func (f *fleet) overcommit(ctx context.Context, h *history) {
	db := h.open()
	defer func() { _ = db.Close() }()
	for ctx.Err() == nil {
		var n int
		err := db.NewRaw("SELECT count(*) FROM machines WHERE state <> 'gone'").Scan(ctx, &n)
		if err == nil && n > f.capacity {
			h.violation("%d machines on a host for %d", n, f.capacity)
		}
		wait(ctx, 20*time.Millisecond)
	}
}

// TestMachinesHost: a directory of machines has one name, whoever is first to
// ask and however many ask at once; another directory has another.
func TestMachinesHost(t *testing.T) {
	root := filepath.Join(t.TempDir(), "machines")
	names, errs := make([]string, 8), make([]error, 8)
	var wg sync.WaitGroup
	for i := range names {
		wg.Go(func() { names[i], errs[i] = machinesHost(root) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	if names[0] == "" || len(slices.Compact(names)) != 1 {
		t.Errorf("names %q", names)
	}
	if left, err := filepath.Glob(filepath.Join(root, ".host-*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	other, err := machinesHost(t.TempDir())
	if err != nil || other == names[0] {
		t.Errorf("another directory is %q, %v", other, err)
	}
	if err := os.WriteFile(filepath.Join(root, ".host"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if name, err := machinesHost(root); err == nil {
		t.Errorf("an empty file names it %q", name)
	}
}

// TestFleet has two orchestrators share the jobs, follows at each a log that
// the other receives, and has the agent of a job go on at the other one when
// its own is killed.
func TestFleet(t *testing.T) {
	exe, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	f := newFleet(t, exe, 2)
	// Told, not only heard of: an agent may lose its orchestrator in its first second.
	one, two := f.launch(0, "--orch-contact-addr="+f.agents[0]+","+f.agents[1]), f.launch(1, "--orch-contact-addr="+f.agents[1]+","+f.agents[0])
	one.Await()
	two.Await()
	ctx := as(t, "")
	c1, ctx1 := f.client(ctx, 0)
	c2, ctx2 := f.client(ctx, 1)
	dir := t.TempDir()
	gate := func(name string) string { return filepath.Join(dir, name) }
	script := func(name string) string {
		return fmt.Sprintf("echo before; while [ ! -e %s ]; do sleep 0.05; done; echo after", gate(name))
	}
	run := submit(ctx1, t, c1, fmt.Sprintf(`
checkout: false
jobs:
  a: { steps: [ { run: %q } ] }
  b: { steps: [ { run: %q } ] }
  c: { steps: [ { run: %q } ] }
  d: { steps: [ { run: %q } ] }
`, script("g"), script("g"), script("g"), script("g")))
	// Four jobs need both, which take three each.
	before := func(b []byte) bool { return bytes.Contains(b, []byte("before\n")) }
	for _, j := range run.GetJobs() {
		for i, c := range []pb.OrchestratorServiceClient{c1, c2} {
			ctx := []context.Context{ctx1, ctx2}[i]
			tail(ctx, t, c, &pb.TailLogRequest{Of: &pb.TailLogRequest_JobId{JobId: j.GetId()}, Follow: true}, before)
		}
	}
	one.Stop(syscall.SIGKILL)
	if err := os.WriteFile(gate("g"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	end := over(ctx2, t, c2, run.GetId())
	for _, j := range end.GetJobs() {
		if j.GetState() != pb.JobState_JOB_STATE_SUCCEEDED || j.GetAttempts() != 1 {
			t.Errorf("job %s: %s after %d attempts", j.GetName(), j.GetState(), j.GetAttempts())
		}
		log := tail(ctx2, t, c2, &pb.TailLogRequest{Of: &pb.TailLogRequest_JobId{JobId: j.GetId()}}, nil)
		if string(log) != "before\nafter\n" {
			t.Errorf("job %s printed %q", j.GetName(), log)
		}
	}
}

// TestFleetCrashLoop: three orchestrators, of which one is killed every few
// seconds, bring every run to its one end, with its log, and leave nothing.
func TestFleetCrashLoop(t *testing.T) {
	exe, err := plant(t, "fleet", edit{file: "main.go", old: startOfConfig, new: shortTiming + startOfConfig})
	if err != nil {
		t.Fatal(err)
	}
	s := *seed
	if s == 0 {
		s = rand.Uint64()
	}
	t.Logf("-seed=%d", s)
	random := rand.New(rand.NewPCG(s, 0))
	f := newFleet(t, exe, 3)
	h := newHistory(t, f.dirs...)
	h.database, h.machines, h.queued = f.database, f.machines, f.queued

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute+time.Duration(*fleetJobs)*5*time.Second)
	defer cancel()
	runs := (*fleetJobs + len(jobNames("")) - 1) / len(jobNames(""))
	var load, kills sync.WaitGroup
	all := make([]*process, len(f.dirs))
	for i := range all {
		all[i] = f.launch(i)
	}
	all[0].Await()
	watch, unwatch := context.WithCancel(ctx)
	defer unwatch()
	kills.Go(func() { f.overcommit(watch, h) })

	// The load: a few runs at a time, at all of them; a call to one that is away
	// is repeated until it is there again.
	var left atomic.Int64
	left.Store(int64(runs))
	clients := make([]pb.OrchestratorServiceClient, len(f.dirs))
	var authorized context.Context
	for i := range clients {
		clients[i], authorized = f.client(ctx, i)
	}
	c := &crash{t: t, hist: h}
	for w := range 2 * len(clients) {
		load.Go(func() {
			for {
				n := left.Add(-1)
				if n < 0 || ctx.Err() != nil {
					return
				}
				client := clients[w%len(clients)]
				id, err := c.submit(authorized, client, fmt.Sprintf("run%d", n))
				if err != nil {
					t.Errorf("submit: %v", err)
					return
				}
				c.watch(authorized, client, id)
			}
		})
	}
	loaded := make(chan struct{})
	go func() { load.Wait(); close(loaded) }()

	killed := 0
	for busy := true; busy; {
		pause := 500*time.Millisecond + time.Duration(random.Int64N(int64(4*time.Second)))
		select {
		case <-loaded:
			busy = false
			continue
		case <-time.After(pause): // the instant of the fault is random
		}
		i := random.IntN(len(all))
		all[i].Stop(syscall.SIGKILL)
		killed++
		wait(ctx, time.Duration(random.Int64N(int64(2*time.Second))))
		all[i] = f.launch(i)
	}
	for i := range all {
		select {
		case <-all[i].Started:
		case <-all[i].Ended:
			t.Fatalf("did not start: %v", all[i].Err)
		case <-ctx.Done():
		}
	}
	h.settle(ctx)
	h.log = func(_ context.Context, attempt string) ([]byte, error) {
		var out []byte
		for i, c := range clients { // each gives the same
			got := tail(authorized, t, c, &pb.TailLogRequest{Of: &pb.TailLogRequest_AttemptId{AttemptId: attempt}}, nil)
			if i > 0 && !bytes.Equal(got, out) {
				return got, errors.New("two orchestrators give different logs")
			}
			out = got
		}
		return out, nil
	}
	h.checkKept(ctx)
	unwatch()
	kills.Wait()
	for _, o := range all {
		o.Stop(syscall.SIGTERM)
	}
	h.checkLeft()
	for _, found := range h.found {
		t.Error(found)
	}
	t.Logf("%d kills, %d runs of %d jobs", killed, len(h.runs), len(h.states)-len(h.runs))
	if len(h.runs) != runs {
		t.Errorf("%d of %d runs were accepted", len(h.runs), runs)
	}
}
