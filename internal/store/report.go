package store

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/uptrace/bun"
)

// Report is the newest status for a commit and key, on its way to the forge.
type Report struct {
	bun.BaseModel `bun:"table:reports,alias:report"`

	Forge        string          `bun:",pk"` // instance name
	RepoName     string          `bun:",pk"` // full
	Commit       string          `bun:",pk"`
	Key          string          `bun:",pk"`
	Repo         json.RawMessage // forge.Repo
	Status       json.RawMessage // forge.Status
	Version      int64           // of Status
	Reported     int64           // the version that the forge has; 0: none
	Failures     int             // of this version
	Reason       string          // of the last of them
	DueAt        int64           // when to report; 0: not any more
	ClaimedBy    string
	ClaimedUntil int64
	ChangedAt    int64
}

// WantReport has a status reported, unless one of the same version or a higher one
// was wanted before.
func (s *Store) WantReport(ctx context.Context, r Report) error {
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		r.DueAt, r.ChangedAt = now, now
		_, err := tx.NewInsert().Model(&r).
			On(`CONFLICT (forge, repo_name, "commit", key) DO UPDATE`).
			Set("repo = excluded.repo, status = excluded.status, version = excluded.version, failures = 0, reason = '', due_at = excluded.due_at, changed_at = excluded.changed_at").
			Where("report.version < excluded.version").Exec(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("store: report: %w", err)
	}
	return nil
}

// ClaimReports takes at most limit statuses of a forge that are due, those that are
// so for longest first, for the length of the lease. Nobody else gets one of the same
// commit and key meanwhile.
func (s *Store) ClaimReports(ctx context.Context, forge, owner string, limit int, lease time.Duration) ([]*Report, error) {
	var out []*Report
	if limit < 1 {
		return nil, nil
	}
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		out = nil
		q := tx.NewSelect().Model(&out).Where("forge = ? AND due_at > 0 AND due_at <= ? AND claimed_until <= ?", forge, now, now).
			OrderBy("due_at", bun.OrderAsc).Limit(int64(limit))
		if err := lockRow(tx, q).Scan(ctx); err != nil {
			return err
		}
		for _, r := range out {
			r.ClaimedBy, r.ClaimedUntil = owner, now+micros(lease)
			if _, err := tx.NewUpdate().Model(r).Column("claimed_by", "claimed_until").WherePK().Exec(ctx); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("store: claim reports: %w", err)
	}
	return out, nil
}

// Reported ends a claim: the forge has the status as it was claimed. A newer one is
// due at once.
func (s *Store) Reported(ctx context.Context, r *Report) error {
	return s.reportOver(ctx, r, func(q *bun.UpdateQuery, _ int64) *bun.UpdateQuery {
		return q.Set("reported = ?", r.Version).Set("due_at = CASE WHEN version = ? THEN 0 ELSE due_at END", r.Version)
	})
}

// NotReported ends a claim: the forge did not take the status, which is tried again
// after a while; of 0 never, but that a newer one comes.
func (s *Store) NotReported(ctx context.Context, r *Report, reason string, after time.Duration) error {
	return s.reportOver(ctx, r, func(q *bun.UpdateQuery, now int64) *bun.UpdateQuery {
		due := int64(0)
		if after > 0 {
			due = now + micros(after)
		}
		return q.Set("failures = failures + 1, reason = ?", reason).Set("due_at = CASE WHEN version = ? THEN ? ELSE due_at END", r.Version, due)
	})
}

func (s *Store) reportOver(ctx context.Context, r *Report, set func(*bun.UpdateQuery, int64) *bun.UpdateQuery) error {
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		_, err := set(tx.NewUpdate().Model((*Report)(nil)), now).Set("claimed_by = '', claimed_until = 0").
			Where(`forge = ? AND repo_name = ? AND "commit" = ? AND key = ? AND claimed_by = ?`, r.Forge, r.RepoName, r.Commit, r.Key, r.ClaimedBy).Exec(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("store: end of a report: %w", err)
	}
	return nil
}

// Report reads one; absent wraps ErrNotFound.
func (s *Store) Report(ctx context.Context, forge, repo, commit, key string) (*Report, error) {
	r := new(Report)
	err := s.db.NewSelect().Model(r).Where(`forge = ? AND repo_name = ? AND "commit" = ? AND key = ?`, forge, repo, commit, key).Scan(ctx)
	return r, found(err, "report", key)
}

// deleteReports removes at most limit reports that did not change since before, also
// of a forge that never took them.
func (s *Store) deleteReports(ctx context.Context, before int64, limit int) (int64, error) {
	old := func(db bun.IDB, out *[]*Report) error {
		return db.NewSelect().Model(out).Where("changed_at <= ?", before).OrderBy("changed_at", bun.OrderAsc).Limit(int64(limit)).Scan(ctx)
	}
	var some []*Report
	if err := old(s.db, &some); err != nil || len(some) == 0 { // then it does not take the turn to write
		return 0, err
	}
	var n int64
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, _ int64) error {
		some = nil
		if err := old(tx, &some); err != nil || len(some) == 0 {
			return err
		}
		res, err := tx.NewDelete().Model(&some).WherePK().Exec(ctx)
		if err != nil {
			return err
		}
		n, err = res.RowsAffected()
		return err
	})
	return n, err
}
