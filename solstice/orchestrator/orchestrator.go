// Package orchestrator serves a [solstice.Engine] to people and programs as
// solstice.orchestrator.v1, with authorization, health and readiness.
//
// Who calls is known by a bearer token ([Tokens]) or by a client certificate
// that the listener verified; each method needs a [Role]. A method without a
// rule is refused, and a server that has one does not start.
package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
)

// Config says what a Server serves. Engine and Tokens are required.
type Config struct {
	Engine *solstice.Engine
	Tokens *Tokens
	// CertRole is what a caller may whose client certificate was verified and
	// who has no token; 0: nothing.
	CertRole Role
	// Reflection lets anybody list the methods; for development.
	Reflection bool
	// SendTimeout is how long a follower may leave what it is sent unread; then
	// its call ends. 0: 1 min.
	SendTimeout time.Duration
	// ReadyEvery is how often readiness is looked at, ten times as often while
	// it lacks. 0: 5 s.
	ReadyEvery time.Duration
	Logger     *slog.Logger // nil: discarded
}

// Server is solstice.orchestrator.v1 over an engine.
type Server struct {
	cfg     Config
	log     *slog.Logger
	grpc    *grpc.Server
	health  *health.Server
	closing context.Context // its end ends all streams
	close   context.CancelFunc
	ready   atomic.Pointer[string] // why not; nil: not known yet; "": ready
}

// New makes a server; opts come from the listener: its credentials and bounds.
func New(cfg Config, opts ...grpc.ServerOption) (*Server, error) {
	if cfg.Engine == nil || cfg.Tokens == nil {
		return nil, errors.New("orchestrator: Config.Engine or Config.Tokens is missing")
	}
	if cfg.CertRole < 0 || cfg.CertRole > Admin {
		return nil, fmt.Errorf("orchestrator: Config.CertRole %d is no role", cfg.CertRole)
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.SendTimeout <= 0 {
		cfg.SendTimeout = time.Minute
	}
	if cfg.ReadyEvery <= 0 {
		cfg.ReadyEvery = 5 * time.Second
	}
	s := &Server{cfg: cfg, log: cfg.Logger, health: health.NewServer()}
	s.closing, s.close = context.WithCancel(context.Background())
	s.health.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	s.grpc = grpc.NewServer(append(opts[:len(opts):len(opts)],
		grpc.StatsHandler(otelgrpc.NewServerHandler()),
		grpc.ChainUnaryInterceptor(s.unary), grpc.ChainStreamInterceptor(s.stream),
	)...)
	orchestratorv1.RegisterOrchestratorServiceServer(s.grpc, &service{s: s, e: cfg.Engine})
	healthpb.RegisterHealthServer(s.grpc, s.health)
	if cfg.Reflection {
		reflection.Register(s.grpc)
	}
	if err := unruled(s.grpc.GetServiceInfo()); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// Serve answers calls at lis until Close or Drain.
func (s *Server) Serve(lis net.Listener) error {
	var watch sync.WaitGroup
	ctx, cancel := context.WithCancel(s.closing)
	watch.Go(func() { s.watchReadiness(ctx) })
	err := s.grpc.Serve(lis)
	cancel()
	watch.Wait()
	return err
}

// Unready says from now on that this server is not ready: it stops soon.
func (s *Server) Unready() { s.health.Shutdown() }

// Drain ends what streams, lets unary calls finish for as long as ctx, and
// closes the server.
func (s *Server) Drain(ctx context.Context) {
	s.Unready()
	s.close()
	stopped := make(chan struct{})
	go func() { defer close(stopped); s.grpc.GracefulStop() }()
	select {
	case <-stopped:
	case <-ctx.Done():
		s.grpc.Stop()
		<-stopped
	}
}

// Close ends all calls.
func (s *Server) Close() {
	s.Unready()
	s.close()
	s.grpc.Stop()
}

func (s *Server) watchReadiness(ctx context.Context) {
	for {
		next := s.cfg.ReadyEvery
		if !s.lookReady(ctx) {
			next /= 10 // somebody waits for it
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(next):
		}
	}
}

func (s *Server) lookReady(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.ReadyEvery)
	defer cancel()
	why, state := "", healthpb.HealthCheckResponse_SERVING
	if err := s.cfg.Engine.Ready(ctx); err != nil {
		why, state = err.Error(), healthpb.HealthCheckResponse_NOT_SERVING
	}
	if was := s.ready.Swap(&why); was == nil || (*was == "") != (why == "") {
		s.log.InfoContext(ctx, "readiness changed", "ready", why == "", "why", why)
	}
	s.health.SetServingStatus("", state)
	s.health.SetServingStatus(orchestratorv1.OrchestratorService_ServiceDesc.ServiceName, state)
	return why == ""
}

// Healthz answers that the process lives.
func (s *Server) Healthz(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) }

// Readyz answers 200 if the engine can do its work, as of the last look, and
// else 503 with what is away.
func (s *Server) Readyz(w http.ResponseWriter, _ *http.Request) {
	why := s.ready.Load()
	switch {
	case why == nil:
		http.Error(w, "starting", http.StatusServiceUnavailable)
	case *why != "":
		http.Error(w, *why, http.StatusServiceUnavailable)
	default:
		_, _ = w.Write([]byte("ok\n"))
	}
}
