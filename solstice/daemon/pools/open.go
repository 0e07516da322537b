package pools

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/internal/operator"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/image"
	"github.com/solstice-ci/solstice-go/vmprovider/libvirtvm"
	"github.com/solstice-ci/solstice-go/vmprovider/remotevm"
	"github.com/solstice-ci/solstice-go/vmprovider/seed"
)

// userNetHost is this host to guests in QEMU's user network: what listens on its
// loopback is reached there.
const userNetHost = "10.0.2.2"

// Options are what pools need of the program around them.
type Options struct {
	// Process gives the machines of pools whose provider is process; whoever gives
	// them closes them. nil: such pools are refused.
	Process func() (Machines, error)
	// ImageDir is the directory of the store of images, where the file names none.
	ImageDir string
	// Ports are those at which guests reach this program at their gateway: where
	// they are isolated, these are let through. none: such pools are refused.
	Ports []uint16
	// PluginDir is for the sockets of plugins that are started, and for nothing else:
	// what a program that was killed left there is removed. empty: temporary
	// directories.
	PluginDir string
	// Agents are those that guests download.
	Agents *daemon.Agents
	Logger *slog.Logger // nil: silent
}

// Machines are what a provider makes, and where: a name as solstice.Pool.Host.
type Machines struct {
	Provider vmprovider.Provider
	Host     string
}

// Set is pools whose providers are open.
type Set struct {
	file   *File
	opened []*opened
	store  *image.Store
}

type opened struct {
	*entry
	provider vmprovider.Provider
	host     string
	// gateway is this host as guests see it; empty: not known. on says which of its
	// listeners they reach there.
	gateway string
	on      func(net.IP) bool
}

// Open opens the providers. The error names the pool.
func (f *File) Open(ctx context.Context, o Options) (_ *Set, err error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Set{file: f}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if o.PluginDir != "" {
		if err := os.RemoveAll(o.PluginDir); err != nil {
			return nil, err
		}
	}
	for i := range f.pools {
		e := &f.pools[i]
		p := &opened{entry: e, host: e.Host}
		if err := s.open(ctx, p, o); err != nil {
			return nil, fmt.Errorf("pool %s: %w", e.name, err)
		}
		s.opened = append(s.opened, p)
	}
	for _, p := range f.pools {
		for _, q := range f.pools {
			if p.kind() == "process" && q.kind() == "libvirt" && strings.Contains(q.Libvirt.URI, "/system") {
				o.Logger.WarnContext(ctx, "jobs of this pool have this program's rights, which at libvirtd are as good as root's", "pool", p.name, "libvirt", q.Libvirt.URI)
				return s, nil
			}
		}
	}
	return s, nil
}

func (s *Set) open(ctx context.Context, p *opened, o Options) error {
	if p.kind() == "process" {
		if o.Process == nil {
			return fmt.Errorf("%w: there is no provider process here", ErrInvalid)
		}
		processes, err := o.Process()
		if err != nil {
			return err
		}
		p.provider, p.host = shared{processes.Provider}, cmp.Or(p.host, processes.Host)
		return nil
	}
	m := &machines{agents: o.Agents, log: o.Logger, img: p.choice.Image}
	if p.Image != "" {
		if s.store == nil {
			var err error
			evict := s.file.evict
			evict.Logger = o.Logger
			if s.store, err = image.Open(cmp.Or(s.file.imageDir, o.ImageDir), evict); err != nil {
				return err
			}
		}
		m.store = s.store
	}
	var err error
	if p.kind() == "libvirt" {
		m.Provider, err = p.openLibvirt(ctx, o)
	} else {
		m.Provider, err = p.openPlugin(ctx, o)
	}
	p.provider = m
	return err
}

func (p *opened) openLibvirt(ctx context.Context, o Options) (vmprovider.Provider, error) {
	l := p.Libvirt
	u, err := url.Parse(l.URI)
	if err != nil {
		return nil, fmt.Errorf("%w: libvirt.uri: %w", ErrInvalid, err)
	}
	local := u.Host == ""
	p.host = cmp.Or(p.host, u.Hostname())
	if !local && p.Image != "" {
		return nil, fmt.Errorf("%w: image is a file of this computer, and %s another one: give image_file, which is there", ErrInvalid, l.URI)
	}
	if local && l.Network.Type == libvirtvm.NetworkUser {
		p.gateway, p.on = userNetHost, net.IP.IsLoopback
	}
	var isolation *libvirtvm.Isolation
	if l.Isolation == "strict" {
		if len(o.Ports) == 0 {
			return nil, fmt.Errorf("%w: isolation: strict needs a program that listens at fixed ports of the subnet's first address, as the orchestrator does with --agent-addr and --runner-addr", ErrInvalid)
		}
		isolation = &libvirtvm.Isolation{Bridge: l.Bridge, Subnet: l.Subnet, Allow: slices.Clone(l.Allow)}
		host := l.Subnet.Addr().Next()
		for _, port := range o.Ports {
			isolation.Allow = append(isolation.Allow, libvirtvm.Allowed{Protocol: libvirtvm.TCP, To: netip.PrefixFrom(host, 32), Port: port})
		}
		p.gateway, p.on = host.String(), net.IP(host.AsSlice()).Equal
	}
	return libvirtvm.New(ctx, libvirtvm.Config{
		URI: l.URI, Accelerator: l.Accelerator, StoragePool: l.StoragePool, Network: libvirtvm.Network(l.Network), Isolation: isolation,
		Arch: l.Arch, Machine: l.Machine, Emulator: l.Emulator,
		SeedFormat: cmp.Or(l.Seed, seed.Format(p.choice.Image.Seed)),
		CPUQuota:   l.CPUQuota, DiskBytesPerSecond: int64(l.DiskBytesPerSecond), DiskIOPS: l.DiskIOPS,
		Domain: l.Domain, Logger: o.Logger,
	})
}

func (p *opened) openPlugin(ctx context.Context, o Options) (vmprovider.Provider, error) {
	c := cmp.Or(p.Plugin, &plugin{})
	p.gateway, p.on = c.Gateway, net.IP.IsLoopback
	if p.Provider == operator.StartedHere {
		if o.PluginDir != "" {
			if err := os.MkdirAll(o.PluginDir, 0o700); err != nil {
				return nil, err
			}
		}
		return remotevm.Start(ctx, remotevm.Command{Argv: c.Argv(p.file), Env: c.Environment(), Output: os.Stderr, Logger: o.Logger, Dir: o.PluginDir})
	}
	secured, err := c.TLS(p.file)
	if err != nil {
		return nil, err
	}
	return remotevm.Open(ctx, remotevm.Config{Target: operator.Target(p.Provider), TLS: secured})
}

// recipe is how a pool's provider makes machines, as the file says it.
func (e *entry) recipe() string {
	switch {
	case e.Libvirt != nil:
		return fmt.Sprintf("%+v", *e.Libvirt)
	case e.Plugin != nil:
		return fmt.Sprintf("%s %+v", e.Provider, *e.Plugin)
	}
	return ""
}

// Labels are what the pools serve, each once.
func (s *Set) Labels() []string {
	var all []string
	for _, p := range s.opened {
		all = append(all, p.Labels...)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// Prepare gets the pools' images and tells how far it is; without it, they are got
// when the engine starts.
func (s *Set) Prepare(ctx context.Context, progress func(label string) (show func(image.Progress), end func())) error {
	for _, p := range s.opened {
		m, ok := p.provider.(*machines)
		if !ok || m.store == nil {
			continue
		}
		show, end := progress(m.img.Label)
		_, err := m.ready(ctx, show)
		end()
		if err != nil {
			return err
		}
	}
	return nil
}

// Endpoints are where this program listens for guests.
type Endpoints struct {
	Agents, Runner net.Addr
	// Contacts and RunnerURL are what guests are told whose pool has no others.
	Contacts  []string
	RunnerURL string
}

// Pools are the engine's. Guests in QEMU's user network find what listens on this
// host's loopback at an address of its own, isolated ones what listens at theirs of
// the host; for others an error that wraps ErrInvalid says where they are given an
// address that they cannot reach.
func (s *Set) Pools(at Endpoints) ([]solstice.Pool, error) {
	var out []solstice.Pool
	var errs []error
	for _, p := range s.opened {
		pool := solstice.Pool{
			Name: p.name, Labels: p.Labels, Provider: p.provider, Host: p.host,
			Capacity: p.Capacity, HostCapacity: p.HostCapacity, HostBoots: p.HostBoots,
			CPUs: cmp.Or(p.CPUs, p.choice.Size.CPUs), MemoryBytes: cmp.Or(int64(p.Memory), p.choice.Size.MemoryBytes),
			DiskBytes: cmp.Or(int64(p.Disk), p.choice.Size.DiskBytes),
			Warm:      p.Warm, WarmMaxAge: p.WarmMaxAge, Boot: p.BootTimeout, Contacts: p.Contacts, RunnerURL: p.RunnerURL,
			Recipe: p.recipe(),
		}
		switch {
		case p.ImageFile != "":
			pool.Image = vmprovider.Image{Path: p.ImageFile, Format: p.ImageFormat}
		case p.Image != "": // its path comes from the store
			pool.Image = vmprovider.Image{Digest: "sha256:" + p.choice.Image.SHA256, Format: p.choice.Image.Format}
		}
		if m, ok := p.provider.(*machines); ok {
			errs = append(errs, p.reach(&pool, at))
			if m.agents != nil { // by which warm machines of an older agent are told
				sums, err := m.agents.Sums()
				if err != nil {
					errs = append(errs, fmt.Errorf("agents for guests: %w", err))
				}
				pool.AgentSHA256 = sums
			}
		}
		out = append(out, pool)
	}
	return out, errors.Join(errs...)
}

// reach says how a pool's guests reach this program.
func (p *opened) reach(pool *solstice.Pool, at Endpoints) error {
	var errs []error
	if len(pool.Contacts) == 0 {
		if port, ok := p.through(at.Agents); ok {
			pool.Contacts = []string{net.JoinHostPort(p.gateway, port)}
		} else if allLoopback(at.Contacts) {
			errs = append(errs, fmt.Errorf("%w: %s: pool %s: its guests cannot reach this host at %s: %s",
				ErrInvalid, p.file, p.name, strings.Join(at.Contacts, ", "), p.advice("--agent-addr", at.Agents, "contacts: [HOST:PORT]")))
		}
	}
	if pool.RunnerURL == "" {
		u, err := url.Parse(at.RunnerURL)
		if port, ok := p.through(at.Runner); ok {
			pool.RunnerURL = "http://" + net.JoinHostPort(p.gateway, port) + "/runner"
		} else if err == nil && allLoopback([]string{u.Host}) {
			errs = append(errs, fmt.Errorf("%w: %s: pool %s: its guests cannot download the agent from %s: %s",
				ErrInvalid, p.file, p.name, at.RunnerURL, p.advice("--runner-addr", at.Runner, "runner_url: http://HOST:PORT/runner")))
		}
	}
	return errors.Join(errs...)
}

// advice says how guests could reach a listener of this program.
func (p *opened) advice(flag string, listener net.Addr, key string) string {
	if a, ok := listener.(*net.TCPAddr); ok && p.Libvirt != nil && p.Libvirt.Isolation == "strict" {
		return "give " + flag + " " + net.JoinHostPort(p.gateway, strconv.Itoa(a.Port))
	}
	return "give the pool " + key
}

// through is the port at which guests find a listener at their gateway.
func (p *opened) through(listener net.Addr) (port string, ok bool) {
	a, isTCP := listener.(*net.TCPAddr)
	if p.gateway == "" || !isTCP || !a.IP.IsUnspecified() && !p.on(a.IP) {
		return "", false
	}
	return strconv.Itoa(a.Port), true
}

func allLoopback(addrs []string) bool {
	return !slices.ContainsFunc(addrs, func(addr string) bool {
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			host = addr
		}
		return host != "localhost" && !net.ParseIP(host).IsLoopback()
	})
}

// DestroyAll destroys the machines of an owner, an engine's installation, in all
// pools but those of processes.
func (s *Set) DestroyAll(ctx context.Context, owner string) error {
	var errs []error
	for _, p := range s.opened {
		if _, other := p.provider.(shared); other {
			continue
		}
		left := map[string]bool{} // after the listing, which destroying would disturb
		for m, err := range p.provider.List(ctx, vmprovider.ListOptions{Owner: owner}) {
			if err != nil {
				errs = append(errs, fmt.Errorf("pool %s: list what is left: %w", p.name, err))
				break
			}
			left[m.ID] = true
		}
		for _, id := range slices.Sorted(maps.Keys(left)) {
			errs = append(errs, p.provider.Destroy(ctx, id, vmprovider.DestroyOptions{}))
		}
	}
	return errors.Join(errs...)
}

// Close closes the providers, whose machines stay where they can.
func (s *Set) Close() error {
	var errs []error
	for _, p := range s.opened {
		errs = append(errs, p.provider.Close())
	}
	if s.store != nil {
		errs = append(errs, s.store.Close())
	}
	return errors.Join(errs...)
}

// shared is a provider that others use too, and somebody else closes.
type shared struct{ vmprovider.Provider }

// Close leaves the provider open.
func (shared) Close() error { return nil }

// As implements what vmprovider.As asks.
func (s shared) As(target any) bool { return (&machines{Provider: s.Provider}).As(target) }
