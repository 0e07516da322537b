package forges

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/forgejo"
	"github.com/solstice-ci/solstice-go/forge/github"
	"github.com/solstice-ci/solstice-go/forge/gitlab"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	"github.com/solstice-ci/solstice-go/forge/remoteforge"
	"github.com/solstice-ci/solstice-go/solstice/daemon/internal/operator"
	"github.com/solstice-ci/solstice-go/solstice/integration"
)

// Options of Open.
type Options struct {
	// StateDir is where local repositories' statuses and plugins' sockets are kept,
	// in directories of their own; required where there are such.
	StateDir string
	Logger   *slog.Logger // nil: silent
}

// Forge is one of a Set.
type Forge struct {
	Name string
	integration.Instance
	// URL is what people open; empty where there is none.
	URL string
	// OwnedElsewhere: another program takes its webhooks, and reports its statuses.
	OwnedElsewhere bool
	// Serve is where this program serves it to others: unix:PATH or HOST:PORT; empty:
	// nowhere.
	Serve string
}

// Set is a file's forges, open.
type Set struct {
	all []Forge // by name
}

// Open opens the forges. The error names the forge. Forges that are not there yet
// are no error, but for plugins, which have to be.
func (f *File) Open(ctx context.Context, o Options) (_ *Set, err error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Set{}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	for i := range f.forges {
		e := &f.forges[i]
		one := Forge{Name: e.name, URL: e.webURL(), OwnedElsewhere: e.OwnedElsewhere, Serve: e.socket(e.Serve)}
		one.Allow, one.AllowAll, one.Poll = e.Allow, e.AllowAll, e.poll()
		switch {
		case e.WebhookSecretFile != "":
			secret, err := e.read("webhook_secret_file", e.WebhookSecretFile)
			if err != nil {
				return nil, fmt.Errorf("forge %s: %w", e.name, err)
			}
			one.Secret = Secret(secret)
		case e.kind() == "plugin" && !e.OwnedElsewhere: // which holds it itself
			one.Secret = Secret(nil)
		}
		if one.Forge, err = e.open(ctx, o); err != nil {
			return nil, fmt.Errorf("forge %s: %w", e.name, err)
		}
		s.all = append(s.all, one)
	}
	return s, nil
}

// read reads a secret, whose last newline is not part of it.
func (e *entry) read(key, file string) ([]byte, error) {
	data, err := os.ReadFile(operator.Beside(e.file, file))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	secret := strings.TrimSuffix(strings.TrimSuffix(string(data), "\n"), "\r")
	if secret == "" {
		return nil, fmt.Errorf("%w: %s: %s is empty", ErrInvalid, key, file)
	}
	return []byte(secret), nil
}

func (e *entry) open(ctx context.Context, o Options) (forge.Forge, error) {
	token := ""
	if e.TokenFile != "" {
		b, err := e.read("token_file", e.TokenFile)
		if err != nil {
			return nil, err
		}
		token = string(b)
	}
	switch e.kind() {
	case "github":
		c := github.Config{URL: e.URL, APIURL: e.APIURL, Token: token}
		if e.AppID != 0 {
			key, err := e.read("app_key_file", e.AppKeyFile)
			if err != nil {
				return nil, err
			}
			c.App = &github.App{ID: e.AppID, Key: key}
		}
		return opens(github.New(c))
	case "forgejo":
		return opens(forgejo.New(forgejo.Config{BaseURL: e.URL, Token: token}))
	case "gitlab":
		return opens(gitlab.New(gitlab.Config{BaseURL: e.URL, Token: token}))
	case "local":
		statuses := operator.Beside(e.file, e.StatusDir)
		if statuses == "" {
			statuses = filepath.Join(o.StateDir, "statuses", e.name)
		}
		return opens(localgit.Open(ctx, localgit.Config{Root: operator.Beside(e.file, e.Root), StatusDir: statuses}))
	}
	return e.openPlugin(ctx, o)
}

// opens makes a driver's nil none of an interface.
func opens[F forge.Forge](f F, err error) (forge.Forge, error) {
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (e *entry) openPlugin(ctx context.Context, o Options) (forge.Forge, error) {
	p := cmp.Or(e.Plugin, &operator.Plugin{})
	if e.Driver == operator.StartedHere {
		dir := filepath.Join(o.StateDir, "plugins")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		return opens(remoteforge.Start(ctx, remoteforge.Command{Argv: p.Argv(e.file), Env: p.Environment(), Output: os.Stderr, Logger: o.Logger, Dir: dir}))
	}
	secured, err := p.TLS(e.file)
	if err != nil {
		return nil, err
	}
	return opens(remoteforge.Open(ctx, remoteforge.Config{Target: e.socket(operator.Target(e.Driver)), TLS: secured}))
}

// webURL is what people open.
func (e *entry) webURL() string {
	if e.kind() == "github" && e.URL == "" {
		return "https://github.com"
	}
	return e.URL
}

// Secret is the same for every repository.
func Secret(secret []byte) forge.SecretFunc {
	return func(context.Context, string) ([]byte, error) { return secret, nil }
}

// All gives them by name.
func (s *Set) All() []Forge { return slices.Clone(s.all) }

// Forges are the engine's, by name.
func (s *Set) Forges() map[string]forge.Forge {
	out := map[string]forge.Forge{}
	for _, f := range s.all {
		out[f.Name] = f.Forge
	}
	return out
}

// OwnedElsewhere are those whose webhooks and statuses are another program's.
func (s *Set) OwnedElsewhere() (names []string) {
	for _, f := range s.all {
		if f.OwnedElsewhere {
			names = append(names, f.Name)
		}
	}
	return names
}

// Instances are the integration's: those whose webhooks this program takes, by name.
func (s *Set) Instances() map[string]integration.Instance {
	out := map[string]integration.Instance{}
	for _, f := range s.all {
		if f.Secret != nil && f.Forge.Capabilities().Webhooks {
			out[f.Name] = f.Instance
		}
	}
	return out
}

// Close closes the forges.
func (s *Set) Close() error {
	var errs []error
	for _, f := range slices.Backward(s.all) {
		errs = append(errs, f.Forge.Close())
	}
	return errors.Join(errs...)
}
