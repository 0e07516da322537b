package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
)

// Conditions of partial indexes, spelled as in the migrations: SQLite uses
// such an index only where the query repeats its words.
const (
	claimable   = "state = 'queued' AND hold_id = ''"
	activeJob   = "state IN ('assigned', 'running')"
	liveAttempt = "state IN ('assigned', 'running')"
	notGone     = "state <> 'gone'"
	usable      = "state IN ('provisioning', 'ready', 'bound')"
)

// New returns the store on a migrated database; a schema that is not this
// program's is refused with ErrSchema.
func New(ctx context.Context, db *bun.DB, o Options) (*Store, error) {
	sc, err := newSchema(db, embedded)
	if err != nil {
		return nil, err
	}
	if err := sc.check(ctx); err != nil {
		return nil, err
	}
	s := &Store{db: db, o: o, clock: o.Clock}
	if s.clock == nil {
		s.clock = NewClock(db, ClockOptions{})
	}
	err = db.NewRaw("SELECT value FROM meta WHERE key = 'installation'").Scan(ctx, &s.installation)
	if errors.Is(err, sql.ErrNoRows) { // the process that migrated died before it
		if err = sc.install(ctx); err == nil {
			err = db.NewRaw("SELECT value FROM meta WHERE key = 'installation'").Scan(ctx, &s.installation)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("store: installation: %w", err)
	}
	return s, nil
}

// Installation is the UUID of this database, which machines are tagged with.
func (s *Store) Installation() string { return s.installation }

// Now is the time that leases are measured by, in Unix microseconds.
func (s *Store) Now(ctx context.Context) (int64, error) { return s.clock.Now(ctx, s.db) }

// inTx runs fn in a transaction with its time.
func (s *Store) inTx(ctx context.Context, fn func(ctx context.Context, tx bun.Tx, now int64) error) error {
	return sqldb.InTx(ctx, s.db, func(ctx context.Context, tx bun.Tx) error {
		now, err := s.clock.Now(ctx, tx)
		if err != nil {
			return err
		}
		return fn(ctx, tx, now)
	})
}

// newID returns an id that sorts by creation.
func newID() string { return uuid.Must(uuid.NewV7()).String() }

// micros of a duration, for arithmetic with the clock's times.
func micros(d time.Duration) int64 { return d.Microseconds() }

// changed reports whether a statement changed a row.
func changed(r sql.Result, err error) (bool, error) {
	if err != nil {
		return false, err
	}
	n, err := r.RowsAffected()
	return n > 0, err
}

// found turns the absence of a row into ErrNotFound.
func found(err error, what, id string) error {
	if errors.Is(err, sql.ErrNoRows) {
		return fmt.Errorf("%w: %s %s", ErrNotFound, what, id)
	}
	return err
}

// lockRow makes a select lock its rows, which SQLite's transactions need not.
func lockRow(tx bun.IDB, q *bun.SelectQuery) *bun.SelectQuery {
	if sqldb.IsPostgres(tx) {
		return q.For("NO KEY UPDATE")
	}
	return q
}

// emit puts what a change causes into the outbox.
func (s *Store) emit(ctx context.Context, tx bun.Tx, now int64, run *Run, jobs, all []*Job) error {
	if s.o.Changed == nil {
		return nil
	}
	msgs := s.o.Changed(run, jobs, all)
	if len(msgs) == 0 {
		return nil
	}
	for i := range msgs {
		msgs[i].ID, msgs[i].CreatedAt, msgs[i].ClaimedBy, msgs[i].ClaimedUntil = 0, now, "", 0
	}
	_, err := tx.NewInsert().Model(&msgs).Exec(ctx)
	return err
}

// ---- reading

// Run reads one run.
func (s *Store) Run(ctx context.Context, id string) (*Run, error) {
	r := new(Run)
	return r, found(s.db.NewSelect().Model(r).Where("id = ?", id).Scan(ctx), "run", id)
}

// RunByKey finds the run that made InsertRun say ErrDuplicate. Empty keys are
// not looked for.
func (s *Store) RunByKey(ctx context.Context, forge, delivery, idempotencyKey, workflowPath string) (*Run, error) {
	r, err := runByKey(ctx, s.db, forge, delivery, idempotencyKey, workflowPath)
	if !errors.Is(err, ErrNotFound) {
		return r, err
	}
	// Who was told of a duplicate may have shared a commit with it that is still to
	// come (sqldb's groups): a transaction ends after it.
	err = s.inTx(ctx, func(ctx context.Context, tx bun.Tx, _ int64) error {
		r, err = runByKey(ctx, tx, forge, delivery, idempotencyKey, workflowPath)
		return err
	})
	return r, err
}

func runByKey(ctx context.Context, db bun.IDB, forge, delivery, idempotencyKey, workflowPath string) (*Run, error) {
	r := new(Run)
	if idempotencyKey != "" {
		err := db.NewSelect().Model(r).Where("idempotency_key = ? AND idempotency_key <> '' AND workflow_path = ?", idempotencyKey, workflowPath).Scan(ctx)
		if !errors.Is(err, sql.ErrNoRows) {
			return r, err
		}
	}
	if delivery != "" {
		err := db.NewSelect().Model(r).Where("forge = ? AND delivery = ? AND delivery <> '' AND workflow_path = ?", forge, delivery, workflowPath).Scan(ctx)
		if !errors.Is(err, sql.ErrNoRows) {
			return r, err
		}
	}
	return nil, fmt.Errorf("%w: run of delivery %q or idempotency key %q", ErrNotFound, delivery, idempotencyKey)
}

// RunFilter selects runs; zero fields select all.
type RunFilter struct {
	Forge  string
	Repo   string     // RepoKey
	States []RunState // any of them
	Commit string
	Ref    string // quick with Repo only
	Limit  int    // 0 means 50
	Before string // only runs with smaller ids: the last id of the page before
}

// Runs lists runs, newest first.
func (s *Store) Runs(ctx context.Context, f RunFilter) ([]*Run, error) {
	if f.Limit <= 0 {
		f.Limit = 50
	}
	states := f.States
	if len(states) == 0 {
		states = []RunState{""}
	}
	// State by state: each is one stretch of an index, already in order.
	var out []*Run
	for _, state := range states {
		var some []*Run
		if err := runsQuery(s.db, f, state, &some).Scan(ctx); err != nil {
			return nil, err
		}
		out = append(out, some...)
	}
	slices.SortFunc(out, func(a, b *Run) int { return strings.Compare(b.ID, a.ID) })
	out = slices.CompactFunc(out, func(a, b *Run) bool { return a.ID == b.ID })
	return out[:min(len(out), f.Limit)], nil
}

func runsQuery(db bun.IDB, f RunFilter, state RunState, out *[]*Run) *bun.SelectQuery {
	q := db.NewSelect().Model(out).Where(notGoing).OrderBy("id", bun.OrderDesc).Limit(int64(f.Limit))
	for _, c := range []struct{ column, is string }{
		{"forge", f.Forge}, {"repo_key", f.Repo}, {"state", string(state)}, {"commit", f.Commit}, {"ref", f.Ref},
	} {
		if c.is != "" && !(c.column == "forge" && f.Repo != "") { // a repository's key begins with its forge
			q = q.Where("? = ?", bun.Ident(c.column), c.is)
		}
	}
	if f.Before != "" {
		q = q.Where("id < ?", f.Before)
	}
	return q
}

// RunsByPrefix lists at most limit IDs of runs that begin with prefix, which
// must not be empty.
func (s *Store) RunsByPrefix(ctx context.Context, prefix string, limit int) ([]string, error) {
	var ids []string
	err := byPrefix(s.db, (*Run)(nil), prefix, limit).Where(notGoing).Scan(ctx, &ids)
	return ids, err
}

// JobsByPrefix is RunsByPrefix for jobs.
func (s *Store) JobsByPrefix(ctx context.Context, prefix string, limit int) ([]string, error) {
	var ids []string
	err := byPrefix(s.db, (*Job)(nil), prefix, limit).Scan(ctx, &ids)
	return ids, err
}

// AttemptsByPrefix is RunsByPrefix for attempts.
func (s *Store) AttemptsByPrefix(ctx context.Context, prefix string, limit int) ([]string, error) {
	var ids []string
	err := byPrefix(s.db, (*Attempt)(nil), prefix, limit).Scan(ctx, &ids)
	return ids, err
}

func byPrefix(db bun.IDB, model any, prefix string, limit int) *bun.SelectQuery {
	return db.NewSelect().Model(model).Column("id").Where("id >= ? AND id < ?", prefix, prefix+"\x7f").
		OrderBy("id", bun.OrderAsc).Limit(int64(limit))
}

// Jobs lists the jobs of a run in the plan's order.
func (s *Store) Jobs(ctx context.Context, runID string) ([]*Job, error) {
	var out []*Job
	err := s.db.NewSelect().Model(&out).Where("run_id = ?", runID).OrderBy("idx", bun.OrderAsc).Scan(ctx)
	return out, err
}

// Job reads one job.
func (s *Store) Job(ctx context.Context, id string) (*Job, error) {
	j := new(Job)
	return j, found(s.db.NewSelect().Model(j).Where("id = ?", id).Scan(ctx), "job", id)
}

// Attempt reads one attempt.
func (s *Store) Attempt(ctx context.Context, id string) (*Attempt, error) {
	a := new(Attempt)
	return a, found(s.db.NewSelect().Model(a).Where("id = ?", id).Scan(ctx), "attempt", id)
}

// Attempts lists the attempts of a job, first one first.
func (s *Store) Attempts(ctx context.Context, jobID string) ([]*Attempt, error) {
	var out []*Attempt
	err := s.db.NewSelect().Model(&out).Where("job_id = ?", jobID).OrderBy("number", bun.OrderAsc).Scan(ctx)
	return out, err
}

// Steps lists the steps of an attempt that have started.
func (s *Store) Steps(ctx context.Context, attemptID string) ([]*Step, error) {
	var out []*Step
	err := s.db.NewSelect().Model(&out).Where("attempt_id = ?", attemptID).OrderBy("idx", bun.OrderAsc).Scan(ctx)
	return out, err
}

// Machine reads one machine.
func (s *Store) Machine(ctx context.Context, id string) (*Machine, error) {
	m := new(Machine)
	return m, found(s.db.NewSelect().Model(m).Where("id = ?", id).Scan(ctx), "machine", id)
}
