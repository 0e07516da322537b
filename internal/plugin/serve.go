package plugin

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

// KeepaliveTime is how often each side looks whether the other is still there.
const KeepaliveTime = 20 * time.Second

// ServerOptions let clients of this package look now and then.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: KeepaliveTime / 2, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: KeepaliveTime, Timeout: KeepaliveTime}),
	}
}

// drain is how long calls under way may go on when a plugin ends.
const drain = 10 * time.Second

// Serve serves at unix:PATH, in place of whoever was there, to this user only; or
// at HOST:PORT with TLS, to whom tlsConfig verifies, which has to ask for
// certificates. It returns nil once ctx has ended and the calls under way have, or
// after 10 s.
func Serve(ctx context.Context, listen string, tlsConfig *tls.Config, e Errors, register func(grpc.ServiceRegistrar), options ...grpc.ServerOption) error {
	lis, err := listenAt(ctx, listen, tlsConfig, e)
	if err != nil {
		return err
	}
	if tlsConfig != nil {
		options = append(options, grpc.Creds(credentials.NewTLS(tlsConfig)))
	}
	g := grpc.NewServer(options...)
	register(g)
	defer context.AfterFunc(ctx, func() {
		hurry := time.AfterFunc(drain, g.Stop)
		defer hurry.Stop()
		g.GracefulStop()
	})()
	if err := g.Serve(lis); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	g.Stop()
	return nil
}

func listenAt(ctx context.Context, listen string, tlsConfig *tls.Config, e Errors) (net.Listener, error) {
	var lc net.ListenConfig
	path, unix := strings.CutPrefix(listen, "unix:")
	if !unix {
		if tlsConfig == nil || tlsConfig.ClientAuth != tls.RequireAndVerifyClientCert {
			return nil, fmt.Errorf("%w: listen at %s: TCP needs TLS with certificates of clients", e.Invalid, listen)
		}
		return lc.Listen(ctx, "tcp", listen)
	}
	if tlsConfig != nil {
		return nil, fmt.Errorf("%w: listen at %s: a Unix socket has no TLS", e.Invalid, listen)
	}
	if info, err := os.Lstat(path); err == nil && info.Mode()&fs.ModeSocket != 0 {
		if err := os.Remove(path); err != nil { // of a process that was killed
			return nil, err
		}
	}
	lis, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	return lis, os.Chmod(path, 0o600)
}
