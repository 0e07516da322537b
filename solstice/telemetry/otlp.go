package telemetry

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	otelprom "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/exemplar"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/sdk/resource"
	"go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// Sizes and limits, which the SDK would otherwise read from OTEL_*.
const (
	spanQueue       = 4096
	spanBatch       = 512
	spanDelay       = 5 * time.Second
	metricStreams   = 2000 // per instrument; more are folded into one
	exportRetryFor  = 8 * time.Second
	exportRetryEach = time.Second
)

// export is where traces and metrics go.
type export struct {
	traces  *trace.TracerProvider
	metrics *metric.MeterProvider
	handler http.Handler
	conn    *grpc.ClientConn // nil: no collector
	watched chan struct{}    // closed when watch has ended
	live    context.Context  // its end stops watch and makes exports fail
	kill    context.CancelFunc
}

func newExport(ctx context.Context, service string, cfg Config, rep *reporter) (*export, error) {
	res := newResource(service, cfg)
	e := &export{}
	e.live, e.kill = context.WithCancel(context.Background())

	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	// Without target_info and constant labels: its resource would be mixed with OTEL_*.
	scrape, err := otelprom.New(otelprom.WithRegisterer(reg), otelprom.WithoutTargetInfo())
	if err != nil {
		return nil, wrapf("prometheus exporter: %w", err)
	}
	e.handler = promhttp.HandlerFor(reg, promhttp.HandlerOpts{Registry: reg})

	spans := []trace.TracerProviderOption{
		trace.WithResource(res),
		trace.WithSampler(newSampler(cfg.OTLP)),
		trace.WithRawSpanLimits(trace.SpanLimits{
			AttributeValueLengthLimit:   4096,
			AttributeCountLimit:         128,
			EventCountLimit:             128,
			LinkCountLimit:              128,
			AttributePerEventCountLimit: 32,
			AttributePerLinkCountLimit:  32,
		}),
	}
	meters := []metric.Option{
		metric.WithResource(res),
		metric.WithReader(scrape),
		metric.WithExemplarFilter(exemplar.TraceBasedFilter),
		metric.WithCardinalityLimit(metricStreams),
		// The SDK's metrics about itself, which only a variable turns on.
		metric.WithView(metric.NewView(metric.Instrument{Name: "otel.sdk.*"}, metric.Stream{Aggregation: metric.AggregationDrop{}})),
	}
	if cfg.OTLP.Endpoint != "" {
		if e.conn, err = dial(cfg.OTLP); err != nil {
			return nil, err
		}
		t, m, err := exporters(ctx, e.conn, cfg.OTLP)
		if err != nil {
			return nil, errors.Join(wrapf("OTLP exporter: %w", err), e.conn.Close())
		}
		timeout := cmp.Or(cfg.OTLP.Timeout, 10*time.Second)
		spans = append(spans, trace.WithBatcher(spanExporter{t, res, rep, e.live},
			trace.WithMaxQueueSize(spanQueue), trace.WithMaxExportBatchSize(spanBatch),
			trace.WithBatchTimeout(spanDelay), trace.WithExportTimeout(timeout)))
		meters = append(meters, metric.WithReader(metric.NewPeriodicReader(metricExporter{m, res, rep, e.live},
			metric.WithInterval(cmp.Or(cfg.OTLP.MetricInterval, time.Minute)), metric.WithTimeout(timeout))))
		e.watched = make(chan struct{})
		go e.watch(rep)
	}
	e.traces = trace.NewTracerProvider(spans...)
	e.metrics = metric.NewMeterProvider(meters...)
	return e, nil
}

// exporters get every value that they would otherwise take from OTEL_*.
func exporters(ctx context.Context, conn *grpc.ClientConn, o OTLPConfig) (trace.SpanExporter, metric.Exporter, error) {
	timeout := cmp.Or(o.Timeout, 10*time.Second)
	headers := o.Headers
	if headers == nil {
		headers = map[string]string{}
	}
	t, err := otlptracegrpc.New(ctx, otlptracegrpc.WithGRPCConn(conn), otlptracegrpc.WithHeaders(headers),
		otlptracegrpc.WithTimeout(timeout), otlptracegrpc.WithRetry(otlptracegrpc.RetryConfig{
			Enabled: true, InitialInterval: exportRetryEach, MaxInterval: exportRetryEach, MaxElapsedTime: exportRetryFor,
		}))
	if err != nil {
		return nil, nil, err
	}
	m, err := otlpmetricgrpc.New(ctx, otlpmetricgrpc.WithGRPCConn(conn), otlpmetricgrpc.WithHeaders(headers),
		otlpmetricgrpc.WithTimeout(timeout), otlpmetricgrpc.WithRetry(otlpmetricgrpc.RetryConfig{
			Enabled: true, InitialInterval: exportRetryEach, MaxInterval: exportRetryEach, MaxElapsedTime: exportRetryFor,
		}),
		otlpmetricgrpc.WithTemporalitySelector(metric.DefaultTemporalitySelector),
		otlpmetricgrpc.WithAggregationSelector(metric.DefaultAggregationSelector))
	return t, m, err
}

func newResource(service string, cfg Config) *resource.Resource {
	attrs := []attribute.KeyValue{
		attribute.String("service.name", service),
		attribute.String("telemetry.sdk.language", "go"),
		attribute.String("telemetry.sdk.name", "opentelemetry"),
	}
	if cfg.Version != "" {
		attrs = append(attrs, attribute.String("service.version", cfg.Version))
	}
	for k, v := range cfg.Attributes {
		attrs = append(attrs, attribute.String(k, v))
	}
	return resource.NewSchemaless(attrs...)
}

func newSampler(o OTLPConfig) trace.Sampler {
	switch r := o.TraceRatio; {
	case o.Endpoint == "" || r < 0:
		// Traced contexts still carry identifiers, for logs and other processes.
		return trace.ParentBased(trace.NeverSample())
	case r == 0 || r >= 1:
		return trace.ParentBased(trace.AlwaysSample())
	default:
		return trace.ParentBased(trace.TraceIDRatioBased(r))
	}
}

// dial prepares the connection to the collector; connecting goes on in the
// background, without proxies and without a service config from DNS.
func dial(o OTLPConfig) (*grpc.ClientConn, error) {
	u, err := url.Parse(o.Endpoint)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" || u.Path != "" && u.Path != "/" {
		return nil, wrapf("OTLP endpoint: need http://host:port or https://host:port")
	}
	if u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, wrapf("OTLP endpoint of host %s: credentials go into headers, not into the URL", u.Host)
	}
	host, port := u.Hostname(), u.Port()
	creds := insecure.NewCredentials()
	if u.Scheme == "https" {
		t := o.TLS.Clone()
		if t == nil {
			t = &tls.Config{MinVersion: tls.VersionTLS12}
		}
		creds = credentials.NewTLS(t)
	}
	conn, err := grpc.NewClient("dns:///"+net.JoinHostPort(host, cmp.Or(port, "4317")),
		grpc.WithTransportCredentials(creds), grpc.WithNoProxy(), grpc.WithDisableServiceConfig(),
		grpc.WithUserAgent("solstice-telemetry"))
	if err != nil {
		return nil, wrapf("OTLP endpoint %s: %w", u.Host, err)
	}
	return conn, nil
}

// watch reports a collector that cannot be reached at once, long before the
// first export fails.
func (e *export) watch(rep *reporter) {
	defer close(e.watched)
	e.conn.Connect()
	for {
		s := e.conn.GetState()
		if s == connectivity.TransientFailure {
			rep.fail(errors.New("cannot connect"))
		}
		if !e.conn.WaitForStateChange(e.live, s) {
			return
		}
	}
}

// close flushes. The SDK's own shutdown leaves goroutines behind when its
// context ends early, so it gets one that does not; exports are cut instead.
func (e *export) close(ctx context.Context) error {
	end := context.AfterFunc(ctx, e.kill)
	defer end()
	unbounded := context.WithoutCancel(ctx)
	spans := make(chan error, 1)
	go func() { spans <- e.traces.Shutdown(unbounded) }()
	err := errors.Join(e.metrics.Shutdown(unbounded), <-spans, ctx.Err())
	e.kill()
	if e.conn != nil {
		<-e.watched
		err = errors.Join(err, e.conn.Close())
	}
	if err != nil {
		return wrapf("flush: %w", err)
	}
	return nil
}

// spanExporter replaces the resource, into which the SDK mixes
// OTEL_RESOURCE_ATTRIBUTES, and reports failures itself.
type spanExporter struct {
	trace.SpanExporter
	res  *resource.Resource
	rep  *reporter
	live context.Context
}

func (e spanExporter) ExportSpans(ctx context.Context, spans []trace.ReadOnlySpan) error {
	ours := make([]trace.ReadOnlySpan, len(spans))
	for i, s := range spans {
		ours[i] = span{s, e.res}
	}
	ctx, cancel := within(ctx, e.live)
	defer cancel()
	return e.rep.outcome(e.SpanExporter.ExportSpans(ctx, ours))
}

type span struct {
	trace.ReadOnlySpan
	res *resource.Resource
}

func (s span) Resource() *resource.Resource { return s.res }

// metricExporter does the same for metrics.
type metricExporter struct {
	metric.Exporter
	res  *resource.Resource
	rep  *reporter
	live context.Context
}

func (e metricExporter) Export(ctx context.Context, rm *metricdata.ResourceMetrics) error {
	ours := *rm
	ours.Resource = e.res
	ctx, cancel := within(ctx, e.live)
	defer cancel()
	return e.rep.outcome(e.Exporter.Export(ctx, &ours))
}

// within ends ctx when live ends, too.
func within(ctx, live context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(live, cancel)
	return ctx, func() { stop(); cancel() }
}
