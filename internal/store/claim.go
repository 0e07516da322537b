package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
)

// Claim takes at most r.Max of the best queued jobs for the pool's labels and
// gives each a machine: one of r.Ready while there are any, then new ones as
// far as the capacity of pool and host allows, and how many the host may boot at
// once. What room is left then goes to machines without a job, until r.Warm wait
// for one or are on the way there. It returns nothing, and no error, when there
// is nothing to do or no room. r.Ready machines cost no capacity.
//
// Each claim is a transaction of its own under the lock of the host's capacity
// and the job's run, so that no two processes over-commit a host or get the
// same job. An error after the first claim is not returned: the claims are.
func (s *Store) Claim(ctx context.Context, r ClaimRequest) ([]Claimed, error) {
	var out []Claimed
	ready := r.Ready
	for len(out) < r.Max && len(r.Labels) > 0 {
		if may, err := s.mayClaim(ctx, r, ready); err != nil {
			return orError(out, err)
		} else if !may {
			break
		}
		c, rest, err := s.claimOne(ctx, r, ready)
		if err != nil {
			return orError(out, err)
		}
		if c == nil {
			break
		}
		out, ready = append(out, *c), rest
	}
	if r.Warm > 0 {
		warm, err := s.makeWarm(ctx, r)
		if err != nil {
			return orError(out, err)
		}
		out = append(out, warm...)
	}
	return out, nil
}

func orError(out []Claimed, err error) ([]Claimed, error) {
	if len(out) > 0 {
		return out, nil
	}
	return nil, fmt.Errorf("store: claim: %w", err)
}

// mayClaim looks, without waiting for anybody, whether a claim may find a job
// and room for it. Most that are asked for do not.
func (s *Store) mayClaim(ctx context.Context, r ClaimRequest, ready []string) (bool, error) {
	queued, err := s.db.NewSelect().TableExpr("jobs").Where(claimable).Where("label IN (?)", bun.List(r.Labels)).Exists(ctx)
	if err != nil || !queued || len(ready) > 0 {
		return queued, err
	}
	left, err := roomFor(ctx, s.db, r)
	return left.machines() > 0, err
}

// claimOne returns nil when nothing can be claimed, and those of ready that are
// left.
func (s *Store) claimOne(ctx context.Context, r ClaimRequest, ready []string) (*Claimed, []string, error) {
	attemptID, fresh := newID(), (*Machine)(nil)
	var c *Claimed
	var rest []string
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		c, rest = nil, nil
		room, err := lockCapacity(ctx, tx, r)
		if err != nil {
			return err
		}
		machine, left, err := s.firstReady(ctx, tx, r, ready)
		if err != nil || machine == nil && room.machines() <= 0 {
			return err
		}
		job, run, err := s.takeBest(ctx, tx, now, r.Labels, attemptID)
		if err != nil || job == nil {
			return err
		}
		a := &Attempt{
			ID: attemptID, JobID: job.ID, RunID: job.RunID, Number: job.Attempts, State: AttemptAssigned,
			Epoch: 1, Owner: r.Owner, LeaseUntil: now + micros(r.Lease), CreatedAt: now,
			LogStream: fmt.Sprintf(streamPrefix+"%s/jobs/%s/%d/log", job.RunID, job.ID, job.Attempts),
		}
		c = &Claimed{Run: run, Job: job, Attempt: a}
		if machine != nil {
			a.ContactAt = now // its agent is attached
			machine.State, machine.AttemptID = MachineBound, a.ID
			machine.ExpiresAt = max(machine.ExpiresAt, now+micros(r.Expire(job)))
			c.Machine, rest = machine, left
		} else {
			if fresh == nil { // once, however often this runs: the caller keeps its token
				fresh = r.NewMachine()
			}
			m := *fresh
			provision(&m, r, now, job)
			m.AttemptID = a.ID
			c.Machine, c.Fresh = &m, true
		}
		a.MachineID = c.Machine.ID
		if _, err := tx.NewInsert().Model(a).Exec(ctx); err != nil {
			return err
		}
		if c.Fresh {
			_, err = tx.NewInsert().Model(c.Machine).Exec(ctx)
			return err
		}
		ok, err := changed(tx.NewUpdate().Model(c.Machine).Column("state", "attempt_id", "expires_at").
			Where("id = ? AND state = ? AND attempt_id = ''", machine.ID, MachineReady).Exec(ctx))
		if err == nil && !ok {
			return fmt.Errorf("%w: machine %s", ErrStale, machine.ID) // cannot be: it was locked
		}
		return err
	})
	if c != nil {
		err = s.settleClaim(ctx, err, r, func(ctx context.Context, tx bun.Tx) error {
			q := tx.NewSelect().Model((*Attempt)(nil)).Where("id = ? AND owner = ? AND state = ?", attemptID, r.Owner, AttemptAssigned)
			return exists(ctx, q, "attempt", attemptID)
		})
	}
	if err != nil {
		return nil, nil, err
	}
	return c, rest, nil
}

// streamPrefix is what the names of logs begin with, before the run's ID.
const streamPrefix = "runs/"

// provision fills in a machine that is about to be created.
func provision(m *Machine, r ClaimRequest, now int64, job *Job) {
	m.Pool, m.Host, m.State, m.Owner, m.Recipe = r.Pool, r.Host, MachineProvisioning, r.Owner, r.Recipe
	m.LeaseUntil, m.CreatedAt = now+micros(r.Lease), now
	m.BootBy = now + micros(r.Boot)
	m.TokenExpires = m.BootBy
	m.ExpiresAt = now + micros(r.Expire(job))
}

// settleClaim has read look for what a claim wrote that failed with err. It looks
// under the claim's lock, which a commit that is still under way holds. After a
// lease the claim would be ours no more.
func (s *Store) settleClaim(ctx context.Context, err error, r ClaimRequest, read func(ctx context.Context, tx bun.Tx) error) error {
	return sqldb.Settle(ctx, err, r.Lease, func(ctx context.Context) error {
		return s.inTx(ctx, func(ctx context.Context, tx bun.Tx, _ int64) error {
			if _, err := lockCapacity(ctx, tx, r); err != nil {
				return err
			}
			return read(ctx, tx)
		})
	})
}

func exists(ctx context.Context, q *bun.SelectQuery, what, id string) error {
	ok, err := q.Exists(ctx)
	if err == nil && !ok {
		err = fmt.Errorf("%w: %s %s", ErrNotFound, what, id)
	}
	return err
}

// room is how many machines may be added, by what bounds them.
type room struct{ host, pool, boots int }

func (r room) machines() int { return min(r.host, r.pool, r.boots) }

// lockCapacity locks the host's capacity and returns how many machines may be
// added. A pool belongs to its host, so one lock serves all counts; on SQLite
// the transaction is lock enough.
func lockCapacity(ctx context.Context, tx bun.Tx, r ClaimRequest) (room, error) {
	if sqldb.IsPostgres(tx) {
		if _, err := tx.NewRaw("INSERT INTO capacity (host) VALUES (?) ON CONFLICT (host) DO NOTHING", r.Host).Exec(ctx); err != nil {
			return room{}, err
		}
		var host string
		if err := lockRow(tx, tx.NewSelect().TableExpr("capacity").Column("host").Where("host = ?", r.Host)).Scan(ctx, &host); err != nil {
			return room{}, err
		}
	}
	return roomFor(ctx, tx, r)
}

func roomFor(ctx context.Context, db bun.IDB, r ClaimRequest) (room, error) {
	var n struct{ Host, Pool, Booting int }
	err := machineCounts(db, r).Scan(ctx, &n)
	left := room{r.HostCapacity - n.Host, r.PoolCapacity - n.Pool, math.MaxInt}
	if r.HostBoots > 0 {
		left.boots = r.HostBoots - n.Booting
	}
	return left, err
}

func machineCounts(db bun.IDB, r ClaimRequest) *bun.SelectQuery {
	return db.NewSelect().TableExpr("machines").
		ColumnExpr("count(*) AS host, count(CASE WHEN pool = ? THEN 1 END) AS pool", r.Pool).
		ColumnExpr("count(CASE WHEN state = 'provisioning' THEN 1 END) AS booting").
		Where("host = ?", r.Host).Where(notGone)
}

// firstReady locks the first of the ready machines that still is, and returns
// those after it. That lock comes before the run's, out of order, which is safe:
// whoever locks a run first looks for machines with attempts.
func (s *Store) firstReady(ctx context.Context, tx bun.Tx, r ClaimRequest, ids []string) (*Machine, []string, error) {
	for i, id := range ids {
		m := new(Machine)
		err := lockRow(tx, tx.NewSelect().Model(m).
			Where("id = ? AND state = ? AND attempt_id = '' AND owner = ? AND pool = ?", id, MachineReady, r.Owner, r.Pool)).Scan(ctx)
		if err == nil {
			return m, ids[i+1:], nil
		}
		if !errors.Is(err, sql.ErrNoRows) {
			return nil, nil, err
		}
	}
	return nil, nil, nil
}

// takeBest moves the best claimable job to assigned, under its run's lock.
func (s *Store) takeBest(ctx context.Context, tx bun.Tx, now int64, labels []string, attemptID string) (*Job, *Run, error) {
	for {
		var id, runID string
		err := bestQueued(tx, labels).Scan(ctx, &id, &runID)
		if errors.Is(err, sql.ErrNoRows) {
			return nil, nil, nil
		}
		if err != nil {
			return nil, nil, err
		}
		t, err := s.lockRun(ctx, tx, now, runID)
		if err != nil {
			return nil, nil, err
		}
		j := t.job(id)
		if j == nil || j.State != JobQueued || j.HoldID != "" {
			continue // somebody else was faster; it is not claimable any more
		}
		err = t.setJob(ctx, j, func(j *Job) {
			j.State, j.AttemptID = JobAssigned, attemptID
			j.Attempts++
		})
		if err != nil {
			return nil, nil, err
		}
		if _, err := t.settle(ctx); err != nil {
			return nil, nil, err
		}
		return j, t.Run, nil
	}
}

// bestQueued selects id and run of the best claimable job: highest priority,
// then the repository with the fewest assigned and running jobs, then the
// oldest.
//
// It is written by hand because its cost must not grow with the queue. For
// each label it skips through the index from repository to repository (a loose
// index scan, https://wiki.postgresql.org/wiki/Loose_indexscan) and looks at
// each one's first job only; the index has that order. Subselects, and not a
// join, keep PostgreSQL from hashing the whole table.
func bestQueued(db bun.IDB, labels []string) *bun.RawQuery {
	first := "(SELECT min(repo_key) FROM jobs WHERE " + claimable + " AND label = l.label"
	return db.NewRaw(`
WITH RECURSIVE l (label) AS (`+values(len(labels))+`),
repos (label, repo) AS (
	SELECT l.label, `+first+`) FROM l
	UNION ALL
	SELECT l.label, `+first+` AND repo_key > l.repo) FROM repos AS l WHERE l.repo IS NOT NULL
),
best (id, active) AS MATERIALIZED (
	SELECT (SELECT id FROM jobs WHERE `+claimable+` AND label = repos.label AND repo_key = repos.repo
		ORDER BY priority DESC, queued_at, id LIMIT 1),
		(SELECT count(*) FROM jobs WHERE `+activeJob+` AND repo_key = repos.repo)
	FROM repos WHERE repo IS NOT NULL
)
SELECT id, (SELECT run_id FROM jobs WHERE jobs.id = best.id) FROM best
ORDER BY (SELECT priority FROM jobs WHERE jobs.id = best.id) DESC, active,
	(SELECT queued_at FROM jobs WHERE jobs.id = best.id), id
LIMIT 1`, anys(labels)...)
}

// values is a table of n parameters.
func values(n int) string {
	out := "SELECT ?"
	for range n - 1 {
		out += " UNION SELECT ?"
	}
	return out
}

func anys(in []string) []any {
	out := make([]any, len(in))
	for i, s := range in {
		out[i] = s
	}
	return out
}

// QueuedLabels lists the labels that have claimable jobs.
func (s *Store) QueuedLabels(ctx context.Context) ([]string, error) {
	var out []string
	err := queuedLabels(s.db).Scan(ctx, &out)
	return out, err
}

// queuedLabels skips through the index from label to label.
func queuedLabels(db bun.IDB) *bun.RawQuery {
	return db.NewRaw(`
WITH RECURSIVE l (label) AS (
	SELECT (SELECT min(label) FROM jobs WHERE ` + claimable + `)
	UNION ALL
	SELECT (SELECT min(label) FROM jobs WHERE ` + claimable + ` AND label > l.label) FROM l WHERE l.label IS NOT NULL
)
SELECT label FROM l WHERE label IS NOT NULL ORDER BY label`)
}

// Renew extends the lease of everything live that the owner has and notes the
// listed attempts and machines, whose agents are in contact, as alive now. It
// returns what is still the owner's: attempts with their epochs, and machines.
func (s *Store) Renew(ctx context.Context, owner string, lease time.Duration, attempts, machines []string) (map[string]int64, map[string]int64, error) {
	var as []*Attempt
	var ms []*Machine
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		as, ms = nil, nil
		until := now + micros(lease)
		if _, err := tx.NewUpdate().Model((*Attempt)(nil)).Set("lease_until = ?", until).Where("owner = ?", owner).Where(liveAttempt).Exec(ctx); err != nil {
			return err
		}
		if len(attempts) > 0 {
			if _, err := tx.NewUpdate().Model((*Attempt)(nil)).Set("contact_at = ?", now).
				Where("id IN (?)", bun.List(attempts)).Where("owner = ?", owner).Where(liveAttempt).Exec(ctx); err != nil {
				return err
			}
		}
		if _, err := tx.NewUpdate().Model((*Machine)(nil)).Set("lease_until = ?", until).Where("owner = ?", owner).Where(notGone).Exec(ctx); err != nil {
			return err
		}
		if len(machines) > 0 {
			if _, err := tx.NewUpdate().Model((*Machine)(nil)).Set("contact_at = ?", now).
				Where("id IN (?)", bun.List(machines)).Where("owner = ?", owner).Where(notGone).Exec(ctx); err != nil {
				return err
			}
		}
		if err := tx.NewSelect().Model(&as).Column("id", "epoch").Where("owner = ?", owner).Where(liveAttempt).Scan(ctx); err != nil {
			return err
		}
		return tx.NewSelect().Model(&ms).Column("id").Where("owner = ?", owner).Where(notGone).Scan(ctx)
	})
	if err != nil {
		return nil, nil, fmt.Errorf("store: renew: %w", err)
	}
	stillA, stillM := map[string]int64{}, map[string]int64{}
	for _, a := range as {
		stillA[a.ID] = a.Epoch
	}
	for _, m := range ms {
		stillM[m.ID] = 0
	}
	return stillA, stillM, nil
}

// Release gives up everything the owner has, for an orderly stop: agents go on
// and attach elsewhere.
func (s *Store) Release(ctx context.Context, owner string) error {
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, _ int64) error {
		if _, err := tx.NewUpdate().Model((*Attempt)(nil)).Set("owner = '', lease_until = 0").Where("owner = ?", owner).Where(liveAttempt).Exec(ctx); err != nil {
			return err
		}
		_, err := tx.NewUpdate().Model((*Machine)(nil)).Set("owner = '', lease_until = 0").Where("owner = ?", owner).Where(notGone).Exec(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("store: release: %w", err)
	}
	return nil
}
