// Command forge-integration owns forges: Forgejo, Gitea, GitLab and whatever else its
// file names. It holds their credentials, takes their webhooks, reports statuses and
// serves the forges to orchestrators. It imports nothing internal, so it can be copied.
package main

import (
	"context"
	"log/slog"
	"strings"

	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/forgedaemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/forges"
)

type flags struct {
	forgedaemon.Flags

	Forges            string `group:"Forges" env:"FORGES" placeholder:"FILE" help:"YAML file of the forges that this program owns; see docs/forges.md."`
	WebhookPath       string `group:"Forges" env:"WEBHOOK_PATH" default:"/webhooks/" placeholder:"PATH" help:"What the paths of webhooks at --http-addr begin with; the name of the forge is appended."`
	WebhookSecret     string `group:"Forges" env:"WEBHOOK_SECRET" placeholder:"SECRET" help:"Secret of the webhooks of those forges that name no webhook_secret_file."`
	WebhookSecretFile string `group:"Forges" env:"WEBHOOK_SECRET_FILE" placeholder:"FILE" help:"File with that secret."`
}

func main() {
	daemon.Main(func(ctx context.Context) error {
		var f flags
		cmd, err := daemon.Parse(&f, daemon.Program{
			Name: "solstice-forge-integration", StateName: "solstice-forge-integration",
			Description: "Takes the webhooks of forges, reports statuses to them, and serves them to orchestrators, which need none of their credentials.",
		})
		if err != nil {
			return err
		}
		d := forgedaemon.Daemon{
			Name: "forge-integration", Flags: &f.Flags, Open: f.open,
			WebhookPath: func(forge string) string { return f.WebhookPath + forge },
		}
		return d.Run(ctx, cmd)
	})
}

func (f *flags) open(ctx context.Context, dir string, log *slog.Logger) ([]forges.Forge, func() error, error) {
	if f.Forges == "" {
		return nil, nil, usage("there are no forges", nil, "give --forges FILE; docs/forges.md describes it")
	}
	if !strings.HasPrefix(f.WebhookPath, "/") || !strings.HasSuffix(f.WebhookPath, "/") {
		return nil, nil, usage("--webhook-path "+f.WebhookPath+" does not begin and end with a slash", nil, "")
	}
	secret, err := daemon.Secret("webhook-secret", f.WebhookSecret, f.WebhookSecretFile)
	if err != nil {
		return nil, nil, err
	}
	file, err := forges.ReadFile(f.Forges)
	if err != nil {
		return nil, nil, usage("the file of --forges cannot be used", err, "docs/forges.md describes it")
	}
	set, err := file.Open(ctx, forges.Options{StateDir: dir, Logger: log})
	if err != nil {
		return nil, nil, &daemon.Problem{What: "cannot open the forges of --forges", Err: err}
	}
	all := set.All()
	for i, one := range all {
		if one.OwnedElsewhere {
			_ = set.Close() // nothing was asked of them
			return nil, nil, usage("the forge "+one.Name+" of --forges is owned elsewhere", nil, "leave it to its owner, and to the file of the orchestrator")
		}
		if one.Secret == nil && secret != "" {
			all[i].Secret = forges.Secret([]byte(secret))
		}
	}
	return all, set.Close, nil
}

func usage(what string, err error, advice string) error {
	return &daemon.ExitError{Code: daemon.ExitUsage, Err: &daemon.Problem{What: what, Err: err, Advice: advice}}
}
