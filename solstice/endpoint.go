package solstice

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
	"github.com/solstice-ci/solstice-go/internal/gitserve"
	"github.com/solstice-ci/solstice-go/internal/selfca"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
)

// maxEventBytes bounds one message of an agent; four journal chunks of 64 KiB
// and what surrounds them fit in with room to spare.
const maxEventBytes = 1 << 20

// maxEvents bounds the events of one message, which as objects take more room
// than the bytes they came in; agents send some 32 KiB at once.
const maxEvents = 8 << 10

// listen opens the agents' listener, so that its address is known before Run.
func (e *Engine) listen(ctx context.Context) error {
	if e.cfg.AgentTLS == nil {
		ca, err := selfca.New(agent.ServerName)
		if err != nil {
			return fmt.Errorf("solstice: make a CA for agents: %w", err)
		}
		e.cfg.AgentTLS = &AgentTLS{GetCertificate: ca.ServerConfig().GetCertificate, CA: ca.PEM()}
	}
	e.ca = e.cfg.AgentTLS.CA
	e.listener = e.cfg.AgentListener
	if e.listener == nil {
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", e.cfg.AgentAddr)
		if err != nil {
			return fmt.Errorf("solstice: listen for agents: %w", err)
		}
		e.listener = l
	}
	e.contacts = e.cfg.Contacts
	if len(e.contacts) == 0 {
		if a, ok := e.listener.Addr().(*net.TCPAddr); ok && a.IP.IsUnspecified() {
			_ = e.listener.Close()
			return fmt.Errorf("solstice: agents cannot dial %s: set Config.Contacts to addresses that reach it", a)
		}
		e.contacts = []string{e.listener.Addr().String()}
	}
	e.fleet.Store(&fleet{ids: []string{e.id}, contacts: e.contacts})
	return nil
}

// serve starts answering agents: gRPC and source downloads share one TLS port
// and are told apart by the ALPN protocol, since an agent's gRPC client offers
// h2 only and its HTTP client http/1.1.
func (e *Engine) serve(ctx context.Context) (stop func(), err error) {
	source := http.NotFoundHandler()
	if len(e.cfg.Forges) > 0 {
		git, err := gitcmd.Find(ctx)
		if err != nil {
			return nil, fmt.Errorf("solstice: source access for agents: %w", err)
		}
		if source, err = gitserve.New(gitserve.Config{Git: git, Authorize: e.authorizeSource, Logger: e.log}); err != nil {
			return nil, fmt.Errorf("solstice: source access for agents: %w", err)
		}
	}
	split := newALPNSplit(e.listener, &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: e.cfg.AgentTLS.GetCertificate,
	}, maxStrangers)
	common := []grpc.ServerOption{
		grpc.WaitForHandlers(true), grpc.MaxRecvMsgSize(maxEventBytes + 64<<10), grpc.ChainUnaryInterceptor(unaryBounds),
		grpc.StatsHandler(otelgrpc.NewServerHandler(otelgrpc.WithTracerProvider(e.cfg.TracerProvider), otelgrpc.WithMeterProvider(e.cfg.MeterProvider))),
	}
	g := grpc.NewServer(append(common, grpc.Creds(handshaken{}), grpc.MaxConcurrentStreams(16),
		// An agent is idle for most of its life: no buffer for that. TLS keeps a
		// record anyhow, so reading without another costs no system call.
		grpc.ReadBufferSize(0),
		grpc.InitialWindowSize(1<<20), grpc.InitialConnWindowSize(1<<20),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: e.cfg.Timing.Heartbeat * 2, Timeout: e.cfg.Timing.Heartbeat}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}),
	)...)
	agentv1.RegisterAgentServiceServer(g, &agentService{e: e})
	h := &http.Server{
		Handler: source,
		// A body names commits and is short; answers are packs, and long.
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       time.Minute,
		IdleTimeout:       30 * time.Second,
		MaxHeaderBytes:    16 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if t, ok := c.(*tls.Conn); ok {
				ctx = context.WithValue(ctx, guestConnKey{}, t.NetConn())
			}
			return ctx
		},
		ErrorLog: slog.NewLogLogger(e.log.Handler(), slog.LevelDebug),
	}
	stopLocal := e.serveLocal(common...)
	var wg sync.WaitGroup
	wg.Add(3)
	go func() { defer wg.Done(); split.serve() }()
	go func() { defer wg.Done(); _ = g.Serve(split.h2) }()
	go func() { defer wg.Done(); _ = h.Serve(split.http1) }()
	return func() {
		stopLocal()
		g.Stop()
		_ = h.Close()
		split.close()
		wg.Wait()
	}, nil
}

// unaryBounds refuses a call without a deadline, since nothing would end it,
// and caps long ones.
func unaryBounds(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if _, ok := ctx.Deadline(); !ok {
		return nil, status.Error(codes.InvalidArgument, "a deadline is required")
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return next(ctx, req)
}

// handshaken hands connections to gRPC whose TLS handshake is done.
type handshaken struct{}

func (handshaken) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	t, ok := c.(*tls.Conn)
	if !ok {
		return nil, nil, errors.New("solstice: connection without TLS")
	}
	g, _ := t.NetConn().(*guestConn)
	return c, guestInfo{
		TLSInfo: credentials.TLSInfo{State: t.ConnectionState(), CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}},
		conn:    g,
	}, nil
}

// guestInfo says which connection a call came by.
type guestInfo struct {
	credentials.TLSInfo
	conn *guestConn
}

type guestConnKey struct{} // of an HTTP request's context; its value is a net.Conn

// trusted notes that the peer of a call has shown who it is, until done.
func trusted(ctx context.Context) (done func()) {
	g, _ := ctx.Value(guestConnKey{}).(*guestConn)
	if p, ok := peer.FromContext(ctx); ok {
		if i, ok := p.AuthInfo.(guestInfo); ok {
			g = i.conn
		}
	}
	if g == nil {
		return func() {}
	}
	return g.trust()
}

func (handshaken) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.ErrUnsupported
}

func (handshaken) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}
func (h handshaken) Clone() credentials.TransportCredentials { return h }
func (handshaken) OverrideServerName(string) error           { return errors.ErrUnsupported }

// alpnSplit accepts TLS connections and hands them to one of two listeners by
// the protocol that was negotiated.
type alpnSplit struct {
	l         net.Listener
	cfg       *tls.Config
	h2, http1 *connListener
	strangers *strangers
	ctx       context.Context // of handshakes
	cancel    context.CancelFunc
}

// maxStrangers is far above the agents that connect at once, and far below
// what file descriptors a process may have.
const maxStrangers = 1024

func newALPNSplit(l net.Listener, cfg *tls.Config, limit int) *alpnSplit {
	only := func(proto string) *tls.Config {
		c := cfg.Clone()
		c.NextProtos = []string{proto}
		return c
	}
	h1, h2 := only("http/1.1"), only("h2")
	outer := cfg.Clone()
	outer.GetConfigForClient = func(hi *tls.ClientHelloInfo) (*tls.Config, error) {
		for _, p := range hi.SupportedProtos {
			if p == "http/1.1" {
				return h1, nil
			}
		}
		return h2, nil
	}
	ctx, cancel := context.WithCancel(context.Background())
	return &alpnSplit{
		l: l, cfg: outer, strangers: newStrangers(limit), ctx: ctx, cancel: cancel,
		h2: newConnListener(l.Addr()), http1: newConnListener(l.Addr()),
	}
}

// serve ends after close, with all handshakes.
func (s *alpnSplit) serve() {
	var shaking sync.WaitGroup
	defer shaking.Wait()
	for {
		c, err := s.l.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) || s.ctx.Err() != nil {
				return
			}
			s.strangers.relieve() // most likely we are out of file descriptors
			select {
			case <-s.ctx.Done():
			case <-time.After(5 * time.Millisecond):
			}
			continue
		}
		g := s.strangers.admit(c)
		shaking.Go(func() { s.handshake(g) })
	}
}

func (s *alpnSplit) handshake(g *guestConn) {
	t := tls.Server(g, s.cfg)
	ctx, cancel := context.WithTimeout(s.ctx, 10*time.Second)
	defer cancel()
	if err := t.HandshakeContext(ctx); err != nil {
		_ = g.Close()
		return
	}
	to := s.http1
	if t.ConnectionState().NegotiatedProtocol == "h2" {
		to = s.h2
	}
	to.hand(t)
}

func (s *alpnSplit) close() {
	s.cancel()
	_ = s.l.Close()
	_ = s.h2.Close()
	_ = s.http1.Close()
}

// connListener is a net.Listener for connections accepted elsewhere.
type connListener struct {
	addr  net.Addr
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func newConnListener(a net.Addr) *connListener {
	return &connListener{addr: a, conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *connListener) hand(c net.Conn) {
	select {
	case l.conns <- c:
	case <-l.done:
		_ = c.Close()
	}
}

func (l *connListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *connListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *connListener) Addr() net.Addr { return l.addr }

// bearer reads a credential from an authorization header value.
func bearer(v string) (string, bool) {
	scheme, cred, ok := strings.Cut(v, " ")
	return cred, ok && strings.EqualFold(scheme, "bearer") && cred != ""
}

// authorizeSource lets an agent read the repository of its own attempt, as
// long as that is under way.
func (e *Engine) authorizeSource(ctx context.Context, r *http.Request, attemptID string) (gitserve.Source, error) {
	cred, ok := bearer(r.Header.Get("Authorization"))
	if !ok {
		return gitserve.Source{}, errors.New("no credential")
	}
	m, err := e.store.MachineByCredential(ctx, hashToken(cred))
	if err != nil {
		return gitserve.Source{}, sourceError("credential", err)
	}
	if m.AttemptID != attemptID {
		return gitserve.Source{}, fmt.Errorf("machine %s has attempt %s, not %s", m.ID, m.AttemptID, attemptID)
	}
	a, err := e.store.Attempt(ctx, attemptID)
	if err != nil {
		return gitserve.Source{}, sourceError("attempt", err)
	}
	if AttemptState(a.State).Terminal() {
		return gitserve.Source{}, fmt.Errorf("attempt %s is %s", a.ID, a.State)
	}
	run, err := e.store.Run(ctx, a.RunID)
	if err != nil {
		return gitserve.Source{}, sourceError("run", err)
	}
	f, ok := e.cfg.Forges[run.Forge]
	if !ok {
		return gitserve.Source{}, fmt.Errorf("forge %q is not configured here", run.Forge)
	}
	clone, err := f.CloneInfo(ctx, decode[forge.Repo](run.Repo), forge.CloneOptions{})
	if err != nil {
		return gitserve.Source{}, fmt.Errorf("clone access: %w", err)
	}
	context.AfterFunc(ctx, trusted(ctx)) // which ends with the request
	return gitserve.Source{Clone: clone, Commit: run.Commit}, nil
}

// sourceError tells a refusal from a state that could not be read just now.
func sourceError(what string, err error) error {
	if errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrGone) {
		return fmt.Errorf("%s: %w", what, err)
	}
	return fmt.Errorf("%w: %s: %w", gitserve.ErrUnavailable, what, err)
}

// agentService is solstice.agent.v1. Identity is the credential's and nothing
// else's.
type agentService struct {
	agentv1.UnimplementedAgentServiceServer
	e *Engine
}

// protocols is the range of protocol versions that a server speaks. It speaks
// its own and the one before, and what an agent offers beyond is not used, so
// that server and agent may be one version apart in either direction.
type protocols struct{ min, max int32 }

var protocolsSpoken = protocols{1, 1}

// choose gives the version to speak with an agent, or says why there is none.
func (p protocols) choose(r *agentv1.EnrollRequest) (version int32, refusal string) {
	version = min(p.max, r.GetProtocolMax())
	if version >= p.min && version >= r.GetProtocolMin() {
		return version, ""
	}
	advice := "is too old: update the agent in the image or where the runner URL points"
	if r.GetProtocolMin() > p.max {
		advice = "is too new: update the orchestrators, or use an agent of their version"
	}
	return 0, fmt.Sprintf("the agent (%s) speaks protocol %d to %d, this server %d to %d; it %s",
		firstOf(printable([]byte(clip(r.GetVersion(), 64))), "of no stated version"), r.GetProtocolMin(), r.GetProtocolMax(), p.min, p.max, advice)
}

// refuseAgent ends what waits for an agent that cannot be spoken with, at once
// and with the reason; only a token that is valid does.
func (e *Engine) refuseAgent(ctx context.Context, token, why string) error {
	m, err := e.store.MachineByToken(ctx, hashToken(token))
	if err != nil {
		return err
	}
	e.log.WarnContext(ctx, "agent refused", "machine", m.ID, "pool", m.Pool, "reason", why)
	if m.AttemptID == "" {
		e.warmFailed(ctx, m, why)
		return nil
	}
	a, err := e.store.Attempt(ctx, m.AttemptID)
	if err != nil {
		return err
	}
	e.lose(ctx, a, ClassInfra, why, "")
	return nil
}

func (s *agentService) Enroll(ctx context.Context, r *agentv1.EnrollRequest) (*agentv1.EnrollResponse, error) {
	e := s.e
	if len(r.GetNonce()) < 16 || len(r.GetNonce()) > 64 || len(r.GetToken()) > 256 {
		return nil, status.Error(codes.InvalidArgument, "malformed token or nonce")
	}
	protocol, refusal := e.cfg.protocols.choose(r)
	if refusal != "" {
		if err := e.refuseAgent(ctx, r.GetToken(), refusal); err != nil {
			return nil, e.rpcError(ctx, "enroll", err)
		}
		return nil, status.Error(codes.FailedPrecondition, refusal)
	}
	began, cred := time.Now(), randomToken()
	nonce := sha256.Sum256(r.GetNonce())
	m, err := e.store.Enroll(ctx, store.EnrollRequest{
		TokenHash: hashToken(r.GetToken()), NonceHash: hex.EncodeToString(nonce[:]), CredHash: hashToken(cred),
		OS: text(r.GetOs(), 32), Arch: text(r.GetArch(), 32), Version: text(r.GetVersion(), 64), Protocol: int(protocol), HasGit: r.GetHasGit(),
	})
	if err != nil {
		return nil, e.rpcError(ctx, "enroll", err)
	}
	e.traceEnrol(ctx, m, began)
	e.log.InfoContext(ctx, "agent enrolled", "machine", m.ID, "os", m.OS, "arch", m.Arch, "version", m.AgentVersion)
	now, err := e.store.Now(ctx)
	if err != nil {
		return nil, e.rpcError(ctx, "enroll", err)
	}
	return &agentv1.EnrollResponse{
		SessionCredential: cred, MachineId: m.ID, Protocol: protocol, ServerTime: timestamppb.New(timeOf(now)),
		HeartbeatInterval: durationpb.New(e.cfg.Timing.Heartbeat), AgentDeadline: durationpb.New(e.cfg.Timing.AgentDeadline),
		MaxEventBytes: maxEventBytes, Contacts: e.contactsFor(m.Pool),
	}, nil
}

func clip(s string, n int) string {
	if len(s) > n {
		return strings.ToValidUTF8(s[:n], "")
	}
	return s
}

func (s *agentService) Attach(stream grpc.BidiStreamingServer[agentv1.AttachRequest, agentv1.AttachResponse]) error {
	ctx := stream.Context()
	md, _ := metadata.FromIncomingContext(ctx)
	auth := md.Get("authorization")
	if len(auth) != 1 {
		return status.Error(codes.Unauthenticated, "no credential")
	}
	cred, ok := bearer(auth[0])
	if !ok {
		return status.Error(codes.Unauthenticated, "no credential")
	}
	m, err := s.e.store.MachineByCredential(ctx, hashToken(cred))
	if errors.Is(err, store.ErrNotFound) {
		return status.Error(codes.Unauthenticated, "credential unknown")
	}
	if err != nil {
		return s.e.rpcError(ctx, "attach", err)
	}
	return s.e.attach(stream, m)
}

// rpcError maps the engine's errors to codes, in this one place; what is not
// the agent's business stays in the log.
func (e *Engine) rpcError(ctx context.Context, what string, err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	switch {
	case errors.Is(err, store.ErrToken):
		return status.Error(codes.Unauthenticated, "enrolment token not valid")
	case errors.Is(err, store.ErrGone):
		return status.Error(codes.Unauthenticated, "the machine is over")
	case errors.Is(err, store.ErrOver):
		return status.Error(codes.FailedPrecondition, "the attempt is over")
	case errors.Is(err, store.ErrStale):
		return status.Error(codes.Aborted, "the attempt changed hands: reconnect")
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, "cancelled")
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, "deadline exceeded")
	}
	e.log.WarnContext(ctx, "agent call failed", "call", what, "error", e.noted(err))
	return status.Error(codes.Unavailable, "not possible now, try again")
}
