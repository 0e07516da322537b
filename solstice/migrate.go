package solstice

import (
	"context"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/store"
)

// Errors of Migrate and Migrations.
var (
	// ErrSchema: the database's schema is not this version's; the error says
	// which is older. New, Migrate and Migrations wrap it.
	ErrSchema = store.ErrSchema
	// ErrIrreversible: a migration has no way back; restore a backup.
	ErrIrreversible = store.ErrIrreversible
)

// Migrate brings a database to the schema of this version; it is safe to call
// from several processes at once. A SQLite file with an older schema is copied
// beside itself first.
func Migrate(ctx context.Context, db *bun.DB) error { return store.Migrate(ctx, db) }

// Migrations are the steps between the schemas of versions, for an operator's
// tools: a program that only wants the newest schema calls [Migrate]. Stop the
// engines on the database before anything but Status.
type Migrations struct{ m *store.Migrations }

// Migration is one step.
type Migration struct {
	Name      string    `json:"name"` // sorts by age
	Applied   bool      `json:"applied"`
	Group     int64     `json:"group,omitempty"` // from 1; those applied together have the same
	AppliedAt time.Time `json:"applied_at,omitzero"`
}

// OpenMigrations gives the migrations of a database, which it does not touch.
func OpenMigrations(db *bun.DB) (*Migrations, error) {
	m, err := store.NewMigrations(db)
	if err != nil {
		return nil, err
	}
	return &Migrations{m}, nil
}

// Init makes the table that records which migrations are applied, and nothing
// else; Up does so too.
func (m *Migrations) Init(ctx context.Context) error { return m.m.Init(ctx) }

// Status lists this version's migrations, oldest first. A database with others
// wraps ErrSchema.
func (m *Migrations) Status(ctx context.Context) ([]Migration, error) {
	st, err := m.m.Status(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]Migration, 0, len(st))
	for _, s := range st {
		out = append(out, Migration(s))
	}
	return out, nil
}

// Up does what Migrate does, and names what it applied, oldest first.
func (m *Migrations) Up(ctx context.Context) ([]string, error) { return m.m.Up(ctx) }

// Down reverses the migrations that were applied last together, and names
// them, newest first; none are left when there were none. Where one of them
// cannot be reversed, none is: ErrIrreversible. A SQLite file is copied beside
// itself first. The tables that a migration made go with their rows.
func (m *Migrations) Down(ctx context.Context) ([]string, error) { return m.m.Down(ctx) }

// Reset reverses all migrations, as Down does; nothing of the engine's is left
// in the database.
func (m *Migrations) Reset(ctx context.Context) ([]string, error) { return m.m.Reset(ctx) }
