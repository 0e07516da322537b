package store_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

// race is many orchestrators at work on one database, with a record of what
// each was told it has won.
type race struct {
	dbs    []*bun.DB // several handles, as of several processes
	offset atomic.Int64
	ids    atomic.Int64
	sent   *published

	mu       sync.Mutex
	runs     []string
	machines []string
	refs     []store.AttemptRef // all that anybody ever had, current ones last
	runOf    map[string]string  // by attempt
	won      map[string]string  // by prize: the winner
	errs     []error
}

func newRace(t *testing.T, url string) *race {
	r := &race{sent: newPublished(), runOf: map[string]string{}, won: map[string]string{}}
	for range 2 {
		r.dbs = append(r.dbs, open(t, url))
	}
	must(t, store.Migrate(t.Context(), r.dbs[0]))
	return r
}

// process begins one: a store with a clock of its own.
func (r *race) process(ctx context.Context, n int) (*store.Store, error) {
	db := r.dbs[n%len(r.dbs)]
	return store.New(ctx, db, store.Options{
		Changed: modelMessages,
		Clock:   store.NewClock(db, store.ClockOptions{Offset: func() time.Duration { return time.Duration(r.offset.Load()) }}),
	})
}

// win records a prize, of which there is one.
func (r *race) win(who, format string, args ...any) {
	prize := fmt.Sprintf(format, args...)
	r.mu.Lock()
	defer r.mu.Unlock()
	if other, taken := r.won[prize]; taken {
		r.errs = append(r.errs, fmt.Errorf("%s: %s and %s have it", prize, other, who))
	}
	r.won[prize] = who
}

func (r *race) note(err error) {
	for _, expected := range []error{store.ErrStale, store.ErrOver, store.ErrGone, store.ErrToken, store.ErrDuplicate, context.Canceled} {
		if errors.Is(err, expected) {
			return
		}
	}
	if err != nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.errs = append(r.errs, err)
	}
}

func (r *race) machine(rnd *rand.Rand) (id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.machines); n > 0 { // mostly one of the last
		id = r.machines[max(0, n-1-rnd.IntN(8))]
	}
	return id
}

func (r *race) ref(rnd *rand.Rand) (ref store.AttemptRef, run string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.refs); n > 0 {
		ref = r.refs[max(0, n-1-rnd.IntN(8))]
	}
	return ref, r.runOf[ref.ID]
}

func (r *race) saw(a *store.Attempt, epoch int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.runOf[a.ID] = a.RunID
	r.refs = append(r.refs, store.AttemptRef{ID: a.ID, Epoch: epoch})
}

// act does one thing at random, as orchestrator n of the stores.
func (r *race) act(ctx context.Context, rnd *rand.Rand, s *store.Store, who string) error {
	switch rnd.IntN(24) {
	case 0, 1, 2:
		return r.submit(ctx, rnd, s, who)
	case 3, 4, 5, 6:
		p := modelPools[rnd.IntN(len(modelPools))]
		q := claimRequest(p, who, func() string { return fmt.Sprintf("m%05d", r.ids.Add(1)) })
		q.Max, q.Warm = 1+rnd.IntN(2), rnd.IntN(8)/6
		r.mu.Lock()
		q.Ready = append(q.Ready, r.machines[max(0, len(r.machines)-8):]...)
		r.mu.Unlock()
		claimed, err := s.Claim(ctx, q)
		for _, c := range claimed {
			if c.Attempt != nil {
				r.win(who, "attempt %d of job %s", c.Attempt.Number, c.Job.ID)
				r.win(who, "machine %s for a job", c.Machine.ID)
				r.saw(c.Attempt, 1)
			}
			if c.Fresh {
				r.mu.Lock()
				r.machines = append(r.machines, c.Machine.ID)
				r.mu.Unlock()
			}
		}
		return err
	case 7, 8, 9:
		if id := r.machine(rnd); id != "" {
			_, a, _, _, err := s.Attach(ctx, id, who, modelLease)
			if err == nil && a != nil {
				r.win(who, "epoch %d of %s", a.Epoch, a.ID)
				r.saw(a, a.Epoch)
			}
			return err
		}
	case 10, 11, 12, 13, 14, 15:
		return r.write(ctx, rnd, s, who)
	case 16:
		switch rnd.IntN(4) {
		case 0, 1:
			return r.reap(ctx, s)
		case 2:
			p := modelPools[rnd.IntN(len(modelPools))]
			_, err := s.MakeRoom(ctx, claimRequest(p, who, nil), 2)
			return err
		}
		_, _, err := s.Renew(ctx, who, modelLease, nil, nil)
		return err
	case 17, 18:
		ms, err := s.MachinesNotGone(ctx, modelPools[rnd.IntN(len(modelPools))].host)
		for _, m := range ms {
			if err == nil && m.State == store.MachineDestroying {
				_, err = s.MachineGone(ctx, m.ID)
			}
		}
		return err
	case 19:
		r.mu.Lock()
		run := ""
		if n := len(r.runs); n > 0 && rnd.IntN(4) == 0 {
			run = r.runs[rnd.IntN(n)]
		}
		r.mu.Unlock()
		if run == "" {
			return nil
		}
		_, err := s.WithRun(ctx, run, func(ctx context.Context, t *store.RunTx) error {
			return errors.Join(cancelRun(ctx, t, who), advanceRun(ctx, t))
		})
		return err
	case 20:
		return s.Release(ctx, who)
	case 21, 22, 23:
		return r.relay(ctx, rnd, s, who)
	}
	return nil
}

func (r *race) submit(ctx context.Context, rnd *rand.Rand, s *store.Store, who string) error {
	run := &mRun{id: fmt.Sprintf("run%05d", r.ids.Add(1)), state: "queued", path: "w"}
	if rnd.IntN(2) == 0 {
		run.delivery = fmt.Sprint("d", rnd.IntN(40))
	}
	repo := fmt.Sprint("forge/", rnd.IntN(3))
	var js []*mJob
	for i, keys := range shapes[rnd.IntN(len(shapes))] {
		j := &mJob{id: fmt.Sprintf("%s-%d", run.id, i), key: keys[0], needs: keys[1:], label: fmt.Sprint("l", rnd.IntN(2)), repo: repo, state: "queued", prio: rnd.IntN(2)}
		if len(j.needs) > 0 {
			j.state = "waiting"
		}
		js = append(js, j)
	}
	row, jobs := rowsOf(run, repo, js)
	err := s.InsertRun(ctx, row, jobs)
	if err == nil {
		r.mu.Lock()
		r.runs = append(r.runs, run.id)
		r.mu.Unlock()
		if run.delivery != "" {
			r.win(who, "delivery %s", run.delivery)
		}
	}
	return err
}

// write writes about an attempt, under an epoch that may be another's by now.
func (r *race) write(ctx context.Context, rnd *rand.Rand, s *store.Store, who string) error {
	ref, run := r.ref(rnd)
	if run == "" {
		return nil
	}
	what := rnd.IntN(6)
	if what == 0 {
		seq := int64(1 + rnd.IntN(4))
		err := s.Progress(ctx, ref, seq, seq*10, []*store.Step{{Idx: 0, Name: who}})
		if err == nil {
			r.win(who, "seq %d of %s", seq, ref.ID)
		}
		return err
	}
	over := false
	_, err := s.WithRun(ctx, run, func(ctx context.Context, t *store.RunTx) error {
		a, err := t.Attempt(ctx, ref.ID)
		if err != nil {
			return err
		}
		over = what > 2 && live(a)
		f := store.Finish{State: store.JobSucceeded, AckedSeq: 5, LogSize: 50}
		switch {
		case what <= 2:
			err = t.StartAttempt(ctx, ref, modelJob)
		case what == 3:
			err = loseAttempt(ctx, t, a.JobID, ref, "agent_lost")
		case what == 4 && mayRetry(t, a.JobID, "infra"):
			f.Class = "infra"
			err = t.RetryAttempt(ctx, ref, f)
		default:
			err = t.FinishAttempt(ctx, ref, f)
		}
		if err != nil {
			return err
		}
		return advanceRun(ctx, t)
	})
	if err == nil && over {
		r.win(who, "end of %s", ref.ID)
	}
	return err
}

// reap gives up what is overdue, as several do at once.
func (r *race) reap(ctx context.Context, s *store.Store) error {
	due, err := s.Overdue(ctx, modelSilent)
	if err != nil {
		return err
	}
	lost := due.Lost
	for _, m := range due.Boot {
		if m.AttemptID == "" {
			_, err := s.WarmFailed(ctx, m.ID, "not booted", modelFirst, modelMost)
			r.note(err)
			continue
		}
		a, err := s.Attempt(ctx, m.AttemptID)
		if err != nil {
			return err
		}
		lost = append(lost, a)
	}
	for _, a := range lost {
		_, err := s.WithRun(ctx, a.RunID, func(ctx context.Context, t *store.RunTx) error {
			return errors.Join(loseAttempt(ctx, t, a.JobID, store.AttemptRef{ID: a.ID, Epoch: a.Epoch}, "agent_lost"), advanceRun(ctx, t))
		})
		if err == nil {
			r.win("reaper", "end of %s", a.ID)
		}
		r.note(err)
	}
	return nil
}

// relay publishes what it claims, unless it dies before or after.
func (r *race) relay(ctx context.Context, rnd *rand.Rand, s *store.Store, who string) error {
	who += fmt.Sprint("/", r.ids.Add(1)) // one that dies does not come back
	msgs, err := s.OutboxClaim(ctx, who, 1+rnd.IntN(16), modelOutbox)
	if err != nil || rnd.IntN(8) == 0 {
		return err
	}
	n := rnd.IntN(len(msgs) + 1)
	var done []int64
	for _, m := range msgs[:n] {
		r.sent.receive(m)
		done = append(done, m.ID)
	}
	if rnd.IntN(8) == 0 {
		return nil
	}
	if err := s.OutboxDone(ctx, done...); err != nil {
		return err
	}
	return s.OutboxRelease(ctx, who)
}

// TestModelConcurrently has processes of several connection pools race, one of
// them starting again and again, while every moment's rows are audited; then
// everything is driven to its end.
func TestModelConcurrently(t *testing.T) {
	const workers, actions, audited = 6, 100, 8
	testenv.Databases(t, func(t *testing.T, url string) {
		r := newRace(t, url)
		ctx := t.Context()
		seed := rand.Uint64()
		var acts atomic.Int64
		acted := make(chan struct{}, 1)
		t.Logf("seed %d", seed)
		var wg sync.WaitGroup
		for w := range workers {
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(seed, uint64(w)))
				s, err := r.process(ctx, w)
				for i := 0; i < actions && err == nil; i++ {
					r.note(r.act(ctx, rnd, s, fmt.Sprint("o", w)))
					if acts.Add(1)%audited == 0 {
						select {
						case acted <- struct{}{}:
						default: // it is looking
						}
					}
					if rnd.IntN(16) == 0 {
						r.offset.Add(int64(time.Minute))
					}
					if rnd.IntN(100) == 0 {
						r.offset.Add(int64(rnd.IntN(3)-1) * int64(24*time.Hour))
					}
					if w == 0 && rnd.IntN(8) == 0 {
						s, err = r.process(ctx, i)
					}
				}
				r.note(err)
			})
		}
		over := make(chan struct{})
		go func() { wg.Wait(); close(over) }()
		last, err := r.process(ctx, 0)
		must(t, err)
		var before *rows
		latest := int64(0)
		for running := true; running; {
			select {
			case <-over:
				running = false
			case <-acted:
			}
			now, err := look(ctx, r.dbs[0])
			if err == nil {
				var at int64
				if at, err = last.Now(ctx); err == nil {
					latest = max(latest, at)
					err = audit(before, now, r.sent, latest)
				}
			}
			if err != nil {
				t.Error(err)
				<-over
				break
			}
			before = now
		}
		if t.Failed() {
			return
		}
		now, err := last.Now(ctx)
		must(t, err)
		r.offset.Add(max(0, latest-now) * int64(time.Microsecond)) // corrected, however far it jumped back
		if err := drain(ctx, last, r.dbs[0], r.sent, func(d time.Duration) { r.offset.Add(int64(d)) }); err != nil {
			t.Error(err)
		}
		if err := errors.Join(r.errs...); err != nil {
			t.Error(err)
		}
		t.Logf("%d runs, %d machines, %d prizes", len(r.runs), len(r.machines), len(r.won))
	})
}

// TestAuditNoticesAMissingLock has two claimers count before either of them
// adds: without the lock over both steps a pool gets more than it has room for.
func TestAuditNoticesAMissingLock(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		r := newRace(t, url)
		s, err := r.process(t.Context(), 0)
		must(t, err)
		row, jobs := rowsOf(&mRun{id: "run", state: "queued", path: "w"}, "forge/a", []*mJob{
			{id: "a", key: "a", label: "l0", repo: "forge/a", state: "queued"},
			{id: "b", key: "b", label: "l0", repo: "forge/a", state: "queued"},
			{id: "c", key: "c", label: "l0", repo: "forge/a", state: "queued"},
			{id: "d", key: "d", label: "l0", repo: "forge/a", state: "queued"},
		})
		must(t, s.InsertRun(t.Context(), row, jobs))
		p := modelPools[0]
		var counted, done sync.WaitGroup
		counted.Add(2)
		for i := range 2 {
			done.Go(func() {
				there, err := s.MachinesNotGone(t.Context(), p.host)
				counted.Done()
				counted.Wait()
				if err == nil {
					q := claimRequest(p, fmt.Sprint("o", i), func() string { return fmt.Sprint("m", r.ids.Add(1)) })
					q.Max, q.PoolCapacity, q.HostCapacity, q.HostBoots = p.capacity-len(there), 100, 100, 0
					_, err = s.Claim(t.Context(), q)
				}
				r.note(err)
			})
		}
		done.Wait()
		must(t, errors.Join(r.errs...))
		now, err := look(t.Context(), r.dbs[1])
		must(t, err)
		err = audit(nil, now, r.sent, 0)
		if err == nil || !strings.Contains(err.Error(), "pool p0 has 4 machines, room is for 2") {
			t.Errorf("not noticed: %v", err)
		}
	})
}
