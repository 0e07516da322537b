package agent_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/proctree"
	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
)

// TestPanic: a fault in any goroutine of an agent ends that agent, with its job,
// and nothing else.
func TestPanic(t *testing.T) {
	for _, point := range []string{"job", "watch", "send", "receive"} {
		t.Run(point, func(t *testing.T) {
			s := newServer(t)
			s.spec = jobOf(script("sleep 1000 & sleep 1000"), when("always()", script("sleep 1000")))
			// Each passes once more, to be in the middle of things.
			s.onEvent = func(ses *session, e *agentv1.Event) {
				if e.GetStepStarted() != nil {
					ses.cancel(time.Hour, "for another message")
				}
			}
			var passed atomic.Int32
			cfg := s.config()
			cfg.SetFailpoint(func(at string) {
				if at == point && (point != "receive" || passed.Add(1) == 3) {
					panic("as asked for")
				}
			})
			err := agent.Run(t.Context(), cfg)
			if !errors.Is(err, agent.ErrPanic) || !strings.Contains(err.Error(), "as asked for") {
				t.Errorf("Run: %v; want a panic", err)
			}
			for _, dir := range []string{cfg.WorkDir, filepath.Join(cfg.StateDir, "steps"), filepath.Join(cfg.StateDir, "journal")} {
				if _, err := os.Stat(dir); err == nil {
					t.Errorf("%s is left", dir)
				}
			}
			nothingLeft(t)
		})
	}
}

// TestRunInside gives an agent what a process pool gives it, with a control group
// where there is one to be had: what leaves its session and wipes its environment
// is found all the same.
func TestRunInside(t *testing.T) {
	s := newServer(t)
	pid := filepath.Join(t.TempDir(), "pid")
	s.spec = jobOf(
		script("setsid env -i PATH=\"$PATH\" sh -c 'echo $$ >"+pid+"; sleep 1000' >/dev/null 2>&1 & while [ ! -s "+pid+" ]; do sleep 0.05; done; echo hi"),
		script("kill -0 $(cat "+pid+") && echo alive"),
	)
	cfg := s.config()
	boot := map[string]any{
		"contacts": cfg.Contacts, "ca": cfg.CA, "token": cfg.Token, "state_dir": cfg.StateDir, "work_dir": cfg.WorkDir,
		"env": map[string]string{"PATH": "/usr/local/bin:/usr/bin:/bin"},
	}
	cg, err := proctree.NewCgroup("agent-test-" + machineID(t))
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		s.spec = jobOf(script("echo hi"), script("echo alive")) // only a group holds such a process
	default:
		must(t, err)
		t.Cleanup(func() { must(t, cg.Remove(context.Background())) })
		boot["cgroup"] = cg.Path()
	}
	b, err := json.Marshal(boot)
	must(t, err)
	var console bytes.Buffer
	must(t, agent.RunInside(t.Context(), b, &console))
	checkResult(t, s.verdict(), succeeded, classNone)
	if got := s.logText(); got != "hi\nalive\n" {
		t.Errorf("log %q", got)
	}
	if !strings.Contains(console.String(), "job ends") {
		t.Errorf("console: %s", &console)
	}
	if cg != nil {
		if ids, err := cg.Processes(); err != nil || len(ids) > 0 {
			t.Errorf("processes left in the control group: %v, %v", ids, err)
		}
	}
	nothingLeft(t)

	if err := agent.RunInside(t.Context(), []byte("{"), &console); !errors.Is(err, agent.ErrConfig) {
		t.Errorf("a malformed bootstrap: %v", err)
	}
}

// TestControlGroupRefused: without the group that it was told to use an agent
// falls back on searching.
func TestControlGroupRefused(t *testing.T) {
	s := newServer(t)
	s.spec = jobOf(script("setsid sleep 1000 >/dev/null 2>&1 & echo hi"))
	cfg := s.config()
	cfg.Cgroup = t.TempDir()
	must(t, s.runConfig(cfg))
	checkResult(t, s.verdict(), succeeded, classNone)
	nothingLeft(t)
}
