// Package forgedaemon is what the daemons that own forges are made of, such as
// examples/forge-integration and examples/github-integration: they hold the forges'
// credentials, take their webhooks, report statuses, and serve the forges to
// orchestrators, which then need neither. A main has flags of its own for what forges
// there are:
//
//	var flags struct {
//		forgedaemon.Flags
//		…
//	}
//	cmd, err := daemon.Parse(&flags, daemon.Program{Name: "solstice-example", StateName: "solstice-example"})
//	…
//	d := forgedaemon.Daemon{Name: "example", Flags: &flags.Flags, Open: …}
//	return d.Run(ctx, cmd)
package forgedaemon

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/alecthomas/kong"
	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/deliveries"
	"github.com/solstice-ci/solstice-go/solstice/daemon/forges"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
	"github.com/solstice-ci/solstice-go/solstice/integration"
)

// Flags are those that all such daemons have, and their commands.
type Flags struct {
	daemon.Telemetry
	daemon.State
	storage.Database
	storage.Broker
	daemon.ServerTLS
	daemon.HTTP

	AutoMigrate      bool          `group:"Database" env:"AUTO_MIGRATE" help:"Bring PostgreSQL to this version's schema; SQLite always is."`
	RetainDeliveries daemon.Age    `group:"Retention" env:"RETAIN_DELIVERIES" default:"14d" placeholder:"AGE" help:"How long webhooks are kept, and what forges were told: 14d, 36h, forever. Where an orchestrator works on the same database its retention counts."`
	DrainTimeout     time.Duration `group:"State" env:"DRAIN_TIMEOUT" default:"10s" help:"How long SIGTERM waits for messages and statuses on their way; what is left goes on with the next start."`

	Serve      serveCmd            `cmd:"" default:"1" help:"Run; the default."`
	Check      checkCmd            `cmd:"" help:"Say what is wrong with the set-up: credentials, permissions, webhooks, database, queue."`
	Enqueue    enqueueCmd          `cmd:"" help:"Have the current repository and commit run."`
	Deliveries deliveries.Commands `cmd:"" help:"Webhooks that came: list, show or replay them."`
}

// Daemon owns some forges.
type Daemon struct {
	// Name is that of the program in its log and its lock.
	Name  string
	Flags *Flags
	// Open opens the forges; dir is the state directory, empty where a command has
	// none. Close is called in the end.
	Open func(ctx context.Context, dir string, log *slog.Logger) (all []forges.Forge, closeAll func() error, err error)
	// WebhookPath is where webhooks of a forge come; nil: /webhooks/NAME.
	WebhookPath func(forge string) string
}

// Run does what the command line says, which [daemon.Parse] gave, until ctx ends.
func (d *Daemon) Run(ctx context.Context, cmd *kong.Context) error {
	if age := d.Flags.RetainDeliveries; age > 0 && time.Duration(age) < time.Hour {
		return usage("--retain-deliveries is "+age.String(), nil, "it is at least an hour")
	}
	cmd.BindTo(ctx, (*context.Context)(nil))
	cmd.Bind(d, deliveries.Opener(d.database))
	return cmd.Run()
}

func (d *Daemon) webhookPath(name string) string {
	if d.WebhookPath == nil {
		return "/webhooks/" + name
	}
	return d.WebhookPath(name)
}

// instances are the integration's.
func instances(all []forges.Forge) map[string]integration.Instance {
	out := map[string]integration.Instance{}
	for _, f := range all {
		out[f.Name] = f.Instance
	}
	return out
}

// database opens the daemon's for a command, which makes none.
func (d *Daemon) database(ctx context.Context) (*bun.DB, error) {
	f := d.Flags
	dir, err := f.Database.Dir(f.StateDir)
	if err != nil {
		return nil, err
	}
	if f.DatabaseURL == "" && f.DatabaseURLFile == "" {
		if _, err := os.Stat(filepath.Join(dir, "solstice.db")); errors.Is(err, fs.ErrNotExist) {
			return nil, problem("there is no database in "+dir, nil, "give --state-dir or --database-url as the daemon has it, and start that first")
		}
	}
	return f.Database.Open(ctx, f.StateDir, slog.New(slog.DiscardHandler))
}

// queue opens the queue; others have to reach it too.
func (d *Daemon) queue(ctx context.Context, db *bun.DB, log *slog.Logger) (queue.Queue, error) {
	if err := d.checkQueue(); err != nil {
		return nil, err
	}
	return d.Flags.Broker.Open(ctx, db, log)
}

// hasBroker: the queue is in no database.
func (d *Daemon) hasBroker() bool { return d.Flags.AMQPURL != "" || d.Flags.AMQPURLFile != "" }

// checkQueue reports that nobody else would reach the queue.
func (d *Daemon) checkQueue() error {
	if d.hasBroker() {
		return nil
	}
	file, err := d.Flags.Database.Dir(d.Flags.StateDir)
	if err != nil || file == "" {
		return err
	}
	return usage("there is no queue that an orchestrator could reach: the database is a file of this program's", nil,
		"give --amqp-url of the RabbitMQ that the orchestrators have, or --database-url of their PostgreSQL, in which the queue is then")
}

func problem(what string, err error, advice string) error {
	return &daemon.Problem{What: what, Err: err, Advice: advice}
}

func usage(what string, err error, advice string) error {
	return &daemon.ExitError{Code: daemon.ExitUsage, Err: problem(what, err, advice)}
}
