package bloblog

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/blobstore/memblob"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

func write(t *testing.T, s *Store, name string, off int64, p string) {
	t.Helper()
	o := logstream.AppendOptions{Epoch: 1, Marks: []logstream.Mark{{Offset: off, Time: time.UnixMicro(off).UTC(), Step: int(off % 7), FD: 1}}}
	if _, err := s.Append(t.Context(), name, o, off, []byte(p)); err != nil {
		t.Fatal(err)
	}
}

func keys(t *testing.T, blobs blobstore.Store) (keys []string) {
	t.Helper()
	for info, err := range blobs.List(t.Context(), blobstore.ListOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, info.Key)
	}
	return keys
}

// TestCompactInBucket: into an object of several parts.
func TestCompactInBucket(t *testing.T) {
	blobs := bucket(t)
	s := open(t, blobs, &MemIndex{}, Options{Linger: -1, NoCompaction: true})
	text := make([]byte, 10<<20) // and does not become smaller
	_, _ = rand.NewChaCha8([32]byte{3}).Read(text)
	for off := 0; off < len(text); off += logstream.MaxAppendBytes {
		write(t, s, "s", int64(off), string(text[off:min(off+logstream.MaxAppendBytes, len(text))]))
	}
	if err := s.Seal(t.Context(), "s", logstream.SealOptions{Epoch: 1, Size: int64(len(text))}); err != nil {
		t.Fatal(err)
	}
	if err := s.Compact(t.Context(), "s"); err != nil {
		t.Fatal(err)
	}
	if left := keys(t, blobs); len(left) != 1 {
		t.Fatalf("left: %q", left)
	}
	var got bytes.Buffer
	for c, err := range s.Tail(t.Context(), "s", 0) {
		if err != nil {
			t.Fatal(err)
		}
		got.Write(c.Data)
	}
	if !bytes.Equal(got.Bytes(), text) {
		t.Fatalf("%d bytes of %d, or others", got.Len(), len(text))
	}
}

// A reader in the middle of the chunks goes on when they are replaced, the
// result is one object that plain zstd reads, and smaller than the log.
func TestCompactUnderReader(t *testing.T) {
	blobs, index := memblob.New(), &MemIndex{}
	s := open(t, blobs, index, Options{Linger: -1, NoCompaction: true})
	var text strings.Builder
	for i := range 3 * listAhead { // more than a reader lists ahead
		p := strings.Repeat(fmt.Sprintf("line %d\n", i), 2500)
		write(t, s, "s", int64(text.Len()), p)
		text.WriteString(p)
	}
	if err := s.Compact(t.Context(), "s"); !errors.Is(err, logstream.ErrConflict) {
		t.Fatalf("Compact of a stream that is not sealed: %v", err)
	}
	if err := s.Seal(t.Context(), "s", logstream.SealOptions{Epoch: 1, Size: int64(text.Len())}); err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	for c, err := range s.Tail(t.Context(), "s", 0) {
		if err != nil {
			t.Fatal(err)
		}
		if got.Len() == 0 {
			if err := s.Compact(t.Context(), "s"); err != nil {
				t.Fatal(err)
			}
		}
		got.Write(c.Data)
	}
	if got.String() != text.String() {
		t.Fatalf("the reader got %d bytes of %d, or others", got.Len(), text.Len())
	}
	left := keys(t, blobs)
	if len(left) != 1 {
		t.Fatalf("objects: %q", left)
	}
	r, info, err := blobs.Get(t.Context(), left[0], blobstore.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	dec, err := zstd.NewReader(r)
	if err != nil {
		t.Fatal(err)
	}
	defer dec.Close()
	if plain, err := io.ReadAll(dec); err != nil || string(plain) != text.String() || info.Size > int64(text.Len()/10) {
		t.Fatalf("zstd read %d bytes from %d, error %v", len(plain), info.Size, err)
	}
}

// What is not what was sealed is not compacted, and its chunks stay.
func TestDamagedChunkIsAnError(t *testing.T) {
	blobs, index := memblob.New(), &MemIndex{}
	s := open(t, blobs, index, Options{NoCompaction: true})
	write(t, s, "s", 0, "hello world")
	if err := s.Seal(t.Context(), "s", logstream.SealOptions{Epoch: 1, Size: 11}); err != nil {
		t.Fatal(err)
	}
	key := keys(t, blobs)[0]
	if _, err := blobs.Put(t.Context(), key, strings.NewReader("hellO world"), blobstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, err := range s.Tail(t.Context(), "s", 0) {
		if !errors.Is(err, logstream.ErrCorrupt) {
			t.Fatalf("Tail gave %v", err)
		}
	}
	if err := s.Compact(t.Context(), "s"); !errors.Is(err, logstream.ErrCorrupt) {
		t.Fatalf("Compact: %v", err)
	}
	if left := keys(t, blobs); !slices.Equal(left, []string{key}) {
		t.Fatalf("objects: %q", left)
	}
}

func TestSweep(t *testing.T) {
	blobs := memblob.New()
	s := open(t, blobs, &MemIndex{}, Options{StoreTimeout: time.Nanosecond, NoCompaction: true})
	s.o.StoreTimeout = time.Minute
	write(t, s, "a", 0, "hello")
	write(t, s, "a/b", 0, "hello")
	s.o.StoreTimeout = 0
	want := keys(t, blobs)
	for _, key := range []string{"logs/a/=1-0-orphan", "logs/a/b/=9-0-orphan", "logs/never/=1-0-x", "other/a/=1-0-x", "logs/a/foreign"} {
		if _, err := blobs.Put(t.Context(), key, strings.NewReader("x"), blobstore.PutOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	want = append(want, "other/a/=1-0-x", "logs/a/foreign")
	slices.Sort(want)
	if n, err := s.Sweep(t.Context(), time.Hour); n != 0 || err != nil {
		t.Fatalf("Sweep of what is young: %d, %v", n, err)
	}
	if n, err := s.Sweep(t.Context(), 0); n != 3 || err != nil {
		t.Fatalf("Sweep: %d, %v", n, err)
	}
	if got := keys(t, blobs); !slices.Equal(got, want) {
		t.Fatalf("left: %q, want %q", got, want)
	}
}

// gated lets a test hold Puts, and fail them.
type gated struct {
	blobstore.Store
	put func() error
}

func (g gated) Put(ctx context.Context, key string, r io.Reader, o blobstore.PutOptions) (blobstore.Info, error) {
	if err := g.put(); err != nil {
		return blobstore.Info{}, err
	}
	return g.Store.Put(ctx, key, r, o)
}

// Appends that come while a chunk is stored share the next one, and followers
// here get their bytes before they are durable.
func TestCoalesce(t *testing.T) {
	first, puts := make(chan struct{}), 0
	blobs := gated{memblob.New(), func() error {
		if puts++; puts == 1 {
			<-first
		}
		return nil
	}}
	s := open(t, blobs, &MemIndex{}, Options{Linger: -1, NoCompaction: true})
	const n = 20
	errs := make(chan error, n)
	var text strings.Builder
	next := make(chan struct{})
	go func() { // the follower paces the writer: it sees what is not durable yet
		defer close(next)
		got := 0
		for c, err := range s.Tail(t.Context(), "s", 0) {
			if err != nil || c.Durable {
				t.Errorf("chunk %+v, error %v", c, err)
				return
			}
			for got += len(c.Data); got%10 == 0; {
				next <- struct{}{}
				break
			}
			if got == 10*n {
				return
			}
		}
	}()
	for i := range n {
		p := fmt.Sprintf("line %04d\n", i)
		off := int64(text.Len())
		text.WriteString(p)
		go func() {
			_, err := s.Append(t.Context(), "s", logstream.AppendOptions{Epoch: 1}, off, []byte(p))
			errs <- err
		}()
		<-next
	}
	close(first)
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if puts != 2 {
		t.Errorf("%d appends became %d chunks", n, puts)
	}
	<-next
}

// A failed store refuses the appends it held; repeating them succeeds.
func TestStoreFailure(t *testing.T) {
	broken := true
	blobs := gated{memblob.New(), func() error {
		if broken {
			return fmt.Errorf("%w: test", blobstore.ErrNoSpace)
		}
		return nil
	}}
	s := open(t, blobs, &MemIndex{}, Options{Linger: -1})
	for range 3 {
		if _, err := s.Append(t.Context(), "s", logstream.AppendOptions{Epoch: 1}, 0, []byte("hello")); !errors.Is(err, logstream.ErrNoSpace) {
			t.Fatalf("Append: %v", err)
		}
	}
	broken = false
	write(t, s, "s", 0, "hello")
	sum := sha256.Sum256([]byte("hello"))
	if err := s.Seal(t.Context(), "s", logstream.SealOptions{Epoch: 1, Size: 5, SHA256: sum[:]}); err != nil {
		t.Fatal(err)
	}
}

// compacted returns a stream in the compacted form.
func compacted(tb testing.TB, data []byte) []byte {
	tb.Helper()
	var out bytes.Buffer
	z, err := newBlockWriter(&out)
	if err != nil {
		tb.Fatal(err)
	}
	defer z.release()
	for off := 0; off < len(data); off += 1000 {
		end := min(off+1000, len(data))
		c := logstream.Chunk{Offset: int64(off), Data: data[off:end], Marks: []logstream.Mark{{Offset: int64(off), FD: 1}}}
		if err := z.write(&c); err != nil {
			tb.Fatal(err)
		}
	}
	if err := z.close(); err != nil {
		tb.Fatal(err)
	}
	return out.Bytes()
}

// Whatever one byte of the object becomes, a reader gets the stream's bytes or
// an error.
func TestDamagedObject(t *testing.T) {
	data := make([]byte, 3000)
	for i := range data {
		data[i] = byte('a' + rand.IntN(4))
	}
	object := compacted(t, data)
	blobs, index := memblob.New(), &MemIndex{}
	s := open(t, blobs, index, Options{})
	refused := 0
	for i := range object {
		bad := bytes.Clone(object)
		bad[i] ^= 1 << (i % 8)
		if _, err := blobs.Put(t.Context(), "k", bytes.NewReader(bad), blobstore.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		r := reader{s: s, stream: "s"}
		c, err := r.read(t.Context(), Entry{Key: "k", Length: int64(len(data)), Compacted: true}, 0)
		switch {
		case err == nil && !bytes.Equal(c.Data, data):
			t.Fatalf("byte %d damaged: other bytes came", i)
		case err != nil && !errors.Is(err, logstream.ErrCorrupt):
			t.Fatalf("byte %d damaged: %v", i, err)
		case err != nil:
			refused++
		}
	}
	if refused < len(object)*9/10 {
		t.Fatalf("only %d of %d damages were noticed", refused, len(object))
	}
}

func FuzzCompacted(f *testing.F) {
	f.Add(compacted(f, bytes.Repeat([]byte("hello\n"), 300)), int64(1800))
	f.Add(encodeTable(nil), int64(0))
	f.Fuzz(func(t *testing.T, object []byte, length int64) {
		n, err := parseFooter(object)
		if err != nil || n > int64(len(object)) {
			return
		}
		tab, err := parseTable(object[int64(len(object))-n:], int64(len(object)), length)
		if err != nil {
			if !errors.Is(err, logstream.ErrCorrupt) {
				t.Fatalf("error %v", err)
			}
			return
		}
		dec, err := newDecoder()
		if err != nil {
			t.Fatal(err)
		}
		defer dec.Close()
		total := int64(0)
		for _, b := range tab.blocks {
			data, _, err := decodeBlock(dec, object[b.at:b.at+b.frame+b.marks], b)
			if err == nil && int64(len(data)) != b.rawLen || err != nil && !errors.Is(err, logstream.ErrCorrupt) {
				t.Fatalf("block of %d bytes gave %d, error %v", b.rawLen, len(data), err)
			}
			total += b.rawLen
		}
		if total != length {
			t.Fatalf("blocks hold %d bytes, want %d", total, length)
		}
	})
}
