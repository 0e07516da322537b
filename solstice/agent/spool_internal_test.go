package agent

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto"
	"google.golang.org/protobuf/proto"

	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
)

func record(i int64, size int) []byte {
	return bytes.Repeat([]byte(fmt.Sprintf("%d,", i)), size/4+1)
}

// TestSpoolModel compares random appends, releases and readers with what they
// should give.
func TestSpoolModel(t *testing.T) {
	for _, room := range []int{0, 100 << 10, 2 << 20} {
		t.Run(fmt.Sprint(room), func(t *testing.T) { testSpoolModel(t, room) })
	}
}

func testSpoolModel(t *testing.T, room int) {
	rng := rand.New(rand.NewPCG(1, 2))
	s, err := newSpool(filepath.Join(t.TempDir(), "spool"), room)
	if err != nil {
		t.Fatal(err)
	}
	size := map[int64]int{}
	var released int64
	cursors := []*cursor{{s: s}}
	for range 3000 {
		switch k := rng.IntN(20); {
		case k < 10:
			n := rng.IntN(60 << 10)
			if err := s.append(record(s.last+1, n), false); err != nil {
				t.Fatal(err)
			}
			size[s.last] = n
		case k < 17:
			c := cursors[rng.IntN(len(cursors))]
			want := max(c.seq, released) + 1
			seq, rec, err := c.next()
			switch {
			case err != nil:
				t.Fatal(err)
			case rec == nil && want <= s.last:
				t.Fatalf("nothing after %d, %d written", want-1, s.last)
			case rec == nil:
			case seq != want || !bytes.Equal(rec, record(seq, size[seq])):
				t.Fatalf("read record %d, want %d", seq, want)
			}
		case k < 18:
			released = max(released, rng.Int64N(s.last+1))
			s.release(released)
		default:
			if len(cursors) > 4 {
				cursors[0].close()
				cursors = cursors[1:]
			}
			cursors = append(cursors, &cursor{s: s, seq: released})
		}
	}
	files, err := os.ReadDir(s.dir)
	if err != nil && room == 0 || len(files) != len(s.segments) {
		t.Errorf("%d files for %d segments, %v", len(files), len(s.segments), err)
	}
	s.release(s.last)
	if files, _ := os.ReadDir(s.dir); len(files) != 0 || s.bytes != 0 {
		t.Errorf("%d files and %d bytes in memory when all is released", len(files), s.bytes)
	}
	for _, c := range cursors {
		c.close()
	}
	if err := s.remove(); err != nil {
		t.Error(err)
	}
}

// TestSpoolDiskFails: what is vital is kept in memory, and read in order.
func TestSpoolDiskFails(t *testing.T) {
	s, err := newSpool(filepath.Join(t.TempDir(), "spool"), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.append([]byte("on disk"), false); err != nil {
		t.Fatal(err)
	}
	_ = s.out.Close() // every write fails from here
	if err := s.append([]byte("lost"), false); err == nil {
		t.Error("the loss of a record was not told")
	}
	for _, rec := range []string{"kept 1", "kept 2"} {
		if err := s.append([]byte(rec), true); err == nil {
			t.Error("the failure of the disk was not told")
		}
	}
	c := &cursor{s: s}
	defer c.close()
	for i, want := range []string{"on disk", "kept 1", "kept 2", ""} {
		seq, rec, err := c.next()
		if err != nil || string(rec) != want || rec != nil && seq != int64(i+1) {
			t.Errorf("record %d is %q, %v, want %q", seq, rec, err, want)
		}
	}
}

func TestSpoolCorruption(t *testing.T) {
	s, err := newSpool(filepath.Join(t.TempDir(), "spool"), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.append([]byte("some record"), false); err != nil {
		t.Fatal(err)
	}
	if _, err := s.out.WriteAt([]byte("X"), recordHeader+3); err != nil {
		t.Fatal(err)
	}
	c := &cursor{s: s}
	defer c.close()
	if _, _, err := c.next(); !errors.Is(err, errCorrupt) {
		t.Errorf("a changed record was read: %v", err)
	}
	_ = s.remove()
}

func FuzzReadRecord(f *testing.F) {
	f.Add(appendRecord(nil, []byte("record")), int64(0))
	f.Add(appendRecord(appendRecord(nil, nil), []byte("second")), int64(recordHeader))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0}, int64(0))
	f.Add([]byte{1, 0, 0}, int64(0))
	f.Fuzz(func(t *testing.T, file []byte, off int64) {
		if off < 0 || off > int64(len(file)) {
			return
		}
		rec, next, err := readRecord(bytes.NewReader(file), off, int64(len(file)), nil)
		if err != nil {
			if !errors.Is(err, errCorrupt) {
				t.Errorf("error %v", err)
			}
			return
		}
		if next != off+recordHeader+int64(len(rec)) || !bytes.Equal(appendRecord(nil, rec), file[off:next]) {
			t.Errorf("record at %d of %d bytes ends at %d", off, len(rec), next)
		}
	})
}

func newTestJournal(t *testing.T, maxBatch int, quota int64) *journal {
	j := newJournal(filepath.Join(t.TempDir(), "journal"), 100<<10, maxBatch, quota, func(err error) { t.Errorf("journal: %v", err) })
	t.Cleanup(func() { _ = j.remove() })
	return j
}

// nextBatch reads a batch as the server does.
func nextBatch(t *testing.T, r *reader, limit int) *agentv1.EventBatch {
	t.Helper()
	b, err := r.batch(limit)
	if err != nil {
		t.Fatal(err)
	}
	if b == nil {
		return nil
	}
	wire, err := batchCodec{encoding.GetCodecV2(protocodec.Name)}.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	var m agentv1.AttachRequest
	if err := proto.Unmarshal(wire.Materialize(), &m); err != nil {
		t.Fatal(err)
	}
	events := m.GetEvents().GetEvents()
	if n := proto.Size(m.GetEvents()); n != b.size || events[len(events)-1].GetSeq() != b.last {
		t.Fatalf("a batch of %d bytes up to %d says %d bytes up to %d", n, events[len(events)-1].GetSeq(), b.size, b.last)
	}
	return m.GetEvents()
}

// TestJournalBatches: batches stay below what the server takes, and give every
// event once.
func TestJournalBatches(t *testing.T) {
	for _, limit := range []int{4 << 10, 20 << 10, 1 << 20} {
		j := newTestJournal(t, limit, 1<<20)
		j.log(0, agentv1.Fd_FD_STDOUT, bytes.Repeat([]byte("x"), 300_000))
		for i := range 100 {
			j.log(0, agentv1.Fd_FD_STDERR, fmt.Appendf(nil, "line %d\n", i))
		}
		j.event(&agentv1.Event{Event: &agentv1.Event_StepFinished{StepFinished: &agentv1.StepFinished{
			Outputs: map[string]string{"large": string(bytes.Repeat([]byte("y"), j.eventRoom()-32))},
		}}})
		j.finish(&agentv1.JobFinished{})
		r := j.reader(0)
		defer r.close()
		var seq int64
		for {
			b := nextBatch(t, r, 1<<20)
			if b == nil {
				break
			}
			if n := proto.Size(b); n > limit {
				t.Errorf("a batch of %d bytes, at most %d", n, limit)
			}
			for _, e := range b.GetEvents() {
				if seq++; e.GetSeq() != seq {
					t.Fatalf("event %d after %d", e.GetSeq(), seq-1)
				}
			}
		}
		if _, last := j.bounds(); seq != last {
			t.Errorf("read %d of %d events", seq, last)
		}
	}
}

// TestJournalQuota walks over the edge of the quota byte by byte.
func TestJournalQuota(t *testing.T) {
	probe := newTestJournal(t, 0, minLogBytes)
	edge := minLogBytes - len(probe.mark) - 1
	for n := edge - 2; n <= edge+2; n++ {
		j := newTestJournal(t, 0, minLogBytes)
		text := bytes.Repeat([]byte("x"), n)
		j.log(0, agentv1.Fd_FD_STDOUT, text)
		j.log(0, agentv1.Fd_FD_STDOUT, nil)
		f := &agentv1.JobFinished{}
		j.finish(f)
		var log []byte
		var tr *agentv1.Truncated
		r := j.reader(0)
		for {
			b := nextBatch(t, r, batchTarget)
			if b == nil {
				break
			}
			for _, e := range b.GetEvents() {
				log = append(log, e.GetLog().GetData()...)
				if e.GetTruncated() != nil {
					tr = e.GetTruncated()
				}
			}
		}
		r.close()
		want := text
		if n > edge {
			want = append(text[:edge:edge], "\n"+j.mark...)
			if tr.GetFrom() != int64(edge) || tr.GetTo() != int64(n) {
				t.Errorf("%d bytes: truncated %v", n, tr)
			}
		} else if tr != nil {
			t.Errorf("%d bytes: truncated %v", n, tr)
		}
		if !bytes.Equal(log, want) || f.GetLogSize() != int64(len(want)) || len(log) > minLogBytes {
			t.Errorf("%d bytes: log of %d, want %d", n, len(log), len(want))
		}
		if sum := sha256.Sum256(want); !bytes.Equal(sum[:], f.GetLogSha256()) {
			t.Errorf("%d bytes: hash", n)
		}
	}
}

func TestFormatSize(t *testing.T) {
	for n, want := range map[int64]string{1: "1 B", 1024: "1 KiB", 1536: "1536 B", 256 << 20: "256 MiB", 3 << 30: "3 GiB"} {
		if got := formatSize(n); got != want {
			t.Errorf("formatSize(%d) = %q, want %q", n, got, want)
		}
	}
}
