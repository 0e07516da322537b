package store

import (
	"context"
	"slices"
	"strings"

	"github.com/uptrace/bun"
)

// underWay restricts runs to those of a group that are not over.
func underWay(q *bun.SelectQuery, repoKey, group string) *bun.SelectQuery {
	return q.Where("repo_key = ? AND concurrency = ?", repoKey, group).
		Where("concurrency <> '' AND state NOT IN ('succeeded', 'failed', 'cancelled', 'errored', 'skipped')"). // as the index has it
		OrderBy("id", bun.OrderAsc)
}

// Group lists the runs of a concurrency group that are not over, oldest first.
func (s *Store) Group(ctx context.Context, repoKey, group string) ([]*Run, error) {
	var out []*Run
	err := underWay(s.db.NewSelect().Model(&out), repoKey, group).Scan(ctx)
	return out, err
}

// Waiting lists the runs that wait for their turn in a group, oldest first.
func (s *Store) Waiting(ctx context.Context, limit int) ([]*Run, error) {
	var out []*Run
	err := s.db.NewSelect().Model(&out).Where("state = ? AND concurrency <> ''", RunPlanning).OrderBy("id", bun.OrderAsc).Limit(int64(limit)).Scan(ctx)
	return out, err
}

// RunsAt lists the runs of a repository whose statuses stand beside a commit, newest
// first, at most 100.
func (s *Store) RunsAt(ctx context.Context, repoKey, commit string) ([]*Run, error) {
	var out []*Run
	for _, where := range []string{`head = ? AND head <> ''`, `head = '' AND "commit" = ?`} { // each by its index
		var some []*Run
		if err := s.db.NewSelect().Model(&some).Where(where, commit).Where("repo_key = ?", repoKey).Where(notGoing).OrderBy("id", bun.OrderDesc).Limit(100).Scan(ctx); err != nil {
			return nil, err
		}
		out = append(out, some...)
	}
	slices.SortFunc(out, func(a, b *Run) int { return strings.Compare(b.ID, a.ID) })
	return out[:min(len(out), 100)], nil
}

// MayBegin reports whether it is this run's turn in its concurrency group: none
// of it is under way, and none has waited for longer. It holds until the commit.
func (t *RunTx) MayBegin(ctx context.Context) (bool, error) {
	if t.Run.Concurrency == "" {
		return true, nil
	}
	var locked string
	if err := lockRow(t.tx, t.tx.NewSelect().Table("turns").Column("name").Where("name = 'concurrency'")).Scan(ctx, &locked); err != nil {
		return false, err
	}
	var group []*Run
	if err := underWay(t.tx.NewSelect().Model(&group), t.Run.RepoKey, t.Run.Concurrency).Scan(ctx); err != nil {
		return false, err
	}
	for _, r := range group {
		switch {
		case r.ID == t.Run.ID, r.State == RunAwaitingApproval:
		case r.State != RunPlanning, r.ID < t.Run.ID:
			return false, nil
		}
	}
	return true, nil
}
