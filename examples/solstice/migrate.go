package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
)

type migrateCmd struct {
	Init     migrateInitCmd     `cmd:"" help:"Make the table that records which migrations are applied."`
	Generate migrateGenerateCmd `cmd:"" help:"For developers: write the files of a new migration into the source tree."`
	Up       migrateUpCmd       `cmd:"" help:"Bring the database to this version's schema."`
	Down     migrateDownCmd     `cmd:"" help:"Reverse the migrations that were applied last together."`
	Status   migrateStatusCmd   `cmd:"" help:"List the migrations, and which the database has."`
}

// database are the flags of commands that work on the state itself, while no
// orchestrator does.
type database struct {
	daemon.State
	storage.Database
}

// open locks the state directory, where the database is in it, and gives the
// migrations.
func (d *database) open(ctx context.Context, alone bool, do func(*solstice.Migrations) error) (err error) {
	// In the words of couldNot: nothing here is a job that failed.
	defer func() { err = couldNot(err) }()
	dir := ""
	if d.DatabaseURL == "" && d.DatabaseURLFile == "" {
		if dir, err = d.State.Open(); err != nil {
			return err
		}
		if alone {
			unlock, err := storage.Lock(dir, "orchestrator")
			if err != nil {
				return err
			}
			defer func() { _ = unlock() }() // as the end of this process does
		}
	}
	db, err := d.Database.Open(ctx, dir, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	m, err := solstice.OpenMigrations(db)
	if err != nil {
		return err
	}
	err = do(m)
	switch {
	case errors.Is(err, solstice.ErrIrreversible):
		return problem("nothing was reversed", err, "restore a backup that was made before, or write the statements of its .down.sql")
	case errors.Is(err, solstice.ErrSchema):
		return problem("the database is of a newer version", err, "use that version's solstice")
	case err != nil:
		if _, ok := errors.AsType[*daemon.Problem](err); ok {
			return err
		}
		return problem("cannot migrate the database", err, "")
	}
	return nil
}

func report(what string, names []string) {
	if len(names) == 0 {
		fmt.Printf("nothing %s\n", what)
	}
	for _, n := range names {
		fmt.Printf("%s %s\n", what, n)
	}
}

type migrateInitCmd struct{ database }

// Run is kong's.
func (c *migrateInitCmd) Run(e *env) error {
	return c.open(e.ctx, true, func(m *solstice.Migrations) error { return m.Init(e.ctx) })
}

type migrateUpCmd struct{ database }

// Help is kong's.
func (migrateUpCmd) Help() string {
	return `Stop the orchestrators first, and make a backup; a SQLite file is copied beside itself as well.`
}

// Run is kong's.
func (c *migrateUpCmd) Run(e *env) error {
	return c.open(e.ctx, true, func(m *solstice.Migrations) error {
		names, err := m.Up(e.ctx)
		if err == nil || len(names) > 0 {
			report("applied", names)
		}
		return err
	})
}

type migrateDownCmd struct{ database }

// Help is kong's.
func (migrateDownCmd) Help() string {
	return `What a migration made goes with what is in it: reversing the first one leaves nothing. Stop the orchestrators first, and make a backup; a SQLite file is copied beside itself as well.`
}

// Run is kong's.
func (c *migrateDownCmd) Run(e *env) error {
	return c.open(e.ctx, true, func(m *solstice.Migrations) error {
		names, err := m.Down(e.ctx)
		if err == nil || len(names) > 0 {
			report("reversed", names)
		}
		return err
	})
}

type migrateStatusCmd struct {
	database
	output
}

// Help is kong's.
func (migrateStatusCmd) Help() string {
	return `The exit status is 0 when the database has this version's schema, 1 when it lacks a migration, 2 when it is a newer one's or cannot be asked.`
}

// Run is kong's.
func (c *migrateStatusCmd) Run(e *env) error {
	pending := false
	err := c.open(e.ctx, false, func(m *solstice.Migrations) error {
		st, err := m.Status(e.ctx)
		if err != nil {
			return err
		}
		pending = slices.ContainsFunc(st, func(m solstice.Migration) bool { return !m.Applied })
		if c.JSON {
			return document(struct {
				Migrations []solstice.Migration `json:"migrations"`
			}{st})
		}
		out, t := c.screen(), table{}
		out.header(&t, "MIGRATION", "STATE", "GROUP", "APPLIED")
		for _, m := range st {
			if m.Applied {
				t.row(m.Name, "applied", fmt.Sprint(m.Group), m.AppliedAt.Format(time.RFC3339))
			} else {
				t.row(m.Name, "pending", "", "")
			}
		}
		t.print(out, "")
		return nil
	})
	if err == nil && pending {
		return exit(exitFailed)
	}
	return err
}

type migrateGenerateCmd struct {
	Name string `arg:"" help:"What the migration does, such as add_labels."`
	Dir  string `default:"internal/store/migrations" placeholder:"DIR" help:"Directory of the migrations in the source tree (${default})."`
}

var migrationName = regexp.MustCompile(`^[a-z][a-z0-9_]{0,60}$`)

// Run is kong's.
func (c *migrateGenerateCmd) Run(*env) error {
	if !migrationName.MatchString(c.Name) {
		return unable(fmt.Sprintf("%q is no name for a migration", c.Name), nil, "use small letters, digits and _")
	}
	have, err := filepath.Glob(filepath.Join(c.Dir, "*.up.sql"))
	if err == nil && len(have) == 0 {
		err = fmt.Errorf("there are no migrations in %s", c.Dir)
	}
	if err != nil {
		return unable("cannot find the migrations", err, "run this at the top of the source tree, or give --dir")
	}
	stem := time.Now().UTC().Format("20060102150405") + "_" + c.Name
	if last := strings.TrimSuffix(filepath.Base(slices.Max(have)), ".up.sql"); stem <= last {
		return unable("the new migration would come before "+last, nil, "correct this machine's clock")
	}
	for suffix, text := range map[string]string{
		".up.sql":   "-- What it is for. {{text}}, {{bytes}} and {{serial}} stand for what the databases\n-- spell differently.\n",
		".down.sql": "-- The way back. Without a statement there is none.\n",
	} {
		name := filepath.Join(c.Dir, stem+suffix)
		f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if err != nil {
			return unable("cannot write the migration", err, "")
		}
		_, err = f.WriteString(text)
		if err = errors.Join(err, f.Close()); err != nil {
			return unable("cannot write the migration", err, "")
		}
	}
	fmt.Println(filepath.Join(c.Dir, stem+".up.sql"))
	fmt.Println(filepath.Join(c.Dir, stem+".down.sql"))
	return nil
}

type refreshCmd struct {
	Yes bool `help:"Really delete all runs, logs' places, tokens and machines' records."`
	database
}

// Help is kong's.
func (refreshCmd) Help() string {
	return `For development: reverses all migrations, and with them deletes all that is in the database, and applies them again. A SQLite file is copied beside itself first. Messages in the queue stay, and find nothing.`
}

// Run is kong's.
func (c *refreshCmd) Run(e *env) error {
	if !c.Yes {
		return unable("refresh deletes everything in the database", nil, "give --yes if you are sure; it is for development only")
	}
	return c.open(e.ctx, true, func(m *solstice.Migrations) error {
		names, err := m.Reset(e.ctx)
		if err != nil {
			return err
		}
		report("reversed", names)
		if names, err = m.Up(e.ctx); err == nil {
			report("applied", names)
		}
		return err
	})
}
