package solstice_test

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
)

// crew is so many orchestrators, a process each, on one database and broker.
type crew struct {
	n      int
	eyes   *solstice.Engine // does not run: it reads what the others write
	queue  queue.Queue
	commit string
	last   string // the newest run that is over

	took  time.Duration
	jobs  int
	under []time.Duration // claim → start, under load
	idle  []time.Duration // the same, one job at a time
}

const (
	crewSlots  = 16 // of each orchestrator
	crewMatrix = 16 // jobs of a run
)

func newCrew(b *testing.B, n int) *crew {
	b.Helper()
	p := newPlant(b, testenv.Postgres(b))
	p.Timing, p.Capacity, p.Inside, p.Quiet, p.Broker = solstice.Timing{}, crewSlots, true, true, testenv.RabbitMQ(b)
	numbers := make([]string, crewMatrix)
	for i := range numbers {
		numbers[i] = fmt.Sprint(i)
	}
	c := &crew{n: n}
	c.commit = p.commit(b, map[string]string{
		".solstice/workflows/one.yaml":  "name: one\n" + trivial,
		".solstice/workflows/many.yaml": "name: many\n" + strings.Replace(trivial, "  hi:\n", "  hi:\n    matrix: { n: ["+strings.Join(numbers, ", ")+"] }\n", 1),
	})
	cfg, done, err := p.config(b.Context(), slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(done)
	c.queue = cfg.Queue
	if c.eyes, err = solstice.New(cfg); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = c.eyes.Close() })
	for i := range n {
		one := *p
		one.Host = fmt.Sprintf("host%d", i)
		b.Cleanup(func() { one.nothingLeft(b) })
		one.spawn(b, "")
	}
	eventually(b, "all orchestrators are there", func() bool {
		pools, err := c.eyes.Pools(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		return len(pools) == n
	})
	return c
}

// run asks for a workflow so many times, and waits until the runs are over.
func (c *crew) run(b *testing.B, workflow string, times int) []solstice.Run {
	b.Helper()
	msg, err := messages.Encode(messages.RunRequest{Repo: forge.Repo{Name: "repo"}, Commit: c.commit, Workflow: workflow})
	if err != nil {
		b.Fatal(err)
	}
	msgs := make([]queue.Message, times)
	for i := range msgs {
		msgs[i] = msg
	}
	if err := c.queue.Publish(b.Context(), messages.TopicRunRequest, msgs, queue.PublishOptions{}); err != nil {
		b.Fatal(err)
	}
	for {
		runs, err := c.eyes.Runs(b.Context(), solstice.RunFilter{Limit: times})
		if err != nil {
			b.Fatal(err)
		}
		if len(runs) == times && !slices.ContainsFunc(runs, func(r solstice.Run) bool { return !r.State.Terminal() || r.ID <= c.last }) {
			c.last = runs[0].ID
			return runs
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// starts is, of each job, the time between its claim and its start.
func (c *crew) starts(b *testing.B, runs []solstice.Run) []time.Duration {
	b.Helper()
	var out []time.Duration
	for _, r := range runs {
		r, err := c.eyes.GetRun(b.Context(), r.ID)
		if err != nil {
			b.Fatal(err)
		}
		if r.State != solstice.RunSucceeded {
			b.Fatalf("run %s is %s: %s", r.ID, r.State, r.Reason)
		}
		for _, j := range r.Jobs {
			attempts, err := c.eyes.Attempts(b.Context(), j.ID)
			if err != nil {
				b.Fatal(err)
			}
			a := attempts[len(attempts)-1]
			out = append(out, a.StartedAt.Sub(a.CreatedAt))
		}
	}
	return out
}

// BenchmarkFleet: one, two and four orchestrators on PostgreSQL and RabbitMQ, a
// process and 16 slots each, agents inside, in turns. Jobs per second of 128
// trivial jobs (8 runs, asked for through the queue), and the time from claim to
// start, of these and of one job at a time.
func BenchmarkFleet(b *testing.B) {
	crews := []*crew{newCrew(b, 1), newCrew(b, 2), newCrew(b, 4)}
	runs, alone := 8, 16
	if testing.Short() {
		runs, alone = 2, 2
	}
	for _, c := range crews {
		c.run(b, "one", 1) // everything has been opened once
	}
	b.ResetTimer()
	for i := range b.N {
		for k := range crews {
			c := crews[(i+k)%len(crews)]
			start := time.Now()
			done := c.run(b, "many", runs)
			c.took += time.Since(start)
			c.jobs += runs * crewMatrix
			c.under = append(c.under, c.starts(b, done)...)
			for range alone {
				c.idle = append(c.idle, c.starts(b, c.run(b, "one", 1))...)
			}
		}
	}
	b.StopTimer()
	one := float64(crews[0].jobs) / crews[0].took.Seconds()
	for _, c := range crews {
		perSecond := float64(c.jobs) / c.took.Seconds()
		b.ReportMetric(perSecond, fmt.Sprintf("%d-jobs/s", c.n))
		if c.n > 1 {
			b.ReportMetric(perSecond/one, fmt.Sprintf("%d-x-1", c.n))
		}
		percentiles(b, fmt.Sprintf("%d-loaded", c.n), c.under)
		percentiles(b, fmt.Sprintf("%d-idle", c.n), c.idle)
		eventually(b, "machines are gone", func() bool {
			machines, err := c.eyes.Machines(b.Context(), solstice.MachineFilter{})
			if err != nil {
				b.Fatal(err)
			}
			return len(machines) == 0
		})
	}
}
