package bench

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/sqlqueue"
)

// poolSize is how many connections each contender has.
const poolSize = 16

func openSQL(b *testing.B) *sqlqueue.Queue {
	b.Helper()
	db, err := sqldb.Open(b.Context(), testenv.Postgres(b), sqldb.Options{MaxConns: poolSize})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = db.Close() })
	q, err := sqlqueue.New(b.Context(), db, sqlqueue.Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = q.Close() })
	return q
}

// job is river's message.
type job struct {
	Body []byte `json:"body"`
}

func (job) Kind() string { return "bench" }

// peer is river in a database of its own.
type peer struct {
	pool   *pgxpool.Pool
	insert *river.Client[pgx.Tx]
}

func newRiver(b *testing.B) *peer {
	b.Helper()
	cfg, err := pgxpool.ParseConfig(testenv.Postgres(b))
	if err != nil {
		b.Fatal(err)
	}
	cfg.MaxConns = poolSize
	p := &peer{}
	if p.pool, err = pgxpool.NewWithConfig(b.Context(), cfg); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(p.pool.Close)
	m, err := rivermigrate.New(riverpgxv5.New(p.pool), nil)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := m.Migrate(b.Context(), rivermigrate.DirectionUp, nil); err != nil {
		b.Fatal(err)
	}
	if p.insert, err = river.NewClient(riverpgxv5.New(p.pool), &river.Config{}); err != nil {
		b.Fatal(err)
	}
	return p
}

// publish inserts k jobs in one call.
func (p *peer) publish(k int) error {
	if k == 1 {
		_, err := p.insert.Insert(context.Background(), job{body}, nil)
		return err
	}
	params := make([]river.InsertManyParams, k)
	for i := range params {
		params[i].Args = job{body}
	}
	_, err := p.insert.InsertMany(context.Background(), params)
	return err
}

func (p *peer) empty() error {
	_, err := p.pool.Exec(context.Background(), "TRUNCATE river_job")
	return err
}

// BenchmarkPostgresPublish: 1 KiB, durable, by so many callers with one message
// each, or by one with so many messages in a call.
func BenchmarkPostgresPublish(b *testing.B) {
	q, r := openSQL(b), newRiver(b)
	sub := subscribe(b, q, 64)
	defer sub.Close()
	// What was published is taken away again, so that no round sees fuller tables.
	drain := func(n int) func() error {
		return func() error { return consume(sub, 64, n) }
	}
	const n = 2048
	for _, callers := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			compare(b, n, contender{name: "sqlqueue", finish: drain(n), run: func(n int) error {
				return parallel(callers, n, func() error { return publish(q, 1) })
			}}, contender{name: "river", finish: r.empty, run: func(n int) error {
				return parallel(callers, n, func() error { return r.publish(1) })
			}})
		})
	}
	b.Run("batch=256", func(b *testing.B) {
		compare(b, n, contender{name: "sqlqueue", finish: drain(n), run: func(n int) error {
			return batches(256, n, func(k int) error { return publish(q, k) })
		}}, contender{name: "river", finish: r.empty, run: func(n int) error { return batches(256, n, r.publish) }})
	})
}

// BenchmarkPostgresConsume: 1 KiB, 64 at once, each received and acked. River is
// timed until its client has stopped, when it has recorded what it did.
func BenchmarkPostgresConsume(b *testing.B) {
	q, r := openSQL(b), newRiver(b)
	const window = 64
	var sub queue.Subscription
	var worker *river.Client[pgx.Tx]
	var left atomic.Int64
	var done chan struct{}
	workers := river.NewWorkers()
	river.AddWorker(workers, river.WorkFunc(func(context.Context, *river.Job[job]) error {
		if left.Add(-1) == 0 {
			close(done)
		}
		return nil
	}))
	compare(b, 4096, contender{
		name: "sqlqueue",
		prepare: func(n int) error {
			sub = subscribe(b, q, window)
			return batches(256, n, func(k int) error { return publish(q, k) })
		},
		run:    func(n int) error { return consume(sub, window, n) },
		finish: func() error { return sub.Close() },
	}, contender{
		name: "river",
		prepare: func(n int) (err error) {
			if err = batches(256, n, r.publish); err != nil {
				return err
			}
			left.Store(int64(n))
			done = make(chan struct{})
			worker, err = river.NewClient(riverpgxv5.New(r.pool), &river.Config{
				Queues: map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: window}}, Workers: workers,
				FetchCooldown: river.FetchCooldownMin, // by default 100 ms between two looks
			})
			return err
		},
		run: func(int) error {
			if err := worker.Start(context.Background()); err != nil {
				return err
			}
			<-done
			return worker.Stop(context.Background())
		},
		finish: r.empty,
	})
}
