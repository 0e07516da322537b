package logstreamtest

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

// checkHuge writes and reads 64 MiB; what is kept in memory must not grow with
// the stream.
func checkHuge(tb testing.TB, h Harness) {
	s := open(tb, h)
	const size, step = 64 << 20, 1 << 20
	src := rand.NewChaCha8([32]byte{7})
	all := sha256.New()
	block := make([]byte, step)
	for off := int64(0); off < size; off += step {
		_, _ = src.Read(block)
		all.Write(block)
		if _, err := s.Append(tb.Context(), "huge", logstream.AppendOptions{Epoch: 1, Marks: []logstream.Mark{mark(off, int(off/step))}}, off, block); err != nil {
			tb.Fatalf("Append at %d: %v", off, err)
		}
	}
	want := all.Sum(nil)
	seal(tb, s, "huge", logstream.SealOptions{Epoch: 1, Size: size, SHA256: want})
	got, marks, peak := sha256.New(), 0, uint64(0)
	next := int64(0)
	for c, err := range s.Tail(tb.Context(), "huge", 0) {
		if err != nil {
			tb.Fatalf("Tail at %d: %v", next, err)
		}
		if len(c.Data) > logstream.MaxAppendBytes {
			tb.Fatalf("a chunk of %d bytes", len(c.Data))
		}
		got.Write(c.Data)
		next = c.Offset + int64(len(c.Data))
		marks += len(c.Marks)
		if next%(16<<20) == 0 {
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			peak = max(peak, m.HeapAlloc)
		}
	}
	if next != size || !bytes.Equal(got.Sum(nil), want) || marks < size/step {
		tb.Fatalf("Tail gave %d bytes with SHA-256 %x and %d marks, want %d with %x and %d", next, got.Sum(nil), marks, size, want, size/step)
	}
	if h.MemoryStored {
		return
	}
	if peak > size/2 {
		tb.Fatalf("the heap holds %d bytes while a stream of %d is read", peak, size)
	}
}

// model is what a stream must be.
type model struct {
	exists, sealed bool
	epoch          int64
	data           []byte
	marks          []logstream.Mark // per byte: the one in force
}

// checkModel does random things to a few streams and compares every answer
// and, now and then, all content with a model.
func checkModel(tb testing.TB, h Harness) {
	for seed := range uint64(4) {
		runModel(tb, h, seed)
	}
}

func runModel(tb testing.TB, h Harness, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 42))
	s := open(tb, h)
	names := []string{"m/a", "m/b", "m/a/c"}
	models := map[string]*model{}
	for _, n := range names {
		models[n] = &model{}
	}
	what := ""
	fail := func(format string, args ...any) {
		tb.Helper()
		tb.Fatalf("seed %d: %s: %s", seed, what, fmt.Sprintf(format, args...))
	}
	for step := range 120 {
		name := names[rnd.IntN(len(names))]
		m := models[name]
		epoch := m.epoch + []int64{0, 0, 0, 0, 1, 3, -1}[rnd.IntN(7)]
		epoch = max(epoch, 0)
		switch op := rnd.IntN(20); {
		case op < 12: // append, often a repeat or an overlap, seldom a gap or other bytes
			off := int64(len(m.data)) - int64(rnd.IntN(2)*rnd.IntN(len(m.data)+1))
			p := make([]byte, rnd.IntN(1+1<<rnd.IntN(15)))
			for i := range p {
				p[i] = byte(rnd.IntN(256))
			}
			stored := copy(p, m.data[off:])
			conflict, gap := false, false
			switch rnd.IntN(10) {
			case 0:
				if conflict = stored > 0; conflict {
					p[rnd.IntN(stored)] ^= 1
				}
			case 1:
				gap = true
				off = int64(len(m.data)) + 1 + int64(rnd.IntN(9))
			}
			var marks []logstream.Mark
			for at := off; at < off+int64(len(p)) && rnd.IntN(4) > 0; at += 1 + int64(rnd.IntN(len(p))) {
				marks = append(marks, mark(at, step*10+len(marks)))
			}
			what = fmt.Sprintf("step %d: Append(%s, epoch %d, %d bytes at %d) to %d bytes at epoch %d, sealed %v", step, name, epoch, len(p), off, len(m.data), m.epoch, m.sealed)
			err := try(tb, s, name, epoch, off, string(p), marks...)
			var want error
			var oe *logstream.OffsetError
			switch fresh := int64(len(p)) + off - int64(len(m.data)); {
			case epoch < m.epoch:
				want = logstream.ErrFenced
			case gap && m.sealed, m.sealed && fresh > 0 && !conflict:
				want = logstream.ErrSealed
			case gap:
				if !errors.As(err, &oe) || oe.Want != int64(len(m.data)) {
					fail("error %v, want *OffsetError", err)
				}
				want = err
			case conflict:
				want = logstream.ErrConflict
			}
			if !errors.Is(err, want) {
				fail("error %v, want %v", err, want)
			}
			if err != nil {
				break
			}
			if !m.sealed {
				m.exists, m.epoch = true, epoch
				m.add(off, p, marks)
			}
		case op < 13:
			o := logstream.SealOptions{Epoch: epoch, Size: []int64{-1, int64(len(m.data)), int64(len(m.data)) + 1}[rnd.IntN(3)]}
			if rnd.IntN(2) == 0 {
				o.SHA256 = sum(string(m.data))
			}
			what = fmt.Sprintf("step %d: Seal(%s, %+v) of %d bytes at epoch %d, sealed %v", step, name, o, len(m.data), m.epoch, m.sealed)
			var want error
			switch {
			case epoch < m.epoch:
				want = logstream.ErrFenced
			case o.Size > int64(len(m.data)):
				want = logstream.ErrConflict
			}
			if err := s.Seal(tb.Context(), name, o); !errors.Is(err, want) {
				fail("error %v, want %v", err, want)
			}
			if want == nil && !m.sealed {
				m.exists, m.sealed, m.epoch = true, true, epoch
			}
		case op < 14:
			what = fmt.Sprintf("step %d: Delete(%s)", step, name)
			if err := s.Delete(tb.Context(), name); err != nil {
				fail("%v", err)
			}
			*m = model{}
		case op < 16 && h.Reopen != nil:
			what = fmt.Sprintf("step %d: Reopen", step)
			s = h.Reopen(tb, s)
			tb.Cleanup(func() { s.Close() })
		default:
			what = fmt.Sprintf("step %d: reading %s", step, name)
			m.compare(tb, s, name, int64(rnd.IntN(len(m.data)+1)), fail)
		}
	}
	for name, m := range models {
		what = "at the end: reading " + name
		m.compare(tb, s, name, 0, fail)
	}
	if err := s.Close(); err != nil {
		fail("Close: %v", err)
	}
}

func (m *model) add(off int64, p []byte, marks []logstream.Mark) {
	var cur logstream.Mark
	if len(m.marks) > 0 {
		cur = m.marks[len(m.marks)-1]
	}
	for i, b := range p {
		at := off + int64(i)
		if len(marks) > 0 && marks[0].Offset == at {
			cur, marks = marks[0], marks[1:]
		}
		if at >= int64(len(m.data)) {
			m.data = append(m.data, b)
			m.marks = append(m.marks, cur)
		}
	}
}

func (m *model) compare(tb testing.TB, s logstream.Store, name string, from int64, fail func(string, ...any)) {
	info, err := s.Stat(tb.Context(), name)
	switch {
	case !m.exists && errors.Is(err, logstream.ErrNotFound):
		return
	case err != nil || !m.exists:
		fail("Stat gave %+v, error %v; the model %v", info, err, m.exists)
	case info.Size != int64(len(m.data)) || info.Epoch != m.epoch || info.Sealed != m.sealed:
		fail("Stat gave %+v, want %d bytes, epoch %d, sealed %v", info, len(m.data), m.epoch, m.sealed)
	}
	n := len(m.data) - int(from)
	if m.sealed {
		n = -1
	}
	data, marks, err := read(tb.Context(), s, name, from, n)
	if err != nil || !bytes.Equal(data, m.data[from:]) {
		fail("Tail from %d gave %s, error %v; want %s", from, brief(data), err, brief(m.data[from:]))
	}
	var cur logstream.Mark
	for i := range data {
		for len(marks) > 0 && marks[0].Offset <= from+int64(i) {
			cur, marks = marks[0], marks[1:]
		}
		want := m.marks[from+int64(i)]
		if !cur.Time.Equal(want.Time) || cur.Step != want.Step || cur.FD != want.FD {
			fail("at byte %d the mark %+v is in force, want %+v", from+int64(i), cur, want)
		}
	}
}
