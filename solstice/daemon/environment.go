package daemon

import (
	"os"
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
