package amqpqueue

import (
	"fmt"
	"net"
	"sync"
	"time"
)

// lastWords is how long reading may go on once writing failed: the broker may
// have said why before it hung up.
const lastWords = time.Second

// tlsAlert begins an alert of TLS (RFC 8446, section 5.1), and no frame of AMQP.
const tlsAlert = 0x15

var errSpeaksTLS = fmt.Errorf("%w: the broker speaks it here, so the URL has to begin with amqps", ErrTLS)

// keepBuffer is the largest write buffer that is kept for reuse.
const keepBuffer = 1 << 20

// transport makes writes asynchronous. The client library writes while it holds
// locks that its other calls need and knows no contexts, so a broker that does
// not read would stop all of them; here it only stops the flusher. What waits
// in the buffer is bounded by the publisher's window and by what consumers hold.
// Writes that come while one is under way share the next system call.
type transport struct {
	net.Conn

	mu      sync.Mutex
	buf     []byte
	err     error
	readErr error
	heard   bool          // the reader's: something came
	wake    chan struct{} // capacity 1
	stopped chan struct{}
	once    sync.Once
}

func newTransport(c net.Conn) *transport {
	t := &transport{Conn: c, wake: make(chan struct{}, 1), stopped: make(chan struct{})}
	go t.flush()
	return t
}

// Write implements net.Conn.
func (t *transport) Write(p []byte) (int, error) {
	t.mu.Lock()
	if t.err != nil {
		t.mu.Unlock()
		return 0, t.err
	}
	t.buf = append(t.buf, p...)
	t.mu.Unlock()
	select {
	case t.wake <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (t *transport) flush() {
	var spare []byte
	for {
		select {
		case <-t.wake:
		case <-t.stopped:
			return
		}
		t.mu.Lock()
		out := t.buf
		t.buf = spare[:0]
		t.mu.Unlock()
		if len(out) == 0 {
			spare = out
			continue
		}
		if _, err := t.Conn.Write(out); err != nil {
			t.fail(err)
			return
		}
		if spare = out; cap(spare) > keepBuffer {
			spare = nil
		}
	}
}

// fail has later writes fail, and sees to it that the reader ends, which tells
// the library.
func (t *transport) fail(err error) {
	t.mu.Lock()
	if t.err == nil {
		t.err = err
	}
	t.buf = nil
	t.mu.Unlock()
	time.AfterFunc(lastWords, func() { _ = t.Close() })
}

// Read implements net.Conn.
func (t *transport) Read(p []byte) (int, error) {
	n, err := t.Conn.Read(p)
	if n > 0 && !t.heard {
		if t.heard = true; p[0] == tlsAlert {
			err = errSpeaksTLS
		}
	}
	if err != nil {
		t.mu.Lock()
		if t.readErr == nil {
			t.readErr = err
		}
		t.mu.Unlock()
	}
	return n, err
}

// cause is why reading ended.
func (t *transport) cause() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.readErr
}

// Close implements net.Conn. It does not wait for what is in the buffer.
func (t *transport) Close() error {
	var err error
	t.once.Do(func() {
		close(t.stopped)
		t.mu.Lock()
		if t.err == nil {
			t.err = net.ErrClosed
		}
		t.mu.Unlock()
		err = t.Conn.Close()
	})
	return err
}
