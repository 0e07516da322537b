package bloblog

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"sort"

	"github.com/klauspost/compress/zstd"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logstream/internal/record"
)

// The compacted form (RFC 8878): for every block of the stream a zstd frame
// with a checksum, then a skippable frame with its marks (a record); at the
// end a skippable frame with the table of blocks and a footer:
//
//	table: uvarint count, then per block uvarint raw bytes, uvarint frame
//	       bytes, uvarint bytes of the skippable frame behind it
//	footer: uint32 length and CRC-32C of the table, magic
const (
	blockBytes    = 1 << 20
	skipMarks     = 0x184D2A50
	skipTable     = 0x184D2A5E
	skipHeader    = 8
	footerMagic   = "slogzst1"
	footerBytes   = 8 + len(footerMagic)
	maxTableBytes = 64 << 20
)

type block struct {
	raw    int64 // offset of its bytes in the stream
	rawLen int64
	at     int64 // offset of its frame in the object
	frame  int64 // lengths
	marks  int64
}

type table struct{ blocks []block }

// blockWriter writes the compacted form.
type blockWriter struct {
	w      io.Writer
	enc    *zstd.Encoder
	off    int64 // in the stream, of buf
	buf    []byte
	marks  []logstream.Mark // from the one in force at off on
	out    []byte
	blocks []block
}

func newBlockWriter(w io.Writer) (*blockWriter, error) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(true))
	return &blockWriter{w: w, enc: enc}, err
}

func (z *blockWriter) release() { _ = z.enc.Close() }

// write adds a chunk; chunks come in order and carry the mark in force.
func (z *blockWriter) write(c *logstream.Chunk) error {
	for _, m := range c.Marks {
		if len(z.marks) == 0 || m.Offset > z.marks[len(z.marks)-1].Offset {
			z.marks = append(z.marks, m)
		}
	}
	for data := c.Data; len(data) > 0; {
		n := min(len(data), blockBytes-len(z.buf))
		z.buf = append(z.buf, data[:n]...)
		data = data[n:]
		if len(z.buf) == blockBytes {
			if err := z.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (z *blockWriter) flush() error {
	if len(z.buf) == 0 {
		return nil
	}
	end := z.off + int64(len(z.buf))
	z.out = z.enc.EncodeAll(z.buf, z.out[:0])
	b := block{rawLen: int64(len(z.buf)), frame: int64(len(z.out))}
	marks := record.Append(nil, record.AppendMarks(nil, record.Within(z.marks, z.off, end)))
	z.out = appendSkippable(z.out, skipMarks, marks)
	b.marks = int64(len(z.out)) - b.frame
	z.blocks = append(z.blocks, b)
	z.off, z.buf = end, z.buf[:0]
	for len(z.marks) > 1 && z.marks[1].Offset <= end {
		z.marks = z.marks[1:]
	}
	_, err := z.w.Write(z.out)
	return err
}

func (z *blockWriter) close() error {
	if err := z.flush(); err != nil {
		return err
	}
	_, err := z.w.Write(appendSkippable(nil, skipTable, encodeTable(z.blocks)))
	return err
}

func appendSkippable(b []byte, magic uint32, content []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, magic)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(content)))
	return append(b, content...)
}

// encodeTable gives the table and the footer.
func encodeTable(blocks []block) []byte {
	t := binary.AppendUvarint(nil, uint64(len(blocks)))
	for _, b := range blocks {
		t = binary.AppendUvarint(t, uint64(b.rawLen))
		t = binary.AppendUvarint(t, uint64(b.frame))
		t = binary.AppendUvarint(t, uint64(b.marks))
	}
	n := len(t)
	t = binary.LittleEndian.AppendUint32(t, uint32(n))
	t = binary.LittleEndian.AppendUint32(t, crc32.Checksum(t[:n], record.Castagnoli))
	return append(t, footerMagic...)
}

// parseFooter returns how many bytes at an object's end table and footer take.
func parseFooter(tail []byte) (int64, error) {
	if len(tail) < footerBytes || string(tail[len(tail)-len(footerMagic):]) != footerMagic {
		return 0, fmt.Errorf("%w: no footer", logstream.ErrCorrupt)
	}
	n := binary.LittleEndian.Uint32(tail[len(tail)-footerBytes:])
	if n > maxTableBytes {
		return 0, fmt.Errorf("%w: table of %d bytes", logstream.ErrCorrupt, n)
	}
	return int64(n) + int64(footerBytes), nil
}

// parseTable reads the end of an object of the given size, table and footer,
// for a stream of length bytes.
func parseTable(end []byte, objectSize, length int64) (*table, error) {
	bad := func(why string) (*table, error) {
		return nil, fmt.Errorf("%w: table of blocks: %s", logstream.ErrCorrupt, why)
	}
	n, err := parseFooter(end)
	if err != nil {
		return nil, err
	}
	if int64(len(end)) != n {
		return bad("length")
	}
	b, foot := end[:len(end)-footerBytes], end[len(end)-footerBytes:]
	if crc32.Checksum(b, record.Castagnoli) != binary.LittleEndian.Uint32(foot[4:]) {
		return bad("checksum")
	}
	count, w := binary.Uvarint(b)
	if b = b[max(w, 0):]; w <= 0 || count > uint64(len(b)/3) {
		return bad("count")
	}
	t := &table{blocks: make([]block, 0, count)}
	var raw, at int64
	for range count {
		var v [3]int64
		for i := range v {
			u, w := binary.Uvarint(b)
			if w <= 0 || u == 0 || u > uint64(objectSize)+blockBytes {
				return bad("entry")
			}
			v[i], b = int64(u), b[w:]
		}
		if v[0] > blockBytes || v[2] <= skipHeader {
			return bad("block")
		}
		t.blocks = append(t.blocks, block{raw: raw, rawLen: v[0], at: at, frame: v[1], marks: v[2]})
		raw += v[0]
		if at += v[1] + v[2]; at > objectSize {
			return bad("blocks beyond the end")
		}
	}
	if len(b) > 0 || raw != length || at != objectSize-n-skipHeader {
		return bad("sizes")
	}
	return t, nil
}

// find returns the block that holds an offset of the stream.
func (t *table) find(pos int64) (block, bool) {
	i := sort.Search(len(t.blocks), func(i int) bool { return t.blocks[i].raw+t.blocks[i].rawLen > pos })
	if i == len(t.blocks) {
		return block{}, false
	}
	return t.blocks[i], true
}

// decodeBlock is what flush wrote.
func decodeBlock(dec *zstd.Decoder, p []byte, b block) (data []byte, marks []logstream.Mark, err error) {
	if int64(len(p)) != b.frame+b.marks {
		return nil, nil, fmt.Errorf("%w: block is cut short", logstream.ErrCorrupt)
	}
	data, err = dec.DecodeAll(p[:b.frame], make([]byte, 0, b.rawLen))
	if err != nil {
		return nil, nil, fmt.Errorf("%w: block: %w", logstream.ErrCorrupt, err)
	}
	skip := p[b.frame:]
	if int64(len(data)) != b.rawLen || binary.LittleEndian.Uint32(skip) != skipMarks {
		return nil, nil, fmt.Errorf("%w: block of %d bytes", logstream.ErrCorrupt, len(data))
	}
	payload, rest, err := record.Parse(skip[skipHeader:], maxMarksBytes)
	if err != nil || len(rest) > 0 {
		return nil, nil, fmt.Errorf("%w: marks of a block", logstream.ErrCorrupt)
	}
	marks, err = record.ParseMarks(payload)
	return data, marks, err
}

// newDecoder bounds what a damaged frame can make it allocate.
func newDecoder() (*zstd.Decoder, error) {
	return zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(2*blockBytes))
}

// readBlock reads the block of a compacted object that holds pos.
func (r *reader) readBlock(ctx context.Context, e Entry, pos int64) (data []byte, marks []logstream.Mark, off int64, err error) {
	if r.table == nil || r.key != e.Key {
		if r.table, err = r.readTable(ctx, e); err != nil {
			return nil, nil, 0, err
		}
		r.key = e.Key
	}
	b, ok := r.table.find(pos)
	if !ok {
		return nil, nil, 0, fmt.Errorf("%w: no block holds offset %d", logstream.ErrCorrupt, pos)
	}
	p, err := r.get(ctx, e.Key, blobstore.GetOptions{Offset: b.at, Length: b.frame + b.marks})
	if err != nil {
		return nil, nil, 0, err
	}
	dec, err := newDecoder()
	if err != nil {
		return nil, nil, 0, err
	}
	defer dec.Close()
	data, marks, err = decodeBlock(dec, p, b)
	return data, marks, b.raw, err
}

func (r *reader) readTable(ctx context.Context, e Entry) (*table, error) {
	info, err := r.s.blobs.Stat(ctx, e.Key)
	if err != nil {
		return nil, err
	}
	// One read is enough but for streams of several GiB.
	at := max(info.Size-64<<10, 0)
	tail, err := r.get(ctx, e.Key, blobstore.GetOptions{Offset: at})
	if err != nil {
		return nil, err
	}
	n, err := parseFooter(tail)
	if err != nil {
		return nil, err
	}
	if n > info.Size {
		return nil, fmt.Errorf("%w: table of %d bytes", logstream.ErrCorrupt, n)
	}
	if n > int64(len(tail)) {
		if tail, err = r.get(ctx, e.Key, blobstore.GetOptions{Offset: info.Size - n}); err != nil {
			return nil, err
		}
	}
	return parseTable(tail[max(int64(len(tail))-n, 0):], info.Size, e.Length)
}
