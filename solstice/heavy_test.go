package solstice_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/solstice"
)

// rss reads how much memory of its own a process has in use, in bytes: without its
// program, whose size is the tests'.
func rss(pid int) int64 {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return 0
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		if rest, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			kb, _ := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kb << 10
		}
	}
	return 0
}

// TestHeavyOutput runs jobs that print without end, or without a line break:
// memory stays flat in agent and engine, the quota holds and can be seen.
func TestHeavyOutput(t *testing.T) {
	seconds, bytesOfLine, endless := 60, 200<<20, 1<<30
	if testing.Short() {
		seconds, bytesOfLine, endless = 5, 40<<20, 100<<20
	}
	line := func(n int) string { return fmt.Sprintf("head -c %d /dev/zero | tr '\\\\0' x", n) }
	for name, c := range map[string]struct {
		script    string
		quota     int64
		truncated bool
		size      int64
	}{
		"yes":                {script: fmt.Sprintf("timeout %d yes || true", seconds), quota: 16 << 20, truncated: true},
		"long line":          {script: line(bytesOfLine), quota: 256 << 20, size: int64(bytesOfLine)},
		"line of a gigabyte": {script: line(endless), quota: 64 << 20, truncated: true},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlant(t, testenv.SQLite(t))
			p.LogBytes = c.quota
			eng, _ := p.start(t)
			r := p.submit(t, eng, "jobs: { a: { checkout: false, steps: [ { run: \""+c.script+"\" }, { run: echo over >&2 } ] } }\n")

			id := r.ID
			var agentPeak, enginePeak atomic.Int64
			watched := make(chan struct{})
			go func() {
				defer close(watched)
				tick := time.NewTicker(50 * time.Millisecond)
				defer tick.Stop()
				for range tick.C {
					now, err := eng.GetRun(t.Context(), id)
					if err != nil || now.State.Terminal() {
						return
					}
					var m runtime.MemStats
					runtime.ReadMemStats(&m)
					enginePeak.Store(max(enginePeak.Load(), int64(m.HeapInuse)))
					entries, _ := filepath.Glob(filepath.Join(p.machinesDir(), "sol-*"))
					for _, dir := range entries {
						for _, pid := range carriers(filepath.Base(dir)) {
							if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); bytes.HasPrefix(comm, []byte("solstice.test")) {
								agentPeak.Store(max(agentPeak.Load(), rss(pid)))
							}
						}
					}
				}
			}()
			r = finishWithin(t, eng, id, 10*time.Minute)
			<-watched
			if r.State != solstice.RunSucceeded {
				t.Fatalf("run is %s: %+v", r.State, r.Jobs)
			}
			attempts, err := eng.Attempts(t.Context(), r.Jobs[0].ID)
			if err != nil || len(attempts) != 1 {
				t.Fatal(attempts, err)
			}
			if c.size > 0 && attempts[0].LogSize != c.size+int64(len("over\n")) {
				t.Errorf("log has %d bytes", attempts[0].LogSize)
			}
			if max := c.quota + 64<<10; attempts[0].LogSize > max {
				t.Errorf("log has %d bytes, the quota is %d", attempts[0].LogSize, c.quota)
			}
			if c.truncated {
				tail := logFrom(t, eng, attempts[0].ID, attempts[0].LogSize-512)
				if !strings.Contains(tail, "truncated") {
					t.Errorf("the end of the log does not say that it is truncated: %q", tail)
				}
			}
			// Generous: what counts is that memory does not follow the output.
			if peak := agentPeak.Load(); peak == 0 || peak > 120<<20 {
				t.Errorf("the agent used %d MiB", peak>>20)
			}
			if peak := enginePeak.Load(); peak > 160<<20 {
				t.Errorf("the engine's heap used %d MiB", peak>>20)
			}
			t.Logf("agent %d MiB, engine heap %d MiB, log %d bytes", agentPeak.Load()>>20, enginePeak.Load()>>20, attempts[0].LogSize)
		})
	}
}

// TestNothingIsLeftRunning has a job start a tree of processes that try to
// escape, and one that ignores SIGTERM.
func TestNothingIsLeftRunning(t *testing.T) {
	p := newPlant(t, testenv.SQLite(t))
	eng, _ := p.start(t)
	r := finish(t, eng, p.submit(t, eng, `
jobs:
  forks:
    checkout: false
    steps:
      - run: |
          for i in 1 2 3 4; do
            (setsid sh -c 'sleep 600 & (setsid sleep 600 &) ; sleep 600' >/dev/null 2>&1 &)
            nohup sleep 600 >/dev/null 2>&1 &
          done
          echo started
  stubborn:
    checkout: false
    timeout: 1s
    steps: [ { run: 'trap "" TERM; while :; do sleep 0.2; done' } ]
`).ID)
	if j := job(t, r, "forks"); j.State != solstice.JobSucceeded {
		t.Errorf("forks is %s: %s", j.State, j.Reason)
	}
	if j := job(t, r, "stubborn"); j.State != solstice.JobTimedOut {
		t.Errorf("stubborn is %s: %s", j.State, j.Reason)
	}
	for _, j := range r.Jobs {
		as, err := eng.Attempts(t.Context(), j.ID)
		if err != nil || len(as) != 1 {
			t.Fatal(as, err)
		}
		eventually(t, "no process of "+j.Name+" is left", func() bool { return len(carriers(as[0].MachineID)) == 0 })
	}
}
