package sqlqueue_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/sqlqueue"
)

// fsyncLog is the floor: records of concurrent callers appended to a file, with
// one fsync for all that came while the last one ran.
type fsyncLog struct{ records chan record }

type record struct {
	data []byte
	done chan struct{}
}

func newLog(tb testing.TB) *fsyncLog {
	f, err := os.Create(filepath.Join(tb.TempDir(), "log"))
	if err != nil {
		tb.Fatal(err)
	}
	l := &fsyncLog{records: make(chan record, 1024)}
	tb.Cleanup(func() { close(l.records) })
	go func() {
		defer f.Close()
		for r := range l.records {
			batch := []record{r}
			for n := len(l.records); n > 0; n-- {
				batch = append(batch, <-l.records)
			}
			var buf []byte
			for _, r := range batch {
				buf = append(buf, r.data...)
			}
			if _, err := f.Write(buf); err != nil {
				panic(err)
			}
			if err := f.Sync(); err != nil {
				panic(err)
			}
			for _, r := range batch {
				close(r.done)
			}
		}
	}()
	return l
}

func (l *fsyncLog) append(p []byte) {
	r := record{p, make(chan struct{})}
	l.records <- r
	<-r.done
}

// parallel runs n calls of f on so many goroutines.
func parallel(workers, n int, f func(i int)) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := next.Add(1); i <= int64(n); i = next.Add(1) {
				f(int(i))
			}
		})
	}
	wg.Wait()
}

func databases(b *testing.B, f func(b *testing.B, q *sqlqueue.Queue)) {
	for name, url := range map[string]func(testing.TB) string{"sqlite": testenv.SQLite, "postgres": testenv.Postgres} {
		b.Run(name, func(b *testing.B) {
			q := newQueue(b, open(b, url(b)), sqlqueue.Options{})
			defer q.Close()
			f(b, q)
		})
	}
}

func perSecond(b *testing.B, name string, n int, d time.Duration) {
	b.ReportMetric(float64(n)/d.Seconds(), name)
}

// BenchmarkPublish: 16 producers, one message of 1 KiB per call, durable.
func BenchmarkPublish(b *testing.B) {
	body := bytes.Repeat([]byte("x"), 1024)
	databases(b, func(b *testing.B, q *sqlqueue.Queue) {
		log := newLog(b)
		start := time.Now()
		parallel(16, b.N, func(int) { log.append(body) })
		floor := time.Since(start)
		b.ResetTimer()
		parallel(16, b.N, func(int) {
			if err := q.Publish(context.Background(), "t", []queue.Message{{Body: body}}, queue.PublishOptions{}); err != nil {
				b.Error(err)
			}
		})
		perSecond(b, "floor/s", b.N, floor)
		perSecond(b, "msgs/s", b.N, b.Elapsed())
	})
}

// BenchmarkConsume: 64 consumers, each receives and acks, 1 KiB, durable.
func BenchmarkConsume(b *testing.B) {
	body := bytes.Repeat([]byte("x"), 1024)
	databases(b, func(b *testing.B, q *sqlqueue.Queue) {
		log := newLog(b)
		start := time.Now()
		parallel(64, b.N, func(int) { log.append(body) })
		floor := time.Since(start)
		for chunk := range slices.Chunk(make([]queue.Message, b.N), 1000) {
			for i := range chunk {
				chunk[i].Body = body
			}
			if err := q.Publish(b.Context(), "t", chunk, queue.PublishOptions{}); err != nil {
				b.Fatal(err)
			}
		}
		sub, err := q.Subscribe(b.Context(), "t", queue.SubscribeOptions{Group: "g"})
		if err != nil {
			b.Fatal(err)
		}
		b.ResetTimer()
		parallel(64, b.N, func(int) {
			d, err := sub.Next(context.Background())
			if err == nil {
				err = d.Ack(context.Background())
			}
			if err != nil {
				b.Error(err)
			}
		})
		perSecond(b, "floor/s", b.N, floor)
		perSecond(b, "msgs/s", b.N, b.Elapsed())
	})
}

// BenchmarkIdleLatency: from the call of Publish to the return of Next in a
// reader that waits, one message at a time, in one process and across handles.
func BenchmarkIdleLatency(b *testing.B) {
	for _, handles := range []string{"one", "two"} {
		for name, url := range map[string]func(testing.TB) string{"sqlite": testenv.SQLite, "postgres": testenv.Postgres} {
			b.Run(name+"/"+handles, func(b *testing.B) {
				u := url(b)
				q := newQueue(b, open(b, u), sqlqueue.Options{})
				defer q.Close()
				from := q
				if handles == "two" {
					from = newQueue(b, open(b, u), sqlqueue.Options{})
					defer from.Close()
				}
				log := newLog(b)
				var floor, took []time.Duration
				for range b.N {
					start := time.Now()
					log.append([]byte("message"))
					floor = append(floor, time.Since(start))
				}
				sub, err := q.Subscribe(b.Context(), "t", queue.SubscribeOptions{Group: "g"})
				if err != nil {
					b.Fatal(err)
				}
				got := make(chan time.Time)
				go func() {
					for {
						d, err := sub.Next(context.Background())
						if err != nil {
							return
						}
						got <- time.Now()
						if err := d.Ack(context.Background()); err != nil {
							b.Error(err)
						}
						got <- time.Now()
					}
				}()
				b.ResetTimer()
				for range b.N {
					start := time.Now()
					if err := from.Publish(b.Context(), "t", []queue.Message{{Body: []byte("message")}}, queue.PublishOptions{}); err != nil {
						b.Fatal(err)
					}
					took = append(took, (<-got).Sub(start))
					<-got
				}
				for what, d := range map[string][]time.Duration{"floor": floor, "start": took} {
					slices.Sort(d)
					b.ReportMetric(float64(d[len(d)/2].Microseconds()), what+"-p50-µs")
					b.ReportMetric(float64(d[len(d)*99/100].Microseconds()), what+"-p99-µs")
				}
			})
		}
	}
}
