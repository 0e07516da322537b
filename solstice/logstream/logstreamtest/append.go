package logstreamtest

import (
	"crypto/sha256"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

func sum(p string) []byte {
	h := sha256.Sum256([]byte(p))
	return h[:]
}

func checkAppend(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "r/j/1", 1, 0, "hello ")
	add(tb, s, "r/j/1", 1, 6, "world")
	wantStat(tb, s, logstream.Info{Stream: "r/j/1", Size: 11, Epoch: 1})
	wantBytes(tb, s, "r/j/1", 0, "hello world", false)
}

func checkBuffer(tb testing.TB, h Harness) {
	s := open(tb, h)
	buf := []byte("aaaa")
	for i := range 4 {
		for j := range buf {
			buf[j] = byte('a' + i)
		}
		if _, err := s.Append(tb.Context(), "s", logstream.AppendOptions{}, int64(4*i), buf); err != nil {
			tb.Fatalf("Append: %v", err)
		}
	}
	wantBytes(tb, s, "s", 0, "aaaabbbbccccdddd", false)
	sealAny(tb, s, "s", 0)
	wantBytes(tb, s, "s", 0, "aaaabbbbccccdddd", true)
}

func checkRepeat(tb testing.TB, h Harness) {
	s := open(tb, h)
	for range 3 {
		add(tb, s, "s", 1, 0, "one")
	}
	add(tb, s, "s", 1, 3, "two")
	add(tb, s, "s", 1, 0, "one")
	add(tb, s, "s", 1, 2, "et")
	wantStat(tb, s, logstream.Info{Stream: "s", Size: 6, Epoch: 1})
	wantBytes(tb, s, "s", 0, "onetwo", false)
}

func checkOverlap(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "s", 1, 0, "onetwo")
	add(tb, s, "s", 1, 3, "twothree")
	add(tb, s, "s", 1, 0, "onetwothreefour")
	wantBytes(tb, s, "s", 0, "onetwothreefour", false)
}

func checkConflict(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "s", 1, 0, "one")
	add(tb, s, "s", 1, 3, "two")
	for off, p := range map[int64]string{0: "onx", 2: "xtwo", 5: "xmore"} {
		wantErr(tb, fmt.Sprintf("Append of %q at %d over \"onetwo\"", p, off), try(tb, s, "s", 1, off, p), logstream.ErrConflict)
	}
	wantBytes(tb, s, "s", 0, "onetwo", false)
}

func checkGap(tb testing.TB, h Harness) {
	s := open(tb, h)
	wantOffset(tb, "Append at 1 to a stream that does not exist", try(tb, s, "s", 1, 1, "x"), 0, 1)
	_, err := s.Stat(tb.Context(), "s")
	wantErr(tb, "Stat after a refused first append", err, logstream.ErrNotFound)
	add(tb, s, "s", 1, 0, "one")
	wantOffset(tb, "Append at 4 of 3", try(tb, s, "s", 1, 4, "x"), 3, 4)
	wantOffset(tb, "empty Append at 4 of 3", try(tb, s, "s", 1, 4, ""), 3, 4)
	add(tb, s, "s", 1, 3, "x")
}

func checkRefused(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "s", 3, 0, "one")
	_ = try(tb, s, "s", 9, 7, "gap")
	_ = try(tb, s, "s", 9, 0, "conflict")
	_ = s.Seal(tb.Context(), "s", logstream.SealOptions{Epoch: 9, Size: 99})
	wantStat(tb, s, logstream.Info{Stream: "s", Size: 3, Epoch: 3})
	add(tb, s, "s", 3, 3, "two")
	wantBytes(tb, s, "s", 0, "onetwo", false)
}

func checkFence(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "s", 1, 0, "one")
	add(tb, s, "s", 5, 3, "two")
	for what, err := range map[string]error{
		"Append":           try(tb, s, "s", 4, 6, "x"),
		"repeated Append":  try(tb, s, "s", 1, 0, "one"),
		"empty Append":     try(tb, s, "s", 4, 6, ""),
		"Append with gap":  try(tb, s, "s", 4, 99, "x"),
		"Seal":             s.Seal(tb.Context(), "s", logstream.SealOptions{Epoch: 4, Size: 6}),
		"Seal at any size": s.Seal(tb.Context(), "s", logstream.SealOptions{Epoch: 4, Size: -1}),
	} {
		wantErr(tb, what+" of an older epoch", err, logstream.ErrFenced)
	}
	wantStat(tb, s, logstream.Info{Stream: "s", Size: 6, Epoch: 5})
	add(tb, s, "s", 5, 6, "three")
	sealAny(tb, s, "s", 5)
	wantErr(tb, "repeated Append of an older epoch after the seal", try(tb, s, "s", 4, 0, "one"), logstream.ErrFenced)
}

func checkEmptyAppend(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "s", 2, 0, "")
	wantStat(tb, s, logstream.Info{Stream: "s", Epoch: 2})
	add(tb, s, "s", 2, 0, "one")
	add(tb, s, "s", 7, 0, "") // a new owner that does not know the size
	wantStat(tb, s, logstream.Info{Stream: "s", Size: 3, Epoch: 7})
	wantErr(tb, "Append of the epoch before", try(tb, s, "s", 2, 3, "x"), logstream.ErrFenced)
	add(tb, s, "s", 7, 3, "two")
	wantBytes(tb, s, "s", 0, "onetwo", false)
}

func checkInvalid(tb testing.TB, h Harness) {
	s := open(tb, h)
	for _, name := range []string{"", "/", "a/", "/a", "a//b", ".", "..", "a/../b", "a b", "a~", "a+b", "ä", "a\x00", `a\b`, strings.Repeat("x", 121), strings.Repeat("x/", 200) + "x"} {
		wantErr(tb, fmt.Sprintf("Append to %q", name), try(tb, s, name, 1, 0, "x"), logstream.ErrInvalid)
		wantErr(tb, fmt.Sprintf("Seal of %q", name), s.Seal(tb.Context(), name, logstream.SealOptions{}), logstream.ErrInvalid)
		_, err := s.Stat(tb.Context(), name)
		wantErr(tb, fmt.Sprintf("Stat of %q", name), err, logstream.ErrInvalid)
		_, _, err = read(tb.Context(), s, name, 0, -1)
		wantErr(tb, fmt.Sprintf("Tail of %q", name), err, logstream.ErrInvalid)
		wantErr(tb, fmt.Sprintf("Delete of %q", name), s.Delete(tb.Context(), name), logstream.ErrInvalid)
	}
	for what, err := range map[string]error{
		"negative offset":     try(tb, s, "s", 1, -1, "x"),
		"overflowing offset":  try(tb, s, "s", 1, math.MaxInt64, "x"),
		"negative epoch":      try(tb, s, "s", -1, 0, "x"),
		"too many bytes":      try(tb, s, "s", 1, 0, strings.Repeat("x", logstream.MaxAppendBytes+1)),
		"mark before":         try(tb, s, "s", 1, 0, "x", mark(-1, 0)),
		"mark behind":         try(tb, s, "s", 1, 0, "x", mark(1, 0)),
		"mark of no bytes":    try(tb, s, "s", 1, 0, "", mark(0, 0)),
		"marks not ascending": try(tb, s, "s", 1, 0, "xyz", mark(1, 0), mark(1, 1)),
		"huge step":           try(tb, s, "s", 1, 0, "x", logstream.Mark{Step: math.MaxInt32 + 1}),
		"seal size":           s.Seal(tb.Context(), "s", logstream.SealOptions{Size: -2}),
		"seal epoch":          s.Seal(tb.Context(), "s", logstream.SealOptions{Epoch: -1}),
		"seal hash":           s.Seal(tb.Context(), "s", logstream.SealOptions{SHA256: []byte("short")}),
	} {
		wantErr(tb, what, err, logstream.ErrInvalid)
	}
	_, _, err := read(tb.Context(), s, "s", -1, -1)
	wantErr(tb, "Tail from -1", err, logstream.ErrInvalid)
	_, err = s.Stat(tb.Context(), "s")
	wantErr(tb, "Stat", err, logstream.ErrNotFound)
}

func checkNames(tb testing.TB, h Harness) {
	s := open(tb, h)
	names := []string{
		"a", "a/b", "a/b/c", "A", "a/B", "aB", "Ab", "a.b", "a-b", "a_b", "...", ".a", "-", "con", "log", "a.log", "idx", "lock", "journal",
		strings.Repeat("x", 120), strings.Repeat("X", 120), strings.Repeat("xX/", 133) + "x",
	}
	for _, name := range names {
		add(tb, s, name, 1, 0, name)
	}
	for _, name := range names {
		wantBytes(tb, s, name, 0, name, false)
		sealAny(tb, s, name, 1)
		wantBytes(tb, s, name, 0, name, true)
	}
	for i, name := range names {
		if err := s.Delete(tb.Context(), name); err != nil {
			tb.Fatalf("Delete(%q): %v", name, err)
		}
		for _, other := range names[i+1:] {
			wantStat(tb, s, logstream.Info{Stream: other, Size: int64(len(other)), Epoch: 1, Sealed: true, SHA256: sum(other)})
		}
	}
}

func checkNotFound(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "a/b", 1, 0, "x")
	for _, name := range []string{"a", "a/b/c", "b"} {
		_, err := s.Stat(tb.Context(), name)
		wantErr(tb, "Stat("+name+")", err, logstream.ErrNotFound)
	}
}

func checkMarks(tb testing.TB, h Harness) {
	s := open(tb, h)
	odd := logstream.Mark{Offset: 12, Step: -1} // no time
	for _, sealed := range []bool{false, true} {
		if !sealed {
			add(tb, s, "s", 1, 0, "no mark")
			add(tb, s, "s", 1, 7, "abc", mark(7, 1), mark(9, 2))
			add(tb, s, "s", 1, 10, "de")
			add(tb, s, "s", 1, 12, "fg", odd, mark(13, 3))
		} else {
			sealAny(tb, s, "s", 1)
		}
		all := []logstream.Mark{mark(7, 1), mark(9, 2), odd, mark(13, 3)}
		wantMarks(tb, s, "s", 0, 14, all...)
		wantMarks(tb, s, "s", 7, 7, all...)
		wantMarks(tb, s, "s", 8, 6, all...) // the one in force first
		wantMarks(tb, s, "s", 9, 5, all[1:]...)
		wantMarks(tb, s, "s", 11, 3, all[1:]...)
		wantMarks(tb, s, "s", 12, 2, all[2:]...)
		wantMarks(tb, s, "s", 13, 1, all[3:]...)
	}
}

func checkMarksOfRepeats(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "s", 1, 0, "0123", mark(0, 1))
	add(tb, s, "s", 1, 0, "0123", mark(0, 9), mark(2, 9)) // stored already
	add(tb, s, "s", 1, 2, "2345", mark(2, 2), mark(5, 3)) // the first is in force at 4
	add(tb, s, "s", 1, 4, "456789", mark(4, 9), mark(6, 4), mark(8, 5))
	wantMarks(tb, s, "s", 0, 10, mark(0, 1), logstream.Mark{Offset: 4, Time: mark(0, 2).Time, Step: 2, FD: 1}, mark(5, 3), mark(6, 4), mark(8, 5))
}
