package logstreamtest

import (
	"testing"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

func checkSeal(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "s", 2, 0, "hello ")
	add(tb, s, "s", 2, 6, "world")
	seal(tb, s, "s", logstream.SealOptions{Epoch: 3, Size: 11, SHA256: sum("hello world")})
	wantStat(tb, s, logstream.Info{Stream: "s", Size: 11, Epoch: 3, Sealed: true, SHA256: sum("hello world")})
	wantBytes(tb, s, "s", 0, "hello world", true)
	wantBytes(tb, s, "s", 6, "world", true)
	wantBytes(tb, s, "s", 11, "", true)

	seal(tb, s, "empty", logstream.SealOptions{Epoch: 1})
	wantStat(tb, s, logstream.Info{Stream: "empty", Epoch: 1, Sealed: true, SHA256: sum("")})
	wantBytes(tb, s, "empty", 0, "", true)
}

func checkSealRefused(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "s", 2, 0, "hello")
	for what, o := range map[string]logstream.SealOptions{
		"a smaller size":                     {Epoch: 2, Size: 4},
		"a larger size":                      {Epoch: 2, Size: 6},
		"size 0":                             {Epoch: 2},
		"another SHA-256":                    {Epoch: 2, Size: 5, SHA256: sum("hellO")},
		"another SHA-256 and no size at all": {Epoch: 2, Size: -1, SHA256: sum("hellO")},
	} {
		wantErr(tb, "Seal with "+what, s.Seal(tb.Context(), "s", o), logstream.ErrConflict)
		wantStat(tb, s, logstream.Info{Stream: "s", Size: 5, Epoch: 2})
	}
	wantErr(tb, "Seal of an absent stream with size 5", s.Seal(tb.Context(), "absent", logstream.SealOptions{Size: 5}), logstream.ErrConflict)
	_, err := s.Stat(tb.Context(), "absent")
	wantErr(tb, "Stat after that", err, logstream.ErrNotFound)
	add(tb, s, "s", 2, 5, "!")
	seal(tb, s, "s", logstream.SealOptions{Epoch: 2, Size: 6, SHA256: sum("hello!")})
}

func checkSealRepeat(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "s", 2, 0, "hello")
	want := logstream.Info{Stream: "s", Size: 5, Epoch: 2, Sealed: true, SHA256: sum("hello")}
	for _, o := range []logstream.SealOptions{
		{Epoch: 2, Size: 5, SHA256: sum("hello")},
		{Epoch: 2, Size: 5, SHA256: sum("hello")},
		{Epoch: 2, Size: 5},
		{Epoch: 2, Size: -1},
		{Epoch: 8, Size: 5},
	} {
		seal(tb, s, "s", o)
		wantStat(tb, s, want)
	}
	wantErr(tb, "Seal with another size", s.Seal(tb.Context(), "s", logstream.SealOptions{Epoch: 2, Size: 4}), logstream.ErrConflict)
	wantErr(tb, "Seal with another SHA-256", s.Seal(tb.Context(), "s", logstream.SealOptions{Epoch: 2, Size: 5, SHA256: sum("x")}), logstream.ErrConflict)
	wantErr(tb, "Seal by an older epoch", s.Seal(tb.Context(), "s", logstream.SealOptions{Epoch: 1, Size: 5}), logstream.ErrFenced)
}

func checkSealedAppend(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "s", 2, 0, "hello", mark(0, 1))
	sealAny(tb, s, "s", 2)
	for _, epoch := range []int64{2, 9} {
		add(tb, s, "s", epoch, 0, "hello", mark(0, 2)) // repeats
		add(tb, s, "s", epoch, 3, "lo")
		add(tb, s, "s", epoch, 5, "")
		wantErr(tb, "Append behind a seal", try(tb, s, "s", epoch, 5, "x"), logstream.ErrSealed)
		wantErr(tb, "Append over a seal", try(tb, s, "s", epoch, 3, "lo!"), logstream.ErrSealed)
		wantErr(tb, "Append far behind a seal", try(tb, s, "s", epoch, 9, "x"), logstream.ErrSealed)
		wantErr(tb, "Append of other bytes", try(tb, s, "s", epoch, 3, "xx"), logstream.ErrConflict)
	}
	wantStat(tb, s, logstream.Info{Stream: "s", Size: 5, Epoch: 2, Sealed: true, SHA256: sum("hello")})
	wantBytes(tb, s, "s", 0, "hello", true)
	wantMarks(tb, s, "s", 0, -1, mark(0, 1))
}

func checkSealAnySize(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "s", 2, 0, "what there is")
	sealAny(tb, s, "s", 3)
	wantStat(tb, s, logstream.Info{Stream: "s", Size: 13, Epoch: 3, Sealed: true, SHA256: sum("what there is")})
	sealAny(tb, s, "absent", 3)
	wantStat(tb, s, logstream.Info{Stream: "absent", Epoch: 3, Sealed: true, SHA256: sum("")})
}
