package filelog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"syscall"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logstream/internal/record"
)

// redo is one record of the journal: bytes for the two files of a stream and
// where they go, or the stream's removal. Doing it again changes nothing.
type redo struct {
	name             string
	remove           bool
	dataAt, indexAt  int64
	index            []byte
	data             []byte
	dataEnd, idxEnds int64 // sizes of the files afterwards
}

// maxRedoBytes bounds a record: data, marks and the little around them.
const maxRedoBytes = logstream.MaxAppendBytes + maxIndexBytes + 4096

const (
	redoWrite  = 'w'
	redoRemove = 'r'
)

// buffers are reused for the records of appends, unless they are small or huge.
var buffers sync.Pool

const (
	minPooled = 32 << 10
	maxPooled = 4 << 20
)

// encode puts the change into the journal's form, a record, which also copies
// the bytes so that the caller of Append has them back whenever it returns.
func (c *commit) encode() {
	cur := c.st.state
	c.redo = redo{name: c.st.name, remove: c.remove, dataAt: cur.size, indexAt: cur.indexSize, index: c.idx, data: c.data}
	size := record.HeaderSize + len(c.data) + len(c.idx) + len(c.st.name) + 40
	var b []byte
	if size >= minPooled {
		if p, _ := buffers.Get().(*[]byte); p != nil {
			b = *p
		}
	}
	if cap(b) < size {
		b = make([]byte, 0, size)
	}
	b = c.redo.encode(b[:record.HeaderSize])
	record.Header(b)
	c.redo.data = b[len(b)-len(c.data):]
	c.rec, c.data = b, nil
}

// free gives the record's buffer back.
func (c *commit) free() {
	if b := c.rec; cap(b) >= minPooled && cap(b) <= maxPooled {
		buffers.Put(&b)
	}
	c.redo.data, c.rec = nil, nil
}

func (r *redo) encode(b []byte) []byte {
	if r.remove {
		b = append(b, redoRemove)
	} else {
		b = append(b, redoWrite)
	}
	b = binary.AppendUvarint(b, uint64(len(r.name)))
	b = append(b, r.name...)
	b = binary.AppendUvarint(b, uint64(r.dataAt))
	b = binary.AppendUvarint(b, uint64(r.indexAt))
	b = binary.AppendUvarint(b, uint64(len(r.index)))
	b = append(b, r.index...)
	return append(b, r.data...)
}

// parseRedo is the inverse; the slices point into payload.
func parseRedo(payload []byte) (r redo, err error) {
	bad := fmt.Errorf("%w: record in the journal", logstream.ErrCorrupt)
	if len(payload) == 0 || payload[0] != redoWrite && payload[0] != redoRemove {
		return redo{}, bad
	}
	r.remove = payload[0] == redoRemove
	b := payload[1:]
	number := func() (v int64, ok bool) {
		u, n := binary.Uvarint(b)
		if n <= 0 || int64(u) < 0 {
			return 0, false
		}
		b = b[n:]
		return int64(u), true
	}
	bytes := func() (p []byte, ok bool) {
		n, ok := number()
		if !ok || n > int64(len(b)) {
			return nil, false
		}
		p, b = b[:n], b[n:]
		return p, true
	}
	name, ok := bytes()
	if !ok || logstream.ValidateStream(string(name)) != nil {
		return redo{}, bad
	}
	r.name = string(name)
	if r.dataAt, ok = number(); !ok {
		return redo{}, bad
	}
	if r.indexAt, ok = number(); !ok {
		return redo{}, bad
	}
	if r.index, ok = bytes(); !ok {
		return redo{}, bad
	}
	r.data = b
	r.dataEnd, r.idxEnds = r.dataAt+int64(len(r.data)), r.indexAt+int64(len(r.index))
	if r.dataEnd < 0 || r.idxEnds < 0 {
		return redo{}, bad
	}
	return r, nil
}

// files does what the journal says to the streams' files. It belongs to one
// goroutine.
type files struct {
	root   *os.Root
	noSync bool
	max    int
	open   map[string]*openStream
	clock  int

	writeAt func(f *os.File, p []byte, off int64) (int, error) // tests put faults here
}

type openStream struct {
	data, index *os.File // nil until needed
	used        int
}

// apply does one redo. In recovery it also cuts off what lies behind.
func (fl *files) apply(r *redo, recovery bool) error {
	path := pathOf(r.name)
	if r.remove {
		return fl.remove(path)
	}
	o := fl.get(path)
	if err := fl.writeFile(&o.data, path+dataSuffix, r.data, r.dataAt, recovery); err != nil {
		return err
	}
	return fl.writeFile(&o.index, path+indexSuffix, r.index, r.indexAt, recovery)
}

func (fl *files) get(path string) *openStream {
	fl.clock++
	if o := fl.open[path]; o != nil {
		o.used = fl.clock
		return o
	}
	if fl.open == nil {
		fl.open = map[string]*openStream{}
	}
	if len(fl.open) >= fl.max { // close the one that was not used for longest
		oldest := ""
		for p, o := range fl.open {
			if oldest == "" || o.used < fl.open[oldest].used {
				oldest = p
			}
		}
		fl.close(oldest)
	}
	o := &openStream{used: fl.clock}
	fl.open[path] = o
	return o
}

func (fl *files) close(path string) {
	if o := fl.open[path]; o != nil {
		for _, f := range []*os.File{o.data, o.index} {
			if f != nil {
				f.Close() // errors of writing back come from the checkpoint's fsync
			}
		}
		delete(fl.open, path)
	}
}

func (fl *files) closeAll() {
	for path := range fl.open {
		fl.close(path)
	}
}

func (fl *files) writeFile(f **os.File, path string, p []byte, at int64, recovery bool) error {
	if len(p) == 0 && !recovery {
		return nil
	}
	if *f == nil {
		flags := os.O_RDWR | os.O_CREATE
		if len(p) == 0 {
			flags = os.O_RDWR // to cut it off, if it is there
		}
		var err error
		if *f, err = fl.root.OpenFile(path, flags, 0o600); errors.Is(err, fs.ErrNotExist) {
			if len(p) == 0 {
				return nil
			}
			if err = fl.root.MkdirAll(path[:strings.LastIndexByte(path, '/')], 0o700); err == nil {
				*f, err = fl.root.OpenFile(path, flags, 0o600)
			}
		}
		if err != nil {
			*f = nil
			return err
		}
	}
	if len(p) > 0 {
		write := (*os.File).WriteAt
		if fl.writeAt != nil {
			write = fl.writeAt
		}
		if _, err := write(*f, p, at); err != nil {
			return err
		}
	}
	if recovery {
		return (*f).Truncate(at + int64(len(p)))
	}
	return nil
}

// remove deletes a stream's files.
func (fl *files) remove(path string) error {
	fl.close(path)
	for _, suffix := range []string{dataSuffix, indexSuffix} {
		if err := fl.root.Remove(path + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func up(path string) string { return path[:strings.LastIndexByte(path, '/')] }

// sync makes streams durable: their files and the directories above them.
func (fl *files) sync(names map[string]bool) error {
	dirs := map[string]bool{".": true}
	for name := range names {
		path := pathOf(name)
		for _, suffix := range []string{dataSuffix, indexSuffix} {
			if err := fl.syncPath(path + suffix); err != nil {
				return err
			}
		}
		for dir := path; dir != streamsDir; {
			dir = up(dir)
			dirs[dir] = true
		}
	}
	for dir := range dirs {
		if err := fl.syncPath(dir); err != nil {
			return err
		}
	}
	return nil
}

// syncPath syncs a file or directory; one that is gone needs none.
func (fl *files) syncPath(path string) error {
	if fl.noSync {
		return nil
	}
	f, err := fl.root.Open(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	defer f.Close()
	return f.Sync()
}

// scan gives every whole record of a journal file, salted so, to f. It returns false when
// the file ends in the middle of a record or in a damaged one.
func scan(r io.Reader, salt uint32, f func(*redo) error) (whole bool, err error) {
	records := record.NewReader(r, maxRedoBytes)
	records.Salt = salt
	for {
		payload, err := records.Next()
		switch {
		case errors.Is(err, io.EOF):
			return true, nil
		case errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, logstream.ErrCorrupt):
			return false, nil
		case err != nil:
			return false, err
		}
		r, err := parseRedo(payload)
		if err != nil {
			return false, err // its checksum was right: never torn
		}
		if err := f(&r); err != nil {
			return false, err
		}
	}
}

func diskError(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("filelog: %w: %w", logstream.ErrNoSpace, err)
	}
	return fmt.Errorf("filelog: %w", err)
}
