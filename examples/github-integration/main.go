// Command github-integration owns one GitHub, or GitHub Enterprise Server, as an App
// or with a token: it takes webhooks, reports check runs or statuses, and serves the
// forge to orchestrators. It imports nothing internal, so it can be copied.
package main

import (
	"context"
	"log/slog"
	"regexp"
	"time"

	"github.com/solstice-ci/solstice-go/forge/github"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/forgedaemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/forges"
)

type flags struct {
	forgedaemon.Flags

	Name              string        `group:"GitHub" env:"FORGE_NAME" default:"github" placeholder:"NAME" help:"What orchestrators call this forge: up to 63 of a-z 0-9 . _ -."`
	GithubAppID       int64         `group:"GitHub" name:"github-app-id" env:"GITHUB_APP_ID" placeholder:"ID" help:"ID of the GitHub App."`
	GithubAppKey      string        `group:"GitHub" name:"github-app-key" env:"GITHUB_APP_KEY" placeholder:"PEM" help:"Private key of the App; better in a file."`
	GithubAppKeyFile  string        `group:"GitHub" name:"github-app-key-file" env:"GITHUB_APP_KEY_FILE" placeholder:"FILE" help:"File with that key."`
	GithubToken       string        `group:"GitHub" name:"github-token" env:"GITHUB_TOKEN" placeholder:"TOKEN" help:"Access token, instead of an App: commit statuses, and no buttons."`
	GithubTokenFile   string        `group:"GitHub" name:"github-token-file" env:"GITHUB_TOKEN_FILE" placeholder:"FILE" help:"File with the token."`
	GithubURL         string        `group:"GitHub" name:"github-url" env:"GITHUB_URL" placeholder:"URL" help:"A GitHub Enterprise Server. Default: https://github.com."`
	GithubAPIURL      string        `group:"GitHub" name:"github-api-url" env:"GITHUB_API_URL" placeholder:"URL" help:"Its API, where that is not at /api/v3."`
	WebhookSecret     string        `group:"GitHub" env:"GITHUB_WEBHOOK_SECRET,WEBHOOK_SECRET" placeholder:"SECRET" help:"Secret of the webhooks. Without one none are taken."`
	WebhookSecretFile string        `group:"GitHub" env:"GITHUB_WEBHOOK_SECRET_FILE,WEBHOOK_SECRET_FILE" placeholder:"FILE" help:"File with that secret."`
	WebhookPath       string        `group:"GitHub" env:"WEBHOOK_PATH" placeholder:"PATH" help:"Where webhooks come at --http-addr. Default: /webhooks/NAME."`
	Allow             []string      `group:"GitHub" env:"ALLOW" placeholder:"OWNER,OWNER/NAME" help:"Whose webhooks start something. Default: nobody's."`
	AllowAll          bool          `group:"GitHub" env:"ALLOW_ALL" help:"Take the webhooks of everybody who has the secret."`
	Poll              time.Duration `group:"GitHub" env:"POLL" default:"5m" placeholder:"TIME" help:"How often each repository is looked at for webhooks that never came; 0: never."`
	Listen            string        `group:"gRPC" env:"LISTEN" placeholder:"ADDR" help:"Where orchestrators reach the forge: unix:PATH, or HOST:PORT with certificates on both sides. Default: nowhere."`
}

func main() {
	daemon.Main(func(ctx context.Context) error {
		var f flags
		cmd, err := daemon.Parse(&f, daemon.Program{
			Name: "solstice-github-integration", StateName: "solstice-github-integration",
			Description: "Takes the webhooks of GitHub, reports check runs to it, and serves it to orchestrators, which need none of its credentials.",
		})
		if err != nil {
			return err
		}
		d := forgedaemon.Daemon{Name: "github-integration", Flags: &f.Flags, Open: f.open, WebhookPath: f.path}
		return d.Run(ctx, cmd)
	})
}

func (f *flags) path(forge string) string {
	if f.WebhookPath == "" {
		return "/webhooks/" + forge
	}
	return f.WebhookPath
}

var forgeName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

func (f *flags) open(context.Context, string, *slog.Logger) ([]forges.Forge, func() error, error) {
	if !forgeName.MatchString(f.Name) {
		return nil, nil, usage("--name "+f.Name+" is no name of a forge", nil, "use up to 63 of a-z 0-9 . _ -")
	}
	if f.Poll < 0 || f.Poll > 0 && f.Poll < time.Second {
		return nil, nil, usage("--poll is "+f.Poll.String(), nil, "give a second or more, or 0 for never")
	}
	if f.Listen != "" {
		if err := forges.CheckListen(f.Listen); err != nil {
			return nil, nil, usage("--listen cannot be used", err, "")
		}
	}
	key, err := daemon.Secret("github-app-key", f.GithubAppKey, f.GithubAppKeyFile)
	if err != nil {
		return nil, nil, err
	}
	token, err := daemon.Secret("github-token", f.GithubToken, f.GithubTokenFile)
	if err != nil {
		return nil, nil, err
	}
	secret, err := daemon.Secret("webhook-secret", f.WebhookSecret, f.WebhookSecretFile)
	if err != nil {
		return nil, nil, err
	}
	c := github.Config{URL: f.GithubURL, APIURL: f.GithubAPIURL, Token: token}
	switch {
	case (key == "") != (f.GithubAppID == 0):
		return nil, nil, usage("a GitHub App has an ID and a key", nil, "give both --github-app-id and --github-app-key-file")
	case (key == "") == (token == ""):
		return nil, nil, usage("there are no credentials of GitHub, or two", nil, "give --github-app-id and --github-app-key-file of an App, or --github-token-file; docs/forges.md says what to create")
	case key != "":
		c.App = &github.App{ID: f.GithubAppID, Key: []byte(key)}
	}
	driver, err := github.New(c)
	if err != nil {
		return nil, nil, usage("the credentials of GitHub cannot be used", err, "")
	}
	one := forges.Forge{Name: f.Name, URL: f.GithubURL, Serve: f.Listen}
	if one.URL == "" {
		one.URL = "https://github.com"
	}
	one.Forge, one.Allow, one.AllowAll, one.Poll = driver, f.Allow, f.AllowAll, f.Poll
	if f.Poll == 0 {
		one.Poll = -1 // zero is the default there
	}
	if secret != "" {
		one.Secret = forges.Secret([]byte(secret))
	}
	return []forges.Forge{one}, driver.Close, nil
}

func usage(what string, err error, advice string) error {
	return &daemon.ExitError{Code: daemon.ExitUsage, Err: &daemon.Problem{What: what, Err: err, Advice: advice}}
}
