package agent

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"time"

	"google.golang.org/grpc"
	grpcbackoff "google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
)

const (
	connectTimeout   = 10 * time.Second // a guest under emulation needs seconds for TLS alone
	keepaliveTime    = 30 * time.Second
	keepaliveTimeout = 15 * time.Second
	maxMessage       = 32 << 20 // a job's spec with its contexts
)

// tlsConfig verifies an endpoint by its fixed name. The protocol offered tells
// the server which of its services is meant.
func (a *agent) tlsConfig(alpn string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		RootCAs:    a.cfg.roots,
		ServerName: ServerName,
		NextProtos: []string{alpn},
	}
}

// dial makes a client for one contact; it connects with the first call.
func (a *agent) dial(contact string) (clientConn, error) {
	if a.cfg.local != nil {
		return shared{a.cfg.local.conn}, nil
	}
	return grpc.NewClient("passthrough:///"+contact,
		grpc.WithTransportCredentials(credentials.NewTLS(a.tlsConfig("h2"))),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		}),
		grpc.WithAuthority(ServerName),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableRetry(),
		grpc.WithIdleTimeout(0),
		grpc.WithUserAgent("solstice-agent/"+a.cfg.Version),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: grpcbackoff.DefaultConfig, MinConnectTimeout: connectTimeout}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
	)
}

func (a *agent) authorize(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+a.credential)
}

// sourceClient makes HTTPS requests to the agent endpoint, whatever contact
// answers first; the host in the URL is ServerName. Redirects are not followed:
// the credential goes nowhere else.
func (a *agent) sourceClient() *http.Client {
	t := &http.Transport{
		Proxy: nil,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			var last error
			for _, c := range a.contacts.all() {
				dctx, cancel := context.WithTimeout(ctx, connectTimeout)
				conn, err := (&net.Dialer{}).DialContext(dctx, network, c)
				cancel()
				if err == nil {
					return conn, nil
				}
				last = err
			}
			return nil, last
		},
		TLSClientConfig:       a.tlsConfig("http/1.1"),
		TLSHandshakeTimeout:   connectTimeout,
		TLSNextProto:          map[string]func(string, *tls.Conn) http.RoundTripper{}, // never HTTP/2
		ResponseHeaderTimeout: 5 * time.Minute,                                        // the server may have to fetch a large repository first
		IdleConnTimeout:       time.Minute,
		DisableCompression:    true,
	}
	return &http.Client{
		Transport:     bearer{t, a.credential},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// bearer adds the session credential to requests.
type bearer struct {
	*http.Transport
	credential string
}

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+b.credential)
	return b.Transport.RoundTrip(r)
}
