package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/uptrace/bun"
)

// WarmFailure says that machines of a pool at a host that were to wait for a job
// did not come to do so. There is none once one has.
type WarmFailure struct {
	bun.BaseModel `bun:"table:warm_failures,alias:failure"`

	Host     string `bun:",pk"`
	Pool     string `bun:",pk"`
	Failures int    // since one came to wait; those that were under way together count once
	FailedAt int64
	RetryAt  int64 // none is made before
	Reason   string
}

// PoolRoom is another pool of a host, as far as claims go.
type PoolRoom struct {
	Pool     string
	Labels   []string
	Capacity int
}

const idle = "attempt_id = '' AND state IN ('provisioning', 'ready')"

// IdleMachines counts the machines of a pool at a host that wait for a job, or
// are on the way there; recipe "" counts those of any.
func (s *Store) IdleMachines(ctx context.Context, host, pool, recipe string) (int, error) {
	n, _, err := idleMachines(ctx, s.db, host, pool, recipe)
	return n, err
}

// idleMachines also counts those of them that boot.
func idleMachines(ctx context.Context, db bun.IDB, host, pool, recipe string) (n, booting int, err error) {
	q := db.NewSelect().TableExpr("machines").ColumnExpr("count(*), count(CASE WHEN state = 'provisioning' THEN 1 END)").
		Where("host = ? AND pool = ?", host, pool).Where(idle).Where(notGone)
	if recipe != "" {
		q = q.Where("recipe = ?", recipe)
	}
	err = q.Scan(ctx, &n, &booting)
	return n, booting, err
}

// makeWarm adds machines that wait for jobs. What jobs of the host's other pools
// could use is left to them.
func (s *Store) makeWarm(ctx context.Context, r ClaimRequest) ([]Claimed, error) {
	var fresh []*Machine
	var out []Claimed
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		out = nil
		left, err := lockCapacity(ctx, tx, r)
		if err != nil {
			return err
		}
		n, err := warmMissing(ctx, tx, now, r, left)
		if err != nil {
			return err
		}
		for i := range n {
			if i == len(fresh) {
				fresh = append(fresh, r.NewMachine())
			}
			m := *fresh[i]
			provision(&m, r, now, nil)
			if _, err := tx.NewInsert().Model(&m).Exec(ctx); err != nil {
				return err
			}
			out = append(out, Claimed{Machine: &m, Fresh: true})
		}
		return nil
	})
	if len(out) > 0 {
		id := out[0].Machine.ID
		err = s.settleClaim(ctx, err, r, func(ctx context.Context, tx bun.Tx) error {
			return exists(ctx, tx.NewSelect().Model((*Machine)(nil)).Where("id = ? AND state = ?", id, MachineProvisioning), "machine", id)
		})
	}
	if err != nil {
		return nil, err
	}
	return out, nil
}

// warmMissing is how many machines are to be made to wait for a job now.
func warmMissing(ctx context.Context, tx bun.Tx, now int64, r ClaimRequest, left room) (int, error) {
	have, booting, err := idleMachines(ctx, tx, r.Host, r.Pool, r.Recipe)
	if err != nil {
		return 0, err
	}
	n := min(r.Warm-have, left.machines())
	if n <= 0 {
		return 0, nil
	}
	var f WarmFailure
	err = tx.NewSelect().Model(&f).Where("host = ? AND pool = ?", r.Host, r.Pool).Scan(ctx)
	switch {
	case errors.Is(err, sql.ErrNoRows):
	case err != nil:
		return 0, err
	case f.RetryAt > now:
		return 0, nil
	default:
		n = min(n, 1-booting) // one alone shows whether they boot again
	}
	for _, o := range r.Others {
		if n <= 0 {
			break
		}
		wanted, err := roomWanted(ctx, tx, r.Host, o)
		if err != nil {
			return 0, err
		}
		left.host -= wanted
		left.boots -= wanted
		n = min(n, left.machines())
	}
	return max(n, 0), nil
}

// roomWanted is how many machines a pool could make for jobs that are queued.
func roomWanted(ctx context.Context, db bun.IDB, host string, p PoolRoom) (int, error) {
	queued, err := queuedFor(ctx, db, p.Labels, p.Capacity)
	if err != nil || queued == 0 {
		return 0, err
	}
	has, err := db.NewSelect().TableExpr("machines").Where("host = ? AND pool = ?", host, p.Pool).Where(notGone).Count(ctx)
	return max(min(queued, p.Capacity-int(has)), 0), err
}

// queuedFor counts the claimable jobs of labels, up to most.
func queuedFor(ctx context.Context, db bun.IDB, labels []string, most int) (int, error) {
	if len(labels) == 0 || most <= 0 {
		return 0, nil
	}
	var n int
	err := db.NewRaw("SELECT count(*) FROM (SELECT 1 FROM jobs WHERE "+claimable+" AND label IN (?) LIMIT ?) AS j", bun.List(labels), most).Scan(ctx, &n)
	return n, err
}

// MakeRoom has machines that wait for jobs of the host's other pools give way to
// at most n queued jobs of r's labels, as far as those could have machines but
// for the host's capacity. It returns those that are to be destroyed now: first
// those that boot, youngest first, then those that have waited longest.
func (s *Store) MakeRoom(ctx context.Context, r ClaimRequest, n int) ([]*Machine, error) {
	if missing, err := roomMissing(ctx, s.db, r, n); err != nil || missing <= 0 {
		return nil, err
	}
	var out []*Machine
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		out = nil
		if _, err := lockCapacity(ctx, tx, r); err != nil {
			return err
		}
		missing, err := roomMissing(ctx, tx, r, n)
		if err != nil || missing <= 0 {
			return err
		}
		var all []*Machine
		err = lockRow(tx, tx.NewSelect().Model(&all).Where("host = ? AND pool <> ?", r.Host, r.Pool).Where(idle).Where(notGone).
			OrderBy("ready_at", bun.OrderAsc).OrderBy("id", bun.OrderDesc).Limit(int64(missing))).Scan(ctx)
		if err != nil {
			return err
		}
		for _, m := range all {
			ok, err := destroying(ctx, tx, now, m.ID, "it gives way to a job of pool "+r.Pool)
			if err != nil {
				return err
			}
			if ok {
				out = append(out, m)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("store: make room: %w", err)
	}
	return out, nil
}

// roomMissing is how many machines of other pools have to go for the jobs that
// are queued, beyond those that go already.
func roomMissing(ctx context.Context, db bun.IDB, r ClaimRequest, n int) (int, error) {
	n, err := queuedFor(ctx, db, r.Labels, n)
	if err != nil || n == 0 {
		return 0, err
	}
	left, err := roomFor(ctx, db, r)
	if err != nil {
		return 0, err
	}
	n = min(n, left.pool)
	if n <= left.host {
		return 0, nil
	}
	going, err := db.NewSelect().TableExpr("machines").Where("host = ? AND state = ?", r.Host, MachineDestroying).Count(ctx)
	return n - max(left.host, 0) - int(going), err
}

// DiscardIdle marks a machine to be destroyed if it has no attempt, and reports
// whether it did.
func (s *Store) DiscardIdle(ctx context.Context, id, reason string) (bool, error) {
	return s.discardIdle(ctx, id, reason, nil)
}

// WarmFailed is DiscardIdle for a machine that did not come to wait for a job, or
// died while it did: its pool makes no other one for a while, from first on
// twice as long each time up to most.
func (s *Store) WarmFailed(ctx context.Context, id, reason string, first, most time.Duration) (bool, error) {
	return s.discardIdle(ctx, id, reason, func(ctx context.Context, tx bun.Tx, now int64, m *Machine) error {
		f := &WarmFailure{Host: m.Host, Pool: m.Pool}
		err := lockRow(tx, tx.NewSelect().Model(f).WherePK()).Scan(ctx)
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		if f.Failures > 0 && m.CreatedAt <= f.FailedAt {
			return nil // it was under way when the last one failed
		}
		wait := most
		if f.Failures < 30 {
			wait = min(first<<f.Failures, most)
		}
		f.Failures++
		f.FailedAt, f.RetryAt, f.Reason = now, now+micros(wait), reason
		_, err = tx.NewInsert().Model(f).On("CONFLICT (host, pool) DO UPDATE").
			Set("failures = excluded.failures, failed_at = excluded.failed_at, retry_at = excluded.retry_at, reason = excluded.reason").Exec(ctx)
		return err
	})
}

func (s *Store) discardIdle(ctx context.Context, id, reason string, then func(context.Context, bun.Tx, int64, *Machine) error) (bool, error) {
	var done bool
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		done = false
		m := new(Machine)
		if err := lockRow(tx, tx.NewSelect().Model(m).Where("id = ?", id)).Scan(ctx); err != nil {
			return found(err, "machine", id)
		}
		if m.AttemptID != "" {
			return nil
		}
		var err error
		if done, err = destroying(ctx, tx, now, id, reason); err != nil || !done || then == nil {
			return err
		}
		return then(ctx, tx, now, m)
	})
	if err != nil {
		return false, fmt.Errorf("store: discard machine: %w", err)
	}
	return done, nil
}

// WarmFailures lists the pools whose machines do not come to wait for jobs.
func (s *Store) WarmFailures(ctx context.Context) ([]*WarmFailure, error) {
	var out []*WarmFailure
	err := s.db.NewSelect().Model(&out).OrderBy("host", bun.OrderAsc).OrderBy("pool", bun.OrderAsc).Scan(ctx)
	return out, err
}

// warmAgain forgets failures, since a machine came to be ready.
func warmAgain(ctx context.Context, tx bun.Tx, m *Machine) error {
	_, err := tx.NewDelete().Model((*WarmFailure)(nil)).Where("host = ? AND pool = ?", m.Host, m.Pool).Exec(ctx)
	return err
}
