package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
)

// line dials and shakes hands, and remembers why that failed: gRPC passes on
// the text of such errors only.
type line struct {
	credentials.TransportCredentials
	timeout time.Duration

	mu  *sync.Mutex
	why *error // of the last connection, nil once it is made
	up  *bool  // there was a connection
}

func newLine(cfg *tls.Config, timeout time.Duration) *line {
	return &line{credentials.NewTLS(cfg), timeout, new(sync.Mutex), new(error), new(bool)}
}

func (l *line) set(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	*l.why = err
	*l.up = *l.up || err == nil
}

// broken says why there is no connection; nil: there is one, or was just now.
func (l *line) broken() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return *l.why
}

// wasUp reports whether the server was there once.
func (l *line) wasUp() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return *l.up
}

func (l *line) dial(ctx context.Context, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, l.timeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		l.set(err)
	}
	return conn, err
}

// ClientHandshake implements credentials.TransportCredentials.
func (l *line) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := l.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		err = handshakeError(err)
		l.set(err)
		return nil, nil, err
	}
	l.set(nil)
	return alerted{conn, l}, info, nil
}

// alerted is a connection whose server may still refuse the client's
// certificate: TLS 1.3 tells a client so after its handshake.
type alerted struct {
	net.Conn
	l *line
}

// Read implements net.Conn.
func (c alerted) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "remote error" { // a TLS alert
		c.l.set(fmt.Errorf("%w: %w", ErrRefused, err))
	}
	return n, err
}

// Clone implements credentials.TransportCredentials.
func (l *line) Clone() credentials.TransportCredentials {
	c := *l
	c.TransportCredentials = l.TransportCredentials.Clone()
	return &c
}
