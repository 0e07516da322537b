package blobstoretest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/blobstore"
)

// hostile keys are all valid; a driver must keep every one apart.
var hostile = []string{
	"a", "a/b", "a/b/c", "a-b", "a.b", "a0", "a b", "a!", "A", "A/b", "aB", "Ab",
	"%", "%2f", "%61", "a%2fb", "~", "~~", "a~", "a~~", "a~/b", "a~~/b", ".a", "..a", "a..", "...",
	"+", "é", "e\u0301", "日本語/ログ", "\U0010ffff", "con", "nul.txt", "a:b", `"*?<>|`, "-rf", "$HOME", "`x`", " lead", "trail ",
	"%tmp", "tmp", ".tmp", "index.html", "a&b=c;d", "#", "'",
	strings.Repeat("x", 200), strings.Repeat("x", 199), strings.Repeat("X", 200), strings.Repeat("X", 200) + "/a", strings.Repeat("x", 120), strings.Repeat("x", 120) + "!", strings.Repeat("x", 120) + "/a", strings.Repeat("x", 120) + "a",
	strings.Repeat("X", 40), strings.Repeat("X", 40) + "-", strings.Repeat("X", 40) + "/k", strings.Repeat("X", 40) + "0",
	strings.Repeat("d/", 40) + "f", strings.Repeat("é", 100) + "/" + strings.Repeat("Ü", 100),
}

func checkNotFound(tb testing.TB, h Harness) {
	s := open(tb, h)
	put(tb, s, "dir/k", "x")
	for _, key := range []string{"k", "dir", "dir/k/x", "dir/kk", "dir/K"} {
		_, err := s.Stat(tb.Context(), key)
		wantErr(tb, "Stat("+key+")", err, blobstore.ErrNotFound)
		_, _, err = get(tb.Context(), s, key, blobstore.GetOptions{})
		wantErr(tb, "Get("+key+")", err, blobstore.ErrNotFound)
	}
}

func checkDelete(tb testing.TB, h Harness) {
	s := open(tb, h)
	for _, key := range []string{"d/a", "d/b", "d", "d/a/c"} {
		put(tb, s, key, key)
	}
	for range 2 { // the second time they are absent
		for _, key := range []string{"d/a", "d"} {
			if err := s.Delete(tb.Context(), key, blobstore.DeleteOptions{}); err != nil {
				tb.Fatalf("Delete(%q): %v", key, err)
			}
			_, err := s.Stat(tb.Context(), key)
			wantErr(tb, "Stat of a deleted object", err, blobstore.ErrNotFound)
		}
		want(tb, s, "d/b", "d/b")
		want(tb, s, "d/a/c", "d/a/c")
	}
	put(tb, s, "d/a", "again")
	want(tb, s, "d/a", "again")
	if err := s.Delete(tb.Context(), "never/was", blobstore.DeleteOptions{}); err != nil {
		tb.Fatalf("Delete of an absent object: %v", err)
	}
	for _, key := range []string{"d/a", "d/b", "d/a/c"} {
		if err := s.Delete(tb.Context(), key, blobstore.DeleteOptions{}); err != nil {
			tb.Fatalf("Delete(%q): %v", key, err)
		}
	}
	nothingLeft(tb, h, s)
}

func checkInvalid(tb testing.TB, h Harness) {
	s := open(tb, h)
	for _, key := range []string{
		"", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", "a\x00b", "a\nb", `a\b`, "a\xff", "\x7f",
		strings.Repeat("x", 201), strings.Repeat("x/", 300) + "x",
	} {
		_, err := s.Put(tb.Context(), key, strings.NewReader("x"), blobstore.PutOptions{})
		wantErr(tb, fmt.Sprintf("Put(%q)", key), err, blobstore.ErrInvalid)
		_, _, err = s.Get(tb.Context(), key, blobstore.GetOptions{})
		wantErr(tb, fmt.Sprintf("Get(%q)", key), err, blobstore.ErrInvalid)
		_, err = s.Stat(tb.Context(), key)
		wantErr(tb, fmt.Sprintf("Stat(%q)", key), err, blobstore.ErrInvalid)
		wantErr(tb, fmt.Sprintf("Delete(%q)", key), s.Delete(tb.Context(), key, blobstore.DeleteOptions{}), blobstore.ErrInvalid)
	}
	for _, o := range []blobstore.PutOptions{
		{Size: -1},
		{SHA256: []byte("short")},
		{ContentType: "a\r\nX-Injected: b"},
		{ContentType: strings.Repeat("x", blobstore.MaxContentTypeBytes+1)},
	} {
		_, err := s.Put(tb.Context(), "k", strings.NewReader("x"), o)
		wantErr(tb, fmt.Sprintf("Put with %+v", o), err, blobstore.ErrInvalid)
	}
	nothingLeft(tb, h, s)
}

func checkKeys(tb testing.TB, h Harness) {
	s := open(tb, h)
	for _, key := range hostile {
		if err := blobstore.ValidateKey(key); err != nil {
			tb.Fatalf("the suite's own key: %v", err)
		}
		put(tb, s, key, "content of "+key)
	}
	for _, key := range hostile {
		want(tb, s, key, "content of "+key)
	}
	for i, key := range hostile {
		if err := s.Delete(tb.Context(), key, blobstore.DeleteOptions{}); err != nil {
			tb.Fatalf("Delete(%q): %v", key, err)
		}
		if i+1 < len(hostile) {
			want(tb, s, hostile[i+1], "content of "+hostile[i+1])
		}
	}
	nothingLeft(tb, h, s)
}

func fillHostile(tb testing.TB, s blobstore.Store) (sorted []string) {
	tb.Helper()
	for _, key := range hostile {
		put(tb, s, key, key)
	}
	sorted = slices.Clone(hostile)
	slices.Sort(sorted)
	return sorted
}

func checkListOrder(tb testing.TB, h Harness) {
	s := open(tb, h)
	keys := fillHostile(tb, s)
	if got := list(tb, s, blobstore.ListOptions{}); !slices.Equal(got, keys) {
		tb.Fatalf("List gave\n%q, want\n%q", got, keys)
	}
	for info, err := range s.List(tb.Context(), blobstore.ListOptions{}) {
		if err != nil {
			tb.Fatalf("List: %v", err)
		}
		if info.Size != int64(len(info.Key)) || info.ModTime.IsZero() {
			tb.Fatalf("List describes %q by size %d, time %v", info.Key, info.Size, info.ModTime)
		}
	}
}

func checkListPrefix(tb testing.TB, h Harness) {
	s := open(tb, h)
	keys := fillHostile(tb, s)
	long := strings.Repeat("x", 120)
	for _, prefix := range []string{"a", "a/", "a/b", "A", "%", "~", "zz", strings.Repeat("X", 39), strings.Repeat("X", 41), long, long + "/", strings.Repeat("x", 130), "日", "日本", "\xe6", "d/d/d/"} {
		var exp []string
		for _, k := range keys {
			if strings.HasPrefix(k, prefix) {
				exp = append(exp, k)
			}
		}
		if got := list(tb, s, blobstore.ListOptions{Prefix: prefix}); !slices.Equal(got, exp) {
			tb.Fatalf("List with prefix %q gave\n%q, want\n%q", prefix, got, exp)
		}
	}
}

func checkListResume(tb testing.TB, h Harness) {
	s := open(tb, h)
	keys := fillHostile(tb, s)
	for i, after := range keys {
		if got := list(tb, s, blobstore.ListOptions{After: after}); !slices.Equal(got, keys[i+1:]) {
			tb.Fatalf("List after %q gave\n%q, want\n%q", after, got, keys[i+1:])
		}
	}
	for _, after := range []string{"a/", "a/a", "a0/", "a~~/", "zzz", "\xff", strings.Repeat("x", 121)} {
		i, _ := slices.BinarySearch(keys, after)
		if got := list(tb, s, blobstore.ListOptions{After: after}); !slices.Equal(got, keys[i:]) {
			tb.Fatalf("List after %q (no key) gave\n%q, want\n%q", after, got, keys[i:])
		}
	}
	if got := list(tb, s, blobstore.ListOptions{Prefix: "a/", After: "a/b"}); !slices.Equal(got, []string{"a/b/c"}) {
		tb.Fatalf(`List with prefix "a/" after "a/b" gave %q`, got)
	}
}

func checkListBreak(tb testing.TB, h Harness) {
	s := open(tb, h)
	keys := fillHostile(tb, s)
	var got []string
	for info, err := range s.List(tb.Context(), blobstore.ListOptions{}) {
		if err != nil {
			tb.Fatalf("List: %v", err)
		}
		if got = append(got, info.Key); len(got) == 5 {
			break
		}
	}
	if !slices.Equal(got, keys[:5]) {
		tb.Fatalf("the first five of List are %q, want %q", got, keys[:5])
	}
}

func checkListWhileDeleting(tb testing.TB, h Harness) {
	s := open(tb, h)
	for i := range 40 {
		put(tb, s, fmt.Sprintf("d%02d/k", i), "x")
	}
	n := 0
	for info, err := range s.List(tb.Context(), blobstore.ListOptions{}) {
		if err != nil {
			tb.Fatalf("List while objects are deleted: %v", err)
		}
		n++
		if err := s.Delete(tb.Context(), info.Key, blobstore.DeleteOptions{}); err != nil {
			tb.Fatalf("Delete: %v", err)
		}
		if n == 1 { // ahead of the listing
			for i := 20; i < 40; i++ {
				if err := s.Delete(tb.Context(), fmt.Sprintf("d%02d/k", i), blobstore.DeleteOptions{}); err != nil {
					tb.Fatalf("Delete: %v", err)
				}
			}
		}
	}
	if n < 20 {
		tb.Fatalf("List saw %d objects, at least 20 were there throughout", n)
	}
	nothingLeft(tb, h, s)
}

func checkDeletePutRace(tb testing.TB, h Harness) {
	s := open(tb, h)
	stores := []blobstore.Store{s, s}
	if h.Second != nil {
		stores[1] = h.Second(tb, s)
		tb.Cleanup(func() { stores[1].Close() })
	}
	race(4, func(i int) {
		key := fmt.Sprintf("shared/dir/%d", i)
		for range 15 {
			s := stores[i%2]
			_, err := s.Put(tb.Context(), key, strings.NewReader(key), blobstore.PutOptions{IfAbsent: i < 2})
			if err != nil {
				tb.Errorf("Put beside Deletes in the same place: %v", err)
				return
			}
			if got, _, err := get(tb.Context(), s, key, blobstore.GetOptions{}); err != nil || got != key {
				tb.Errorf("Get gave %q, error %v", got, err)
			}
			if err := s.Delete(tb.Context(), key, blobstore.DeleteOptions{}); err != nil {
				tb.Errorf("Delete: %v", err)
			}
		}
	})
	nothingLeft(tb, h, s)
}

func checkContext(tb testing.TB, h Harness) {
	s := open(tb, h)
	put(tb, s, "k", "x")
	ctx, cancel := context.WithCancel(tb.Context())
	cancel()
	_, err := s.Put(ctx, "new", strings.NewReader("x"), blobstore.PutOptions{})
	wantErr(tb, "Put with an ended context", err, context.Canceled)
	_, _, err = get(ctx, s, "k", blobstore.GetOptions{})
	wantErr(tb, "Get with an ended context", err, context.Canceled)
	_, err = s.Stat(ctx, "k")
	wantErr(tb, "Stat with an ended context", err, context.Canceled)
	wantErr(tb, "Delete with an ended context", s.Delete(ctx, "k", blobstore.DeleteOptions{}), context.Canceled)
	err = nil
	for _, err = range s.List(ctx, blobstore.ListOptions{}) {
	}
	wantErr(tb, "List with an ended context", err, context.Canceled)
	want(tb, s, "k", "x")
	nothingLeft(tb, h, s, "k")
}

func checkContextEndsReader(tb testing.TB, h Harness) {
	s := open(tb, h)
	put(tb, s, "k", strings.Repeat("x", 8<<20))
	ctx, cancel := context.WithCancel(tb.Context())
	defer cancel()
	r, _, err := s.Get(ctx, "k", blobstore.GetOptions{})
	if err != nil {
		tb.Fatalf("Get: %v", err)
	}
	defer r.Close()
	if _, err := io.ReadFull(r, make([]byte, 10)); err != nil {
		tb.Fatalf("Read: %v", err)
	}
	cancel()
	_, err = io.Copy(io.Discard, r)
	wantErr(tb, "reading after the context of Get ended", err, context.Canceled)
}

func checkClosed(tb testing.TB, h Harness) {
	s := h.Open(tb)
	put(tb, s, "k", "x")
	if err := s.Close(); err != nil {
		tb.Fatalf("Close: %v", err)
	}
	_, err := s.Put(tb.Context(), "k", strings.NewReader("x"), blobstore.PutOptions{})
	wantErr(tb, "Put after Close", err, blobstore.ErrClosed)
	_, _, err = get(tb.Context(), s, "k", blobstore.GetOptions{})
	wantErr(tb, "Get after Close", err, blobstore.ErrClosed)
	_, err = s.Stat(tb.Context(), "k")
	wantErr(tb, "Stat after Close", err, blobstore.ErrClosed)
	wantErr(tb, "Delete after Close", s.Delete(tb.Context(), "k", blobstore.DeleteOptions{}), blobstore.ErrClosed)
	err = nil
	for _, err = range s.List(tb.Context(), blobstore.ListOptions{}) {
	}
	wantErr(tb, "List after Close", err, blobstore.ErrClosed)
	if err := s.Close(); err != nil && !errors.Is(err, blobstore.ErrClosed) {
		tb.Fatalf("second Close: %v", err)
	}
}

func checkReopen(tb testing.TB, h Harness) {
	s := open(tb, h)
	if h.Reopen == nil {
		if s.Capabilities().Durable {
			tb.Fatalf("the store says that it is durable; its Harness needs Reopen")
		}
		return
	}
	keys := fillHostile(tb, s)
	s = h.Reopen(tb, s)
	tb.Cleanup(func() { s.Close() })
	if got := list(tb, s, blobstore.ListOptions{}); !slices.Equal(got, keys) {
		tb.Fatalf("after reopening List gives\n%q, want\n%q", got, keys)
	}
	for _, key := range keys {
		want(tb, s, key, key)
	}
	nothingLeft(tb, h, s, keys...)
}

func checkSecondHandle(tb testing.TB, h Harness) {
	s := open(tb, h)
	if h.Second == nil {
		if s.Capabilities().MultiWriter {
			tb.Fatalf("the store says that several processes may share it; its Harness needs Second")
		}
		return
	}
	other := h.Second(tb, s)
	tb.Cleanup(func() { other.Close() })
	put(tb, s, "dir/k", "one")
	want(tb, other, "dir/k", "one")
	put(tb, other, "dir/k", "two")
	want(tb, s, "dir/k", "two")
	if s.Capabilities().MultiWriter {
		_, err := other.Put(tb.Context(), "dir/k", strings.NewReader("three"), blobstore.PutOptions{IfAbsent: true})
		wantErr(tb, "Put with IfAbsent through a second handle", err, blobstore.ErrExists)
	}
	if err := other.Delete(tb.Context(), "dir/k", blobstore.DeleteOptions{}); err != nil {
		tb.Fatalf("Delete: %v", err)
	}
	_, err := s.Stat(tb.Context(), "dir/k")
	wantErr(tb, "Stat of what the other handle deleted", err, blobstore.ErrNotFound)
	put(tb, s, "dir/k", "again") // the directory went meanwhile
	want(tb, other, "dir/k", "again")
}
