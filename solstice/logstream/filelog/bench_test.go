package filelog

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

// BenchmarkAppend measures appends of 64 KiB of 200-byte lines, one writer per
// stream, beside the floor in the same run: the same number of goroutines that
// write their bytes into one file and share its fsync (group commit), without
// any stream, offset, index or reader. x/floor is the ratio of their rates.
func BenchmarkAppend(b *testing.B) {
	block := bytes.Repeat(append(bytes.Repeat([]byte("x"), 199), '\n'), 64<<10/200)
	for _, streams := range []int{1, 8, 32} {
		b.Run(fmt.Sprintf("%dstreams", streams), func(b *testing.B) {
			dir := b.TempDir()
			s := openStore(b, filepath.Join(dir, "store"), Options{})
			f, err := os.Create(filepath.Join(dir, "floor"))
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			g := &floor{f: f}
			var ours, bare time.Duration
			offs := make([]int64, streams)
			b.SetBytes(int64(streams * len(block) * rounds))
			for b.Loop() {
				ours += together(b, streams, func(i int) (err error) {
					offs[i], err = s.Append(b.Context(), fmt.Sprintf("s%d", i), logstream.AppendOptions{Epoch: 1, Marks: []logstream.Mark{{Offset: offs[i], FD: 1}}}, offs[i], block)
					return err
				})
				bare += together(b, streams, func(int) error { return g.append(block) })
			}
			lines := float64(b.N * streams * rounds * len(block) / 200)
			b.ReportMetric(lines/ours.Seconds(), "lines/s")
			b.ReportMetric(float64(bare)/float64(ours), "x/floor")
		})
	}
}

const rounds = 8 // appends per goroutine and turn of the benchmark

func together(b *testing.B, n int, f func(i int) error) time.Duration {
	start := time.Now()
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			for range rounds {
				if err := f(i); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return time.Since(start)
}

// floor is bare group commit: whoever comes first syncs for all who wrote
// before the sync began.
type floor struct {
	f             *os.File
	mu, syncing   sync.Mutex
	written, safe int64
}

func (g *floor) append(p []byte) error {
	g.mu.Lock()
	_, err := g.f.Write(p)
	g.written += int64(len(p))
	mine := g.written
	g.mu.Unlock()
	if err != nil {
		return err
	}
	g.syncing.Lock()
	defer g.syncing.Unlock()
	if g.safe >= mine {
		return nil
	}
	g.mu.Lock()
	now := g.written
	g.mu.Unlock()
	if err := syncData(g.f); err != nil {
		return err
	}
	g.safe = now
	return nil
}
