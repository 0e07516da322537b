package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/store"
)

// ErrNotFound: there is no such delivery (any more).
var ErrNotFound = errors.New("integration: not found")

// Delivery is a webhook whose signature verified, or one that never came and was made
// up for, and what became of it.
type Delivery struct {
	ID         string            `json:"id"` // ours; sorts by arrival
	Forge      string            `json:"forge"`
	Delivery   string            `json:"delivery,omitempty"` // the forge's ID
	Kind       forge.Kind        `json:"kind,omitempty"`
	Repo       string            `json:"repo,omitempty"`
	State      string            `json:"state"` // accepted, ignored, duplicate
	Reason     string            `json:"reason,omitempty"`
	ReplayOf   string            `json:"replay_of,omitempty"`
	ReceivedAt time.Time         `json:"received_at"`
	Headers    map[string]string `json:"headers,omitempty"` // without what authorises; only of Get
	Event      *forge.Event      `json:"event,omitempty"`   // of what was accepted; only of Get
	Body       []byte            `json:"body,omitempty"`    // only of Get; of what was ignored the first 64 KiB, of what was found by looking none
}

// DeliveryFilter selects deliveries; its zero value the newest 50.
type DeliveryFilter struct {
	Forge  string
	Limit  int    // 0: 50, at most 500
	Before string // ID: only older ones, for paging
}

// Deliveries are the webhooks that a database knows, also while an Integration
// works with it.
type Deliveries struct{ store *store.Store }

// OpenDeliveries opens those of a migrated database.
func OpenDeliveries(ctx context.Context, db *bun.DB) (*Deliveries, error) {
	s, err := store.New(ctx, db, store.Options{})
	if err != nil {
		return nil, fmt.Errorf("integration: open state: %w", err)
	}
	return &Deliveries{s}, nil
}

// List lists deliveries, newest first.
func (d *Deliveries) List(ctx context.Context, f DeliveryFilter) ([]Delivery, error) {
	limit := f.Limit
	if limit <= 0 {
		limit = 50
	}
	rows, err := d.store.Deliveries(ctx, store.DeliveryFilter{Forge: f.Forge, Before: f.Before, Limit: min(limit, 500)})
	if err != nil {
		return nil, fmt.Errorf("integration: %w", err)
	}
	out := make([]Delivery, 0, len(rows))
	for _, r := range rows {
		r.Headers, r.Event, r.Body = nil, nil, nil
		out = append(out, public(r))
	}
	return out, nil
}

// Get gives one; absent wraps ErrNotFound.
func (d *Deliveries) Get(ctx context.Context, id string) (Delivery, error) {
	r, err := d.row(ctx, id)
	if err != nil {
		return Delivery{}, err
	}
	return public(r), nil
}

func (d *Deliveries) row(ctx context.Context, id string) (*store.Delivery, error) {
	r, err := d.store.Delivery(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return nil, fmt.Errorf("%w: delivery %s", ErrNotFound, id)
	}
	if err != nil {
		return nil, fmt.Errorf("integration: %w", err)
	}
	return r, nil
}

// Replay has what a delivery asked for done once more, whatever became of the first
// time; it gives the new delivery. Who works with the database sends what it asks
// for. Absent wraps ErrNotFound, one that asked for nothing ErrInvalid.
func (d *Deliveries) Replay(ctx context.Context, id string) (Delivery, error) {
	old, err := d.row(ctx, id)
	if err != nil {
		return Delivery{}, err
	}
	if len(old.Event) == 0 {
		return Delivery{}, fmt.Errorf("%w: delivery %s was %s (%s): there is nothing to replay", ErrInvalid, id, old.State, old.Reason)
	}
	var ev forge.Event
	if err := json.Unmarshal(old.Event, &ev); err != nil {
		return Delivery{}, fmt.Errorf("integration: event of delivery %s: %w", id, err)
	}
	again := &store.Delivery{
		ID: uuid.Must(uuid.NewV7()).String(), Forge: old.Forge, Kind: old.Kind, Repo: old.Repo, State: store.DeliveryAccepted,
		Headers: old.Headers, Body: old.Body, BodySum: old.BodySum, Event: old.Event, ReplayOf: old.ID,
	}
	msgs, err := request(ctx, old.Forge, ev, again.ID)
	if err != nil {
		return Delivery{}, fmt.Errorf("integration: %w", err)
	}
	if err := d.store.InsertDelivery(ctx, again, 0, nil, msgs); err != nil {
		return Delivery{}, fmt.Errorf("integration: %w", err)
	}
	return public(again), nil
}

func public(r *store.Delivery) Delivery {
	d := Delivery{
		ID: r.ID, Forge: r.Forge, Delivery: r.Delivery, Kind: forge.Kind(r.Kind), Repo: r.Repo, State: string(r.State), Reason: r.Reason,
		ReplayOf: r.ReplayOf, ReceivedAt: time.UnixMicro(r.ReceivedAt).UTC(), Body: r.Body,
	}
	if len(r.Headers) > 0 {
		_ = json.Unmarshal(r.Headers, &d.Headers) // our own
	}
	if len(r.Event) > 0 {
		_ = json.Unmarshal(r.Event, &d.Event)
	}
	return d
}
