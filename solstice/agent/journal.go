package agent

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
)

const (
	defaultLogBytes = 256 << 20
	minLogBytes     = 4 << 10 // the truncation mark has to fit
	defaultMaxBatch = 256 << 10
	minMaxBatch     = 4 << 10
	maxLogChunk     = 32<<10 - eventOverhead
	// A batch is full at batchTarget, unless one event alone is larger: small
	// enough to get through connections that break again and again. It grows
	// with what a stream has brought home, up to batchMost.
	batchTarget = 32 << 10
	batchMost   = 256 << 10
	// holdBack is how long an output is held back, for each piece of it, while
	// the journal's memory is full: a server that keeps up makes room by then,
	// and only the log of a job whose server does not is written to disk.
	holdBack         = 100 * time.Millisecond
	eventOverhead    = 512 // what an event is around its data, generously
	truncatedByQuota = "quota"
)

// A journal is everything an attempt has to say: events in one sequence, spooled
// until they are acknowledged. It is safe for concurrent use.
type journal struct {
	maxBatch int    // bytes of an encoded EventBatch
	quota    int64  // bytes of log stored
	mark     string // the line that says so
	now      func() time.Time
	onError  func(error) // called once, when the disk fails
	ready    chan struct{}
	released chan struct{} // one token: something was acknowledged
	done     chan struct{} // closed when the last event is acknowledged

	mu       sync.Mutex
	spool    *spool
	offset   int64 // bytes of log stored
	hash     hash.Hash
	midLine  bool  // the log does not end with a newline
	printed  int64 // bytes the job printed
	cutAt    int64 // what printed was when the first byte was dropped, or -1
	cutWhy   string
	acked    int64
	progress time.Time // of the last ack that moved, or of the last event
	finished bool
	failed   bool
}

// newJournal begins a journal, of which room bytes are kept in memory and the
// rest in dir. Should the disk refuse, the journal goes
// on in memory, keeps no log, and onError is called.
func newJournal(dir string, room, maxBatch int, quota int64, onError func(error)) *journal {
	if quota <= 0 {
		quota = defaultLogBytes
	}
	quota = max(quota, minLogBytes)
	j := &journal{
		maxBatch: max(maxBatch, minMaxBatch), quota: quota,
		mark: fmt.Sprintf("[solstice] log truncated: quota of %s reached\n", formatSize(quota)),
		now:  time.Now, onError: onError,
		ready: make(chan struct{}, 1), released: make(chan struct{}, 1), done: make(chan struct{}),
		hash: sha256.New(), cutAt: -1, progress: time.Now(),
	}
	if maxBatch <= 0 {
		j.maxBatch = defaultMaxBatch
	}
	s, err := newSpool(dir, room)
	s.err = err
	j.spool = s
	if err != nil {
		j.mu.Lock()
		defer j.mu.Unlock()
		j.fail(err)
	}
	return j
}

// chunk is how many bytes of log go into one event.
func (j *journal) chunk() int { return min(maxLogChunk, j.maxBatch-eventOverhead) }

// eventRoom is how large an event's own data may be.
func (j *journal) eventRoom() int { return j.maxBatch - eventOverhead }

// room waits until n bytes of log fit into memory, within reason.
func (j *journal) room(n int) {
	var late <-chan time.Time
	for {
		j.mu.Lock()
		full := j.cutAt < 0 && !j.finished && j.spool.fills(n+n/8+eventOverhead)
		j.mu.Unlock()
		if !full {
			return
		}
		if late == nil {
			t := time.NewTimer(holdBack)
			defer t.Stop()
			late = t.C
		}
		select {
		case <-j.released:
		case <-late:
			return
		}
	}
}

// log records what a step printed, of which one call is at a time.
func (j *journal) log(step int32, fd agentv1.Fd, p []byte) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.finished {
		return
	}
	start := j.printed
	j.printed += int64(len(p))
	if j.cutAt >= 0 {
		return
	}
	room := j.quota - int64(len(j.mark)) - 1 - j.offset
	kept := p[:min(int64(len(p)), max(room, 0))]
	if n, err := j.store(step, fd, kept); err != nil {
		j.cut(start+int64(n), "journal spool: "+err.Error())
		return
	}
	if len(kept) < len(p) {
		j.cut(start+int64(len(kept)), truncatedByQuota)
		mark := j.mark
		if j.midLine {
			mark = "\n" + mark
		}
		_, _ = j.store(step, fd, []byte(mark)) // a failing disk has its own event
	}
}

func (j *journal) cut(at int64, why string) {
	if j.cutAt < 0 {
		j.cutAt, j.cutWhy = at, why
	}
}

// store appends bytes to the log and says how many were.
func (j *journal) store(step int32, fd agentv1.Fd, p []byte) (n int, err error) {
	for n < len(p) {
		c := p[n:min(n+j.chunk(), len(p))]
		err := j.add(&agentv1.Event{Event: &agentv1.Event_Log{Log: &agentv1.Log{
			Step: step, Fd: fd, LogOffset: j.offset, Data: c,
		}}}, false)
		if err != nil {
			return n, err
		}
		j.offset += int64(len(c))
		j.hash.Write(c)
		j.midLine = c[len(c)-1] != '\n'
		n += len(c)
	}
	return n, nil
}

// event records anything but log bytes.
func (j *journal) event(e *agentv1.Event) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if !j.finished {
		_ = j.add(e, true) // kept in memory where the disk fails, and said to onError
	}
}

// finish records the end; nothing is recorded after it. f gets the log's size
// and hash.
func (j *journal) finish(f *agentv1.JobFinished) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.finished {
		return
	}
	if j.cutAt >= 0 {
		_ = j.add(&agentv1.Event{Event: &agentv1.Event_Truncated{Truncated: &agentv1.Truncated{
			From: j.cutAt, To: j.printed, Reason: j.cutWhy,
		}}}, true)
	}
	f.LogSize, f.LogSha256 = j.offset, j.hash.Sum(nil)
	_ = j.add(&agentv1.Event{Event: &agentv1.Event_JobFinished{JobFinished: f}}, true)
	j.finished = true
	j.progress = j.now()
}

// add spools an event under the next number.
func (j *journal) add(e *agentv1.Event, vital bool) error {
	e.Seq = j.spool.last + 1
	e.TimeMicros = j.now().UnixMicro()
	rec, err := proto.Marshal(e)
	if err != nil {
		return fmt.Errorf("agent: encode event: %w", err)
	}
	err = j.spool.append(rec, vital)
	if err != nil {
		j.fail(err)
	}
	if err == nil || vital {
		select {
		case j.ready <- struct{}{}:
		default:
		}
	}
	return err
}

func (j *journal) fail(err error) {
	if !j.failed {
		j.failed = true
		j.onError(err)
	}
}

// ack releases the events up to seq.
func (j *journal) ack(seq int64) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if seq > j.spool.last {
		return fmt.Errorf("%w: event %d acknowledged, %d written", ErrProtocol, seq, j.spool.last)
	}
	if seq <= j.acked {
		return nil
	}
	j.acked, j.progress = seq, j.now()
	j.spool.release(seq)
	select {
	case j.released <- struct{}{}:
	default:
	}
	if j.finished && seq == j.spool.last {
		close(j.done)
	}
	return nil
}

// bounds are the lowest event kept and the highest written, 0 when there is none.
func (j *journal) bounds() (first, last int64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	last = j.spool.last
	if j.acked < last {
		first = j.acked + 1
	}
	return first, last
}

// idle is how long the server has left the end of the job unacknowledged.
func (j *journal) idle() time.Duration {
	j.mu.Lock()
	defer j.mu.Unlock()
	if !j.finished {
		return 0
	}
	return j.now().Sub(j.progress)
}

func (j *journal) remove() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.spool.remove()
}

// formatSize renders bytes in binary units, exactly.
func formatSize(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	i := 0
	for i < len(units)-1 && n >= 1024 && n%1024 == 0 {
		n, i = n/1024, i+1
	}
	return fmt.Sprintf("%d %s", n, units[i])
}

// logWriter is an io.Writer into the log of a step.
type logWriter struct {
	j    *journal
	step int32
	fd   agentv1.Fd
}

func (w logWriter) Write(p []byte) (int, error) {
	w.j.log(w.step, w.fd, p)
	return len(p), nil
}
