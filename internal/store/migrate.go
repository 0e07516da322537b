package store

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

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

// ErrIrreversible: a migration has no way back.
var ErrIrreversible = errors.New("store: migration cannot be reversed")

// MigrationStatus is one migration and whether the database has it. Those
// applied together are a group, numbered from 1.
type MigrationStatus struct {
	Name      string
	Applied   bool
	Group     int64
	AppliedAt time.Time
}

// Migrate brings the database to the schema of this program. Several processes
// may do it at once. A SQLite file with an older schema is copied to
// FILE.MIGRATION.bak first, where MIGRATION is the last one it had.
func Migrate(ctx context.Context, db *bun.DB) error {
	s, err := newSchema(db, embedded)
	if err != nil {
		return err
	}
	_, err = s.up(ctx)
	return err
}

// Migrations are this program's migrations and a database.
type Migrations struct{ s *schema }

// NewMigrations does not touch the database.
func NewMigrations(db *bun.DB) (*Migrations, error) {
	s, err := newSchema(db, embedded)
	return &Migrations{s}, err
}

// Init makes the table that records what is applied.
func (m *Migrations) Init(ctx context.Context) error { return m.s.init(ctx) }

// Status lists all migrations in order.
func (m *Migrations) Status(ctx context.Context) ([]MigrationStatus, error) { return m.s.status(ctx) }

// Up is Migrate, and names what it applied.
func (m *Migrations) Up(ctx context.Context) ([]string, error) { return m.s.up(ctx) }

// Down reverses the newest group, and names what it reversed, newest first.
// When one of the group cannot be, none is: ErrIrreversible. A SQLite file is
// copied first, as Migrate does.
func (m *Migrations) Down(ctx context.Context) ([]string, error) { return m.s.down(ctx, false) }

// Reset reverses all, and with them all data.
func (m *Migrations) Reset(ctx context.Context) ([]string, error) { return m.s.down(ctx, true) }

// schema is a set of migrations and a database. Each migration and the record
// of it are one transaction, which both databases can do.
type schema struct {
	db       *bun.DB
	names    []string
	noReturn map[string]bool // migrations without a statement for the way back
	migrator *migrate.Migrator
}

func newSchema(db *bun.DB, files fs.FS) (*schema, error) {
	ups, err := fs.Glob(files, "migrations/*.up.sql")
	if err != nil {
		return nil, err
	}
	slices.Sort(ups)
	s := &schema{db: db, noReturn: map[string]bool{}}
	set := migrate.NewMigrations()
	for _, up := range ups {
		name := strings.TrimSuffix(strings.TrimPrefix(up, "migrations/"), ".up.sql")
		upSQL, err := s.load(files, up)
		if err != nil {
			return nil, err
		}
		downSQL, err := s.load(files, "migrations/"+name+".down.sql")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		s.noReturn[name] = !hasStatement(downSQL)
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

// hasStatement reports whether there is more than comments.
func hasStatement(sql string) bool {
	for line := range strings.Lines(sql) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "--") {
			return true
		}
	}
	return false
}

// run executes one direction of a migration unless another process was faster.
func (s *schema) run(ctx context.Context, name string, applied bool, statements string, record func(context.Context, bun.Tx) error) error {
	step := func(ctx context.Context, tx bun.Tx) error {
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
	}
	err := sqldb.InTx(ctx, s.db, step)
	return sqldb.Settle(ctx, err, settlePatience, func(ctx context.Context) error { return sqldb.InTx(ctx, s.db, step) })
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

func (s *schema) up(ctx context.Context) ([]string, error) {
	if err := s.init(ctx); err != nil {
		return nil, fmt.Errorf("store: migrate: %w", err)
	}
	st, err := s.status(ctx)
	if err != nil {
		return nil, err
	}
	last, group := lastOf(st)
	var pending []string
	for _, m := range st {
		if !m.Applied {
			pending = append(pending, m.Name)
		}
	}
	if len(pending) > 0 && last != "" {
		if err := s.backup(ctx, last); err != nil {
			return nil, fmt.Errorf("store: copy the database before migrating: %w", err)
		}
	}
	done, err := s.each(ctx, pending, false, group+1)
	if err != nil {
		return done, fmt.Errorf("store: migrate: %w", err)
	}
	if last == "" && len(pending) > 0 {
		err = s.install(ctx)
	}
	return done, err
}

// lastOf gives the last migration that is applied, and the newest group.
func lastOf(st []MigrationStatus) (last string, group int64) {
	for _, m := range st {
		if m.Applied {
			last, group = m.Name, max(group, m.Group)
		}
	}
	return last, group
}

// install gives a new database its identity; the first process wins.
func (s *schema) install(ctx context.Context) error {
	_, err := s.db.NewRaw("INSERT INTO meta (key, value) VALUES ('installation', ?) ON CONFLICT (key) DO NOTHING", uuid.NewString()).Exec(ctx)
	if err != nil {
		return fmt.Errorf("store: migrate: %w", err)
	}
	return nil
}

func (s *schema) down(ctx context.Context, all bool) ([]string, error) {
	st, err := s.status(ctx)
	if err != nil {
		return nil, err
	}
	last, group := lastOf(st)
	var names, stuck []string
	for _, m := range slices.Backward(st) {
		if !m.Applied || !all && m.Group != group {
			continue
		}
		names = append(names, m.Name)
		if s.noReturn[m.Name] {
			stuck = append(stuck, m.Name)
		}
	}
	switch {
	case len(names) == 0:
		return nil, nil
	case len(stuck) > 0:
		return nil, fmt.Errorf("%w: %s", ErrIrreversible, strings.Join(stuck, ", "))
	}
	if err := s.backup(ctx, last); err != nil {
		return nil, fmt.Errorf("store: copy the database before rolling back: %w", err)
	}
	done, err := s.each(ctx, names, true, 0)
	if err != nil {
		return done, fmt.Errorf("store: roll back: %w", err)
	}
	return done, nil
}

// each runs the migrations of these names, in their order. The migrator's own
// loop would record them apart from what they do.
func (s *schema) each(ctx context.Context, names []string, down bool, group int64) (done []string, err error) {
	all, err := s.migrator.MigrationsWithStatus(ctx)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		i := slices.IndexFunc(all, func(m migrate.Migration) bool { return m.Name == name })
		m := &all[i]
		f := m.Up
		if down {
			f = m.Down
		} else {
			m.GroupID = group
		}
		if err := f(ctx, s.migrator, m); err != nil {
			return done, fmt.Errorf("%s: %w", name, err)
		}
		done = append(done, name)
	}
	return done, nil
}

func (s *schema) status(ctx context.Context) ([]MigrationStatus, error) {
	applied, err := s.applied(ctx)
	if err != nil {
		return nil, err
	}
	var out []MigrationStatus
	for _, n := range s.names {
		m := MigrationStatus{Name: n}
		if row, ok := applied[n]; ok {
			m.Applied, m.Group, m.AppliedAt = true, row.GroupID, row.MigratedAt.UTC()
		}
		out = append(out, m)
	}
	for _, n := range slices.Sorted(maps.Keys(applied)) {
		if !slices.Contains(s.names, n) {
			return nil, fmt.Errorf("%w: the database has migration %s, which this program does not know: use a newer one", ErrSchema, n)
		}
	}
	return out, nil
}

// applied are the migrations that the database has, by name; none when it is
// empty.
func (s *schema) applied(ctx context.Context) (map[string]migrate.Migration, error) {
	q := s.db.NewSelect().TableExpr("sqlite_master").Where("name = ?", migrationTable)
	if sqldb.IsPostgres(s.db) {
		q = s.db.NewSelect().TableExpr("pg_class").Where("oid = to_regclass(?)", migrationTable)
	}
	exists, err := q.Exists(ctx)
	if err != nil || !exists {
		return nil, err
	}
	var rows []migrate.Migration
	if err := s.db.NewSelect().Model(&rows).ModelTableExpr(migrationTable + " AS migration").Scan(ctx); err != nil {
		return nil, err
	}
	out := map[string]migrate.Migration{}
	for _, r := range rows {
		out[r.Name] = r
	}
	return out, nil
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

// backup copies a SQLite file beside itself; last is the migration it has.
func (s *schema) backup(ctx context.Context, last string) error {
	if sqldb.IsPostgres(s.db) {
		return nil
	}
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
	// Another process that migrates may have been faster, and has its own copy.
	is, err := lastIn(ctx, tmp)
	if err != nil || is != last {
		return errors.Join(err, os.Remove(tmp))
	}
	return os.Rename(tmp, file+"."+last+".bak")
}

// lastIn names the last migration that a SQLite file has.
func lastIn(ctx context.Context, file string) (string, error) {
	db, err := sqldb.Open(ctx, "sqlite:"+file, sqldb.Options{MaxConns: 1})
	if err != nil {
		return "", err
	}
	last, err := SchemaOf(ctx, db)
	return last, errors.Join(err, db.Close())
}
