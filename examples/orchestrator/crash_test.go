package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"

	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
)

// Among all other tests a few kills have to do: each costs about a second, and
// what they look for are the instants, of which the seed gives others each time.
// "make crashtest" has a hundred and more.
var (
	kills = flag.Int("kills", 15, "how often TestCrashLoop kills the orchestrator")
	seed  = flag.Uint64("seed", 0, "of the instants of TestCrashLoop; 0: another one each time")
)

// shortTiming is the victim's only difference from the program that people run:
// what a lease of a killed orchestrator holds up is free after seconds.
const shortTiming = `Timing: solstice.Timing{Lease: 3 * time.Second, Tick: time.Second, Boot: 2 * time.Minute}, `

// crash is a loop that kills orchestrators on one state directory, under a load
// of its own.
type crash struct {
	t    *testing.T
	exe  string
	dir  string
	rand *rand.Rand
	args []string
	grpc string
	hist *history
	// instant returns when the process is to be killed; how it ends is up to
	// the loop. Nil: at random.
	instant func(ctx context.Context, c *crash, v *process)
}

func newCrash(t *testing.T, exe string) *crash {
	s := *seed
	if s == 0 {
		s = rand.Uint64()
	}
	t.Logf("-seed=%d", s)
	c := &crash{t: t, exe: exe, dir: filepath.Join(t.TempDir(), "state"), rand: rand.New(rand.NewPCG(s, 0)), grpc: freeAddr(t)}
	c.args = []string{"--agent-addr=" + freeAddr(t), "--grpc-addr=" + c.grpc, "--capacity-map=host=4", "--max-concurrency=4", "--drain-timeout=200ms"}
	c.hist = newHistory(t, c.dir)
	return c
}

// freeAddr is an address that all orchestrators of a loop listen at.
func freeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// wait is for the fault itself, whose instant is random.
func wait(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// upTo is a random duration.
func (c *crash) upTo(d time.Duration) time.Duration { return time.Duration(c.rand.Int64N(int64(d))) }

// atRandom waits for an instant of a process's life: while it starts, soon after
// it did, when it recovers, or later, when it works, at the latest soon after a
// job has begun or ended: on a slow machine none would otherwise.
func atRandom(ctx context.Context, c *crash, v *process) {
	if c.rand.IntN(4) == 0 {
		wait(ctx, c.upTo(500*time.Millisecond))
		return
	}
	select {
	case <-v.Started:
	case <-v.Ended:
		return
	case <-ctx.Done():
	}
	switch c.rand.IntN(4) {
	case 0:
		wait(ctx, c.upTo(100*time.Millisecond))
	case 1:
		bounded, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		whenNoted(bounded, c, v)
	default:
		wait(ctx, c.upTo(1500*time.Millisecond))
	}
}

// run kills n times under load, lets the last orchestrator bring everything to
// its end, stops it, and returns what the checker found.
func (c *crash) run(n int) []string {
	c.t.Helper()
	// A loop that brings nothing to its end is what the checker is to report.
	bound := 3*time.Minute + time.Duration(n)*5*time.Second
	ctx, cancel := context.WithTimeout(c.t.Context(), bound)
	defer cancel()
	over := make(chan struct{}) // the kills are
	var load sync.WaitGroup
	load.Go(func() { c.load(ctx, over) })
	instant := c.instant
	if instant == nil {
		instant = atRandom
	}
	for range n {
		v := launch(c.t, c.exe, c.dir, c.args...)
		instant(ctx, c, v)
		how := syscall.SIGKILL
		if c.rand.IntN(5) == 0 {
			how = syscall.SIGTERM
		}
		v.Stop(how)
	}
	close(over)
	last := c.survivor(ctx)
	load.Wait()
	c.hist.settle(ctx)
	last.Stop(syscall.SIGTERM)
	return c.hist.check(c.t.Context())
}

// survivor starts an orchestrator that stays.
func (c *crash) survivor(ctx context.Context) *process {
	c.t.Helper()
	for {
		v := launch(c.t, c.exe, c.dir, c.args...)
		select {
		case <-v.Started:
			return v
		case <-v.Ended: // as when another program was given the port meanwhile
			if ctx.Err() != nil {
				c.t.Fatalf("did not start: %v", v.Err)
			}
		}
	}
}

// client is there when the first orchestrator came to write down what clients
// need; it is good for all of them.
func (c *crash) client(ctx context.Context) (pb.OrchestratorServiceClient, context.Context, error) {
	for {
		token, err := os.ReadFile(filepath.Join(c.dir, "admin.token"))
		if err == nil {
			o := &process{t: c.t, dir: c.dir, grpc: c.grpc}
			return pb.NewOrchestratorServiceClient(o.conn()), metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+string(token[:len(token)-1])), nil
		}
		if wait(ctx, 20*time.Millisecond); ctx.Err() != nil {
			return nil, nil, ctx.Err()
		}
	}
}

// load submits runs until the kills are over, a few at a time, and watches all
// of them to their ends.
func (c *crash) load(ctx context.Context, over <-chan struct{}) {
	client, ctx, err := c.client(ctx)
	if err != nil {
		c.t.Errorf("no orchestrator came up: %v", err)
		return
	}
	c.hist.client = client
	var watchers sync.WaitGroup
	defer watchers.Wait()
	slots := make(chan struct{}, 3)
	for i := 0; ; i++ {
		select {
		case <-over:
			return
		case <-ctx.Done():
			return
		case slots <- struct{}{}:
		}
		id, err := c.submit(ctx, client, fmt.Sprintf("run%d", i))
		if err != nil {
			return
		}
		watchers.Go(func() {
			c.watch(ctx, client, id)
			<-slots
		})
	}
}

// call repeats f until it is answered: nothing but time ends it.
func call[T any](ctx context.Context, f func(context.Context) (T, error)) (T, error) {
	for {
		once, cancel := context.WithTimeout(ctx, 5*time.Second)
		out, err := f(once)
		cancel()
		if err == nil {
			return out, nil
		}
		if wait(ctx, 50*time.Millisecond); ctx.Err() != nil {
			return out, errors.Join(ctx.Err(), err)
		}
	}
}

// submit repeats a submission under its key until it is acknowledged; only then
// is it a promise.
func (c *crash) submit(ctx context.Context, client pb.OrchestratorServiceClient, key string) (string, error) {
	repo, commit := repository(c.t, c.hist.workflow(key))
	resp, err := call(ctx, func(ctx context.Context) (*pb.SubmitResponse, error) {
		return client.Submit(ctx, &pb.SubmitRequest{IdempotencyKey: key, Repo: repo, Commit: commit, Ref: "refs/heads/main"})
	})
	if err != nil {
		return "", err
	}
	if len(resp.GetRuns()) != 1 {
		c.t.Errorf("%s: %d runs", key, len(resp.GetRuns()))
		return "", errors.New("no run")
	}
	return resp.GetRuns()[0].GetId(), c.hist.accepted(key, repo, commit, resp.GetRuns()[0])
}

// watch notes every state of a run that is seen, until it is over.
func (c *crash) watch(ctx context.Context, client pb.OrchestratorServiceClient, id string) {
	for ctx.Err() == nil {
		resp, err := call(ctx, func(ctx context.Context) (*pb.GetRunResponse, error) {
			return client.GetRun(ctx, &pb.GetRunRequest{RunId: id})
		})
		if err != nil {
			return
		}
		if c.hist.observe(resp.GetRun()) {
			return
		}
		wait(ctx, 50*time.Millisecond)
	}
}

// TestCrashLoop: whenever the orchestrator is killed, every run that was accepted
// comes to its one end, with its log, and nothing is left behind.
func TestCrashLoop(t *testing.T) {
	exe, err := plant(t, "victim", edit{file: "main.go", old: startOfConfig, new: shortTiming + startOfConfig})
	if err != nil {
		t.Fatal(err)
	}
	c := newCrash(t, exe)
	for _, found := range c.run(*kills) {
		t.Error(found)
	}
	if n := len(c.hist.runs); n == 0 {
		t.Error("no run was accepted")
	} else {
		t.Logf("%d kills, %d runs of %d jobs", *kills, n, len(c.hist.states)-n)
	}
}
