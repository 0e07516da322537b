package solstice_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/solstice"
)

func TestRun(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		p := newPlant(t, url)
		eng, _ := p.start(t)
		r := finish(t, eng, p.submit(t, eng, `
name: check
env: { GREETING: hello }
jobs:
  make:
    steps:
      - id: v
        run: |
          cat .solstice/workflow.yaml | head -2
          echo "version=1.2" >> "$SOLSTICE_OUTPUT"
          git rev-parse HEAD
    outputs: { version: "${{ steps.v.outputs.version }}" }
  test:
    needs: make
    matrix: { os: [a, b] }
    env: { VERSION: "${{ needs.make.outputs.version }}", OS: "${{ matrix.os }}" }
    steps:
      - run: echo "$GREETING $OS $VERSION $CI"
      - run: echo to stderr >&2
  never:
    needs: make
    if: needs.make.outputs.version == '2'
    steps: [ { run: exit 1 } ]
`).ID)
		if r.State != solstice.RunSucceeded {
			t.Fatalf("run is %s: %+v", r.State, r)
		}
		if j := job(t, r, "never"); j.State != solstice.JobSkipped {
			t.Errorf("never is %s", j.State)
		}
		if j := job(t, r, "make"); j.Outputs["version"] != "1.2" {
			t.Errorf("outputs of make: %v", j.Outputs)
		}
		if log := jobLog(t, eng, job(t, r, "make").ID); !strings.Contains(log, "name: check") || !strings.Contains(log, r.Commit) {
			t.Errorf("log of make: %q", log)
		}
		for _, os := range []string{"a", "b"} {
			j := job(t, r, "test (os "+os+")")
			if log := jobLog(t, eng, j.ID); !strings.Contains(log, "hello "+os+" 1.2 true\n") || !strings.Contains(log, "to stderr\n") {
				t.Errorf("log of %s: %q", j.Name, log)
			}
			steps, err := eng.Steps(t.Context(), j.AttemptID)
			if err != nil {
				t.Fatal(err)
			}
			if len(steps) != 3 || steps[0].Name != "checkout" || steps[2].Result != "succeeded" || steps[2].FinishedAt.Before(steps[1].StartedAt) {
				t.Errorf("steps of %s: %+v", j.Name, steps)
			}
		}
		repo, err := localgit.Open(t.Context(), localgit.Config{Dir: p.repoDir(), StatusDir: filepath.Join(p.Dir, "statuses")})
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "the statuses of all jobs and the run are reported", func() bool {
			ss, err := repo.Statuses(t.Context(), forge.Repo{Name: "repo"}, r.Commit)
			if err != nil {
				t.Fatal(err)
			}
			states := map[string]forge.StatusState{}
			for _, s := range ss {
				states[s.Key] = s.State
			}
			return len(ss) == 5 && states["solstice/check"] == forge.StatusSuccess && states["solstice/check/test (os b)"] == forge.StatusSuccess &&
				states["solstice/check/never"] == forge.StatusSkipped
		})
	})
}

func TestFailure(t *testing.T) { onBoth(t, testFailure) }

func testFailure(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	eng, _ := p.start(t)
	r := finish(t, eng, p.submit(t, eng, `
jobs:
  bad:
    steps:
      - run: echo before
      - name: breaks
        run: echo why; exit 3
      - run: echo never
      - if: failure()
        run: echo cleanup
  after:
    needs: bad
    steps: [ { run: echo no } ]
  always:
    needs: bad
    if: always()
    env: { WAS: "${{ needs.bad.result }}" }
    steps: [ { run: 'echo "it was $WAS"' } ]
  slow:
    timeout: 1s
    steps: [ { run: sleep 600 } ]
  fine:
    steps: [ { run: "true" } ]
`).ID)
	if r.State != solstice.RunFailed {
		t.Errorf("run is %s", r.State)
	}
	bad := job(t, r, "bad")
	if bad.State != solstice.JobFailed || bad.Class != solstice.ClassUser {
		t.Errorf("bad is %s, class %s", bad.State, bad.Class)
	}
	if log := jobLog(t, eng, bad.ID); !strings.HasSuffix(log, "before\nwhy\ncleanup\n") {
		t.Errorf("log of bad: %q", log)
	}
	steps, err := eng.Steps(t.Context(), bad.AttemptID)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range steps {
		got = append(got, fmt.Sprintf("%s:%s:%d", s.Name, s.Result, s.ExitCode))
	}
	if want := "breaks:failed:3"; len(got) != 5 || got[2] != want || !strings.Contains(got[3], "skipped") {
		t.Errorf("steps: %v, want the third to be %s and the fourth skipped", got, want)
	}
	if j := job(t, r, "after"); j.State != solstice.JobSkipped {
		t.Errorf("after is %s", j.State)
	}
	if j := job(t, r, "always"); j.State != solstice.JobSucceeded || !strings.Contains(jobLog(t, eng, j.ID), "it was failure") {
		t.Errorf("always is %s: %q", j.State, jobLog(t, eng, j.ID))
	}
	if j := job(t, r, "slow"); j.State != solstice.JobTimedOut || j.Class != solstice.ClassTimeout {
		t.Errorf("slow is %s, class %s", j.State, j.Class)
	}
	if j := job(t, r, "fine"); j.State != solstice.JobSucceeded {
		t.Errorf("fine is %s", j.State)
	}
}

func TestBrokenWorkflowIsRecorded(t *testing.T) { onBoth(t, testBrokenWorkflowIsRecorded) }

func testBrokenWorkflowIsRecorded(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	eng, _ := p.start(t)
	r := p.submit(t, eng, "jobs:\n  a:\n    neds: b\n    steps: [ { run: x } ]\n")
	if r.State != solstice.RunErrored || len(r.Diagnostics) == 0 || r.Diagnostics[0].Line != 3 {
		t.Fatalf("run: %+v", r)
	}
	again, err := eng.GetRun(t.Context(), r.ID)
	if err != nil || again.State != solstice.RunErrored || len(again.Diagnostics) == 0 {
		t.Errorf("read again: %+v, %v", again, err)
	}
}

func TestSubmitRefusals(t *testing.T) {
	p := newPlant(t, testenv.SQLite(t))
	commit := p.commit(t, map[string]string{"README": "no workflow"})
	eng, _ := p.start(t)
	_, err := eng.Submit(t.Context(), solstice.RunRequest{Repo: forge.Repo{Name: "repo"}, Commit: commit})
	if !errors.Is(err, solstice.ErrNoWorkflow) {
		t.Errorf("without a workflow: %v", err)
	}
	_, err = eng.Submit(t.Context(), solstice.RunRequest{Forge: "nowhere", Repo: forge.Repo{Name: "repo"}, Commit: commit})
	if !errors.Is(err, solstice.ErrInvalid) || !strings.Contains(err.Error(), "local") {
		t.Errorf("unknown forge: %v", err)
	}
	if _, err := eng.GetRun(t.Context(), "nothing"); !errors.Is(err, solstice.ErrNotFound) {
		t.Errorf("unknown run: %v", err)
	}
	if err := eng.Cancel(t.Context(), "nothing", ""); !errors.Is(err, solstice.ErrNotFound) {
		t.Errorf("cancel of an unknown run: %v", err)
	}
}

func TestSubmitIsIdempotent(t *testing.T) { onBoth(t, testSubmitIsIdempotent) }

func testSubmitIsIdempotent(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	commit := p.commit(t, map[string]string{".solstice/workflow.yaml": "jobs: { a: { steps: [ { run: 'true' } ] } }\n"})
	eng, _ := p.start(t)
	req := solstice.RunRequest{Repo: forge.Repo{Name: "repo"}, Commit: commit, IdempotencyKey: "once"}
	first, err := eng.Submit(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	second, err := eng.Submit(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if len(first) != 1 || len(second) != 1 || first[0].ID != second[0].ID {
		t.Errorf("two runs for one key: %v %v", first, second)
	}
	finish(t, eng, first[0].ID)
}

func TestCancel(t *testing.T) { onBoth(t, testCancel) }

func testCancel(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	p.Capacity = 1
	eng, _ := p.start(t)
	r := p.submit(t, eng, `
jobs:
  stubborn:
    steps:
      - run: |
          trap 'echo not me' TERM
          echo begun
          while :; do sleep 0.1; done
      - if: always()
        run: echo tidied
  queued:
    steps: [ { run: echo never } ]
`)
	eventually(t, "the job runs", func() bool {
		now, err := eng.GetRun(t.Context(), r.ID)
		if err != nil {
			t.Fatal(err)
		}
		if id := job(t, now, "stubborn").AttemptID; id != "" {
			steps, _ := eng.Steps(t.Context(), id)
			return len(steps) == 2
		}
		return false
	})
	if err := eng.Cancel(t.Context(), r.ID, "a person said so"); err != nil {
		t.Fatal(err)
	}
	r = finish(t, eng, r.ID)
	if r.State != solstice.RunCancelled {
		t.Errorf("run is %s", r.State)
	}
	if j := job(t, r, "stubborn"); j.State != solstice.JobCancelled || !strings.HasSuffix(jobLog(t, eng, j.ID), "tidied\n") {
		t.Errorf("stubborn is %s: %q", j.State, jobLog(t, eng, j.ID))
	}
	if j := job(t, r, "queued"); j.State != solstice.JobCancelled || j.Attempts != 0 {
		t.Errorf("queued is %s after %d attempts", j.State, j.Attempts)
	}
}

func TestRerunFailed(t *testing.T) { onBoth(t, testRerunFailed) }

func testRerunFailed(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	eng, _ := p.start(t)
	flag := filepath.Join(p.Dir, "fixed")
	r := finish(t, eng, p.submit(t, eng, `
jobs:
  good:
    steps: [ { id: s, run: 'echo "v=kept" >> "$SOLSTICE_OUTPUT"' } ]
    outputs: { v: "${{ steps.s.outputs.v }}" }
  flaky:
    needs: good
    steps: [ { run: test -e `+flag+` } ]
  last:
    needs: [good, flaky]
    env: { V: "${{ needs.good.outputs.v }}" }
    steps: [ { run: 'echo "got $V"' } ]
`).ID)
	if r.State != solstice.RunFailed || job(t, r, "last").State != solstice.JobSkipped {
		t.Fatalf("first run: %+v", r)
	}
	if err := os.WriteFile(flag, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := eng.Rerun(t.Context(), r.ID, solstice.RerunOptions{Failed: true, IdempotencyKey: "k"})
	if err != nil {
		t.Fatal(err)
	}
	twice, err := eng.Rerun(t.Context(), r.ID, solstice.RerunOptions{Failed: true, IdempotencyKey: "k"})
	if err != nil || twice.ID != again.ID {
		t.Errorf("a repeated rerun made another run: %v", err)
	}
	again = finish(t, eng, again.ID)
	if again.State != solstice.RunSucceeded || again.RerunOf != r.ID {
		t.Fatalf("rerun: %+v", again)
	}
	if j := job(t, again, "good"); j.Attempts != 0 || j.CopiedFrom != job(t, r, "good").ID {
		t.Errorf("good ran again: %+v", j)
	}
	if log := jobLog(t, eng, job(t, again, "last").ID); !strings.Contains(log, "got kept\n") {
		t.Errorf("log of last: %q", log)
	}
	if _, err := eng.Rerun(t.Context(), again.ID, solstice.RerunOptions{Failed: true}); !errors.Is(err, solstice.ErrOver) {
		t.Errorf("rerun of failed jobs where none failed: %v", err)
	}
}

func TestWarmMachines(t *testing.T) { onBoth(t, testWarmMachines) }

func testWarmMachines(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	p.Warm, p.Capacity = 1, 2
	eng, stop := p.start(t)
	warm := func() (id string) {
		for _, m := range readyMachines(t, p) {
			id = m
		}
		return id
	}
	eventually(t, "a warm machine is ready", func() bool { return warm() != "" })
	first := warm()
	r := finish(t, eng, p.submit(t, eng, "jobs: { a: { steps: [ { run: echo hi } ] } }\n").ID)
	attempts, err := eng.Attempts(t.Context(), r.Jobs[0].ID)
	if err != nil || len(attempts) != 1 {
		t.Fatal(attempts, err)
	}
	if attempts[0].MachineID != first {
		t.Errorf("the job got machine %s, not the warm %s", attempts[0].MachineID, first)
	}
	if r.State != solstice.RunSucceeded {
		t.Errorf("run is %s", r.State)
	}
	eventually(t, "another machine is made ready, since one serves one job ever", func() bool { id := warm(); return id != "" && id != first })
	stop()
	p.destroyAll(t)
}

func TestAgentKilled(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		p := newPlant(t, url)
		eng, _ := p.start(t)
		mark := filepath.Join(p.Dir, "first")
		r := p.submit(t, eng, `
jobs:
  a:
    steps:
      - run: |
          if mkdir `+mark+`; then
            echo first
            (setsid sleep 600 &)
            sleep 600
          fi
          echo second
`)
		eventually(t, "the first attempt runs", func() bool { _, err := os.Stat(mark); return err == nil })
		now, err := eng.GetRun(t.Context(), r.ID)
		if err != nil {
			t.Fatal(err)
		}
		attempts, err := eng.Attempts(t.Context(), now.Jobs[0].ID)
		if err != nil {
			t.Fatal(err)
		}
		machine := attempts[0].MachineID
		if err := syscall.Kill(agentPID(t, p, machine), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		r = finish(t, eng, r.ID)
		if r.State != solstice.RunSucceeded {
			t.Errorf("run is %s: %+v", r.State, r.Jobs)
		}
		attempts, err = eng.Attempts(t.Context(), r.Jobs[0].ID)
		if err != nil || len(attempts) != 2 {
			t.Fatalf("attempts: %+v, %v", attempts, err)
		}
		if a := attempts[0]; a.State != solstice.AttemptLost || a.Class != solstice.ClassAgentLost || !a.LogLost {
			t.Errorf("first attempt: %+v", a)
		}
		if a := attempts[1]; a.State != solstice.AttemptFinished || a.Number != 2 || a.MachineID == machine {
			t.Errorf("second attempt: %+v", a)
		}
		if log := jobLog(t, eng, r.Jobs[0].ID); !strings.Contains(log, "second\n") {
			t.Errorf("log: %q", log)
		}
		if left := carriers(machine); len(left) > 0 {
			t.Errorf("processes of the lost attempt are left: %v", left)
		}
	})
}

// carriers lists processes whose environment carries a machine's marker.
func carriers(machine string) (pids []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		env, err := os.ReadFile(filepath.Join(d, "environ"))
		if err == nil && strings.Contains(string(env), "SOLSTICE_MACHINE_ID="+machine) {
			pid, _ := strconv.Atoi(filepath.Base(d))
			pids = append(pids, pid)
		}
	}
	return pids
}
