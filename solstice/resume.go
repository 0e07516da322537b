package solstice

import (
	"maps"
	"slices"
	"sync"

	"github.com/solstice-ci/solstice-go/internal/store"
)

// A point is up to where a journal is stored.
type point struct {
	seq   int64
	size  int64               // of the log
	steps map[int]*store.Step // that changed since the last one
}

// resume moves the attempt's resume point behind what a session stores, and
// acknowledges it, while the session stores what comes next: points that gather
// meanwhile are one transaction.
type resume struct {
	s      *session
	failed chan error // buffered: of the first transaction that failed; none follows it

	mu    sync.Mutex
	next  *point        // to be made durable
	idle  chan struct{} // closed when nothing is left to do
	acked int64         // what is
	err   error
}

func newResume(s *session) *resume {
	r := &resume{s: s, failed: make(chan error, 1), idle: make(chan struct{})}
	close(r.idle)
	return r
}

// put has a later point made durable. It copies the steps, which may change.
func (r *resume) put(seq, size int64, steps []*store.Step) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return // the session is about to end
	}
	if r.next == nil {
		r.next = &point{steps: map[int]*store.Step{}}
	}
	r.next.seq, r.next.size = seq, size
	for _, st := range steps {
		c := *st
		r.next.steps[st.Idx] = &c
	}
	select {
	case <-r.idle:
		r.idle = make(chan struct{})
		go r.run()
	default:
	}
}

// wait returns when all points are durable, or one failed.
func (r *resume) wait() error {
	r.mu.Lock()
	idle := r.idle
	r.mu.Unlock()
	<-idle // each transaction has a bound
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// durable is the last event that may be acknowledged.
func (r *resume) durable() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.acked
}

// moved notes what is durable.
func (r *resume) moved(seq int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.acked = seq
}

func (r *resume) run() {
	for {
		r.mu.Lock()
		p := r.next
		r.next = nil
		if p == nil || r.err != nil {
			close(r.idle)
			r.mu.Unlock()
			return
		}
		r.mu.Unlock()
		if err := r.commit(p); err != nil {
			r.mu.Lock()
			r.err = err
			r.mu.Unlock()
			r.failed <- err
		}
	}
}

func (r *resume) commit(p *point) error {
	s := r.s
	ctx, cancel := s.bounded()
	defer cancel()
	steps := slices.Collect(maps.Values(p.steps))
	if err := s.e.store.Progress(ctx, *s.ref.Load(), p.seq, p.size, steps); err != nil {
		return err
	}
	if len(steps) > 0 {
		s.e.hub.notify(s.attempt.ID)
		s.e.hub.notify(s.run.ID)
	}
	r.moved(p.seq)
	_ = s.ack() // a stream that is broken ends the session by itself
	return nil
}
