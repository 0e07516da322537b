package filelog

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logstream/internal/record"
)

// stream is what is kept in memory of a stream in use.
type stream struct {
	name string
	path string // of its files, without their suffix
	refs int    // guarded by Store.mu

	// turn is held by whoever changes the stream, until the change is
	// committed. state may be read with the turn, and written only by the
	// journal's goroutine, under mu.
	turn      chan struct{}
	sum       hash.Hash // of all bytes; nil: not known. Needs the turn.
	unapplied []*commit // durable in the journal, but the files had no room. Needs the turn.

	mu      sync.Mutex
	loaded  bool
	state   state
	deleted bool          // this stream is gone; the name may live on in another
	changed chan struct{} // closed and replaced with every change
}

// state is what the two files say.
type state struct {
	exists    bool
	size      int64
	indexSize int64
	epoch     int64
	sealed    bool
	sha256    []byte
}

const (
	dataSuffix  = "~log"
	indexSuffix = "~idx"
	streamsDir  = "streams"
)

// pathOf is where a stream's files are, without their suffix: flat, since a
// directory costs as much as a file, in one of 256 directories that stay. Names
// are kept apart where case is folded.
func pathOf(name string) string {
	sum := sha256.Sum256([]byte(name))
	var b strings.Builder
	fmt.Fprintf(&b, "%s/%02x/", streamsDir, sum[0])
	if len(name) > maxPlainName {
		fmt.Fprintf(&b, "=%x", sum)
		return b.String()
	}
	for i := range len(name) {
		switch c := name[i]; {
		case 'A' <= c && c <= 'Z':
			b.WriteByte('+')
			b.WriteByte(c + 'a' - 'A')
		case c == '/':
			b.WriteByte('=')
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

// maxPlainName is the longest name that is a file's name as well, which may
// have 255 bytes: twice as many for capitals, and the suffix.
const maxPlainName = 120

// maxIdle is how many unsealed streams nobody uses are remembered, which saves
// hashing them again at their seal.
const maxIdle = 1024

func (s *Store) acquire(name string) *stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.streams[name]
	if st == nil {
		st = &stream{name: name, path: pathOf(name), turn: make(chan struct{}, 1), changed: make(chan struct{})}
		s.streams[name] = st
	}
	st.refs++
	return st
}

func (s *Store) retain(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st.refs++
}

func (s *Store) release(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st.refs--; st.refs > 0 || s.streams[st.name] != st || len(st.unapplied) > 0 {
		return
	}
	if st.sum == nil || st.state.sealed || len(s.streams) > maxIdle {
		delete(s.streams, st.name)
	}
}

// forget makes the name free for another stream.
func (s *Store) forget(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.streams[st.name] == st {
		delete(s.streams, st.name)
	}
}

// look returns the state and a channel that is closed when it changes.
func (st *stream) look() (cur state, deleted bool, changed <-chan struct{}) {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.state, st.deleted, st.changed
}

func (st *stream) isDeleted() bool {
	_, deleted, _ := st.look()
	return deleted
}

func (st *stream) set(next state, deleted bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.state, st.deleted = next, deleted
	close(st.changed)
	st.changed = make(chan struct{})
}

// The index: records of one kind byte and what follows it.
const (
	kindHeader = 'h' // version, stream name
	kindEpoch  = 'e' // uvarint
	kindMarks  = 'm' // record.AppendMarks
	kindSeal   = 's' // uvarint size, SHA-256

	indexVersion  = 1
	maxIndexBytes = 64 << 20 // of one payload
)

func marksPayload(marks []logstream.Mark) []byte {
	return record.AppendMarks([]byte{kindMarks}, marks)
}

func sealPayload(size int64, sum []byte) []byte {
	return append(binary.AppendUvarint([]byte{kindSeal}, uint64(size)), sum...)
}

// load reads a stream's state from its files, once.
func (s *Store) load(st *stream) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.loaded || st.deleted {
		return nil
	}
	cur, err := readState(s.root, st.path, st.name)
	if err != nil {
		return fmt.Errorf("filelog: stream %s: %w", st.name, err)
	}
	if cur.size == 0 && !cur.sealed {
		st.sum = sha256.New()
	}
	st.state, st.loaded = cur, true
	return nil
}

func readState(root *os.Root, path, name string) (cur state, err error) {
	idx, err := root.Open(path + indexSuffix)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return state{}, nil
		}
		return state{}, err
	}
	defer idx.Close()
	switch info, err := root.Stat(path + dataSuffix); {
	case err == nil:
		cur.size = info.Size()
	case !errors.Is(err, fs.ErrNotExist): // no bytes, no file
		return state{}, err
	}
	err = cur.parseIndex(bufio.NewReaderSize(idx, 64<<10), name)
	return cur, err
}

// parseIndex takes the state but for the size from an index.
func (cur *state) parseIndex(r io.Reader, name string) error {
	corrupt := func(why string) error { return fmt.Errorf("%w: index: %s", logstream.ErrCorrupt, why) }
	records := record.NewReader(r, maxIndexBytes)
	for first := true; ; first = false {
		payload, err := records.Next()
		switch {
		case errors.Is(err, io.EOF) && first:
			return corrupt("empty")
		case errors.Is(err, io.EOF):
			cur.exists = true
			return nil
		case errors.Is(err, io.ErrUnexpectedEOF):
			return corrupt("cut short")
		case err != nil:
			return err
		case first != (payload[0] == kindHeader):
			return corrupt("header")
		case cur.sealed:
			return corrupt("a record after the seal")
		}
		cur.indexSize += int64(record.HeaderSize + len(payload))
		switch body := payload[1:]; payload[0] {
		case kindHeader:
			if len(body) == 0 || body[0] != indexVersion || string(body[1:]) != name {
				return corrupt("of another version or stream")
			}
		case kindEpoch:
			epoch, n := binary.Uvarint(body)
			if n != len(body) || int64(epoch) <= cur.epoch {
				return corrupt("epoch")
			}
			cur.epoch = int64(epoch)
		case kindMarks:
			if marks, err := record.ParseMarks(body); err != nil {
				return err
			} else if len(marks) > 0 && marks[len(marks)-1].Offset >= cur.size {
				return corrupt("a mark beyond the end")
			}
		case kindSeal:
			size, n := binary.Uvarint(body)
			if n <= 0 || len(body)-n != sha256.Size || int64(size) != cur.size {
				return corrupt("seal")
			}
			cur.sealed, cur.sha256 = true, append([]byte(nil), body[n:]...)
		default:
			return corrupt(fmt.Sprintf("a record of kind %q", payload[0]))
		}
	}
}

// commit is one change of one stream on its way to the disk.
type commit struct {
	store *Store
	st    *stream
	next  state
	data  []byte // to add to the data file at st.state.size
	idx   []byte // to add to the index at st.state.indexSize
	sum   hash.Hash

	hashed chan struct{} // closed when sum has the data

	remove bool // delete the stream
	retry  bool // apply what could not be applied before

	redo redo   // what the journal holds
	rec  []byte // encoded
	done chan struct{}
	err  error
}

// newCommit begins a change by the given epoch.
func (st *stream) newCommit(epoch int64) *commit {
	c := &commit{st: st, next: st.state, sum: st.sum}
	if !c.next.exists {
		c.next.exists = true
		c.index(append([]byte{kindHeader, indexVersion}, st.name...))
	}
	if epoch > c.next.epoch {
		c.next.epoch = epoch
		c.index(binary.AppendUvarint([]byte{kindEpoch}, uint64(epoch)))
	}
	return c
}

func (c *commit) index(payload []byte) {
	c.idx = record.Append(c.idx, payload)
	c.next.indexSize = c.st.state.indexSize + int64(len(c.idx))
}
