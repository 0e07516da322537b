package store

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/google/uuid"
	"github.com/uptrace/bun"
	"github.com/uptrace/bun/migrate"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
)

// ErrSchema: the database's schema is not the one this program knows. The
// error says which of the two is older.
var ErrSchema = errors.New("store: schema does not fit")

//go:embed migrations/*.sql
var embedded embed.FS

// migrationTable is named so that packages with migrations of their own can
// share the database.
const migrationTable = "solstice_migrations"

// migrationLock is the key of the advisory lock under which PostgreSQL
// migrates: the bytes "solstice".
const migrationLock = 0x736f6c7374696365

// MigrationStatus is one migration and whether the database has it.
type MigrationStatus struct {
	Name    string
	Applied bool
}

// Migrate brings the database to the schema of this program. Several processes
// may do it at once. A SQLite file with an older schema is copied to
// FILE.MIGRATION.bak first, where MIGRATION is the last one it had.
func Migrate(ctx context.Context, db *bun.DB) error {
	s, err := newSchema(db, embedded)
	if err != nil {
		return err
	}
	return s.up(ctx)
}

// Rollback undoes all migrations, and with them all data.
func Rollback(ctx context.Context, db *bun.DB) error {
	s, err := newSchema(db, embedded)
	if err != nil {
		return err
	}
	return s.down(ctx)
}

// Status lists this program's migrations in order.
func Status(ctx context.Context, db *bun.DB) ([]MigrationStatus, error) {
	s, err := newSchema(db, embedded)
	if err != nil {
		return nil, err
	}
	return s.status(ctx)
}

// schema is a set of migrations and a database. Each migration and the record
// of it are one transaction, which both databases can do.
type schema struct {
	db       *bun.DB
	names    []string
	migrator *migrate.Migrator
}

func newSchema(db *bun.DB, files fs.FS) (*schema, error) {
	ups, err := fs.Glob(files, "migrations/*.up.sql")
	if err != nil {
		return nil, err
	}
	slices.Sort(ups)
	s := &schema{db: db}
	set := migrate.NewMigrations()
	for _, up := range ups {
		name := strings.TrimSuffix(strings.TrimPrefix(up, "migrations/"), ".up.sql")
		upSQL, err := s.load(files, up)
		if err != nil {
			return nil, err
		}
		downSQL, err := s.load(files, "migrations/"+name+".down.sql")
		if err != nil {
			return nil, err
		}
		s.names = append(s.names, name)
		set.Add(migrate.Migration{
			Name: name,
			Up: func(ctx context.Context, _ *migrate.Migrator, m *migrate.Migration) error {
				return s.run(ctx, name, false, upSQL, func(ctx context.Context, tx bun.Tx) error {
					_, err := tx.NewInsert().Model(m).ModelTableExpr(migrationTable).Exec(ctx)
					return err
				})
			},
			Down: func(ctx context.Context, _ *migrate.Migrator, m *migrate.Migration) error {
				return s.run(ctx, name, true, downSQL, func(ctx context.Context, tx bun.Tx) error {
					_, err := tx.NewDelete().Model(m).ModelTableExpr(migrationTable).Where("name = ?", name).Exec(ctx)
					return err
				})
			},
		})
	}
	s.migrator = migrate.NewMigrator(db, set, migrate.WithTableName(migrationTable), migrate.WithLocksTableName(migrationTable+"_locks"))
	return s, nil
}

// load fills in the few types that the two databases spell differently. Text
// compares by bytes on both.
func (s *schema) load(files fs.FS, path string) (string, error) {
	b, err := fs.ReadFile(files, path)
	if err != nil {
		return "", fmt.Errorf("store: migration: %w", err)
	}
	r := strings.NewReplacer("{{text}}", "TEXT", "{{bytes}}", "BLOB", "{{serial}}", "INTEGER PRIMARY KEY AUTOINCREMENT")
	if sqldb.IsPostgres(s.db) {
		r = strings.NewReplacer("{{text}}", `TEXT COLLATE "C"`, "{{bytes}}", "BYTEA", "{{serial}}", "BIGSERIAL PRIMARY KEY")
	}
	return r.Replace(string(b)), nil
}

// run executes one direction of a migration unless another process was faster.
func (s *schema) run(ctx context.Context, name string, applied bool, statements string, record func(context.Context, bun.Tx) error) error {
	return sqldb.InTx(ctx, s.db, func(ctx context.Context, tx bun.Tx) error {
		if err := s.lock(ctx, tx); err != nil {
			return err
		}
		has, err := tx.NewSelect().TableExpr(migrationTable).Where("name = ?", name).Exists(ctx)
		if err != nil || has != applied {
			return err
		}
		if _, err := tx.ExecContext(ctx, statements); err != nil {
			return err
		}
		return record(ctx, tx)
	})
}

// lock keeps other migrating processes out until the transaction's end; on
// SQLite the transaction itself does.
func (s *schema) lock(ctx context.Context, tx bun.Tx) error {
	if !sqldb.IsPostgres(s.db) {
		return nil
	}
	_, err := tx.NewRaw("SELECT pg_advisory_xact_lock(?)", int64(migrationLock)).Exec(ctx)
	return err
}

// init makes the table of applied migrations.
func (s *schema) init(ctx context.Context) error {
	return sqldb.InTx(ctx, s.db, func(ctx context.Context, tx bun.Tx) error {
		if err := s.lock(ctx, tx); err != nil {
			return err
		}
		_, err := tx.NewCreateTable().Model((*migrate.Migration)(nil)).ModelTableExpr(migrationTable).IfNotExists().Exec(ctx)
		return err
	})
}

func (s *schema) up(ctx context.Context) error {
	if err := s.init(ctx); err != nil {
		return fmt.Errorf("store: migrate: %w", err)
	}
	st, err := s.status(ctx)
	if err != nil {
		return err
	}
	last, pending := "", false
	for _, m := range st {
		if m.Applied {
			last = m.Name
		} else {
			pending = true
		}
	}
	if pending && last != "" && !sqldb.IsPostgres(s.db) {
		if err := s.backup(ctx, last); err != nil {
			return fmt.Errorf("store: copy the database before migrating: %w", err)
		}
	}
	if err := s.each(ctx, false); err != nil {
		return fmt.Errorf("store: migrate: %w", err)
	}
	if last == "" && pending {
		return s.install(ctx)
	}
	return nil
}

// install gives a new database its identity; the first process wins.
func (s *schema) install(ctx context.Context) error {
	_, err := s.db.NewRaw("INSERT INTO meta (key, value) VALUES ('installation', ?) ON CONFLICT (key) DO NOTHING", uuid.NewString()).Exec(ctx)
	if err != nil {
		return fmt.Errorf("store: migrate: %w", err)
	}
	return nil
}

func (s *schema) down(ctx context.Context) error {
	if err := s.init(ctx); err != nil {
		return fmt.Errorf("store: roll back: %w", err)
	}
	if err := s.each(ctx, true); err != nil {
		return fmt.Errorf("store: roll back: %w", err)
	}
	return nil
}

// each runs the migrations that are (down) or are not (up) applied. The
// migrator's own loop would record them apart from what they do.
func (s *schema) each(ctx context.Context, down bool) error {
	all, err := s.migrator.MigrationsWithStatus(ctx)
	if err != nil {
		return err
	}
	if down {
		slices.Reverse(all)
	}
	for i := range all {
		m := &all[i]
		f := m.Up
		if down {
			f = m.Down
		}
		if m.IsApplied() != down {
			continue
		}
		m.GroupID = 1
		if err := f(ctx, s.migrator, m); err != nil {
			return fmt.Errorf("%s: %w", m.Name, err)
		}
	}
	return nil
}

func (s *schema) status(ctx context.Context) ([]MigrationStatus, error) {
	applied, err := s.applied(ctx)
	if err != nil {
		return nil, err
	}
	var out []MigrationStatus
	for _, n := range s.names {
		out = append(out, MigrationStatus{Name: n, Applied: slices.Contains(applied, n)})
	}
	for _, n := range applied {
		if !slices.Contains(s.names, n) {
			return nil, fmt.Errorf("%w: the database has migration %s, which this program does not know: use a newer one", ErrSchema, n)
		}
	}
	return out, nil
}

// applied names the migrations that the database has; none when it is empty.
func (s *schema) applied(ctx context.Context) ([]string, error) {
	q := s.db.NewSelect().TableExpr("sqlite_master").Where("name = ?", migrationTable)
	if sqldb.IsPostgres(s.db) {
		q = s.db.NewSelect().TableExpr("pg_class").Where("oid = to_regclass(?)", migrationTable)
	}
	exists, err := q.Exists(ctx)
	if err != nil || !exists {
		return nil, err
	}
	var names []string
	err = s.db.NewSelect().TableExpr(migrationTable).Column("name").OrderBy("name", bun.OrderAsc).Scan(ctx, &names)
	return names, err
}

// check refuses a schema that is not exactly this program's.
func (s *schema) check(ctx context.Context) error {
	st, err := s.status(ctx)
	if err != nil {
		return err
	}
	for _, m := range st {
		if !m.Applied {
			return fmt.Errorf("%w: the database lacks migration %s: migrate it", ErrSchema, m.Name)
		}
	}
	return nil
}

// backup copies a SQLite file beside itself.
func (s *schema) backup(ctx context.Context, last string) error {
	var file string
	if err := s.db.NewRaw("SELECT file FROM pragma_database_list WHERE name = 'main'").Scan(ctx, &file); err != nil {
		return err
	}
	if file == "" {
		return nil // in memory
	}
	tmp := file + "." + uuid.NewString() + ".tmp"
	if _, err := s.db.NewRaw("VACUUM INTO ?", tmp).Exec(ctx); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	if err := os.Chmod(tmp, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, file+"."+last+".bak")
}
