package client_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/orchestrator/client"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds every wait for a condition; it only ends what hangs.
const patience = time.Minute

// fake is an orchestrator whose streams are scripts: each call of one takes the
// next.
type fake struct {
	pb.UnimplementedOrchestratorServiceServer

	mu     sync.Mutex
	getRun func(context.Context) error
	tails  []func(*pb.TailLogRequest, grpc.ServerStreamingServer[pb.TailLogResponse]) error
	runs   []func(grpc.ServerStreamingServer[pb.WatchRunResponse]) error
	asked  []*pb.TailLogRequest
}

func (f *fake) GetRun(ctx context.Context, _ *pb.GetRunRequest) (*pb.GetRunResponse, error) {
	f.mu.Lock()
	answer := f.getRun
	f.mu.Unlock()
	if answer != nil {
		return nil, answer(ctx)
	}
	return &pb.GetRunResponse{}, nil
}

// answer is how GetRun ends from now on.
func (f *fake) answer(with func(context.Context) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.getRun = with
}

func next[T any](f *fake, scripts *[]T) (s T, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(*scripts) == 0 {
		return s, status.Error(codes.Internal, "the script is over")
	}
	s = (*scripts)[0]
	*scripts = (*scripts)[1:]
	return s, nil
}

func (f *fake) TailLog(r *pb.TailLogRequest, out grpc.ServerStreamingServer[pb.TailLogResponse]) error {
	s, err := next(f, &f.tails)
	if err != nil {
		return err
	}
	f.mu.Lock()
	f.asked = append(f.asked, r)
	f.mu.Unlock()
	return s(r, out)
}

func (f *fake) WatchRun(_ *pb.WatchRunRequest, out grpc.ServerStreamingServer[pb.WatchRunResponse]) error {
	s, err := next(f, &f.runs)
	if err != nil {
		return err
	}
	return s(out)
}

// rig is a fake at an address where it can be stopped and started.
type rig struct {
	t     *testing.T
	fake  *fake
	ca    *daemon.CA
	addr  string
	srv   *grpc.Server
	ended chan error
}

func newRig(t *testing.T) *rig {
	t.Helper()
	ca, err := daemon.LoadOrCreateCA(t.TempDir(), "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, fake: &fake{}, ca: ca, addr: "127.0.0.1:0"}
	r.start()
	t.Cleanup(func() { r.stop() })
	return r
}

func (r *rig) start() {
	r.t.Helper()
	lis, err := net.Listen("tcp", r.addr)
	if err != nil {
		r.t.Fatal(err)
	}
	r.addr = lis.Addr().String()
	r.srv = grpc.NewServer(grpc.Creds(credentials.NewTLS(r.ca.ServerConfig())))
	pb.RegisterOrchestratorServiceServer(r.srv, r.fake)
	r.ended = make(chan error, 1)
	srv, ended := r.srv, r.ended
	go func() { ended <- srv.Serve(lis) }()
}

// stop is a crash: connections are cut.
func (r *rig) stop() {
	if r.srv == nil {
		return
	}
	r.srv.Stop()
	if err := <-r.ended; err != nil && !errors.Is(err, grpc.ErrServerStopped) { // it may stop before it serves
		r.t.Error(err)
	}
	r.srv = nil
}

func (r *rig) roots() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(r.ca.PEM())
	return pool
}

func (r *rig) dial(cfg client.Config) *client.Client {
	r.t.Helper()
	cfg.Server, cfg.Roots = r.addr, r.roots()
	c, err := client.New(cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestTokenAndDeadline(t *testing.T) {
	r := newRig(t)
	r.fake.answer(func(ctx context.Context) error {
		md, _ := metadata.FromIncomingContext(ctx)
		until, ok := ctx.Deadline()
		return status.Errorf(codes.NotFound, "%v %v %v", md.Get("authorization"), ok, time.Until(until) <= 7*time.Second)
	})
	for _, c := range []struct {
		cfg  client.Config
		want string
	}{
		{client.Config{Token: "sol_X", Timeout: 7 * time.Second}, "[Bearer sol_X] true true"},
		{client.Config{Timeout: time.Hour}, "[] true false"},
	} {
		_, err := r.dial(c.cfg).GetRun(t.Context(), &pb.GetRunRequest{})
		if err == nil || err.Error() != c.want {
			t.Errorf("the server saw %v, want %s", err, c.want)
		}
	}
	r.fake.answer(func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
	c := r.dial(client.Config{Timeout: 50 * time.Millisecond})
	if _, err := c.GetRun(t.Context(), &pb.GetRunRequest{}); !errors.Is(err, client.ErrTimeout) {
		t.Errorf("a server that does not answer: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r.fake.answer(func(ctx context.Context) error { cancel(); <-ctx.Done(); return ctx.Err() })
	if _, err := r.dial(client.Config{}).GetRun(ctx, &pb.GetRunRequest{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestKinds(t *testing.T) {
	r := newRig(t)
	c := r.dial(client.Config{})
	for code, want := range map[codes.Code]error{
		codes.InvalidArgument: client.ErrInvalid, codes.NotFound: client.ErrNotFound, codes.FailedPrecondition: client.ErrState,
		codes.Unauthenticated: client.ErrUnauthenticated, codes.PermissionDenied: client.ErrPermission, codes.ResourceExhausted: client.ErrTooMuch,
		codes.Unavailable: client.ErrUnavailable, codes.Unimplemented: client.ErrUnknownMethod, codes.Internal: client.ErrInternal, codes.Unknown: client.ErrInternal,
	} {
		r.fake.answer(func(context.Context) error { return status.Error(code, "so it is") })
		_, err := c.GetRun(t.Context(), &pb.GetRunRequest{})
		if e, ok := errors.AsType[*client.Error](err); !ok || !errors.Is(err, want) || e.Cause != nil || err.Error() != "so it is" || status.Code(err) != code {
			t.Errorf("%s: %v", code, err)
		}
	}
}

// TestWhyThereIsNoConnection makes each cause happen.
func TestWhyThereIsNoConnection(t *testing.T) {
	r := newRig(t)
	call := func(cfg client.Config) error {
		t.Helper()
		c, err := client.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		_, err = c.GetRun(t.Context(), &pb.GetRunRequest{})
		return err
	}
	other := newRig(t)
	_, port, _ := net.SplitHostPort(r.addr)
	if err := call(client.Config{Server: "localhost:" + port, Roots: r.roots()}); !causedBy[x509.HostnameError](err) {
		t.Errorf("another name: %v", err)
	}
	if err := call(client.Config{Server: r.addr, Roots: other.roots()}); !causedBy[x509.UnknownAuthorityError](err) || !errors.Is(err, client.ErrUnavailable) {
		t.Errorf("another authority: %v", err)
	}
	if err := call(client.Config{Server: "no-such-host.invalid:1"}); !causedBy[*net.DNSError](err) {
		t.Errorf("a name that does not resolve: %v", err)
	}
	for name, serve := range map[string]func(net.Conn){
		"speaks something else": func(c net.Conn) { _, _ = io.WriteString(c, "220 smtp ready\r\n"); _, _ = io.Copy(io.Discard, c) },
		"hangs up":              func(net.Conn) {},
	} {
		addr := listen(t, serve)
		if err := call(client.Config{Server: addr}); !errors.Is(err, client.ErrNotTLS) {
			t.Errorf("%s: %v", name, err)
		}
	}
	old := r.ca.ServerConfig().Clone()
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	addr := listen(t, func(c net.Conn) { _ = tls.Server(c, old).HandshakeContext(t.Context()) })
	if err := call(client.Config{Server: addr, Roots: r.roots()}); !errors.Is(err, client.ErrUnavailable) || errors.Is(err, client.ErrNotTLS) || !strings.Contains(err.Error(), "version") {
		t.Errorf("TLS 1.2: %v", err)
	}
	r.stop()
	if err := call(client.Config{Server: r.addr, Roots: r.roots()}); !errors.Is(err, syscall.ECONNREFUSED) || !errors.Is(err, client.ErrUnavailable) {
		t.Errorf("nothing listens: %v", err)
	}
	for name, cfg := range map[string]client.Config{
		"no port": {Server: "localhost"}, "no host": {Server: ":1"}, "two tokens": {Token: "a b"},
	} {
		if _, err := client.New(cfg); !errors.Is(err, client.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func causedBy[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

// listen serves one connection after the other.
func listen(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { defer func() { _ = c.Close() }(); serve(c) })
		}
	})
	t.Cleanup(func() { _ = lis.Close(); wg.Wait() })
	return lis.Addr().String()
}

// sends is the script that sends messages and then ends as err says.
func sends(err error, ms ...*pb.TailLogResponse) func(*pb.TailLogRequest, grpc.ServerStreamingServer[pb.TailLogResponse]) error {
	return func(_ *pb.TailLogRequest, out grpc.ServerStreamingServer[pb.TailLogResponse]) error {
		for _, m := range ms {
			if err := out.Send(m); err != nil {
				return err
			}
		}
		return err
	}
}

func begin(n int32) *pb.TailLogResponse {
	return &pb.TailLogResponse{Attempt: &pb.Attempt{Number: n}, Durable: true}
}

func bytesAt(off int64, data string, durable bool) *pb.TailLogResponse {
	return &pb.TailLogResponse{Offset: off, Data: []byte(data), Durable: durable, Marks: []*pb.LogMark{{Offset: off, Step: 1}, {Offset: off + 2, Step: 2}}}
}

var errAway = status.Error(codes.Unavailable, "the orchestrator stops")

// TestTailGoesOn: every byte once and in order, whatever the streams repeat, and
// each goes on from the last durable byte of the right attempt.
func TestTailGoesOn(t *testing.T) {
	r := newRig(t)
	r.fake.tails = []func(*pb.TailLogRequest, grpc.ServerStreamingServer[pb.TailLogResponse]) error{
		sends(errAway, begin(1), bytesAt(2, "abcd", true), bytesAt(6, "efgh", false)), // what is not durable is lost,
		sends(errAway, begin(1), bytesAt(6, "ef", true)),                              // and comes again, bit by bit
		sends(errAway, begin(1), bytesAt(8, "ghij", true), begin(2)),
		sends(errAway), // nothing new
		sends(nil, begin(2), bytesAt(0, "kl", true), begin(3), bytesAt(0, "mn", true)),
	}
	c := r.dial(client.Config{})
	var got strings.Builder
	var marks []string
	for m, err := range c.Tail(t.Context(), &pb.TailLogRequest{Of: &pb.TailLogRequest_JobId{JobId: "j"}, From: 2, Follow: true}) {
		if err != nil {
			t.Fatal(err)
		}
		if m.GetAttempt() != nil {
			fmt.Fprintf(&got, "[%d]", m.GetAttempt().GetNumber())
		}
		got.Write(m.GetData())
		for _, k := range m.GetMarks() {
			marks = append(marks, fmt.Sprintf("%d:%d", k.GetOffset(), k.GetStep()))
			if k.GetOffset() < m.GetOffset() {
				t.Errorf("mark at %d before its bytes at %d", k.GetOffset(), m.GetOffset())
			}
		}
	}
	if got.String() != "[1]abcdefghij[2]kl[3]mn" {
		t.Errorf("got %q", got.String())
	}
	if fmt.Sprint(marks) != "[2:1 4:2 6:1 8:2 10:2 0:1 2:2 0:1 2:2]" {
		t.Errorf("marks %v", marks)
	}
	var asked []string
	for _, a := range r.fake.asked {
		asked = append(asked, fmt.Sprintf("%d+%d", a.GetAttempt(), a.GetFrom()))
	}
	if fmt.Sprint(asked) != "[0+2 1+6 1+8 2+0 2+0]" {
		t.Errorf("asked for %v", asked)
	}
}

func TestTailEnds(t *testing.T) {
	tail := func(r *rig, c *client.Client) error {
		r.t.Helper()
		if _, err := c.GetRun(t.Context(), &pb.GetRunRequest{}); err != nil { // it was there once
			t.Fatal(err)
		}
		for _, err := range c.Tail(t.Context(), &pb.TailLogRequest{Of: &pb.TailLogRequest_AttemptId{AttemptId: "a"}}) {
			if err != nil {
				return err
			}
		}
		return nil
	}
	for _, c := range []struct {
		name   string
		cfg    client.Config
		first  error
		want   error
		silent bool
	}{
		{"refused", client.Config{}, status.Error(codes.PermissionDenied, "no"), client.ErrPermission, false},
		{"deleted", client.Config{}, status.Error(codes.NotFound, "gone"), client.ErrNotFound, false},
		{"a reader that was slow", client.Config{}, status.Error(codes.ResourceExhausted, "nothing was read"), nil, false},
		{"a message that is too large", client.Config{}, status.Error(codes.ResourceExhausted, "too large"), client.ErrTooMuch, true},
		{"never again", client.Config{Patience: -1}, errAway, client.ErrUnavailable, false},
		{"in time", client.Config{Patience: patience}, errAway, nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			ms := []*pb.TailLogResponse{bytesAt(0, "abc", true)}
			if c.silent {
				ms = nil
			}
			r.fake.tails = []func(*pb.TailLogRequest, grpc.ServerStreamingServer[pb.TailLogResponse]) error{sends(c.first, ms...), sends(nil)}
			if err := tail(r, r.dial(c.cfg)); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	t.Run("bytes are missing", func(t *testing.T) {
		r := newRig(t)
		r.fake.tails = []func(*pb.TailLogRequest, grpc.ServerStreamingServer[pb.TailLogResponse]) error{sends(nil, bytesAt(0, "abc", true), bytesAt(4, "x", true))}
		if err := tail(r, r.dial(client.Config{})); !errors.Is(err, client.ErrInternal) || !strings.Contains(err.Error(), "3 to 4") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("patience", func(t *testing.T) {
		r := newRig(t)
		c, srv := r.dial(client.Config{Patience: 300 * time.Millisecond}), r.srv
		r.fake.tails = []func(*pb.TailLogRequest, grpc.ServerStreamingServer[pb.TailLogResponse]) error{
			func(_ *pb.TailLogRequest, out grpc.ServerStreamingServer[pb.TailLogResponse]) error {
				go srv.Stop() // and does not come back
				<-out.Context().Done()
				return out.Context().Err()
			},
		}
		if err := tail(r, c); !errors.Is(err, client.ErrUnavailable) || !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("never there", func(t *testing.T) {
		r := newRig(t)
		r.stop()
		c := r.dial(client.Config{Patience: time.Hour})
		for _, err := range c.Watch(t.Context(), "r") {
			if !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("got %v", err)
			}
		}
	})
}

// TestWatchGoesOn across a crash, says nothing twice, and ends with its caller.
func TestWatchGoesOn(t *testing.T) {
	r := newRig(t)
	c := r.dial(client.Config{})
	state := func(s pb.RunState) *pb.WatchRunResponse {
		return &pb.WatchRunResponse{Run: &pb.Run{Id: "r", State: s}}
	}
	r.fake.runs = []func(grpc.ServerStreamingServer[pb.WatchRunResponse]) error{
		func(out grpc.ServerStreamingServer[pb.WatchRunResponse]) error {
			if err := out.Send(state(pb.RunState_RUN_STATE_RUNNING)); err != nil {
				return err
			}
			<-out.Context().Done()
			return out.Context().Err()
		},
		func(out grpc.ServerStreamingServer[pb.WatchRunResponse]) error {
			return errors.Join(out.Send(state(pb.RunState_RUN_STATE_RUNNING)), out.Send(state(pb.RunState_RUN_STATE_SUCCEEDED)))
		},
	}
	var got []string
	for run, err := range c.Watch(t.Context(), "r") {
		if err != nil {
			t.Fatal(err)
		}
		if got = append(got, run.GetState().String()); len(got) == 1 {
			r.stop()
			r.start()
		}
	}
	if fmt.Sprint(got) != "[RUN_STATE_RUNNING RUN_STATE_SUCCEEDED]" {
		t.Errorf("got %v", got)
	}

	ended := make(chan struct{})
	endless := func(out grpc.ServerStreamingServer[pb.WatchRunResponse]) error {
		defer func() { ended <- struct{}{} }()
		if err := out.Send(state(pb.RunState_RUN_STATE_RUNNING)); err != nil {
			return err
		}
		<-out.Context().Done()
		return out.Context().Err()
	}
	r.fake.runs = append(r.fake.runs, endless, endless)
	for _, err := range c.Watch(t.Context(), "r") {
		if err != nil {
			t.Error(err)
		}
		break
	}
	await(t, ended)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var last error
	for _, err := range c.Watch(ctx, "r") {
		cancel()
		last = err
	}
	if !errors.Is(last, context.Canceled) {
		t.Errorf("cancelled: %v", last)
	}
	await(t, ended)
}

func await(t *testing.T, what chan struct{}) {
	t.Helper()
	select {
	case <-what:
	case <-time.After(patience):
		t.Fatal("the call on the server did not end with its caller's")
	}
}
