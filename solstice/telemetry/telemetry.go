// Package telemetry sets up logs, traces and metrics for a process: one [Init]
// that every main calls.
//
// Logs go through [log/slog] to one writer, usually stderr, as text or JSON.
// Writing never blocks the caller: records pass through a bounded buffer, and
// when it is full they are dropped, counted, and the count is logged. Records
// of a traced context carry trace_id and span_id. Every record names the Go
// package that made it (attribute "pkg"), and levels are set per package by
// that name: see [ParseFilter]. Libraries need do nothing for it: the package
// is found from the record's program counter. Records below info are sampled
// per call site when there are many: see [Sampling].
//
// Traces and metrics use OpenTelemetry. With Config.OTLP.Endpoint they are sent
// over OTLP gRPC; without it nothing leaves the process. Metrics can always be
// scraped through [MetricsHandler]. A collector that cannot be reached costs
// one warning and nothing else. Trace context travels as W3C Trace Context.
//
// The OpenTelemetry SDK configures itself from OTEL_* variables; this package
// passes every value explicitly, so that the environment has no effect.
package telemetry

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	"go.opentelemetry.io/otel"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
)

// ErrInitialized is returned by a second [Init] in one process before the
// first was shut down.
var ErrInitialized = errors.New("telemetry: already initialized")

// Config says what to log, trace and measure. Its zero value logs at info to
// stderr, as text on a terminal and JSON otherwise, and exports nothing.
type Config struct {
	// Log configures the console.
	Log LogConfig
	// OTLP configures the export of traces and metrics.
	OTLP OTLPConfig
	// Version is the program's version, the resource attribute
	// service.version. Empty: not set.
	Version string
	// Attributes are further resource attributes, such as
	// deployment.environment.name.
	Attributes map[string]string
	// FlushTimeout bounds shutdown, whose context may shorten it. Zero: 5 s.
	FlushTimeout time.Duration
}

// LogConfig configures the console.
type LogConfig struct {
	// Level is a filter as [ParseFilter] reads it. Empty: "info".
	Level string
	// Format of the records. Empty: FormatAuto.
	Format Format
	// Writer receives one record per line, from one goroutine. Nil: stderr.
	Writer io.Writer
	// BufferBytes bounds what waits to be written. Zero: 1 MiB.
	BufferBytes int
	// Sampling thins out records below info. The zero value is the default.
	Sampling Sampling
}

// Format of log records.
type Format string

// Formats. FormatAuto is text when the writer is a terminal, JSON otherwise.
// Text is coloured on a terminal only.
const (
	FormatAuto Format = "auto"
	FormatText Format = "text"
	FormatJSON Format = "json"
)

// OTLPConfig configures the export of traces and metrics over OTLP gRPC
// (https://opentelemetry.io/docs/specs/otlp/).
type OTLPConfig struct {
	// Endpoint is http://host:port (plain text) or https://host:port (TLS).
	// Empty: no export.
	Endpoint string
	// Headers go with every export, for example an authorization. Secret.
	Headers map[string]string
	// TLS verifies an https endpoint. Nil: TLS 1.2 or later and the system's
	// roots.
	TLS *tls.Config
	// TraceRatio is the share of new traces that are recorded, above 0 and up
	// to 1; a trace that began elsewhere keeps the decision made there. Zero:
	// all; negative: none.
	TraceRatio float64
	// MetricInterval is the time between exports of metrics. Zero: 60 s.
	MetricInterval time.Duration
	// Timeout of one export, retries included. Zero: 10 s.
	Timeout time.Duration
}

// The state that Init installs and shutdown removes, one per process.
var (
	initialized atomic.Bool
	scrape      atomic.Pointer[http.Handler]
)

// Init makes cfg the process's telemetry: [slog.Default], OpenTelemetry's
// global tracer and meter providers and propagator, and [MetricsHandler].
// Service is the resource attribute service.name, such as
// "solstice-orchestrator". It does not wait for the collector.
//
// The returned function flushes what is buffered, within cfg.FlushTimeout and
// its context, and returns what could not be delivered. Afterwards the logger
// still works and writes synchronously, traces and metrics go nowhere, and Init
// may be called again; while the first is active a second Init returns
// [ErrInitialized]. Any other error is one in cfg.
func Init(ctx context.Context, service string, cfg Config) (shutdown func(context.Context) error, err error) {
	if service == "" {
		return nil, errors.New("telemetry: service name is empty")
	}
	if !initialized.CompareAndSwap(false, true) {
		return nil, ErrInitialized
	}
	defer func() {
		if err != nil {
			initialized.Store(false)
		}
	}()

	if cfg.Log.Writer == nil {
		cfg.Log.Writer = os.Stderr
	}
	format, err := newFormatter(cfg.Log)
	if err != nil {
		return nil, err
	}
	filter, err := ParseFilter(cmp.Or(cfg.Log.Level, "info"))
	if err != nil {
		return nil, err
	}
	out := newAsyncWriter(cfg.Log.Writer, cmp.Or(cfg.Log.BufferBytes, 1<<20), format)
	logger := slog.New(newHandler(format(out), filter, cfg.Log.Sampling))
	// The SDK reports its own failures through globals; they must be ours
	// before the first SDK object is made.
	rep := &reporter{log: logger, endpoint: cfg.OTLP.Endpoint}
	otel.SetErrorHandler(otel.ErrorHandlerFunc(rep.internal))
	otel.SetLogger(logr.FromSlogHandler(verbosity{logger.Handler()}))

	exp, err := newExport(ctx, service, cfg, rep)
	if err != nil {
		return nil, errors.Join(err, out.close(ctx))
	}
	slog.SetDefault(logger)
	otel.SetTextMapPropagator(propagation.TraceContext{})
	otel.SetTracerProvider(exp.traces)
	otel.SetMeterProvider(exp.metrics)
	scrape.Store(&exp.handler)

	flush := cmp.Or(cfg.FlushTimeout, 5*time.Second)
	var once sync.Once
	return func(ctx context.Context) (err error) {
		once.Do(func() { err = stop(ctx, flush, exp, out) })
		return err
	}, nil
}

func stop(ctx context.Context, flush time.Duration, exp *export, out *asyncWriter) error {
	ctx, cancel := context.WithTimeout(ctx, flush)
	defer cancel()
	scrape.Store(nil)
	otel.SetTracerProvider(tracenoop.NewTracerProvider())
	otel.SetMeterProvider(metricnoop.NewMeterProvider())
	err := exp.close(ctx)
	// Last, since the exporters log.
	err = errors.Join(err, out.close(ctx))
	initialized.Store(false)
	return err
}

// MetricsHandler serves the process's metrics in Prometheus's formats, for a
// daemon's /metrics; 503 Service Unavailable while no [Init] is active.
func MetricsHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := scrape.Load()
		if h == nil {
			http.Error(w, "telemetry is not initialized", http.StatusServiceUnavailable)
			return
		}
		(*h).ServeHTTP(w, r)
	})
}

// reporter turns the failures of exports into one warning per outage.
type reporter struct {
	log      *slog.Logger
	endpoint string
	down     atomic.Bool
}

func (r *reporter) fail(err error) {
	if r.down.CompareAndSwap(false, true) {
		r.log.Warn("telemetry collector is not taking our traces and metrics; they are lost until it does",
			"endpoint", r.endpoint, "error", err)
		return
	}
	r.log.Debug("telemetry export failed", "endpoint", r.endpoint, "error", err)
}

// outcome reports how an export ended and passes its error on.
func (r *reporter) outcome(err error) error {
	if err != nil {
		r.fail(err)
		return err
	}
	if r.down.Load() && r.down.CompareAndSwap(true, false) {
		r.log.Info("telemetry collector is taking our traces and metrics again", "endpoint", r.endpoint)
	}
	return nil
}

// internal receives what the SDK could not return to anyone.
func (r *reporter) internal(err error) {
	r.log.Debug("telemetry SDK", "error", err)
}

// verbosity lowers the SDK's own log to debug: its levels are not ours.
type verbosity struct{ slog.Handler }

func (v verbosity) Enabled(ctx context.Context, _ slog.Level) bool {
	return v.Handler.Enabled(ctx, slog.LevelDebug)
}

func (v verbosity) Handle(ctx context.Context, r slog.Record) error {
	r.Level = slog.LevelDebug
	return v.Handler.Handle(ctx, r)
}

func (v verbosity) WithAttrs(a []slog.Attr) slog.Handler { return verbosity{v.Handler.WithAttrs(a)} }

func (v verbosity) WithGroup(n string) slog.Handler { return verbosity{v.Handler.WithGroup(n)} }

// wrapf makes an error of this package.
func wrapf(format string, args ...any) error {
	return fmt.Errorf("telemetry: "+format, args...)
}
