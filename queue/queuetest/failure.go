package queuetest

import (
	"context"
	"errors"
	"time"

	"github.com/solstice-ci/solstice-go/queue"
)

func checkMaxAttempts(tb TB, h Harness) {
	s := start(tb, h)
	sub := s.subscribe(s.q, "t", queue.SubscribeOptions{Group: "g", MaxAttempts: 2})
	s.send("t", "1")
	for i := 1; i <= 2; i++ {
		d := s.expect(sub, "1")
		s.attempt(d, i)
		s.nack(d, queue.NackOptions{Reason: "no"})
	}
	s.send("t", "2")
	s.expect(sub, "2")
	s.close(sub)
	sub = s.subscribe(s.q, "t", queue.SubscribeOptions{Group: "g", MaxAttempts: 1})
	s.send("t", "3")
	s.take(sub, "3") // 1 was refused twice, 2 delivered once and given back
}

// early fails when a delivery came before its time.
func (s *suite) early(d queue.Delivery, due time.Time) {
	s.Helper()
	accuracy := s.q.Capabilities().Delay
	if now := time.Now(); now.Before(due.Add(-accuracy)) {
		s.Fatalf("%q came %v early, declared accuracy is %v", d.Message().ID, due.Sub(now), accuracy)
	}
}

func checkNotBefore(tb TB, h Harness) {
	s := start(tb, h)
	sub := s.group("t", "g")
	delay := 200*time.Millisecond + 4*s.q.Capabilities().Delay
	due := map[string]time.Time{"soon": time.Now().Add(delay), "later": time.Now().Add(2 * delay), "past": {}, "now": {}}
	s.publish(s.q, "t",
		queue.Message{ID: "later", Body: []byte("later"), NotBefore: due["later"]},
		queue.Message{ID: "soon", Body: []byte("soon"), NotBefore: due["soon"]},
		queue.Message{ID: "past", Body: []byte("past"), NotBefore: time.Now().Add(-time.Hour)},
		queue.Message{ID: "now", Body: []byte("now")})
	for range 4 { // in any order: on a slow machine all may be due by now
		d := s.next(sub)
		word := string(d.Message().Body)
		at, ok := due[word]
		if !ok {
			s.Fatalf("received %.40q, which is not awaited", word)
		}
		delete(due, word)
		s.early(d, at)
		s.attempt(d, 1)
		s.ack(d)
	}
}

func checkNackDelay(tb TB, h Harness) {
	s := start(tb, h)
	sub := s.group("t", "g")
	s.send("t", "1", "2")
	d := s.expect(sub, "1")
	delay := 200*time.Millisecond + 4*s.q.Capabilities().Delay
	due := time.Now().Add(delay)
	s.nack(d, queue.NackOptions{Delay: delay})
	s.take(sub, "2")
	d = s.expect(sub, "1")
	s.early(d, due)
	s.attempt(d, 2)
}

func checkDeadLetters(tb TB, h Harness) {
	s := start(tb, h)
	dl := s.deadLetterer()
	if ls := s.letters(dl, "t", "unknown", 10); len(ls) != 0 {
		s.Fatalf("an unknown group has letters: %v", ls)
	}
	sub, other := s.group("t", "g"), s.group("t", "other")
	s.publish(s.q, "t", queue.Message{ID: "a", Body: []byte("a"), ContentType: "x/y", Attributes: map[string]string{"k": "v"}})
	s.send("t", "b", "c")
	before := time.Now().Add(-time.Minute)
	for _, w := range []string{"a", "b", "c"} {
		s.nack(s.expect(sub, w), queue.NackOptions{DeadLetter: true, Reason: "because " + w})
	}
	s.take(other, "a", "b", "c") // the other group is not concerned
	if ls := s.letters(dl, "t", "other", 10); len(ls) != 0 {
		s.Fatalf("the other group has letters: %v", ls)
	}
	ls := s.letters(dl, "t", "g", 10)
	if len(ls) != 3 {
		s.Fatalf("%d letters, want 3", len(ls))
	}
	l := ls[0]
	if l.Message.ID != "a" || ls[1].Message.ID != "b" || ls[2].Message.ID != "c" {
		s.Fatalf("letters %s, %s, %s: want a, b, c", l.Message.ID, ls[1].Message.ID, ls[2].Message.ID)
	}
	if string(l.Message.Body) != "a" || l.Message.ContentType != "x/y" || l.Message.Attributes["k"] != "v" ||
		l.Topic != "t" || l.Group != "g" || l.Reason != "because a" || l.Attempt != 1 || l.Time.Before(before) {
		s.Fatalf("letter %+v", l)
	}
	for _, limit := range []int{2, 1, 2} { // looking changes nothing
		ls := s.letters(dl, "t", "g", limit)
		if len(ls) != limit || ls[0].Message.ID != "a" {
			s.Fatalf("%d letters, the first of them %v: want %d from a", len(ls), ls, limit)
		}
	}
	s.count("Drop", 1)(dl.Drop(s.ctx, "t", "g", "b", "no-such"))
	s.count("Drop without IDs", 0)(dl.Drop(s.ctx, "t", "g"))
	s.count("Replay without IDs", 0)(dl.Replay(s.ctx, "t", "g"))
	s.count("Replay", 1)(dl.Replay(s.ctx, "t", "g", "c", "b"))
	s.count("Replay of another group", 0)(dl.Replay(s.ctx, "t", "other", "a"))
	d := s.expect(sub, "c")
	s.attempt(d, 1)
	s.ack(d)
	if ls := s.letters(dl, "t", "g", 10); len(ls) != 1 || ls[0].Message.ID != "a" {
		s.Fatalf("letters left: %+v, want a", ls)
	}
	s.send("t", "d")
	s.take(sub, "d")
	s.take(other, "d") // a replay concerns one group
}

func (s *suite) count(what string, want int) func(int, error) {
	return func(n int, err error) {
		s.Helper()
		if err != nil || n != want {
			s.Fatalf("%s: %d, %v, want %d", what, n, err, want)
		}
	}
}

func checkExhausted(tb TB, h Harness) {
	s := start(tb, h)
	dl := s.deadLetterer()
	sub := s.subscribe(s.q, "t", queue.SubscribeOptions{Group: "g", MaxAttempts: 1})
	s.send("t", "1", "2")
	s.nack(s.expect(sub, "1"), queue.NackOptions{Reason: "first reason"})
	s.expect(sub, "2")
	s.close(sub) // unsettled at its last attempt
	sub = s.subscribe(s.q, "t", queue.SubscribeOptions{Group: "g", MaxAttempts: 1})
	s.send("t", "3")
	s.take(sub, "3")
	s.until("both messages are dead letters", func() bool { return len(s.letters(dl, "t", "g", 10)) == 2 })
	for _, l := range s.letters(dl, "t", "g", 10) {
		if l.Message.ID == "1" && l.Reason != "first reason" || l.Reason == "" {
			s.Fatalf("letter %s has reason %q", l.Message.ID, l.Reason)
		}
	}
}

// until polls for a condition that no call waits for.
func (s *suite) until(what string, ok func() bool) {
	s.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-s.ctx.Done():
			s.Fatalf("never: %s", what)
		}
	}
}

func checkDeclared(tb TB, h Harness) {
	s := start(tb, h)
	_, ok := queue.As[queue.DeadLetterer](s.q)
	if ok != s.q.Capabilities().DeadLetters {
		s.Fatalf("DeadLetterer implemented: %v, declared: %v", ok, !ok)
	}
	sub := s.group("t", "g")
	s.send("t", "1", "2")
	s.nack(s.expect(sub, "1"), queue.NackOptions{DeadLetter: true, Reason: "no"})
	s.take(sub, "2")
	s.send("t", "3")
	s.take(sub, "3") // 1 does not come back
}

func checkCancelled(tb TB, h Harness) {
	s := start(tb, h)
	sub := s.group("t", "g")
	s.send("t", "1")
	d := s.expect(sub, "1")
	ctx, cancel := context.WithCancel(s.ctx)
	cancel()
	s.wantErr("Publish", s.q.Publish(ctx, "t", texts("never"), queue.PublishOptions{}), context.Canceled)
	_, err := s.q.Subscribe(ctx, "t", queue.SubscribeOptions{Group: "other"})
	s.wantErr("Subscribe", err, context.Canceled)
	_, err = sub.Next(ctx)
	s.wantErr("Next", err, context.Canceled)
	s.wantErr("Nack", d.Nack(ctx, queue.NackOptions{}), context.Canceled)
	s.wantErr("Ack", d.Ack(ctx), context.Canceled)
	if dl, ok := queue.As[queue.DeadLetterer](s.q); ok {
		_, err := dl.DeadLetters(ctx, "t", "g", 1)
		s.wantErr("DeadLetters", err, context.Canceled)
		_, err = dl.Replay(ctx, "t", "g", "x")
		s.wantErr("Replay", err, context.Canceled)
		_, err = dl.Drop(ctx, "t", "g", "x")
		s.wantErr("Drop", err, context.Canceled)
	}
	s.ack(d) // not settled by calls that were refused
	s.send("t", "2")
	s.take(sub, "2")
}

func checkBlockedContext(tb TB, h Harness) {
	s := start(tb, h)
	ctx, cancel := context.WithCancel(s.ctx)
	sub, err := s.q.Subscribe(ctx, "t", queue.SubscribeOptions{Group: "g"})
	if err != nil {
		s.Fatalf("Subscribe: %v", err)
	}
	cancel() // the subscription outlives it
	for _, sub := range []queue.Subscription{sub, s.subscribe(s.q, "t", queue.SubscribeOptions{})} {
		short, cancel := context.WithTimeout(s.ctx, 20*time.Millisecond)
		_, err = sub.Next(short)
		cancel()
		s.wantErr("Next of an empty topic", err, context.DeadlineExceeded)
	}
	s.send("t", "1")
	s.take(sub, "1") // the abandoned Next took nothing
}

func checkSubscriptionClose(tb TB, h Harness) {
	s := start(tb, h)
	for _, o := range []queue.SubscribeOptions{{Group: "g"}, {}} {
		sub := s.subscribe(s.q, "t", o)
		blocked := s.blocked(sub)
		s.close(sub)
		s.wantErr("blocked Next", s.outcome(blocked), queue.ErrClosed)
		_, err := sub.Next(s.ctx)
		s.wantErr("Next after Close", err, queue.ErrClosed)
		s.close(sub) // again
	}
	sub := s.group("t", "g")
	s.send("t", "1")
	s.take(sub, "1")
}

// blocked runs Next in a goroutine.
func (s *suite) blocked(sub queue.Subscription) <-chan error {
	out := make(chan error, 1)
	go func() {
		_, err := sub.Next(s.ctx)
		out <- err
	}()
	return out
}

func (s *suite) outcome(blocked <-chan error) error {
	s.Helper()
	select {
	case err := <-blocked:
		return err
	case <-s.ctx.Done():
		s.Fatalf("Next still blocks")
		return nil
	}
}

func checkQueueClose(tb TB, h Harness) {
	s := start(tb, h)
	g, bc := s.group("t", "g"), s.subscribe(s.q, "t", queue.SubscribeOptions{})
	s.send("t2", "1")
	hand := s.expect(s.group("t2", "g"), "1")
	blocked := []<-chan error{s.blocked(g), s.blocked(bc)}
	s.close(s.q)
	for _, b := range blocked {
		s.wantErr("blocked Next", s.outcome(b), queue.ErrClosed)
	}
	s.close(s.q) // again
	s.close(g)
	s.wantErr("Publish", s.q.Publish(s.ctx, "t", texts("x"), queue.PublishOptions{}), queue.ErrClosed)
	_, err := s.q.Subscribe(s.ctx, "t", queue.SubscribeOptions{Group: "g"})
	s.wantErr("Subscribe", err, queue.ErrClosed)
	_, err = bc.Next(s.ctx)
	s.wantErr("Next", err, queue.ErrClosed)
	if err := hand.Ack(s.ctx); !errors.Is(err, queue.ErrClosed) && !errors.Is(err, queue.ErrSettled) {
		s.Fatalf("Ack after Close: %v", err)
	}
	if dl, ok := queue.As[queue.DeadLetterer](s.q); ok {
		_, err := dl.DeadLetters(s.ctx, "t", "g", 1)
		s.wantErr("DeadLetters", err, queue.ErrClosed)
	}
}
