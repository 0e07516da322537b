package logstreamtest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

func checkTailPush(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "s", 1, 0, "one")
	f := follow(tb, s, "s", 0)
	f.want(tb, "one")
	off := int64(3)
	for i, p := range []string{"two", "three", "four"} {
		add(tb, s, "s", int64(i+1), off, p)
		f.want(tb, p)
		off += int64(len(p))
	}
	sealAny(tb, s, "s", 3)
	if err := f.end(tb); err != nil {
		tb.Fatalf("after the seal the follower ended with %v", err)
	}
}

func checkTailBeforeCreation(tb testing.TB, h Harness) {
	s := open(tb, h)
	for i := range 10 { // no follower says when it has found nothing
		name, empty := fmt.Sprintf("s%d", i), fmt.Sprintf("sealed%d", i)
		f, sealed := follow(tb, s, name, 0), follow(tb, s, empty, 0)
		later := follow(tb, s, name, 5)
		add(tb, s, name, 1, 0, "hello world")
		f.want(tb, "hello world")
		later.want(tb, " world")
		sealAny(tb, s, empty, 1)
		if err := sealed.end(tb); err != nil {
			tb.Fatalf("a follower of a stream that was sealed empty ended with %v", err)
		}
	}
}

func checkTailFrom(tb testing.TB, h Harness) {
	s := open(tb, h)
	const text = "the quick brown fox"
	add(tb, s, "s", 1, 0, text[:9])
	add(tb, s, "s", 1, 9, text[9:])
	for _, sealed := range []bool{false, true} {
		for from := range len(text) {
			wantBytes(tb, s, "s", int64(from), text[from:], sealed)
		}
		sealAny(tb, s, "s", 1)
	}
}

func checkTailBeyondEnd(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "s", 1, 0, "hello")
	f, beyond := follow(tb, s, "s", 7), follow(tb, s, "s", 20)
	add(tb, s, "s", 1, 5, " world")
	f.want(tb, "orld")
	sealAny(tb, s, "s", 1)
	wantOffset(tb, "Tail from 20 when the stream is sealed at 11", beyond.end(tb), 11, 20)
	_, _, err := read(tb.Context(), s, "s", 12, -1)
	wantOffset(tb, "Tail from 12 of a sealed stream of 11", err, 11, 12)
}

func checkTailMany(tb testing.TB, h Harness) {
	s := open(tb, h)
	var all []*follower
	for range 20 {
		all = append(all, follow(tb, s, "s", 0))
	}
	for i := range 10 {
		p := fmt.Sprintf("line %d\n", i)
		add(tb, s, "s", 1, int64(7*i), p)
		for _, f := range all {
			f.want(tb, p)
		}
	}
	sealAny(tb, s, "s", 1)
	for _, f := range all {
		if err := f.end(tb); err != nil {
			tb.Fatalf("a follower ended with %v", err)
		}
	}
}

func checkTailSlow(tb testing.TB, h Harness) {
	s := open(tb, h)
	slow := follow(tb, s, "s", 0)
	var text strings.Builder
	for i := range 50 {
		p := strings.Repeat(string(rune('a'+i%26)), 20_000)
		add(tb, s, "s", 1, int64(text.Len()), p) // nobody takes the first chunk meanwhile
		text.WriteString(p)
	}
	sealAny(tb, s, "s", 1)
	slow.want(tb, text.String())
	if err := slow.end(tb); err != nil {
		tb.Fatalf("the slow follower ended with %v", err)
	}
}

func checkTailBreak(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "s", 1, 0, "hello")
	for range 3 {
		for c, err := range s.Tail(tb.Context(), "s", 0) {
			if err != nil || c.Offset != 0 {
				tb.Fatalf("chunk at %d, error %v", c.Offset, err)
			}
			break
		}
	}
	add(tb, s, "s", 1, 5, " world")
	wantBytes(tb, s, "s", 0, "hello world", false)
}

func checkTailCancel(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "s", 1, 0, "hello")
	f, absent := follow(tb, s, "s", 0), follow(tb, s, "absent", 0)
	f.want(tb, "hello")
	f.cancel()
	absent.cancel()
	wantErr(tb, "Tail whose context was cancelled", f.end(tb), context.Canceled)
	wantErr(tb, "Tail of an absent stream whose context was cancelled", absent.end(tb), context.Canceled)
}

func checkDelete(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "s", 5, 0, "hello", mark(0, 1))
	add(tb, s, "s/t", 1, 0, "other")
	add(tb, s, "sealed", 5, 0, "hello")
	sealAny(tb, s, "sealed", 5)
	for range 2 {
		for _, name := range []string{"s", "sealed", "never"} {
			if err := s.Delete(tb.Context(), name); err != nil {
				tb.Fatalf("Delete(%s): %v", name, err)
			}
			_, err := s.Stat(tb.Context(), name)
			wantErr(tb, "Stat of a deleted stream", err, logstream.ErrNotFound)
		}
	}
	wantBytes(tb, s, "s/t", 0, "other", false)
	add(tb, s, "s", 1, 0, "new") // all is forgotten, the epoch too
	add(tb, s, "sealed", 1, 0, "new")
	wantStat(tb, s, logstream.Info{Stream: "s", Size: 3, Epoch: 1})
	wantBytes(tb, s, "s", 0, "new", false)
	wantMarks(tb, s, "s", 0, 3)
}

func checkDeleteEndsFollowers(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "s", 1, 0, "hello")
	f := follow(tb, s, "s", 0)
	f.want(tb, "hello")
	if err := s.Delete(tb.Context(), "s"); err != nil {
		tb.Fatalf("Delete: %v", err)
	}
	wantErr(tb, "the follower of a deleted stream", f.end(tb), logstream.ErrNotFound)
}

func checkConcurrentStreams(tb testing.TB, h Harness) {
	s := open(tb, h)
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			name := fmt.Sprintf("dir%d/s%d", i%3, i)
			text := ""
			for n := range 20 {
				p := fmt.Sprintf("%d:%d\n", i, n)
				if err := try(tb, s, name, 1, int64(len(text)), p, mark(int64(len(text)), n)); err != nil {
					tb.Errorf("Append to %s: %v", name, err)
					return
				}
				text += p
			}
			if err := s.Seal(tb.Context(), name, logstream.SealOptions{Epoch: 1, Size: int64(len(text)), SHA256: sum(text)}); err != nil {
				tb.Errorf("Seal of %s: %v", name, err)
			}
			if got, marks, err := read(tb.Context(), s, name, 0, -1); string(got) != text || len(marks) != 20 || err != nil {
				tb.Errorf("Tail of %s gave %s and %d marks, error %v", name, brief(got), len(marks), err)
			}
		})
	}
	wg.Wait()
}

func checkConcurrentSameBytes(tb testing.TB, h Harness) {
	s := open(tb, h)
	const text = "the same bytes, sent again and again by writers that lost an answer"
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for off := 0; off < len(text); {
				n := min(len(text)-off, 5+i)
				switch err := try(tb, s, "s", 1, int64(off), text[off:off+n]); {
				case err == nil:
					off += n
				default:
					tb.Errorf("Append at %d: %v", off, err)
					return
				}
			}
		})
	}
	wg.Wait()
	seal(tb, s, "s", logstream.SealOptions{Epoch: 1, Size: int64(len(text)), SHA256: sum(text)})
	wantBytes(tb, s, "s", 0, text, true)
}

func checkContext(tb testing.TB, h Harness) {
	s := open(tb, h)
	add(tb, s, "s", 1, 0, "hello")
	ctx, cancel := context.WithCancel(tb.Context())
	cancel()
	_, err := s.Append(ctx, "s", logstream.AppendOptions{Epoch: 1}, 5, []byte("x"))
	wantErr(tb, "Append with an ended context", err, context.Canceled)
	wantErr(tb, "Seal with an ended context", s.Seal(ctx, "s", logstream.SealOptions{Epoch: 1, Size: 5}), context.Canceled)
	_, err = s.Stat(ctx, "s")
	wantErr(tb, "Stat with an ended context", err, context.Canceled)
	wantErr(tb, "Delete with an ended context", s.Delete(ctx, "s"), context.Canceled)
	_, _, err = read(ctx, s, "s", 0, -1)
	wantErr(tb, "Tail with an ended context", err, context.Canceled)
	wantStat(tb, s, logstream.Info{Stream: "s", Size: 5, Epoch: 1})
}

func checkClose(tb testing.TB, h Harness) {
	s := h.Open(tb)
	add(tb, s, "s", 1, 0, "hello")
	f, absent := follow(tb, s, "s", 0), follow(tb, s, "absent", 0)
	f.want(tb, "hello")
	if err := s.Close(); err != nil {
		tb.Fatalf("Close: %v", err)
	}
	wantErr(tb, "the follower", f.end(tb), logstream.ErrClosed)
	wantErr(tb, "the follower of an absent stream", absent.end(tb), logstream.ErrClosed)
	wantErr(tb, "Append after Close", try(tb, s, "s", 1, 5, "x"), logstream.ErrClosed)
	wantErr(tb, "Seal after Close", s.Seal(tb.Context(), "s", logstream.SealOptions{Epoch: 1, Size: 5}), logstream.ErrClosed)
	_, err := s.Stat(tb.Context(), "s")
	wantErr(tb, "Stat after Close", err, logstream.ErrClosed)
	wantErr(tb, "Delete after Close", s.Delete(tb.Context(), "s"), logstream.ErrClosed)
	_, _, err = read(tb.Context(), s, "s", 0, -1)
	wantErr(tb, "Tail after Close", err, logstream.ErrClosed)
	if err := s.Close(); err != nil && !errors.Is(err, logstream.ErrClosed) {
		tb.Fatalf("second Close: %v", err)
	}
}

func checkReopen(tb testing.TB, h Harness) {
	if h.Reopen == nil {
		return
	}
	s := open(tb, h)
	add(tb, s, "open", 4, 0, "hello", mark(0, 1), mark(3, 2))
	add(tb, s, "sealed", 2, 0, "hello", mark(1, 1))
	sealAny(tb, s, "sealed", 3)
	add(tb, s, "empty", 6, 0, "")
	add(tb, s, "deleted", 1, 0, "hello")
	if err := s.Delete(tb.Context(), "deleted"); err != nil {
		tb.Fatalf("Delete: %v", err)
	}
	add(tb, s, "again", 9, 0, "a longer stream than its successor")
	if err := s.Delete(tb.Context(), "again"); err != nil {
		tb.Fatalf("Delete: %v", err)
	}
	add(tb, s, "again", 1, 0, "short")
	for range 2 {
		s = h.Reopen(tb, s)
		tb.Cleanup(func() { s.Close() })
		wantStat(tb, s, logstream.Info{Stream: "open", Size: 5, Epoch: 4})
		wantBytes(tb, s, "open", 0, "hello", false)
		wantMarks(tb, s, "open", 0, 5, mark(0, 1), mark(3, 2))
		wantErr(tb, "Append of an older epoch", try(tb, s, "open", 3, 5, "x"), logstream.ErrFenced)
		wantErr(tb, "Append of other bytes", try(tb, s, "open", 4, 0, "x"), logstream.ErrConflict)
		wantOffset(tb, "Append with a gap", try(tb, s, "open", 4, 6, "x"), 5, 6)
		wantStat(tb, s, logstream.Info{Stream: "sealed", Size: 5, Epoch: 3, Sealed: true, SHA256: sum("hello")})
		wantBytes(tb, s, "sealed", 0, "hello", true)
		wantMarks(tb, s, "sealed", 0, -1, mark(1, 1))
		wantStat(tb, s, logstream.Info{Stream: "empty", Epoch: 6})
		wantStat(tb, s, logstream.Info{Stream: "again", Size: 5, Epoch: 1})
		wantBytes(tb, s, "again", 0, "short", false)
		_, err := s.Stat(tb.Context(), "deleted")
		wantErr(tb, "Stat of a deleted stream", err, logstream.ErrNotFound)
	}
	add(tb, s, "open", 4, 5, " world")
	seal(tb, s, "open", logstream.SealOptions{Epoch: 4, Size: 11, SHA256: sum("hello world")})
}

func checkTailAcrossReopen(tb testing.TB, h Harness) {
	if h.Reopen == nil {
		return
	}
	s := open(tb, h)
	add(tb, s, "s", 1, 0, "hello")
	f := follow(tb, s, "s", 0)
	f.want(tb, "hello")
	s = h.Reopen(tb, s)
	tb.Cleanup(func() { s.Close() })
	wantErr(tb, "the follower of the closed store", f.end(tb), logstream.ErrClosed)
	f = follow(tb, s, "s", 5)
	add(tb, s, "s", 1, 5, " world")
	f.want(tb, " world")
	sealAny(tb, s, "s", 1)
	if err := f.end(tb); err != nil {
		tb.Fatalf("the follower ended with %v", err)
	}
}

func checkSecondHandle(tb testing.TB, h Harness) {
	if h.Second == nil {
		return
	}
	s := open(tb, h)
	other := h.Second(tb, s)
	tb.Cleanup(func() { other.Close() })
	f := follow(tb, other, "s", 0)
	add(tb, s, "s", 1, 0, "hello", mark(0, 1))
	f.want(tb, "hello")
	wantStat(tb, other, logstream.Info{Stream: "s", Size: 5, Epoch: 1})
	wantMarks(tb, other, "s", 0, 5, mark(0, 1))
	add(tb, s, "s", 1, 5, " world")
	f.want(tb, " world")
	sealAny(tb, s, "s", 1)
	if err := f.end(tb); err != nil {
		tb.Fatalf("the follower ended with %v", err)
	}
	wantBytes(tb, other, "s", 0, "hello world", true)

	add(tb, s, "d", 1, 0, "x")
	f = follow(tb, other, "d", 0)
	f.want(tb, "x")
	if err := s.Delete(tb.Context(), "d"); err != nil {
		tb.Fatalf("Delete: %v", err)
	}
	wantErr(tb, "the follower of a deleted stream", f.end(tb), logstream.ErrNotFound)
}

func checkTakeOver(tb testing.TB, h Harness) {
	if h.Second == nil {
		return
	}
	s := open(tb, h)
	other := h.Second(tb, s)
	tb.Cleanup(func() { other.Close() })
	f := follow(tb, s, "s", 0) // stays with the old owner
	add(tb, s, "s", 1, 0, "one")
	f.want(tb, "one")
	add(tb, other, "s", 2, 0, "")
	wantErr(tb, "Append by the old owner", try(tb, s, "s", 1, 3, "two"), logstream.ErrFenced)
	wantErr(tb, "Seal by the old owner", s.Seal(tb.Context(), "s", logstream.SealOptions{Epoch: 1, Size: -1}), logstream.ErrFenced)
	add(tb, other, "s", 2, 0, "onetwo")
	wantErr(tb, "repeated Append by the old owner", try(tb, s, "s", 1, 0, "one"), logstream.ErrFenced)
	wantErr(tb, "Append of other bytes", try(tb, s, "s", 3, 3, "xxx"), logstream.ErrConflict)
	add(tb, s, "s", 3, 3, "twothree") // and back
	wantErr(tb, "Append by the owner in between", try(tb, other, "s", 2, 11, "lost"), logstream.ErrFenced)
	seal(tb, s, "s", logstream.SealOptions{Epoch: 3, Size: 11, SHA256: sum("onetwothree")})
	for _, handle := range []logstream.Store{s, other} {
		wantBytes(tb, handle, "s", 0, "onetwothree", true)
	}
	// What the old owner passed on before it was refused is what the new one
	// stored.
	f.wantRest(tb, "twothree")
}

// wantRest waits for the end and what comes before it.
func (f *follower) wantRest(tb testing.TB, text string) {
	tb.Helper()
	var got []byte
	for {
		select {
		case c := <-f.chunks:
			got = append(got, c.Data...)
			continue
		case err := <-f.err:
			if err != nil || string(got) != text {
				tb.Fatalf("the follower got %s, error %v; want %s", brief(got), err, brief([]byte(text)))
			}
			return
		case <-time.After(patience):
			tb.Fatalf("the follower does not end")
		}
	}
}
