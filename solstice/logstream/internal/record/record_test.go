package record_test

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logstream/internal/record"
)

func marks(offsets ...int64) (ms []logstream.Mark) {
	for i, o := range offsets {
		ms = append(ms, logstream.Mark{Offset: o, Time: time.UnixMicro(1_700_000_000_000_000 - int64(i)*7).UTC(), Step: i - 1, FD: 1 + i%2})
	}
	return ms
}

func TestMarksRoundTrip(t *testing.T) {
	for _, ms := range [][]logstream.Mark{nil, marks(0), marks(5, 6, 1<<40), {{Offset: 3}}} {
		got, err := record.ParseMarks(record.AppendMarks(nil, ms))
		if err != nil || !slices.Equal(got, ms) {
			t.Fatalf("%v became %v, %v", ms, got, err)
		}
	}
}

func TestWithinAndTrim(t *testing.T) {
	ms := marks(10, 20, 30)
	for _, c := range []struct {
		from, to int64
		want     []logstream.Mark
	}{
		{0, 5, nil}, {0, 11, ms[:1]}, {10, 20, ms[:1]}, {15, 16, ms[:1]}, {20, 40, ms[1:]}, {25, 31, ms[1:]}, {90, 99, ms[2:]},
	} {
		if got := record.Within(ms, c.from, c.to); !slices.Equal(got, c.want) {
			t.Errorf("Within(%d, %d) = %v, want %v", c.from, c.to, got, c.want)
		}
	}
	if got := record.Trim(ms, 10); !slices.Equal(got, ms) {
		t.Errorf("Trim(10) = %v", got)
	}
	moved := ms[1]
	moved.Offset = 25
	if got := record.Trim(ms, 25); !slices.Equal(got, []logstream.Mark{moved, ms[2]}) {
		t.Errorf("Trim(25) = %v", got)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(record.Append(record.Append(nil, []byte("one")), record.AppendMarks(nil, marks(1, 2))))
	f.Add(make([]byte, 64))
	f.Add([]byte{0xff, 0xff, 0xff, 0x0f, 0, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		r := record.NewReader(bytes.NewReader(b), 1<<20)
		for rest := b; ; {
			p1, err1 := r.Next()
			p2, next, err2 := record.Parse(rest, 1<<20)
			if !bytes.Equal(p1, p2) || (err1 == nil) != (err2 == nil) {
				t.Fatalf("Reader gives %q, %v; Parse %q, %v", p1, err1, p2, err2)
			}
			if err1 != nil {
				if !errors.Is(err1, io.EOF) && !errors.Is(err1, io.ErrUnexpectedEOF) && !errors.Is(err1, logstream.ErrCorrupt) {
					t.Fatalf("error %v", err1)
				}
				return
			}
			if again := record.Append(nil, p2); !bytes.Equal(again, rest[:len(again)]) {
				t.Fatalf("%x parsed as another record", rest)
			}
			rest = next
		}
	})
}

func FuzzParseMarks(f *testing.F) {
	f.Add(record.AppendMarks(nil, marks(0, 3, 900)))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0x0f})
	f.Fuzz(func(t *testing.T, b []byte) {
		ms, err := record.ParseMarks(b)
		if err != nil {
			if !errors.Is(err, logstream.ErrCorrupt) {
				t.Fatalf("error %v", err)
			}
			return
		}
		again, err := record.ParseMarks(record.AppendMarks(nil, ms))
		if err != nil || !slices.Equal(ms, again) {
			t.Fatalf("%v became %v, %v", ms, again, err)
		}
		if !slices.IsSortedFunc(ms, func(a, b logstream.Mark) int { return int(min(1, max(-1, a.Offset-b.Offset))) }) {
			t.Fatalf("not ascending: %v", ms)
		}
	})
}
