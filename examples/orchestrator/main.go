// Command orchestrator is a daemon that runs CI jobs: it takes runs from
// clients, plans them, and executes their jobs on machines of its pools. With
// no flags it keeps everything in its state directory and listens on loopback.
// It imports nothing internal, so it can be copied.
package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/forgedaemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/pools"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
	"github.com/solstice-ci/solstice-go/solstice/integration"
	"github.com/solstice-ci/solstice-go/solstice/logstream/filelog"
	"github.com/solstice-ci/solstice-go/solstice/orchestrator"
	"github.com/solstice-ci/solstice-go/solstice/runpages"
	"github.com/solstice-ci/solstice-go/solstice/telemetry"
)

type flags struct {
	daemon.Telemetry
	daemon.State
	storage.Database
	storage.Blobs
	storage.Broker
	daemon.GRPC
	daemon.Peers
	daemon.HTTP
	daemon.AgentEndpoint
	daemon.Runner
	retention

	Serve   struct{}     `cmd:"" default:"1" help:"Run; the default."`
	Backup  backupFlags  `cmd:"" help:"Copy the state directory into one file, also while the orchestrator runs. The file holds secrets."`
	Restore restoreFlags `cmd:"" help:"Make the state directory, which must not exist or be empty, of a backup."`

	Check forgedaemon.Check `cmd:"" help:"Say what is wrong with the set-up of the forges of --forges: credentials, permissions, webhooks."`

	AutoMigrate    bool           `group:"Database" env:"AUTO_MIGRATE" help:"Bring PostgreSQL to this version's schema; SQLite always is."`
	MTLSRole       string         `group:"gRPC" name:"mtls-role" env:"MTLS_ROLE" default:"read" enum:"none,read,write,admin" help:"What a client may whose certificate --grpc-tls-ca verified: none, read, write or admin."`
	Dev            bool           `group:"gRPC" env:"SOLSTICE_DEV" help:"For development: gRPC reflection."`
	MaxConcurrency int            `group:"Pools" env:"MAX_CONCURRENCY" default:"0" placeholder:"N" help:"Jobs at once; 0: the number of CPUs."`
	CapacityMap    map[string]int `group:"Pools" env:"CAPACITY_MAP" mapsep:"," placeholder:"LABEL=N,…" help:"Pools by runs-on label, and how many machines each may have. Default: host, with as many as --max-concurrency."`
	TrustedPools   []string       `group:"Pools" env:"TRUSTED_POOLS" placeholder:"LABEL" help:"Pools whose jobs are trusted: their agents run inside this process instead of in one each, which is faster. When this process ends, however it does, these jobs end and are tried again."`
	MachinesDir    string         `group:"Pools" env:"MACHINES_DIR" placeholder:"DIR" help:"Directory of the process pools' machines; orchestrators on one computer may share it, and with it its capacity. Default: machines in the state directory."`
	PoolEnv        []string       `group:"Pools" env:"POOL_ENV" placeholder:"NAME" help:"Pass this variable on to the steps of the process pools, or with a * at the end all that begin so."`
	Pools          string         `group:"Pools" env:"POOLS" placeholder:"FILE" help:"YAML file of pools, such as ones of virtual machines, instead of --capacity-map; see docs/pools.md."`
	ImageCatalogue string         `group:"Pools" name:"catalogue" env:"IMAGE_CATALOGUE" placeholder:"FILE" help:"The catalogue of images, where --pools names none; see docs/images.md."`
	ImageDir       string         `group:"Pools" env:"IMAGE_DIR" placeholder:"DIR" help:"Directory of downloaded images, which the hypervisor's user has to be able to read. Default: images in the state directory."`
	Forges         string         `group:"Forges" env:"FORGES" placeholder:"FILE" help:"YAML file of forges whose webhooks start runs, and which are told how those end; see docs/forges.md. Webhooks of NAME come to /webhooks/NAME at --http-addr."`
	PublicURL      string         `group:"Forges" name:"public-url" env:"PUBLIC_URL" placeholder:"URL" help:"Where people reach --http-addr, such as https://ci.example.org: statuses then link to pages of their runs and to logs. Default: no links."`
	RepoRoot       string         `group:"Forges" env:"REPO_ROOT" default:"/" placeholder:"DIR" help:"Directory of the repositories on this machine that may be run (${default})."`
	MinFreeMB      int            `group:"State" name:"min-free-mb" env:"MIN_FREE_MB" default:"256" help:"Room in MiB on the disks of the state directory, a SQLite file, the blobs and the machines, below which no runs are accepted and no jobs begun until there is more."`
	DrainTimeout   time.Duration  `group:"State" env:"DRAIN_TIMEOUT" default:"30s" help:"How long SIGTERM waits for jobs under way, which then go on without this process."`
}

func main() {
	agent.Hook() // the process pool starts this program again as its agent
	daemon.Main(func(ctx context.Context) error {
		var f flags
		cmd, err := daemon.Parse(&f, daemon.Program{
			Name:        "solstice-orchestrator",
			Description: "Runs CI jobs on throw-away machines. Its defaults need nothing but git; jobs are then processes of this machine, which isolates nothing.",
		})
		if err != nil {
			return err
		}
		switch cmd.Command() {
		case "backup <file>":
			return f.backup(ctx)
		case "restore <file>":
			return f.restore(ctx)
		case "check":
			return f.check(ctx)
		}
		return f.run(ctx)
	})
}

// closers are called in reverse.
type closers []func() error

func (c *closers) add(f func() error) { *c = append(*c, f) }

func (c *closers) close(err error) error {
	for i := len(*c) - 1; i >= 0; i-- {
		err = errors.Join(err, (*c)[i]())
	}
	return err
}

func (f *flags) run(ctx context.Context) (err error) {
	shutdown, err := f.Telemetry.Init(ctx)
	if err != nil {
		return err
	}
	var open closers
	defer func() { err = open.close(err) }()
	open.add(func() error { return bounded(shutdown) })
	log := slog.Default()

	dir, err := f.State.Open()
	if err != nil {
		return err
	}
	unlock, err := storage.Lock(dir, "orchestrator")
	if err != nil {
		return err
	}
	open.add(unlock)
	db, err := f.Database.Open(ctx, dir, log)
	if err != nil {
		return err
	}
	open.add(db.Close)
	tls, err := f.certificates(dir, storage.IsPostgres(db))
	if err != nil {
		return err
	}
	if !storage.IsPostgres(db) || f.AutoMigrate {
		if err := solstice.Migrate(ctx, db); err != nil {
			return problem("cannot migrate the database", err, "")
		}
	}
	tokens, err := orchestrator.OpenTokens(ctx, db)
	if errors.Is(err, solstice.ErrSchema) {
		return problem("the database's schema is not this version's", err, "make a backup, then start once with --auto-migrate")
	}
	if err != nil {
		return problem("cannot open the state", err, "")
	}
	if err := tokens.First(ctx, filepath.Join(dir, "admin.token")); err != nil {
		return problem("cannot make the first token", err, "")
	}

	cfg := solstice.Config{
		DB: db, Logger: log, MaxConcurrency: f.MaxConcurrency, DrainTimeout: f.DrainTimeout, AgentTLS: tls.agents,
		Retention: f.retention.rules(),
	}
	if cfg.Space, err = f.space(dir); err != nil {
		return err
	}
	if f.PeerAddr != "" {
		proof, err := f.Peers.TLS(f.GRPC)
		if err != nil {
			return err
		}
		cfg.PeerAddr, cfg.Peers = f.PeerAddr, orchestrator.NewPeers(proof)
	}
	machines, err := f.parts(ctx, db, dir, &cfg, &open)
	if err != nil {
		return err
	}
	var pages *runpages.Pages
	if f.PublicURL != "" {
		if pages, err = runpages.Open(ctx, db, runpages.Config{URL: f.PublicURL, Logger: log}); err != nil {
			return usage("--public-url cannot be used", err, "")
		}
		cfg.TargetURL = pages.URL
	}
	var hooks *integration.Integration
	if f.Forges != "" {
		if hooks, err = f.forgesOfFile(ctx, dir, &cfg, &open); err != nil {
			return err
		}
	}

	clients, err := f.GRPC.Listen(ctx)
	if err != nil {
		return err
	}
	open.add(closed(clients))
	people, err := f.HTTP.Listen(ctx)
	if err != nil {
		return err
	}
	open.add(closed(people))
	guests, url, err := f.Runner.Listen(ctx)
	if err != nil {
		return err
	}
	open.add(closed(guests))
	if cfg.AgentListener, cfg.Contacts, err = f.AgentEndpoint.Listen(ctx); err != nil {
		return err
	}
	open.add(closed(cfg.AgentListener))
	cfg.RunnerURL = url
	if machines != nil {
		at := pools.Endpoints{Agents: cfg.AgentListener.Addr(), Runner: guests.Addr(), Contacts: cfg.Contacts, RunnerURL: url}
		if cfg.Pools, err = machines.Pools(at); err != nil {
			return usage("the guests of --pools could not reach this orchestrator", err, "")
		}
	}

	eng, err := solstice.New(cfg)
	if err != nil {
		return problem("cannot start the engine", err, "")
	}
	role, _ := orchestrator.ParseRole(f.MTLSRole) // none is no role
	srv, err := orchestrator.New(orchestrator.Config{
		Engine: eng, Tokens: tokens, CertRole: role, Reflection: f.Dev, Logger: log,
	}, tls.clients...)
	if err != nil {
		return errors.Join(err, eng.Close())
	}
	log.InfoContext(ctx, "orchestrator started", "version", daemon.Version(), "state_dir", dir, "grpc_addr", clients.Addr().String(),
		"http_addr", people.Addr().String(), "agent_addr", eng.AgentAddr(), "runner_addr", guests.Addr().String())
	return f.serve(ctx, eng, srv, pages, hooks, clients, people, guests, dir)
}

// serve ends when ctx does, or when a listener fails. Clients are served while
// the engine drains.
func (f *flags) serve(ctx context.Context, eng *solstice.Engine, srv *orchestrator.Server, pages *runpages.Pages, hooks *integration.Integration, clients, people, guests net.Listener, dir string) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", srv.Healthz)
	mux.HandleFunc("GET /readyz", srv.Readyz)
	mux.Handle("GET /metrics", telemetry.MetricsHandler())
	webhooks(mux, hooks)
	if pages != nil {
		mux.Handle("/runs/", pages.Handler(ctx, eng))
	}
	web, runner := daemon.HTTPServer(mux), daemon.HTTPServer(f.Runner.Agents(dir).Handler())

	var servers sync.WaitGroup
	start := func(serve func() error) {
		servers.Go(func() {
			if err := serve(); err != nil && !errors.Is(err, http.ErrServerClosed) {
				stop(problem("a listener failed", err, ""))
			}
		})
	}
	start(func() error { return srv.Serve(clients) })
	start(func() error { return web.Serve(people) })
	start(func() error { return runner.Serve(guests) })
	if hooks != nil {
		servers.Go(func() { _ = hooks.Run(ctx) }) // until ctx ends
	}

	err := eng.Run(ctx)
	if cause := context.Cause(ctx); err == nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	_ = bounded(func(ctx context.Context) error { srv.Drain(ctx); return nil })
	err = errors.Join(err, bounded(web.Shutdown), runner.Close())
	servers.Wait()
	return err
}

// bounded gives f as long as a supervisor is sure to wait.
func bounded(f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return f(ctx)
}

// closed closes a listener that may be closed already.
func closed(l net.Listener) func() error {
	return func() error {
		if err := l.Close(); !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	}
}

// parts opens what the engine works with; the pools of --pools too, which it
// returns.
func (f *flags) parts(ctx context.Context, db *bun.DB, dir string, cfg *solstice.Config, open *closers) (*pools.Set, error) {
	q, err := f.Broker.Open(ctx, db, cfg.Logger)
	if err != nil {
		return nil, err
	}
	open.add(q.Close)
	cfg.Queue = q
	if storage.IsPostgres(db) { // which several orchestrators may share, and so the logs
		blobs, err := f.Blobs.Open(ctx, dir, cfg.Logger)
		if err != nil {
			return nil, err
		}
		open.add(blobs.Close)
		cfg.Blobs = blobs
	} else {
		if f.S3Bucket != "" {
			return nil, problem("an embedded orchestrator keeps its logs beside its database, not in a bucket", nil, "give --database-url of a PostgreSQL, or leave --s3-bucket away")
		}
		logs, err := filelog.Open(filepath.Join(dir, "logs"), filelog.Options{})
		if err != nil {
			return nil, problem("cannot open the logs", err, "")
		}
		open.add(logs.Close)
		cfg.Logs = logs
	}
	repos, err := localgit.Open(ctx, localgit.Config{Root: f.RepoRoot, StatusDir: filepath.Join(dir, "statuses")})
	if err != nil {
		return nil, problem("cannot open the repositories of --repo-root", err, "")
	}
	open.add(repos.Close)
	cfg.Forges = map[string]forge.Forge{"local": repos}

	if f.Pools != "" {
		return f.poolsOfFile(ctx, dir, cfg, open)
	}
	return nil, f.processPools(dir, cfg, open)
}

// space is the room that is needed on each disk that this process writes to.
func (f *flags) space(dir string) (solstice.Space, error) {
	if f.MinFreeMB < 1 {
		return solstice.Space{}, usage("--min-free-mb is not positive", nil, "correct it")
	}
	database, err := f.Database.Dir(dir)
	if err != nil {
		return solstice.Space{}, err
	}
	s := solstice.Space{Dirs: []string{dir}, MinFree: int64(f.MinFreeMB) << 20}
	for _, other := range []string{database, f.BlobFSRoot, f.MachinesDir} {
		if other != "" && !slices.Contains(s.Dirs, other) {
			s.Dirs = append(s.Dirs, other)
		}
	}
	return s, nil
}

func problem(what string, err error, advice string) error {
	return &daemon.Problem{What: what, Err: err, Advice: advice}
}

func usage(what string, err error, advice string) error {
	return &daemon.ExitError{Code: daemon.ExitUsage, Err: problem(what, err, advice)}
}
