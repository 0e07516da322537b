package agent

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"time"
)

// ServerName is the DNS name that an agent endpoint's certificate must carry.
// It is fixed, so that contacts may be any address.
const ServerName = "solstice-agent-endpoint"

// Versions of the protocol that this agent speaks.
const (
	ProtocolMin = 1
	ProtocolMax = 1
)

// DefaultPatience is how long enrolment is tried.
const DefaultPatience = 10 * time.Minute

// Errors that Run wraps.
var (
	// ErrConfig: the configuration is incomplete or malformed.
	ErrConfig = errors.New("agent: invalid configuration")
	// ErrEnroll: the machine was refused for good, or nobody answered in time.
	ErrEnroll = errors.New("agent: enrolment failed")
	// ErrDismissed: the server wants no more of this agent: the machine or its
	// attempt is over. The job was killed.
	ErrDismissed = errors.New("agent: dismissed by the server")
	// ErrDeadline: no contact, or no acknowledgement of the job's end, for the
	// agent deadline. The job was killed.
	ErrDeadline = errors.New("agent: deadline passed without contact")
	// ErrProtocol: the server broke the protocol in a way that cannot be mended.
	ErrProtocol = errors.New("agent: protocol violation")
)

// Config says how an agent reaches its orchestrators and where it works.
type Config struct {
	// Contacts are the agent endpoints, host:port, tried in order.
	Contacts []string
	// CA verifies the endpoints: PEM certificates. Nothing else is trusted.
	CA []byte
	// Token is the machine's single-use enrolment token, a secret.
	Token string
	// TokenFile, where not empty, holds the token and is deleted once enrolled.
	TokenFile string
	// StateDir is a directory of the agent's own for journal and scripts; it is
	// made where missing, and what the agent put there is removed at the end.
	StateDir string
	// WorkDir becomes the work tree. It must be absent or empty, and is removed
	// at the end.
	WorkDir string
	// Env is the base of every step's environment. Nil: PATH, HOME, USER and
	// LANG as the system has them, made without looking at this process's own.
	Env map[string]string
	// Version of the program, for people. Empty: "devel".
	Version string
	// Logger; nil discards.
	Logger *slog.Logger
	// Dedicated says that this process does nothing else: it becomes the
	// subreaper of its descendants (Linux), and when the job is over every one
	// of them is killed.
	Dedicated bool
	// Cgroup, where not empty, is a control group of this machine alone (Linux,
	// version 2): the steps are started in it, and when the job is over all that
	// is in it is killed, which finds what a search of the process table may
	// miss and costs less. This process must not be in it.
	Cgroup string
	// Patience bounds enrolment; 0 is DefaultPatience.
	Patience time.Duration
	// ProtocolMin and ProtocolMax override the versions offered; 0 is what this
	// package speaks.
	ProtocolMin, ProtocolMax int

	local       *Local // nil: the contacts are dialled
	roots       *x509.CertPool
	spoolMemory int             // bytes of the journal kept in memory
	sourceTries int             // how often a source that cannot be reached is tried
	failpoint   func(at string) // tests panic here
}

// bootstrap is the file that starts an agent: vmprovider.Bootstrap and, from a
// process pool, what the machine's directory looks like.
type bootstrap struct {
	Contacts []string          `json:"contacts"`
	CA       []byte            `json:"ca"`
	Token    string            `json:"token"`
	Env      map[string]string `json:"env"`
	StateDir string            `json:"state_dir"`
	WorkDir  string            `json:"work_dir"`
	Cgroup   string            `json:"cgroup"`
}

// Where an agent works whose bootstrap file does not say: a machine of its own.
const (
	defaultStateDir = "/var/lib/solstice-agent"
	defaultWorkDir  = "/var/lib/solstice-work"
)

// LoadBootstrap reads a bootstrap file: JSON with the fields of
// vmprovider.Bootstrap (contacts, ca in base64, token) and optionally env,
// state_dir, work_dir and cgroup. Other fields are ignored. TokenFile is the file
// itself, since it holds the token.
func LoadBootstrap(file string) (Config, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return Config{}, fmt.Errorf("%w: bootstrap: %w", ErrConfig, err)
	}
	c, err := parseBootstrap(data)
	if err != nil {
		return Config{}, fmt.Errorf("%w, in %s", err, file)
	}
	c.TokenFile = file
	return c, nil
}

func parseBootstrap(data []byte) (Config, error) {
	var b bootstrap
	if err := json.Unmarshal(bytes.TrimPrefix(data, []byte("\xef\xbb\xbf")), &b); err != nil {
		return Config{}, fmt.Errorf("%w: bootstrap: %w", ErrConfig, err)
	}
	c := Config{
		Contacts: b.Contacts, CA: b.CA, Token: b.Token,
		Env: b.Env, StateDir: b.StateDir, WorkDir: b.WorkDir, Cgroup: b.Cgroup,
	}
	if c.StateDir == "" {
		c.StateDir = defaultStateDir
	}
	if c.WorkDir == "" {
		c.WorkDir = defaultWorkDir
	}
	return c, nil
}

// complete checks c and fills in the defaults.
func (c Config) complete() (Config, error) {
	bad := func(format string, args ...any) (Config, error) {
		return Config{}, fmt.Errorf("%w: %s", ErrConfig, fmt.Sprintf(format, args...))
	}
	if len(c.Contacts) == 0 {
		return bad("no contacts")
	}
	for _, addr := range c.Contacts {
		if err := checkContact(addr); err != nil {
			return bad("%v", err)
		}
	}
	c.roots = x509.NewCertPool()
	if !c.roots.AppendCertsFromPEM(c.CA) {
		return bad("the CA holds no PEM certificate")
	}
	if c.Token == "" {
		return bad("no enrolment token")
	}
	for _, d := range []*string{&c.StateDir, &c.WorkDir} {
		if *d == "" {
			return bad("StateDir and WorkDir are required")
		}
		abs, err := filepath.Abs(*d)
		if err != nil {
			return bad("%v", err)
		}
		*d = abs
	}
	if c.Env == nil {
		c.Env = minimalEnv()
	}
	if c.Version == "" {
		c.Version = "devel"
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Patience <= 0 {
		c.Patience = DefaultPatience
	}
	if c.spoolMemory == 0 {
		c.spoolMemory = memoryBytes
	}
	if c.failpoint == nil {
		c.failpoint = func(string) {}
	}
	if c.sourceTries == 0 {
		c.sourceTries = sourceTries
	}
	if c.ProtocolMin == 0 {
		c.ProtocolMin = ProtocolMin
	}
	if c.ProtocolMax == 0 {
		c.ProtocolMax = ProtocolMax
	}
	return c, nil
}

func checkContact(addr string) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil || host == "" || port == "" {
		return fmt.Errorf("contact %q is not host:port", addr)
	}
	return nil
}

// minimalEnv is an environment from the password file and the system's
// conventions alone.
func minimalEnv() map[string]string {
	env := map[string]string{
		"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME": "/", "USER": strconv.Itoa(os.Getuid()), "LANG": "C.UTF-8",
	}
	switch runtime.GOOS {
	case "illumos":
		env["PATH"] = "/opt/local/bin:/opt/local/sbin:/usr/gnu/bin:/usr/bin:/usr/sbin:/sbin"
	case "netbsd":
		env["PATH"] = "/usr/pkg/sbin:/usr/pkg/bin:/usr/local/bin:/sbin:/usr/sbin:/bin:/usr/bin:/usr/X11R7/bin"
	case "darwin":
		env["PATH"] = "/opt/homebrew/bin:" + env["PATH"]
		env["LANG"] = "en_US.UTF-8"
	}
	if u, err := user.LookupId(strconv.Itoa(os.Getuid())); err == nil {
		env["USER"] = u.Username
		if u.HomeDir != "" {
			env["HOME"] = u.HomeDir
		}
	}
	return env
}
