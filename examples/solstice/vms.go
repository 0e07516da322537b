package main

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/pools"
)

// machines are the pools of --pools; its zero value: none.
type machines struct {
	set    *pools.Set
	labels []string
	owner  string
	web    *http.Server
}

// machines opens the pools of --pools and has the engine serve their guests.
func (c *runCmd) machines(ctx context.Context, cfg *solstice.Config, state string, here pools.Machines) (m *machines, err error) {
	if c.Pools == "" {
		return &machines{}, nil
	}
	file, err := pools.ReadFile(c.Pools, c.Catalogue)
	if err != nil {
		return nil, problem("the file of --pools cannot be used", err, "docs/pools.md describes it")
	}
	dir, err := c.runnerDir()
	if err != nil {
		return nil, err
	}
	if c.ImageDir == "" {
		state, err := daemon.State{StateDir: c.UserState}.Open()
		if err != nil {
			return nil, problem("there is no directory for images", err, "give --image-dir")
		}
		c.ImageDir = filepath.Join(state, "images")
	}
	agents := daemon.NewAgents(dir)
	m = &machines{web: daemon.HTTPServer(agents.Handler())}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	m.set, err = file.Open(ctx, pools.Options{
		Process:  func() (pools.Machines, error) { return here, nil },
		ImageDir: c.ImageDir, PluginDir: pluginDir(state), Agents: agents, Logger: slog.Default(),
	})
	if err != nil {
		return m, problem("cannot make machines as --pools says", err, "")
	}
	m.labels = m.set.Labels()
	if err := m.set.Prepare(ctx, progress); err != nil {
		return m, problem("cannot get an image", err, imageAdvice(err))
	}
	var lc net.ListenConfig
	web, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return m, problem("cannot listen for guests", err, "")
	}
	go func() { _ = m.web.Serve(web) }() // ends with Close
	if cfg.AgentListener, err = lc.Listen(ctx, "tcp", "127.0.0.1:0"); err != nil {
		return m, problem("cannot listen for agents", err, "")
	}
	at := pools.Endpoints{
		Agents: cfg.AgentListener.Addr(), Runner: web.Addr(),
		Contacts: []string{cfg.AgentListener.Addr().String()}, RunnerURL: "http://" + web.Addr().String() + "/runner",
	}
	if cfg.Pools, err = m.set.Pools(at); err != nil {
		return m, problem("the guests of --pools could not reach this program", err, "")
	}
	return m, nil
}

// pluginDir is where the sockets of a run's plugins are.
func pluginDir(state string) string { return filepath.Join(state, "plugins") }

// runnerDir is where the agents for guests are.
func (c *runCmd) runnerDir() (string, error) {
	if c.RunnerDir != "" {
		return c.RunnerDir, nil
	}
	exe, err := os.Executable()
	if err != nil {
		return "", problem("cannot tell where this program is", err, "give --runner-dir")
	}
	return filepath.Join(filepath.Dir(exe), "runner"), nil
}

func (m *machines) serves(label string) bool { return slices.Contains(m.labels, label) }

// Close leaves what machines there are; destroyAll comes before.
func (m *machines) Close() error {
	var err error
	if m.web != nil {
		err = m.web.Close()
	}
	if m.set != nil {
		err = errors.Join(err, m.set.Close())
	}
	return err
}

// destroyAll makes sure that no machine of the owner is left, whatever happened.
func (m *machines) destroyAll() error {
	if m.set == nil || m.owner == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return m.set.DestroyAll(ctx, m.owner)
}

// leftBehind is what the sweeper needs to know of the machines of a run that was
// killed. It is in the state directory.
type leftBehind struct {
	Pools, Catalogue, ImageDir, Owner string
}

const leftBehindFile = "pools.json"

// own has the sweeper know of the machines, before there are any.
func (m *machines) own(c *runCmd, state, owner string) error {
	if m.set == nil {
		return nil
	}
	m.owner = owner
	l := leftBehind{ImageDir: c.ImageDir, Owner: owner}
	for _, p := range []struct {
		to   *string
		from string
	}{{&l.Pools, c.Pools}, {&l.Catalogue, c.Catalogue}} {
		if p.from == "" {
			continue
		}
		abs, err := filepath.Abs(p.from)
		if err != nil {
			return err
		}
		*p.to = abs
	}
	data, err := json.Marshal(l)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(state, leftBehindFile), data, 0o600)
}

// sweepMachines destroys what a killed run left in the pools of --pools.
func sweepMachines(state string) (err error) {
	data, err := os.ReadFile(filepath.Join(state, leftBehindFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var l leftBehind
	if err == nil {
		err = json.Unmarshal(data, &l)
	}
	if err != nil {
		return err
	}
	file, err := pools.ReadFile(l.Pools, l.Catalogue)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	set, err := file.Open(ctx, pools.Options{
		Process:  func() (pools.Machines, error) { return pools.Machines{}, nil }, // swept by directory
		ImageDir: l.ImageDir, PluginDir: pluginDir(state),
	})
	if err != nil {
		return err
	}
	m := &machines{set: set, owner: l.Owner}
	return errors.Join(m.destroyAll(), set.Close())
}
