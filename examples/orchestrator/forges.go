package main

import (
	"context"
	"net/http"

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
	for name, one := range set.Forges() {
		if cfg.Forges[name] != nil {
			return nil, usage("the forge "+name+" of --forges has the name of the repositories on this machine", nil, "give it another one")
		}
		cfg.Forges[name] = one
	}
	cfg.ReportedElsewhere = set.ReportedElsewhere()
	instances := set.Instances()
	if len(instances) == 0 {
		return nil, nil
	}
	in, err := integration.New(ctx, integration.Config{DB: cfg.DB, Queue: cfg.Queue, Forges: instances, Logger: cfg.Logger})
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
