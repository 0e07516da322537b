//go:build unix

// Package processvm is a provider whose machines are child processes: each is
// the agent's program in a session and a directory of its own on this host.
//
// It isolates nothing. A job runs as the user that the provider runs as, sees
// the host's files and network and the other jobs, and may do all that this
// user may. Use it for code that you would run by hand: on a developer's
// machine, in a container or VM that is thrown away as a whole, in tests. CPUs,
// memory, disk size and image of a Spec mean nothing to it.
//
// The process outlives the provider and its process; a provider that is opened
// on the same directory later finds, watches and destroys the machine. It is
// known by pid and start time, so that a recycled pid is never mistaken for it.
// (A supervisor may still end it with the provider's process: under systemd set
// KillMode=process.)
//
// With Config.Runner a machine is no process but a part of the provider's own: a
// goroutine that runs the agent, for jobs that are trusted as far as the program
// around them is. The steps are processes as ever, with a directory, a cgroup
// and the marker (below), and everything above holds but for this:
//
//   - The agent shares the process's memory, file descriptors and fate. Close
//     ends its machines and their jobs; so does the end of the process, however
//     it comes. Capabilities do not say Adopts.
//   - After a kill -9 the steps run on, orphaned, until the next provider on Root,
//     to which their machines are stopped, destroys them: it finds the steps by
//     cgroup and marker, and the directories by their names. What is in no cgroup
//     and wiped its environment stays.
//   - A panic in the agent is an error that stops its machine, with the stack on
//     its console.
//   - The console is kept in memory, and is nobody else's to read; there is no
//     bootstrap file.
//   - While the process lives, only the provider that made a machine can destroy it.
//   - No process adopts the orphans of a step: that would change the whole
//     process, and would need every child of it to be waited for in one place. They
//     are found by cgroup and marker. PR_SET_PDEATHSIG is no way to end steps with
//     the process: it follows the thread that started them, and only the first
//     generation.
//
// Destroy ends all that descends from the agent. Where a cgroup (version 2) may
// be made below the provider's own, none escapes. Otherwise it finds them by
// descent, which also covers a daemon that left its session for as long as the
// agent lives and adopts its orphans (Linux), and by a variable in their
// environment, MarkerVariable, that the agent's process gets and the agent puts
// into the environment of every step (Linux). What wiped that variable and
// outlived the agent stays. Elsewhere than on Linux there is only descent: an
// orphan stays.
package processvm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"

	"github.com/solstice-ci/solstice-go/internal/keylock"
	"github.com/solstice-ci/solstice-go/internal/proctree"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

// MarkerVariable is the environment variable that holds the machine's ID, by
// which its processes are found. It configures nothing.
const MarkerVariable = "SOLSTICE_MACHINE_ID"

// DefaultConsoleBytes is what is kept of a console where Config says nothing.
const DefaultConsoleBytes = 4 << 20

// Config is what a Provider needs; Root and either Command or Runner are required.
type Config struct {
	// Root is the directory below which every machine has its own, named after
	// its ID; made with mode 0700. Providers of several processes may share it.
	Root string
	// Command is the agent's program, by absolute path, and its arguments;
	// "--bootstrap FILE" is appended, FILE holding a BootstrapFile. It gets no
	// environment but MarkerVariable, and nothing to read.
	Command []string
	// Runner, in place of Command, makes the machines parts of this process: see
	// the package's comment for what that means.
	Runner Runner
	// StepEnv is the base environment of workflow steps (BootstrapFile.Env).
	StepEnv map[string]string
	// Host is what Instance.Host says; empty: the host's name.
	Host string
	// Max is how many machines may exist at once below Root, in whatever state;
	// 0: any number. It is exact within a process; where several share Root,
	// two that create at the same moment may both be refused.
	Max int
	// ConsoleBytes is how much of a machine's console is kept, from its
	// beginning; a mark says that there was more. 0: DefaultConsoleBytes. For
	// about a second the file may be longer.
	ConsoleBytes int64
	// NoCgroup holds machines together without a cgroup even where one may be
	// made.
	NoCgroup bool
	// Logger gets what no caller is told; nil: nothing is logged.
	Logger *slog.Logger

	failpoint func(string) // tests die here
}

// Provider is a vmprovider.Provider, Consoler and Watcher. Watch tells of what
// this provider does and of every machine's exit, at once where the system
// reports it (Linux); of a machine that the provider of another process makes
// or destroys it tells when that machine is next listed, or exits.
type Provider struct {
	cfg      Config
	log      *slog.Logger
	root     *os.Root
	self     proctree.ID
	cgroups  string // where those of machines are made; empty: nowhere
	notifier vmprovider.Notifier
	locks    keylock.Locks // of what changes one machine

	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	mu       sync.Mutex
	closed   bool
	busy     sync.WaitGroup // calls and goroutines that Close waits for
	creating map[string]*creation
	attended map[string]proctree.ID

	residents map[string]*resident
}

var (
	_ vmprovider.Provider = (*Provider)(nil)
	_ vmprovider.Consoler = (*Provider)(nil)
	_ vmprovider.Watcher  = (*Provider)(nil)
)

// New opens a provider on cfg.Root and takes charge of the machines it finds
// there. An error wraps vmprovider.ErrInvalid where cfg is wrong.
func New(cfg Config) (*Provider, error) {
	if cfg.Root == "" || cfg.Max < 0 || cfg.ConsoleBytes < 0 {
		return nil, fmt.Errorf("processvm: %w: want Root, and no negative number", vmprovider.ErrInvalid)
	}
	if (len(cfg.Command) > 0) == (cfg.Runner != nil) || len(cfg.Command) > 0 && !filepath.IsAbs(cfg.Command[0]) {
		return nil, fmt.Errorf("processvm: %w: want either Command with an absolute path or Runner", vmprovider.ErrInvalid)
	}
	var err error
	if cfg.Root, err = filepath.Abs(cfg.Root); err != nil {
		return nil, fmt.Errorf("processvm: %w", err)
	}
	cfg.Command = slices.Clone(cfg.Command)
	cfg.StepEnv = maps.Clone(cfg.StepEnv)
	if cfg.ConsoleBytes == 0 {
		cfg.ConsoleBytes = DefaultConsoleBytes
	}
	if cfg.Host == "" {
		if cfg.Host, err = os.Hostname(); err != nil {
			return nil, fmt.Errorf("processvm: %w", err)
		}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.failpoint == nil {
		cfg.failpoint = func(string) {}
	}
	p := &Provider{
		cfg: cfg, log: cfg.Logger,
		creating: map[string]*creation{}, attended: map[string]proctree.ID{},
		residents: map[string]*resident{},
	}
	if p.self, err = proctree.Self(); err != nil {
		return nil, fmt.Errorf("processvm: %w", err)
	}
	if !cfg.NoCgroup {
		if path, err := proctree.CgroupPath(cgroupPrefix); err == nil {
			p.cgroups = filepath.Dir(path)
		}
	}
	if err := os.MkdirAll(cfg.Root, 0o700); err != nil {
		return nil, fmt.Errorf("processvm: %w", err)
	}
	if p.root, err = os.OpenRoot(cfg.Root); err != nil {
		return nil, fmt.Errorf("processvm: %w", err)
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	if err := p.open(); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// open clears what dead creators left unfinished and attends what runs.
func (p *Provider) open() error {
	if err := p.sweep(); err != nil {
		return err
	}
	for _, err := range p.List(p.ctx, vmprovider.ListOptions{}) {
		if err != nil {
			return err
		}
	}
	p.busy.Add(1)
	go p.boundConsoles()
	return nil
}

// Close ends what this provider is doing and stops watching. Machines that are
// processes stay; those inside this process end, with their jobs, and are
// stopped machines to the next provider. A Create that it interrupts undoes
// what it made.
func (p *Provider) Close() error {
	p.mu.Lock()
	again := p.closed
	p.closed = true
	p.mu.Unlock()
	p.cancel()
	p.notifier.Close()
	p.busy.Wait()
	if again {
		return nil
	}
	if err := errors.Join(p.leave(), p.root.Close()); err != nil {
		return fmt.Errorf("processvm: close: %w", err)
	}
	return nil
}

// Capabilities implements vmprovider.Provider: nothing is isolated, and machines
// survive the provider unless they are inside its process.
func (p *Provider) Capabilities() vmprovider.Capabilities {
	return vmprovider.Capabilities{Adopts: p.cfg.Runner == nil, Platform: []string{runtime.GOOS + "/" + runtime.GOARCH}}
}

// begin is the start of every call; end has to follow when it gives no error.
func (p *Provider) begin(ctx context.Context, call, id string) (end func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("processvm: %s: %w", call, err)
	}
	if id != "" || call != "list" && call != "watch" {
		if err := vmprovider.ValidateID(id); err != nil {
			return nil, fmt.Errorf("processvm: %s: %w", call, err)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, fmt.Errorf("processvm: %s: %w", call, vmprovider.ErrClosed)
	}
	p.busy.Add(1)
	return p.busy.Done, nil
}

// Get reads the machine's directory and looks whether its process lives.
func (p *Provider) Get(ctx context.Context, id string) (vmprovider.Instance, error) {
	end, err := p.begin(ctx, "get", id)
	if err != nil {
		return vmprovider.Instance{}, err
	}
	defer end()
	return p.get(id)
}

func (p *Provider) get(id string) (vmprovider.Instance, error) {
	p.mu.Lock()
	c, r := p.creating[id], p.residents[id]
	p.mu.Unlock()
	if c != nil {
		return p.instance(c.rec, vmprovider.StateCreating, ""), nil
	}
	if r != nil {
		rec := r.now()
		state, reason := rec.state()
		return p.instance(rec, state, reason), nil
	}
	rec, err := p.load(id)
	if errors.Is(err, fs.ErrNotExist) {
		return vmprovider.Instance{}, fmt.Errorf("processvm: get %q: %w", id, vmprovider.ErrNotFound)
	}
	if err != nil {
		return p.instance(rec, vmprovider.StateLeftover, err.Error()), nil
	}
	state, reason := rec.state()
	if state == vmprovider.StateRunning && !rec.Inside {
		p.attend(id, *rec.Process)
	}
	return p.instance(rec, state, reason), nil
}

func (p *Provider) instance(r record, s vmprovider.State, reason string) vmprovider.Instance {
	return vmprovider.Instance{
		ID: r.ID, Owner: r.Owner, State: s, Host: p.cfg.Host, Reason: reason,
		CreatedAt: r.CreatedAt, ExpiresAt: r.ExpiresAt,
	}
}

// List yields the machines that have a directory below Root, ordered by ID.
func (p *Provider) List(ctx context.Context, o vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error] {
	return func(yield func(vmprovider.Instance, error) bool) {
		all, err := p.list(ctx, o)
		for _, inst := range all {
			if err := ctx.Err(); err != nil {
				yield(vmprovider.Instance{}, err)
				return
			}
			if !yield(inst, nil) {
				return
			}
		}
		if err != nil {
			yield(vmprovider.Instance{}, err)
		}
	}
}

// list holds the provider open only while it reads: a consumer of List may
// call Close.
func (p *Provider) list(ctx context.Context, o vmprovider.ListOptions) ([]vmprovider.Instance, error) {
	end, err := p.begin(ctx, "list", "")
	if err != nil {
		return nil, err
	}
	defer end()
	ids, err := p.ids()
	if err != nil {
		return nil, fmt.Errorf("processvm: list: %w", err)
	}
	var all []vmprovider.Instance
	for _, id := range ids {
		if err := ctx.Err(); err != nil {
			return all, fmt.Errorf("processvm: list: %w", err)
		}
		inst, err := p.get(id)
		if errors.Is(err, vmprovider.ErrNotFound) {
			continue // destroyed meanwhile
		}
		if err != nil {
			return all, err
		}
		if o.Owner == "" || inst.Owner == o.Owner {
			all = append(all, inst)
		}
	}
	return all, nil
}

// ids are those of all machines, the ones being created included, in order.
func (p *Provider) ids() ([]string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.idsLocked()
}

func (p *Provider) idsLocked() ([]string, error) {
	names, err := p.names()
	if err != nil {
		return nil, err
	}
	ids := slices.AppendSeq(slices.DeleteFunc(names, func(n string) bool { return vmprovider.ValidateID(n) != nil }), maps.Keys(p.creating))
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// Watch tells of every change that the provider hears of; see Provider.
func (p *Provider) Watch(ctx context.Context) iter.Seq2[vmprovider.Instance, error] {
	return func(yield func(vmprovider.Instance, error) bool) {
		end, err := p.begin(ctx, "watch", "")
		if err != nil {
			yield(vmprovider.Instance{}, err)
			return
		}
		end()
		p.notifier.Watch(ctx, p.List)(yield)
	}
}

func (p *Provider) marker(id string) string { return MarkerVariable + "=" + id }

const cgroupPrefix = "solstice-"

// cgroupPath is where this provider makes a machine's cgroup, empty where none.
func (p *Provider) cgroupPath(id string) string {
	if p.cgroups == "" {
		return ""
	}
	return filepath.Join(p.cgroups, p.cgroupName(id))
}

// cgroupName tells apart machines of equal ID below different roots.
func (p *Provider) cgroupName(id string) string {
	h := sha256.Sum256([]byte(p.cfg.Root))
	return cgroupPrefix + hex.EncodeToString(h[:6]) + "-" + id
}
