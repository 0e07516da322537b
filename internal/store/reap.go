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

// StuckRuns looks through runs that are not over, limit at a time, for those
// that nothing will move on any more: jobs wait, and none is queued, assigned or
// running. There should be none; looking again through WithRun frees them. The
// next look begins after next, from the start where that is "".
func (s *Store) StuckRuns(ctx context.Context, state RunState, after string, limit int) (stuck []string, next string, err error) {
	var rows []struct {
		ID    string
		Stuck bool
	}
	if err := stuckRuns(s.db, state, after, limit).Scan(ctx, &rows); err != nil {
		return nil, "", err
	}
	for _, r := range rows {
		if r.Stuck {
			stuck = append(stuck, r.ID)
		}
	}
	if len(rows) == limit {
		next = rows[limit-1].ID
	}
	return stuck, next, nil
}

// stuckRuns counts, since PostgreSQL would hash the whole table for EXISTS.
func stuckRuns(db bun.IDB, state RunState, after string, limit int) *bun.SelectQuery {
	const jobs = "(SELECT count(*) FROM jobs WHERE jobs.run_id = run.id AND jobs.state IN "
	return db.NewSelect().TableExpr("runs AS run").Column("id").
		ColumnExpr("("+jobs+"('waiting')) > 0 AND "+jobs+"('queued', 'assigned', 'running')) = 0) AS stuck").
		// Not "state = ?": then PostgreSQL may well read all runs in the order of
		// their IDs until enough are in that state.
		Where("(state, id) > (?, ?) AND state <= ?", state, after, state).
		OrderBy("state", bun.OrderAsc).OrderBy("id", bun.OrderAsc).Limit(int64(limit))
}
