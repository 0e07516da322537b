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

// InsertDelivery writes a delivery, and with it the messages that it causes and, where
// t is not nil, the head that it moves. One that is to be accepted and was before, by
// the forge's ID, by its body within that time, or because its head was found by
// looking, becomes a DeliveryDuplicate without messages; d says so afterwards, and of
// which.
func (s *Store) InsertDelivery(ctx context.Context, d *Delivery, within time.Duration, t *Told, msgs []OutboxMessage) error {
	var is Delivery
	try := func() error {
		return s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
			is = *d
			is.ReceivedAt = now
			if d.ReplayOf == "" && d.State == DeliveryAccepted { // what was ignored may be wanted by now
				why, err := cameBefore(ctx, tx, now, d, within, t)
				if err != nil {
					return err
				}
				if why != "" {
					is.State, is.Reason, is.Body, is.Headers, is.Event = DeliveryDuplicate, why, nil, nil, nil
				}
			}
			return insertDelivery(ctx, tx, now, &is, msgs)
		})
	}
	err := try()
	for range 2 {
		if sqldb.IsUnique(err) { // the same, or of the same new head, came at the same time and was first
			err = try()
		}
	}
	if err != nil {
		return fmt.Errorf("store: delivery: %w", err)
	}
	*d = is
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

// cameBefore says how a delivery is a duplicate; empty: it is none, and its head is moved.
func cameBefore(ctx context.Context, tx bun.Tx, now int64, d *Delivery, within time.Duration, t *Told) (string, error) {
	if sqldb.IsPostgres(tx) { // where several write: of the same body each is to see the one before
		// Raw, since what is locked has no row yet.
		if _, err := tx.NewRaw("SELECT pg_advisory_xact_lock(hashtextextended(?, 0))", "delivery/"+d.Forge+"/"+d.BodySum).Exec(ctx); err != nil {
			return "", err
		}
	}
	first, err := sameAs(ctx, tx, d, now-micros(within))
	switch {
	case err != nil:
		return "", err
	case first != "":
		return "it came before, as " + first, nil
	case t == nil:
		return "", nil
	}
	as, err := told(ctx, tx, now, d, within, *t)
	if err != nil || as == "" {
		return "", err
	}
	return "it was found by looking before it came, as " + as, nil
}

func insertDelivery(ctx context.Context, tx bun.Tx, now int64, d *Delivery, msgs []OutboxMessage) error {
	if _, err := tx.NewInsert().Model(d).Exec(ctx); err != nil || d.State != DeliveryAccepted || len(msgs) == 0 {
		return err
	}
	for i := range msgs {
		msgs[i].CreatedAt = now
	}
	_, err := tx.NewInsert().Model(&msgs).Exec(ctx)
	return err
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
