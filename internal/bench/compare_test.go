package bench

import (
	"bytes"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

// body is what messages carry: 1 KiB.
var body = bytes.Repeat([]byte("x"), 1<<10)

// contender is one way of doing the same work: n operations. What comes before
// and after is not timed, and may be nil.
type contender struct {
	name    string
	prepare func(n int) error
	run     func(n int) error
	finish  func() error
}

// compare has the contenders do n operations each, in turns, b.N times, another
// one beginning each time. It reports operations per second of each, and of the
// first one, which is ours, the ratio to each of the others.
func compare(b *testing.B, n int, contenders ...contender) {
	b.Helper()
	took := make([]time.Duration, len(contenders))
	for round := range b.N {
		for i := range contenders {
			at := (round + i) % len(contenders)
			c := contenders[at]
			if c.prepare != nil {
				if err := c.prepare(n); err != nil {
					b.Fatalf("%s: %v", c.name, err)
				}
			}
			start := time.Now()
			if err := c.run(n); err != nil {
				b.Fatalf("%s: %v", c.name, err)
			}
			took[at] += time.Since(start)
			if c.finish != nil {
				if err := c.finish(); err != nil {
					b.Fatalf("%s: %v", c.name, err)
				}
			}
		}
	}
	b.ReportMetric(0, "ns/op") // of all of them together, which says nothing
	for i, c := range contenders {
		b.ReportMetric(float64(n*b.N)/took[i].Seconds(), c.name+"/s")
		if i > 0 {
			b.ReportMetric(took[i].Seconds()/took[0].Seconds(), "x-"+c.name)
		}
	}
}

// parallel makes n calls of f on so many goroutines.
func parallel(workers, n int, f func() error) error {
	var next atomic.Int64
	var g errgroup.Group
	for range workers {
		g.Go(func() error {
			for next.Add(1) <= int64(n) {
				if err := f(); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// batches makes calls of f for n messages in all, size at a time.
func batches(size, n int, f func(k int) error) error {
	for left := n; left > 0; left -= size {
		if err := f(min(size, left)); err != nil {
			return err
		}
	}
	return nil
}
