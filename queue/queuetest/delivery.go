package queuetest

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/queue"
)

func checkIntact(tb TB, h Harness) {
	s := start(tb, h)
	sub := s.group("t", "g")
	body := make([]byte, 256)
	for i := range body {
		body[i] = byte(i)
	}
	for _, m := range []queue.Message{
		{ID: "first/é", Body: body, ContentType: "application/x.test+json", Attributes: map[string]string{"traceparent": "00-x-y", "π": "a'b\"c\\\n☃", "empty": ""}},
		{ID: "bare"},
	} {
		s.publish(s.q, "t", m)
		d := s.next(sub)
		s.attempt(d, 1)
		got := d.Message()
		if got.ID != m.ID || got.ContentType != m.ContentType || !bytes.Equal(got.Body, m.Body) {
			s.Fatalf("received ID %q, type %q, %d bytes: differs from what was published", got.ID, got.ContentType, len(got.Body))
		}
		if len(got.Attributes)+len(m.Attributes) > 0 && !maps.Equal(got.Attributes, m.Attributes) {
			s.Fatalf("attributes %v, want %v", got.Attributes, m.Attributes)
		}
		s.ack(d)
	}
}

func checkIDs(tb TB, h Harness) {
	s := start(tb, h)
	sub := s.group("t", "g")
	s.publish(s.q, "t", queue.Message{Body: []byte("1")}, queue.Message{Body: []byte("2")})
	a, b := s.expect(sub, "1"), s.expect(sub, "2")
	if a.Message().ID == "" || a.Message().ID == b.Message().ID {
		s.Fatalf("IDs filled in: %q and %q, want two different ones", a.Message().ID, b.Message().ID)
	}
	s.send("t", "same", "same")
	s.expect(sub, "same")
	s.expect(sub, "same")
}

func checkLargest(tb TB, h Harness) {
	s := start(tb, h)
	sub := s.group("t", "g")
	body := bytes.Repeat([]byte("0123456789abcde\x00"), queue.MaxBodyBytes/16)
	s.publish(s.q, "t", queue.Message{Body: body}, queue.Message{Body: []byte("small")})
	d := s.next(sub)
	if !bytes.Equal(d.Message().Body, body) {
		s.Fatalf("a body of %d bytes arrived changed (%d bytes)", len(body), len(d.Message().Body))
	}
	s.ack(d)
	s.take(sub, "small")
}

func checkInvalid(tb TB, h Harness) {
	s := start(tb, h)
	sub := s.group("t", "g")
	for _, name := range []string{"", "A", "a b", "-a", ".a", "_a", "a/b", "ä", "a\x00", "a'", strings.Repeat("a", 101)} {
		err := s.q.Publish(s.ctx, name, texts("x"), queue.PublishOptions{})
		s.wantErr("Publish to topic "+name, err, queue.ErrInvalid)
		_, err = s.q.Subscribe(s.ctx, name, queue.SubscribeOptions{Group: "g"})
		s.wantErr("Subscribe to topic "+name, err, queue.ErrInvalid)
		if name != "" {
			_, err = s.q.Subscribe(s.ctx, "t", queue.SubscribeOptions{Group: name})
			s.wantErr("Subscribe as group "+name, err, queue.ErrInvalid)
		}
	}
	_, err := s.q.Subscribe(s.ctx, "t", queue.SubscribeOptions{Group: "g", Prefetch: -1})
	s.wantErr("negative prefetch", err, queue.ErrInvalid)
	for what, m := range map[string]queue.Message{
		"body":            {Body: make([]byte, queue.MaxBodyBytes+1)},
		"ID":              {ID: strings.Repeat("i", queue.MaxIDBytes+1)},
		"ID with NUL":     {ID: "a\x00"},
		"content type":    {ContentType: "\xff"},
		"attribute":       {Attributes: map[string]string{"k": "\xff"}},
		"attribute name":  {Attributes: map[string]string{"": "v"}},
		"attribute bytes": {Attributes: map[string]string{"k": strings.Repeat("v", queue.MaxAttributeBytes)}},
	} {
		err := s.q.Publish(s.ctx, "t", append(texts("good"), m), queue.PublishOptions{})
		s.wantErr("Publish with invalid "+what, err, queue.ErrInvalid)
	}
	longest := strings.Repeat("z", 100)
	s.useName(longest)
	s.send("t", "after")
	s.take(sub, "after") // and nothing of the refused calls
}

// useName reads and writes a topic and group of that name.
func (s *suite) useName(name string) {
	s.Helper()
	sub := s.group(name, name)
	s.send(name, "x")
	s.take(sub, "x")
}

func checkNotShared(tb TB, h Harness) {
	s := start(tb, h)
	a, b, c := s.group("t", "a"), s.group("t", "b"), s.subscribe(s.q, "t", queue.SubscribeOptions{})
	m := queue.Message{ID: "m", Body: []byte("body"), Attributes: map[string]string{"k": "v"}}
	s.publish(s.q, "t", m)
	spoil := func(m queue.Message) { m.Body[0], m.Attributes["k"] = 'X', "spoilt" }
	spoil(m)
	for _, sub := range []queue.Subscription{a, c, b} {
		d := s.expect(sub, "body")
		if d.Message().Attributes["k"] != "v" {
			s.Fatalf("attributes %v are shared with another reader or the publisher", d.Message().Attributes)
		}
		spoil(d.Message())
	}
	s.close(a)
	s.expect(s.group("t", "a"), "body") // redelivered as published
}

func checkOrder(tb TB, h Harness) {
	s := start(tb, h)
	sub := s.group("t", "g")
	words := numbered(300)
	s.send("t", words[:250]...)
	for _, w := range words[250:] {
		s.send("t", w)
	}
	s.take(sub, words...)
}

func checkGroups(tb TB, h Harness) {
	s := start(tb, h)
	a, b := s.group("t", "a"), s.group("t", "b")
	other := s.group("t2", "a")
	s.send("t", "1", "2")
	s.take(a, "1", "2")
	s.take(b, "1", "2")
	s.send("t2", "3")
	s.take(other, "3") // no other topic's messages
}

func checkCompete(tb TB, h Harness) {
	s := start(tb, h)
	members := []queue.Subscription{s.group("t", "g"), s.group("t", "g"), s.group("t", "g")}
	words := numbered(60)
	s.send("t", words...)
	seen := map[string]bool{}
	for i := range words {
		d := s.next(members[i%len(members)])
		if id := d.Message().ID; seen[id] {
			s.Fatalf("two members of a group got %s", id)
		}
		seen[d.Message().ID] = true
		s.ack(d)
	}
}

func checkKept(tb TB, h Harness) {
	s := start(tb, h)
	s.send("t", "1", "2")
	first := s.group("t", "first")
	second := s.group("t", "second")
	s.send("t", "3")
	s.take(first, "1", "2", "3")
	s.take(second, "3")
}

func checkGroupStays(tb TB, h Harness) {
	s := start(tb, h)
	s.close(s.group("t", "g"))
	s.send("t", "1")
	s.take(s.group("t", "g"), "1")
}

func checkBroadcast(tb TB, h Harness) {
	s := start(tb, h)
	g := s.group("t", "g")
	s.send("t", "before")
	a, b := s.subscribe(s.q, "t", queue.SubscribeOptions{}), s.subscribe(s.q, "t", queue.SubscribeOptions{})
	s.publish(s.q, "t", queue.Message{ID: "1", Body: []byte("1"), NotBefore: time.Now().Add(time.Hour)}, texts("2")[0])
	for _, sub := range []queue.Subscription{a, b} {
		d := s.expect(sub, "1") // not "before", and at once
		s.attempt(d, 1)
		s.ack(d)
		s.ack(d) // needs no settling, any number of times
		s.nack(s.expect(sub, "2"), queue.NackOptions{})
	}
	s.close(a)
	s.send("t", "3")
	s.take(b, "3") // not "2" again
	s.take(s.subscribeThen("t", "4"), "4")
	s.take(g, "before")
}

// subscribeThen hears a broadcast of the word.
func (s *suite) subscribeThen(topic, word string) queue.Subscription {
	s.Helper()
	sub := s.subscribe(s.q, topic, queue.SubscribeOptions{})
	s.send(topic, word)
	return sub
}

func checkBroadcastKeepsNothing(tb TB, h Harness) {
	s := start(tb, h)
	s.take(s.subscribeThen("t", "1"), "1")
	g := s.group("t", "g")
	s.send("t", "2")
	s.take(g, "2")
}

func checkPrefetch(tb TB, h Harness) {
	s := start(tb, h)
	sub := s.subscribe(s.q, "t", queue.SubscribeOptions{Group: "g", Prefetch: 1})
	s.send("t", "1", "2")
	one := s.expect(sub, "1")
	short, cancel := context.WithTimeout(s.ctx, 50*time.Millisecond)
	defer cancel()
	if d, err := sub.Next(short); !errors.Is(err, context.DeadlineExceeded) {
		s.Fatalf("Next with Prefetch 1 and one message in hand returned %v, %v", d, err)
	}
	s.take(s.group("t", "g"), "2") // a full reader holds nothing back
	s.send("t", "3")
	s.ack(one)
	s.take(sub, "3")
}

func checkAcked(tb TB, h Harness) {
	s := start(tb, h)
	sub := s.group("t", "g")
	s.send("t", "1", "2")
	s.take(sub, "1", "2")
	s.close(sub)
	sub = s.group("t", "g")
	s.send("t", "3")
	s.take(sub, "3")
}

func checkNack(tb TB, h Harness) {
	s := start(tb, h)
	sub := s.group("t", "g")
	s.send("t", "1")
	for i := 1; i <= 4; i++ {
		d := s.expect(sub, "1")
		s.attempt(d, i)
		s.nack(d, queue.NackOptions{Reason: "again"})
	}
	s.take(sub, "1")
	s.send("t", "2")
	s.take(sub, "2")
}

func checkCloseRedelivers(tb TB, h Harness) {
	s := start(tb, h)
	sub := s.group("t", "g")
	s.send("t", "1", "2", "3")
	s.expect(sub, "1")
	s.take(sub, "2")
	s.expect(sub, "3")
	s.close(sub)
	sub = s.group("t", "g")
	got := map[string]bool{}
	for range 2 {
		d := s.next(sub)
		s.attempt(d, 2)
		got[d.Message().ID] = true
		s.ack(d)
	}
	if !got["1"] || !got["3"] {
		s.Fatalf("redelivered %v, want 1 and 3", got)
	}
}

func checkSettleOnce(tb TB, h Harness) {
	s := start(tb, h)
	sub := s.group("t", "g")
	s.send("t", "1", "2", "3")
	a, b, c := s.expect(sub, "1"), s.expect(sub, "2"), s.expect(sub, "3")
	s.ack(a)
	s.wantErr("second Ack", a.Ack(s.ctx), queue.ErrSettled)
	s.wantErr("Nack after Ack", a.Nack(s.ctx, queue.NackOptions{}), queue.ErrSettled)
	s.nack(b, queue.NackOptions{})
	s.wantErr("Ack after Nack", b.Ack(s.ctx), queue.ErrSettled)
	s.attempt(s.expect(sub, "2"), 2) // the late Ack changed nothing, and 1 is gone
	s.close(sub)
	if err := c.Ack(s.ctx); !errors.Is(err, queue.ErrSettled) && !errors.Is(err, queue.ErrClosed) {
		s.Fatalf("Ack after the subscription closed: %v", err)
	}
	sub = s.group("t", "g")
	got := []string{s.next(sub).Message().ID, s.next(sub).Message().ID}
	if got[0] == got[1] || got[0] == "1" || got[1] == "1" {
		s.Fatalf("redelivered %v, want 2 and 3", got)
	}
}

func checkConcurrency(tb TB, h Harness) {
	s := start(tb, h)
	const publishers, each, consumers = 6, 30, 6
	var mu sync.Mutex
	seen, all := map[string]int{}, make(chan struct{})
	var wg sync.WaitGroup
	ctx, stop := context.WithCancel(s.ctx)
	defer stop()
	for range consumers {
		sub := s.subscribe(s.q, "t", queue.SubscribeOptions{Group: "g", Prefetch: 8})
		wg.Go(func() {
			for {
				d, err := sub.Next(ctx)
				if err != nil {
					return
				}
				if err := d.Ack(s.ctx); err != nil {
					s.Errorf("Ack: %v", err)
				}
				mu.Lock()
				if seen[d.Message().ID]++; len(seen) == publishers*each {
					select {
					case <-all:
					default:
						close(all)
					}
				}
				mu.Unlock()
			}
		})
	}
	var pubs sync.WaitGroup
	for p := range publishers {
		pubs.Go(func() {
			for i := range each {
				w := string(rune('a'+p)) + numbered(each)[i]
				if err := s.q.Publish(s.ctx, "t", texts(w), queue.PublishOptions{}); err != nil {
					s.Errorf("Publish: %v", err)
				}
			}
		})
	}
	pubs.Wait()
	select {
	case <-all:
	case <-s.ctx.Done():
	}
	stop()
	wg.Wait()
	if len(seen) != publishers*each {
		s.Fatalf("%d of %d messages arrived", len(seen), publishers*each)
	}
	for id, n := range seen {
		if n != 1 {
			s.Errorf("%s was delivered and acked %d times", id, n)
		}
	}
}
