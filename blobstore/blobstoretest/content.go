package blobstoretest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/solstice-ci/solstice-go/blobstore"
)

func checkRoundTrip(tb testing.TB, h Harness) {
	s := open(tb, h)
	for _, content := range []string{"", "x", strings.Repeat("0123456789", 100_000)} {
		key := fmt.Sprintf("runs/%d/log", len(content))
		before := time.Now().Add(-time.Hour)
		info, err := s.Put(tb.Context(), key, iotest.HalfReader(strings.NewReader(content)), blobstore.PutOptions{ContentType: "text/plain; charset=utf-8"})
		if err != nil {
			tb.Fatalf("Put: %v", err)
		}
		stat, err := s.Stat(tb.Context(), key)
		if err != nil {
			tb.Fatalf("Stat: %v", err)
		}
		_, got, err := get(tb.Context(), s, key, blobstore.GetOptions{})
		if err != nil {
			tb.Fatalf("Get: %v", err)
		}
		for what, info := range map[string]blobstore.Info{"Put": info, "Stat": stat, "Get": got} {
			if info.Key != key || info.Size != int64(len(content)) {
				tb.Errorf("%s describes %q of %d bytes, want %q of %d", what, info.Key, info.Size, key, len(content))
			}
			if info.ModTime.Before(before) {
				tb.Errorf("%s: ModTime is %v", what, info.ModTime)
			}
			if s.Capabilities().ContentType && info.ContentType != "text/plain; charset=utf-8" {
				tb.Errorf("%s: content type %q", what, info.ContentType)
			}
		}
		want(tb, s, key, content)
	}
}

func checkOverwrite(tb testing.TB, h Harness) {
	s := open(tb, h)
	put(tb, s, "k", "first, and longer")
	put(tb, s, "k", "second")
	want(tb, s, "k", "second")
	if s.Capabilities().ContentType {
		if info, err := s.Stat(tb.Context(), "k"); err != nil || info.ContentType != "" {
			tb.Fatalf("Stat: content type %q, error %v", info.ContentType, err)
		}
	}
	nothingLeft(tb, h, s, "k")
}

func checkIfAbsent(tb testing.TB, h Harness) {
	s := open(tb, h)
	o := blobstore.PutOptions{IfAbsent: true}
	if _, err := s.Put(tb.Context(), "a/k", strings.NewReader("first"), o); err != nil {
		tb.Fatalf("Put: %v", err)
	}
	_, err := s.Put(tb.Context(), "a/k", strings.NewReader("second"), o)
	wantErr(tb, "Put over an object with IfAbsent", err, blobstore.ErrExists)
	want(tb, s, "a/k", "first")
	nothingLeft(tb, h, s, "a/k")
}

// race runs f concurrently, all beginning together.
func race(n int, f func(i int)) {
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		wg.Go(func() {
			<-start
			f(i)
		})
	}
	close(start)
	wg.Wait()
}

func checkIfAbsentRace(tb testing.TB, h Harness) {
	s := open(tb, h)
	stores := []blobstore.Store{s}
	if h.Second != nil && s.Capabilities().MultiWriter {
		second := h.Second(tb, s)
		tb.Cleanup(func() { second.Close() })
		stores = append(stores, second)
	}
	for round := range 5 {
		key := fmt.Sprintf("dir%d/k", round)
		errs := make([]error, 8)
		// All have been asked for bytes before any of them gets one, so that a
		// look before the write is not enough.
		var reading sync.WaitGroup
		reading.Add(len(errs))
		race(len(errs), func(i int) {
			var once sync.Once
			arrive := func() { once.Do(reading.Done) }
			r := &gate{Reader: strings.NewReader(fmt.Sprint(i)), pass: func() { arrive(); reading.Wait() }}
			_, errs[i] = stores[i%len(stores)].Put(tb.Context(), key, r, blobstore.PutOptions{IfAbsent: true})
			arrive()
		})
		winner := -1
		for i, err := range errs {
			switch {
			case err == nil && winner >= 0:
				tb.Fatalf("two Puts with IfAbsent of one key succeeded")
			case err == nil:
				winner = i
			default:
				wantErr(tb, "Put", err, blobstore.ErrExists)
			}
		}
		if winner < 0 {
			tb.Fatalf("no Put succeeded: %v", errs)
		}
		want(tb, s, key, fmt.Sprint(winner))
	}
}

type gate struct {
	io.Reader
	pass func()
}

func (g *gate) Read(p []byte) (int, error) {
	g.pass()
	return g.Reader.Read(p)
}

func checkPutRace(tb testing.TB, h Harness) {
	s := open(tb, h)
	put(tb, s, "k", strings.Repeat("x", 50_000))
	look := func() {
		got, info, err := get(tb.Context(), s, "k", blobstore.GetOptions{})
		size := 50_000
		if got != "" && got[0] != 'x' {
			size += int(got[0] - 'a')
		}
		switch {
		case err != nil:
			tb.Errorf("Get beside Put: %v", err)
		case len(got) != size || info.Size != int64(size) || strings.Trim(got, got[:1]) != "":
			tb.Errorf("Get beside Put gave part of an object or a mixture: %d bytes of %d", len(got), info.Size)
		}
	}
	race(6, func(i int) {
		for range 5 {
			if i%2 == 1 {
				look()
				continue
			}
			content := strings.Repeat(string(rune('a'+i)), 50_000+i)
			if _, err := s.Put(tb.Context(), "k", iotest.HalfReader(strings.NewReader(content)), blobstore.PutOptions{}); err != nil {
				tb.Errorf("Put: %v", err)
			}
		}
	})
	look()
}

func checkVerify(tb testing.TB, h Harness) {
	s := open(tb, h)
	sum := sha256.Sum256([]byte("content"))
	for _, o := range []blobstore.PutOptions{{Size: 6}, {Size: 8}, {SHA256: make([]byte, 32)}, {Size: 8, SHA256: sum[:]}} {
		_, err := s.Put(tb.Context(), "k", strings.NewReader("content"), o)
		wantErr(tb, fmt.Sprintf("Put of 7 bytes with size %d and SHA-256 %x", o.Size, o.SHA256), err, blobstore.ErrChecksum)
		nothingLeft(tb, h, s)
	}
	if _, err := s.Put(tb.Context(), "k", strings.NewReader("content"), blobstore.PutOptions{Size: 7, SHA256: sum[:]}); err != nil {
		tb.Fatalf("Put with the right size and SHA-256: %v", err)
	}
	want(tb, s, "k", "content")
}

func checkFailedPut(tb testing.TB, h Harness) {
	s := open(tb, h)
	put(tb, s, "old", "old")
	broken := errors.New("broken reader")
	for _, key := range []string{"old", "new/dir/key"} {
		for _, size := range []int{0, 10, 3 << 20} {
			r := io.MultiReader(strings.NewReader(strings.Repeat("x", size)), iotest.ErrReader(broken))
			_, err := s.Put(tb.Context(), key, r, blobstore.PutOptions{})
			wantErr(tb, "Put from a broken reader", err, broken)

			ctx, cancel := context.WithCancel(tb.Context())
			r = io.MultiReader(strings.NewReader(strings.Repeat("x", size)), &gate{strings.NewReader("rest"), cancel})
			_, err = s.Put(ctx, key, r, blobstore.PutOptions{})
			wantErr(tb, "Put cancelled while reading", err, context.Canceled)
			cancel()
		}
	}
	want(tb, s, "old", "old")
	nothingLeft(tb, h, s, "old")
}

func checkRange(tb testing.TB, h Harness) {
	s := open(tb, h)
	const content = "0123456789"
	put(tb, s, "k", content)
	for off := range int64(11) {
		for length := range int64(13) {
			end := int64(10)
			if length > 0 {
				end = min(off+length, 10)
			}
			got, info, err := get(tb.Context(), s, "k", blobstore.GetOptions{Offset: off, Length: length})
			if err != nil || got != content[off:end] || info.Size != 10 {
				tb.Fatalf("Get of %d bytes from %d gave %q (size %d), error %v; want %q", length, off, got, info.Size, err, content[off:end])
			}
		}
	}
}

func checkRangeErrors(tb testing.TB, h Harness) {
	s := open(tb, h)
	put(tb, s, "k", "0123456789")
	for o, target := range map[blobstore.GetOptions]error{
		{Offset: 11}:            blobstore.ErrOutOfRange,
		{Offset: 11, Length: 1}: blobstore.ErrOutOfRange,
		{Offset: -1}:            blobstore.ErrInvalid,
		{Length: -1}:            blobstore.ErrInvalid,
	} {
		_, _, err := get(tb.Context(), s, "k", o)
		wantErr(tb, fmt.Sprintf("Get of %d bytes from %d of 10", o.Length, o.Offset), err, target)
	}
	put(tb, s, "empty", "")
	if got, _, err := get(tb.Context(), s, "empty", blobstore.GetOptions{Length: 5}); got != "" || err != nil {
		tb.Fatalf("Get of 5 bytes from an empty object gave %q, error %v", got, err)
	}
}

func checkReaderIsolated(tb testing.TB, h Harness) {
	s := open(tb, h)
	content := strings.Repeat("a", 1<<20)
	put(tb, s, "k", content)
	r, _, err := s.Get(tb.Context(), "k", blobstore.GetOptions{})
	if err != nil {
		tb.Fatalf("Get: %v", err)
	}
	defer r.Close()
	head := make([]byte, 10)
	if _, err := io.ReadFull(r, head); err != nil {
		tb.Fatalf("Read: %v", err)
	}
	put(tb, s, "k", strings.Repeat("b", 1<<20))
	rest, err := io.ReadAll(r)
	// A driver may lose the old content, but must not mix it with the new.
	if err == nil && string(head)+string(rest) != content {
		tb.Fatalf("a reader that was open while its object was replaced gave other bytes")
	}
	want(tb, s, "k", strings.Repeat("b", 1<<20))
}

func checkLarge(tb testing.TB, h Harness) {
	s := open(tb, h)
	const size = 20 << 20
	src := func() io.Reader { return io.LimitReader(rand.NewChaCha8([32]byte{1}), size) }
	sum := hashOf(src())
	if _, err := s.Put(tb.Context(), "large", src(), blobstore.PutOptions{SHA256: sum}); err != nil {
		tb.Fatalf("Put: %v", err)
	}
	r, info, err := s.Get(tb.Context(), "large", blobstore.GetOptions{})
	if err != nil {
		tb.Fatalf("Get: %v", err)
	}
	defer r.Close()
	if got := hashOf(r); info.Size != size || !bytes.Equal(got, sum) {
		tb.Fatalf("%d bytes came back with SHA-256 %x, want %d with %x", info.Size, got, size, sum)
	}
}

func hashOf(r io.Reader) []byte {
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return []byte(err.Error())
	}
	return h.Sum(nil)
}
