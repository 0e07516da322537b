package store

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/uptrace/bun"
)

// Retention says how much of a run is kept.
type Retention string

// What is kept of a run. From KeptAll on it only goes further down this list.
const (
	KeptAll   Retention = ""
	LogsGoing Retention = "logs_going" // its logs are being deleted
	LogsGone  Retention = "logs_gone"
	RunGoing  Retention = "going" // all of it is, and it is not shown any more
)

// HasLogs reports whether the logs are to be had.
func (r Retention) HasLogs() bool { return r == KeptAll }

// Conditions of partial indexes, as in query.go.
const (
	ended    = "finished_at > 0"
	hasLogs  = "retention = ''"
	leaving  = "retention IN ('logs_going', 'going')"
	notGoing = "retention <> 'going'"
	gone     = "state = 'gone'"
)

// Rule says which of a repository's ended runs, ordered by their ends, are to
// be removed: those that are not among the latest Most, and those that ended at
// or before Before and are not among the latest Newest.
type Rule struct {
	Before int64 // 0: age is no reason
	Newest int
	Most   int   // negative: number is no reason
	Until  int64 // what ended later stays in any case; 0: nothing does
}

// position is a run's place among the ended ones of its repository.
type position struct {
	FinishedAt int64
	ID         string
}

func (p position) compare(q position) int {
	return cmp.Or(cmp.Compare(p.FinishedAt, q.FinishedAt), strings.Compare(p.ID, q.ID))
}

// EndedRepos lists at most limit repositories beyond after that have ended
// runs, in order: each costs one look into the index.
func (s *Store) EndedRepos(ctx context.Context, after string, limit int) ([]string, error) {
	var out []string
	for len(out) < limit {
		err := nextEndedRepo(s.db, after).Scan(ctx, &after)
		if errors.Is(err, sql.ErrNoRows) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("store: ended runs: %w", err)
		}
		out = append(out, after)
	}
	return out, nil
}

func nextEndedRepo(db bun.IDB, after string) *bun.SelectQuery {
	return db.NewSelect().TableExpr("runs").Column("repo_key").Where(ended).Where("repo_key > ?", after).
		OrderBy("repo_key", bun.OrderAsc).OrderBy("finished_at", bun.OrderAsc).Limit(1) // as the index has them
}

// ReposEnded lists the repositories with a run that ended after from, until to.
func (s *Store) ReposEnded(ctx context.Context, from, to int64) ([]string, error) {
	if from >= to {
		return nil, nil
	}
	var out []string
	if err := reposEnded(s.db, from, to).Scan(ctx, &out); err != nil {
		return nil, fmt.Errorf("store: ended runs: %w", err)
	}
	return out, nil
}

func reposEnded(db bun.IDB, from, to int64) *bun.SelectQuery {
	return db.NewSelect().TableExpr("runs").Distinct().Column("repo_key").Where(ended).Where("finished_at > ? AND finished_at <= ?", from, to)
}

// MarkLogs marks at most limit runs of a repository whose logs the rule
// removes, and reports how many.
func (s *Store) MarkLogs(ctx context.Context, repo string, r Rule, limit int) (int, error) {
	return s.mark(ctx, repo, r, limit, LogsGoing)
}

// MarkRuns does the same for whole runs. From then on they are not shown, and
// what they were submitted for may be submitted again. A run stays as long as
// one that is not over keeps results of it.
func (s *Store) MarkRuns(ctx context.Context, repo string, r Rule, limit int) (int, error) {
	return s.mark(ctx, repo, r, limit, RunGoing)
}

func (s *Store) mark(ctx context.Context, repo string, r Rule, limit int, to Retention) (int, error) {
	end, ok, err := s.removable(ctx, repo, r)
	if err != nil || !ok {
		return 0, err
	}
	// Looked for without a lock: mostly there is nothing.
	var ids []string
	if err := markable(s.db, repo, end, to, limit).Scan(ctx, &ids); err != nil {
		return 0, fmt.Errorf("store: retention: %w", err)
	}
	if len(ids) == 0 {
		return 0, nil
	}
	slices.Sort(ids)
	var n int64
	err = s.inTx(ctx, func(ctx context.Context, tx bun.Tx, _ int64) error {
		// A rerun locks what it copies from: it is there by now, or will see the mark.
		if err := lockRuns(ctx, tx, ids); err != nil {
			return err
		}
		q := tx.NewUpdate().Table("runs").Set("retention = ?", to).Where("id IN (?)", bun.List(ids)).Where(removableNow(to))
		if to == RunGoing {
			q = q.Set("delivery = '', idempotency_key = ''")
		}
		res, err := q.Exec(ctx)
		if err != nil {
			return err
		}
		n, err = res.RowsAffected()
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("store: retention: %w", err)
	}
	return int(n), nil
}

// removable is the last run of a repository that the rule removes; all before
// it go as well.
func (s *Store) removable(ctx context.Context, repo string, r Rule) (end position, ok bool, err error) {
	if r.Before > 0 {
		if end, err = s.beyond(ctx, repo, r.Newest); err != nil {
			return end, false, err
		}
		end = end.upTo(r.Before) // without one it is the zero position
	}
	if r.Most >= 0 {
		most, err := s.beyond(ctx, repo, r.Most)
		if err != nil {
			return end, false, err
		}
		if most.compare(end) > 0 {
			end = most
		}
	}
	if r.Until > 0 {
		end = end.upTo(r.Until)
	}
	return end, end.FinishedAt > 0, nil
}

// upTo is the position itself or, where that comes first, the last one of a time.
func (p position) upTo(t int64) position {
	if p.FinishedAt > t {
		return position{t, "\x7f"} // beyond every ID
	}
	return p
}

// beyond is the latest run that is not among the latest n; without one, the zero
// position.
func (s *Store) beyond(ctx context.Context, repo string, n int) (p position, err error) {
	err = endedBeyond(s.db, repo, n).Scan(ctx, &p.FinishedAt, &p.ID)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return p, fmt.Errorf("store: retention: %w", err)
	}
	return p, nil
}

func endedBeyond(db bun.IDB, repo string, n int) *bun.SelectQuery {
	return db.NewSelect().TableExpr("runs").Column("finished_at", "id").Where("repo_key = ?", repo).Where(ended).Where(notGoing).
		OrderBy("finished_at", bun.OrderDesc).OrderBy("id", bun.OrderDesc).Limit(1).Offset(int64(n))
}

// markable selects the runs up to end that may be marked, those that ended
// first at first.
func markable(db bun.IDB, repo string, end position, to Retention, limit int) *bun.SelectQuery {
	return db.NewSelect().TableExpr("runs").Column("id").Where("repo_key = ?", repo).Where(ended).
		Where("(finished_at, id) <= (?, ?)", end.FinishedAt, end.ID).Where(removableNow(to)).
		OrderBy("finished_at", bun.OrderAsc).OrderBy("id", bun.OrderAsc).Limit(int64(limit))
}

// removableNow is the condition for marking a run. It counts, since PostgreSQL
// would hash whole tables for EXISTS. A run that was ended with jobs under way
// stays until those are over.
func removableNow(to Retention) string {
	const busy = `(SELECT count(*) FROM jobs AS j WHERE j.run_id = runs.id AND j.state IN ('waiting', 'queued', 'assigned', 'running')) = 0`
	if to == LogsGoing {
		return hasLogs + " AND " + busy
	}
	return notGoing + " AND " + busy + ` AND (SELECT count(*) FROM jobs AS j
		JOIN jobs AS c ON c.copied_from = j.id AND c.copied_from <> ''
		JOIN runs AS r ON r.id = c.run_id AND r.finished_at = 0
		WHERE j.run_id = runs.id) = 0`
}

// lockRuns locks runs in the order of their IDs.
func lockRuns(ctx context.Context, tx bun.Tx, ids []string) error {
	var locked []string
	return lockRow(tx, tx.NewSelect().TableExpr("runs").Column("id").Where("id IN (?)", bun.List(ids)).OrderBy("id", bun.OrderAsc)).Scan(ctx, &locked)
}

// lockOrigins keeps the runs that a rerun copies from as they are until the
// commit, and refuses one whose original is being removed.
func lockOrigins(ctx context.Context, tx bun.Tx, run *Run, jobs []*Job) error {
	if run.RerunOf == "" {
		return nil
	}
	var copied []string
	for _, j := range jobs {
		if j.CopiedFrom != "" {
			copied = append(copied, j.CopiedFrom)
		}
	}
	ids := []string{run.RerunOf}
	if len(copied) > 0 { // which may be of yet earlier runs
		var more []string
		if err := tx.NewSelect().TableExpr("jobs").Distinct().Column("run_id").Where("id IN (?)", bun.List(copied)).Scan(ctx, &more); err != nil {
			return err
		}
		ids = append(ids, more...)
		slices.Sort(ids)
	}
	if err := lockRuns(ctx, tx, ids); err != nil {
		return err
	}
	there, err := tx.NewSelect().TableExpr("runs").Where("id = ?", run.RerunOf).Where(notGoing).Exists(ctx)
	if err == nil && !there {
		err = fmt.Errorf("%w: run %s", ErrRemoved, run.RerunOf)
	}
	return err
}

// RunRetention says how much of a run is kept; an unknown run is ErrNotFound.
func (s *Store) RunRetention(ctx context.Context, runID string) (r Retention, err error) {
	err = s.db.NewSelect().TableExpr("runs").Column("retention").Where("id = ?", runID).Scan(ctx, &r)
	return r, found(err, "run", runID)
}

// Leaving lists at most limit runs that are marked for removal, or whose logs
// are, beyond after.
func (s *Store) Leaving(ctx context.Context, after string, limit int) ([]*Run, error) {
	var out []*Run
	if err := leavingRuns(s.db, after, limit, &out).Scan(ctx); err != nil {
		return nil, fmt.Errorf("store: retention: %w", err)
	}
	return out, nil
}

func leavingRuns(db bun.IDB, after string, limit int, out *[]*Run) *bun.SelectQuery {
	return db.NewSelect().Model(out).Where(leaving).Where("id > ?", after).OrderBy("id", bun.OrderAsc).Limit(int64(limit))
}

// JobStreams is a job and the log streams of its attempts.
type JobStreams struct {
	JobID   string
	Idx     int
	Streams []string
}

// JobStreams lists at most limit jobs of a run beyond an index in its plan (-1:
// from the first), with their log streams. A kept result of a rerun has none.
func (s *Store) JobStreams(ctx context.Context, runID string, after, limit int) ([]JobStreams, error) {
	var jobs []*Job
	err := s.db.NewSelect().Model(&jobs).Column("id", "idx").Where("run_id = ? AND idx > ?", runID, after).
		OrderBy("idx", bun.OrderAsc).Limit(int64(limit)).Scan(ctx)
	if err != nil || len(jobs) == 0 {
		return nil, err
	}
	out := make([]JobStreams, len(jobs))
	ids, at := make([]string, len(jobs)), map[string]int{}
	for i, j := range jobs {
		out[i], ids[i], at[j.ID] = JobStreams{JobID: j.ID, Idx: j.Idx}, j.ID, i
	}
	var attempts []*Attempt
	err = s.db.NewSelect().Model(&attempts).Column("job_id", "log_stream").Where("job_id IN (?)", bun.List(ids)).Scan(ctx)
	for _, a := range attempts {
		j := &out[at[a.JobID]]
		j.Streams = append(j.Streams, a.LogStream)
	}
	return out, err
}

// LogsDeleted records that the logs of a run marked for that are deleted.
func (s *Store) LogsDeleted(ctx context.Context, runID string) error {
	_, err := s.db.NewUpdate().Table("runs").Set("retention = ?", LogsGone).Where("id = ? AND retention = ?", runID, LogsGoing).Exec(ctx)
	if err != nil {
		return fmt.Errorf("store: retention: %w", err)
	}
	return nil
}

// DeleteJobs deletes jobs of a run marked for removal, with their attempts and
// steps; their logs are deleted first.
func (s *Store) DeleteJobs(ctx context.Context, runID string, jobs []string) error {
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, _ int64) error {
		_, err := tx.NewDelete().Model((*Job)(nil)).Where("run_id = ? AND id IN (?)", runID, bun.List(jobs)).
			Where("(SELECT retention FROM runs WHERE id = ?) = ?", runID, RunGoing).Exec(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("store: retention: %w", err)
	}
	return nil
}

// DeleteRun deletes a run marked for removal that has no jobs any more.
func (s *Store) DeleteRun(ctx context.Context, runID string) error {
	_, err := s.db.NewDelete().Model((*Run)(nil)).Where("id = ? AND retention = ?", runID, RunGoing).
		Where("(SELECT count(*) FROM jobs WHERE run_id = ?) = 0", runID).Exec(ctx)
	if err != nil {
		return fmt.Errorf("store: retention: %w", err)
	}
	return nil
}

// LastOfCommit reports whether no run of the same repository and commit is
// kept beside this one.
func (s *Store) LastOfCommit(ctx context.Context, r *Run) (bool, error) {
	other, err := otherOfCommit(s.db, r).Exists(ctx)
	return !other, err
}

func otherOfCommit(db bun.IDB, r *Run) *bun.SelectQuery {
	// "|| ''" has the index of commits used, whose runs are few.
	return db.NewSelect().TableExpr("runs").Column("id").Where(`"commit" = ?`, r.Commit).Where("repo_key || '' = ?", r.RepoKey).
		Where("id <> ?", r.ID).Where(notGoing).Limit(1)
}

// Leftovers says how long what stays behind is kept, from its end.
type Leftovers struct {
	Records     time.Duration // machines that are gone, expired leases, orchestrators not heard of
	Tokens      time.Duration // expired tokens
	Undelivered time.Duration // messages that could not be published, webhooks and which heads they moved, what forges were told; negative: for ever
}

// Removed counts the leftovers that were removed.
type Removed struct{ Machines, Undelivered, Others int64 }

// RemoveLeftovers deletes what stays behind of machines, orchestrators and
// clients, at most limit of each kind.
func (s *Store) RemoveLeftovers(ctx context.Context, l Leftovers, limit int) (Removed, error) {
	var r Removed
	now, err := s.Now(ctx)
	if err != nil {
		return r, err
	}
	before := now - micros(l.Records)
	for _, d := range []struct {
		table, column string
		over          func(*bun.SelectQuery) *bun.SelectQuery
		count         *int64
	}{
		{"machines", "id", func(q *bun.SelectQuery) *bun.SelectQuery { return goneMachines(q, before) }, &r.Machines},
		// As few as there are orchestrators, hosts and tokens.
		{"leases", "name", func(q *bun.SelectQuery) *bun.SelectQuery { return q.Where("until <= ?", before) }, &r.Others},
		{"orchestrators", "id", func(q *bun.SelectQuery) *bun.SelectQuery { return q.Where("lease_until <= ?", before) }, &r.Others},
		{"tokens", "id", func(q *bun.SelectQuery) *bun.SelectQuery {
			return q.Where("expires_at > 0 AND expires_at <= ?", now-micros(l.Tokens))
		}, &r.Others},
	} {
		n, err := s.deleteOver(ctx, d.table, d.column, d.over, limit)
		if err != nil {
			return r, fmt.Errorf("store: leftovers in %s: %w", d.table, err)
		}
		*d.count += n
	}
	if l.Undelivered < 0 {
		return r, nil
	}
	of, err := s.RemoveDeliveries(ctx, l.Undelivered, limit)
	r.Others, r.Undelivered = r.Others+of.Others, of.Undelivered
	return r, err
}

// RemoveDeliveries deletes what is that old of what went between us and forges:
// webhooks, what forges were told, messages that could not be published; at most
// limit of each kind.
func (s *Store) RemoveDeliveries(ctx context.Context, age time.Duration, limit int) (r Removed, err error) {
	now, err := s.Now(ctx)
	if err != nil {
		return r, err
	}
	before := now - micros(age)
	// As long as a late message may ask for an older status.
	n, err := s.deleteReports(ctx, before, limit)
	if r.Others += n; err != nil {
		return r, fmt.Errorf("store: leftovers in reports: %w", err)
	}
	n, err = s.deleteOver(ctx, "deliveries", "id", func(q *bun.SelectQuery) *bun.SelectQuery {
		return q.Where("received_at <= ?", before)
	}, limit)
	if r.Others += n; err != nil {
		return r, fmt.Errorf("store: leftovers in deliveries: %w", err)
	}
	n, err = s.deleteWatched(ctx, before, limit)
	if r.Others += n; err != nil {
		return r, fmt.Errorf("store: leftovers in watched: %w", err)
	}
	if r.Undelivered, err = s.removeUndelivered(ctx, before, limit); err != nil {
		return r, fmt.Errorf("store: leftovers in outbox: %w", err)
	}
	return r, nil
}

// goneMachines selects machines without a job under way; there should be none
// with one.
func goneMachines(q *bun.SelectQuery, before int64) *bun.SelectQuery {
	return q.Where(gone).Where("gone_at <= ?", before).
		Where("(SELECT count(*) FROM attempts WHERE attempts.id = machines.attempt_id AND "+liveAttempt+") = 0").OrderBy("gone_at", bun.OrderAsc)
}

// deleteOver deletes at most limit rows that are over, which it looks for first:
// without any it does not take the turn to write.
func (s *Store) deleteOver(ctx context.Context, table, column string, over func(*bun.SelectQuery) *bun.SelectQuery, limit int) (int64, error) {
	var names []string
	err := over(s.db.NewSelect().TableExpr(table).Column(column)).Limit(int64(limit)).Scan(ctx, &names)
	if err != nil || len(names) == 0 {
		return 0, err
	}
	// Over still: a lease may have been taken meanwhile.
	still := over(s.db.NewSelect().TableExpr(table).Column(column)).Where("? IN (?)", bun.Ident(column), bun.List(names))
	res, err := s.db.NewDelete().TableExpr(table).Where("? IN (?)", bun.Ident(column), still).Exec(ctx)
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

// removeUndelivered looks at the oldest messages only: all others are younger.
func (s *Store) removeUndelivered(ctx context.Context, before int64, limit int) (int64, error) {
	var oldest []*OutboxMessage
	err := s.db.NewSelect().Model(&oldest).Column("id", "created_at").OrderBy("id", bun.OrderAsc).Limit(int64(limit)).Scan(ctx)
	if err != nil {
		return 0, err
	}
	var ids []int64
	for _, m := range oldest {
		if m.CreatedAt <= before {
			ids = append(ids, m.ID)
		}
	}
	if len(ids) == 0 {
		return 0, nil
	}
	res, err := s.db.NewDelete().Model((*OutboxMessage)(nil)).Where("id IN (?)", bun.List(ids)).Exec(ctx)
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

// CollectorLease is the name of the lease whose holder alone removes what
// retention lets go: who needs the logs to stay for a while, as a backup does,
// takes it.
const CollectorLease = "retention"

// Unlease gives a named lease up, if it is the owner's.
func (s *Store) Unlease(ctx context.Context, name, owner string) error {
	_, err := s.db.NewRaw("UPDATE leases SET until = 0 WHERE name = ? AND owner = ?", name, owner).Exec(ctx)
	if err != nil {
		return fmt.Errorf("store: lease %s: %w", name, err)
	}
	return nil
}
