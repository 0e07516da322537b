package main

import (
	"context"
	"net/http"

	"go.opentelemetry.io/otel"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/daemon/forges"
	"github.com/solstice-ci/solstice-go/solstice/integration"
)

// forgesOfFile opens the forges of --forges beside the local repositories, and gives
// what takes their webhooks; nil: nothing.
func (f *flags) forgesOfFile(ctx context.Context, dir string, cfg *solstice.Config, open *closers) (*integration.Integration, error) {
	file, err := forges.ReadFile(f.Forges)
	if err != nil {
		return nil, usage("the file of --forges cannot be used", err, "docs/forges.md describes it")
	}
	set, err := file.Open(ctx, forges.Options{StateDir: dir, Logger: cfg.Logger})
	if err != nil {
		return nil, problem("cannot open the forges of --forges", err, "")
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

// webhooks serves those of the forges where there are such.
func webhooks(mux *http.ServeMux, in *integration.Integration) {
	if in != nil {
		mux.Handle("/webhooks/", in)
	}
}
