package main

import (
	"crypto/tls"
	"net"

	"google.golang.org/grpc"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
)

// proofs are how this orchestrator proves itself, and whom it lets in.
type proofs struct {
	agents  *solstice.AgentTLS
	clients []grpc.ServerOption
}

// certificates uses those that are given, or an authority in the state
// directory. Orchestrators that share a database share an authority as well,
// which has to be given.
func (f *flags) certificates(dir string, shared bool) (proofs, error) {
	get, pem, err := f.AgentEndpoint.Certificate()
	if err != nil {
		return proofs{}, err
	}
	if shared && (get == nil || f.GRPCTLSCert == "") {
		return proofs{}, usage("with PostgreSQL, certificates have to be given", nil,
			"give --grpc-tls-cert, --grpc-tls-key, --agent-tls-cert, --agent-tls-key and --agent-tls-ca, the same authority to every orchestrator")
	}
	var own *tls.Config
	if get == nil || f.GRPCTLSCert == "" {
		ca, err := daemon.LoadOrCreateCA(dir, f.names()...)
		if err != nil {
			return proofs{}, problem("cannot make a certificate authority in the state directory", err, "")
		}
		own = ca.ServerConfig()
		if get == nil {
			get, pem = own.GetCertificate, ca.PEM()
		}
	}
	opts, err := f.GRPC.ServerOptions(own)
	if err != nil {
		return proofs{}, err
	}
	return proofs{&solstice.AgentTLS{GetCertificate: get, CA: pem}, opts}, nil
}

// names are what clients on this machine, or at the listener's address, dial.
func (f *flags) names() []string {
	names := []string{"localhost", "127.0.0.1", "::1"}
	host := f.GRPCHost
	if f.GRPCAddr != "" {
		host, _, _ = net.SplitHostPort(f.GRPCAddr) // Listen says what is wrong
	}
	if ip := net.ParseIP(host); host != "" && !(ip != nil && (ip.IsUnspecified() || ip.IsLoopback())) {
		names = append(names, host)
	}
	return names
}
