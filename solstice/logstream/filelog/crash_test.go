package filelog

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logstream/internal/record"
)

func appendTo(t *testing.T, s *Store, name string, epoch, off int64, p string) {
	t.Helper()
	if _, err := s.Append(t.Context(), name, logstream.AppendOptions{Epoch: epoch, Marks: marksAt(off, p)}, off, []byte(p)); err != nil {
		t.Fatal(err)
	}
}

func marksAt(off int64, p string) []logstream.Mark {
	if p == "" {
		return nil
	}
	return []logstream.Mark{{Offset: off, Time: time.UnixMicro(off), Step: 1, FD: 1}}
}

// snapshot copies what a crash at this moment leaves in the page cache.
func snapshot(t *testing.T, s *Store) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(s.root.Name())); err != nil {
		t.Fatal(err)
	}
	return dir
}

func content(t *testing.T, s *Store, name string, n int64) (data []byte) {
	t.Helper()
	for c, err := range s.Tail(t.Context(), name, 0) {
		if err != nil {
			t.Fatal(err)
		}
		if data = append(data, c.Data...); int64(len(data)) >= n {
			break
		}
	}
	return data
}

func lastJournal(t *testing.T, dir string) string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, journalDir, "*"))
	if err != nil || len(names) == 0 {
		t.Fatal("no journal", err)
	}
	return slices.Max(names)
}

// Whatever the machine's crash leaves of the streams' own files, and wherever
// it tears the journal behind the last acknowledged append, every acknowledged
// byte is there afterwards, and none that was not appended.
func TestCrash(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{NoSync: true})
	rnd := rand.New(rand.NewPCG(1, 2))
	appendTo(t, s, "a/kept", 1, 0, "first,")
	appendTo(t, s, "b", 7, 0, "b")
	if err := s.Seal(t.Context(), "b", logstream.SealOptions{Epoch: 8, Size: 1}); err != nil {
		t.Fatal(err)
	}
	appendTo(t, s, "gone", 1, 0, "gone")
	if err := s.Delete(t.Context(), "gone"); err != nil {
		t.Fatal(err)
	}
	acked := snapshot(t, s)
	ackedJournal, err := os.ReadFile(lastJournal(t, acked))
	if err != nil {
		t.Fatal(err)
	}
	appendTo(t, s, "a/kept", 2, 6, "second")
	whole, err := os.ReadFile(lastJournal(t, snapshot(t, s)))
	if err != nil {
		t.Fatal(err)
	}
	for cut := len(ackedJournal); cut <= len(whole); cut++ {
		dir := t.TempDir()
		if err := os.CopyFS(dir, os.DirFS(acked)); err != nil {
			t.Fatal(err)
		}
		journal := bytes.Clone(whole[:cut])
		if cut < len(whole) && cut%3 == 0 { // the rest of the block as it was before
			journal = append(journal, make([]byte, 100)...)
		}
		if err := os.WriteFile(lastJournal(t, dir), journal, 0o600); err != nil {
			t.Fatal(err)
		}
		// The files are lost, cut, or hold garbage.
		for _, path := range []string{pathOf("a/kept") + dataSuffix, pathOf("a/kept") + indexSuffix, pathOf("b") + dataSuffix, pathOf("b") + indexSuffix} {
			path = filepath.Join(dir, path)
			garbage := make([]byte, rnd.IntN(60))
			for i := range garbage {
				garbage[i] = byte(rnd.Uint32())
			}
			var err error
			switch rnd.IntN(3) {
			case 0:
				err = os.Remove(path)
			case 1:
				err = os.WriteFile(path, garbage, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		s := openStore(t, dir, Options{NoSync: true})
		want, epoch := "first,", int64(1)
		if cut == len(whole) {
			want, epoch = "first,second", 2
		}
		if got := content(t, s, "a/kept", int64(len(want))); string(got) != want {
			t.Fatalf("journal cut at %d of %d: %q, want %q", cut, len(whole), got, want)
		}
		info, err := s.Stat(t.Context(), "a/kept")
		if err != nil || info.Size != int64(len(want)) || info.Epoch != epoch {
			t.Fatalf("Stat gave %+v, %v", info, err)
		}
		if info, err := s.Stat(t.Context(), "b"); err != nil || !info.Sealed || info.Epoch != 8 || info.Size != 1 {
			t.Fatalf("Stat gave %+v, %v", info, err)
		}
		if _, err := s.Stat(t.Context(), "gone"); !errors.Is(err, logstream.ErrNotFound) {
			t.Fatalf("the deleted stream: %v", err)
		}
		appendTo(t, s, "a/kept", 2, 0, "first,second, third") // the writer goes on
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// A store that is killed under load loses nothing it acknowledged.
func TestCrashUnderLoad(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{NoSync: true, JournalBytes: 4 << 10, MaxOpenStreams: 2})
	const streams = 5
	var acked [streams]int64
	var mu sync.Mutex
	var wg sync.WaitGroup
	line := func(i int, off int64) []byte { return []byte(fmt.Sprintf("%d:%08d\n", i, off)) }
	stop := make(chan struct{})
	reached := make(chan struct{}, streams*1000)
	for i := range streams {
		wg.Go(func() {
			for off := int64(0); ; {
				select {
				case <-stop:
					return
				default:
				}
				next, err := s.Append(t.Context(), fmt.Sprintf("s%d", i), logstream.AppendOptions{Epoch: 1}, off, line(i, off))
				if err != nil {
					t.Error(err)
					return
				}
				off = next
				mu.Lock()
				acked[i] = off
				mu.Unlock()
				select {
				case reached <- struct{}{}:
				default:
				}
			}
		})
	}
	for all := false; !all; { // every stream has something to lose
		<-reached
		mu.Lock()
		all = !slices.Contains(acked[:], 0)
		mu.Unlock()
	}
	// A copy file by file is no consistent moment of a running store, so hold
	// the journal still where a kill would: between two groups.
	hold, held := make(chan struct{}), make(chan struct{})
	s.journal.mu.Lock()
	s.journal.pause = func() { close(held); <-hold }
	s.journal.mu.Unlock()
	<-held
	mu.Lock()
	want := acked
	mu.Unlock()
	dir := snapshot(t, s)
	close(hold)
	close(stop)
	wg.Wait()

	again := openStore(t, dir, Options{NoSync: true})
	for i := range streams {
		got := content(t, again, fmt.Sprintf("s%d", i), want[i])
		if int64(len(got)) < want[i] {
			t.Fatalf("stream %d has %d bytes, %d were acknowledged", i, len(got), want[i])
		}
		for off := 0; off < len(got); off += 11 {
			if !bytes.HasPrefix(got[off:], line(i, int64(off))) {
				t.Fatalf("stream %d is wrong at %d", i, off)
			}
		}
	}
}

// A journal file that is written over holds older records behind its own, which
// begin where its own end if all are of one size: they are not redone.
func TestOldRecordsAreNotRedone(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{NoSync: true, JournalBytes: 1 << 10})
	const first = 1 << 14 // offsets of one length
	appendTo(t, s, "a", 1, 0, strings.Repeat("x", first))
	recycled := 0
	for n := int64(first); recycled < 50; n += 8 {
		dir, copied := t.TempDir(), false
		held := make(chan struct{})
		s.journal.mu.Lock()
		s.journal.pause = func() {
			defer close(held)
			err := s.journal.waitCheckpoint()
			if copied = s.journal.recycled; copied {
				recycled++
				err = errors.Join(err, os.CopyFS(dir, os.DirFS(s.root.Name())))
			}
			if err != nil {
				t.Error(err)
			}
		}
		s.journal.mu.Unlock()
		if _, err := s.Append(t.Context(), "a", logstream.AppendOptions{Epoch: 1}, n, fmt.Appendf(nil, "%08d", n)); err != nil {
			t.Fatal(err)
		}
		if <-held; !copied {
			continue
		}
		again := openStore(t, dir, Options{NoSync: true})
		if info, err := again.Stat(t.Context(), "a"); err != nil || info.Size != n+8 {
			t.Fatalf("%d bytes after the crash, %d were acknowledged: %v", info.Size, n+8, err)
		}
	}
}

func TestDamagedJournalBeforeTheLast(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{NoSync: true})
	appendTo(t, s, "a", 1, 0, "one")
	dir := snapshot(t, s)
	last := lastJournal(t, dir)
	whole, err := os.ReadFile(last)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(last, whole[:len(whole)-1], 0o600); err != nil {
		t.Fatal(err)
	}
	record.Salt(whole, saltOf(1)^saltOf(0xffff)) // of the file that it is put into
	if err := os.WriteFile(filepath.Join(dir, journalDir, "000000000000ffff"), whole, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, Options{}); !errors.Is(err, logstream.ErrCorrupt) {
		t.Fatalf("Open: %v", err)
	}
}

func TestDamagedIndexIsAnError(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, Options{NoSync: true})
	appendTo(t, s, "a", 1, 0, "one")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, pathOf("a")+indexSuffix)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range whole {
		bad := bytes.Clone(whole)
		bad[i] ^= 0x10
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		s := openStore(t, dir, Options{NoSync: true})
		if _, err := s.Stat(t.Context(), "a"); !errors.Is(err, logstream.ErrCorrupt) {
			t.Fatalf("byte %d flipped: Stat gave %v", i, err)
		}
		s.Close()
	}
}

func TestLocked(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	if _, err := Open(dir, Options{}); !errors.Is(err, ErrLocked) {
		t.Fatalf("second Open: %v", err)
	}
	s.Close()
	openStore(t, dir, Options{})
}

// A full disk under the streams' files refuses appends, and once there is room
// the same append succeeds, without reopening.
func TestFullDiskRecovers(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{NoSync: true})
	appendTo(t, s, "a", 1, 0, "one")
	full := true
	var mu sync.Mutex
	s.journal.mu.Lock()
	s.journal.files.writeAt = func(f *os.File, p []byte, off int64) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		if full {
			n, _ := f.WriteAt(p[:len(p)/2], off)
			return n, &fs.PathError{Op: "write", Path: f.Name(), Err: syscall.ENOSPC}
		}
		return f.WriteAt(p, off)
	}
	s.journal.mu.Unlock()
	for range 3 {
		if _, err := s.Append(t.Context(), "a", logstream.AppendOptions{Epoch: 1}, 3, []byte("two")); !errors.Is(err, logstream.ErrNoSpace) {
			t.Fatalf("Append on a full disk: %v", err)
		}
	}
	if info, err := s.Stat(t.Context(), "a"); err != nil || info.Size != 3 {
		t.Fatalf("Stat gave %+v, %v", info, err)
	}
	mu.Lock()
	full = false
	mu.Unlock()
	appendTo(t, s, "a", 1, 3, "two")
	if got := content(t, s, "a", 6); string(got) != "onetwo" {
		t.Fatalf("got %q", got)
	}
	if err := s.Seal(t.Context(), "a", logstream.SealOptions{Epoch: 1, Size: 6}); err != nil {
		t.Fatal(err)
	}
}

func TestNothingIsLeft(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, Options{JournalBytes: 1 << 10, MaxOpenStreams: 3})
	for i := range 30 {
		name := fmt.Sprintf("runs/%d/log", i)
		appendTo(t, s, name, 1, 0, strings.Repeat("x", 100))
		if n := len(s.journal.files.open); n > 3 {
			t.Fatalf("%d streams are open", n)
		}
		if err := s.Delete(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	var left []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if rel, _ := filepath.Rel(dir, path); rel != "." && filepath.Dir(rel) != streamsDir { // the directories stay
			left = append(left, rel)
		}
		return err
	})
	if want := []string{journalDir, "lock", streamsDir}; err != nil || !slices.Equal(left, want) {
		t.Fatalf("left: %q, error %v", left, err)
	}
}

func FuzzJournal(f *testing.F) {
	r := redo{name: "a/b", dataAt: 5, indexAt: 9, index: []byte("idx"), data: []byte("data")}
	f.Add(r.encode(nil))
	f.Add((&redo{name: "x", remove: true}).encode(nil))
	f.Add([]byte{redoWrite, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRedo(b)
		if err != nil {
			if !errors.Is(err, logstream.ErrCorrupt) {
				t.Fatalf("error %v", err)
			}
			return
		}
		if again, err := parseRedo(r.encode(nil)); err != nil || again.name != r.name || !bytes.Equal(again.data, r.data) || !bytes.Equal(again.index, r.index) || again.dataAt != r.dataAt || again.indexAt != r.indexAt {
			t.Fatalf("%+v became %+v, %v", r, again, err)
		}
		// What was parsed is a record that is read again, by its own salt alone.
		rec := record.Append(nil, b)
		record.Salt(rec, 7)
		n := 0
		count := func(*redo) error { n++; return nil }
		if whole, err := scan(bytes.NewReader(rec), 7, count); !whole || err != nil || n != 1 {
			t.Fatalf("%d records, whole: %v, %v", n, whole, err)
		}
		if whole, err := scan(bytes.NewReader(rec), 8, count); whole || err != nil || n != 1 {
			t.Fatalf("with another salt: %d records, whole: %v, %v", n-1, whole, err)
		}
	})
}

func FuzzIndex(f *testing.F) {
	st := &stream{name: "a"}
	c := st.newCommit(3)
	c.index(marksPayload(marksAt(0, "x")))
	c.index(sealPayload(10, make([]byte, 32)))
	f.Add(c.idx)
	f.Fuzz(func(t *testing.T, b []byte) {
		cur := state{size: 10}
		if err := cur.parseIndex(bytes.NewReader(b), "a"); err != nil {
			if !errors.Is(err, logstream.ErrCorrupt) && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatalf("error %v", err)
			}
			return
		}
		if cur.indexSize != int64(len(b)) {
			t.Fatalf("read %d of %d bytes", cur.indexSize, len(b))
		}
	})
}
