package solstice_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/selfca"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
	"github.com/solstice-ci/solstice-go/solstice/logstream/filelog"
)

// bareArg makes the test binary a bare agent: the floor under what a job costs.
const bareArg = "__solstice-test-bare-agent"

const trivial = "checkout: false\njobs:\n  hi:\n    steps:\n      - run: echo hi\n"

// bareServer is what a bare agent talks to: TLS and a stream, nothing durable.
type bareServer struct {
	agentv1.UnimplementedAgentServiceServer
}

func (bareServer) Attach(s grpc.BidiStreamingServer[agentv1.AttachRequest, agentv1.AttachResponse]) error {
	if _, err := s.Recv(); err != nil {
		return err
	}
	if err := s.Send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Assign{Assign: &agentv1.Assign{AttemptId: "a"}}}); err != nil {
		return err
	}
	m, err := s.Recv()
	if err != nil {
		return err
	}
	return s.Send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Ack{Ack: &agentv1.Ack{Seq: int64(len(m.GetEvents().GetEvents()))}}})
}

type bareConfig struct {
	Addr string
	CA   []byte
}

// bareAgent connects, gets a job, runs sh and sends its output.
func bareAgent(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var c bareConfig
	if err := json.Unmarshal(b, &c); err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(c.CA)
	conn, err := grpc.NewClient(c.Addr, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		RootCAs: pool, ServerName: agent.ServerName, MinVersion: tls.VersionTLS13,
	})))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx := context.Background()
	s, err := agentv1.NewAgentServiceClient(conn).Attach(ctx)
	if err != nil {
		return err
	}
	if err := s.Send(&agentv1.AttachRequest{Msg: &agentv1.AttachRequest_Hello{Hello: &agentv1.Hello{}}}); err != nil {
		return err
	}
	if _, err := s.Recv(); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "/bin/sh", "-c", "echo hi").Output()
	if err != nil {
		return err
	}
	events := &agentv1.EventBatch{Events: []*agentv1.Event{{Seq: 1, Event: &agentv1.Event_Log{Log: &agentv1.Log{Data: out}}}}}
	if err := s.Send(&agentv1.AttachRequest{Msg: &agentv1.AttachRequest_Events{Events: events}}); err != nil {
		return err
	}
	_, err = s.Recv()
	return err
}

// bareJobs runs n bare agents, at most width at once.
func bareJobs(b *testing.B, addr string, ca []byte, n, width int) time.Duration {
	b.Helper()
	file := filepath.Join(b.TempDir(), "bare.json")
	cfg, err := json.Marshal(bareConfig{addr, ca})
	if err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(file, cfg, 0o600); err != nil {
		b.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	return parallel(b, n, width, func() error { return exec.Command(exe, bareArg, file).Run() })
}

func parallel(b *testing.B, n, width int, f func() error) time.Duration {
	b.Helper()
	work := make(chan struct{}, n)
	for range n {
		work <- struct{}{}
	}
	close(work)
	start := time.Now()
	var wg sync.WaitGroup
	for range min(n, width) {
		wg.Go(func() {
			for range work {
				if err := f(); err != nil {
					b.Error(err)
				}
			}
		})
	}
	wg.Wait()
	return time.Since(start)
}

func startBareServer(b *testing.B) (string, []byte) {
	b.Helper()
	ca, err := selfca.New(agent.ServerName)
	if err != nil {
		b.Fatal(err)
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(ca.ServerConfig())))
	agentv1.RegisterAgentServiceServer(g, bareServer{})
	go func() { _ = g.Serve(lis) }()
	b.Cleanup(g.Stop)
	return lis.Addr().String(), ca.PEM()
}

// benchPlant is an engine as the embedded daemon has it: SQLite, its queue, its
// logs, the process pool, with production's clocks.
func benchPlant(b *testing.B, slots int, inside bool, edit ...func(*solstice.Config)) (*solstice.Engine, *plant) {
	b.Helper()
	dir := b.TempDir()
	p := newPlant(b, "sqlite:"+filepath.Join(dir, "solstice.db"))
	p.Timing, p.Capacity, p.Inside = solstice.Timing{}, slots, inside
	b.Cleanup(func() { p.destroyAll(b) }) // warm machines outlive the engine
	logs, err := filelog.Open(filepath.Join(dir, "logs"), filelog.Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = logs.Close() })
	eng, _ := p.start(b, append([]func(*solstice.Config){silent, func(c *solstice.Config) { c.Logs = logs }}, edit...)...)
	return eng, p
}

func silent(c *solstice.Config) { c.Logger = nil }

func submitTrivial(b *testing.B, eng *solstice.Engine, commit string) solstice.Run {
	b.Helper()
	runs, err := eng.Submit(b.Context(), solstice.RunRequest{Repo: forge.Repo{Name: "repo"}, Commit: commit, Ref: "refs/heads/main"})
	if err != nil {
		b.Fatal(err)
	}
	return runs[0]
}

// engineJobs submits n runs of one trivial job and waits for all of them.
func engineJobs(b *testing.B, eng *solstice.Engine, commit string, n, width int) time.Duration {
	b.Helper()
	return parallel(b, n, width, func() error {
		run := submitTrivial(b, eng, commit)
		var last solstice.Run
		for r, err := range eng.Watch(b.Context(), run.ID) {
			if err != nil {
				return err
			}
			last = r
		}
		if last.State != solstice.RunSucceeded {
			return fmt.Errorf("run %s is %s: %s", last.ID, last.State, last.Reason)
		}
		return nil
	})
}

// BenchmarkTrivialJobs compares jobs per second, an agent process each, with
// bare agent processes of the same binary, in turns.
func BenchmarkTrivialJobs(b *testing.B) {
	slots, round := brief(64, 8), brief(128, 16)
	addr, ca := startBareServer(b)
	eng, p := benchPlant(b, slots, false)
	commit := p.commit(b, map[string]string{".solstice/workflow.yaml": trivial})
	var bare, ours time.Duration
	b.ResetTimer()
	for range b.N {
		bare += bareJobs(b, addr, ca, round, slots)
		ours += engineJobs(b, eng, commit, round, slots)
	}
	n := float64(b.N * round)
	b.ReportMetric(n/bare.Seconds(), "bare/s")
	b.ReportMetric(n/ours.Seconds(), "jobs/s")
	b.ReportMetric(bare.Seconds()/ours.Seconds(), "x-bare")
}

// brief is a size, and another one where it is enough that a benchmark runs.
func brief(size, short int) int {
	if testing.Short() {
		return short
	}
	return size
}

// BenchmarkTrivialJobsInside compares jobs per second, the agents inside the
// orchestrator, with spawning their commands alone, in turns.
func BenchmarkTrivialJobsInside(b *testing.B) {
	slots, round := brief(64, 8), brief(256, 32)
	eng, p := benchPlant(b, slots, true)
	commit := p.commit(b, map[string]string{".solstice/workflow.yaml": trivial})
	var spawn, ours time.Duration
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		spawn += parallel(b, round, slots, spawnTrivial)
		ours += engineJobs(b, eng, commit, round, slots)
	}
	n := float64(b.N * round)
	b.ReportMetric(n/spawn.Seconds(), "spawn/s")
	b.ReportMetric(n/ours.Seconds(), "jobs/s")
	b.ReportMetric(spawn.Seconds()/ours.Seconds(), "x-spawn")
}

// spawnTrivial is the least that the trivial job can cost.
func spawnTrivial() error {
	out, err := exec.Command("/bin/sh", "-c", "echo hi").Output()
	if err == nil && string(out) != "hi\n" {
		err = fmt.Errorf("sh printed %q", out)
	}
	return err
}

// percentiles reports the median and the 99th percentile of durations.
func percentiles(b *testing.B, unit string, ds []time.Duration) {
	b.Helper()
	slices.Sort(ds)
	at := func(p int) float64 { return float64(ds[min(len(ds)*p/100, len(ds)-1)].Microseconds()) / 1000 }
	b.ReportMetric(at(50), unit+"-p50-ms")
	b.ReportMetric(at(99), unit+"-p99-ms")
}

// BenchmarkIdleJob measures one trivial job at a time, from Submit until a
// watcher sees its end and until a follower has its first line, beside a bare
// agent.
func BenchmarkIdleJob(b *testing.B) {
	for _, c := range []struct {
		name   string
		warm   int
		inside bool
	}{{"warm=0", 0, false}, {"warm=1", 1, false}, {"inside/warm=0", 0, true}, {"inside/warm=1", 1, true}} {
		b.Run(c.name, func(b *testing.B) {
			warm := c.warm
			addr, ca := startBareServer(b)
			eng, p := benchPlant(b, 4, c.inside, func(c *solstice.Config) { c.Pools[0].Warm = warm })
			commit := p.commit(b, map[string]string{".solstice/workflow.yaml": trivial})
			var bare, over, line []time.Duration
			b.ResetTimer()
			for range b.N {
				if warm > 0 {
					awaitWarm(b, eng)
				}
				start := time.Now()
				run := submitTrivial(b, eng, commit)
				var follower sync.WaitGroup
				follower.Go(func() {
					for c, err := range eng.FollowJob(b.Context(), run.Jobs[0].ID) {
						if err != nil {
							b.Error(err)
						}
						if len(c.Chunk.Data) > 0 {
							line = append(line, time.Since(start))
							return
						}
					}
				})
				for _, err := range eng.Watch(b.Context(), run.ID) {
					if err != nil {
						b.Fatal(err)
					}
				}
				over = append(over, time.Since(start))
				follower.Wait()
				bare = append(bare, bareJobs(b, addr, ca, 1, 1))
			}
			percentiles(b, "bare", bare)
			percentiles(b, "finished", over)
			percentiles(b, "first-line", line)
		})
	}
}

// awaitWarm waits until a machine of the pool is ready.
func awaitWarm(b *testing.B, eng *solstice.Engine) {
	b.Helper()
	for {
		machines, err := eng.Machines(b.Context(), solstice.MachineFilter{})
		if err != nil {
			b.Fatal(err)
		}
		for _, m := range machines {
			if m.State == "ready" {
				return
			}
		}
		time.Sleep(time.Millisecond)
	}
}

// BenchmarkMillionLines runs seq 1000000: until the job is over, its log sealed,
// and a follower has all of it.
func BenchmarkMillionLines(b *testing.B) {
	const size = 6888896
	eng, p := benchPlant(b, 1, false)
	commit := p.commit(b, map[string]string{".solstice/workflow.yaml": "checkout: false\njobs: { a: { steps: [ { run: seq 1000000 } ] } }\n"})
	b.SetBytes(size)
	b.ResetTimer()
	for range b.N {
		run := submitTrivial(b, eng, commit)
		n := 0
		for c, err := range eng.FollowJob(b.Context(), run.Jobs[0].ID) {
			if err != nil {
				b.Fatal(err)
			}
			n += len(c.Chunk.Data)
		}
		if n != size {
			b.Fatalf("%d bytes of log, want %d", n, size)
		}
	}
}
