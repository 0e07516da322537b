package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
	"github.com/solstice-ci/solstice-go/solstice/integration"
)

type deliveriesCmd struct {
	List   deliveriesListCmd   `cmd:"" help:"List webhooks, newest first, with what became of them."`
	Show   deliveriesShowCmd   `cmd:"" help:"Show a webhook with its event, or its body."`
	Replay deliveriesReplayCmd `cmd:"" help:"Have what a webhook asked for done once more."`
}

// hooks are the flags of commands that work on the database of whoever takes the
// webhooks, which may be in use.
type hooks struct {
	daemon.State
	storage.Database
	output
}

func (h *hooks) open(ctx context.Context, do func(*integration.Deliveries) error) (err error) {
	defer func() { err = couldNot(err) }()
	dir := ""
	if h.DatabaseURL == "" && h.DatabaseURLFile == "" {
		if h.StateDir != "" {
			if _, err := os.Stat(filepath.Join(h.StateDir, "solstice.db")); errors.Is(err, fs.ErrNotExist) {
				return unable("there is no database in "+h.StateDir, nil, "give --state-dir of who takes the webhooks, or --database-url")
			}
		}
		if dir, err = h.State.Open(); err != nil {
			return err
		}
	}
	db, err := h.Database.Open(ctx, dir, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	d, err := integration.OpenDeliveries(ctx, db)
	switch {
	case errors.Is(err, solstice.ErrSchema):
		return unable("the database's schema is not this version's", err, "use the solstice of the same version as who takes the webhooks")
	case err != nil:
		return unable("cannot open the state", err, "")
	}
	err = do(d)
	switch {
	case errors.Is(err, integration.ErrNotFound):
		return exitWith(exitFailed, problem("there is no such webhook", nil, "solstice deliveries list shows those that there are; retention removes them after a while"))
	case errors.Is(err, integration.ErrInvalid):
		return exitWith(exitFailed, problem("it cannot be replayed", err, ""))
	}
	return err
}

type deliveriesListCmd struct {
	hooks
	Forge string `placeholder:"NAME" help:"Only those of this forge."`
	Limit int    `short:"n" default:"50" placeholder:"N" help:"At most this many, at most 500 (${default})."`
	Page  string `placeholder:"ID" help:"Go on after this one: the last of the list before."`
}

// Run is kong's.
func (c *deliveriesListCmd) Run(e *env) error {
	if c.Limit < 1 {
		return unable("--limit is not positive", nil, "")
	}
	return c.open(e.ctx, func(d *integration.Deliveries) error {
		list, err := d.List(e.ctx, integration.DeliveryFilter{Forge: c.Forge, Limit: c.Limit, Before: c.Page})
		if err != nil {
			return err
		}
		if c.JSON {
			return document(struct {
				Deliveries []integration.Delivery `json:"deliveries"`
			}{list})
		}
		out, t := c.screen(), table{}
		out.header(&t, "ID", "TIME", "FORGE", "EVENT", "REPOSITORY", "STATE", "")
		for _, x := range list {
			t.row(x.ID, x.ReceivedAt.Format(time.RFC3339), plain(x.Forge), plain(string(x.Kind)), plain(x.Repo), x.State, plain(x.Reason+prefixed("replay of ", x.ReplayOf)))
		}
		t.print(out, "")
		return nil
	})
}

type deliveriesShowCmd struct {
	hooks
	ID   string `arg:"" help:"ID of the webhook."`
	Body bool   `help:"Print its body, byte for byte."`
}

// Run is kong's.
func (c *deliveriesShowCmd) Run(e *env) error {
	return c.open(e.ctx, func(d *integration.Deliveries) error {
		x, err := d.Get(e.ctx, c.ID)
		switch {
		case err != nil:
			return err
		case c.Body:
			_, err := os.Stdout.Write(x.Body)
			return printed(err)
		case c.JSON:
			return document(x)
		}
		out, t := c.screen(), table{}
		for _, row := range [][2]string{
			{"id", x.ID},
			{"forge", x.Forge},
			{"delivery", x.Delivery},
			{"time", x.ReceivedAt.Format(time.RFC3339)},
			{"state", x.State + prefixed(": ", x.Reason)},
			{"replay of", x.ReplayOf},
			{"event", string(x.Kind)},
			{"repository", x.Repo},
		} {
			if row[1] != "" {
				t.row(out.faint(row[0]), plain(row[1]))
			}
		}
		if ev := x.Event; ev != nil {
			for _, row := range [][2]string{{"ref", ev.Ref}, {"commit", ev.Commit}, {"by", ev.Sender.Login + prefixed(", user ", ev.Sender.ID)}, {"title", ev.Title}} {
				if row[1] != "" {
					t.row(out.faint(row[0]), plain(row[1]))
				}
			}
		}
		for _, name := range slices.Sorted(maps.Keys(x.Headers)) {
			t.row(out.faint(plain(name)), plain(x.Headers[name]))
		}
		t.row(out.faint("body"), fmt.Sprintf("%d bytes, see --body", len(x.Body)))
		t.print(out, "")
		return nil
	})
}

type deliveriesReplayCmd struct {
	hooks
	ID string `arg:"" help:"ID of the webhook."`
}

// Run is kong's.
func (c *deliveriesReplayCmd) Run(e *env) error {
	return c.open(e.ctx, func(d *integration.Deliveries) error {
		x, err := d.Replay(e.ctx, c.ID)
		if err != nil {
			return err
		}
		if c.JSON {
			return document(x)
		}
		_, err = fmt.Printf("replayed as %s\n", x.ID)
		return printed(err)
	})
}
