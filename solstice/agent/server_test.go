package agent_test

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
)

const (
	testToken      = "enrolment-token"
	testCredential = "session-credential"
	testAttempt    = "attempt-1"
)

// server is the other side of the protocol: one machine, one attempt, and the
// faults that a test asks for. It checks what an orchestrator relies on.
type server struct {
	agentv1.UnimplementedAgentServiceServer
	t    testing.TB
	addr string
	ca   []byte

	// What a test may set before it starts an agent.
	spec      *agentv1.JobSpec
	heartbeat time.Duration
	deadline  time.Duration
	maxBatch  int32
	contacts  []string // told at enrolment; nil: none
	protocol  int32
	enrollErr func(n int) error // of the nth call, from 1
	attachErr func(n int) error
	source    http.Handler
	cutEvery  int64                                                     // bytes read of a connection before it is cut
	onEvent   func(s *session, e *agentv1.Event)                        // before it is acknowledged
	ack       func(s *session, seq int64) bool                          // false: not acknowledged on this session
	onHello   func(s *session, h *agentv1.Hello) (w *agentv1.Welcome)   // nil result: the honest answer
	onStart   func(s *session)                                          // after Welcome and Assign
	onBeat    func(s *session) bool                                     // false: not answered
	onMessage func(s *session, m *agentv1.AttachRequest) (handled bool) // first of all
	reassign  bool                                                      // Assign is sent twice

	epoch     atomic.Int64
	bytesRead atomic.Int64

	mu        sync.Mutex
	nonces    [][]byte
	enrolls   int
	sessions  int
	confirmed int
	repeats   int // events that came again
	hellos    []*agentv1.Hello
	acked     int64
	events    []*agentv1.Event // without log bytes
	log       []byte
	logSize   int64
	logHash   interface {
		io.Writer
		Sum([]byte) []byte
	}
	keepLog  bool
	finished *agentv1.JobFinished
	changed  chan struct{}
}

// session is one Attach call; send may be used by hooks.
type session struct {
	n      int
	ctx    context.Context
	stream grpc.BidiStreamingServer[agentv1.AttachRequest, agentv1.AttachResponse]
	mu     sync.Mutex
	events int
}

func (s *session) send(m *agentv1.AttachResponse) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.stream.Send(m) // a stream that is gone shows in Recv
}

func newServer(t testing.TB) *server {
	s := &server{
		t: t, heartbeat: 200 * time.Millisecond, deadline: 30 * time.Second, maxBatch: 128 << 10, protocol: 1,
		logHash: sha256.New(), keepLog: true, changed: make(chan struct{}),
	}
	s.epoch.Store(1)
	var cert tls.Certificate
	s.ca, cert = makeCert(t)
	raw, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	s.addr = raw.Addr().String()
	g := grpc.NewServer(grpc.MaxRecvMsgSize(64 << 20))
	agentv1.RegisterAgentServiceServer(g, s)
	h := &http.Server{Handler: http.HandlerFunc(s.serveSource)}
	split := splitALPN(&cutListener{raw, s}, cert, g, h)
	t.Cleanup(func() {
		split()
		g.Stop()
		_ = h.Close()
	})
	return s
}

func (s *server) serveSource(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Authorization") != "Bearer "+testCredential {
		http.Error(w, "who are you", http.StatusUnauthorized)
		return
	}
	if s.source == nil {
		http.NotFound(w, r)
		return
	}
	s.source.ServeHTTP(w, r)
}

func (s *server) Enroll(_ context.Context, r *agentv1.EnrollRequest) (*agentv1.EnrollResponse, error) {
	s.mu.Lock()
	s.enrolls++
	n := s.enrolls
	s.nonces = append(s.nonces, r.GetNonce())
	s.mu.Unlock()
	if s.enrollErr != nil {
		if err := s.enrollErr(n); err != nil {
			return nil, err
		}
	}
	if r.GetToken() != testToken || len(r.GetNonce()) != 16 {
		return nil, status.Error(codes.Unauthenticated, "token")
	}
	return &agentv1.EnrollResponse{
		SessionCredential: testCredential, MachineId: machineID(s.t), Protocol: s.protocol,
		ServerTime: timestamppb.Now(), HeartbeatInterval: durationpb.New(s.heartbeat),
		AgentDeadline: durationpb.New(s.deadline), MaxEventBytes: s.maxBatch, Contacts: s.contacts,
	}, nil
}

// machineID is unique for a test, since processes are found by it.
func machineID(t testing.TB) string {
	return "m-" + strings.NewReplacer("/", "-", "_", "-").Replace(strings.ToLower(t.Name()))
}

func (s *server) Attach(stream grpc.BidiStreamingServer[agentv1.AttachRequest, agentv1.AttachResponse]) error {
	md, _ := metadata.FromIncomingContext(stream.Context())
	if a := md.Get("authorization"); len(a) != 1 || a[0] != "Bearer "+testCredential {
		return status.Error(codes.Unauthenticated, "credential")
	}
	s.mu.Lock()
	s.sessions++
	ses := &session{n: s.sessions, ctx: stream.Context(), stream: stream}
	s.mu.Unlock()
	if s.attachErr != nil {
		if err := s.attachErr(ses.n); err != nil {
			return err
		}
	}
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	h := first.GetHello()
	if h == nil {
		return status.Error(codes.InvalidArgument, "no Hello")
	}
	if err := s.greet(ses, h); err != nil {
		return err
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			return nil
		}
		if s.onMessage != nil && s.onMessage(ses, m) {
			continue
		}
		switch m := m.GetMsg().(type) {
		case *agentv1.AttachRequest_Heartbeat:
			if s.onBeat == nil || s.onBeat(ses) {
				ses.send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Heartbeat{Heartbeat: m.Heartbeat}})
			}
		case *agentv1.AttachRequest_AssignConfirm:
			s.update(func() { s.confirmed++ })
		case *agentv1.AttachRequest_Events:
			if err := s.take(ses, m.Events); err != nil {
				s.t.Error(err)
				return status.Error(codes.InvalidArgument, err.Error())
			}
		default:
			s.t.Errorf("unexpected message %T", m)
		}
	}
}

func (s *server) greet(ses *session, h *agentv1.Hello) error {
	s.mu.Lock()
	s.hellos = append(s.hellos, h)
	acked, size := s.acked, s.logSize
	s.mu.Unlock()
	w := &agentv1.Welcome{}
	if h.GetAttemptId() != "" {
		if h.GetAttemptId() != testAttempt {
			s.t.Errorf("Hello names attempt %q", h.GetAttemptId())
		}
		if h.GetFirstSpooledSeq() > acked+1 {
			s.t.Errorf("events up to %d are durable, the agent kept only from %d", acked, h.GetFirstSpooledSeq())
		}
		w = &agentv1.Welcome{Epoch: s.epoch.Load(), AckedSeq: acked, LogOffset: size}
	}
	if s.onHello != nil {
		if other := s.onHello(ses, h); other != nil {
			w = other
		}
	}
	ses.send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Welcome{Welcome: w}})
	s.mu.Lock()
	assign := s.confirmed == 0 && s.spec != nil
	s.mu.Unlock()
	for range 2 {
		if assign || s.reassign {
			ses.send(s.assignment())
		}
		if !s.reassign {
			break
		}
	}
	if s.onStart != nil {
		s.onStart(ses)
	}
	return nil
}

func (s *server) assignment() *agentv1.AttachResponse {
	return &agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Assign{Assign: &agentv1.Assign{
		AttemptId: testAttempt, Epoch: s.epoch.Load(), JobSpec: s.spec,
		TraceContext: map[string]string{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
	}}}
}

// take stores a batch as a server would: in order, repeats ignored, gaps
// refused.
func (s *server) take(ses *session, b *agentv1.EventBatch) error {
	var last int64
	for _, e := range b.GetEvents() {
		last = e.GetSeq()
		s.mu.Lock()
		acked := s.acked
		s.mu.Unlock()
		if e.GetSeq() <= acked {
			s.update(func() { s.repeats++ })
			continue
		}
		if e.GetSeq() != acked+1 {
			return fmt.Errorf("gap: event %d after %d", e.GetSeq(), acked)
		}
		if err := s.store(e); err != nil {
			return err
		}
		ses.events++
		if s.onEvent != nil {
			s.onEvent(ses, e)
		}
	}
	if last > 0 && (s.ack == nil || s.ack(ses, last)) {
		s.mu.Lock()
		acked := s.acked
		s.mu.Unlock()
		ses.send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Ack{Ack: &agentv1.Ack{Seq: acked}}})
	}
	return nil
}

func (s *server) store(e *agentv1.Event) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.finished != nil {
		return errors.New("an event after JobFinished")
	}
	if l := e.GetLog(); l != nil {
		if l.GetLogOffset() != s.logSize {
			return fmt.Errorf("log at offset %d, want %d", l.GetLogOffset(), s.logSize)
		}
		if len(l.GetData()) == 0 {
			return errors.New("a log event without bytes")
		}
		s.logSize += int64(len(l.GetData()))
		_, _ = s.logHash.Write(l.GetData())
		if s.keepLog {
			s.log = append(s.log, l.GetData()...)
		}
	} else {
		s.events = append(s.events, e)
	}
	s.acked = e.GetSeq()
	if f := e.GetJobFinished(); f != nil {
		s.finished = f
	}
	s.wake()
	return nil
}

func (s *server) update(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	s.wake()
}

func (s *server) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// waitFor waits until cond holds of the server's state.
func (s *server) waitFor(what string, cond func() bool) {
	s.t.Helper()
	deadline := time.After(60 * time.Second)
	for {
		s.mu.Lock()
		ok, ch := cond(), s.changed
		s.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-ch:
		case <-deadline:
			s.t.Fatalf("waited in vain for: %s", what)
		}
	}
}

// waitLog waits until the log contains text.
func (s *server) waitLog(text string) {
	s.t.Helper()
	s.waitFor("log with "+text, func() bool { return strings.Contains(string(s.log), text) })
}

func (s *server) logText() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return string(s.log)
}

// step gives what was journalled of a step.
func (s *server) step(i int) *agentv1.StepFinished {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.events {
		if f := e.GetStepFinished(); f != nil && int(f.GetStep()) == i {
			return f
		}
	}
	return &agentv1.StepFinished{}
}

func (s *server) truncated() *agentv1.Truncated {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.events {
		if f := e.GetTruncated(); f != nil {
			return f
		}
	}
	return nil
}

// cancel asks the session's agent to stop its attempt.
func (s *session) cancel(grace time.Duration, reason string) {
	s.send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Cancel{Cancel: &agentv1.Cancel{
		AttemptId: testAttempt, Grace: durationpb.New(grace), Reason: reason,
	}}})
}

func (s *server) config() agent.Config {
	dir := s.t.TempDir()
	return agent.Config{
		Contacts: []string{s.addr}, CA: s.ca, Token: testToken,
		StateDir: filepath.Join(dir, "state"), WorkDir: filepath.Join(dir, "work"),
		Logger: testLogger(s.t),
	}
}

// run runs an agent to its end and checks what holds of every job.
func (s *server) run() *agentv1.JobFinished {
	s.t.Helper()
	cfg := s.config()
	if err := s.runConfig(cfg); err != nil {
		s.t.Fatalf("Run: %v", err)
	}
	return s.verdict()
}

// verdict is the end of the job, checked against the log.
func (s *server) verdict() *agentv1.JobFinished {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.finished
	if f == nil {
		s.t.Fatal("no JobFinished")
	}
	if f.GetLogSize() != s.logSize {
		s.t.Errorf("log size %d, received %d", f.GetLogSize(), s.logSize)
	}
	if string(f.GetLogSha256()) != string(s.logHash.Sum(nil)) {
		s.t.Error("log hash differs from what was received")
	}
	return f
}

func (s *server) runConfig(cfg agent.Config) error {
	ctx, cancel := context.WithTimeout(s.t.Context(), 120*time.Second)
	defer cancel()
	return agent.Run(ctx, cfg)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// waitFile waits for a file to appear.
func waitFile(t *testing.T, name string) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for range tick.C {
		if _, err := os.Stat(name); err == nil || t.Context().Err() != nil {
			return
		}
	}
}
