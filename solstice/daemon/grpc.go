package daemon

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

// ServerTLS are the flags of how a gRPC listener proves itself, and to whom.
type ServerTLS struct {
	GRPCTLSCert string `group:"gRPC" name:"grpc-tls-cert" env:"GRPC_TLS_CERT" placeholder:"FILE" help:"PEM file of the server's certificate chain; read again when it changes."`
	GRPCTLSKey  string `group:"gRPC" name:"grpc-tls-key" env:"GRPC_TLS_KEY" placeholder:"FILE" help:"PEM file of the certificate's key."`
	GRPCTLSCA   string `group:"gRPC" name:"grpc-tls-ca" env:"GRPC_TLS_CA" placeholder:"FILE" help:"PEM file of the authorities whose client certificates are verified."`
}

// Mutual is for listeners that only let clients in whose certificate the authorities
// have signed. All three files have to be given.
func (s ServerTLS) Mutual() (*tls.Config, error) {
	if s.GRPCTLSCert == "" || s.GRPCTLSKey == "" || s.GRPCTLSCA == "" {
		return nil, &ExitError{Code: ExitUsage, Err: &Problem{
			What: "gRPC on TCP needs certificates on both sides", Advice: "give --grpc-tls-cert, --grpc-tls-key and --grpc-tls-ca, or use a Unix socket",
		}}
	}
	r := &reloader{cert: s.GRPCTLSCert, key: s.GRPCTLSKey, ca: s.GRPCTLSCA}
	if _, err := r.config(nil); err != nil {
		return nil, &Problem{What: "cannot use the TLS files for gRPC", Err: err}
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, ClientAuth: tls.RequireAndVerifyClientCert,
		GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			c, err := r.config(h)
			if err != nil {
				return nil, err
			}
			c = c.Clone()
			c.ClientAuth = tls.RequireAndVerifyClientCert
			return c, nil
		},
	}, nil
}

// GRPC are the flags of the gRPC listener for clients.
type GRPC struct {
	ServerTLS
	GRPCAddr         string `group:"gRPC" name:"grpc-addr" env:"GRPC_ADDR" placeholder:"HOST:PORT" help:"Address for gRPC clients; in place of host and port."`
	GRPCHost         string `group:"gRPC" name:"grpc-host" env:"GRPC_HOST" default:"127.0.0.1" help:"Host to listen at for gRPC clients."`
	GRPCPort         uint16 `group:"gRPC" name:"grpc-port" env:"GRPC_PORT" default:"50051" help:"Port to listen at for gRPC clients."`
	GRPCKeepaliveMS  int    `group:"gRPC" name:"grpc-keepalive-ms" env:"GRPC_KEEPALIVE_MS" default:"20000" help:"Silence after which a connection is probed."`
	GRPCMaxMessageMB int    `group:"gRPC" name:"grpc-max-message-mb" env:"GRPC_MAX_MESSAGE_MB" default:"32" help:"Largest message."`
	GRPCTimeoutMS    int    `group:"gRPC" name:"grpc-timeout-ms" env:"GRPC_TIMEOUT_MS" default:"10000" help:"Longest unary call; longer deadlines are shortened to it."`
}

// Peers are the flags of orchestrators that reach each other.
type Peers struct {
	PeerAddr string `group:"gRPC" env:"PEER_ADDR" placeholder:"HOST:PORT" help:"Where other orchestrators reach --grpc-addr, to follow a log that this one receives. Needs --grpc-tls-ca, an authority of all, and a certificate for that host which is good for clients too."`
}

// TLS returns what peers are called with, read again each time: the authority
// and the certificate of g. It is an error where peers would not accept these.
func (p Peers) TLS(g GRPC) (func() (*tls.Config, error), error) {
	usage := func(what string, err error, advice string) error {
		return &ExitError{Code: ExitUsage, Err: &Problem{What: what, Err: err, Advice: advice}}
	}
	host, _, err := net.SplitHostPort(p.PeerAddr)
	if err == nil {
		err = dialable(p.PeerAddr)
	}
	if err != nil {
		return nil, usage("other orchestrators cannot dial "+p.PeerAddr, err, "give --peer-addr an address of this machine, such as ci1.example.com:50051")
	}
	if g.GRPCTLSCert == "" || g.GRPCTLSKey == "" || g.GRPCTLSCA == "" {
		return nil, usage("orchestrators that reach each other need certificates", nil, "give --grpc-tls-cert, --grpc-tls-key and --grpc-tls-ca, the same authority to every orchestrator")
	}
	get := func() (*tls.Config, error) {
		pool, err := LoadPool(g.GRPCTLSCA)
		if err != nil {
			return nil, err
		}
		pair, err := tls.LoadX509KeyPair(g.GRPCTLSCert, g.GRPCTLSKey)
		if err != nil {
			return nil, err
		}
		return &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS13}, nil
	}
	c, err := get()
	if err != nil {
		return nil, &Problem{What: "cannot use the TLS files for gRPC", Err: err}
	}
	between := x509.NewCertPool()
	for _, der := range c.Certificates[0].Certificate[1:] {
		if cert, err := x509.ParseCertificate(der); err == nil {
			between.AddCert(cert)
		}
	}
	for _, use := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		o := x509.VerifyOptions{DNSName: host, Roots: c.RootCAs, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{use}}
		if _, err := c.Certificates[0].Leaf.Verify(o); err != nil {
			return nil, usage("other orchestrators would not accept the certificate of --grpc-tls-cert", err,
				"give one for the host of --peer-addr, good for servers and clients, signed by an authority in --grpc-tls-ca")
		}
	}
	return get, nil
}

// Listen opens the listener.
func (g GRPC) Listen(ctx context.Context) (net.Listener, error) {
	addr := g.GRPCAddr
	if addr == "" {
		addr = net.JoinHostPort(g.GRPCHost, fmt.Sprint(g.GRPCPort))
	}
	return listen(ctx, "grpc-addr", addr)
}

// ServerOptions returns what a server is made with: TLS 1.3 with the certificate
// that is given, or else with own (from [CA.ServerConfig]; nil: then it has to
// be given), with clients' certificates verified where an authority is (who has
// none is still let in: authorization decides); bounds on messages and streams;
// keepalive; and for unary calls a deadline, which clients must set.
func (g GRPC) ServerOptions(own *tls.Config) ([]grpc.ServerOption, error) {
	alive := time.Duration(g.GRPCKeepaliveMS) * time.Millisecond
	opts := []grpc.ServerOption{
		grpc.MaxRecvMsgSize(g.GRPCMaxMessageMB << 20),
		grpc.MaxSendMsgSize(g.GRPCMaxMessageMB << 20),
		grpc.MaxConcurrentStreams(1000),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: alive, Timeout: alive}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: alive / 2, PermitWithoutStream: true}),
		grpc.ChainUnaryInterceptor(deadlines(time.Duration(g.GRPCTimeoutMS) * time.Millisecond)),
	}
	if (g.GRPCTLSCert == "") != (g.GRPCTLSKey == "") {
		return nil, &ExitError{Code: ExitUsage, Err: &Problem{
			What: "TLS for gRPC needs a certificate and its key", Advice: "give both --grpc-tls-cert and --grpc-tls-key",
		}}
	}
	if g.GRPCTLSCert == "" && own == nil {
		return nil, &ExitError{Code: ExitUsage, Err: &Problem{
			What: "gRPC has no certificate", Advice: "give --grpc-tls-cert and --grpc-tls-key",
		}}
	}
	r := &reloader{cert: g.GRPCTLSCert, key: g.GRPCTLSKey, ca: g.GRPCTLSCA, own: own}
	if _, err := r.config(nil); err != nil {
		return nil, &Problem{What: "cannot use the TLS files for gRPC", Err: err}
	}
	return append(opts, grpc.Creds(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, GetConfigForClient: r.config,
	}))), nil
}

// deadlines refuses unary calls without a deadline and shortens long ones.
func deadlines(longest time.Duration) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		if _, ok := ctx.Deadline(); !ok {
			return nil, status.Error(codes.InvalidArgument, "the call has no deadline")
		}
		ctx, cancel := context.WithTimeout(ctx, longest)
		defer cancel()
		return next(ctx, req)
	}
}

// reloader serves certificates from files, and reads these again when one has
// changed. Files that cannot be used leave the certificates as they were, since
// a deployment replaces them one after the other.
type reloader struct {
	cert, key, ca string // ca may be empty, cert and key where there is own
	own           *tls.Config

	mu    sync.Mutex
	stamp [3]fileStamp
	last  *tls.Config
}

type fileStamp struct {
	size    int64
	modTime time.Time
}

func (r *reloader) config(*tls.ClientHelloInfo) (*tls.Config, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var stamp [3]fileStamp
	var errs []error
	for i, file := range []string{r.cert, r.key, r.ca} {
		if file == "" {
			continue
		}
		info, err := os.Stat(file)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		stamp[i] = fileStamp{info.Size(), info.ModTime()}
	}
	err := errors.Join(errs...)
	if err == nil && (r.last == nil || stamp != r.stamp) {
		var c *tls.Config
		if c, err = r.load(); err == nil {
			r.last, r.stamp = c, stamp
		}
	}
	if r.last == nil {
		return nil, err
	}
	return r.last, nil
}

func (r *reloader) load() (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}}
	if r.cert == "" {
		c.GetCertificate = r.own.GetCertificate
	} else {
		pair, err := tls.LoadX509KeyPair(r.cert, r.key)
		if err != nil {
			return nil, err
		}
		c.Certificates = []tls.Certificate{pair}
	}
	if r.ca != "" {
		pool, err := LoadPool(r.ca)
		if err != nil {
			return nil, err
		}
		c.ClientCAs, c.ClientAuth = pool, tls.VerifyClientCertIfGiven
	}
	return c, nil
}
