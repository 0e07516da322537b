package telemetry_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	colmetric "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	coltrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/solstice-ci/solstice-go/solstice/telemetry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// console collects what is logged and tells who waits.
type console struct {
	mu     sync.Mutex
	buf    bytes.Buffer
	change chan struct{}
}

func newConsole() *console { return &console{change: make(chan struct{}, 1)} }

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case c.change <- struct{}{}:
	default:
	}
	return c.buf.Write(p)
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.buf.String()
}

func (c *console) waitFor(t *testing.T, s string) {
	t.Helper()
	for !strings.Contains(c.String(), s) {
		select {
		case <-c.change:
		case <-t.Context().Done():
			t.Fatalf("%q was never logged; the log is %s", s, c)
		}
	}
}

// collector is an OTLP endpoint that keeps what it is sent.
type collector struct {
	coltrace.UnimplementedTraceServiceServer
	metrics metricService
	mu      sync.Mutex
	spans   []*coltrace.ExportTraceServiceRequest
	headers metadata.MD
}

type metricService struct {
	colmetric.UnimplementedMetricsServiceServer
	mu   sync.Mutex
	reqs []*colmetric.ExportMetricsServiceRequest
}

func (c *collector) Export(ctx context.Context, r *coltrace.ExportTraceServiceRequest) (*coltrace.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.headers, _ = metadata.FromIncomingContext(ctx)
	c.spans = append(c.spans, r)
	return &coltrace.ExportTraceServiceResponse{}, nil
}

func (m *metricService) Export(_ context.Context, r *colmetric.ExportMetricsServiceRequest) (*colmetric.ExportMetricsServiceResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reqs = append(m.reqs, r)
	return &colmetric.ExportMetricsServiceResponse{}, nil
}

func startCollector(t *testing.T) (*collector, string) {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c, srv, done := &collector{}, grpc.NewServer(), make(chan error, 1)
	coltrace.RegisterTraceServiceServer(srv, c)
	colmetric.RegisterMetricsServiceServer(srv, &c.metrics)
	go func() { done <- srv.Serve(lis) }()
	t.Cleanup(func() {
		srv.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return c, "http://" + lis.Addr().String()
}

func attrs(kvs []*commonpb.KeyValue) map[string]string {
	m := map[string]string{}
	for _, kv := range kvs {
		m[kv.Key] = kv.Value.GetStringValue()
	}
	return m
}

// hostile sets every variable that the SDK, its exporters or gRPC's dialer
// would obey to something that would break the test.
func hostile(t *testing.T) {
	for k, v := range map[string]string{
		"OTEL_SDK_DISABLED":                                        "true",
		"OTEL_SERVICE_NAME":                                        "evil",
		"OTEL_RESOURCE_ATTRIBUTES":                                 "service.name=evil,evil=yes,service.version=666",
		"OTEL_TRACES_SAMPLER":                                      "always_off",
		"OTEL_TRACES_SAMPLER_ARG":                                  "0",
		"OTEL_TRACES_EXPORTER":                                     "none",
		"OTEL_METRICS_EXPORTER":                                    "none",
		"OTEL_PROPAGATORS":                                         "none",
		"OTEL_EXPORTER_OTLP_ENDPOINT":                              "http://127.0.0.1:1",
		"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT":                       "http://127.0.0.1:1",
		"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT":                      "http://127.0.0.1:1",
		"OTEL_EXPORTER_OTLP_HEADERS":                               "evil=yes",
		"OTEL_EXPORTER_OTLP_TRACES_HEADERS":                        "evil=yes",
		"OTEL_EXPORTER_OTLP_TIMEOUT":                               "1",
		"OTEL_EXPORTER_OTLP_TRACES_TIMEOUT":                        "1",
		"OTEL_EXPORTER_OTLP_COMPRESSION":                           "gzip",
		"OTEL_EXPORTER_OTLP_CERTIFICATE":                           "/nonexistent",
		"OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE":                    "/nonexistent",
		"OTEL_EXPORTER_OTLP_CLIENT_KEY":                            "/nonexistent",
		"OTEL_EXPORTER_OTLP_INSECURE":                              "false",
		"OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE":        "delta",
		"OTEL_BSP_MAX_QUEUE_SIZE":                                  "1",
		"OTEL_BSP_MAX_EXPORT_BATCH_SIZE":                           "1",
		"OTEL_BSP_SCHEDULE_DELAY":                                  "1",
		"OTEL_BSP_EXPORT_TIMEOUT":                                  "1",
		"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT":                          "0",
		"OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT":                   "1",
		"OTEL_SPAN_EVENT_COUNT_LIMIT":                              "0",
		"OTEL_ATTRIBUTE_COUNT_LIMIT":                               "0",
		"OTEL_METRIC_EXPORT_INTERVAL":                              "1",
		"OTEL_METRIC_EXPORT_TIMEOUT":                               "1",
		"OTEL_METRICS_EXEMPLAR_FILTER":                             "always_on",
		"OTEL_GO_X_CARDINALITY_LIMIT":                              "1",
		"OTEL_GO_X_OBSERVABILITY":                                  "true",
		"OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION": "base2_exponential_bucket_histogram",
		"HTTPS_PROXY":                                              "http://127.0.0.1:1",
		"HTTP_PROXY":                                               "http://127.0.0.1:1",
		"ALL_PROXY":                                                "http://127.0.0.1:1",
	} {
		t.Setenv(k, v)
	}
}

func TestExportIgnoresTheEnvironment(t *testing.T) {
	hostile(t)
	col, endpoint := startCollector(t)
	log := newConsole()
	shutdown, err := telemetry.Init(t.Context(), "solstice-test", telemetry.Config{
		Version:    "v1.2.3",
		Attributes: map[string]string{"deployment.environment.name": "test"},
		Log:        telemetry.LogConfig{Writer: log, Level: "debug"},
		OTLP:       telemetry.OTLPConfig{Endpoint: endpoint, Headers: map[string]string{"authorization": "Bearer t"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := otel.GetTextMapPropagator().(propagation.TraceContext); !ok {
		t.Errorf("propagator is %T", otel.GetTextMapPropagator())
	}
	const spans = 20
	for range spans {
		_, span := otel.Tracer("t").Start(t.Context(), "work", trace.WithAttributes(attribute.String("job_id", "0123456789")))
		span.AddEvent("phase")
		span.End()
	}
	hist, err := otel.Meter("t").Float64Histogram("work.duration")
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"a", "b", "c"} {
		hist.Record(t.Context(), 1, metric.WithAttributes(attribute.String("kind", kind)))
	}
	if err := shutdown(t.Context()); err != nil {
		t.Fatalf("shutdown: %v; log: %s", err, log)
	}

	got := 0
	for _, req := range col.spans {
		for _, rs := range req.ResourceSpans {
			res := attrs(rs.Resource.Attributes)
			if res["service.name"] != "solstice-test" || res["service.version"] != "v1.2.3" || res["deployment.environment.name"] != "test" || res["evil"] != "" {
				t.Errorf("resource of the spans: %v", res)
			}
			for _, ss := range rs.ScopeSpans {
				for _, s := range ss.Spans {
					got++
					if attrs(s.Attributes)["job_id"] != "0123456789" || len(s.Events) != 1 {
						t.Errorf("span was cut: %v", s)
					}
				}
			}
		}
	}
	if got != spans || len(col.spans) != 1 {
		t.Errorf("%d spans in %d exports, want %d in 1", got, len(col.spans), spans)
	}
	if h := col.headers; len(h.Get("evil")) != 0 || len(h.Get("authorization")) != 1 || len(h.Get("grpc-encoding")) != 0 {
		t.Errorf("headers: %v", h)
	}
	if len(col.metrics.reqs) != 1 {
		t.Fatalf("%d exports of metrics, want 1: the environment must not set the interval", len(col.metrics.reqs))
	}
	names := map[string]bool{}
	for _, rm := range col.metrics.reqs[0].ResourceMetrics {
		if res := attrs(rm.Resource.Attributes); res["service.name"] != "solstice-test" || res["evil"] != "" {
			t.Errorf("resource of the metrics: %v", res)
		}
		for _, sm := range rm.ScopeMetrics {
			for _, m := range sm.Metrics {
				names[m.Name] = true
				h := m.GetHistogram()
				if h == nil || len(h.DataPoints) != 3 || h.AggregationTemporality.String() != "AGGREGATION_TEMPORALITY_CUMULATIVE" {
					t.Errorf("metric %s: %v", m.Name, m)
					continue
				}
				if len(h.DataPoints[0].Exemplars) != 0 {
					t.Error("exemplars outside of a trace")
				}
			}
		}
	}
	if len(names) != 1 || !names["work.duration"] {
		t.Errorf("metrics %v, want only ours", names)
	}
}

func TestUnreachableCollectorIsOneWarning(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	endpoint := "http://" + lis.Addr().String()
	_ = lis.Close()
	log := newConsole()
	shutdown, err := telemetry.Init(t.Context(), "t", telemetry.Config{
		Log:          telemetry.LogConfig{Writer: log},
		OTLP:         telemetry.OTLPConfig{Endpoint: endpoint, Timeout: 100 * time.Millisecond},
		FlushTimeout: time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	log.waitFor(t, "collector is not taking")
	for range 10000 { // more than the queue holds: must not block
		_, span := otel.Tracer("t").Start(t.Context(), "lost")
		span.End()
	}
	slog.Info("the console goes on")
	log.waitFor(t, "the console goes on")
	if err := shutdown(t.Context()); err == nil {
		t.Error("shutdown did not report the spans that were lost")
	}
	if n := strings.Count(log.String(), `"level":"WARN"`); n != 1 {
		t.Errorf("%d warnings, want 1:\n%s", n, log)
	}
}

func TestShutdownIsBounded(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0") // accepts and never answers
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lis.Close() }()
	shutdown, err := telemetry.Init(t.Context(), "t", telemetry.Config{
		Log:          telemetry.LogConfig{Writer: io.Discard},
		OTLP:         telemetry.OTLPConfig{Endpoint: "http://" + lis.Addr().String(), Timeout: time.Hour},
		FlushTimeout: 50 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	_, span := otel.Tracer("t").Start(t.Context(), "stuck")
	span.End()
	if err := shutdown(t.Context()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("shutdown = %v, want it to wrap context.DeadlineExceeded", err)
	}
	if err := shutdown(t.Context()); err != nil {
		t.Errorf("second shutdown = %v, want nil", err)
	}
}

func TestShutdownWithEndedContext(t *testing.T) {
	_, endpoint := startCollector(t)
	shutdown, err := telemetry.Init(t.Context(), "t", telemetry.Config{
		Log:  telemetry.LogConfig{Writer: io.Discard},
		OTLP: telemetry.OTLPConfig{Endpoint: endpoint},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	// What it leaves behind, TestMain finds.
	if err := shutdown(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("shutdown = %v, want it to wrap context.Canceled", err)
	}
}

func TestInitOnce(t *testing.T) {
	cfg := telemetry.Config{Log: telemetry.LogConfig{Writer: io.Discard}}
	shutdown, err := telemetry.Init(t.Context(), "t", cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := telemetry.Init(t.Context(), "t", cfg); !errors.Is(err, telemetry.ErrInitialized) {
		t.Errorf("second Init = %v, want ErrInitialized", err)
	}
	if err := shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]telemetry.Config{
		"level":                {Log: telemetry.LogConfig{Level: "loud"}},
		"format":               {Log: telemetry.LogConfig{Format: "xml"}},
		"endpoint no scheme":   {OTLP: telemetry.OTLPConfig{Endpoint: "localhost:4317"}},
		"endpoint path":        {OTLP: telemetry.OTLPConfig{Endpoint: "http://localhost:4317/v1/traces"}},
		"endpoint credentials": {OTLP: telemetry.OTLPConfig{Endpoint: "http://user:hunter2@localhost:4317"}},
	} {
		_, err := telemetry.Init(t.Context(), "t", bad)
		if err == nil || errors.Is(err, telemetry.ErrInitialized) {
			t.Errorf("bad %s: Init = %v, want an error about it", name, err)
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("bad %s: the error shows the password: %v", name, err)
		}
	}
}

func TestMetricsAreScraped(t *testing.T) {
	hostile(t)
	get := func() (int, string) {
		w := httptest.NewRecorder()
		telemetry.MetricsHandler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		return w.Code, w.Body.String()
	}
	if code, _ := get(); code != 503 {
		t.Errorf("before Init: status %d, want 503", code)
	}
	shutdown, err := telemetry.Init(t.Context(), "t", telemetry.Config{Log: telemetry.LogConfig{Writer: io.Discard}})
	if err != nil {
		t.Fatal(err)
	}
	jobs, err := otel.Meter("t").Int64Counter("jobs")
	if err != nil {
		t.Fatal(err)
	}
	jobs.Add(t.Context(), 3)
	code, body := get()
	if code != 200 || !strings.Contains(body, "jobs_total{") || !strings.Contains(body, "} 3\n") || !strings.Contains(body, "go_goroutines") {
		t.Errorf("status %d, body without our counter:\n%s", code, body)
	}
	if strings.Contains(body, "evil") {
		t.Errorf("the environment's resource is in the scrape:\n%s", body)
	}
	if err := shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestTraceIDsWithoutCollector(t *testing.T) {
	log := newConsole()
	shutdown, err := telemetry.Init(t.Context(), "t", telemetry.Config{Log: telemetry.LogConfig{Writer: log}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, span := otel.Tracer("t").Start(t.Context(), "work")
	slog.InfoContext(ctx, "inside")
	span.End()
	if err := shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if want := `"trace_id":"` + span.SpanContext().TraceID().String(); !span.SpanContext().IsValid() || !strings.Contains(log.String(), want) {
		t.Errorf("log %s has no %s", log, want)
	}
}
