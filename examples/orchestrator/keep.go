package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/backup"
)

// retention are the flags of what is kept.
type retention struct {
	RetainRuns       daemon.Age `group:"Retention" env:"RETAIN_RUNS" default:"90d" placeholder:"AGE" help:"How long a run is kept after its end: 90d, 36h, forever."`
	RetainLogs       daemon.Age `group:"Retention" env:"RETAIN_LOGS" default:"30d" placeholder:"AGE" help:"How long its logs are."`
	RetainNewest     int        `group:"Retention" env:"RETAIN_NEWEST" default:"10" placeholder:"N" help:"Keep that many of a repository's runs, those that ended last, with their logs whatever their age."`
	RetainRunCount   int        `group:"Retention" env:"RETAIN_RUN_COUNT" default:"0" placeholder:"N" help:"Keep at most that many of a repository's runs that ended; 0: any number."`
	RetainLogCount   int        `group:"Retention" env:"RETAIN_LOG_COUNT" default:"0" placeholder:"N" help:"Keep the logs of at most that many; 0: any number."`
	RetainDeliveries daemon.Age `group:"Retention" env:"RETAIN_DELIVERIES" default:"14d" placeholder:"AGE" help:"How long messages are kept that cannot be delivered."`
}

func (r retention) rules() solstice.Retention {
	newest := r.RetainNewest
	if newest == 0 {
		newest = -1
	}
	return solstice.Retention{
		RunAge: time.Duration(r.RetainRuns), RunCount: r.RetainRunCount, LogAge: time.Duration(r.RetainLogs), LogCount: r.RetainLogCount,
		Newest: newest, DeliveryAge: time.Duration(r.RetainDeliveries),
	}
}

// Validate is kong's; what it refuses is a mistake of the command line.
func (r *retention) Validate() error {
	for _, age := range []struct {
		flag string
		is   daemon.Age
	}{{"retain-runs", r.RetainRuns}, {"retain-logs", r.RetainLogs}, {"retain-deliveries", r.RetainDeliveries}} {
		if age.is > 0 && time.Duration(age.is) < solstice.MinRetention {
			return fmt.Errorf("--%s is %s: it is at least %s", age.flag, age.is, solstice.MinRetention)
		}
	}
	if r.RetainNewest < 0 || r.RetainRunCount < 0 || r.RetainLogCount < 0 {
		return errors.New("--retain-newest, --retain-run-count or --retain-log-count is negative")
	}
	return nil
}

type backupFlags struct {
	File string `arg:"" help:"To be written; it must not exist."`
}

type restoreFlags struct {
	File string `arg:"" help:"Of an earlier backup."`
}

// backup copies the state, whether an orchestrator runs on it or not.
func (f *flags) backup(ctx context.Context) error {
	if f.DatabaseURL == "" && f.DatabaseURLFile == "" {
		if _, err := os.Stat(filepath.Join(f.StateDir, "solstice.db")); err != nil { // to open it would make it
			return problem("there is no state to back up", err, "give the --state-dir of an orchestrator")
		}
	}
	db, err := f.Database.Open(ctx, f.StateDir, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	info, err := backup.Create(ctx, f.Backup.File, backup.Source{StateDir: f.StateDir, DB: db})
	if err = errors.Join(err, db.Close()); err != nil {
		return err
	}
	fmt.Printf("%s: %d files, %d bytes. It holds secrets: tokens' hashes, the admin token, the key of the certificate authority.\n", f.Backup.File, info.Files, info.Bytes)
	return nil
}

// restore makes a state directory of a backup.
func (f *flags) restore(ctx context.Context) error {
	if f.StateDir == "" {
		return usage("there is no state directory", nil, "give --state-dir")
	}
	if f.DatabaseURL != "" || f.DatabaseURLFile != "" {
		return usage("a backup is restored with its database into the state directory", nil, "leave --database-url away")
	}
	info, err := backup.Restore(ctx, f.Restore.File, f.StateDir)
	if err != nil {
		return err
	}
	fmt.Printf("%s: %d files, as of %s. Do not run it beside the orchestrator that it is a copy of.\n", f.StateDir, info.Files, info.CreatedAt.Format(time.RFC3339))
	return nil
}
