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

// Check is the command that says in words what is wrong with the set-up of forges. The
// daemons of this package have it; other programs that own forges embed it, and call
// Look and Print.
type Check struct {
	WebhookURL string `name:"webhook-url" env:"WEBHOOK_URL" placeholder:"URL" help:"Public address that webhooks are to be sent to, such as https://ci.example.org, to which the path is appended. Without it the forges' webhooks are not looked for."`
	show.Output
}

// Help is kong's.
func (Check) Help() string {
	return `Looks and changes nothing, also while the daemon runs. Of the repositories those are looked at that are on the allow-lists by their full names. The exit status is 1 when something is wrong.`
}

// Findings are what there is to say, a line each.
type Findings []finding

// finding is a line.
type finding struct {
	Forge  string      `json:"forge,omitempty"` // empty: the daemon itself
	Level  forge.Level `json:"level"`
	What   string      `json:"what"`
	Advice string      `json:"advice,omitempty"`
}

func (f *Findings) add(of string, level forge.Level, what, advice string) {
	*f = append(*f, finding{of, level, what, advice})
}

// failed adds an error of a forge, or of the daemon, as that would end with it.
func (f *Findings) failed(of, what string, err error) {
	advice := daemon.Advice(err)
	if p, ok := errors.AsType[*daemon.Problem](err); ok {
		advice = cmp.Or(p.Advice, advice)
	}
	f.add(of, forge.LevelFailure, what+": "+err.Error(), advice)
}

// Validate is kong's.
func (c *Check) Validate() error {
	if u, err := url.Parse(c.WebhookURL); c.WebhookURL != "" && (err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http") {
		return fmt.Errorf("--webhook-url %q is no address: give one like https://ci.example.org", c.WebhookURL)
	}
	return nil
}

// Look asks the forges, whose webhooks come at path, and the database that knows the
// webhooks, nil: it is not there.
func (c *Check) Look(ctx context.Context, db *bun.DB, all []forges.Forge, path func(forge string) string) Findings {
	var found Findings
	var last map[string]time.Time
	if db != nil {
		last = found.database(ctx, db, all)
	}
	for _, one := range all {
		c.forge(ctx, &found, one, path(one.Name))
		switch came, ok := last[one.Name]; {
		case ok && came.IsZero():
			found.add(one.Name, forge.LevelWarning, "no webhook is known to have come", "push something, or have the forge send a test")
		case ok:
			found.add(one.Name, forge.LevelNotice, "the last webhook came at "+came.Format(time.RFC3339), "")
		}
	}
	return found
}

// checkCmd is the daemons'.
type checkCmd struct{ Check }

// Run is kong's.
func (c *checkCmd) Run(ctx context.Context, d *Daemon) (err error) {
	all, closeAll, err := d.Open(ctx, d.Flags.StateDir, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeAll()) }()
	var own Findings
	db, err := d.database(ctx)
	if err != nil {
		own.failed("", "the database cannot be used", err)
	} else {
		defer func() { _ = db.Close() }()
	}
	d.checkReach(ctx, &own, db)
	own = append(own, c.Look(ctx, db, all, d.webhookPath)...)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return c.Print(own)
}

// Print prints them, and is an error without words when something is wrong.
func (c *Check) Print(all Findings) error {
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

func (c *Check) forge(ctx context.Context, found *Findings, one forges.Forge, path string) {
	if one.Forge.Capabilities().Webhooks {
		if one.Secret == nil {
			found.add(one.Name, forge.LevelFailure, "there is no secret of webhooks, so none are taken", "give the secret that the forge has as well, at least 32 random bytes")
		}
		if !one.AllowAll && len(one.Allow) == 0 {
			found.add(one.Name, forge.LevelFailure, "the allow-list is empty, so nobody's webhooks start anything", "list owners or owner/name under allow")
		}
	}
	checker, ok := forge.As[forge.Checker](one.Forge)
	if !ok {
		found.add(one.Name, forge.LevelNotice, "this driver does not look at the forge's set-up", "")
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
		found.add(one.Name, f.Level, f.What, f.Advice)
	}
	if err != nil {
		found.failed(one.Name, "the forge did not answer everything in time", err)
	}
}

// checkReach looks at the queue.
func (d *Daemon) checkReach(ctx context.Context, found *Findings, db *bun.DB) {
	err := d.checkQueue()
	if err == nil && (db != nil || d.hasBroker()) {
		q, opened := d.queue(ctx, db, slog.New(slog.DiscardHandler))
		if err = opened; err == nil {
			err = q.Close()
		}
	} else if err == nil { // in the database, of which that is said
		return
	}
	if err != nil {
		found.failed("", "the queue cannot be used", err)
		return
	}
	found.add("", forge.LevelNotice, "the queue is there", "")
}

// database says when each forge's last webhook came, as far as that is known.
func (f *Findings) database(ctx context.Context, db *bun.DB, all []forges.Forge) map[string]time.Time {
	webhooks, err := integration.OpenDeliveries(ctx, db)
	switch {
	case errors.Is(err, solstice.ErrSchema):
		f.add("", forge.LevelFailure, "the database's schema is not this version's", "make a backup, then start the daemon once with --auto-migrate")
		return nil
	case err != nil:
		f.failed("", "the database cannot be read", err)
		return nil
	}
	last := map[string]time.Time{}
	for _, one := range all {
		newest, err := webhooks.List(ctx, integration.DeliveryFilter{Forge: one.Name, Limit: 1})
		if err != nil {
			f.failed("", "the database cannot be read", err)
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
	f.add("", forge.LevelNotice, "the database is there", "")
	return last
}
