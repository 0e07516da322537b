package solstice_test

import (
	"slices"
	"testing"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/solstice"
)

// TestTrace: each phase of a job is a span in the trace of what submitted it.
func TestTrace(t *testing.T) { onBoth(t, testTrace) }

func testTrace(t *testing.T, db func(testing.TB) string) {
	p := newPlant(t, db(t))
	spans := tracetest.NewSpanRecorder()
	tp := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans))
	eng, _ := p.start(t, func(c *solstice.Config) { c.TracerProvider = tp })
	ctx, submit := tp.Tracer("test").Start(t.Context(), "webhook")
	commit := p.commit(t, map[string]string{".solstice/workflow.yaml": "jobs:\n  a: { steps: [ { run: 'true' } ] }\n"})
	runs, err := eng.Submit(ctx, solstice.RunRequest{Repo: forge.Repo{Name: "repo"}, Commit: commit, Ref: "refs/heads/main"})
	if err != nil {
		t.Fatal(err)
	}
	submit.End()
	finish(t, eng, runs[0].ID)
	// The last is the report to the forge, on the far side of outbox and queue.
	phases := []string{"job", "queued", "machine.create", "boot", "enrol", "attempt", "step", "upload", "machine.destroy", "process status.local"}
	var missing []string
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("not traced: %v", missing)
		}
	})
	eventually(t, "all phases are traced", func() bool {
		missing = slices.Clone(phases)
		for _, s := range spans.Ended() {
			if s.SpanContext().TraceID() == submit.SpanContext().TraceID() {
				missing = slices.DeleteFunc(missing, func(name string) bool { return name == s.Name() })
			}
			if s.EndTime().Before(s.StartTime()) {
				t.Errorf("%s ends before it begins", s.Name())
			}
		}
		return len(missing) == 0
	})
}
