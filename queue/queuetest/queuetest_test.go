package queuetest_test

import (
	"context"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/memqueue"
	"github.com/solstice-ci/solstice-go/queue/queuetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// disk stands for storage that several handles share: the memory of one queue.
type disk struct {
	*memqueue.Queue
	mu      sync.Mutex
	handles int
}

// handle is a queue that closes only what was opened through it, so that a
// memory queue can play the durable driver with several processes.
type handle struct {
	*disk
	faults
	once   sync.Once
	closed chan struct{}
	mu     sync.Mutex
	subs   []queue.Subscription
}

// faults are the promises that a handle breaks, each by one deviation.
type faults struct {
	publish    func(ctx context.Context, h *handle, topic string, msgs []queue.Message) error
	subscribe  func(ctx context.Context, h *handle, topic string, o queue.SubscribeOptions) (queue.Subscription, error)
	next       func(ctx context.Context, s *reader) (queue.Delivery, error)
	closeSub   func(s *reader) error
	ack        func(ctx context.Context, d *delivery) error
	nack       func(ctx context.Context, d *delivery, o queue.NackOptions) error
	message    func(d *delivery) queue.Message
	attempt    func(d *delivery) int
	letters    func(ls []queue.DeadLetter) []queue.DeadLetter
	replay     func(ctx context.Context, h *handle, topic, group string, ids []string) (int, error)
	closeQueue func(h *handle) error
	forgets    bool // reopening or a second handle finds nothing
	hides      bool // DeadLetterer is not reachable although declared
}

func open(f faults, d *disk) *handle {
	if d == nil || f.forgets {
		d = &disk{Queue: memqueue.New()}
	}
	d.mu.Lock()
	d.handles++
	d.mu.Unlock()
	return &handle{disk: d, faults: f, closed: make(chan struct{})}
}

func (h *handle) As(target any) bool {
	p, ok := target.(*queue.DeadLetterer)
	if ok && !h.hides {
		*p = h
		return true
	}
	return false
}

func (h *handle) Capabilities() queue.Capabilities {
	return queue.Capabilities{Durable: true, MultiProcess: true, Delay: 5 * time.Millisecond, DeadLetters: true}
}

func (h *handle) ended() error {
	select {
	case <-h.closed:
		return queue.ErrClosed
	default:
		return nil
	}
}

func (h *handle) Publish(ctx context.Context, topic string, msgs []queue.Message, _ queue.PublishOptions) error {
	if err := h.ended(); err != nil && h.closeQueue == nil {
		return err
	}
	if h.publish != nil {
		return h.publish(ctx, h, topic, msgs)
	}
	return h.disk.Publish(ctx, topic, msgs, queue.PublishOptions{})
}

func (h *handle) Subscribe(ctx context.Context, topic string, o queue.SubscribeOptions) (queue.Subscription, error) {
	if err := h.ended(); err != nil {
		return nil, err
	}
	subscribe := h.subscribe
	if subscribe == nil {
		subscribe = func(ctx context.Context, h *handle, topic string, o queue.SubscribeOptions) (queue.Subscription, error) {
			return h.disk.Subscribe(ctx, topic, o)
		}
	}
	sub, err := subscribe(ctx, h, topic, o)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.subs = append(h.subs, sub)
	return &reader{Subscription: sub, h: h}, nil
}

func (h *handle) Close() error {
	if h.closeQueue != nil {
		return h.closeQueue(h)
	}
	return h.end()
}

func (h *handle) end() error {
	h.once.Do(func() {
		close(h.closed)
		h.mu.Lock()
		for _, s := range h.subs {
			_ = s.Close() // a memory queue's never fails
		}
		h.mu.Unlock()
	})
	return nil
}

func (h *handle) DeadLetters(ctx context.Context, topic, group string, limit int) ([]queue.DeadLetter, error) {
	if err := h.ended(); err != nil {
		return nil, err
	}
	ls, err := h.disk.DeadLetters(ctx, topic, group, limit)
	if h.letters != nil {
		ls = h.letters(ls)
	}
	return ls, err
}

func (h *handle) Replay(ctx context.Context, topic, group string, ids ...string) (int, error) {
	if h.replay != nil {
		return h.replay(ctx, h, topic, group, ids)
	}
	return h.disk.Replay(ctx, topic, group, ids...)
}

type reader struct {
	queue.Subscription
	h *handle
}

func (s *reader) Next(ctx context.Context) (queue.Delivery, error) {
	if s.h.next != nil {
		return s.h.next(ctx, s)
	}
	return s.receive(ctx)
}

func (s *reader) receive(ctx context.Context) (queue.Delivery, error) {
	d, err := s.Subscription.Next(ctx)
	if err != nil {
		return nil, err
	}
	return &delivery{Delivery: d, s: s}, nil
}

func (s *reader) Close() error {
	if s.h.closeSub != nil {
		return s.h.closeSub(s)
	}
	return s.Subscription.Close()
}

type delivery struct {
	queue.Delivery
	s *reader
}

func (d *delivery) Ack(ctx context.Context) error {
	if d.s.h.ack != nil {
		return d.s.h.ack(ctx, d)
	}
	return d.Delivery.Ack(ctx)
}

func (d *delivery) Nack(ctx context.Context, o queue.NackOptions) error {
	if d.s.h.nack != nil {
		return d.s.h.nack(ctx, d, o)
	}
	return d.Delivery.Nack(ctx, o)
}

func (d *delivery) Message() queue.Message {
	if d.s.h.message != nil {
		return d.s.h.message(d)
	}
	return d.Delivery.Message()
}

func (d *delivery) Attempt() int {
	if d.s.h.attempt != nil {
		return d.s.h.attempt(d)
	}
	return d.Delivery.Attempt()
}

func harness(f faults, patience time.Duration) queuetest.Harness {
	again := func(_ queuetest.TB, q queue.Queue) queue.Queue { return open(f, q.(*handle).disk) }
	return queuetest.Harness{
		New:      func(queuetest.TB) queue.Queue { return open(f, nil) },
		Reopen:   again,
		Second:   again,
		Patience: patience,
	}
}

// TestSoundDriver: without faults the wrapper passes, so that what fails below
// fails because of its fault.
func TestSoundDriver(t *testing.T) { queuetest.Run(t, harness(faults{}, 0)) }

// recorder is a TB that notes failures instead of failing.
type recorder struct {
	testing.TB
	mu       sync.Mutex
	failures []string
	cleanups []func()
}

func (r *recorder) Errorf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failures = append(r.failures, fmt.Sprintf(format, args...))
}

func (r *recorder) Fatalf(format string, args ...any) {
	r.Errorf(format, args...)
	runtime.Goexit()
}

func (r *recorder) Cleanup(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cleanups = append(r.cleanups, f)
}

// verify runs a check and returns what it complained about.
func verify(t *testing.T, h queuetest.Harness, c queuetest.Check) []string {
	r := &recorder{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			for _, f := range slices.Backward(r.cleanups) {
				f()
			}
		}()
		queuetest.Verify(r, h, c)
	}()
	<-done
	return r.failures
}

func TestBrokenDriversAreCaught(t *testing.T) {
	checks := map[string]queuetest.Check{}
	for _, c := range queuetest.Checks() {
		checks[c.Name] = c
	}
	caught := map[string]bool{}
	for _, b := range broken() {
		name, _, _ := strings.Cut(b.what, ":")
		t.Run(b.what, func(t *testing.T) {
			c, ok := checks[name]
			if !ok {
				t.Fatalf("no check %q", name)
			}
			caught[name] = true
			failures := verify(t, harness(b.faults, 700*time.Millisecond), c)
			if len(failures) == 0 {
				t.Fatal("passed")
			}
			t.Log(failures[0])
		})
	}
	for _, name := range slices.Sorted(maps.Keys(checks)) {
		if !caught[name] {
			t.Errorf("no broken driver shows that %s bites", name)
		}
	}
}
