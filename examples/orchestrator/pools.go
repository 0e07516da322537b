package main

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/pools"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
	"github.com/solstice-ci/solstice-go/vmprovider/processvm"
)

// processes gives a way to make machines that are processes, and their host.
func (f *flags) processes(dir string, cfg *solstice.Config, open *closers) (provide func(processvm.Config) (*processvm.Provider, error), host string, err error) {
	root := f.MachinesDir
	if root == "" {
		root = filepath.Join(dir, "machines")
	}
	if storage.IsPostgres(cfg.DB) { // one orchestrator's has none: a backup takes it to another directory
		if host, err = machinesHost(root); err != nil {
			return nil, "", problem("cannot name where the machines are", err, "")
		}
	}
	return func(pc processvm.Config) (*processvm.Provider, error) {
		pc.Root, pc.StepEnv, pc.Logger, pc.Host = root, daemon.StepEnvironment(f.PoolEnv...), cfg.Logger, host
		machines, err := processvm.New(pc)
		if err != nil {
			return nil, problem("cannot make machines here", err, "")
		}
		open.add(machines.Close)
		return machines, nil
	}, host, nil
}

// poolsOfFile opens the pools of --pools.
func (f *flags) poolsOfFile(ctx context.Context, dir string, cfg *solstice.Config, open *closers) (*pools.Set, error) {
	if len(f.CapacityMap) > 0 || len(f.TrustedPools) > 0 {
		return nil, usage("--pools excludes --capacity-map and --trusted-pools", nil, "say in the file what pools there are")
	}
	file, err := pools.ReadFile(f.Pools, f.ImageCatalogue)
	if err != nil {
		return nil, usage("the file of --pools cannot be used", err, "docs/pools.md describes it")
	}
	images := f.ImageDir
	if images == "" {
		images = filepath.Join(dir, "images")
	}
	var ports []uint16
	for _, addr := range []string{f.AgentAddr, f.RunnerAddr} {
		// What is wrong with an address is said when it is listened at.
		if _, port, err := net.SplitHostPort(addr); err == nil {
			if n, err := strconv.ParseUint(port, 10, 16); err == nil && n > 0 {
				ports = append(ports, uint16(n))
			}
		}
	}
	set, err := file.Open(ctx, pools.Options{
		Ports: ports,
		Process: sync.OnceValues(func() (pools.Machines, error) {
			provide, host, err := f.processes(dir, cfg, open)
			if err != nil {
				return pools.Machines{}, err
			}
			machines, err := provide(processvm.Config{Command: agent.Command()})
			return pools.Machines{Provider: machines, Host: host}, err
		}),
		ImageDir: images, PluginDir: filepath.Join(dir, "plugins"), Agents: f.Runner.Agents(dir), Logger: cfg.Logger,
	})
	if err != nil {
		return nil, problem("cannot make machines as --pools says", err, "")
	}
	open.add(set.Close)
	return set, nil
}

// processPools makes the pools of --capacity-map and what their machines are: a
// process each, or a part of this one.
func (f *flags) processPools(dir string, cfg *solstice.Config, open *closers) error {
	provide, host, err := f.processes(dir, cfg, open)
	if err != nil {
		return err
	}
	processes, err := provide(processvm.Config{Command: agent.Command()})
	if err != nil {
		return err
	}
	if len(f.CapacityMap) == 0 {
		cfg.Pools = []solstice.Pool{{Name: solstice.DefaultLabel, Provider: processes, Host: host}}
	}
	for label, n := range f.CapacityMap {
		if n < 1 {
			return usage("the capacity of "+label+" is not positive", nil, "correct --capacity-map")
		}
		cfg.Pools = append(cfg.Pools, solstice.Pool{Name: label, Provider: processes, Capacity: n, Host: host})
	}
	if len(f.TrustedPools) == 0 {
		return nil
	}
	local, err := agent.NewLocal()
	if err != nil {
		return problem("cannot run agents inside this process", err, "")
	}
	open.add(local.Close)
	inside, err := provide(processvm.Config{Runner: local.Run})
	if err != nil {
		return err
	}
	cfg.LocalAgents = local.Listener()
	for _, label := range f.TrustedPools {
		i := slices.IndexFunc(cfg.Pools, func(p solstice.Pool) bool { return p.Name == label })
		if i < 0 {
			return usage("there is no pool "+label+" to be trusted", nil, "correct --trusted-pools, or add it to --capacity-map")
		}
		cfg.Pools[i].Provider = inside
	}
	return nil
}

// machinesHost names a directory of machines: orchestrators that share it share
// its capacity and look after each other's machines; those with directories of
// their own, also on one computer, do not. The name is made once and kept in the
// directory, since computers change their names, and several may have the same.
func machinesHost(root string) (string, error) {
	file := filepath.Join(root, ".host")
	if kept, err := keptHost(file); !errors.Is(err, fs.ErrNotExist) {
		return kept, err
	}
	computer, err := os.Hostname()
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return "", err
	}
	f, err := os.CreateTemp(root, ".host-")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.Remove(f.Name()) }()
	_, err = f.WriteString(computer + "-" + strings.ToLower(rand.Text()[:8]))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return "", err
	}
	if err := os.Link(f.Name(), file); err != nil && !errors.Is(err, fs.ErrExist) { // by another one that starts
		return "", err
	}
	return keptHost(file)
}

func keptHost(file string) (string, error) {
	name, err := os.ReadFile(file)
	if err == nil && len(name) == 0 { // two such would be one host
		err = errors.New(file + " is empty: remove it when no machine is left in its directory")
	}
	return string(name), err
}
