// Package integration takes the webhooks of forges: what a forge integration daemon
// does, for programs that serve webhooks themselves.
//
// A request passes the bounds of size, time and number first, then the driver's
// check of its signature over the raw body, then the allow-list; what is left is
// written down as a delivery, in one transaction with the message that asks for
// runs, and answered with 202. A relay publishes that message. The same delivery, or
// the same body within a day, is a duplicate, which starts nothing. What a forge sent no
// webhook of, or one that did not come, is found by looking at its heads now and then,
// and becomes a delivery as well.
//
//	in, err := integration.New(ctx, integration.Config{DB: db, Queue: q, Forges: forges})
//	http.Handle("/webhooks/", in)
//	err = in.Run(ctx)
package integration

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"path"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/uptrace/bun"
	"go.opentelemetry.io/otel/metric"
	noopmetric "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/trace"
	nooptrace "go.opentelemetry.io/otel/trace/noop"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/relay"
	"github.com/solstice-ci/solstice-go/internal/reporter"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
)

// ErrInvalid: a configuration or an argument that cannot be.
var ErrInvalid = errors.New("integration: invalid")

// Instance is one forge.
type Instance struct {
	Forge forge.Forge
	// Secret of its webhooks. Without one it takes none.
	Secret forge.SecretFunc
	// Allow lists whose webhooks start something: "owner", "owner/name", or
	// "group/subgroup"; compared without regard to case. Empty: nobody's.
	Allow []string
	// AllowAll takes those of everybody who has the secret, instead of Allow.
	AllowAll bool
	// Poll is Config.Poll of this forge; 0: what that says.
	Poll time.Duration
}

// Config of an Integration; zero values give the defaults.
type Config struct {
	DB    *bun.DB     // migrated; required
	Queue queue.Queue // required
	// Forges by instance name, up to 63 of a-z 0-9 . _ -. Webhooks of NAME come to
	// Prefix + NAME.
	Forges map[string]Instance
	Prefix string // "/webhooks/"
	// ReportStatuses has the statuses for these forges read from the queue and
	// reported. Leave it out where the engine of the same process has the forges.
	ReportStatuses bool

	MaxBodyBytes int64         // of a webhook; 25 MiB, what GitHub sends at most
	BodyTimeout  time.Duration // until a body has arrived; 10 s
	// MaxRequests is how many are read, wait or are worked on at once; 1,024. One more
	// ends that which has been sending its body for longest, if one is.
	MaxRequests int
	// DuplicateBody is for how long the same body is the same webhook; 24 h.
	DuplicateBody time.Duration
	Tick          time.Duration // of the slow looks at what is to be sent; 5 s
	// Poll is how often each repository is looked at for heads whose webhooks never
	// came, at forges that list heads; 5 min, negative: never.
	Poll time.Duration
	// DeliveryAge is how long webhooks are kept, and what forges were told; at least
	// an hour. 0: somebody else removes them. While an engine works on the same
	// database its retention counts, not this.
	DeliveryAge time.Duration
	// Grace is how long messages and statuses that are under way go on after Run's
	// context has ended; 0: not at all.
	Grace time.Duration

	Logger         *slog.Logger // nil: silent
	TracerProvider trace.TracerProvider
	MeterProvider  metric.MeterProvider
}

// lease is for how long messages and reports are claimed.
const lease = 30 * time.Second

// roomFor is how many bodies of the largest size are in memory at once; of smaller
// ones more.
const roomFor = 4

// atWork is how many webhooks that have arrived are looked into and written down at
// once; others wait.
const atWork = 32

// instanceName is what a path and a topic may have.
var instanceName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

func (c *Config) fill() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...)))
	}
	if c.DB == nil || c.Queue == nil {
		bad("Config.DB and Config.Queue are required")
	}
	if len(c.Forges) == 0 {
		bad("Config.Forges is empty")
	}
	for _, name := range slices.Sorted(maps.Keys(c.Forges)) {
		f := c.Forges[name]
		switch {
		case !instanceName.MatchString(name):
			bad("forge %q: a name is up to 63 of a-z 0-9 . _ -", name)
		case f.Forge == nil:
			bad("forge %s: Forge is nil", name)
		case f.AllowAll && len(f.Allow) > 0:
			bad("forge %s: Allow and AllowAll exclude each other", name)
		}
		for _, a := range f.Allow {
			if strings.Trim(a, "/") != a || a == "" || strings.Contains(a, "*") {
				bad("forge %s: allowed %q: want an owner or owner/name", name, a)
			}
		}
	}
	if c.MaxBodyBytes < 0 || c.BodyTimeout < 0 || c.MaxRequests < 0 || c.DuplicateBody < 0 || c.Tick < 0 || c.DeliveryAge < 0 || c.Grace < 0 {
		bad("limits are not negative")
	}
	if c.DeliveryAge > 0 && c.DeliveryAge < time.Hour {
		bad("DeliveryAge is %s, at least an hour is needed", c.DeliveryAge)
	}
	if c.Prefix == "" {
		c.Prefix = "/webhooks/"
	}
	if !strings.HasPrefix(c.Prefix, "/") || !strings.HasSuffix(c.Prefix, "/") || path.Clean(c.Prefix) != strings.TrimSuffix(c.Prefix, "/") && c.Prefix != "/" {
		bad("Prefix %q: want one like /webhooks/", c.Prefix)
	}
	orDefault(&c.MaxBodyBytes, 25<<20)
	orDefault(&c.BodyTimeout, 10*time.Second)
	orDefault(&c.MaxRequests, 1024)
	orDefault(&c.DuplicateBody, 24*time.Hour)
	orDefault(&c.Tick, 5*time.Second)
	orDefault(&c.Poll, 5*time.Minute)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.TracerProvider == nil {
		c.TracerProvider = nooptrace.NewTracerProvider()
	}
	if c.MeterProvider == nil {
		c.MeterProvider = noopmetric.NewMeterProvider()
	}
	return errors.Join(errs...)
}

func orDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// Integration is an http.Handler; safe for concurrent use.
type Integration struct {
	cfg      Config
	id       string
	store    *store.Store
	log      *slog.Logger
	tracer   trace.Tracer
	webhooks metric.Int64Counter
	room     *room
	slots    chan struct{} // of what is worked on
	kick     chan struct{}

	mu         sync.Mutex
	complaints map[string]complaint // by forge: the last one
}

// New checks a configuration. The error wraps ErrInvalid, or says what is wrong with
// the database.
func New(ctx context.Context, cfg Config) (*Integration, error) {
	if err := cfg.fill(); err != nil {
		return nil, err
	}
	s, err := store.New(ctx, cfg.DB, store.Options{})
	if err != nil {
		return nil, fmt.Errorf("integration: open state: %w", err)
	}
	const scope = "github.com/solstice-ci/solstice-go/solstice/integration"
	in := &Integration{
		cfg: cfg, id: uuid.NewString(), store: s, log: cfg.Logger, tracer: cfg.TracerProvider.Tracer(scope),
		room: &room{places: cfg.MaxRequests, bytes: roomFor * cfg.MaxBodyBytes}, slots: make(chan struct{}, atWork), kick: make(chan struct{}, 1),
		complaints: map[string]complaint{},
	}
	in.webhooks, err = cfg.MeterProvider.Meter(scope).Int64Counter("solstice.webhooks",
		metric.WithDescription("Webhooks by forge and by what became of them."), metric.WithUnit("{webhook}"))
	if err != nil {
		return nil, fmt.Errorf("integration: metrics: %w", err)
	}
	return in, nil
}

// Deliveries are those that it took.
func (in *Integration) Deliveries() *Deliveries { return &Deliveries{in.store} }

// Ready reports whether webhooks can be written down.
func (in *Integration) Ready(ctx context.Context) error {
	if _, err := in.store.Now(ctx); err != nil {
		return fmt.Errorf("integration: database: %w", err)
	}
	return nil
}

// Run publishes what webhooks ask for, looks for heads whose webhooks never came, and
// reports statuses, until ctx ends.
func (in *Integration) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	r := relay.Relay{Store: in.store, Queue: in.cfg.Queue, Owner: in.id, Lease: lease, Tick: in.cfg.Tick, Kick: in.kick, Logger: in.log, Grace: in.cfg.Grace}
	wg.Go(func() { r.Run(ctx) })
	in.poll(ctx, &wg)
	if in.cfg.DeliveryAge > 0 {
		wg.Go(func() { in.collect(ctx) })
	}
	if in.cfg.ReportStatuses {
		rep := &reporter.Reporter{Store: in.store, Forges: map[string]forge.Forge{}, Owner: in.id, Lease: lease, Tick: in.cfg.Tick, Logger: in.log, Grace: in.cfg.Grace}
		for name, f := range in.cfg.Forges {
			rep.Forges[name] = f.Forge
		}
		wg.Go(func() { rep.Run(ctx) })
		for name := range in.cfg.Forges {
			c := &queue.Consumer{
				Queue: in.cfg.Queue, Topic: messages.StatusTopic(name), Group: messages.Group, Concurrency: 4,
				Handler: messages.Handler(func(ctx context.Context, _ queue.Message, s messages.Status) error { return rep.Accept(ctx, s) }),
				Logger:  in.log, TracerProvider: in.cfg.TracerProvider, MeterProvider: in.cfg.MeterProvider,
			}
			wg.Go(func() {
				for ctx.Err() == nil {
					if err := c.Run(ctx); err != nil && ctx.Err() == nil {
						in.log.ErrorContext(ctx, "consumer ended, starting it again", "topic", messages.StatusTopic(name), "error", err)
					}
					select {
					case <-ctx.Done():
					case <-time.After(in.cfg.Tick):
					}
				}
			})
		}
	}
	wg.Wait()
	return ctx.Err()
}

var _ http.Handler = (*Integration)(nil)
