package queuetest_test

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/queue"
)

// breach is a driver that breaks one promise. what begins with the name of the
// check that has to notice.
type breach struct {
	what string
	faults
}

type publishFunc = func(ctx context.Context, h *handle, topic string, msgs []queue.Message) error

// altered publishes changed messages.
func altered(change func(m *queue.Message)) publishFunc {
	return func(ctx context.Context, h *handle, topic string, msgs []queue.Message) error {
		msgs = slices.Clone(msgs)
		for i := range msgs {
			change(&msgs[i])
		}
		return h.disk.Publish(ctx, topic, msgs, queue.PublishOptions{})
	}
}

func broken() []breach {
	return []breach{
		{"MessageArrivesIntact: attributes dropped", faults{publish: altered(func(m *queue.Message) { m.Attributes = nil })}},
		{"MessageArrivesIntact: content type dropped", faults{publish: altered(func(m *queue.Message) { m.ContentType = "" })}},
		{"MessageArrivesIntact: body cut at NUL", faults{publish: altered(func(m *queue.Message) { m.Body, _, _ = bytes.Cut(m.Body, []byte{0}) })}},
		{"MessageArrivesIntact: attempts from 0", faults{attempt: func(d *delivery) int { return d.Delivery.Attempt() - 1 }}},
		{"IDsAreFilledInAndNotDeduplicated: one ID for all", faults{publish: altered(func(m *queue.Message) {
			if m.ID == "" {
				m.ID = "default"
			}
		})}},
		{"IDsAreFilledInAndNotDeduplicated: deduplicates", faults{publish: deduplicating}},
		{"LargestBody: 1 MiB does not fit", faults{publish: func(ctx context.Context, h *handle, topic string, msgs []queue.Message) error {
			if len(msgs[0].Body) > 1<<19 {
				return errors.New("too large")
			}
			return h.disk.Publish(ctx, topic, msgs, queue.PublishOptions{})
		}}},
		{"InvalidArguments: publishes the valid rest", faults{publish: func(ctx context.Context, h *handle, topic string, msgs []queue.Message) error {
			err := h.disk.Publish(ctx, topic, msgs, queue.PublishOptions{})
			if errors.Is(err, queue.ErrInvalid) && len(msgs) > 1 {
				return errors.Join(err, h.disk.Publish(ctx, topic, msgs[:1], queue.PublishOptions{}))
			}
			return err
		}}},
		{"InvalidArguments: accepts any name", faults{subscribe: func(ctx context.Context, h *handle, topic string, o queue.SubscribeOptions) (queue.Subscription, error) {
			return h.disk.Subscribe(ctx, "t", queue.SubscribeOptions{Group: "g"})
		}}},
		{"NothingIsShared: one body for all", faults{message: sharing()}},
		{"Order: batches reversed", faults{publish: func(ctx context.Context, h *handle, topic string, msgs []queue.Message) error {
			msgs = slices.Clone(msgs)
			slices.Reverse(msgs)
			return h.disk.Publish(ctx, topic, msgs, queue.PublishOptions{})
		}}},
		{"EachGroupGetsEachMessage: all groups are one", faults{subscribe: regrouped("g")}},
		{"MembersOfAGroupCompete: each gets everything", faults{subscribe: func(ctx context.Context, h *handle, topic string, o queue.SubscribeOptions) (queue.Subscription, error) {
			return h.disk.Subscribe(ctx, topic, queue.SubscribeOptions{})
		}}},
		{"KeptForTheFirstGroup: nothing kept", faults{publish: func(ctx context.Context, h *handle, topic string, msgs []queue.Message) error {
			h.mu.Lock()
			n := len(h.subs)
			h.mu.Unlock()
			if n == 0 {
				return nil
			}
			return h.disk.Publish(ctx, topic, msgs, queue.PublishOptions{})
		}}},
		{"GroupOutlivesItsReaders: gone with its reader", faults{publish: func(ctx context.Context, h *handle, topic string, msgs []queue.Message) error {
			return nil // nobody is listening
		}}},
		{"Broadcast: readers compete", faults{subscribe: regrouped("all")}},
		{"Broadcast: waits for NotBefore", faults{publish: altered(func(m *queue.Message) {
			if !m.NotBefore.IsZero() {
				m.Body = []byte("not yet")
			}
		})}},
		{"BroadcastKeepsNothing: keeps it all the same", faults{subscribe: func(ctx context.Context, h *handle, topic string, o queue.SubscribeOptions) (queue.Subscription, error) {
			if o.Group == "" {
				if s, err := h.disk.Subscribe(ctx, topic, queue.SubscribeOptions{Group: "g"}); err != nil || s.Close() != nil {
					return nil, err
				}
			}
			return h.disk.Subscribe(ctx, topic, o)
		}}},
		{"Prefetch: ignored", faults{subscribe: func(ctx context.Context, h *handle, topic string, o queue.SubscribeOptions) (queue.Subscription, error) {
			o.Prefetch = 100
			return h.disk.Subscribe(ctx, topic, o)
		}}},
		{"AckedIsGone: Ack does nothing", faults{ack: func(context.Context, *delivery) error { return nil }}},
		{"NackRedelivers: drops", faults{nack: func(ctx context.Context, d *delivery, _ queue.NackOptions) error { return d.Delivery.Ack(ctx) }}},
		{"NackRedelivers: attempts not counted", faults{attempt: func(*delivery) int { return 1 }}},
		{"CloseRedelivers: unsettled ones are lost", faults{closeSub: func(s *reader) error {
			return nil // and what it holds stays held
		}}},
		{"SettleOnce: any number of times", faults{ack: func(ctx context.Context, d *delivery) error {
			if err := d.Delivery.Ack(ctx); !errors.Is(err, queue.ErrSettled) {
				return err
			}
			return nil
		}}},
		{"MaxAttempts: without end", faults{subscribe: func(ctx context.Context, h *handle, topic string, o queue.SubscribeOptions) (queue.Subscription, error) {
			o.MaxAttempts = 1000
			return h.disk.Subscribe(ctx, topic, o)
		}}},
		{"NotBefore: ignored", faults{publish: altered(func(m *queue.Message) { m.NotBefore = time.Time{} })}},
		{"NotBefore: early", faults{publish: altered(func(m *queue.Message) {
			if !m.NotBefore.IsZero() {
				m.NotBefore = m.NotBefore.Add(-60 * time.Millisecond)
			}
		})}},
		{"NackDelay: ignored", faults{nack: func(ctx context.Context, d *delivery, o queue.NackOptions) error {
			o.Delay = 0
			return d.Delivery.Nack(ctx, o)
		}}},
		{"DeadLetters: reason lost", faults{letters: func(ls []queue.DeadLetter) []queue.DeadLetter {
			for i := range ls {
				ls[i].Reason = ""
			}
			return ls
		}}},
		{"DeadLetters: newest first", faults{letters: func(ls []queue.DeadLetter) []queue.DeadLetter {
			slices.Reverse(ls)
			return ls
		}}},
		{"DeadLetters: a limit takes the newest", faults{letters: func(ls []queue.DeadLetter) []queue.DeadLetter {
			if len(ls) == 2 {
				slices.Reverse(ls)
			}
			return ls
		}}},
		{"DeadLetters: replayed to every group", faults{replay: func(ctx context.Context, h *handle, topic, group string, ids []string) (int, error) {
			n, err := h.disk.Drop(ctx, topic, group, ids...)
			for range n {
				err = errors.Join(err, h.disk.Publish(ctx, topic, []queue.Message{{ID: ids[0], Body: []byte(ids[0])}}, queue.PublishOptions{}))
			}
			return n, err
		}}},
		{"DeadLettersOfMaxAttempts: dropped", faults{letters: func([]queue.DeadLetter) []queue.DeadLetter { return nil }}},
		{"DeadLettererAsDeclared: hidden", faults{hides: true}},
		{"DeadLettererAsDeclared: dead ones come back", faults{nack: func(ctx context.Context, d *delivery, o queue.NackOptions) error {
			return d.Delivery.Nack(ctx, queue.NackOptions{})
		}}},
		{"Concurrency: drops every tenth", faults{publish: func(ctx context.Context, h *handle, topic string, msgs []queue.Message) error {
			if strings.HasSuffix(msgs[0].ID, "7") {
				return nil
			}
			return h.disk.Publish(ctx, topic, msgs, queue.PublishOptions{})
		}}},
		{"CancelledContext: Publish goes ahead", faults{publish: func(ctx context.Context, h *handle, topic string, msgs []queue.Message) error {
			return h.disk.Publish(context.WithoutCancel(ctx), topic, msgs, queue.PublishOptions{})
		}}},
		{"CancelledContext: Ack goes ahead", faults{ack: func(ctx context.Context, d *delivery) error {
			return errors.Join(d.Delivery.Ack(context.WithoutCancel(ctx)), ctx.Err())
		}}},
		{"BlockedNextHonoursContext: reports its own error", faults{next: func(ctx context.Context, s *reader) (queue.Delivery, error) {
			d, err := s.receive(ctx)
			if err != nil {
				err = errors.New("timeout")
			}
			return d, err
		}}},
		{"BlockedNextHonoursContext: swallows a message", faults{next: swallowing}},
		{"SubscriptionClose: Next goes on", faults{closeSub: func(*reader) error { return nil }}},
		{"QueueClose: Publish goes on", faults{closeQueue: func(h *handle) error { return h.end() }}},
		{"QueueClose: nobody is told", faults{closeQueue: func(*handle) error { return nil }}},
		{"Reopen: everything lost", faults{forgets: true}},
		{"SecondHandle: storage of its own", faults{forgets: true}},
		{"SecondHandleBroadcast: within one process only", faults{forgets: true}},
		{"SecondHandleClose: keeps what it held", faults{closeQueue: func(h *handle) error { return nil }}},
		{"SecondHandleDelay: timers die with the process", faults{publish: func(ctx context.Context, h *handle, topic string, msgs []queue.Message) error {
			go func() {
				select {
				case <-h.closed:
				case <-time.After(time.Until(msgs[0].NotBefore)):
					_ = h.disk.Publish(context.Background(), topic, msgs, queue.PublishOptions{}) // a check will miss it
				}
			}()
			return nil
		}}},
	}
}

func deduplicating(ctx context.Context, h *handle, topic string, msgs []queue.Message) error {
	seen := map[string]bool{}
	msgs = slices.DeleteFunc(slices.Clone(msgs), func(m queue.Message) bool {
		dup := m.ID != "" && seen[m.ID]
		seen[m.ID] = true
		return dup
	})
	return h.disk.Publish(ctx, topic, msgs, queue.PublishOptions{})
}

// sharing returns the same memory for every delivery of a message.
func sharing() func(d *delivery) queue.Message {
	first := map[string]queue.Message{}
	return func(d *delivery) queue.Message {
		m, ok := first[d.Delivery.Message().ID]
		if !ok {
			m = d.Delivery.Message()
			first[m.ID] = m
		}
		return m
	}
}

// regrouped has every reader read as one group.
func regrouped(name string) func(ctx context.Context, h *handle, topic string, o queue.SubscribeOptions) (queue.Subscription, error) {
	return func(ctx context.Context, h *handle, topic string, o queue.SubscribeOptions) (queue.Subscription, error) {
		o.Group = name
		return h.disk.Subscribe(ctx, topic, o)
	}
}

// swallowing takes a message although its caller has left.
func swallowing(ctx context.Context, s *reader) (queue.Delivery, error) {
	type result struct {
		d   queue.Delivery
		err error
	}
	got := make(chan result, 1)
	go func() {
		d, err := s.receive(context.WithoutCancel(ctx))
		got <- result{d, err}
	}()
	select {
	case r := <-got:
		return r.d, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}
