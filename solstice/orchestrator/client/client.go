// Package client talks to an orchestrator as solstice.orchestrator.v1: TLS 1.3,
// a bearer token or a client certificate, deadlines, keepalive, errors that a
// program can act on, and streams that go on where they were when the
// orchestrator restarts. It links no driver and no engine.
//
//	c, err := client.New(client.Config{Server: "ci.example.com:50051", Token: token, Roots: roots})
//	…
//	defer c.Close()
//	resp, err := c.GetRun(ctx, &orchestratorv1.GetRunRequest{RunId: id})
//	for run, err := range c.Watch(ctx, id) { … }
package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/keepalive"

	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
)

// DefaultServer is where an orchestrator listens that was told nothing else.
const DefaultServer = "127.0.0.1:50051"

// Config says how to reach an orchestrator; its zero value is one at
// DefaultServer, whose certificate the system's authorities signed, without a
// token.
type Config struct {
	// Server is HOST:PORT; empty: DefaultServer.
	Server string
	// Token is sent with every call, after the server proved itself; empty: none.
	Token string
	// Roots are the authorities that may sign the server's certificate; nil:
	// the system's.
	Roots *x509.CertPool
	// Certificates prove the client; none: it shows none.
	Certificates []tls.Certificate
	// Timeout is the deadline of a unary call whose context has none. 0: 10 s.
	Timeout time.Duration
	// ConnectTimeout bounds connecting. 0: 3 s.
	ConnectTimeout time.Duration
	// Patience is for how long Watch and Tail try again when the orchestrator
	// went away. 0: 5 min; negative: they never do.
	Patience time.Duration
	// MaxMessageBytes bounds a message. 0: 32 MiB.
	MaxMessageBytes int
}

// Client is a connection. Its methods are those of the service, with errors
// made of [Error], and Watch and Tail. It is safe for concurrent use.
type Client struct {
	pb.OrchestratorServiceClient
	conn     *grpc.ClientConn
	line     *line
	patience time.Duration
}

// New checks the configuration. The connection is made by the first call.
func New(cfg Config) (*Client, error) {
	if cfg.Server == "" {
		cfg.Server = DefaultServer
	}
	host, port, err := net.SplitHostPort(cfg.Server)
	if err == nil && (host == "" || port == "") {
		err = errors.New("host or port is empty")
	}
	if err != nil {
		return nil, fmt.Errorf("%w: server %q is not HOST:PORT: %w", ErrInvalid, cfg.Server, err)
	}
	if strings.ContainsAny(cfg.Token, " \t\r\n") {
		return nil, fmt.Errorf("%w: the token has white space in it", ErrInvalid)
	}
	orDefault(&cfg.Timeout, 10*time.Second)
	orDefault(&cfg.ConnectTimeout, 3*time.Second)
	if cfg.Patience == 0 {
		cfg.Patience = 5 * time.Minute
	}
	if cfg.MaxMessageBytes <= 0 {
		cfg.MaxMessageBytes = 32 << 20
	}
	l := newLine(&tls.Config{RootCAs: cfg.Roots, Certificates: cfg.Certificates, MinVersion: tls.VersionTLS13}, cfg.ConnectTimeout)
	c := &Client{line: l, patience: cfg.Patience}
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(l),
		grpc.WithContextDialer(l.dial),
		grpc.WithNoProxy(),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 20 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: cfg.ConnectTimeout,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(cfg.MaxMessageBytes), grpc.MaxCallSendMsgSize(cfg.MaxMessageBytes)),
		grpc.WithChainUnaryInterceptor(c.unary(cfg.Timeout)),
		grpc.WithChainStreamInterceptor(c.stream),
		grpc.WithDisableServiceConfig(),
	}
	if cfg.Token != "" {
		opts = append(opts, grpc.WithPerRPCCredentials(bearer(cfg.Token)))
	}
	// The dialer resolves names, so that what is wrong with one is known.
	if c.conn, err = grpc.NewClient("passthrough:///"+cfg.Server, opts...); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	c.OrchestratorServiceClient = pb.NewOrchestratorServiceClient(c.conn)
	return c, nil
}

func orDefault(d *time.Duration, is time.Duration) {
	if *d <= 0 {
		*d = is
	}
}

// Conn is the connection, for other services of the same server, such as
// grpc.health.v1.
func (c *Client) Conn() grpc.ClientConnInterface { return c.conn }

// Close ends all calls.
func (c *Client) Close() error { return c.conn.Close() }

// bearer is a token as credentials of each call.
type bearer string

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials.
func (bearer) RequireTransportSecurity() bool { return true }

// unary gives calls a deadline and makes errors of what comes back.
func (c *Client) unary(timeout time.Duration) grpc.UnaryClientInterceptor {
	return func(ctx context.Context, method string, req, resp any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if _, ok := ctx.Deadline(); !ok {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, timeout)
			defer cancel()
		}
		return c.error(invoke(ctx, method, req, resp, conn, opts...))
	}
}

func (c *Client) stream(ctx context.Context, d *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	s, err := open(ctx, d, conn, method, opts...)
	if err != nil {
		return nil, c.error(err)
	}
	return &stream{s, c}, nil
}

type stream struct {
	grpc.ClientStream
	c *Client
}

// SendMsg implements grpc.ClientStream.
func (s *stream) SendMsg(m any) error { return s.c.error(s.ClientStream.SendMsg(m)) }

// RecvMsg implements grpc.ClientStream.
func (s *stream) RecvMsg(m any) error { return s.c.error(s.ClientStream.RecvMsg(m)) }
