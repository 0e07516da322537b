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

// Set is a file's forges, open.
type Set struct {
	opened []*opened
}

type opened struct {
	*entry
	forge  forge.Forge
	secret []byte // of webhooks; empty: none
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
		p := &opened{entry: e}
		if e.WebhookSecretFile != "" {
			if p.secret, err = e.read("webhook_secret_file", e.WebhookSecretFile); err != nil {
				return nil, fmt.Errorf("forge %s: %w", e.name, err)
			}
		}
		if p.forge, err = e.open(ctx, o); err != nil {
			return nil, fmt.Errorf("forge %s: %w", e.name, err)
		}
		s.opened = append(s.opened, p)
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
	return opens(remoteforge.Open(ctx, remoteforge.Config{Target: operator.Target(e.Driver), TLS: secured}))
}

// Forges are the engine's, by name.
func (s *Set) Forges() map[string]forge.Forge {
	out := map[string]forge.Forge{}
	for _, p := range s.opened {
		out[p.name] = p.forge
	}
	return out
}

// ReportedElsewhere are those whose statuses another program reports.
func (s *Set) ReportedElsewhere() (names []string) {
	for _, p := range s.opened {
		if p.StatusesElsewhere {
			names = append(names, p.name)
		}
	}
	return names
}

// Instances are the integration's: those whose webhooks this program takes, by name.
// A plugin holds its secret itself.
func (s *Set) Instances() map[string]integration.Instance {
	out := map[string]integration.Instance{}
	for _, p := range s.opened {
		if !p.forge.Capabilities().Webhooks || len(p.secret) == 0 && p.kind() != "plugin" {
			continue
		}
		secret := p.secret
		out[p.name] = integration.Instance{
			Forge: p.forge, Allow: p.Allow, AllowAll: p.AllowAll, Poll: p.poll(),
			Secret: func(context.Context, string) ([]byte, error) { return secret, nil },
		}
	}
	return out
}

// Close closes the forges.
func (s *Set) Close() error {
	var errs []error
	for _, p := range slices.Backward(s.opened) {
		errs = append(errs, p.forge.Close())
	}
	return errors.Join(errs...)
}
