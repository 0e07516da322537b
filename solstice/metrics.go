package solstice

import (
	"context"
	"errors"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/solstice-ci/solstice-go/internal/store"
)

// metrics are the engine's instruments. Their labels are states, classes and
// nothing that grows with use.
type metrics struct {
	jobs    metric.Int64Counter
	queued  metric.Float64Histogram
	ran     metric.Float64Histogram
	lost    metric.Int64Counter
	breaker metric.Int64Counter
	removed metric.Int64Counter
}

func newMetrics(p metric.MeterProvider, s *space) (*metrics, error) {
	m := p.Meter("github.com/solstice-ci/solstice-go/solstice")
	var out metrics
	var errs [8]error
	out.jobs, errs[0] = m.Int64Counter("solstice.jobs", metric.WithDescription("jobs that reached a terminal state, by state"))
	out.queued, errs[1] = m.Float64Histogram("solstice.job.queued", metric.WithUnit("s"), metric.WithDescription("time from queued to running"))
	out.ran, errs[2] = m.Float64Histogram("solstice.job.duration", metric.WithUnit("s"), metric.WithDescription("time from running to the terminal state"))
	out.lost, errs[3] = m.Int64Counter("solstice.attempts.lost", metric.WithDescription("attempts given up, by failure class"))
	out.breaker, errs[4] = m.Int64Counter("solstice.reaper.breaker", metric.WithDescription("sweeps in which too many agents seemed dead at once"))
	out.removed, errs[5] = m.Int64Counter("solstice.retention.removed", metric.WithDescription("what retention removed, by kind"))
	_, errs[6] = m.Int64ObservableGauge("solstice.disk.free", metric.WithUnit("By"), metric.WithDescription("free bytes, by directory of Config.Space"),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			for dir, n := range s.measured() {
				o.Observe(n, metric.WithAttributes(attribute.String("dir", dir)))
			}
			return nil
		}))
	_, errs[7] = m.Int64ObservableGauge("solstice.intake.stopped", metric.WithDescription("1 while no runs are accepted and no jobs begun for want of room on disk"),
		metric.WithInt64Callback(func(_ context.Context, o metric.Int64Observer) error {
			stopped := int64(0)
			if s.err() != nil {
				stopped = 1
			}
			o.Observe(stopped)
			return nil
		}))
	return &out, errors.Join(errs[:]...)
}

func (m *metrics) jobOver(j *store.Job) {
	ctx := context.Background()
	state := metric.WithAttributes(attribute.String("state", string(j.State)))
	m.jobs.Add(ctx, 1, state)
	if j.StartedAt > 0 {
		m.queued.Record(ctx, float64(j.StartedAt-j.QueuedAt)/1e6)
		m.ran.Record(ctx, float64(j.FinishedAt-j.StartedAt)/1e6, state)
	}
}

func (m *metrics) attemptLost(c Class) {
	m.lost.Add(context.Background(), 1, metric.WithAttributes(attribute.String("class", string(c))))
}

func (m *metrics) breakerTripped() { m.breaker.Add(context.Background(), 1) }

func (m *metrics) retentionRemoved(kind string, n int64) {
	m.removed.Add(context.Background(), n, metric.WithAttributes(attribute.String("kind", kind)))
}
