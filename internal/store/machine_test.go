package store_test

import (
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/store"
)

func enrollment(token, nonce, cred string) store.EnrollRequest {
	return store.EnrollRequest{TokenHash: token, NonceHash: nonce, CredHash: cred, OS: "linux", Arch: "amd64", Version: "v1", Protocol: 1, HasGit: true}
}

func TestEnroll(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		ctx := t.Context()
		r.run(nil, nil, nil)
		c := r.claim(r.request("o1"))[0]
		token := "token " + c.Machine.ID
		for _, bad := range []store.EnrollRequest{
			enrollment("", "n", "c"), enrollment("wrong", "n", "c"), enrollment(token, "", "c"), enrollment(token, "n", ""),
		} {
			_, err := r.Enroll(ctx, bad)
			wantErr(t, err, store.ErrToken)
		}
		m, err := r.Enroll(ctx, enrollment(token, "n", "c1"))
		must(t, err)
		eq(t, "machine", m.ID, c.Machine.ID)
		eq(t, "os", r.machine(m.ID).OS, "linux")
		eq(t, "git", r.machine(m.ID).HasGit, true)
		_, err = r.Enroll(ctx, enrollment(token, "other", "c2"))
		wantErr(t, err, store.ErrToken)
		_, err = r.Enroll(ctx, enrollment(token, "n", "c2")) // the reply was lost
		must(t, err)
		_, err = r.MachineByCredential(ctx, "c1")
		wantErr(t, err, store.ErrNotFound)
		_, err = r.MachineByCredential(ctx, "")
		wantErr(t, err, store.ErrNotFound)
		m, err = r.MachineByCredential(ctx, "c2")
		must(t, err)
		_, a, _, _, err := r.Attach(ctx, m.ID, "o1", time.Minute)
		must(t, err)
		_, err = r.Enroll(ctx, enrollment(token, "n", "c3")) // nothing acknowledged yet
		must(t, err)
		must(t, r.Progress(ctx, store.AttemptRef{ID: a.ID, Epoch: a.Epoch}, 1, 0, nil))
		_, err = r.Enroll(ctx, enrollment(token, "n", "c4"))
		wantErr(t, err, store.ErrToken)
		must(t, r.MachineDestroying(ctx, m.ID, "test"))
		must(t, r.MachineDestroying(ctx, m.ID, "again"))
		eq(t, "reason", r.machine(m.ID).Reason, "test")
		_, err = r.MachineByCredential(ctx, "c3")
		wantErr(t, err, store.ErrGone)
		wantErr(t, r.MachineDestroying(ctx, "nobody", ""), store.ErrNotFound)

		c = r.claim(r.request("o1"))[0]
		must(t, r.MachineDestroying(ctx, c.Machine.ID, "test"))
		_, err = r.Enroll(ctx, enrollment("token "+c.Machine.ID, "n", "c5"))
		wantErr(t, err, store.ErrToken)
		_, _, _, _, err = r.Attach(ctx, c.Machine.ID, "o1", time.Minute)
		wantErr(t, err, store.ErrGone)
		_, _, _, _, err = r.Attach(ctx, "nobody", "o1", time.Minute)
		wantErr(t, err, store.ErrNotFound)

		c = r.claim(r.request("o1"))[0]
		r.pass(2 * time.Minute)
		_, err = r.Enroll(ctx, enrollment("token "+c.Machine.ID, "n", "c6"))
		wantErr(t, err, store.ErrToken)
	})
}

func TestOverdue(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		ctx := t.Context()
		r.run(nil, nil, nil)
		talking, ref := r.attached()
		must(t, r.start(talking, ref))
		silent, _ := r.attached()
		booting := r.claim(r.request("o1"))[0]
		due := func() (lost, boot, timedOut string, live int) {
			t.Helper()
			d, err := r.Overdue(ctx, 10*time.Minute)
			must(t, err)
			for _, a := range d.Lost {
				lost += a.ID
			}
			for _, m := range d.Boot {
				boot += m.ID
			}
			for _, a := range d.TimedOut {
				timedOut += a.ID
			}
			return lost, boot, timedOut, len(d.Live)
		}
		lost, boot, over, live := due()
		eq(t, "at once", lost+boot+over, "")
		eq(t, "live", live, 3)
		r.pass(9 * time.Minute)
		_, _, err := r.Renew(ctx, "o1", time.Minute, []string{talking.Attempt.ID}, nil)
		must(t, err)
		lost, boot, over, _ = due()
		eq(t, "after 9 minutes", lost+over, "")
		eq(t, "not booted", boot, booting.Machine.ID)
		r.pass(2 * time.Minute)
		lost, _, _, _ = due()
		eq(t, "lost", lost, silent.Attempt.ID)
		r.pass(time.Hour)
		_, _, err = r.Renew(ctx, "o1", time.Minute, []string{talking.Attempt.ID}, nil)
		must(t, err)
		_, _, over, _ = due()
		eq(t, "timed out", over, talking.Attempt.ID)
	})
}

func TestIdleStuckAndLeases(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		ctx := t.Context()
		q := r.request("o1")
		q.Labels, q.Warm = nil, 2
		warm := r.claim(q)
		_, _, _, _, err := r.Attach(ctx, warm[0].Machine.ID, "o1", time.Minute)
		must(t, err)
		for host, want := range map[string]int{warm[0].Machine.Host: 2, "other": 0} {
			idle, err := r.IdleMachines(ctx, host, "pool", "")
			must(t, err)
			eq(t, "idle at "+host, idle, want)
		}

		done := func(j *store.Job) { j.State = store.JobSucceeded }
		stuck, _ := r.run(done, waiting)
		r.run(nil, waiting)
		r.run(done, done)
		var found []string
		for _, state := range []store.RunState{store.RunQueued, store.RunRunning} {
			for after := ""; ; {
				runs, next, err := r.StuckRuns(ctx, state, after, 1)
				must(t, err)
				found = append(found, runs...)
				if after = next; next == "" {
					break
				}
			}
		}
		eq(t, "stuck runs", strings.Join(found, " "), stuck.ID)

		lease := func(owner string) bool {
			t.Helper()
			mine, err := r.Lease(ctx, "reaper/x", owner, time.Minute)
			must(t, err)
			return mine
		}
		eq(t, "free", lease("a"), true)
		eq(t, "taken", lease("b"), false)
		eq(t, "renewed", lease("a"), true)
		r.pass(time.Minute)
		eq(t, "run out", lease("b"), true)
		eq(t, "lost", lease("a"), false)

		must(t, r.Beat(ctx, store.Orchestrator{ID: "a", Addr: "h:1"}, 30*time.Second))
		r.pass(time.Minute)
		must(t, r.Beat(ctx, store.Orchestrator{ID: "b", Addr: "h:2"}, 30*time.Second))
		must(t, r.Beat(ctx, store.Orchestrator{ID: "b", Addr: "h:3"}, 30*time.Second))
		os, err := r.Orchestrators(ctx)
		must(t, err)
		if len(os) != 1 || os[0].ID != "b" || os[0].Addr != "h:3" {
			t.Errorf("orchestrators: %v", os)
		}
		must(t, r.Leave(ctx, "b"))
		os, err = r.Orchestrators(ctx)
		must(t, err)
		eq(t, "orchestrators after one left", len(os), 0)
	})
}
