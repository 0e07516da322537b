// Package deliveries has the commands list, show and replay, which work on the
// webhooks that came: for the programs that take them, and for others that reach the
// same database, also while it is in use.
package deliveries

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/show"
	"github.com/solstice-ci/solstice-go/solstice/integration"
	"github.com/solstice-ci/solstice-go/solstice/logtext"
)

// Commands are commands for kong. Their Run methods need a context.Context and an
// Opener to be bound.
type Commands struct {
	List   ListCmd   `cmd:"" help:"List webhooks, newest first, with what became of them."`
	Show   ShowCmd   `cmd:"" help:"Show a webhook with its event, or its body."`
	Replay ReplayCmd `cmd:"" help:"Have what a webhook asked for done once more."`
}

// Opener opens the database of who takes the webhooks.
type Opener func(context.Context) (*bun.DB, error)

func (open Opener) with(ctx context.Context, do func(*integration.Deliveries) error) (err error) {
	// It says nothing about a job: with the status of what could not be done.
	defer func() {
		if _, ok := errors.AsType[*daemon.ExitError](err); !ok && err != nil {
			err = &daemon.ExitError{Code: daemon.ExitUsage, Err: err}
		}
	}()
	db, err := open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	d, err := integration.OpenDeliveries(ctx, db)
	switch {
	case errors.Is(err, solstice.ErrSchema):
		return &daemon.Problem{What: "the database's schema is not this version's", Err: err, Advice: "use a program of the same version as who takes the webhooks"}
	case err != nil:
		return &daemon.Problem{What: "cannot open the state", Err: err}
	}
	failed := func(what string, err error, advice string) error {
		return &daemon.ExitError{Code: daemon.ExitFailure, Err: &daemon.Problem{What: what, Err: err, Advice: advice}}
	}
	err = do(d)
	switch {
	case errors.Is(err, integration.ErrNotFound):
		return failed("there is no such webhook", nil, "deliveries list shows those that there are; retention removes them after a while")
	case errors.Is(err, integration.ErrInvalid):
		return failed("it cannot be replayed", err, "")
	}
	return err
}

// ListCmd is list.
type ListCmd struct {
	show.Output
	Forge string `placeholder:"NAME" help:"Only those of this forge."`
	Limit int    `short:"n" default:"50" placeholder:"N" help:"At most this many, at most 500 (${default})."`
	Page  string `placeholder:"ID" help:"Go on after this one: the last of the list before."`
}

// Run is kong's.
func (c *ListCmd) Run(ctx context.Context, open Opener) error {
	if c.Limit < 1 {
		return &daemon.ExitError{Code: daemon.ExitUsage, Err: &daemon.Problem{What: "--limit is not positive"}}
	}
	return open.with(ctx, func(d *integration.Deliveries) error {
		list, err := d.List(ctx, integration.DeliveryFilter{Forge: c.Forge, Limit: c.Limit, Before: c.Page})
		if err != nil {
			return err
		}
		if c.JSON {
			return show.Document(struct {
				Deliveries []integration.Delivery `json:"deliveries"`
			}{list})
		}
		var t show.Table
		c.Header(&t, "ID", "TIME", "FORGE", "EVENT", "REPOSITORY", "STATE", "")
		for _, x := range list {
			t.Row(x.ID, x.ReceivedAt.Format(time.RFC3339), logtext.Plain(x.Forge), logtext.Plain(string(x.Kind)), logtext.Plain(x.Repo), x.State, logtext.Plain(x.Reason+prefixed("replay of ", x.ReplayOf)))
		}
		return t.Print(os.Stdout)
	})
}

// ShowCmd is show.
type ShowCmd struct {
	show.Output
	ID   string `arg:"" help:"ID of the webhook."`
	Body bool   `help:"Print its body, byte for byte."`
}

// Run is kong's.
func (c *ShowCmd) Run(ctx context.Context, open Opener) error {
	return open.with(ctx, func(d *integration.Deliveries) error {
		x, err := d.Get(ctx, c.ID)
		switch {
		case err != nil:
			return err
		case c.Body:
			_, err := os.Stdout.Write(x.Body)
			return err
		case c.JSON:
			return show.Document(x)
		}
		return c.table(x).Print(os.Stdout)
	})
}

func (c *ShowCmd) table(x integration.Delivery) *show.Table {
	t := &show.Table{}
	rows := [][2]string{
		{"id", x.ID},
		{"forge", x.Forge},
		{"delivery", x.Delivery},
		{"time", x.ReceivedAt.Format(time.RFC3339)},
		{"state", x.State + prefixed(": ", x.Reason)},
		{"replay of", x.ReplayOf},
		{"event", string(x.Kind)},
		{"repository", x.Repo},
	}
	if ev := x.Event; ev != nil {
		rows = append(rows, [2]string{"ref", ev.Ref}, [2]string{"commit", ev.Commit},
			[2]string{"by", ev.Sender.Login + prefixed(", user ", ev.Sender.ID)}, [2]string{"title", ev.Title})
	}
	for _, name := range slices.Sorted(maps.Keys(x.Headers)) {
		rows = append(rows, [2]string{name, x.Headers[name]})
	}
	rows = append(rows, [2]string{"body", fmt.Sprintf("%d bytes, see --body", len(x.Body))})
	for _, row := range rows {
		if row[1] != "" {
			t.Row(c.Faint(logtext.Plain(row[0])), logtext.Plain(row[1]))
		}
	}
	return t
}

// ReplayCmd is replay.
type ReplayCmd struct {
	show.Output
	ID string `arg:"" help:"ID of the webhook."`
}

// Run is kong's.
func (c *ReplayCmd) Run(ctx context.Context, open Opener) error {
	return open.with(ctx, func(d *integration.Deliveries) error {
		x, err := d.Replay(ctx, c.ID)
		if err != nil {
			return err
		}
		if c.JSON {
			return show.Document(x)
		}
		_, err = fmt.Fprintf(os.Stdout, "replayed as %s\n", x.ID)
		return err
	})
}

func prefixed(prefix, s string) string {
	if s == "" {
		return ""
	}
	return prefix + s
}
