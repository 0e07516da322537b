package forgedaemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/forges"
	"github.com/solstice-ci/solstice-go/solstice/daemon/show"
	"github.com/solstice-ci/solstice-go/solstice/integration"
	"github.com/solstice-ci/solstice-go/solstice/logtext"
)

// checkTimeout is how long a forge has to answer all that is asked.
const checkTimeout = time.Minute

// checkCmd says in words what is wrong.
type checkCmd struct {
	WebhookURL string `name:"webhook-url" env:"WEBHOOK_URL" placeholder:"URL" help:"Public address that webhooks are to be sent to, such as https://ci.example.org, to which the path is appended. Without it the forges' webhooks are not looked for."`
	show.Output
}

// Help is kong's.
func (checkCmd) Help() string {
	return `Looks and changes nothing, also while the daemon runs. Of the repositories those are looked at that are on the allow-lists by their full names. The exit status is 1 when something is wrong.`
}

// finding is a line.
type finding struct {
	Forge  string      `json:"forge,omitempty"` // empty: the daemon itself
	Level  forge.Level `json:"level"`
	What   string      `json:"what"`
	Advice string      `json:"advice,omitempty"`
}

// findings of one forge, or of the daemon.
type findings struct {
	forge string
	all   []finding
}

func (f *findings) add(level forge.Level, what, advice string) {
	f.all = append(f.all, finding{f.forge, level, what, advice})
}

// failed adds an error as the daemon would end with it.
func (f *findings) failed(what string, err error) {
	advice := daemon.Advice(err)
	if p, ok := errors.AsType[*daemon.Problem](err); ok {
		advice = cmp.Or(p.Advice, advice)
	}
	f.add(forge.LevelFailure, what+": "+err.Error(), advice)
}

// Run is kong's.
func (c *checkCmd) Run(ctx context.Context, d *Daemon) (err error) {
	if u, err := url.Parse(c.WebhookURL); c.WebhookURL != "" && (err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http") {
		return usage(fmt.Sprintf("--webhook-url %q is no address", c.WebhookURL), nil, "give one like https://ci.example.org")
	}
	all, closeAll, err := d.Open(ctx, d.Flags.StateDir, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeAll()) }()
	own := &findings{}
	last := d.checkParts(ctx, own, all)
	for _, one := range all {
		found := &findings{forge: one.Name}
		c.checkForge(ctx, found, one, d.webhookPath(one.Name))
		switch came, ok := last[one.Name]; {
		case ok && came.IsZero():
			found.add(forge.LevelWarning, "no webhook is known to have come", "push something, or have the forge send a test")
		case ok:
			found.add(forge.LevelNotice, "the last webhook came at "+came.Format(time.RFC3339), "")
		}
		own.all = append(own.all, found.all...)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return c.print(own.all)
}

func (c *checkCmd) print(all []finding) error {
	wrong := 0
	for _, f := range all {
		if f.Level == forge.LevelFailure {
			wrong++
		}
	}
	var err error
	if c.JSON {
		err = show.Document(struct {
			OK       bool      `json:"ok"`
			Findings []finding `json:"findings"`
		}{wrong == 0, all})
	} else {
		var t show.Table
		for _, f := range all {
			level := string(f.Level)
			if f.Level == forge.LevelNotice {
				level = "ok"
			}
			text := f.What
			if f.Advice != "" {
				text += "; try: " + f.Advice
			}
			t.Row(level, cmp.Or(f.Forge, "-"), logtext.Plain(text))
		}
		err = t.Print(os.Stdout)
	}
	if err == nil && wrong > 0 {
		return &daemon.ExitError{Code: daemon.ExitFailure}
	}
	return err
}

func (c *checkCmd) checkForge(ctx context.Context, found *findings, one forges.Forge, path string) {
	if one.Forge.Capabilities().Webhooks {
		if one.Secret == nil {
			found.add(forge.LevelFailure, "there is no secret of webhooks, so none are taken", "give the secret that the forge has as well, at least 32 random bytes")
		}
		if !one.AllowAll && len(one.Allow) == 0 {
			found.add(forge.LevelFailure, "the allow-list is empty, so nobody's webhooks start anything", "list owners or owner/name under allow")
		}
	}
	checker, ok := forge.As[forge.Checker](one.Forge)
	if !ok {
		found.add(forge.LevelNotice, "this driver does not look at the forge's set-up", "")
		return
	}
	o := forge.CheckOptions{}
	for _, a := range one.Allow {
		if strings.Contains(a, "/") {
			o.Repos = append(o.Repos, repoNamed(a))
		}
	}
	if c.WebhookURL != "" {
		o.WebhookURL = strings.TrimSuffix(c.WebhookURL, "/") + path
	}
	bounded, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	said, err := checker.Check(bounded, o)
	for _, f := range said {
		found.add(f.Level, f.What, f.Advice)
	}
	if err != nil {
		found.failed("the forge did not answer everything in time", err)
	}
}

// checkParts looks at database and queue, and says when each forge's last webhook
// came, as far as that is known.
func (d *Daemon) checkParts(ctx context.Context, found *findings, all []forges.Forge) (last map[string]time.Time) {
	db, err := d.database(ctx)
	if err != nil {
		found.failed("the database cannot be used", err)
	} else {
		defer func() { _ = db.Close() }()
		last = d.checkDatabase(ctx, found, db, all)
	}
	if db == nil && !d.hasBroker() {
		if err := d.checkQueue(); err != nil {
			found.failed("the queue cannot be used", err)
		}
		return last
	}
	q, err := d.queue(ctx, db, slog.New(slog.DiscardHandler))
	if err == nil {
		err = q.Close()
	}
	if err != nil {
		found.failed("the queue cannot be used", err)
	} else {
		found.add(forge.LevelNotice, "the queue is there", "")
	}
	return last
}

func (d *Daemon) checkDatabase(ctx context.Context, found *findings, db *bun.DB, all []forges.Forge) map[string]time.Time {
	webhooks, err := integration.OpenDeliveries(ctx, db)
	switch {
	case errors.Is(err, solstice.ErrSchema):
		found.add(forge.LevelFailure, "the database's schema is not this version's", "make a backup, then start the daemon once with --auto-migrate")
		return nil
	case err != nil:
		found.failed("the database cannot be read", err)
		return nil
	}
	last := map[string]time.Time{}
	for _, one := range all {
		newest, err := webhooks.List(ctx, integration.DeliveryFilter{Forge: one.Name, Limit: 1})
		if err != nil {
			found.failed("the database cannot be read", err)
			return nil
		}
		if !one.Forge.Capabilities().Webhooks || one.Secret == nil {
			continue
		}
		last[one.Name] = time.Time{}
		for _, x := range newest {
			last[one.Name] = x.ReceivedAt
		}
	}
	found.add(forge.LevelNotice, "the database is there", "")
	return last
}
