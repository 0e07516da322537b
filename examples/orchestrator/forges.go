package main

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"

	"github.com/uptrace/bun"
	"go.opentelemetry.io/otel"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/daemon/forges"
	"github.com/solstice-ci/solstice-go/solstice/integration"
)

// forgesOfFile opens the forges of --forges beside the local repositories, and gives
// what takes their webhooks; nil: nothing.
func (f *flags) forgesOfFile(ctx context.Context, dir string, cfg *solstice.Config, open *closers) (*integration.Integration, error) {
	set, err := f.openForges(ctx, dir, cfg.Logger)
	if err != nil {
		return nil, err
	}
	open.add(set.Close)
	for _, one := range set.All() {
		switch {
		case cfg.Forges[one.Name] != nil:
			return nil, usage("the forge "+one.Name+" of --forges has the name of the repositories on this machine", nil, "give it another one")
		case one.Serve != "":
			return nil, usage("the orchestrator serves no forge to others, as serve of "+one.Name+" in --forges says", nil, "leave it to forge-integration")
		}
		cfg.Forges[one.Name] = one.Forge
	}
	cfg.ReportedElsewhere = set.OwnedElsewhere()
	instances := set.Instances()
	if len(instances) == 0 {
		return nil, nil
	}
	in, err := integration.New(ctx, integration.Config{
		DB: cfg.DB, Queue: cfg.Queue, Forges: instances, Logger: cfg.Logger,
		TracerProvider: otel.GetTracerProvider(), MeterProvider: otel.GetMeterProvider(),
	})
	if err != nil {
		return nil, problem("cannot take webhooks", err, "")
	}
	return in, nil
}

func (f *flags) openForges(ctx context.Context, dir string, log *slog.Logger) (*forges.Set, error) {
	file, err := forges.ReadFile(f.Forges)
	if err != nil {
		return nil, usage("the file of --forges cannot be used", err, "docs/forges.md describes it")
	}
	set, err := file.Open(ctx, forges.Options{StateDir: dir, Logger: log})
	if err != nil {
		return nil, problem("cannot open the forges of --forges", err, "")
	}
	return set, nil
}

// check says what is wrong with the forges, also while the orchestrator runs.
func (f *flags) check(ctx context.Context) (err error) {
	if f.Forges == "" {
		return usage("there are no forges to look at", nil, "give --forges FILE; docs/forges.md describes it")
	}
	log := slog.New(slog.DiscardHandler)
	set, err := f.openForges(ctx, f.StateDir, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, set.Close()) }()
	var db *bun.DB
	file, err := f.Database.Dir(f.StateDir)
	if err != nil {
		return err
	}
	_, err = os.Stat(filepath.Join(file, "solstice.db"))
	if own := f.DatabaseURL == "" && f.DatabaseURLFile == ""; !own || err == nil { // otherwise it never ran, and looking makes none
		if db, err = f.Database.Open(ctx, f.StateDir, log); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, db.Close()) }()
	}
	own := slices.DeleteFunc(set.All(), func(one forges.Forge) bool { return one.OwnedElsewhere })
	return f.Check.Print(f.Check.Look(ctx, db, own, func(forge string) string { return "/webhooks/" + forge }))
}

// webhooks serves those of the forges where there are such.
func webhooks(mux *http.ServeMux, in *integration.Integration) {
	if in != nil {
		mux.Handle("/webhooks/", in)
	}
}
