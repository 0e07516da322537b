//go:build requireparts

package house

import (
	"os"
	"strings"
	"testing"
)

// TestCrossBuilds compiles what has to run elsewhere, without cgo. On a cold
// build cache it takes minutes.
func TestCrossBuilds(t *testing.T) {
	everything := []string{"./solstice/...", "./queue/...", "./blobstore/...", "./vmprovider/...", "./forge/...", "./examples/solstice", "./examples/orchestrator", "./examples/forge-integration", "./examples/github-integration"}
	for _, c := range []struct {
		target   string
		packages []string
	}{
		{"linux/amd64", []string{"./..."}},
		{"linux/arm64", []string{"./examples/agent"}},
		{"illumos/amd64", []string{"./examples/agent"}},
		{"freebsd/amd64", []string{"./examples/agent"}},
		{"openbsd/amd64", []string{"./examples/agent"}},
		{"netbsd/amd64", []string{"./examples/agent"}},
		{"darwin/arm64", everything},
		{"darwin/amd64", everything},
	} {
		t.Run(c.target, func(t *testing.T) {
			goos, arch, _ := strings.Cut(c.target, "/")
			args := append([]string{"build", "-o", os.DevNull}, c.packages...)
			if len(c.packages) > 1 || strings.HasSuffix(c.packages[0], "...") {
				args = append([]string{"build"}, c.packages...) // several packages: results are discarded
			}
			if _, err := run(t, []string{"CGO_ENABLED=0", "GOOS=" + goos, "GOARCH=" + arch}, "go", args...); err != nil {
				t.Errorf("does not build for %s", c.target)
			}
		})
	}
}
