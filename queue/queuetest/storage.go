package queuetest

import (
	"time"

	"github.com/solstice-ci/solstice-go/queue"
)

func checkReopen(tb TB, h Harness) {
	s := start(tb, h)
	caps := s.q.Capabilities()
	s.send("kept", "0")
	sub := s.group("t", "g")
	s.send("t", "1", "2", "3", "4")
	s.take(sub, "1")
	d := s.expect(sub, "2") // unsettled when the queue closes
	s.attempt(d, 1)
	s.take(sub, "3")
	s.nack(s.expect(sub, "4"), queue.NackOptions{DeadLetter: true, Reason: "bad"})
	s.send("t", "5")
	due := time.Now().Add(100*time.Millisecond + 4*caps.Delay)
	if caps.Delay > 0 {
		s.publish(s.q, "later", queue.Message{ID: "6", Body: []byte("6"), NotBefore: due})
	}
	s.close(s.q)

	s.q = s.own(h.Reopen(tb, s.q))
	s.send("t", "7")
	sub = s.group("t", "g") // which is still known: it gets what came before
	got := map[string]int{}
	for range 3 {
		d := s.next(sub)
		got[d.Message().ID] = d.Attempt()
		s.ack(d)
	}
	if got["2"] < 2 || got["5"] != 1 || got["7"] != 1 {
		s.Fatalf("attempts by message %v: want 2 again, 5 and 7 once", got)
	}
	s.send("t", "8")
	s.take(sub, "8")
	s.take(s.group("kept", "g"), "0")
	if caps.DeadLetters {
		ls := s.letters(s.deadLetterer(), "t", "g", 10)
		if len(ls) != 1 || ls[0].Message.ID != "4" || ls[0].Reason != "bad" {
			s.Fatalf("letters after reopening: %+v", ls)
		}
	}
	if caps.Delay > 0 {
		d := s.expect(s.group("later", "g"), "6")
		s.early(d, due)
	}
}

func checkSecond(tb TB, h Harness) {
	s := start(tb, h)
	other := s.own(h.Second(tb, s.q))
	sub := s.group("t", "g")
	s.publish(other, "t", texts("1")...)
	s.take(sub, "1")
	late := s.subscribe(other, "t", queue.SubscribeOptions{Group: "late"})
	s.send("t", "2") // a group that another handle registered
	s.take(late, "2")
	s.take(sub, "2")

	// Members of a group on both handles.
	rival := s.subscribe(other, "t", queue.SubscribeOptions{Group: "g"})
	words := numbered(40)
	s.send("t", words...)
	seen := map[string]bool{}
	for i := range words {
		d := s.next([]queue.Subscription{sub, rival}[i%2])
		if seen[d.Message().ID] {
			s.Fatalf("both handles got %s", d.Message().ID)
		}
		seen[d.Message().ID] = true
		s.ack(d)
	}

	// A reader that waits on the other handle is woken by a nack here.
	s.send("t", "again")
	d := s.expect(sub, "again")
	woken := make(chan error, 1)
	go func() {
		d, err := rival.Next(s.ctx)
		if err == nil {
			err = d.Ack(s.ctx)
		}
		woken <- err
	}()
	s.nack(d, queue.NackOptions{})
	if err := s.outcome(woken); err != nil {
		s.Fatalf("reader on the other handle: %v", err)
	}
}

func checkSecondBroadcast(tb TB, h Harness) {
	s := start(tb, h)
	other := s.own(h.Second(tb, s.q))
	s.publish(other, "t", texts("before")...)
	here, there := s.subscribe(s.q, "t", queue.SubscribeOptions{}), s.subscribe(other, "t", queue.SubscribeOptions{})
	s.send("t", "1")
	s.take(here, "1")
	s.take(there, "1")
	s.publish(other, "t", texts("2")...)
	s.take(here, "2")
	s.take(there, "2")
	s.close(there)
	s.send("t", "3")
	s.take(here, "3")
	there = s.subscribe(other, "t", queue.SubscribeOptions{})
	s.send("t", "4")
	s.take(there, "4") // not 3, which came while it was away
	s.take(here, "4")
}

func checkSecondClose(tb TB, h Harness) {
	s := start(tb, h)
	other := h.Second(tb, s.q)
	sub := s.group("t", "g")
	s.send("t", "1")
	d := s.next(s.subscribe(other, "t", queue.SubscribeOptions{Group: "g"}))
	s.attempt(d, 1)
	s.close(other)
	d = s.expect(sub, "1")
	s.attempt(d, 2)
	s.ack(d)
	s.send("t", "2")
	s.take(sub, "2")
}

func checkSecondDelay(tb TB, h Harness) {
	s := start(tb, h)
	other := h.Second(tb, s.q)
	sub := s.group("t", "g")
	due := time.Now().Add(100*time.Millisecond + 4*s.q.Capabilities().Delay)
	s.publish(other, "t", queue.Message{ID: "1", Body: []byte("1"), NotBefore: due})
	s.close(other) // whoever published it may be gone when it is due
	s.early(s.expect(sub, "1"), due)
}
