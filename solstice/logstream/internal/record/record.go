// Package record encodes what the log stores write beside the log bytes:
// checksummed, length-prefixed records, and the marks within them.
package record

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"time"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

// Castagnoli is the CRC-32 polynomial of every checksum here.
var Castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Append adds one record to b: length (4 bytes, little endian), CRC-32C of the
// payload (4 bytes), payload.
func Append(b, payload []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(payload, Castagnoli))
	return append(b, payload...)
}

// Header fills in the header of a record whose payload was written behind it.
func Header(rec []byte) {
	payload := rec[HeaderSize:]
	binary.LittleEndian.PutUint32(rec, uint32(len(payload)))
	binary.LittleEndian.PutUint32(rec[4:], crc32.Checksum(payload, Castagnoli))
}

// Salt changes a record's checksum, so that only a Reader with the same Salt
// takes it for whole; a second time takes it back.
func Salt(rec []byte, salt uint32) {
	binary.LittleEndian.PutUint32(rec[4:], binary.LittleEndian.Uint32(rec[4:])^salt)
}

// HeaderSize is what a record adds to its payload.
const HeaderSize = 8

// Parse splits the first record off b. What is cut short is io.ErrUnexpectedEOF
// (an empty b: io.EOF), what is damaged wraps logstream.ErrCorrupt. A payload
// is at most limit bytes.
func Parse(b []byte, limit int) (payload, rest []byte, err error) {
	if len(b) == 0 {
		return nil, nil, io.EOF
	}
	if len(b) < HeaderSize {
		return nil, nil, io.ErrUnexpectedEOF
	}
	n, err := Length(b, limit)
	if err != nil {
		return nil, nil, err
	}
	if len(b)-HeaderSize < n {
		return nil, nil, io.ErrUnexpectedEOF
	}
	payload, rest = b[HeaderSize:HeaderSize+n], b[HeaderSize+n:]
	if crc32.Checksum(payload, Castagnoli) != binary.LittleEndian.Uint32(b[4:]) {
		return nil, nil, fmt.Errorf("%w: checksum of a record", logstream.ErrCorrupt)
	}
	return payload, rest, nil
}

// Length returns the payload's length from a record's header. No record is
// empty, so that a run of zeros is none.
func Length(header []byte, limit int) (int, error) {
	n := binary.LittleEndian.Uint32(header)
	if n == 0 || int64(n) > int64(limit) {
		return 0, fmt.Errorf("%w: record of %d bytes", logstream.ErrCorrupt, n)
	}
	return int(n), nil
}

// Reader reads records one after the other from r.
type Reader struct {
	Salt uint32 // of the records

	r     io.Reader
	limit int
	buf   []byte
}

// NewReader returns a Reader of records with payloads of at most limit bytes.
func NewReader(r io.Reader, limit int) *Reader { return &Reader{r: r, limit: limit} }

// Next returns the next payload, valid until the next call; errors are Parse's
// or the reader's.
func (r *Reader) Next() ([]byte, error) {
	var head [HeaderSize]byte
	if _, err := io.ReadFull(r.r, head[:]); err != nil {
		return nil, err
	}
	n, err := Length(head[:], r.limit)
	if err != nil {
		return nil, err
	}
	// Grow as bytes arrive: a damaged length must not allocate much.
	r.buf = append(r.buf[:0], head[:]...)
	for len(r.buf) < HeaderSize+n {
		step := min(n+HeaderSize-len(r.buf), max(4<<10, len(r.buf)))
		at := len(r.buf)
		r.buf = append(r.buf, make([]byte, step)...)
		if _, err := io.ReadFull(r.r, r.buf[at:]); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	Salt(r.buf, r.Salt)
	payload, _, err := Parse(r.buf, r.limit)
	return payload, err
}

// AppendMarks adds marks to b, each as a difference from the one before.
func AppendMarks(b []byte, marks []logstream.Mark) []byte {
	b = binary.AppendUvarint(b, uint64(len(marks)))
	var off, micros int64
	for _, m := range marks {
		t := m.Time.UnixMicro()
		b = binary.AppendUvarint(b, uint64(m.Offset-off))
		b = binary.AppendVarint(b, t-micros)
		b = binary.AppendVarint(b, int64(m.Step))
		b = binary.AppendVarint(b, int64(m.FD))
		off, micros = m.Offset, t
	}
	return b
}

// ParseMarks reads what AppendMarks wrote: the whole of b.
func ParseMarks(b []byte) ([]logstream.Mark, error) {
	bad := func(why string) ([]logstream.Mark, error) {
		return nil, fmt.Errorf("%w: marks: %s", logstream.ErrCorrupt, why)
	}
	count, n := binary.Uvarint(b)
	if b = b[max(n, 0):]; n <= 0 || count > uint64(len(b)/4) {
		return bad("count")
	}
	marks := make([]logstream.Mark, 0, count)
	var off, micros int64
	for i := range count {
		delta, n := binary.Uvarint(b)
		if n <= 0 || delta > uint64(math.MaxInt64-off) || i > 0 && delta == 0 {
			return bad("offset")
		}
		b = b[n:]
		var v [3]int64
		for i := range v {
			if v[i], n = binary.Varint(b); n <= 0 {
				return bad("cut short")
			}
			b = b[n:]
		}
		if v[1] != int64(int32(v[1])) || v[2] != int64(int32(v[2])) {
			return bad("step or output")
		}
		off += int64(delta)
		micros += v[0]
		marks = append(marks, logstream.Mark{Offset: off, Time: time.UnixMicro(micros).UTC(), Step: int(v[1]), FD: int(v[2])})
	}
	if len(b) > 0 {
		return bad("trailing bytes")
	}
	return marks, nil
}

// Within returns those marks of a chunk [from, to) that a follower gets: the
// one in force at from first. marks are ascending.
func Within(marks []logstream.Mark, from, to int64) []logstream.Mark {
	first := 0
	for first+1 < len(marks) && marks[first+1].Offset <= from {
		first++
	}
	end := first
	for end < len(marks) && marks[end].Offset < to {
		end++
	}
	return marks[first:end:end]
}

// Trim drops the marks of bytes before size, which are stored already, and
// moves the one in force there to size. marks are ascending and lie below end.
func Trim(marks []logstream.Mark, size int64) []logstream.Mark {
	if len(marks) == 0 || marks[0].Offset >= size {
		return marks
	}
	i := 0
	for i+1 < len(marks) && marks[i+1].Offset <= size {
		i++
	}
	out := append([]logstream.Mark(nil), marks[i:]...)
	out[0].Offset = size
	return out
}
