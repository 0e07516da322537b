package store

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
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
				first, err := sameAs(ctx, tx, d, now-micros(within))
				if err != nil {
					return err
				}
				if first != "" {
					d.State, d.Reason, d.Body, d.Headers, d.Event = DeliveryDuplicate, "it came before, as "+first, nil, nil, nil
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

// sameAs gives the first accepted delivery with the same ID of the forge's, or with the
// same body since then; empty: there is none.
func sameAs(ctx context.Context, tx bun.Tx, d *Delivery, since int64) (string, error) {
	var all []string
	if err := sameDeliveries(tx, d, since).Scan(ctx, &all); err != nil || len(all) == 0 {
		return "", err
	}
	return slices.Min(all), nil
}

// sameDeliveries is raw, since it matters to every webhook: each half finds through an
// index what are a few rows, while with OR, or in an order, SQLite and PostgreSQL may
// prefer to read all deliveries of the forge.
func sameDeliveries(db bun.IDB, d *Delivery, since int64) *bun.RawQuery {
	return db.NewRaw("SELECT id FROM deliveries WHERE forge = ? AND delivery = ? AND delivery <> '' AND state = 'accepted' "+
		"UNION ALL SELECT id FROM deliveries WHERE forge = ? AND body_sum = ? AND received_at > ? AND state = 'accepted'",
		d.Forge, d.Delivery, d.Forge, d.BodySum, since)
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
