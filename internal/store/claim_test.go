package store_test

import (
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/store"
)

func TestClaimOrder(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		prio := func(p int) func(*store.Job) { return func(j *store.Job) { j.Priority = p } }
		_, a := r.runOf("a", nil, nil, nil)
		_, b := r.runOf("b", nil)
		_, c := r.runOf("c", prio(1), prio(1))
		_, d := r.runOf("d", func(j *store.Job) { j.Label = "bsd"; j.Priority = 9 }, func(j *store.Job) { j.HoldID = "m"; j.Priority = 9 })
		q := r.request("o1")
		q.Max = 100
		var got []string
		for _, cl := range r.claim(q) {
			got = append(got, cl.Job.ID)
			eq(t, "claimed state", cl.Job.State, store.JobAssigned)
		}
		// Priority first; then a and b, equally idle, by age; then whoever has least.
		want := []string{c[0].ID, c[1].ID, a[0].ID, b[0].ID, a[1].ID, a[2].ID}
		eq(t, "order", strings.Join(got, " "), strings.Join(want, " "))
		eq(t, "other label", r.job(d[0].ID).State, store.JobQueued)
		eq(t, "held", r.job(d[1].ID).State, store.JobQueued)
		labels, err := r.QueuedLabels(t.Context())
		must(t, err)
		eq(t, "labels", strings.Join(labels, " "), "bsd")
	})
}

func TestClaimWritesEverything(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		run, jobs := r.run(nil)
		now, err := r.Now(t.Context())
		must(t, err)
		c := r.claim(r.request("o1"))[0]
		a, m, j := r.attempt(c.Attempt.ID), r.machine(c.Machine.ID), r.job(jobs[0].ID)
		eq(t, "attempt", a.State, store.AttemptAssigned)
		eq(t, "epoch", a.Epoch, 1)
		eq(t, "number", a.Number, 1)
		eq(t, "stream", a.LogStream, "runs/"+run.ID+"/jobs/"+j.ID+"/1/log")
		eq(t, "contact", a.ContactAt, 0)
		eq(t, "machine of attempt", a.MachineID, m.ID)
		eq(t, "attempt of machine", m.AttemptID, a.ID)
		eq(t, "attempt of job", j.AttemptID, a.ID)
		eq(t, "attempts", j.Attempts, 1)
		eq(t, "started", j.StartedAt, 0)
		eq(t, "machine", m.State, store.MachineProvisioning)
		eq(t, "fresh", c.Fresh, true)
		eq(t, "token's end", m.TokenExpires, m.BootBy)
		for what, times := range map[string][2]int64{
			"lease":   {a.LeaseUntil, now + 30e6},
			"boot":    {m.BootBy, now + 60e6},
			"expires": {m.ExpiresAt, now + 3600e6},
		} {
			if times[0] < times[1] || times[0] > times[1]+60e6 {
				t.Errorf("%s at %d, want about %d", what, times[0], times[1])
			}
		}
		if string(c.Run.Event) != `{"a":"b'c"}` {
			t.Errorf("event came back as %s", c.Run.Event)
		}
		eq(t, "nothing left", len(r.claim(r.request("o1"))), 0)
	})
}

func TestClaimCapacity(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		r.run(nil, nil, nil, nil, nil)
		q := r.request("o1")
		q.Max, q.PoolCapacity, q.HostCapacity = 10, 2, 3
		eq(t, "pool's capacity", len(r.claim(q)), 2)
		other := q
		other.Pool, other.PoolCapacity = "other", 10
		got := r.claim(other)
		eq(t, "host's capacity", len(got), 1)
		eq(t, "full", len(r.claim(other)), 0)
		must(t, r.MachineDestroying(t.Context(), got[0].Machine.ID, "test"))
		eq(t, "destroying still counts", len(r.claim(other)), 0)
		_, err := r.MachineGone(t.Context(), got[0].Machine.ID)
		must(t, err)
		eq(t, "gone does not", len(r.claim(other)), 1)
		third := other
		third.Host = "elsewhere"
		eq(t, "another host", len(r.claim(third)), 1)
	})
}

func TestClaimReadyAndWarm(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		q := r.request("o1")
		q.Labels, q.Max, q.Warm, q.PoolCapacity = nil, 0, 5, 2
		warm := r.claim(q)
		eq(t, "warm machines", len(warm), 2)
		ids := []string{warm[0].Machine.ID, warm[1].Machine.ID}
		m, a, _, _, err := r.Attach(t.Context(), ids[0], "o1", time.Minute)
		must(t, err)
		eq(t, "attached", m.State, store.MachineReady)
		if a != nil {
			t.Errorf("a warm machine has attempt %v", a)
		}
		r.run(nil, nil, nil)
		q = r.request("o1")
		q.PoolCapacity, q.Max, q.Ready = 2, 5, []string{"unknown", ids[0], ids[1]} // the second is not ready
		got := r.claim(q)
		eq(t, "claims", len(got), 1)
		eq(t, "fresh", got[0].Fresh, false)
		eq(t, "machine", got[0].Machine.ID, ids[0])
		m = r.machine(ids[0])
		eq(t, "bound", m.State, store.MachineBound)
		eq(t, "to", m.AttemptID, got[0].Attempt.ID)
		if r.attempt(got[0].Attempt.ID).ContactAt == 0 {
			t.Error("an attached agent counts as never heard of")
		}
		foreign := r.request("o2")
		_, _, _, _, err = r.Attach(t.Context(), ids[1], "o1", time.Minute)
		must(t, err)
		foreign.Ready, foreign.PoolCapacity = []string{ids[1]}, 2
		eq(t, "another owner's machine", len(r.claim(foreign)), 0)
	})
}

func TestWarmOfAnotherRecipe(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		q := r.request("o1")
		q.Labels, q.Max, q.Warm, q.Recipe = nil, 0, 2, "old"
		eq(t, "machines", len(r.claim(q)), 2)
		eq(t, "enough", len(r.claim(q)), 0)
		q.Owner, q.Recipe = "o2", "new"
		eq(t, "of the new recipe", len(r.claim(q)), 2)
		for recipe, want := range map[string]int{"old": 2, "new": 2, "": 4} {
			n, err := r.IdleMachines(t.Context(), "host", "pool", recipe)
			must(t, err)
			eq(t, "idle of recipe "+recipe, n, want)
		}
	})
}

func TestWarmFailures(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		q := r.request("o1")
		q.Labels, q.Max, q.Warm = nil, 0, 3
		fail := func(c store.Claimed) bool {
			t.Helper()
			done, err := r.WarmFailed(t.Context(), c.Machine.ID, "no kernel", 5*time.Second, 12*time.Second)
			must(t, err)
			return done
		}
		all := r.claim(q)
		for _, c := range all {
			eq(t, "failed", fail(c), true)
		}
		eq(t, "again", fail(all[0]), false)
		for i, wait := range []time.Duration{5 * time.Second, 10 * time.Second, 12 * time.Second, 12 * time.Second} {
			f, err := r.WarmFailures(t.Context())
			must(t, err)
			if len(f) != 1 || f[0].Failures != i+1 || f[0].Reason != "no kernel" || f[0].RetryAt-f[0].FailedAt != wait.Microseconds() {
				t.Fatalf("after %d failures: %+v", i+1, f[0])
			}
			eq(t, "too early", len(r.claim(q)), 0)
			r.pass(wait)
			all = r.claim(q)
			eq(t, "one is tried", len(all), 1)
			eq(t, "and no more", len(r.claim(q)), 0)
			if i < 3 {
				fail(all[0])
			}
		}
		_, _, _, _, err := r.Attach(t.Context(), all[0].Machine.ID, "o1", time.Minute)
		must(t, err)
		f, err := r.WarmFailures(t.Context())
		must(t, err)
		eq(t, "failures", len(f), 0)
		eq(t, "the rest", len(r.claim(q)), 2)

		r.run(nil)
		q = r.request("o1")
		q.Ready = []string{all[0].Machine.ID}
		eq(t, "a job for it", r.claim(q)[0].Machine.ID, all[0].Machine.ID)
		eq(t, "a machine with a job", fail(all[0]), false)
		eq(t, "stays", r.machine(all[0].Machine.ID).State, store.MachineBound)
	})
}

// Claimers of two pools on one host, each with its own connection pool.
func TestClaimConcurrently(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		const jobs, capacity = 40, 7
		for i := range jobs / 4 {
			r.runOf(string(rune('a'+i%3)), nil, nil, nil, nil)
		}
		var mu sync.Mutex
		seen := map[string]bool{}
		var wg sync.WaitGroup
		for i := range 8 {
			q := r.request(string(rune('A' + i)))
			q.Pool, q.HostCapacity, q.Max = string(rune('p'+i%2)), capacity, 3
			wg.Go(func() {
				for misses := 0; misses < 3; {
					got, err := r.Claim(t.Context(), q)
					if err != nil {
						t.Error(err)
						return
					}
					if len(got) == 0 {
						misses++
					}
					live, err := r.MachinesNotGone(t.Context(), "host")
					if err != nil {
						t.Error(err)
						return
					}
					if len(live) > capacity {
						t.Errorf("%d machines on a host for %d", len(live), capacity)
					}
					for _, c := range got {
						mu.Lock()
						if seen[c.Job.ID] {
							t.Errorf("job %s was claimed twice", c.Job.ID)
						}
						seen[c.Job.ID] = true
						mu.Unlock()
						if _, err := r.MachineGone(t.Context(), c.Machine.ID); err != nil {
							t.Error(err)
						}
					}
				}
			})
		}
		wg.Wait()
		for _, c := range r.claim(func() store.ClaimRequest { q := r.request("last"); q.Max = jobs; return q }()) {
			seen[c.Job.ID] = true
		}
		eq(t, "claimed jobs", len(seen), jobs)
	})
}

func TestRenewAndRelease(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		r.run(nil, nil)
		c, ref := r.attached()
		other := r.claim(r.request("o2"))[0]
		before := r.attempt(c.Attempt.ID)
		r.pass(10 * time.Second)
		as, ms, err := r.Renew(t.Context(), "o1", 30*time.Second, []string{c.Attempt.ID, other.Attempt.ID}, []string{c.Machine.ID})
		must(t, err)
		eq(t, "attempts", len(as), 1)
		eq(t, "epoch", as[c.Attempt.ID], ref.Epoch)
		eq(t, "machines", len(ms), 1)
		after := r.attempt(c.Attempt.ID)
		if after.LeaseUntil < before.LeaseUntil+9e6 || after.ContactAt < before.ContactAt+9e6 {
			t.Errorf("lease %d → %d, contact %d → %d after 10 s", before.LeaseUntil, after.LeaseUntil, before.ContactAt, after.ContactAt)
		}
		eq(t, "another's contact", r.attempt(other.Attempt.ID).ContactAt, 0)
		must(t, r.Release(t.Context(), "o1"))
		eq(t, "owner", r.attempt(c.Attempt.ID).Owner, "")
		eq(t, "machine's owner", r.machine(c.Machine.ID).Owner, "")
		eq(t, "other owner", r.attempt(other.Attempt.ID).Owner, "o2")
		as, _, err = r.Renew(t.Context(), "o1", 30*time.Second, nil, nil)
		must(t, err)
		eq(t, "after release", len(as), 0)
	})
}
