package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
)

// A spool holds records, numbered consecutively from 1, until they are released:
// the first few MiB in memory, which is enough as long as the server keeps up,
// and what comes while that is full in a directory of segment files, named
// after the first record in them. There a record is its length and CRC-32C
// (little endian, 4 bytes each) and its bytes. Nothing is synced: the spool only
// has to outlive connections, not the machine.
//
// When the disk fails the spool goes on in memory for the few records that
// must not be lost (see append). It is not safe for concurrent use.
type spool struct {
	dir      string
	memory   [][]byte  // the oldest records, before those on disk
	inMemory int64     // number of the last record in memory
	bytes    int       // in memory
	room     int       // bound of bytes
	segments []segment // oldest first; the last one is written to
	out      *os.File  // of the last segment
	last     int64     // number of the last record
	dropped  int64     // number of the last record that was released
	err      error     // of the disk; from then on records go to overflow
	overflow [][]byte  // records after the last one on disk
	onDisk   int64     // number of the last record on disk
	buf      []byte
}

type segment struct {
	first int64
	size  int64 // bytes that are whole records
}

const (
	memoryBytes     = windowBytes // more cannot be on its way
	segmentBytes    = 4 << 20
	recordHeader    = 8
	maxRecord       = 64 << 20 // more than any event that gRPC would carry
	overflowRecords = 4096
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)

	errCorrupt = errors.New("agent: journal spool is corrupt")
)

// newSpool makes an empty spool that keeps room bytes in memory; what an earlier
// one left in dir goes.
func newSpool(dir string, room int) (*spool, error) {
	s := &spool{dir: dir, room: room}
	if err := os.RemoveAll(dir); err != nil {
		return s, fmt.Errorf("agent: spool: %w", err)
	}
	return s, nil
}

func (s *spool) path(first int64) string {
	return filepath.Join(s.dir, fmt.Sprintf("%016d.seg", first))
}

// fills says that n bytes would be the first to go to disk.
func (s *spool) fills(n int) bool {
	return len(s.segments)+len(s.overflow) == 0 && s.bytes > 0 && s.bytes+n > s.room
}

// append adds a record, which is the spool's from then on. The error is the disk's: the record was kept in memory
// nevertheless if it is vital, and is lost otherwise.
func (s *spool) append(rec []byte, vital bool) error {
	if len(s.segments)+len(s.overflow) == 0 && s.bytes+len(rec) <= s.room {
		s.last++
		s.memory = append(s.memory, rec)
		s.inMemory, s.bytes = s.last, s.bytes+len(rec)
		return nil
	}
	if s.err == nil {
		s.err = s.write(rec)
	}
	if s.err == nil {
		s.last++
		s.onDisk = s.last
		return nil
	}
	if vital && len(s.overflow) < overflowRecords {
		s.last++
		s.overflow = append(s.overflow, append([]byte(nil), rec...))
	}
	return s.err
}

func (s *spool) write(rec []byte) error {
	n := len(s.segments)
	if s.out == nil || s.segments[n-1].size >= segmentBytes {
		if s.out != nil {
			if err := s.out.Close(); err != nil {
				return fmt.Errorf("agent: spool: %w", err)
			}
			s.out = nil
		}
		if n == 0 {
			if err := os.MkdirAll(s.dir, 0o700); err != nil {
				return fmt.Errorf("agent: spool: %w", err)
			}
		}
		f, err := os.OpenFile(s.path(s.last+1), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return fmt.Errorf("agent: spool: %w", err)
		}
		s.out = f
		s.segments = append(s.segments, segment{first: s.last + 1})
		n++
	}
	s.buf = appendRecord(s.buf[:0], rec)
	if _, err := s.out.WriteAt(s.buf, s.segments[n-1].size); err != nil {
		return fmt.Errorf("agent: spool: %w", err)
	}
	s.segments[n-1].size += int64(len(s.buf))
	return nil
}

func appendRecord(b, rec []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(len(rec)))
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(rec, castagnoli))
	return append(b, rec...)
}

// readRecord reads the record at off into buf, which it may grow, where limit
// is the end of the whole records.
func readRecord(r io.ReaderAt, off, limit int64, buf []byte) (rec []byte, next int64, err error) {
	var head [recordHeader]byte
	if limit-off < recordHeader {
		return nil, 0, fmt.Errorf("%w: header cut short at %d", errCorrupt, off)
	}
	if _, err := r.ReadAt(head[:], off); err != nil {
		return nil, 0, fmt.Errorf("%w: header at %d: %w", errCorrupt, off, err)
	}
	n := int64(binary.LittleEndian.Uint32(head[:]))
	off += recordHeader
	if n > maxRecord || n > limit-off {
		return nil, 0, fmt.Errorf("%w: record of %d bytes at %d", errCorrupt, n, off)
	}
	if int64(cap(buf)) < n {
		buf = make([]byte, n)
	}
	buf = buf[:n]
	if _, err := r.ReadAt(buf, off); err != nil {
		return nil, 0, fmt.Errorf("%w: record at %d: %w", errCorrupt, off, err)
	}
	if crc32.Checksum(buf, castagnoli) != binary.LittleEndian.Uint32(head[4:]) {
		return nil, 0, fmt.Errorf("%w: checksum of record at %d", errCorrupt, off)
	}
	return buf, off + n, nil
}

// release forgets the records up to seq. Segments go when all of their records
// are, the one being written to when nothing is left.
func (s *spool) release(seq int64) {
	s.dropped = max(s.dropped, min(seq, s.last))
	for len(s.memory) > 0 && s.inMemory-int64(len(s.memory)) < s.dropped {
		s.bytes -= len(s.memory[0])
		s.memory[0] = nil
		s.memory = s.memory[1:]
	}
	if s.dropped == s.last && s.err == nil && s.out != nil {
		_ = s.out.Close()
		s.out = nil
		for _, seg := range s.segments {
			_ = os.Remove(s.path(seg.first)) // the directory goes at the end anyway
		}
		s.segments = nil
	}
	for len(s.segments) > 1 && s.segments[1].first-1 <= s.dropped {
		_ = os.Remove(s.path(s.segments[0].first)) // as above
		s.segments = s.segments[1:]
	}
}

// remove closes the spool and deletes it.
func (s *spool) remove() error {
	if s.out != nil {
		_ = s.out.Close()
		s.out = nil
	}
	return os.RemoveAll(s.dir)
}

// cursor reads a spool in order. One that falls behind what was released skips
// ahead.
type cursor struct {
	s   *spool
	seq int64 // of the last record read
	seg int64 // first record of the open segment
	f   *os.File
	off int64
	at  int64 // number of the record at off
	buf []byte
}

// next returns the record after the last one; nil at the end of the spool. It
// must not be changed, and stays.
func (c *cursor) next() (seq int64, rec []byte, err error) {
	s := c.s
	c.seq = max(c.seq, s.dropped)
	if c.seq >= s.last {
		return 0, nil, nil
	}
	if c.seq < s.inMemory {
		rec := s.memory[int64(len(s.memory))-(s.inMemory-c.seq)]
		c.seq++
		return c.seq, rec, nil
	}
	if c.seq >= s.onDisk {
		rec := s.overflow[int64(len(s.overflow))-(s.last-c.seq)]
		c.seq++
		return c.seq, rec, nil
	}
	i := len(s.segments) - 1
	for i > 0 && s.segments[i].first > c.seq+1 {
		i--
	}
	seg := s.segments[i]
	if c.f == nil || c.seg != seg.first || c.at > c.seq+1 {
		c.close()
		if c.f, err = os.Open(s.path(seg.first)); err != nil {
			return 0, nil, fmt.Errorf("%w: %w", errCorrupt, err)
		}
		c.seg, c.off, c.at = seg.first, 0, seg.first
	}
	for {
		rec, next, err := readRecord(c.f, c.off, seg.size, c.buf)
		if err != nil {
			return 0, nil, err
		}
		c.buf, c.off, c.at = rec, next, c.at+1
		if c.at > c.seq+1 {
			c.seq++
			c.buf = nil // the caller's
			return c.seq, rec, nil
		}
	}
}

func (c *cursor) close() {
	if c.f != nil {
		_ = c.f.Close()
		c.f = nil
	}
}
