package agent

import (
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"
)

const (
	pumpBuffer = 256 << 10
	// flushEvery is how long a busy output is gathered: a line is seen within
	// it, and the rate of events per output is bounded by it.
	flushEvery = 5 * time.Millisecond
	// outputGrace is how long an output that outlives its step is waited for.
	outputGrace = time.Second
	// drainLimit bounds what is taken from a pipe at the very end: the most
	// that a pipe holds by default for an unprivileged user on Linux, see pipe(7).
	drainLimit = 1 << 20
)

// A pump moves what a process prints into a sink, in pieces of at most
// pumpBuffer: at once when the output is idle, gathered when it is busy.
type pump struct {
	r     *os.File
	sink  func([]byte)
	ended chan struct{}
	open  bool // the pipe is still held by somebody; valid once ended

	mu      sync.Mutex
	cutoff  time.Time // when reading ends; zero: at the end of file
	flushAt time.Time
}

func startPump(r *os.File, sink func([]byte), spawn func(func())) *pump {
	p := &pump{r: r, sink: sink, ended: make(chan struct{})}
	spawn(p.run)
	return p
}

// finish is called when the main process has ended: the rest of the output is
// waited for, but not for ever.
func (p *pump) finish() {
	p.mu.Lock()
	p.cutoff = time.Now().Add(outputGrace)
	p.arm()
	p.mu.Unlock()
	<-p.ended
}

// arm sets the deadline of the read under way; p.mu is held.
func (p *pump) arm() {
	d := p.cutoff
	if !p.flushAt.IsZero() && (d.IsZero() || p.flushAt.Before(d)) {
		d = p.flushAt
	}
	_ = p.r.SetReadDeadline(d) // pipes have deadlines wherever the agent runs
}

func (p *pump) setFlush(at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.flushAt = at
	p.arm()
}

func (p *pump) cutOff() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.cutoff.IsZero() && !time.Now().Before(p.cutoff)
}

func (p *pump) run() {
	defer close(p.ended)
	var (
		buf   = make([]byte, pumpBuffer)
		used  int
		last  time.Time // of the last flush
		timed bool      // a flush is due
	)
	flush := func() {
		if used > 0 {
			p.sink(buf[:used])
			used, last = 0, time.Now()
		}
		if timed {
			timed = false
			p.setFlush(time.Time{})
		}
	}
	for {
		n, err := p.r.Read(buf[used:])
		used += n
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			flush()
			if p.cutOff() {
				p.open = !p.drain(buf)
				return
			}
		case err != nil:
			flush()
			return
		case used == len(buf), time.Since(last) >= flushEvery:
			flush()
		case !timed:
			timed = true
			p.setFlush(last.Add(flushEvery))
		}
	}
}

// drain takes what is in the pipe now, without waiting, and says whether that
// was its end.
func (p *pump) drain(buf []byte) (eof bool) {
	_ = p.r.SetReadDeadline(time.Time{})
	raw, err := p.r.SyscallConn()
	if err != nil {
		return false
	}
	for total := 0; total < drainLimit; {
		var n int
		var rerr error
		if err := raw.Read(func(fd uintptr) bool {
			n, rerr = syscall.Read(int(fd), buf)
			return true
		}); err != nil {
			return false
		}
		switch {
		case errors.Is(rerr, syscall.EINTR):
			continue
		case rerr != nil:
			return false
		case n == 0:
			return true
		}
		p.sink(buf[:n])
		total += n
	}
	return false
}

// discard keeps an output flowing that nobody records any more, so that its
// writers neither block nor break; it ends when the pipe is closed.
func discard(r *os.File) { _, _ = io.Copy(io.Discard, r) }
