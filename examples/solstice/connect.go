package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/orchestrator/client"
)

// connection are the flags of commands that talk to an orchestrator.
type connection struct {
	Server        string        `group:"Server" env:"SOLSTICE_SERVER" default:"127.0.0.1:50051" placeholder:"HOST:PORT" help:"Orchestrator to talk to (${default})."`
	Token         string        `group:"Server" env:"SOLSTICE_TOKEN" placeholder:"TOKEN" help:"Token; better in a file or in the variable, since arguments can be seen by others."`
	TokenFile     string        `group:"Server" env:"SOLSTICE_TOKEN_FILE" placeholder:"FILE" help:"File with the token. Default, for a server on this machine: admin.token in the state directory, if it is there."`
	CA            string        `group:"Server" name:"ca" env:"SOLSTICE_CA" placeholder:"FILE" help:"PEM file of the authorities that may sign the server's certificate. Default: the system's, and for a server on this machine ca.pem in the state directory."`
	ClientCert    string        `group:"Server" env:"SOLSTICE_CLIENT_CERT" placeholder:"FILE" help:"PEM file of a client certificate."`
	ClientKey     string        `group:"Server" env:"SOLSTICE_CLIENT_KEY" placeholder:"FILE" help:"PEM file of its key."`
	StateDir      string        `group:"Server" env:"STATE_DIR" default:"${state_dir}" placeholder:"DIR" help:"State directory of an orchestrator on this machine (${state_dir})."`
	GRPCTimeoutMS int           `group:"Server" name:"grpc-timeout-ms" env:"GRPC_TIMEOUT_MS" default:"10000" help:"Longest wait for an answer."`
	RetryFor      time.Duration `group:"Server" env:"SOLSTICE_RETRY_FOR" default:"5m" placeholder:"TIME" help:"For how long followers try again when the orchestrator went away; 0: not at all (${default})."`
}

// dial opens the connection; the first call makes it.
func (c *connection) dial() (*client.Client, error) {
	cfg := client.Config{Server: c.Server, Timeout: time.Duration(c.GRPCTimeoutMS) * time.Millisecond, Patience: c.RetryFor}
	if c.GRPCTimeoutMS < 1 || c.RetryFor < 0 {
		return nil, unable("the timeouts are not positive", nil, "correct --grpc-timeout-ms or --retry-for")
	}
	if c.RetryFor == 0 {
		cfg.Patience = -1
	}
	var err error
	if cfg.Token, err = c.token(); err != nil {
		return nil, err
	}
	if cfg.Roots, err = c.roots(); err != nil {
		return nil, err
	}
	if (c.ClientCert == "") != (c.ClientKey == "") {
		return nil, unable("a client certificate needs its key", nil, "give both --client-cert and --client-key")
	}
	if c.ClientCert != "" {
		pair, err := tls.LoadX509KeyPair(c.ClientCert, c.ClientKey)
		if err != nil {
			return nil, unable("cannot use the client certificate", err, "")
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	cl, err := client.New(cfg)
	if err != nil {
		return nil, unable("cannot use these flags", err, "give --server HOST:PORT, and a token that is one line")
	}
	return cl, nil
}

// local reports whether the server is on this machine. The state directory's
// token is for no other one.
func (c *connection) local() bool {
	host, _, err := net.SplitHostPort(c.Server)
	ip := net.ParseIP(host)
	return err == nil && (host == "localhost" || ip != nil && ip.IsLoopback())
}

func (c *connection) token() (string, error) {
	token, err := daemon.Secret("token", c.Token, c.TokenFile)
	if err != nil || token != "" {
		return token, couldNot(err)
	}
	data, err := c.stateFile("admin.token", c.ClientCert == "")
	return strings.TrimSpace(string(data)), err
}

// roots are nil where the system's suffice.
func (c *connection) roots() (*x509.CertPool, error) {
	if c.CA != "" {
		data, err := os.ReadFile(c.CA)
		if err != nil {
			return nil, unable("cannot read the file of --ca", err, "")
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(data) {
			return nil, unable("cannot use the file of --ca", fmt.Errorf("%s holds no PEM certificate", c.CA), "")
		}
		return pool, nil
	}
	data, err := c.stateFile("ca.pem", true)
	if data == nil || err != nil {
		return nil, err
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	pool.AppendCertsFromPEM(data)
	return pool, nil
}

// stateFile reads what an orchestrator on this machine left for its clients;
// nil where there is none.
func (c *connection) stateFile(name string, wanted bool) ([]byte, error) {
	if !wanted || c.StateDir == "" || !c.local() {
		return nil, nil
	}
	data, err := os.ReadFile(filepath.Join(c.StateDir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, unable("cannot read what the orchestrator on this machine left for its clients", err, "run this as the orchestrator's user, or give --token-file and --ca")
	}
	return data, nil
}

// explain makes a diagnostic of a call that failed, and says with which status
// this program ends.
func (c *connection) explain(what string, err error) error {
	if err == nil {
		return nil
	}
	code, advice := exitCouldNotRun, ""
	switch {
	case errors.Is(err, client.ErrNotFound), errors.Is(err, client.ErrState):
		code = exitFailed
	case errors.Is(err, client.ErrUnauthenticated) && c.Token == "" && c.TokenFile == "":
		advice = "give --token-file: an orchestrator's first token is admin.token in its state directory, others are made with: solstice token create"
	case errors.Is(err, client.ErrUnauthenticated):
		advice = "give another token with --token-file; they are made with: solstice token create"
	case errors.Is(err, client.ErrPermission):
		advice = "give the token of a larger role with --token-file"
	case errors.Is(err, client.ErrUnknownMethod):
		advice = "correct --server, or use a client of the orchestrator's version"
	case errors.Is(err, client.ErrUnavailable), errors.Is(err, client.ErrTimeout):
		what, advice = what+": the orchestrator at "+c.Server+" is not available", c.unreachable(err)
	}
	return &daemon.ExitError{Code: code, Err: problem(what, err, advice)}
}

// unreachable is what to do where there is no connection.
func (c *connection) unreachable(err error) string {
	_, unknown := errors.AsType[x509.UnknownAuthorityError](err)
	switch {
	case errors.Is(err, client.ErrNotTLS):
		return "correct --server: it is the orchestrator's --grpc-addr, not one of its other listeners"
	case errors.Is(err, client.ErrRefused):
		return "give a client certificate that is made for clients, and signed by an authority of the orchestrator's --grpc-tls-ca"
	case unknown:
		return "give --ca the authority that signed the server's certificate; an orchestrator's own is ca.pem in its state directory"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "nothing listens there: start the orchestrator, or correct --server"
	}
	if advice := daemon.Advice(err); advice != "" {
		return advice
	}
	return "the orchestrator, or its database, is away for now: try again"
}

// couldNot is an error of flags and files.
func couldNot(err error) error {
	if _, ok := errors.AsType[*daemon.ExitError](err); ok || err == nil {
		return err
	}
	return &daemon.ExitError{Code: exitCouldNotRun, Err: err}
}

// unable is a problem that nothing was done about.
func unable(what string, err error, advice string) error {
	return couldNot(problem(what, err, advice))
}
