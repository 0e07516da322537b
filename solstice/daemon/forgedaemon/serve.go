package forgedaemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/uptrace/bun"
	"go.opentelemetry.io/otel"

	"github.com/solstice-ci/solstice-go/forge/remoteforge"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/forges"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
	"github.com/solstice-ci/solstice-go/solstice/integration"
	"github.com/solstice-ci/solstice-go/solstice/telemetry"
)

var webhookPath = regexp.MustCompile(`^/[A-Za-z0-9/._~-]+$`)

// serveCmd is the daemon itself.
type serveCmd struct{}

// Run is kong's.
func (serveCmd) Run(ctx context.Context, d *Daemon) (err error) {
	f := d.Flags
	shutdown, err := f.Telemetry.Init(ctx)
	if err != nil {
		return err
	}
	var open []func() error
	defer func() {
		for i := len(open) - 1; i >= 0; i-- {
			err = errors.Join(err, open[i]())
		}
	}()
	open = append(open, func() error { return bounded(shutdown) })
	log := slog.Default()

	dir, err := f.State.Open()
	if err != nil {
		return err
	}
	if err := d.checkQueue(); err != nil {
		return err
	}
	locks := []string{d.Name}
	if file, err := f.Database.Dir(dir); err == nil && file == dir {
		locks = append(locks, "orchestrator") // whose database would have the same name
	}
	for _, name := range locks {
		unlock, err := storage.Lock(dir, name)
		if err != nil {
			return err
		}
		open = append(open, unlock)
	}
	all, closeAll, err := d.Open(ctx, dir, log)
	if err != nil {
		return err
	}
	open = append(open, closeAll)
	var proof *tls.Config // of listeners on TCP
	for _, one := range all {
		if at := d.webhookPath(one.Name); !webhookPath.MatchString(at) {
			return usage("webhooks cannot come to "+at, nil, "give --webhook-path of letters, digits, / . _ ~ -, with a slash in front")
		}
		if one.Serve != "" && !strings.HasPrefix(one.Serve, "unix:") {
			if proof, err = f.ServerTLS.Mutual(); err != nil {
				return err
			}
		}
	}
	db, err := f.Database.Open(ctx, dir, log)
	if err != nil {
		return err
	}
	open = append(open, db.Close)
	if err := d.migrate(ctx, db); err != nil {
		return err
	}
	q, err := d.queue(ctx, db, log)
	if err != nil {
		return err
	}
	open = append(open, q.Close)
	in, err := integration.New(ctx, integration.Config{
		DB: db, Queue: q, Forges: instances(all), ReportStatuses: true, DeliveryAge: max(0, time.Duration(f.RetainDeliveries)), Grace: f.DrainTimeout,
		Logger: log, TracerProvider: otel.GetTracerProvider(), MeterProvider: otel.GetMeterProvider(),
	})
	if err != nil {
		return problem("cannot take webhooks", err, "")
	}
	people, err := f.HTTP.Listen(ctx)
	if err != nil {
		return err
	}
	var names []string
	for _, one := range all {
		names = append(names, one.Name)
		if one.Secret != nil && one.Forge.Capabilities().Webhooks && !one.AllowAll && len(one.Allow) == 0 {
			log.WarnContext(ctx, "nobody's webhooks start anything: the allow-list is empty", "forge", one.Name)
		}
	}
	log.InfoContext(ctx, d.Name+" started", "version", daemon.Version(), "state_dir", dir, "http_addr", people.Addr().String(), "forges", names)
	return d.run(ctx, in, all, people, proof, log)
}

func (d *Daemon) migrate(ctx context.Context, db *bun.DB) error {
	if !storage.IsPostgres(db) || d.Flags.AutoMigrate {
		if err := solstice.Migrate(ctx, db); err != nil {
			return problem("cannot migrate the database", err, "")
		}
	}
	_, err := integration.OpenDeliveries(ctx, db)
	if errors.Is(err, solstice.ErrSchema) {
		return problem("the database's schema is not this version's", err, "make a backup, then start once with --auto-migrate")
	}
	if err != nil {
		return problem("cannot open the state", err, "")
	}
	return nil
}

// run ends when ctx does, or when a listener fails: first no more webhooks are taken,
// then what is on its way has some time.
func (d *Daemon) run(ctx context.Context, in *integration.Integration, all []forges.Forge, people net.Listener, proof *tls.Config, log *slog.Logger) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	web := daemon.HTTPServer(d.pages(in, all))
	var servers, intake sync.WaitGroup
	servers.Go(func() {
		if err := web.Serve(people); !errors.Is(err, http.ErrServerClosed) {
			stop(problem("a listener failed", err, ""))
		}
	})
	for _, one := range all {
		if one.Serve == "" {
			continue
		}
		s := remoteforge.NewServer(one.Forge, remoteforge.ServerOptions{Name: d.Name + "/" + one.Name, Version: daemon.Version(), Secret: one.Secret, Logger: log})
		secured := proof
		if strings.HasPrefix(one.Serve, "unix:") {
			secured = nil
		}
		servers.Go(func() {
			if err := remoteforge.Serve(ctx, one.Serve, s, secured); err != nil {
				stop(problem(fmt.Sprintf("cannot serve the forge %s at %s", one.Name, one.Serve), err, ""))
			}
		})
	}
	working, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	intake.Go(func() { _ = in.Run(working) }) // until working ends

	<-ctx.Done()
	err := bounded(web.Shutdown)
	end()
	intake.Wait()
	servers.Wait()
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		err = errors.Join(cause, err)
	}
	return err
}

// pages are webhooks, health and metrics.
func (d *Daemon) pages(in *integration.Integration, all []forges.Forge) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
		defer cancel()
		if err := in.Ready(ctx); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ok\n"))
	})
	mux.Handle("GET /metrics", telemetry.MetricsHandler())
	for _, one := range all {
		mux.HandleFunc(d.webhookPath(one.Name), func(w http.ResponseWriter, r *http.Request) {
			there := *r
			there.URL = &url.URL{Path: "/webhooks/" + one.Name}
			in.ServeHTTP(w, &there)
		})
	}
	return mux
}

// bounded gives f as long as a supervisor is sure to wait.
func bounded(f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return f(ctx)
}
