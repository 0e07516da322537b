package solstice_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/memvm"
)

// waits waits until a job waits for the given reason and returns all of it.
func waits(t *testing.T, eng *solstice.Engine, jobID string, reason solstice.WaitReason) (w solstice.Waiting) {
	t.Helper()
	eventually(t, "the job waits for "+string(reason), func() bool {
		var err error
		if w, err = eng.Waiting(t.Context(), jobID); err != nil {
			t.Fatal(err)
		}
		return w.Reason == reason
	})
	return w
}

func TestWaiting(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		p := newPlant(t, url)
		p.Capacity = 1
		eng, _ := p.start(t)
		eventually(t, "the engine is ready", func() bool { return eng.Ready(t.Context()) == nil })
		begun, end := filepath.Join(p.Dir, "begun"), filepath.Join(p.Dir, "end")
		r := p.submit(t, eng, `
jobs:
  long:
    steps: [ { run: "touch `+begun+`; while [ ! -e `+end+` ]; do sleep 0.05; done" } ]
  after:
    needs: long
    steps: [ { run: 'true' } ]
`)
		eventually(t, "the first job runs", func() bool { _, err := os.Stat(begun); return err == nil })
		queued := p.submit(t, eng, "jobs: { b: { steps: [ { run: 'true' } ] }, c: { steps: [ { run: 'true' } ] } }\n")
		nowhere := p.submit(t, eng, "jobs: { mars: { runs-on: mars, steps: [ { run: 'true' } ] } }\n")

		if w, err := eng.Waiting(t.Context(), job(t, r, "long").ID); err != nil || w.Reason != "" {
			t.Errorf("the job that runs waits for %+v, %v", w, err)
		}
		if w := waits(t, eng, job(t, r, "after").ID, solstice.WaitNeeds); !slices.Equal(w.Needs, []string{"long"}) {
			t.Errorf("after: %+v", w)
		}
		if w := waits(t, eng, job(t, queued, "b").ID, solstice.WaitPoolFull); w.Ahead != 0 || !strings.Contains(w.Message, "1 of 1") {
			t.Errorf("b: %+v", w)
		}
		if w := waits(t, eng, job(t, queued, "c").ID, solstice.WaitBehind); w.Ahead != 1 {
			t.Errorf("c: %+v", w)
		}
		if w := waits(t, eng, job(t, nowhere, "mars").ID, solstice.WaitNoPool); !strings.Contains(w.Message, `"mars"`) {
			t.Errorf("mars: %+v", w)
		}
		if _, err := eng.Waiting(t.Context(), "none"); !errors.Is(err, solstice.ErrNotFound) {
			t.Errorf("a job that is not there: %v", err)
		}

		pools, err := eng.Pools(t.Context())
		if err != nil || len(pools) != 1 {
			t.Fatalf("pools: %+v, %v", pools, err)
		}
		if o := pools[0]; o.Name != "host" || o.Host != "test" || o.Capacity != 1 || o.Machines != 1 || o.Busy != 1 || o.Queued != 2 || o.SeenAt.IsZero() {
			t.Errorf("pool: %+v", o)
		}
		machines, err := eng.Machines(t.Context(), solstice.MachineFilter{Pool: "host"})
		if err != nil || len(machines) != 1 || machines[0].State != "bound" || machines[0].AttemptID == "" || machines[0].Age <= 0 {
			t.Errorf("machines: %+v, %v", machines, err)
		} else if more, err := eng.Machines(t.Context(), solstice.MachineFilter{After: machines[0].ID}); err != nil || len(more) != 0 {
			t.Errorf("machines beyond the last: %+v, %v", more, err)
		}
		if none, err := eng.Machines(t.Context(), solstice.MachineFilter{Pool: "other"}); err != nil || len(none) != 0 {
			t.Errorf("machines of another pool: %+v, %v", none, err)
		}

		if id, err := eng.FindRun(t.Context(), r.ID[:len(r.ID)-1]); err != nil || id != r.ID {
			t.Errorf("run by prefix: %s, %v", id, err)
		}
		for prefix, want := range map[string]error{"short": solstice.ErrInvalid, "ffffffff": solstice.ErrNotFound, r.ID[:len(r.ID)-1] + "~": solstice.ErrNotFound} {
			if _, err := eng.FindRun(t.Context(), prefix); !errors.Is(err, want) {
				t.Errorf("run by prefix %q: %v, want %v", prefix, err, want)
			}
		}
		some, err := eng.Runs(t.Context(), solstice.RunFilter{Forge: "local", Repo: "repo", Ref: "refs/heads/main", Commit: r.Commit, States: []solstice.RunState{solstice.RunRunning, solstice.RunQueued}})
		if err != nil || len(some) != 1 || some[0].ID != r.ID {
			t.Errorf("runs of the commit: %+v, %v", some, err)
		}
		if same, err := eng.Runs(t.Context(), solstice.RunFilter{Repo: "repo", Commit: r.Commit}); err != nil || !slices.ContainsFunc(same, func(o solstice.Run) bool { return o.ID == r.ID }) {
			t.Errorf("runs of a repository of the only forge: %+v, %v", same, err)
		}
		if _, err := eng.Runs(t.Context(), solstice.RunFilter{Ref: "refs/heads/main"}); !errors.Is(err, solstice.ErrInvalid) {
			t.Errorf("a ref without its repository: %v", err)
		}

		if err := eng.Cancel(t.Context(), nowhere.ID, ""); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(end, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		finish(t, eng, r.ID)
		finish(t, eng, queued.ID)
	})
}

func TestApproval(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		p := newPlant(t, url)
		eng, _ := p.start(t)
		commit := p.commit(t, map[string]string{".solstice/workflow.yaml": "jobs: { a: { steps: [ { run: 'true' } ] } }\n"})
		submit := func() solstice.Run {
			runs, err := eng.Submit(t.Context(), solstice.RunRequest{Repo: forge.Repo{Name: "repo"}, Commit: commit, AwaitApproval: "a stranger's change"})
			if err != nil || len(runs) != 1 {
				t.Fatalf("%+v, %v", runs, err)
			}
			if runs[0].State != solstice.RunAwaitingApproval || runs[0].Jobs[0].State != solstice.JobWaiting || !strings.Contains(runs[0].Reason, "a stranger's change") {
				t.Fatalf("run: %+v", runs[0])
			}
			return runs[0]
		}
		r := submit()
		if w := waits(t, eng, r.Jobs[0].ID, solstice.WaitApproval); !strings.Contains(w.Message, "a stranger's change") {
			t.Errorf("waits for %+v", w)
		}
		if _, err := eng.Approve(t.Context(), r.ID, strings.Repeat("0", 40)); !errors.Is(err, solstice.ErrInvalid) {
			t.Errorf("approval of another commit: %v", err)
		}
		if now, err := eng.GetRun(t.Context(), r.ID); err != nil || now.State != solstice.RunAwaitingApproval {
			t.Errorf("after it: %+v, %v", now, err)
		}
		if _, err := eng.Approve(t.Context(), r.ID, commit); err != nil {
			t.Fatal(err)
		}
		if r = finish(t, eng, r.ID); r.State != solstice.RunSucceeded {
			t.Errorf("run: %+v", r)
		}
		if _, err := eng.Approve(t.Context(), r.ID, commit); !errors.Is(err, solstice.ErrOver) {
			t.Errorf("second approval: %v", err)
		}
		if again, err := eng.Rerun(t.Context(), r.ID, solstice.RerunOptions{}); err != nil || again.State == solstice.RunAwaitingApproval {
			t.Errorf("rerun of what was approved: %+v, %v", again, err)
		} else {
			finish(t, eng, again.ID)
		}

		r = submit()
		if err := eng.Cancel(t.Context(), r.ID, "no"); err != nil {
			t.Fatal(err)
		}
		if r = finish(t, eng, r.ID); r.State != solstice.RunCancelled {
			t.Errorf("cancelled run: %+v", r)
		}
		if _, err := eng.Approve(t.Context(), r.ID, commit); !errors.Is(err, solstice.ErrOver) {
			t.Errorf("approval of a cancelled run: %v", err)
		}
		again, err := eng.Rerun(t.Context(), r.ID, solstice.RerunOptions{})
		if err != nil || again.State != solstice.RunAwaitingApproval || again.Jobs[0].State != solstice.JobWaiting {
			t.Errorf("rerun of what never was approved: %+v, %v", again, err)
		}
	})
}

// TestProtocolVersions has servers and agents of different versions: one apart
// in either direction works, two apart ends the job at once with the reason.
func TestProtocolVersions(t *testing.T) {
	for name, c := range map[string]struct {
		server  [2]int32
		agent   [2]int
		refused string
	}{
		"agent older by one": {[2]int32{1, 2}, [2]int{1, 1}, ""},
		"agent newer by one": {[2]int32{1, 1}, [2]int{1, 2}, ""},
		"agent too old":      {[2]int32{2, 3}, [2]int{1, 1}, "speaks protocol 1 to 1, this server 2 to 3; it is too old"},
		"agent too new":      {[2]int32{1, 1}, [2]int{2, 3}, "speaks protocol 2 to 3, this server 1 to 1; it is too new"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlant(t, testenv.SQLite(t))
			p.Timing.Boot = time.Hour // not what ends a refused attempt
			hypervisor := memvm.New(memvm.Config{Script: func(vmprovider.Spec) memvm.Script {
				return memvm.Script{Agent: func(ctx context.Context, m memvm.Machine) error {
					dir := t.TempDir()
					err := agent.Run(ctx, agent.Config{
						Contacts: m.Spec.Bootstrap.Contacts, CA: m.Spec.Bootstrap.CA, Token: m.Spec.Bootstrap.Token, Version: "1.2.3",
						StateDir: filepath.Join(dir, "state"), WorkDir: filepath.Join(dir, "work"), ProtocolMin: c.agent[0], ProtocolMax: c.agent[1],
					})
					if c.refused == "" {
						return err
					}
					<-ctx.Done() // the refusal alone has to end the attempt, not that the machine stops
					return err
				}}
			}})
			t.Cleanup(func() { _ = hypervisor.Close() })
			eng, _ := p.start(t, func(cfg *solstice.Config) {
				cfg.Pools[0].Provider = hypervisor
				cfg.Retries = map[solstice.Class]int{solstice.ClassInfra: 1}
				solstice.SetProtocols(cfg, c.server[0], c.server[1])
			})
			r := finish(t, eng, p.submit(t, eng, "jobs: { a: { steps: [ { run: 'true' } ] } }\n").ID)
			as, err := eng.Attempts(t.Context(), r.Jobs[0].ID)
			if err != nil {
				t.Fatal(err)
			}
			if c.refused == "" {
				if r.State != solstice.RunSucceeded || len(as) != 1 {
					t.Errorf("run is %s: %+v", r.State, as)
				}
				return
			}
			if r.State != solstice.RunErrored || len(as) != 2 || !strings.Contains(r.Jobs[0].Reason, c.refused) {
				t.Errorf("run is %s, job: %+v, attempts: %+v", r.State, r.Jobs[0], as)
			}
			for _, a := range as {
				if a.Class != solstice.ClassInfra || !strings.Contains(a.Reason, "agent (1.2.3) "+c.refused) {
					t.Errorf("attempt %d: class %s, %q", a.Number, a.Class, a.Reason)
				}
			}
		})
	}
}
