// Package logstreamtest is the conformance suite of logstream.Store. An
// implementation runs it in one call:
//
//	func TestConformance(t *testing.T) {
//		logstreamtest.Run(t, logstreamtest.Harness{
//			Open: func(tb testing.TB) logstream.Store { return mylog.New(tb.TempDir()) },
//		})
//	}
//
// Which checks apply follows from which of the harness's functions are there.
package logstreamtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

// Harness says how to get at the implementation under test.
type Harness struct {
	// Open returns a new, empty store. The suite closes it.
	Open func(tb testing.TB) logstream.Store
	// Reopen closes a store and returns another with the same content, as
	// after a restart. Nil where nothing survives.
	Reopen func(tb testing.TB, s logstream.Store) logstream.Store
	// Second returns another handle on an open store's content, as another
	// process would have. Nil where there can be none.
	Second func(tb testing.TB, s logstream.Store) logstream.Store
	// MemoryStored says that streams live in this process's memory, which is
	// then not asked to stay flat.
	MemoryStored bool
}

// check is one promise of the interface.
type check struct {
	name string
	run  func(tb testing.TB, h Harness)
}

// Run runs the suite.
func Run(t *testing.T, h Harness) {
	for _, c := range checks {
		t.Run(c.name, func(t *testing.T) { c.run(t, h) })
	}
}

var checks = []check{
	{"Append", checkAppend},
	{"AppendKeepsCallersBuffer", checkBuffer},
	{"Repeat", checkRepeat},
	{"Overlap", checkOverlap},
	{"Conflict", checkConflict},
	{"Gap", checkGap},
	{"RefusedChangesNothing", checkRefused},
	{"Fence", checkFence},
	{"EmptyAppendFences", checkEmptyAppend},
	{"Invalid", checkInvalid},
	{"Names", checkNames},
	{"NotFound", checkNotFound},
	{"Marks", checkMarks},
	{"MarksOfRepeats", checkMarksOfRepeats},
	{"Seal", checkSeal},
	{"SealRefused", checkSealRefused},
	{"SealRepeat", checkSealRepeat},
	{"SealedAppend", checkSealedAppend},
	{"SealAnySize", checkSealAnySize},
	{"TailPush", checkTailPush},
	{"TailBeforeCreation", checkTailBeforeCreation},
	{"TailFrom", checkTailFrom},
	{"TailBeyondEnd", checkTailBeyondEnd},
	{"TailMany", checkTailMany},
	{"TailSlow", checkTailSlow},
	{"TailBreak", checkTailBreak},
	{"TailCancel", checkTailCancel},
	{"Delete", checkDelete},
	{"DeleteEndsFollowers", checkDeleteEndsFollowers},
	{"ConcurrentStreams", checkConcurrentStreams},
	{"ConcurrentSameBytes", checkConcurrentSameBytes},
	{"Context", checkContext},
	{"Close", checkClose},
	{"Reopen", checkReopen},
	{"TailAcrossReopen", checkTailAcrossReopen},
	{"SecondHandle", checkSecondHandle},
	{"TakeOver", checkTakeOver},
	{"Huge", checkHuge},
	{"Model", checkModel},
}

// patience bounds every wait for what must happen; only a failure takes it.
// It is a variable for the suite's own tests.
var patience = 30 * time.Second

// base is a moment with microseconds, and none finer.
var base = time.Date(2026, 3, 4, 5, 6, 7, 89_012_000, time.UTC)

func mark(offset int64, n int) logstream.Mark {
	return logstream.Mark{Offset: offset, Time: base.Add(time.Duration(n) * time.Millisecond), Step: n, FD: 1 + n%2}
}

func open(tb testing.TB, h Harness) logstream.Store {
	tb.Helper()
	s := h.Open(tb)
	tb.Cleanup(func() { s.Close() })
	return s
}

func try(tb testing.TB, s logstream.Store, stream string, epoch, off int64, p string, marks ...logstream.Mark) error {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), patience)
	defer cancel()
	next, err := s.Append(ctx, stream, logstream.AppendOptions{Epoch: epoch, Marks: marks}, off, []byte(p))
	if err == nil && next != off+int64(len(p)) {
		tb.Fatalf("Append of %d bytes at %d returned %d", len(p), off, next)
	}
	return err
}

func add(tb testing.TB, s logstream.Store, stream string, epoch, off int64, p string, marks ...logstream.Mark) {
	tb.Helper()
	if err := try(tb, s, stream, epoch, off, p, marks...); err != nil {
		tb.Fatalf("Append of %d bytes at %d: %v", len(p), off, err)
	}
}

func seal(tb testing.TB, s logstream.Store, stream string, o logstream.SealOptions) {
	tb.Helper()
	if err := s.Seal(tb.Context(), stream, o); err != nil {
		tb.Fatalf("Seal(%+v): %v", o, err)
	}
}

func sealAny(tb testing.TB, s logstream.Store, stream string, epoch int64) {
	tb.Helper()
	seal(tb, s, stream, logstream.SealOptions{Epoch: epoch, Size: -1})
}

func wantErr(tb testing.TB, what string, err, target error) {
	tb.Helper()
	if !errors.Is(err, target) {
		tb.Fatalf("%s: error %v, want one that wraps %v", what, err, target)
	}
}

func wantOffset(tb testing.TB, what string, err error, want, got int64) {
	tb.Helper()
	var oe *logstream.OffsetError
	if !errors.As(err, &oe) || oe.Want != want || oe.Got != got {
		tb.Fatalf("%s: error %v, want *OffsetError{Want: %d, Got: %d}", what, err, want, got)
	}
}

func wantStat(tb testing.TB, s logstream.Store, want logstream.Info) {
	tb.Helper()
	got, err := s.Stat(tb.Context(), want.Stream)
	if err != nil {
		tb.Fatalf("Stat(%s): %v", want.Stream, err)
	}
	if got.Stream != want.Stream || got.Size != want.Size || got.Epoch != want.Epoch || got.Sealed != want.Sealed || !bytes.Equal(got.SHA256, want.SHA256) {
		tb.Fatalf("Stat gave %+v, want %+v", got, want)
	}
}

// read tails until enough bytes came (or, with n < 0, until the end), checking
// every chunk against the one before. It returns bytes and marks as a reader
// would piece them together, and the tail's error.
func read(ctx context.Context, s logstream.Store, stream string, from int64, n int) (data []byte, marks []logstream.Mark, err error) {
	if n == 0 {
		return nil, nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for c, err := range s.Tail(ctx, stream, from) {
		if err != nil {
			return data, marks, err
		}
		if c.Offset != from+int64(len(data)) || len(c.Data) == 0 {
			return data, marks, fmt.Errorf("chunk of %d bytes at %d, want it at %d", len(c.Data), c.Offset, from+int64(len(data)))
		}
		end := c.Offset + int64(len(c.Data))
		for i, m := range c.Marks {
			if m.Offset >= end || i > 0 && (m.Offset <= c.Marks[i-1].Offset || m.Offset <= c.Offset) {
				return data, marks, fmt.Errorf("marks %v for the bytes from %d to %d", c.Marks, c.Offset, end)
			}
			if len(marks) == 0 || m.Offset > marks[len(marks)-1].Offset {
				marks = append(marks, m)
			}
		}
		if len(marks) > 0 && len(c.Marks) == 0 {
			return data, marks, fmt.Errorf("the chunk at %d does not carry the mark in force", c.Offset)
		}
		if data = append(data, c.Data...); n > 0 && len(data) >= n {
			break
		}
	}
	return data, marks, nil
}

// wantBytes checks what a follower gets from an offset on; of a stream that is
// not sealed that is what there is.
func wantBytes(tb testing.TB, s logstream.Store, stream string, from int64, want string, sealed bool) {
	tb.Helper()
	n := len(want)
	if sealed {
		n = -1
	}
	got, _, err := read(tb.Context(), s, stream, from, n)
	if err != nil {
		tb.Fatalf("Tail(%s, %d) after %d bytes: %v", stream, from, len(got), err)
	}
	if string(got) != want {
		tb.Fatalf("Tail(%s, %d) gave %s, want %s", stream, from, brief(got), brief([]byte(want)))
	}
}

func wantMarks(tb testing.TB, s logstream.Store, stream string, from int64, n int, want ...logstream.Mark) {
	tb.Helper()
	_, got, err := read(tb.Context(), s, stream, from, n)
	if err != nil {
		tb.Fatalf("Tail(%s, %d): %v", stream, from, err)
	}
	ok := len(got) == len(want)
	for i := 0; ok && i < len(got); i++ {
		ok = got[i].Offset == want[i].Offset && got[i].Time.Equal(want[i].Time) && got[i].Step == want[i].Step && got[i].FD == want[i].FD
	}
	if !ok {
		tb.Fatalf("Tail(%s, %d) gave the marks\n%v, want\n%v", stream, from, got, want)
	}
}

func brief(p []byte) string {
	if len(p) > 60 {
		return fmt.Sprintf("%q… (%d bytes)", p[:60], len(p))
	}
	return fmt.Sprintf("%q", p)
}

// follower reads in the background.
type follower struct {
	chunks chan logstream.Chunk // what came
	err    chan error           // one, at the end
	cancel context.CancelFunc
}

func follow(tb testing.TB, s logstream.Store, stream string, from int64) *follower {
	ctx, cancel := context.WithCancel(tb.Context())
	f := &follower{make(chan logstream.Chunk), make(chan error, 1), cancel}
	begun, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		close(begun)
		var end error
		for c, err := range s.Tail(ctx, stream, from) {
			if end = err; err != nil {
				break
			}
			select {
			case f.chunks <- c:
			case <-ctx.Done():
			}
		}
		f.err <- end
	}()
	tb.Cleanup(func() {
		cancel()
		select {
		case <-done:
		case <-time.After(patience):
			tb.Errorf("Tail goes on after the end of its context")
		}
	})
	<-begun // what follows is to happen while it follows, mostly
	return f
}

// want waits for exactly these bytes.
func (f *follower) want(tb testing.TB, text string) {
	tb.Helper()
	var got []byte
	for len(got) < len(text) {
		select {
		case c := <-f.chunks:
			got = append(got, c.Data...)
		case err := <-f.err:
			tb.Fatalf("the follower ended after %s, error %v; want %s", brief(got), err, brief([]byte(text)))
		case <-time.After(patience):
			tb.Fatalf("the follower waits after %s, want %s", brief(got), brief([]byte(text)))
		}
	}
	if string(got) != text {
		tb.Fatalf("the follower got %s, want %s", brief(got), brief([]byte(text)))
	}
}

// end waits for the end, which must come without more bytes.
func (f *follower) end(tb testing.TB) error {
	tb.Helper()
	select {
	case err := <-f.err:
		return err
	case c := <-f.chunks:
		tb.Fatalf("the follower got %s, want the end", brief(c.Data))
	case <-time.After(patience):
		tb.Fatalf("the follower does not end")
	}
	return nil
}
