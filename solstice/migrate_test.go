package solstice_test

import (
	"testing"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/solstice"
)

// TestMigrations goes up, down and up again, as an operator does.
func TestMigrations(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		ctx := t.Context()
		db, err := sqldb.Open(ctx, url, sqldb.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = db.Close() })
		m, err := solstice.OpenMigrations(db)
		if err != nil {
			t.Fatal(err)
		}
		all := func(applied bool) int {
			t.Helper()
			st, err := m.Status(ctx)
			if err != nil || len(st) == 0 {
				t.Fatalf("status: %v, %v", st, err)
			}
			for _, s := range st {
				if s.Applied != applied || s.AppliedAt.IsZero() == applied || (s.Group > 0) != applied {
					t.Errorf("%+v, want applied: %v", s, applied)
				}
			}
			return len(st)
		}
		n := all(false)
		for _, step := range []struct {
			name    string
			do      func() ([]string, error)
			changes int
			applied bool
		}{
			{"init", func() ([]string, error) { return nil, m.Init(ctx) }, 0, false},
			{"up", func() ([]string, error) { return m.Up(ctx) }, n, true},
			{"up again", func() ([]string, error) { return m.Up(ctx) }, 0, true},
			{"down", func() ([]string, error) { return m.Down(ctx) }, n, false},
			{"down again", func() ([]string, error) { return m.Down(ctx) }, 0, false},
			{"up after down", func() ([]string, error) { return m.Up(ctx) }, n, true},
			{"reset", func() ([]string, error) { return m.Reset(ctx) }, n, false},
		} {
			names, err := step.do()
			if err != nil || len(names) != step.changes {
				t.Fatalf("%s: %q, %v; want %d", step.name, names, err, step.changes)
			}
			all(step.applied)
		}
	})
}
