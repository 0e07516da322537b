package store

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
)

// DeliveryState is what became of a webhook.
type DeliveryState string

// States of a delivery.
const (
	DeliveryAccepted  DeliveryState = "accepted"  // its message is in the outbox, or was
	DeliveryIgnored   DeliveryState = "ignored"   // genuine, and nothing to do
	DeliveryDuplicate DeliveryState = "duplicate" // it came before
)

// Delivery is a webhook whose signature verified.
type Delivery struct {
	bun.BaseModel `bun:"table:deliveries,alias:delivery"`

	ID         string `bun:",pk"` // ours; sorts by arrival
	Forge      string
	Delivery   string // the forge's ID
	Kind       string
	Repo       string
	State      DeliveryState
	Reason     string
	Headers    json.RawMessage // map[string]string, without what authorises
	Event      json.RawMessage // forge.Event; of accepted ones
	Body       []byte
	BodySum    string // hex SHA-256
	ReplayOf   string
	ReceivedAt int64
}

// InsertDelivery writes a delivery, and with it the messages that it causes. One that is
// to be accepted and was before, by the forge's ID or by its body within that time, becomes
// a DeliveryDuplicate without messages; d says so afterwards, and of which.
func (s *Store) InsertDelivery(ctx context.Context, d *Delivery, within time.Duration, msgs []OutboxMessage) error {
	want := d.State
	try := func() error {
		return s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
			d.State, d.ReceivedAt = want, now
			if d.ReplayOf == "" && want == DeliveryAccepted { // what was ignored may be wanted by now
				var first []string
				err := tx.NewSelect().Model((*Delivery)(nil)).Column("id").
					Where("forge = ? AND state = ?", d.Forge, DeliveryAccepted).
					WhereGroup(" AND ", func(q *bun.SelectQuery) *bun.SelectQuery {
						q = q.Where("body_sum = ? AND received_at > ?", d.BodySum, now-micros(within))
						if d.Delivery != "" {
							q = q.WhereOr("delivery = ?", d.Delivery)
						}
						return q
					}).OrderBy("id", bun.OrderAsc).Limit(1).Scan(ctx, &first)
				if err != nil {
					return err
				}
				if len(first) > 0 {
					d.State, d.Reason, d.Body, d.Headers, d.Event = DeliveryDuplicate, "it came before, as "+first[0], nil, nil, nil
				}
			}
			if _, err := tx.NewInsert().Model(d).Exec(ctx); err != nil {
				return err
			}
			if d.State != DeliveryAccepted || len(msgs) == 0 {
				return nil
			}
			for i := range msgs {
				msgs[i].CreatedAt = now
			}
			_, err := tx.NewInsert().Model(&msgs).Exec(ctx)
			return err
		})
	}
	err := try()
	if sqldb.IsUnique(err) { // the same came at the same time, and was first
		err = try()
	}
	if err != nil {
		return fmt.Errorf("store: delivery: %w", err)
	}
	return nil
}

// DeliveryFilter selects deliveries; zero fields select all.
type DeliveryFilter struct {
	Forge  string
	Before string // ID: only older ones, for paging
	Limit  int
}

// Deliveries lists deliveries without their bodies, newest first.
func (s *Store) Deliveries(ctx context.Context, f DeliveryFilter) ([]*Delivery, error) {
	var out []*Delivery
	q := s.db.NewSelect().Model(&out).ExcludeColumn("body", "event").OrderBy("id", bun.OrderDesc).Limit(int64(f.Limit))
	if f.Forge != "" {
		q = q.Where("forge = ?", f.Forge)
	}
	if f.Before != "" {
		q = q.Where("id < ?", f.Before)
	}
	return out, q.Scan(ctx)
}

// Delivery reads one; absent wraps ErrNotFound.
func (s *Store) Delivery(ctx context.Context, id string) (*Delivery, error) {
	d := new(Delivery)
	return d, found(s.db.NewSelect().Model(d).Where("id = ?", id).Scan(ctx), "delivery", id)
}
