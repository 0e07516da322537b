package filelog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

// copyTo makes a directory of a snapshot.
func copyTo(t *testing.T, from, to string) {
	t.Helper()
	err := Snapshot(t.Context(), from, func(name string, size int64, r io.Reader) error {
		path := filepath.Join(to, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		data, err := io.ReadAll(r)
		if err == nil && int64(len(data)) != size {
			err = fmt.Errorf("%s has %d bytes, not %d", name, len(data), size)
		}
		if err != nil {
			return err
		}
		return os.WriteFile(path, data, 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestSnapshotUnderLoad: a copy made while streams are written has what was
// acknowledged before, is sound, and can be sealed.
func TestSnapshotUnderLoad(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir, Options{NoSync: true, JournalBytes: 1 << 16}) // with many checkpoints
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const streams = 4
	ctx, cancel := context.WithCancel(t.Context())
	var acked [streams]atomic.Int64
	sealed := make(chan string, 1000)
	line := func(i int, at int64) []byte { return fmt.Appendf(nil, "%d %012d\n", i, at) }
	var load sync.WaitGroup
	for i := range streams {
		load.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				off := acked[i].Load()
				p := line(i, off)
				next, err := s.Append(context.WithoutCancel(ctx), fmt.Sprintf("live/%d", i), logstream.AppendOptions{
					Epoch: 1, Marks: []logstream.Mark{{Offset: off, Time: time.UnixMicro(off), Step: n, FD: 1}},
				}, off, p)
				if err != nil {
					t.Error(err)
					return
				}
				acked[i].Store(next)
				if n%50 == 0 { // others come to their ends meanwhile
					name := fmt.Sprintf("over/%d-%d", i, n)
					_, err := s.Append(context.WithoutCancel(ctx), name, logstream.AppendOptions{Epoch: 1}, 0, p)
					if err = errors.Join(err, s.Seal(context.WithoutCancel(ctx), name, logstream.SealOptions{Epoch: 1, Size: -1})); err != nil {
						t.Error(err)
						return
					}
					select {
					case sealed <- name:
					default:
					}
				}
			}
		})
	}
	var known []string
	for range 10 {
		known = append(known, <-sealed)
		var before [streams]int64
		for i := range before {
			before[i] = acked[i].Load()
		}
		to := t.TempDir()
		copyTo(t, dir, to)
		c, err := Open(to, Options{NoSync: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range known {
			if info, err := c.Stat(t.Context(), name); err != nil || !info.Sealed {
				t.Errorf("%s was sealed before: %+v, %v", name, info, err)
			}
		}
		for i := range before {
			name := fmt.Sprintf("live/%d", i)
			if err := c.Seal(t.Context(), name, logstream.SealOptions{Epoch: 2, Size: -1}); err != nil && before[i] > 0 {
				t.Errorf("%s cannot be sealed: %v", name, err)
				continue
			}
			var got []byte
			for chunk, err := range c.Tail(t.Context(), name, 0) {
				if err != nil {
					t.Errorf("%s: %v", name, err)
				}
				got = append(got, chunk.Data...)
			}
			if int64(len(got)) < before[i] {
				t.Errorf("%s has %d bytes, %d were acknowledged", name, len(got), before[i])
			}
			var want []byte
			for int64(len(want)) < int64(len(got)) {
				want = append(want, line(i, int64(len(want)))...)
			}
			if !bytes.HasPrefix(want, got) {
				t.Errorf("%s differs", name)
			}
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	cancel()
	load.Wait()
}

// TestSnapshotOfATornIndex: a record that is being written is no part of the
// copy, unless it never comes to its end.
func TestSnapshotOfATornIndex(t *testing.T) {
	dir, name := t.TempDir(), "a"
	s, err := Open(dir, Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Append(t.Context(), name, logstream.AppendOptions{Epoch: 7}, 0, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, filepath.FromSlash(pathOf(name))) + indexSuffix
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, append(bytes.Clone(whole), 9, 0, 0), 0o600); err != nil {
		t.Fatal(err)
	}
	to := t.TempDir()
	copyTo(t, dir, to)
	if got, err := os.ReadFile(filepath.Join(to, filepath.FromSlash(pathOf(name))) + indexSuffix); err != nil || len(got) != len(whole)+3 {
		t.Errorf("a damaged index is copied as %d bytes of %d, %v", len(got), len(whole)+3, err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := wholeIndex(ctx, f); !errors.Is(err, context.Canceled) {
		t.Errorf("waiting for the end of a record: %v", err)
	}
	if err := f.Truncate(int64(len(whole))); err != nil {
		t.Fatal(err)
	}
	if n, sealed, err := wholeIndex(t.Context(), f); err != nil || n != int64(len(whole)) || sealed != -1 {
		t.Errorf("an index: %d, %d, %v", n, sealed, err)
	}
}

func TestSnapshotOfNothing(t *testing.T) {
	for _, dir := range []string{t.TempDir(), filepath.Join(t.TempDir(), "none")} {
		if err := Snapshot(t.Context(), dir, func(string, int64, io.Reader) error { return errors.New("a file") }); err != nil {
			t.Error(err)
		}
	}
}
