// Package plugin is what drivers in processes of their own have in common: gRPC on
// a Unix socket, whose directory decides who may, or by TCP with certificates on
// both sides; and commands that are started, and started again when they end.
package plugin

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
)

// Errors are what a package calls a configuration that is wrong, and a plugin that
// is away.
type Errors struct{ Invalid, Unavailable error }

// Connect is to unix:PATH, or to HOST:PORT with TLS. It does not wait for the
// plugin, which is tried again with growing pauses whenever it is away.
func Connect(target string, tlsConfig *tls.Config, e Errors, options ...grpc.DialOption) (*grpc.ClientConn, error) {
	dial, creds, err := dialer(target, tlsConfig, e)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("passthrough:///"+target, append([]grpc.DialOption{
		grpc.WithContextDialer(dial),
		grpc.WithTransportCredentials(creds),
		grpc.WithNoProxy(),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: KeepaliveTime, Timeout: KeepaliveTime, PermitWithoutStream: true}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 10 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
	}, options...)...)
	if err != nil {
		return nil, fmt.Errorf("%w: plugin %s: %w", e.Invalid, target, err)
	}
	return conn, nil
}

func dialer(target string, tlsConfig *tls.Config, e Errors) (func(ctx context.Context, addr string) (net.Conn, error), credentials.TransportCredentials, error) {
	var d net.Dialer
	if path, ok := strings.CutPrefix(target, "unix:"); ok && path != "" {
		return func(ctx context.Context, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", path) }, insecure.NewCredentials(), nil
	}
	if _, _, err := net.SplitHostPort(target); err != nil {
		return nil, nil, fmt.Errorf("%w: plugin %q: want unix:PATH or HOST:PORT", e.Invalid, target)
	}
	if tlsConfig == nil {
		return nil, nil, fmt.Errorf("%w: plugin %s: TCP needs TLS", e.Invalid, target)
	}
	c := tlsConfig.Clone()
	c.MinVersion = max(c.MinVersion, tls.VersionTLS13)
	return func(ctx context.Context, _ string) (net.Conn, error) { return d.DialContext(ctx, "tcp", target) }, credentials.NewTLS(c), nil
}
