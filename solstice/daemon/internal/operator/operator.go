// Package operator reads what files of an operator have in common: strict YAML, paths
// beside the file, and plugins.
package operator

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/solstice-ci/solstice-go/solstice/daemon"
)

// maxFileBytes bounds a file.
const maxFileBytes = 1 << 20

// Read reads a file; one that is too large is an error that wraps invalid.
func Read(path string, invalid error) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // only read from
	data, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxFileBytes {
		return nil, fmt.Errorf("%w: %s is larger than %d bytes", invalid, path, maxFileBytes)
	}
	return data, nil
}

var unknownField = regexp.MustCompile(`field (\S+) not found in type [\w.]+`)

// Parse makes doc of a file's content, of which no key may be unknown or there twice;
// the error wraps invalid and says where.
func Parse(path string, data []byte, doc any, invalid error) error {
	if err := yaml.Load(data, doc, yaml.WithKnownFields(), yaml.WithUniqueKeys()); err != nil && !errors.Is(err, io.EOF) {
		text := unknownField.ReplaceAllString(strings.TrimPrefix(err.Error(), "yaml: construct errors: "), "unknown key $1")
		return fmt.Errorf("%w: %s: %s", invalid, path, text)
	}
	return nil
}

// Beside is a path that a file names, which is relative to the file's directory.
func Beside(file, name string) string {
	if name == "" || filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(filepath.Dir(file), name)
}

// Plugin says how a plugin is started or reached.
type Plugin struct {
	Command []string `yaml:"command"`
	Env     []string `yaml:"env"`
	TLSCA   string   `yaml:"tls_ca"`
	TLSCert string   `yaml:"tls_cert"`
	TLSKey  string   `yaml:"tls_key"`
}

// StartedHere is the driver of a plugin that the program starts.
const StartedHere = "command"

const overUnix, overTLS = "grpc+unix:", "grpc+tls:"

// IsPlugin reports whether a driver is one.
func IsPlugin(driver string) bool {
	return driver == StartedHere || strings.HasPrefix(driver, overUnix) || strings.HasPrefix(driver, overTLS)
}

// Target is where a plugin is, unix:PATH or HOST:PORT; empty: it is started here.
func Target(driver string) string {
	if t, ok := strings.CutPrefix(driver, overTLS); ok {
		return t
	}
	if strings.HasPrefix(driver, overUnix) {
		return strings.TrimPrefix(driver, "grpc+")
	}
	return ""
}

// Check finds what is wrong with a plugin of a driver, which the file has under key.
func (p Plugin) Check(driver, key string) (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	started := driver == StartedHere
	if started != (len(p.Command) > 0) {
		bad("%s command and plugin.command, the program and its arguments, go together", key)
	}
	if !started && len(p.Env) > 0 {
		bad("plugin.env is of plugins that are started here")
	}
	encrypted, given := strings.HasPrefix(driver, overTLS), 0
	for _, file := range []string{p.TLSCA, p.TLSCert, p.TLSKey} {
		if file != "" {
			given++
		}
	}
	if encrypted && given != 3 || !encrypted && given > 0 {
		bad("plugin.tls_ca, tls_cert and tls_key are of grpc+tls:HOST:PORT, which needs all three")
	}
	return errs
}

// Argv is the command, a program with a slash beside the file; others are looked for in
// PATH.
func (p Plugin) Argv(file string) []string {
	argv := slices.Clone(p.Command)
	if len(argv) > 0 && strings.ContainsRune(argv[0], filepath.Separator) {
		argv[0] = Beside(file, argv[0])
	}
	return argv
}

// Environment is what the plugin gets of this program's: PATH, and what its Env names.
func (p Plugin) Environment() []string {
	var env []string
	for k, v := range daemon.Environment(append([]string{"PATH"}, p.Env...)...) {
		env = append(env, k+"="+v)
	}
	slices.Sort(env)
	return env
}

// TLS is how a plugin is reached over TCP; nil where no files are named.
func (p Plugin) TLS(file string) (*tls.Config, error) {
	if p.TLSCA == "" {
		return nil, nil
	}
	ca, err := daemon.LoadPool(Beside(file, p.TLSCA))
	if err != nil {
		return nil, err
	}
	pair, err := tls.LoadX509KeyPair(Beside(file, p.TLSCert), Beside(file, p.TLSKey))
	if err != nil {
		return nil, err
	}
	return &tls.Config{RootCAs: ca, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS13}, nil
}
