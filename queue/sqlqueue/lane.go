package sqlqueue

import (
	"context"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/queue"
)

const (
	// What goes into one transaction at most.
	maxBatchOps   = 512
	maxBatchBytes = 8 << 20
	// maxTries bounds how often something is tried again because the database
	// was busy; with backoff's pauses that is about five seconds.
	maxTries = 12
	// batchTimeout bounds one transaction, so that a dead connection is noticed.
	batchTimeout = 30 * time.Second
)

// op is one thing that a caller wants written: exactly one of publish, settle
// and task is set.
type op struct {
	publish *publication
	settle  *settlement
	task    func(ctx context.Context, tx execer) error

	done  chan struct{} // closed once err is final
	err   error
	gone  bool // its caller has left; guarded by its lane's mutex
	tries int
}

// lane is a goroutine that merges what concurrent callers want written into
// one transaction after the other (group commit). SQLite, which has one
// writer, has one lane for everything; PostgreSQL one per kind of work.
type lane struct {
	q      *Queue
	claims bool // this lane claims messages for waiting readers

	mu   sync.Mutex
	ops  []*op
	kick chan struct{}
}

func newLane(q *Queue) *lane { return &lane{q: q, kick: make(chan struct{}, 1)} }

// wake has the lane look for work.
func (l *lane) wake() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

// add queues an op. It fails once the queue is closed.
func (l *lane) add(o *op) error {
	l.mu.Lock()
	if l.q.isClosed() {
		l.mu.Unlock()
		return queue.ErrClosed
	}
	l.ops = append(l.ops, o)
	l.mu.Unlock()
	l.wake()
	return nil
}

// do queues an op and waits for it. A caller that leaves while its op waits
// takes it along, unless it is a settlement, which is applied all the same;
// what is running goes on without its caller.
func (l *lane) do(ctx context.Context, o *op) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	o.done = make(chan struct{})
	if err := l.add(o); err != nil {
		return err
	}
	select {
	case <-o.done:
		return o.err
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	o.gone = true
	return ctx.Err()
}

// take removes the next ops that fit into one transaction: one task, or as many
// others as the limits allow.
func (l *lane) take() (ops []*op) {
	l.mu.Lock()
	defer l.mu.Unlock()
	bytes, n := 0, 0
	for _, o := range l.ops {
		if o.gone && o.settle == nil {
			n++
			continue
		}
		if len(ops) > 0 && (o.task != nil || len(ops) == maxBatchOps || bytes > maxBatchBytes) {
			break
		}
		n++
		ops = append(ops, o)
		if o.publish != nil {
			bytes += o.publish.bytes
		}
		if o.task != nil {
			break
		}
	}
	clear(l.ops[:n])
	l.ops = l.ops[n:]
	return ops
}

func (l *lane) run() {
	fails := 0
	for {
		select {
		case <-l.kick:
		case <-l.q.closing:
			l.finish()
			return
		}
		for !l.q.isClosed() {
			// Whom the last batch woke comes along with what it wants next:
			// that makes batches of dozens out of batches of one.
			runtime.Gosched()
			b := &batch{q: l.q, ops: l.take()}
			b.sort()
			if l.claims {
				b.want()
			}
			if b.empty() {
				break
			}
			if err := l.execute(b); err == nil {
				fails = 0
				continue
			}
			fails++
			sleep(l.q.closing, backoff(fails))
		}
	}
}

// finish is a closing queue's last batch: settlements are still applied.
func (l *lane) finish() {
	l.mu.Lock()
	ops := l.ops
	l.ops = nil
	l.mu.Unlock()
	b := &batch{q: l.q}
	for _, o := range ops {
		if o.settle != nil {
			b.ops = append(b.ops, o)
		} else {
			o.finish(queue.ErrClosed)
		}
	}
	b.sort()
	if b.empty() {
		return
	}
	err := b.execute(l.q.work)
	for _, o := range b.ops {
		if err != nil {
			o.finish(errors.Join(queue.ErrClosed, err))
		} else {
			o.finish(o.err)
		}
	}
}

func (o *op) finish(err error) {
	o.err = err
	if o.done != nil {
		close(o.done)
	}
}

// execute runs a batch and tells its callers, or queues again what is worth
// another try.
func (l *lane) execute(b *batch) error {
	ctx, cancel := context.WithTimeout(l.q.work, batchTimeout)
	defer cancel()
	err := b.execute(ctx)
	if err == nil {
		b.committed()
		for _, o := range b.ops {
			o.finish(o.err)
		}
		return nil
	}
	b.failed()
	unknown := errors.Is(err, sqldb.ErrCommitUnknown)
	again := sqldb.IsRetryable(err) && !unknown
	var retry []*op
	for _, o := range b.ops {
		o.tries++
		switch {
		case o.settle != nil:
			// A settlement is tried for ever: given up, its message would stay
			// claimed as long as this process lives.
			o.settle.unsure = o.settle.unsure || unknown
			retry = append(retry, o)
		case again && o.tries < maxTries:
			retry = append(retry, o)
		default:
			o.finish(err)
		}
	}
	if len(retry) > 0 || len(b.ops) == 0 {
		l.q.log.Warn("queue: transaction failed, trying again", "error", err, "operations", len(b.ops))
	}
	l.mu.Lock()
	for _, o := range retry {
		o.err = nil
	}
	l.ops = append(retry, l.ops...)
	l.mu.Unlock()
	return err
}

// backoff is the pause after the given number of failures: 2 ms doubled up to
// 1 s, of which a random half is left out.
func backoff(fails int) time.Duration {
	d := min(time.Millisecond<<min(fails, 10), time.Second)
	return d/2 + rand.N(d/2+1)
}

// sleep pauses; it reports false when done ended it.
func sleep(done <-chan struct{}, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-done:
		return false
	}
}
