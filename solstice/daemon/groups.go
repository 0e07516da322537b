package daemon

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/solstice-ci/solstice-go/solstice/telemetry"
)

// Secret returns a secret that is given either as a value or in a file, whose
// last newline is not part of it; "" when it is given in neither. Flag is the
// name of the value's flag; the file's is the same with "-file".
func Secret(flag, value, file string) (string, error) {
	switch {
	case file == "":
		return value, nil
	case value != "":
		return "", &ExitError{Code: ExitUsage, Err: &Problem{
			What: fmt.Sprintf("--%s and --%s-file are both given", flag, flag), Advice: "give one of them",
		}}
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return "", &Problem{What: fmt.Sprintf("cannot read the secret of --%s-file", flag), Err: err}
	}
	secret := strings.TrimSuffix(strings.TrimSuffix(string(data), "\n"), "\r")
	if secret == "" {
		return "", &Problem{What: fmt.Sprintf("the file of --%s-file is empty", flag), Err: errors.New(file)}
	}
	return secret, nil
}

// Telemetry are the flags of logs, traces and metrics.
type Telemetry struct {
	LogLevel    string  `group:"Telemetry" env:"LOG_LEVEL" default:"info" placeholder:"FILTER" help:"What to log: trace, debug, info, warn, error, off, also by package: info,queue=debug."`
	LogFormat   string  `group:"Telemetry" env:"LOG_FORMAT" default:"auto" enum:"auto,text,json" help:"Log format: text, json, or auto (text on a terminal, json otherwise)."`
	OTLP        string  `group:"Telemetry" name:"otlp" env:"OTEL_EXPORTER_OTLP_ENDPOINT" placeholder:"URL" help:"Send traces and metrics to this OTLP collector over gRPC, such as http://localhost:4317."`
	OTLPHeaders string  `group:"Telemetry" name:"otlp-headers" env:"OTEL_EXPORTER_OTLP_HEADERS" placeholder:"K=V,…" help:"Headers for the collector."`
	OTLPHdrFile string  `group:"Telemetry" name:"otlp-headers-file" env:"OTEL_EXPORTER_OTLP_HEADERS_FILE" placeholder:"FILE" help:"File with the headers for the collector."`
	OTLPCA      string  `group:"Telemetry" name:"otlp-ca" env:"OTEL_EXPORTER_OTLP_CERTIFICATE" placeholder:"FILE" help:"PEM file of the authorities that may sign the collector's certificate."`
	TraceRatio  float64 `group:"Telemetry" env:"TRACE_RATIO" default:"1" help:"Share of new traces to record, 0 to 1."`
	ServiceName string  `group:"Telemetry" env:"OTEL_SERVICE_NAME" default:"${program}" help:"Name of this service in telemetry."`
}

// Init calls [telemetry.Init], logging to stderr.
func (t Telemetry) Init(ctx context.Context) (shutdown func(context.Context) error, err error) {
	cfg, err := t.Config()
	if err != nil {
		return nil, err
	}
	shutdown, err = telemetry.Init(ctx, t.ServiceName, cfg)
	if err != nil {
		return nil, &Problem{What: "cannot set up telemetry", Err: err, Advice: "correct --log-level, --log-format or --otlp"}
	}
	return shutdown, nil
}

// Config is what Init passes on.
func (t Telemetry) Config() (telemetry.Config, error) {
	cfg := telemetry.Config{
		Version: Version(),
		Log:     telemetry.LogConfig{Level: t.LogLevel, Format: telemetry.Format(t.LogFormat)},
		OTLP:    telemetry.OTLPConfig{Endpoint: t.OTLP, TraceRatio: t.TraceRatio},
	}
	if t.TraceRatio <= 0 {
		cfg.OTLP.TraceRatio = -1
	}
	headers, err := Secret("otlp-headers", t.OTLPHeaders, t.OTLPHdrFile)
	if err != nil {
		return telemetry.Config{}, err
	}
	if headers != "" {
		cfg.OTLP.Headers = map[string]string{}
		for pair := range strings.SplitSeq(headers, ",") {
			k, v, ok := strings.Cut(pair, "=")
			if k = strings.TrimSpace(k); !ok || k == "" {
				return telemetry.Config{}, &ExitError{Code: ExitUsage, Err: &Problem{What: "--otlp-headers is not a list of name=value"}}
			}
			cfg.OTLP.Headers[strings.ToLower(k)] = strings.TrimSpace(v)
		}
	}
	if t.OTLPCA != "" {
		pool, err := LoadPool(t.OTLPCA)
		if err != nil {
			return telemetry.Config{}, &Problem{What: "cannot use the file of --otlp-ca", Err: err}
		}
		cfg.OTLP.TLS = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	return cfg, nil
}

// LoadPool reads the authorities in a PEM file.
func LoadPool(file string) (*x509.CertPool, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("%s holds no PEM certificate", file)
	}
	return pool, nil
}

// State is the flag of the directory for what a program keeps.
type State struct {
	StateDir string `group:"State" env:"STATE_DIR" default:"${state_dir}" placeholder:"DIR" help:"Directory for this program's files."`
}

// Open makes the directory, for its owner only, and returns its path.
func (s State) Open() (string, error) {
	if s.StateDir == "" {
		return "", &ExitError{Code: ExitUsage, Err: &Problem{
			What: "there is no state directory", Err: errors.New("neither HOME nor XDG_STATE_HOME is set"), Advice: "give --state-dir",
		}}
	}
	if err := os.MkdirAll(s.StateDir, 0o700); err != nil {
		return "", &Problem{What: "cannot make the state directory", Err: err}
	}
	return s.StateDir, nil
}

// HTTP is the flag of the listener for people and probes.
type HTTP struct {
	HTTPAddr string `group:"Listeners" name:"http-addr" env:"HTTP_ADDR" default:"127.0.0.1:8080" help:"Address for health and metrics."`
}

// Listen opens the listener.
func (h HTTP) Listen(ctx context.Context) (net.Listener, error) {
	return listen(ctx, "http-addr", h.HTTPAddr)
}

// AgentEndpoint are the flags of the listener that guests dial.
type AgentEndpoint struct {
	AgentAddr       string   `group:"Listeners" env:"AGENT_ADDR" default:"127.0.0.1:50052" help:"Address for agents."`
	AgentTLSCert    string   `group:"Listeners" name:"agent-tls-cert" env:"AGENT_TLS_CERT" placeholder:"FILE" help:"PEM file of the certificate for agents, made for the name solstice-agent-endpoint. Default: one of an authority in the state directory."`
	AgentTLSKey     string   `group:"Listeners" name:"agent-tls-key" env:"AGENT_TLS_KEY" placeholder:"FILE" help:"PEM file of that certificate's key."`
	AgentTLSCA      string   `group:"Listeners" name:"agent-tls-ca" env:"AGENT_TLS_CA" placeholder:"FILE" help:"PEM file of the authority that agents verify it by."`
	OrchContactAddr []string `group:"Listeners" env:"ORCH_CONTACT_ADDR" placeholder:"HOST:PORT,…" help:"Addresses that guests dial, in this order, where they differ from --agent-addr."`
}

// Listen opens the listener and returns the addresses to tell guests: those
// given, or else the listener's own.
func (a AgentEndpoint) Listen(ctx context.Context) (net.Listener, []string, error) {
	lis, err := listen(ctx, "agent-addr", a.AgentAddr)
	if err != nil {
		return nil, nil, err
	}
	contacts := a.OrchContactAddr
	if len(contacts) == 0 {
		contacts = []string{lis.Addr().String()}
	}
	for _, c := range contacts {
		if err := dialable(c); err != nil {
			_ = lis.Close() // nothing was accepted yet
			return nil, nil, &ExitError{Code: ExitUsage, Err: &Problem{
				What: "guests cannot dial " + c, Err: err, Advice: "give --orch-contact-addr addresses that guests can reach, such as 192.168.122.1:50052",
			}}
		}
	}
	return lis, contacts, nil
}

// Certificate returns what to prove oneself to agents with, read again when the
// files change: nil where no certificate is given.
func (a AgentEndpoint) Certificate() (get func(*tls.ClientHelloInfo) (*tls.Certificate, error), ca []byte, err error) {
	given := 0
	for _, file := range []string{a.AgentTLSCert, a.AgentTLSKey, a.AgentTLSCA} {
		if file != "" {
			given++
		}
	}
	if given == 0 {
		return nil, nil, nil
	}
	if given < 3 {
		return nil, nil, &ExitError{Code: ExitUsage, Err: &Problem{
			What: "a certificate for agents needs its key and its authority", Advice: "give --agent-tls-cert, --agent-tls-key and --agent-tls-ca",
		}}
	}
	r := &reloader{cert: a.AgentTLSCert, key: a.AgentTLSKey}
	if _, err = r.config(nil); err == nil {
		if _, err = LoadPool(a.AgentTLSCA); err == nil {
			ca, err = os.ReadFile(a.AgentTLSCA)
		}
	}
	if err != nil {
		return nil, nil, &Problem{What: "cannot use the TLS files for agents", Err: err}
	}
	return func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		c, err := r.config(nil)
		if err != nil {
			return nil, err
		}
		return &c.Certificates[0], nil
	}, ca, nil
}

func dialable(addr string) error {
	host, port, err := net.SplitHostPort(addr)
	switch ip := net.ParseIP(host); {
	case err != nil:
		return err
	case host == "" || ip != nil && ip.IsUnspecified():
		return errors.New("it is every address of this machine, not one of them")
	case port == "" || port == "0":
		return errors.New("it has no port")
	}
	return nil
}

func listen(ctx context.Context, flag, addr string) (net.Listener, error) {
	var c net.ListenConfig
	lis, err := c.Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, &Problem{What: fmt.Sprintf("cannot listen at %s (--%s)", addr, flag), Err: err}
	}
	return lis, nil
}
