package storage

import (
	"errors"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/solstice/daemon"
)

func TestLock(t *testing.T) {
	dir := t.TempDir()
	release, err := Lock(dir, "orchestrator")
	if err != nil {
		t.Fatal(err)
	}
	_, err = Lock(dir, "orchestrator")
	if p, ok := errors.AsType[*daemon.Problem](err); !ok || !strings.Contains(p.Advice, "--state-dir") {
		t.Errorf("locked twice: %v", err)
	}
	if err := release(); err != nil {
		t.Fatal(err)
	}
	release, err = Lock(dir, "orchestrator")
	if err != nil {
		t.Fatalf("after it was released: %v", err)
	}
	if err := release(); err != nil {
		t.Error(err)
	}
	if _, err := Lock(dir+"/none", "orchestrator"); err == nil {
		t.Error("locked a directory that is not there")
	}
}
