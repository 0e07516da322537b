package remotevm

import (
	"context"
	"crypto/tls"

	"google.golang.org/grpc"

	"github.com/solstice-ci/solstice-go/internal/plugin"
	pb "github.com/solstice-ci/solstice-go/solstice/api/providerv1"
)

// Serve is most of a plugin's main: it serves at unix:PATH, in place of whoever
// was there, to this user only; or at HOST:PORT with TLS, to whom tlsConfig
// verifies, which has to ask for certificates. It returns nil once ctx has ended
// and the calls under way have, or after 10 s.
func Serve(ctx context.Context, listen string, s *Server, tlsConfig *tls.Config) error {
	return plugin.Serve(ctx, listen, tlsConfig, wraps, func(r grpc.ServiceRegistrar) { pb.RegisterProviderServiceServer(r, s) }, GRPCOptions()...)
}
