//go:build (libvirt || libvirt_dlopen) && cgo

package solstice_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/solstice"
)

// TestDebianGuest: in Debian, with systemd and cloud-init, a job runs tests of this
// module that need nothing else than Go.
func TestDebianGuest(t *testing.T) {
	image := testenv.DebianGuest(t)
	files := map[string]string{}
	add := func(file string) {
		content, err := os.ReadFile(filepath.Join("..", file)) //nolint:gosec // of this module
		if err != nil {
			t.Fatal(err)
		}
		files[file] = string(content)
	}
	add("go.mod")
	add("go.sum")
	packages := []string{"internal/keylock", "internal/nearest", "solstice/logstream/internal/record", "vmprovider"}
	for _, dir := range append([]string{"solstice/logstream", "vmprovider/memvm"}, packages...) {
		sources, err := filepath.Glob(filepath.Join("..", dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range sources {
			add(filepath.Join(dir, filepath.Base(file)))
		}
	}
	edit, server := inGuests(t)
	p := newPlant(t, testenv.SQLite(t))
	p.commit(t, files)
	eng, _ := p.start(t, edit, func(c *solstice.Config) {
		pool := &c.Pools[0]
		pool.Image.Path, pool.CPUs, pool.MemoryBytes, pool.Boot = image, 2, 1<<30, 5*time.Minute
	})
	r := finishWithin(t, eng, p.submit(t, eng, `
jobs:
  a:
    steps:
      - run: cat /etc/os-release /proc/1/comm && cloud-init status --long && cat /run/cloud-init/status.json
      - run: go test -vet=off ./`+strings.Join(packages, " ./")+`
`).ID, 15*time.Minute)
	log := jobLog(t, eng, r.Jobs[0].ID)
	for _, want := range append([]string{"VERSION_CODENAME=bookworm\n", "\nsystemd\n", "status: running\n", "Running in stage: modules-final\n", "DataSourceNoCloud [seed=/dev/vd"}, packages...) {
		if !strings.Contains(log, want) {
			t.Errorf("the log does not show %q", want)
		}
	}
	if r.State != solstice.RunSucceeded || t.Failed() {
		t.Errorf("%s:\n%s", r.State, log)
	}
	nothingRuns(t, server)
}
