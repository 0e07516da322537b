package solstice_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/solstice-ci/solstice-go/internal/selfca"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
)

const lineBytes = 200

// fileOfLines writes a file of 200-byte lines for jobs to print.
func fileOfLines(b *testing.B, size int) (path string, lines int) {
	b.Helper()
	line := append(bytes.Repeat([]byte("x"), lineBytes-1), '\n')
	lines = size / lineBytes
	path = filepath.Join(b.TempDir(), "lines")
	if err := os.WriteFile(path, bytes.Repeat(line, lines), 0o600); err != nil {
		b.Fatal(err)
	}
	return path, lines
}

// BenchmarkLogPath measures lines of 200 bytes from a step's output until the log
// is sealed and the job over: a process that prints a file, its agent, TLS and
// gRPC, the engine's session, filelog, SQLite. Beside it, in turns, the floor:
// as many bare gRPC streams over TLS that send the same number of bytes from
// memory in messages of 64 KiB, to a receiver that writes them to one file and
// acknowledges what is synced, in groups. The jobs' fixed cost is counted.
func BenchmarkLogPath(b *testing.B) {
	for _, streams := range []int{1, 4} {
		b.Run(fmt.Sprintf("%dstreams", streams), func(b *testing.B) {
			file, lines := fileOfLines(b, 192<<20/streams)
			eng, p := benchPlant(b, streams, false)
			var w strings.Builder
			w.WriteString("checkout: false\njobs:\n")
			for i := range streams {
				fmt.Fprintf(&w, "  a%d: { steps: [ { run: cat %s } ] }\n", i, file)
			}
			commit := p.commit(b, map[string]string{".solstice/workflow.yaml": w.String()})
			floor := newLogFloor(b)
			var bare, ours time.Duration
			b.ResetTimer()
			for range b.N {
				bare += floor.send(b, streams, lines*lineBytes)
				start := time.Now()
				run := submitTrivial(b, eng, commit)
				last := finishWithin(b, eng, run.ID, 10*time.Minute)
				ours += time.Since(start)
				for _, j := range last.Jobs {
					as, err := eng.Attempts(b.Context(), j.ID)
					if err != nil || j.State != solstice.JobSucceeded || as[0].LogSize != int64(lines*lineBytes) {
						b.Fatalf("job %s is %s: %+v, %v", j.Name, j.State, as, err)
					}
				}
			}
			n := float64(b.N * streams * lines)
			b.ReportMetric(n/bare.Seconds(), "bare-lines/s")
			b.ReportMetric(n/ours.Seconds(), "lines/s")
			b.ReportMetric(bare.Seconds()/ours.Seconds(), "x-bare")
		})
	}
}

// BenchmarkIdleLine measures one line at a time: from its writing, into the pipe
// that a step prints, until a follower has it.
func BenchmarkIdleLine(b *testing.B) {
	eng, p := benchPlant(b, 1, false)
	fifo := filepath.Join(b.TempDir(), "lines")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		b.Fatal(err)
	}
	commit := p.commit(b, map[string]string{".solstice/workflow.yaml": "checkout: false\njobs: { a: { steps: [ { run: cat " + fifo + " } ] } }\n"})
	run := submitTrivial(b, eng, commit)
	next, stop := iter.Pull2(eng.FollowJob(b.Context(), run.Jobs[0].ID))
	defer stop()
	out, err := os.OpenFile(fifo, os.O_WRONLY, 0) // waits for the step
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = out.Close() }()
	var seen []time.Duration
	b.ResetTimer()
	for i := range b.N + 1 {
		start := time.Now()
		line := fmt.Appendf(nil, "%d\n", i)
		if _, err := out.Write(line); err != nil {
			b.Fatal(err)
		}
		for got := 0; got < len(line); {
			c, err, ok := next()
			if err != nil || !ok {
				b.Fatal("the log ended", err)
			}
			got += len(c.Chunk.Data)
		}
		if i > 0 { // the first one waits for the follower as well
			seen = append(seen, time.Since(start))
		}
	}
	b.StopTimer()
	percentiles(b, "line", seen)
	if err := out.Close(); err != nil {
		b.Fatal(err)
	}
	if r := finish(b, eng, run.ID); r.State != solstice.RunSucceeded {
		b.Errorf("run is %s: %s", r.State, r.Reason)
	}
}

// logFloor is the least that a durable log over gRPC needs.
type logFloor struct {
	agentv1.UnimplementedAgentServiceServer
	file *os.File
	addr string
	ca   []byte

	mu     sync.Mutex
	synced sync.Cond
	wrote  int64 // bytes written
	safe   int64 // of them, synced
	over   bool
	err    error
}

func newLogFloor(b *testing.B) *logFloor {
	b.Helper()
	f := &logFloor{}
	f.synced.L = &f.mu
	var err error
	if f.file, err = os.Create(filepath.Join(b.TempDir(), "floor")); err != nil {
		b.Fatal(err)
	}
	ca, err := selfca.New(agent.ServerName)
	if err != nil {
		b.Fatal(err)
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	f.addr, f.ca = lis.Addr().String(), ca.PEM()
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(ca.ServerConfig())), grpc.InitialWindowSize(1<<20), grpc.InitialConnWindowSize(1<<20))
	agentv1.RegisterAgentServiceServer(g, f)
	var running sync.WaitGroup
	running.Go(func() { _ = g.Serve(lis) })
	running.Go(f.sync)
	b.Cleanup(func() {
		g.Stop()
		f.mu.Lock()
		f.over = true
		f.mu.Unlock()
		f.synced.Broadcast()
		running.Wait()
		_ = f.file.Close()
	})
	return f
}

// sync makes durable whatever was written since it last did.
func (f *logFloor) sync() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for !f.over {
		if f.safe == f.wrote {
			f.synced.Wait()
			continue
		}
		now := f.wrote
		f.mu.Unlock()
		err := f.file.Sync()
		f.mu.Lock()
		f.safe, f.err = now, errors.Join(f.err, err)
		f.synced.Broadcast()
	}
}

// Attach writes what comes, and answers when the stream ends and all is synced.
func (f *logFloor) Attach(s grpc.BidiStreamingServer[agentv1.AttachRequest, agentv1.AttachResponse]) error {
	mine := int64(0)
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		f.mu.Lock()
		n, err := f.file.Write(m.GetEvents().GetEvents()[0].GetLog().GetData())
		f.wrote += int64(n)
		mine = f.wrote
		f.mu.Unlock()
		f.synced.Broadcast()
		if err != nil {
			return err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.safe < mine && f.err == nil && !f.over {
		f.synced.Wait()
	}
	return f.err
}

// send has streams that send size bytes each.
func (f *logFloor) send(b *testing.B, streams, size int) time.Duration {
	b.Helper()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(f.ca)
	line := append(bytes.Repeat([]byte("x"), lineBytes-1), '\n')
	block := bytes.Repeat(line, 64<<10/lineBytes)
	one := func() error {
		conn, err := grpc.NewClient(f.addr, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
			RootCAs: pool, ServerName: agent.ServerName, MinVersion: tls.VersionTLS13,
		})))
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }()
		s, err := agentv1.NewAgentServiceClient(conn).Attach(b.Context())
		if err != nil {
			return err
		}
		for left := size; left > 0; {
			n := min(left, len(block))
			m := &agentv1.AttachRequest{Msg: &agentv1.AttachRequest_Events{Events: &agentv1.EventBatch{Events: []*agentv1.Event{
				{Event: &agentv1.Event_Log{Log: &agentv1.Log{Data: block[:n]}}},
			}}}}
			if err := s.Send(m); err != nil {
				return err
			}
			left -= n
		}
		if err := s.CloseSend(); err != nil {
			return err
		}
		if _, err := s.Recv(); !errors.Is(err, io.EOF) {
			return fmt.Errorf("the stream ended with %w", err)
		}
		return nil
	}
	return parallel(b, streams, streams, one)
}
