package store

import (
	"context"
	"encoding/json"
	"time"

	"github.com/uptrace/bun"
)

// Orchestrator is a process that serves this database.
type Orchestrator struct {
	bun.BaseModel `bun:"table:orchestrators,alias:orchestrator"`

	ID         string          `bun:",pk"`
	Addr       string          // where its peers reach it; empty: nowhere
	Contacts   json.RawMessage `bun:",nullzero,default:'[]'"` // where agents reach it, a list of strings
	Pools      json.RawMessage // what it offers; the engine's own form
	Slots      int             // jobs that it takes at once
	SeenAt     int64
	LeaseUntil int64 // gone unless it says more by then
}

// Beat records that an orchestrator is there, and will be for a lease.
func (s *Store) Beat(ctx context.Context, o Orchestrator, lease time.Duration) error {
	return s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		o.SeenAt, o.LeaseUntil = now, now+micros(lease)
		_, err := tx.NewInsert().Model(&o).On("CONFLICT (id) DO UPDATE").
			Set("addr = excluded.addr, contacts = excluded.contacts, pools = excluded.pools, slots = excluded.slots").
			Set("seen_at = excluded.seen_at, lease_until = excluded.lease_until").Exec(ctx)
		return err
	})
}

// Leave records that an orchestrator stopped in good order.
func (s *Store) Leave(ctx context.Context, id string) error {
	_, err := s.db.NewDelete().Model((*Orchestrator)(nil)).Where("id = ?", id).Exec(ctx)
	return err
}

// Orchestrators lists those that are there.
func (s *Store) Orchestrators(ctx context.Context) ([]*Orchestrator, error) {
	now, err := s.Now(ctx)
	if err != nil {
		return nil, err
	}
	var out []*Orchestrator
	err = s.db.NewSelect().Model(&out).Where("lease_until > ?", now).OrderBy("id", bun.OrderAsc).Scan(ctx)
	return out, err
}

// AttemptPeer is the address of the orchestrator that is receiving an attempt's
// journal, where that is not self, is there, and tells its address; else empty.
func (s *Store) AttemptPeer(ctx context.Context, attemptID, self string) (string, error) {
	now, err := s.Now(ctx)
	if err != nil {
		return "", err
	}
	var addrs []string
	err = s.db.NewSelect().TableExpr("attempts AS a").Join("JOIN orchestrators AS o ON o.id = a.owner").Column("o.addr").
		Where("a.id = ? AND a.owner <> ? AND a."+liveAttempt, attemptID, self).Where("o.lease_until > ? AND o.addr <> ''", now).Scan(ctx, &addrs)
	if err != nil || len(addrs) == 0 {
		return "", err
	}
	return addrs[0], nil
}

// CountMax is the most that a count of queued jobs comes to, so that it costs
// the same however many there are.
const CountMax = 1000

// QueuedJobs counts the claimable jobs of a label, up to CountMax.
func (s *Store) QueuedJobs(ctx context.Context, label string) (int64, error) {
	var n int64
	err := queuedJobs(s.db, label).Scan(ctx, &n)
	return n, err
}

func queuedJobs(db bun.IDB, label string) *bun.RawQuery {
	return db.NewRaw("SELECT count(*) FROM (SELECT 1 FROM jobs WHERE "+claimable+" AND label = ? LIMIT ?) AS j", label, CountMax)
}

// JobsAhead counts the claimable jobs of a job's label that would be claimed
// before it if all were claimed now, up to CountMax: those of a higher
// priority, and of its own those whose turn comes first among repositories
// that take turns.
func (s *Store) JobsAhead(ctx context.Context, j *Job) (int64, error) {
	var repos []struct {
		Repo                        string
		Active, Higher, Same, Older int64
	}
	if err := rivals(s.db, j).Scan(ctx, &repos); err != nil {
		return 0, err
	}
	var turn int64 // active jobs of its repository when it is taken
	for _, r := range repos {
		if r.Repo == j.RepoKey {
			turn = r.Active + r.Older
		}
	}
	var ahead int64
	for _, r := range repos {
		ahead += r.Higher
		switch before := turn - r.Active; {
		case r.Repo == j.RepoKey:
			ahead += r.Older
		case before >= 0:
			ahead += min(r.Same, before)
			if r.Older > before { // equal turns go by age
				ahead++
			}
		}
	}
	return min(ahead, CountMax), nil
}

// rivals counts, for each repository with claimable jobs of the label, its
// active jobs and the claimable ones of a higher priority, of the same one, and
// of these those that are older. It skips through the index as bestQueued
// does, and each count ends at CountMax.
func rivals(db bun.IDB, j *Job) *bun.RawQuery {
	first := "(SELECT min(repo_key) FROM jobs WHERE " + claimable + " AND label = ?"
	count := func(where string) string {
		return "(SELECT count(*) FROM (SELECT 1 FROM jobs WHERE " + claimable + " AND label = ? AND repo_key = repos.repo AND " + where + " LIMIT ?) AS c)"
	}
	return db.NewRaw(`
WITH RECURSIVE repos (repo, n) AS (
	SELECT `+first+`), 1
	UNION ALL
	SELECT `+first+` AND repo_key > repos.repo), n + 1 FROM repos WHERE repo IS NOT NULL AND n < ?
)
SELECT repo, (SELECT count(*) FROM jobs WHERE `+activeJob+` AND repo_key = repos.repo) AS active,
	`+count("priority > ?")+` AS higher, `+count("priority = ?")+` AS same,
	`+count("priority = ? AND (queued_at, id) < (?, ?)")+` AS older
FROM repos WHERE repo IS NOT NULL`,
		j.Label, j.Label, CountMax,
		j.Label, j.Priority, CountMax, j.Label, j.Priority, CountMax, j.Label, j.Priority, j.QueuedAt, j.ID, CountMax)
}

// MachineCount is how many machines a pool has at a host.
type MachineCount struct {
	Host, Pool string
	Machines   int // not gone
	Busy       int // of these, with a job
	Idle       int // ready, waiting for one
	Booting    int
}

// MachineCounts counts the machines that are not gone by host and pool.
func (s *Store) MachineCounts(ctx context.Context) ([]MachineCount, error) {
	var out []MachineCount
	err := s.db.NewSelect().TableExpr("machines").ColumnExpr("host, pool, count(*) AS machines").
		ColumnExpr("count(CASE WHEN attempt_id <> '' AND state <> 'destroying' THEN 1 END) AS busy").
		ColumnExpr("count(CASE WHEN attempt_id = '' AND state = 'ready' THEN 1 END) AS idle").
		ColumnExpr("count(CASE WHEN state = 'provisioning' THEN 1 END) AS booting").
		Where(notGone).GroupExpr("host, pool").Scan(ctx, &out)
	return out, err
}

// AttemptCounts counts the attempts under way by owner.
func (s *Store) AttemptCounts(ctx context.Context) (map[string]int, error) {
	var rows []struct {
		Owner string
		N     int
	}
	err := s.db.NewSelect().TableExpr("attempts").ColumnExpr("owner, count(*) AS n").Where(liveAttempt).GroupExpr("owner").Scan(ctx, &rows)
	out := map[string]int{}
	for _, r := range rows {
		out[r.Owner] = r.N
	}
	return out, err
}

// Machines lists at most limit machines that are not gone with IDs beyond
// after, of one pool or all.
func (s *Store) Machines(ctx context.Context, pool, after string, limit int) ([]*Machine, error) {
	var out []*Machine
	err := machinesQuery(s.db, pool, after, limit, &out).Scan(ctx)
	return out, err
}

func machinesQuery(db bun.IDB, pool, after string, limit int, out *[]*Machine) *bun.SelectQuery {
	q := db.NewSelect().Model(out).Where(notGone).Where("id > ?", after).OrderBy("id", bun.OrderAsc).Limit(int64(limit))
	if pool != "" {
		q = q.Where("pool = ?", pool)
	}
	return q
}
