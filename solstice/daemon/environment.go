package daemon

import (
	"os"
	"slices"
	"strings"
)

// Environment gives those variables of the process's environment that a
// pattern names: a whole name, or the beginning of one before "*". It is for
// what a program passes on to the steps of workflows, never for its own
// configuration, which [Parse] reads.
func Environment(patterns ...string) map[string]string {
	return selected(os.Environ(), patterns)
}

func selected(environ, patterns []string) map[string]string {
	out := map[string]string{}
	for _, kv := range environ {
		name, value, ok := strings.Cut(kv, "=")
		if !ok || name == "" {
			continue
		}
		for _, p := range patterns {
			if prefix, wild := strings.CutSuffix(p, "*"); p == name || wild && strings.HasPrefix(name, prefix) {
				out[name] = value
				break
			}
		}
	}
	return out
}

// stepVariables are what steps on this machine can do little without: where
// programs, homes and caches are, languages, proxies, tool chains.
var stepVariables = []string{
	"PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR", "SHELL",
	"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR",
	"GO*", "CGO_*", "XDG_CACHE_HOME", "CARGO_HOME", "RUSTUP_HOME", "JAVA_HOME", "NPM_CONFIG_*", "npm_config_*", "NODE_EXTRA_CA_CERTS", "PYENV_*", "PIP_*",
}

// StepEnvironment is what a pool of processes passes on to steps: what steps on
// this machine can do little without, and what more names, as [Environment]
// does.
func StepEnvironment(more ...string) map[string]string {
	return Environment(append(slices.Clone(stepVariables), more...)...)
}
