package solstice_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/solstice-ci/solstice-go/internal/proctree"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/vmprovider/processvm"
)

func insidePlant(t *testing.T) *plant {
	p := newPlant(t, "sqlite:"+filepath.Join(t.TempDir(), "solstice.db"))
	p.Inside = true
	return p
}

// noneAlive checks the processes whose pids are in a file.
func noneAlive(t *testing.T, file string, want int) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	words := strings.Fields(string(b))
	if len(words) != want {
		t.Errorf("%d processes were noted, want %d", len(words), want)
	}
	for _, w := range words {
		pid, err := strconv.Atoi(w)
		if err != nil {
			t.Fatal(err)
		}
		if e, err := proctree.Lookup(pid); err == nil && !e.Zombie {
			t.Errorf("process %d is left", pid)
		}
	}
}

func TestInsideJob(t *testing.T) {
	p := insidePlant(t)
	eng, stop := p.start(t)
	pids := filepath.Join(p.Dir, "pids")
	r := p.submit(t, eng, `
jobs:
  a:
    steps:
      - run: |
          cat README
          setsid sh -c 'echo $$ >>`+pids+`; sleep 1000' >/dev/null 2>&1 &
          while [ ! -s `+pids+` ]; do sleep 0.05; done
      - id: v
        run: echo "v=1" >>"$SOLSTICE_OUTPUT"
    outputs: { v: "${{ steps.v.outputs.v }}" }
  b:
    needs: a
    checkout: false
    steps: [ { run: exit 3 } ]
`)
	r = finish(t, eng, r.ID)
	if a, b := job(t, r, "a"), job(t, r, "b"); a.State != solstice.JobSucceeded || b.State != solstice.JobFailed || a.Outputs["v"] != "1" {
		t.Errorf("a is %s %v, b is %s", a.State, a.Outputs, b.State)
	}
	if log := jobLog(t, eng, job(t, r, "a").ID); !strings.Contains(log, "test") {
		t.Errorf("log %q", log)
	}
	noneAlive(t, pids, 1)
	eventually(t, "the machines are gone", func() bool {
		entries, err := os.ReadDir(p.machinesDir())
		return err == nil && len(entries) == 0
	})
	stop()
}

// lostOnce is a job whose first attempt never ends by itself, and whose second
// checks that nothing of the first one runs.
func (p *plant) lostOnce() (workflow, pids, half string) {
	pids, half = filepath.Join(p.Dir, "pids"), filepath.Join(p.Dir, "half")
	return fmt.Sprintf(`
jobs:
  a:
    checkout: false
    steps:
      - run: |
          if [ -e %[2]s ]; then
            for p in $(cat %[1]s); do
              case "$(cut -d' ' -f3 /proc/$p/stat 2>/dev/null)" in
                ''|Z|X) ;;
                *) echo "$p is alive"; exit 1
              esac
            done
            echo again
            exit 0
          fi
          echo $$ >>%[1]s
          setsid sh -c 'echo $$ >>%[1]s; sleep 1000' >/dev/null 2>&1 &
          while [ "$(wc -l <%[1]s)" -lt 2 ]; do sleep 0.05; done
          touch %[2]s
          sleep 1000
`, pids, half), pids, half
}

// retriedOnce waits for the end of such a job.
func retriedOnce(t *testing.T, p *plant, eng *solstice.Engine, runID, pids, why string) {
	t.Helper()
	r := finish(t, eng, runID)
	attempts, err := eng.Attempts(t.Context(), r.Jobs[0].ID)
	if err != nil || len(attempts) != 2 || r.State != solstice.RunSucceeded {
		t.Fatalf("run is %s, attempts %+v, %v; log: %s", r.State, attempts, err, jobLog(t, eng, r.Jobs[0].ID))
	}
	if a := attempts[0]; a.State != solstice.AttemptLost || a.Class != solstice.ClassAgentLost || !strings.Contains(a.Reason, why) {
		t.Errorf("the first attempt is %s, %s: %q; want it lost: %s", a.State, a.Class, a.Reason, why)
	}
	noneAlive(t, pids, 2)
	eventually(t, "no directory is left", func() bool {
		entries, err := os.ReadDir(p.machinesDir())
		return err == nil && len(entries) == 0
	})
}

// TestInsideEngineKilled: what runs inside an engine that is killed is ended by
// the next one, which then tries the job again.
func TestInsideEngineKilled(t *testing.T) {
	p := insidePlant(t)
	workflow, pids, half := p.lostOnce()
	idle := func(c *solstice.Config) { c.Pools = nil }
	eng, stop := p.start(t, idle) // accepts the run, the victim has the pool
	victim := p.spawn(t, freeAddr(t))
	r := p.submit(t, eng, workflow)
	eventually(t, "the job runs", func() bool { _, err := os.Stat(half); return err == nil })
	stop()
	if err := victim.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the victim is gone", func() bool {
		e, err := proctree.Lookup(victim.Process.Pid)
		return err != nil || e.Zombie
	})
	eng, _ = p.start(t)
	retriedOnce(t, p, eng, r.ID, pids, "the process that it ran inside has ended")
}

// TestInsideEngineStopped: an orderly stop ends what is left after the drain.
func TestInsideEngineStopped(t *testing.T) {
	p := insidePlant(t)
	workflow, pids, half := p.lostOnce()
	eng, stop := p.start(t)
	r := p.submit(t, eng, workflow)
	eventually(t, "the job runs", func() bool { _, err := os.Stat(half); return err == nil })
	stop()
	noneAlive(t, pids, 2)
	eng, _ = p.start(t)
	retriedOnce(t, p, eng, r.ID, pids, "the process that it ran inside was stopped")
}

// TestInsidePanic: the fault of one agent is its job's alone.
func TestInsidePanic(t *testing.T) {
	p := insidePlant(t)
	workflow, pids, half := p.lostOnce()
	local, err := agent.NewLocal()
	if err != nil {
		t.Fatal(err)
	}
	faulty := func(ctx context.Context, bootstrap []byte, console io.Writer) error {
		if _, err := os.Stat(half); err == nil {
			return local.Run(ctx, bootstrap, console)
		}
		ctx, cancel := context.WithCancel(ctx)
		ended := make(chan struct{})
		defer func() { <-ended }()
		defer cancel()
		go func() { defer close(ended); _ = local.Run(ctx, bootstrap, console) }()
		eventually(t, "the job runs", func() bool { _, err := os.Stat(half); return err == nil })
		panic("as asked for")
	}
	machines, err := processvm.New(processvm.Config{Root: p.machinesDir(), Runner: faulty, StepEnv: map[string]string{"PATH": "/usr/bin:/bin"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = machines.Close(), local.Close() })
	eng, _ := p.start(t, func(c *solstice.Config) { c.Pools[0].Provider, c.LocalAgents = machines, local.Listener() })
	r := p.submit(t, eng, workflow)
	retriedOnce(t, p, eng, r.ID, pids, "panic: as asked for")
}
