package telemetry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/slogtest"
	"time"

	"github.com/creack/pty"
	"go.opentelemetry.io/otel/trace"
)

// jsonLogger logs synchronously into the buffer it returns.
func jsonLogger(t *testing.T, filter string, s Sampling) (*slog.Logger, *bytes.Buffer) {
	t.Helper()
	f, err := ParseFilter(filter)
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	format, err := newFormatter(LogConfig{Format: FormatJSON, Writer: &buf})
	if err != nil {
		t.Fatal(err)
	}
	return slog.New(newHandler(format(&buf), f, s)), &buf
}

func records(t *testing.T, b []byte) (out []map[string]any) {
	t.Helper()
	for line := range bytes.Lines(b) {
		var m map[string]any
		if err := json.Unmarshal(line, &m); err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		out = append(out, m)
	}
	return out
}

func TestHandlerKeepsSlogsPromises(t *testing.T) {
	l, buf := jsonLogger(t, "info", Sampling{})
	err := slogtest.TestHandler(l.Handler(), func() []map[string]any {
		got := records(t, buf.Bytes())
		for _, r := range got {
			delete(r, "pkg") // ours, on top of what slog asks for
		}
		return got
	})
	if err != nil {
		t.Error(err)
	}
}

func TestRecordNamesPackageAndTrace(t *testing.T) {
	l, buf := jsonLogger(t, "info", Sampling{})
	tid, sid := trace.TraceID{1}, trace.SpanID{2}
	ctx := trace.ContextWithSpanContext(t.Context(), trace.NewSpanContext(trace.SpanContextConfig{TraceID: tid, SpanID: sid}))
	l.With("a", 1).WithGroup("g").With("b", 2).InfoContext(ctx, "traced", "c", 3)
	r := records(t, buf.Bytes())[0]
	if r["trace_id"] != tid.String() || r["span_id"] != sid.String() {
		t.Errorf("trace_id %v, span_id %v: not at the top level of %v", r["trace_id"], r["span_id"], r)
	}
	if r["pkg"] != "solstice/telemetry" {
		t.Errorf("pkg = %v", r["pkg"])
	}
	if g := fmt.Sprint(r["g"]); g != "map[b:2 c:3]" || r["a"] != 1.0 {
		t.Errorf("attributes: a=%v g=%s", r["a"], g)
	}
	buf.Reset()
	l.Info("not traced")
	if r := records(t, buf.Bytes())[0]; r["trace_id"] != nil {
		t.Errorf("a record without a trace has trace_id %v", r["trace_id"])
	}
}

func TestLevelsPerPackage(t *testing.T) {
	l, buf := jsonLogger(t, "warn,solstice/telemetry=debug", Sampling{})
	l.Debug("ours")
	other := slog.NewRecord(time.Now(), slog.LevelInfo, "unknown origin", 0)
	if err := l.Handler().Handle(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	got := records(t, buf.Bytes())
	if len(got) != 1 || got[0]["msg"] != "ours" {
		t.Errorf("logged %v, want only our debug record", got)
	}
}

func TestSampling(t *testing.T) {
	l, buf := jsonLogger(t, "debug", Sampling{First: 3, Every: 10})
	start := time.Unix(1000, 0)
	log := func(at time.Time, level slog.Level, pc uintptr) {
		if err := l.Handler().Handle(t.Context(), slog.NewRecord(at, level, "m", pc)); err != nil {
			t.Fatal(err)
		}
	}
	for range 33 {
		log(start, slog.LevelDebug, 0)
	}
	if got := len(records(t, buf.Bytes())); got != 6 { // 3, then the 10th, 20th and 30th of 30
		t.Errorf("%d of 33 debug records in a second passed, want 6", got)
	}
	buf.Reset()
	log(start.Add(time.Second), slog.LevelDebug, 0)
	if r := records(t, buf.Bytes()); len(r) != 1 || r[0]["sampled_out"] != 27.0 {
		t.Errorf("the next second begins with %v, want sampled_out=27", r)
	}
	buf.Reset()
	for range 33 {
		log(start, slog.LevelInfo, 0)
	}
	if got := len(records(t, buf.Bytes())); got != 33 {
		t.Errorf("%d of 33 info records passed: they are never sampled", got)
	}
}

func TestTextFormat(t *testing.T) {
	var buf bytes.Buffer
	l := slog.New(newTextHandler(&buf, false))
	l.With("job_id", "j 1").WithGroup("g").Warn("evil\nINFO forged\x1b[2J", "level", "high", "err", errors.New("a\nb"))
	line := buf.String()
	if strings.Count(line, "\n") != 1 || strings.Contains(line, "\x1b") {
		t.Fatalf("not one line of printable text: %q", line)
	}
	_, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
	if want := `WARN  "evil\nINFO forged\x1b[2J" job_id="j 1" g.level=high g.err="a\nb"`; rest != want {
		t.Errorf("got  %s\nwant %s", rest, want)
	}
}

func TestFormatFollowsTheWriter(t *testing.T) {
	if _, err := newFormatter(LogConfig{Format: "xml", Writer: io.Discard}); err == nil {
		t.Error("format xml was accepted")
	}
	tty, name, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = tty.Close(), name.Close() }()
	file, err := os.Create(t.TempDir() + "/log")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	for _, c := range []struct {
		w            *os.File
		format       Format
		json, colour bool
	}{
		{name, FormatAuto, false, true},
		{name, FormatJSON, true, false},
		{file, FormatAuto, true, false},
		{file, FormatText, false, false},
	} {
		f, err := newFormatter(LogConfig{Format: c.format, Writer: c.w})
		if err != nil {
			t.Fatal(err)
		}
		var buf bytes.Buffer
		slog.New(f(&buf)).Info("hello")
		if got := json.Valid(buf.Bytes()); got != c.json {
			t.Errorf("%s, %s: JSON %v: %q", c.w.Name(), c.format, got, buf.String())
		}
		if got := strings.Contains(buf.String(), "\x1b["); got != c.colour {
			t.Errorf("%s, %s: colour %v: %q", c.w.Name(), c.format, got, buf.String())
		}
	}
}

// stuckWriter blocks every write until it is released.
type stuckWriter struct {
	entered chan struct{}
	release chan struct{}
	mu      sync.Mutex
	buf     bytes.Buffer
}

func (w *stuckWriter) Write(p []byte) (int, error) {
	select {
	case w.entered <- struct{}{}:
	default:
	}
	<-w.release
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.Write(p)
}

func TestStuckConsoleDropsAndSaysSo(t *testing.T) {
	w := &stuckWriter{entered: make(chan struct{}, 1), release: make(chan struct{})}
	format, err := newFormatter(LogConfig{Format: FormatJSON, Writer: w})
	if err != nil {
		t.Fatal(err)
	}
	out := newAsyncWriter(w, 1000, format)
	l := slog.New(format(out))
	l.Info("first")
	<-w.entered // the writing goroutine holds the first record
	for range 1000 {
		l.Info("more") // must not block: the test would hang
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := out.close(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("close of a stuck console = %v, want its context's error", err)
	}
	close(w.release)
	if err := out.close(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := records(t, w.buf.Bytes())
	more, dropped := 0, 0.0
	for _, r := range got {
		if r["msg"] == "more" {
			more++
		}
		if d, ok := r["dropped"].(float64); ok {
			dropped += d
		}
	}
	if more == 0 || dropped == 0 || float64(more)+dropped != 1000 {
		t.Errorf("%d records written and %v said to be dropped, want 1000 in all and some of each", more, dropped)
	}
	l.Info("after")
	if got := records(t, w.buf.Bytes()); got[len(got)-1]["msg"] != "after" {
		t.Errorf("a record logged after close was lost")
	}
}

func BenchmarkLog(b *testing.B) {
	format, err := newFormatter(LogConfig{Format: FormatJSON, Writer: io.Discard})
	if err != nil {
		b.Fatal(err)
	}
	for _, c := range []struct{ name, filter string }{{"written", "info"}, {"filtered", "error"}} {
		b.Run(c.name, func(b *testing.B) {
			f, err := ParseFilter(c.filter)
			if err != nil {
				b.Fatal(err)
			}
			out := newAsyncWriter(io.Discard, 1<<20, format)
			l := slog.New(newHandler(format(out), f, Sampling{}))
			b.ReportAllocs()
			for b.Loop() {
				l.Info("claimed", "job_id", "0123456789", "attempt", 1)
			}
			if err := out.close(context.Background()); err != nil {
				b.Fatal(err)
			}
		})
	}
}
