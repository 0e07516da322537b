package agent

import (
	"context"
	"fmt"
	"io"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
)

// localBuffer is what may be under way between the agents and the engine of one
// process, each way.
const localBuffer = 1 << 20

// Local connects the agents inside a process with the engine of that process:
// the engine serves its Listener (solstice.Config.LocalAgents), a process pool
// runs its agents by Run. Protocol and credentials are those of any agent; what
// is spared is a connection and a handshake per agent. Only this process can
// reach it.
type Local struct {
	listener *bufconn.Listener
	conn     *grpc.ClientConn
}

// NewLocal makes one for one engine.
func NewLocal() (*Local, error) {
	l := &Local{listener: bufconn.Listen(localBuffer)}
	var err error
	l.conn, err = grpc.NewClient("passthrough:///local",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.listener.DialContext(ctx) }),
		grpc.WithAuthority(ServerName),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableRetry(),
		grpc.WithIdleTimeout(0),
		grpc.WithUserAgent("solstice-agent/local"),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
	)
	if err != nil {
		return nil, fmt.Errorf("agent: local connection: %w", err)
	}
	return l, nil
}

// Listener is where the engine accepts.
func (l *Local) Listener() net.Listener { return l.listener }

// Run is RunInside by way of this connection; the source still comes from the
// contacts in bootstrap.
func (l *Local) Run(ctx context.Context, bootstrap []byte, console io.Writer) error {
	return runInside(ctx, bootstrap, console, l)
}

// Close ends the connection, and what agents have going on over it.
func (l *Local) Close() error {
	_ = l.listener.Close() // its engine may have closed it
	return l.conn.Close()
}

// clientConn is a connection to a server, of one agent or shared.
type clientConn interface {
	grpc.ClientConnInterface
	Close() error
}

// shared is a connection that an agent leaves open.
type shared struct{ grpc.ClientConnInterface }

func (shared) Close() error { return nil }
