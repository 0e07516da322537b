// Package queuetest is the conformance suite for drivers of package queue.
// A driver's test calls Run with a Harness:
//
//	func TestConformance(t *testing.T) {
//		queuetest.Run(t, queuetest.Harness{New: func(tb queuetest.TB) queue.Queue { … }})
//	}
//
// The suite asks for what the driver's Capabilities declare. It waits for
// conditions, never for time to pass: that something does not arrive is shown
// by something published later that does. It is meant to run under the race
// detector.
package queuetest

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/queue"
)

// TB is the part of testing.TB that checks use. Fatalf must not return.
type TB interface {
	Helper()
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Logf(format string, args ...any)
	Cleanup(func())
	TempDir() string
}

// Harness makes the queues under test.
type Harness struct {
	// New returns an empty queue. The suite closes it; whatever else is to be
	// released goes to tb.Cleanup.
	New func(tb TB) queue.Queue
	// Reopen returns a new queue on the storage of one that was closed.
	// Required when the driver is Durable.
	Reopen func(tb TB, closed queue.Queue) queue.Queue
	// Second returns another handle on the storage of an open queue, as another
	// process would have. Required when the driver is MultiProcess.
	Second func(tb TB, open queue.Queue) queue.Queue
	// Patience bounds the wait for what has to come; 0 means 20 s.
	Patience time.Duration
}

// Check is one promise of package queue.
type Check struct {
	Name string
	// Needs says whether the promise is made by a driver with c.
	Needs func(c queue.Capabilities) bool
	Run   func(tb TB, h Harness)
}

// Run runs every check that applies as a subtest of t.
func Run(t *testing.T, h Harness) {
	for _, c := range Checks() {
		t.Run(c.Name, func(t *testing.T) {
			Verify(t, h, c)
		})
	}
}

// Verify runs one check, or says in the log that the driver does not promise
// what it is about.
func Verify(tb TB, h Harness, c Check) {
	tb.Helper()
	if h.Patience <= 0 {
		h.Patience = 20 * time.Second
	}
	if c.Needs != nil {
		q := h.New(tb)
		caps := q.Capabilities()
		if err := q.Close(); err != nil {
			tb.Fatalf("Close: %v", err)
		}
		if !c.Needs(caps) {
			tb.Logf("not declared: %+v", caps)
			return
		}
	}
	c.Run(tb, h)
}

// Checks lists the suite.
func Checks() []Check {
	durable := func(c queue.Capabilities) bool { return c.Durable }
	multi := func(c queue.Capabilities) bool { return c.MultiProcess }
	delay := func(c queue.Capabilities) bool { return c.Delay > 0 }
	letters := func(c queue.Capabilities) bool { return c.DeadLetters }
	return []Check{
		{"MessageArrivesIntact", nil, checkIntact},
		{"IDsAreFilledInAndNotDeduplicated", nil, checkIDs},
		{"LargestBody", nil, checkLargest},
		{"InvalidArguments", nil, checkInvalid},
		{"NothingIsShared", nil, checkNotShared},
		{"Order", nil, checkOrder},
		{"EachGroupGetsEachMessage", nil, checkGroups},
		{"MembersOfAGroupCompete", nil, checkCompete},
		{"KeptForTheFirstGroup", nil, checkKept},
		{"GroupOutlivesItsReaders", nil, checkGroupStays},
		{"Broadcast", nil, checkBroadcast},
		{"BroadcastKeepsNothing", nil, checkBroadcastKeepsNothing},
		{"Prefetch", nil, checkPrefetch},
		{"AckedIsGone", nil, checkAcked},
		{"NackRedelivers", nil, checkNack},
		{"CloseRedelivers", nil, checkCloseRedelivers},
		{"SettleOnce", nil, checkSettleOnce},
		{"MaxAttempts", nil, checkMaxAttempts},
		{"NotBefore", delay, checkNotBefore},
		{"NackDelay", delay, checkNackDelay},
		{"DeadLetters", letters, checkDeadLetters},
		{"DeadLettersOfMaxAttempts", letters, checkExhausted},
		{"DeadLettererAsDeclared", nil, checkDeclared},
		{"Concurrency", nil, checkConcurrency},
		{"CancelledContext", nil, checkCancelled},
		{"BlockedNextHonoursContext", nil, checkBlockedContext},
		{"SubscriptionClose", nil, checkSubscriptionClose},
		{"QueueClose", nil, checkQueueClose},
		{"Reopen", durable, checkReopen},
		{"SecondHandle", multi, checkSecond},
		{"SecondHandleBroadcast", multi, checkSecondBroadcast},
		{"SecondHandleClose", multi, checkSecondClose},
		{"SecondHandleDelay", func(c queue.Capabilities) bool { return c.MultiProcess && c.Delay > 0 }, checkSecondDelay},
	}
}

// suite is one check at work: it fails the test instead of returning errors.
type suite struct {
	TB
	h   Harness
	ctx context.Context
	q   queue.Queue
}

func start(tb TB, h Harness) *suite {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), h.Patience)
	s := &suite{TB: tb, h: h, ctx: ctx}
	tb.Cleanup(cancel)
	s.q = s.own(h.New(tb))
	return s
}

// own has a queue closed at the end.
func (s *suite) own(q queue.Queue) queue.Queue {
	s.Cleanup(func() {
		if err := q.Close(); err != nil {
			s.Errorf("Close: %v", err)
		}
	})
	return q
}

func (s *suite) subscribe(q queue.Queue, topic string, o queue.SubscribeOptions) queue.Subscription {
	s.Helper()
	sub, err := q.Subscribe(s.ctx, topic, o)
	if err != nil {
		s.Fatalf("Subscribe to %s, group %q: %v", topic, o.Group, err)
	}
	return sub
}

func (s *suite) group(topic, name string) queue.Subscription {
	s.Helper()
	return s.subscribe(s.q, topic, queue.SubscribeOptions{Group: name})
}

func (s *suite) publish(q queue.Queue, topic string, msgs ...queue.Message) {
	s.Helper()
	if err := q.Publish(s.ctx, topic, msgs, queue.PublishOptions{}); err != nil {
		s.Fatalf("Publish to %s: %v", topic, err)
	}
}

// send publishes messages whose IDs and bodies are the given words.
func (s *suite) send(topic string, words ...string) {
	s.Helper()
	s.publish(s.q, topic, texts(words...)...)
}

func texts(words ...string) []queue.Message {
	var out []queue.Message
	for _, w := range words {
		out = append(out, queue.Message{ID: w, Body: []byte(w)})
	}
	return out
}

func (s *suite) next(sub queue.Subscription) queue.Delivery {
	s.Helper()
	d, err := sub.Next(s.ctx)
	if err != nil {
		s.Fatalf("Next: %v", err)
	}
	return d
}

// expect receives one message, which has to be the word.
func (s *suite) expect(sub queue.Subscription, word string) queue.Delivery {
	s.Helper()
	d := s.next(sub)
	if got := string(d.Message().Body); got != word {
		s.Fatalf("received %.40q, want %q", got, word)
	}
	return d
}

// take receives one message, which has to be the word, and acks it.
func (s *suite) take(sub queue.Subscription, words ...string) {
	s.Helper()
	for _, w := range words {
		s.ack(s.expect(sub, w))
	}
}

func (s *suite) ack(d queue.Delivery) {
	s.Helper()
	if err := d.Ack(s.ctx); err != nil {
		s.Fatalf("Ack: %v", err)
	}
}

func (s *suite) nack(d queue.Delivery, o queue.NackOptions) {
	s.Helper()
	if err := d.Nack(s.ctx, o); err != nil {
		s.Fatalf("Nack: %v", err)
	}
}

func (s *suite) close(c interface{ Close() error }) {
	s.Helper()
	if err := c.Close(); err != nil {
		s.Fatalf("Close: %v", err)
	}
}

func (s *suite) attempt(d queue.Delivery, want int) {
	s.Helper()
	if d.Attempt() != want {
		s.Fatalf("attempt %d of %q, want %d", d.Attempt(), d.Message().ID, want)
	}
}

func (s *suite) wantErr(what string, err, want error) {
	s.Helper()
	if !errors.Is(err, want) {
		s.Fatalf("%s: %v, want %v", what, err, want)
	}
}

func (s *suite) deadLetterer() queue.DeadLetterer {
	s.Helper()
	dl, ok := queue.As[queue.DeadLetterer](s.q)
	if !ok {
		s.Fatalf("DeadLetters is declared, DeadLetterer is not implemented")
	}
	return dl
}

func (s *suite) letters(dl queue.DeadLetterer, topic, group string, limit int) []queue.DeadLetter {
	s.Helper()
	ls, err := dl.DeadLetters(s.ctx, topic, group, limit)
	if err != nil {
		s.Fatalf("DeadLetters: %v", err)
	}
	return ls
}

// numbered are n words in order.
func numbered(n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("m%04d", i)
	}
	return out
}
