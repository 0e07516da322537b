package store

import (
	"context"
	"fmt"
	"time"

	"github.com/uptrace/bun"
)

// OutboxClaim takes at most limit messages to publish, oldest first, for the
// length of the lease. While one message of a key is claimed nobody gets
// another of that key, so the order within keys is kept. Of the messages of a
// key that coalesce only the newest is returned; the older ones are deleted.
func (s *Store) OutboxClaim(ctx context.Context, owner string, limit int, lease time.Duration) ([]*OutboxMessage, error) {
	var out []*OutboxMessage
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		out = nil
		// Claiming is one at a time: otherwise two relays could each take a
		// part of one key.
		var none string
		if err := lockRow(tx, tx.NewSelect().TableExpr("meta").Column("value").Where("key = 'outbox'")).Scan(ctx, &none); err != nil {
			return err
		}
		var msgs []*OutboxMessage
		if err := unclaimed(tx, now, limit, &msgs).Scan(ctx); err != nil || len(msgs) == 0 {
			return err
		}
		newest, err := coalesce(ctx, tx, msgs)
		if err != nil {
			return err
		}
		var ids []int64
		for _, m := range msgs {
			if n, ok := newest[m.Key]; m.Coalesce && ok {
				if n == nil { // returned with an older one's place already
					continue
				}
				m, newest[m.Key] = n, nil
			}
			ids = append(ids, m.ID)
			out = append(out, m)
		}
		_, err = tx.NewUpdate().Model((*OutboxMessage)(nil)).Set("claimed_by = ?, claimed_until = ?", owner, now+micros(lease)).
			Where("id IN (?)", bun.List(ids)).Exec(ctx)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("store: outbox: %w", err)
	}
	return out, nil
}

func unclaimed(db bun.IDB, now int64, limit int, out *[]*OutboxMessage) *bun.SelectQuery {
	return db.NewSelect().Model(out).
		Where("NOT EXISTS (SELECT 1 FROM outbox AS c WHERE c.key = outbox.key AND c.claimed_until > 0 AND c.claimed_until > ?)", now).
		OrderBy("id", bun.OrderAsc).Limit(int64(limit))
}

// coalesce deletes what is superseded and returns the newest message of each
// key of msgs that coalesces.
func coalesce(ctx context.Context, tx bun.Tx, msgs []*OutboxMessage) (map[string]*OutboxMessage, error) {
	newest := map[string]*OutboxMessage{}
	var keys []string
	for _, m := range msgs {
		if _, ok := newest[m.Key]; m.Coalesce && !ok {
			newest[m.Key] = nil
			keys = append(keys, m.Key)
		}
	}
	if len(keys) == 0 {
		return newest, nil
	}
	var ids []int64
	err := tx.NewSelect().Model((*OutboxMessage)(nil)).ColumnExpr("max(id)").
		Where("key IN (?)", bun.List(keys)).Where(`"coalesce"`).GroupExpr("key").Scan(ctx, &ids)
	if err != nil {
		return nil, err
	}
	var last []*OutboxMessage
	if err := tx.NewSelect().Model(&last).Where("id IN (?)", bun.List(ids)).Scan(ctx); err != nil {
		return nil, err
	}
	for _, m := range last {
		newest[m.Key] = m
	}
	// Only what is older than what was just read: a newer one may have come since.
	_, err = tx.NewDelete().Model((*OutboxMessage)(nil)).Where("key IN (?)", bun.List(keys)).Where(`"coalesce"`).
		Where("EXISTS (SELECT 1 FROM outbox AS n WHERE n.id IN (?) AND n.key = outbox.key AND n.id > outbox.id)", bun.List(ids)).Exec(ctx)
	return newest, err
}

// OutboxDone deletes messages that were published.
func (s *Store) OutboxDone(ctx context.Context, ids ...int64) error {
	if len(ids) == 0 {
		return nil
	}
	return s.inTx(ctx, func(ctx context.Context, tx bun.Tx, _ int64) error {
		_, err := tx.NewDelete().Model((*OutboxMessage)(nil)).Where("id IN (?)", bun.List(ids)).Exec(ctx)
		return err
	})
}

// OutboxRelease gives back what the owner claimed and did not publish.
func (s *Store) OutboxRelease(ctx context.Context, owner string) error {
	return s.inTx(ctx, func(ctx context.Context, tx bun.Tx, _ int64) error {
		_, err := tx.NewUpdate().Model((*OutboxMessage)(nil)).Set("claimed_by = '', claimed_until = 0").
			Where("claimed_by = ? AND claimed_until > 0", owner).Exec(ctx)
		return err
	})
}
