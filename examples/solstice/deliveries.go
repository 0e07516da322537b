package main

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/alecthomas/kong"
	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/deliveries"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
)

// deliveriesCmd works on the database of whoever takes the webhooks.
type deliveriesCmd struct {
	daemon.State
	storage.Database
	deliveries.Commands
}

// AfterApply is kong's.
func (c *deliveriesCmd) AfterApply(k *kong.Context) error {
	k.Bind(deliveries.Opener(c.open))
	return nil
}

func (c *deliveriesCmd) open(ctx context.Context) (*bun.DB, error) {
	dir := ""
	if c.DatabaseURL == "" && c.DatabaseURLFile == "" {
		if c.StateDir != "" {
			if _, err := os.Stat(filepath.Join(c.StateDir, "solstice.db")); errors.Is(err, fs.ErrNotExist) {
				return nil, problem("there is no database in "+c.StateDir, nil, "give --state-dir of who takes the webhooks, or --database-url")
			}
		}
		var err error
		if dir, err = c.State.Open(); err != nil {
			return nil, err
		}
	}
	return c.Database.Open(ctx, dir, slog.New(slog.DiscardHandler))
}
