package solstice

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"time"

	"github.com/uptrace/bun"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

// DefaultLabel is the label of a job whose workflow does not say runs-on.
const DefaultLabel = "host"

// Config says what an Engine works with. DB, Queue and Blobs (or Logs) are
// required; everything else has a default that its zero value stands for.
type Config struct {
	// DB holds the state; [Migrate] it first. The engine does not close it.
	DB *bun.DB
	// Queue wakes engines and carries run requests and statuses. The engine
	// does not close it.
	Queue queue.Queue
	// Blobs keeps logs, shared by all engines of an installation.
	Blobs blobstore.Store
	// Logs replaces the log store made of Blobs and DB, for instance by
	// logstream/filelog where there is one engine only.
	Logs logstream.Store
	// Pools are the machines that this engine may make. Without any it serves
	// agents, clients and the outbox only.
	Pools []Pool
	// Forges by instance name, those that this engine hosts itself.
	Forges map[string]forge.Forge
	// ReportedElsewhere are those of Forges whose statuses another program reads
	// from the queue and reports, such as an integration.
	ReportedElsewhere []string
	Logger            *slog.Logger // nil: discarded
	// TracerProvider and MeterProvider; nil: otel's global ones.
	TracerProvider trace.TracerProvider
	MeterProvider  metric.MeterProvider

	// AgentListener is where agents reach this engine. nil: AgentAddr is
	// listened on, by default a free port of 127.0.0.1.
	AgentListener net.Listener
	AgentAddr     string
	// LocalAgents is where agents inside this process reach this engine, which
	// closes it; see agent.Local. Nobody else may: it has no TLS. nil: there are
	// none, or they come as all do.
	LocalAgents net.Listener
	// Contacts is what agents dial, in order; by default the listener's address.
	// Agents are told those of the other engines too, after these.
	Contacts []string
	// AgentTLS proves this engine to agents. nil: a CA made for this process,
	// so agents cannot follow to another process.
	AgentTLS *AgentTLS
	// PeerAddr is where other engines' Peers reach this one's logs; empty:
	// nowhere, they read what is stored.
	PeerAddr string
	// Peers asks other engines for the logs that they receive. nil: this one
	// reads what is stored, which is a moment later.
	Peers Peers
	// RunnerURL is where guests download the agent; a process pool needs none.
	RunnerURL string

	// MaxConcurrency bounds the jobs that this engine has under way: it claims no
	// more. Those whose agents come from another engine count, and are not
	// turned away. 0: the number of CPUs.
	MaxConcurrency int
	// Retries bounds how often a job is tried again after a failure of each
	// class. nil: boot 2, agent_lost 2, infra 2.
	Retries map[Class]int
	// LogBytes is a job's log quota; 0: 256 MiB.
	LogBytes int64
	// CancelGrace is what a job gets between SIGTERM and SIGKILL; 0: 10 s.
	CancelGrace time.Duration
	// DrainTimeout is how long Run waits for jobs under way once its context is
	// done, before it hands them over; 0: not at all.
	DrainTimeout time.Duration
	// Timing of leases and deadlines; the zero value is right outside tests.
	Timing Timing
	// Space is the room on disk that is needed to take on work.
	Space Space
	// Retention says how long runs, logs and what else piles up is kept.
	Retention Retention
	// StatusPrefix begins the key of every commit status; empty: "solstice".
	StatusPrefix string
	// TargetURL gives the link of a status; nil: none. jobID is empty for the
	// run's own status.
	TargetURL func(runID, jobID string) string

	protocols protocols   // of agents
	clock     store.Clock // nil: the default
}

// Timing holds the engine's clocks. Fields that are zero get the default.
type Timing struct {
	// Lease is how long an attempt stays owned without renewal, which happens
	// at a third of it. 30 s.
	Lease time.Duration
	// AgentDeadline is how long an agent goes on without contact. 10 min.
	AgentDeadline time.Duration
	// DeadlineMargin is added to AgentDeadline before the server gives an
	// attempt up. A fifth of AgentDeadline, at least 1 s.
	DeadlineMargin time.Duration
	// Heartbeat is how often an idle agent says so. A quarter of Lease.
	Heartbeat time.Duration
	// Tick is how often the slow safety nets run: claiming without a wake-up,
	// reaping, relaying. 5 s.
	Tick time.Duration
	// Boot is how long a machine may take until its agent attaches. 5 min.
	Boot time.Duration
	// HoldTimeout is how long a retry waits for the destruction of the lost
	// attempt's machine when its provider cannot be reached. 30 min.
	HoldTimeout time.Duration
	// Collect is how often what Retention lets go is removed. 5 min.
	Collect time.Duration
}

// AgentTLS is how an engine proves itself to agents: a certificate for
// agent.ServerName, and the CA that agents are given to verify it.
type AgentTLS struct {
	GetCertificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	CA             []byte // PEM
}

// Pool maps labels to a provider.
type Pool struct {
	// Name identifies the pool in an installation; empty: its first label.
	Name string
	// Labels are the runs-on values that it serves; empty: its Name.
	Labels   []string
	Provider vmprovider.Provider
	// Host names the hypervisor; pools with one host share HostCapacity.
	// Empty: this machine's host name.
	Host string
	// Capacity is how many machines the pool may have; 0: MaxConcurrency.
	Capacity int
	// HostCapacity is how many machines the host may have over all pools; 0:
	// not limited beyond Capacity.
	HostCapacity int
	// HostBoots is how many machines of the host may boot at once, over all its
	// pools and all engines; jobs that wait for that say so, and their deadlines do
	// not run. Machines for jobs come before those that are to wait for one. 0:
	// twice the CPUs of the engine's machine, at least 8.
	HostBoots   int
	Image       vmprovider.Image
	CPUs        int
	MemoryBytes int64
	DiskBytes   int64
	// Warm is how many machines to keep booted and enrolled, waiting for a job;
	// engines that have the pool at the same host keep that many together. They
	// count as all machines do, and give way when jobs of the host's other pools
	// need the room. One is replaced when its agent falls silent, and gets no job
	// once Image, CPUs, MemoryBytes, DiskBytes, AgentSHA256 or Recipe are other ones. While
	// they do not come to be ready, fewer and fewer are tried: Tick to 60 Ticks
	// apart.
	Warm int
	// WarmMaxAge is when a machine that waits is replaced, one after the other, at
	// twice that at the latest; 0: 1 h.
	WarmMaxAge time.Duration
	// Boot overrides Timing.Boot.
	Boot time.Duration
	// Contacts is what the agents of this pool dial, in order, where its guests
	// reach this engine at other addresses than Config.Contacts. They are told no
	// others.
	Contacts []string
	// RunnerURL is Config.RunnerURL as this pool's guests reach it.
	RunnerURL string
	// AgentSHA256 of the agents at RunnerURL, hex by "os/arch".
	AgentSHA256 map[string]string
	// Recipe stands for whatever else Provider makes machines from, such as their
	// network: those of another one get no job of the pool.
	Recipe string
}

func orDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

func (t *Timing) fill() {
	orDefault(&t.Lease, 30*time.Second)
	orDefault(&t.AgentDeadline, 10*time.Minute)
	orDefault(&t.DeadlineMargin, max(t.AgentDeadline/5, time.Second))
	orDefault(&t.Heartbeat, min(t.Lease/4, t.AgentDeadline/4))
	orDefault(&t.Tick, 5*time.Second)
	orDefault(&t.Boot, 5*time.Minute)
	orDefault(&t.HoldTimeout, 30*time.Minute)
	orDefault(&t.Collect, 5*time.Minute)
}

// fill checks a configuration and replaces zero values; all problems are
// reported at once.
func (c *Config) fill() error {
	var errs []error
	missing := func(what string) { errs = append(errs, fmt.Errorf("solstice: Config.%s is missing", what)) }
	if c.DB == nil {
		missing("DB")
	}
	if c.Queue == nil {
		missing("Queue")
	}
	if c.Blobs == nil && c.Logs == nil {
		missing("Blobs (or Config.Logs)")
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.TracerProvider == nil {
		c.TracerProvider = otel.GetTracerProvider()
	}
	if c.MeterProvider == nil {
		c.MeterProvider = otel.GetMeterProvider()
	}
	orDefault(&c.AgentAddr, "127.0.0.1:0")
	orDefault(&c.MaxConcurrency, runtime.NumCPU())
	if c.Retries == nil {
		c.Retries = map[Class]int{ClassBoot: 2, ClassAgentLost: 2, ClassInfra: 2}
	}
	orDefault(&c.LogBytes, 256<<20)
	orDefault(&c.CancelGrace, 10*time.Second)
	orDefault(&c.StatusPrefix, "solstice")
	orDefault(&c.protocols, protocolsSpoken)
	if c.Space.MinFree < 0 {
		errs = append(errs, errors.New("solstice: Config.Space.MinFree is negative"))
	}
	c.Timing.fill()
	if err := c.Retention.fill(); err != nil {
		errs = append(errs, err)
	}
	for name, f := range c.Forges {
		if f == nil {
			errs = append(errs, fmt.Errorf("solstice: Config.Forges[%q] is nil", name))
		}
		if err := queue.ValidateName("forge instance", name); err != nil {
			errs = append(errs, err)
		}
	}

	hostname, err := os.Hostname()
	if err != nil {
		hostname = "localhost"
	}
	pools := append([]Pool(nil), c.Pools...)
	seen := map[string]bool{}
	for i := range pools {
		p := &pools[i]
		if p.Name == "" && len(p.Labels) > 0 {
			p.Name = p.Labels[0]
		}
		if len(p.Labels) == 0 && p.Name != "" {
			p.Labels = []string{p.Name}
		}
		switch {
		case p.Name == "":
			errs = append(errs, fmt.Errorf("solstice: Config.Pools[%d] has neither a name nor a label", i))
		case p.Provider == nil:
			errs = append(errs, fmt.Errorf("solstice: pool %q has no provider", p.Name))
		case seen[p.Name]:
			errs = append(errs, fmt.Errorf("solstice: there are two pools named %q", p.Name))
		case p.Capacity < 0 || p.HostCapacity < 0 || p.HostBoots < 0 || p.Warm < 0 || p.WarmMaxAge < 0:
			errs = append(errs, fmt.Errorf("solstice: pool %q: negative capacity, boots, warm count or age", p.Name))
		}
		seen[p.Name] = true
		orDefault(&p.Host, hostname)
		orDefault(&p.Capacity, c.MaxConcurrency)
		orDefault(&p.HostCapacity, 1<<30)
		orDefault(&p.HostBoots, max(8, 2*runtime.NumCPU()))
		orDefault(&p.WarmMaxAge, time.Hour)
		orDefault(&p.Boot, c.Timing.Boot)
		orDefault(&p.RunnerURL, c.RunnerURL)
		if p.Warm > p.Capacity {
			errs = append(errs, fmt.Errorf("solstice: pool %q: warm %d is more than its capacity %d", p.Name, p.Warm, p.Capacity))
		}
	}
	c.Pools = pools
	return errors.Join(errs...)
}
