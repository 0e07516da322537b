package solstice_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/memvm"
)

// TestFailureClasses: every attempt shows its class and its reason in words, and
// each class that is retried has a budget of its own, after which the job is
// errored.
func TestFailureClasses(t *testing.T) { onBoth(t, testFailureClasses) }

func testFailureClasses(t *testing.T, db func(testing.TB) string) {
	scripted := func(s memvm.Script) func(*testing.T, *solstice.Config) {
		return func(t *testing.T, c *solstice.Config) {
			vms := memvm.New(memvm.Config{Script: func(vmprovider.Spec) memvm.Script { return s }})
			t.Cleanup(func() { _ = vms.Close() })
			c.Pools[0].Provider = vms
		}
	}
	for _, c := range []struct {
		class    solstice.Class
		state    solstice.JobState
		attempts int
		reason   string // of every attempt
		console  string
		run      string // the step
		boot     time.Duration
		with     func(*testing.T, *solstice.Config)
		cancel   bool
	}{
		{class: solstice.ClassUser, state: solstice.JobFailed, attempts: 1, run: "exit 3", reason: "exit"},
		{class: solstice.ClassTimeout, state: solstice.JobTimedOut, attempts: 1, run: "sleep 600", reason: "longer than 1s"},
		{class: solstice.ClassCancelled, state: solstice.JobCancelled, attempts: 1, run: "touch begun; sleep 600", reason: "not needed", cancel: true},
		{
			class: solstice.ClassBoot, state: solstice.JobErrored, attempts: 3, run: "true", reason: "did not attach in time", console: "no kernel for you",
			boot: time.Second, with: func(t *testing.T, c *solstice.Config) {
				scripted(memvm.Script{Hang: true, Console: "no kernel for you\n"})(t, c)
				c.Pools[0].Provider = unlisted{c.Pools[0].Provider} // deadlines do not wait for it
			},
		},
		{class: solstice.ClassAgentLost, state: solstice.JobErrored, attempts: 2, run: "kill -9 $PPID; sleep 600", reason: "machine"},
		{
			class: solstice.ClassInfra, state: solstice.JobErrored, attempts: 4, run: "true", reason: "the disk is broken",
			with: scripted(memvm.Script{CreateError: errors.New("the disk is broken")}),
		},
	} {
		t.Run(string(c.class), func(t *testing.T) {
			p := newPlant(t, db(t))
			if c.boot > 0 {
				p.Timing.Boot = c.boot
			}
			eng, _ := p.start(t, func(cfg *solstice.Config) {
				cfg.Retries = map[solstice.Class]int{solstice.ClassAgentLost: 1, solstice.ClassBoot: 2, solstice.ClassInfra: 3}
				if c.with != nil {
					c.with(t, cfg)
				}
			})
			begun, timeout := filepath.Join(p.Dir, "begun"), "10m"
			if c.class == solstice.ClassTimeout {
				timeout = "1s"
			}
			r := p.submit(t, eng, "jobs: { a: { checkout: false, timeout: "+timeout+", steps: [ { run: '"+strings.ReplaceAll(c.run, "begun", begun)+"' } ] } }\n")
			if c.cancel {
				eventually(t, "the job runs", func() bool { _, err := os.Stat(begun); return err == nil })
				if err := eng.Cancel(t.Context(), r.ID, c.reason); err != nil {
					t.Fatal(err)
				}
			}
			r = finish(t, eng, r.ID)
			j := r.Jobs[0]
			if j.State != c.state || j.Class != c.class || !strings.Contains(j.Reason, c.reason) {
				t.Errorf("job is %s, class %s: %q", j.State, j.Class, j.Reason)
			}
			as, err := eng.Attempts(t.Context(), j.ID)
			if err != nil || len(as) != c.attempts {
				t.Errorf("%d attempts, want %d, %v", len(as), c.attempts, err)
			}
			for _, a := range as {
				if !a.State.Terminal() || a.Class != c.class || !strings.Contains(a.Reason, c.reason) || !strings.Contains(a.Console, c.console) {
					t.Errorf("attempt %d is %s, class %s: %q, console %q", a.Number, a.State, a.Class, a.Reason, a.Console)
				}
			}
		})
	}
}
