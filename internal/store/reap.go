package store

import (
	"context"
	"time"

	"github.com/uptrace/bun"
)

// Due is what seems to have ended without saying so. The engine decides, and
// acts through WithRun, which looks again.
type Due struct {
	Lost     []*Attempt // whose agents were not heard of for the deadline
	Boot     []*Machine // still provisioning beyond BootBy
	TimedOut []*Attempt // running beyond DeadlineAt
	Live     []*Attempt // all that are assigned or running
}

// Overdue looks for attempts and machines that are overdue. deadline is how
// long an agent may be silent; one that was never heard of is its machine's
// BootBy to judge.
func (s *Store) Overdue(ctx context.Context, deadline time.Duration) (Due, error) {
	var d Due
	now, err := s.Now(ctx)
	if err != nil {
		return d, err
	}
	live, err := s.LiveAttempts(ctx)
	if err != nil {
		return d, err
	}
	d.Live = live
	for _, a := range live {
		switch {
		case a.ContactAt > 0 && a.ContactAt+micros(deadline) < now:
			d.Lost = append(d.Lost, a)
		case a.DeadlineAt > 0 && a.DeadlineAt < now:
			d.TimedOut = append(d.TimedOut, a)
		}
	}
	err = s.db.NewSelect().Model(&d.Boot).Where("state = ? AND boot_by < ?", MachineProvisioning, now).Where(notGone).OrderBy("id", bun.OrderAsc).Scan(ctx)
	return d, err
}

// LiveAttempts lists all attempts that are assigned or running: as many as the
// fleet has machines, at most.
func (s *Store) LiveAttempts(ctx context.Context) ([]*Attempt, error) {
	var out []*Attempt
	err := liveAttempts(s.db, &out).Scan(ctx)
	return out, err
}

func liveAttempts(db bun.IDB, out *[]*Attempt) *bun.SelectQuery {
	return db.NewSelect().Model(out).Where(liveAttempt).OrderBy("id", bun.OrderAsc)
}

// Idle are a pool's machines without an attempt.
type Idle struct {
	Count   int        // ready, or on the way there
	Ready   int        // of them, those whose agents have attached
	Expired []*Machine // ready, and older than they may get
}

// IdleMachines counts a pool's machines that wait for a job.
func (s *Store) IdleMachines(ctx context.Context, pool string) (Idle, error) {
	var d Idle
	now, err := s.Now(ctx)
	if err != nil {
		return d, err
	}
	var ms []*Machine
	err = s.db.NewSelect().Model(&ms).Where("pool = ? AND attempt_id = ''", pool).Where(notGone).
		Where("state IN ('provisioning', 'ready')").OrderBy("id", bun.OrderAsc).Scan(ctx)
	for _, m := range ms {
		d.Count++
		if m.State != MachineReady {
			continue
		}
		d.Ready++
		if m.ExpiresAt <= now {
			d.Expired = append(d.Expired, m)
		}
	}
	return d, err
}

// StuckRuns lists runs that nothing will move on any more: jobs wait, and none
// is queued, assigned or running. There should be none; looking again through
// WithRun frees them.
func (s *Store) StuckRuns(ctx context.Context, limit int) ([]*Run, error) {
	var out []*Run
	err := s.db.NewSelect().Model(&out).
		Where("state IN (?, ?)", RunQueued, RunRunning).
		Where("EXISTS (SELECT 1 FROM jobs AS w WHERE w.run_id = run.id AND w.state = 'waiting')").
		Where("NOT EXISTS (SELECT 1 FROM jobs AS l WHERE l.run_id = run.id AND l.state IN ('queued', 'assigned', 'running'))").
		OrderBy("id", bun.OrderAsc).Limit(int64(limit)).Scan(ctx)
	return out, err
}
