package filelog

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"sync"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logstream/internal/record"
)

const journalDir = "journal"

// journal makes changes durable, in groups: one goroutine takes whatever is
// queued, writes it to the journal file, syncs that once, writes the streams'
// own files and tells those who wait. While it does, the next group gathers.
type journal struct {
	o     Options
	files *files
	log   *slog.Logger

	mu     sync.Mutex
	queue  []*commit
	wake   chan struct{} // one token: the queue is not empty, or closing
	ending bool
	broken error         // after a failed fsync nothing is known: refuse all
	done   chan struct{} // the goroutine has ended
	pause  func()        // tests hold the goroutine between two groups, once

	// The rest belongs to the goroutine.
	seq       uint64
	salt      uint32 // of the current file's records
	recycled  bool   // the current file has older records behind its own
	f         *os.File
	w         *bufio.Writer
	size      int64
	dirty     map[string]bool // streams named in the current file
	unapplied int             // streams whose files lack what the journal holds
	ckpt      chan error      // of the checkpoint under way, if any
	sync      func(*os.File) error
}

// maxGroupBytes bounds a group, and with it how long the first waits.
const maxGroupBytes = 8 << 20

// gatherBytes of small records are one write; larger ones are not copied for it.
const gatherBytes = 32 << 10

func openJournal(fl *files, o Options) (*journal, error) {
	j := &journal{o: o, files: fl, log: o.Logger, wake: make(chan struct{}, 1), done: make(chan struct{}), dirty: map[string]bool{}, sync: syncData}
	if o.NoSync {
		j.sync = func(*os.File) error { return nil }
	}
	for _, dir := range []string{journalDir, streamsDir} {
		if err := fl.root.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	if err := fl.syncPath("."); err != nil {
		return nil, err
	}
	if err := j.recover(); err != nil {
		return nil, err
	}
	if err := j.create(j.seq + 1); err != nil {
		return nil, err
	}
	go j.run()
	return j, nil
}

// spare is a journal file that is not needed any more and will be written over:
// a sync is cheaper where the file does not grow. Its records are told from newer
// ones by their salt, which differs from file to file.
const spare = journalDir + "/spare"

func saltOf(seq uint64) uint32 { return uint32(seq) }

func segmentPath(seq uint64) string { return fmt.Sprintf("%s/%016x", journalDir, seq) }

// recover redoes every journal file in order, syncs, and removes them.
func (j *journal) recover() error {
	d, err := j.files.root.Open(journalDir)
	if err != nil {
		return err
	}
	names, err := d.Readdirnames(-1)
	d.Close()
	if err != nil {
		return err
	}
	var seqs []uint64
	for _, name := range names {
		if seq, err := strconv.ParseUint(name, 16, 64); err == nil {
			seqs = append(seqs, seq)
		}
	}
	slices.Sort(seqs)
	torn := false
	for _, seq := range seqs {
		if err := j.redoFile(seq, &torn); err != nil {
			return err
		}
		j.seq = seq
	}
	j.files.closeAll()
	if err := j.files.sync(j.dirty); err != nil {
		return err
	}
	j.dirty = map[string]bool{}
	for _, seq := range seqs {
		if err := j.remove(seq); err != nil {
			return err
		}
	}
	return j.dropSpare()
}

func (j *journal) redoFile(seq uint64, torn *bool) error {
	f, err := j.files.root.Open(segmentPath(seq))
	if err != nil {
		return err
	}
	defer f.Close()
	whole, err := scan(bufio.NewReaderSize(f, 256<<10), saltOf(seq), func(r *redo) error {
		if *torn { // a file is complete before the next one is begun
			return fmt.Errorf("%w: journal file before %s", logstream.ErrCorrupt, segmentPath(seq))
		}
		j.dirty[r.name] = true
		if err := j.files.apply(r, true); err != nil {
			return diskError(err)
		}
		return nil
	})
	*torn = *torn || !whole
	return err
}

// remove takes a journal file away for good before the next one may go: redoing
// an old one without its successors would cut streams short.
func (j *journal) remove(seq uint64) error {
	if err := j.files.root.Remove(segmentPath(seq)); err != nil {
		return err
	}
	return j.files.syncPath(journalDir)
}

// retire makes a journal file the spare one, as finally as remove.
func (j *journal) retire(seq uint64) error {
	if err := j.files.root.Rename(segmentPath(seq), spare); err != nil {
		return err
	}
	return j.files.syncPath(journalDir)
}

func (j *journal) dropSpare() error {
	if err := j.files.root.Remove(spare); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// create begins a journal file, in the spare one if there is one.
func (j *journal) create(seq uint64) error {
	flags := os.O_WRONLY
	err := j.files.root.Rename(spare, segmentPath(seq))
	recycled := err == nil
	if errors.Is(err, fs.ErrNotExist) {
		flags, err = os.O_WRONLY|os.O_CREATE|os.O_EXCL, nil
	}
	if err != nil {
		return err
	}
	f, err := j.files.root.OpenFile(segmentPath(seq), flags, 0o600)
	if err != nil {
		return err
	}
	if err := j.files.syncPath(journalDir); err != nil {
		f.Close()
		return err
	}
	j.f, j.seq, j.salt, j.recycled, j.size = f, seq, saltOf(seq), recycled, 0
	j.w = bufio.NewWriterSize(f, gatherBytes)
	return nil
}

func (j *journal) submit(c *commit) {
	j.mu.Lock()
	j.queue = append(j.queue, c)
	j.mu.Unlock()
	j.poke()
}

func (j *journal) poke() {
	select {
	case j.wake <- struct{}{}:
	default:
	}
}

// close commits what is queued and checkpoints.
func (j *journal) close() error {
	j.mu.Lock()
	j.ending = true
	j.mu.Unlock()
	j.poke()
	<-j.done
	j.files.closeAll()
	err := j.waitCheckpoint()
	if err == nil && j.broken == nil && j.unapplied == 0 {
		if err = j.files.sync(j.dirty); err == nil {
			err = errors.Join(j.remove(j.seq), j.dropSpare())
		}
	}
	return errors.Join(err, j.f.Close())
}

func (j *journal) run() {
	defer close(j.done)
	for {
		<-j.wake
		for {
			group, ending := j.take()
			if len(group) == 0 {
				if ending {
					return
				}
				break
			}
			j.commit(group)
			j.rotate()
			j.mu.Lock()
			pause := j.pause
			j.pause = nil
			j.mu.Unlock()
			if pause != nil {
				pause()
			}
		}
	}
}

func (j *journal) take() (group []*commit, ending bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	n, bytes := 0, 0
	for n < len(j.queue) && (n == 0 || bytes+len(j.queue[n].rec) <= maxGroupBytes) {
		bytes += len(j.queue[n].rec)
		n++
	}
	group = j.queue[:n:n]
	j.queue = j.queue[n:]
	if len(j.queue) == 0 {
		j.queue = nil
	}
	return group, j.ending
}

func (j *journal) commit(group []*commit) {
	err := j.write(group)
	for _, c := range group {
		c.err = err
		if err == nil {
			j.apply(c)
		}
		st, store := c.st, c.store
		close(c.done)
		<-st.turn
		store.release(st)
	}
}

// write makes a group durable, or nothing of it.
func (j *journal) write(group []*commit) error {
	if j.broken != nil {
		return j.broken
	}
	size := j.size
	var err error
	for _, c := range group {
		if c.retry || err != nil {
			continue
		}
		record.Salt(c.rec, j.salt)
		_, err = j.w.Write(c.rec)
		size += int64(len(c.rec))
	}
	if size == j.size {
		return nil // only retries
	}
	if err == nil {
		err = j.w.Flush()
	}
	if err != nil { // most likely a full disk: take back what got there
		j.w.Reset(j.f)
		terr := j.f.Truncate(j.size)
		if terr == nil {
			_, terr = j.f.Seek(j.size, 0)
		}
		if terr != nil {
			j.broken = fmt.Errorf("filelog: journal is broken, reopen the store: %w", errors.Join(err, terr))
		}
		return diskError(err)
	}
	if err := j.sync(j.f); err != nil {
		// The kernel may have dropped the pages: nobody knows what is on disk.
		j.broken = fmt.Errorf("filelog: journal is broken, reopen the store: %w", err)
		j.log.Error("journal cannot be synced", "error", err)
		return j.broken
	}
	j.size = size
	return nil
}

// apply writes a durable change to the stream's files and makes it visible.
func (j *journal) apply(c *commit) {
	st := c.st
	pending := append(st.unapplied, c)
	if len(st.unapplied) > 0 {
		j.unapplied--
	}
	st.unapplied = nil
	for i, p := range pending {
		if p.retry {
			continue
		}
		j.dirty[st.name] = true
		if err := j.files.apply(&p.redo, false); err != nil {
			// The journal has it; the next call on the stream tries again.
			c.err = diskError(err)
			for _, p := range pending[i:] {
				if !p.retry {
					st.unapplied = append(st.unapplied, p)
				}
			}
			j.unapplied++
			return
		}
		<-p.hashed
		st.sum = p.sum
		if p.remove {
			p.store.forget(st)
		}
		st.set(p.next, p.remove)
		p.free()
	}
}

// rotate begins a new journal file when the current one is full, and has the
// old one checkpointed in the background; one at a time.
func (j *journal) rotate() {
	if j.size < j.o.JournalBytes || j.unapplied > 0 || j.broken != nil {
		return
	}
	if err := j.waitCheckpoint(); err != nil {
		j.broken = fmt.Errorf("filelog: checkpoint failed, reopen the store: %w", err)
		j.log.Error("checkpoint failed", "error", err)
		return
	}
	if j.recycled { // a file is complete before the next one is begun
		err := j.f.Truncate(j.size)
		if err == nil {
			err = j.sync(j.f)
		}
		if err != nil {
			j.broken = fmt.Errorf("filelog: journal is broken, reopen the store: %w", err)
			j.log.Error("journal cannot be completed", "error", err)
			return
		}
		j.recycled = false
	}
	old, oldSeq, names := j.f, j.seq, j.dirty
	if err := j.create(j.seq + 1); err != nil {
		j.log.Warn("no new journal file, going on with the old one", "error", err)
		// A file that was created but not synced must not be found in the way.
		_ = j.files.root.Remove(segmentPath(oldSeq + 1))
		return
	}
	j.dirty = map[string]bool{}
	done := make(chan error, 1)
	j.ckpt = done
	go func() {
		err := errors.Join(j.files.sync(names), old.Close())
		if err == nil {
			err = j.retire(oldSeq)
		}
		done <- err
	}()
}

func (j *journal) waitCheckpoint() error {
	if j.ckpt == nil {
		return nil
	}
	err := <-j.ckpt
	j.ckpt = nil
	return err
}
