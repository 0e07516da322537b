// Package queue carries small messages between the processes of a CI system:
// run requests, wake-ups and commit statuses.
//
// A topic has two kinds of readers. Readers that name the same Group compete:
// each message goes to one of them, survives restarts, and is delivered again
// until it is settled (at least once). Readers without a Group hear a
// broadcast: every one of them gets every message published while it listens,
// and nothing that came before or while it was away.
//
// The interface is what a driver implements. Programs normally receive through
// [Consumer], which adds concurrency, tracing, panic recovery and outcomes as
// returned errors. Drivers: queue/memqueue (one process), queue/sqlqueue
// (SQLite or PostgreSQL), queue/amqpqueue (RabbitMQ). queue/queuetest is the
// conformance suite that a driver has to pass.
package queue

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// Errors that callers act on; drivers wrap them, callers use errors.Is.
var (
	// ErrClosed: the queue or subscription was closed.
	ErrClosed = errors.New("queue: closed")
	// ErrSettled: the delivery was acked or nacked before, or its claim ran
	// out and another reader has it.
	ErrSettled = errors.New("queue: delivery already settled")
	// ErrInvalid: a topic, group or message breaks the rules of this package.
	ErrInvalid = errors.New("queue: invalid argument")
)

// Limits that hold for every driver, so that a message accepted by one is
// accepted by all.
const (
	// MaxBodyBytes is the largest message body: 1 MiB.
	MaxBodyBytes = 1 << 20
	// MaxIDBytes is the longest message ID; AMQP's short string sets it.
	MaxIDBytes = 255
	// MaxAttributeBytes bounds the keys and values of one message's
	// attributes together: 16 KiB.
	MaxAttributeBytes = 16 << 10
	// BroadcastBacklog is how many messages a driver keeps for a broadcast
	// reader that does not call Next. A reader further behind loses the oldest:
	// broadcasts wake, they are not a store.
	BroadcastBacklog = 4096
)

// Defaults of [SubscribeOptions], for drivers.
const (
	DefaultPrefetch    = 64
	DefaultMaxAttempts = 20
)

// Message is plain data; the receiver owns what it is given.
type Message struct {
	// ID identifies the message for deduplication and tracing; Publish fills
	// in a random one when it is empty. Drivers do not deduplicate.
	ID          string
	Body        []byte
	ContentType string
	// Attributes are short strings beside the body: trace context, schema.
	Attributes map[string]string
	// NotBefore delays the first delivery to groups; broadcasts ignore it. The
	// zero time means now. Accuracy is the driver's; what a receiver finds here
	// is informative and may be rounded to microseconds or missing.
	NotBefore time.Time
}

// PublishOptions has no fields yet; its zero value is the default.
type PublishOptions struct{}

// SubscribeOptions says how to read a topic.
type SubscribeOptions struct {
	// Group names the competing consumers; empty means broadcast.
	Group string
	// Prefetch bounds deliveries handed out and not yet settled; 0 means 64.
	Prefetch int
	// MaxAttempts is how often a message is delivered to the group before it
	// is dead-lettered; 0 means 20.
	MaxAttempts int
}

// NackOptions says what becomes of a message that was not handled.
type NackOptions struct {
	// Delay before the message is delivered again.
	Delay time.Duration
	// DeadLetter puts the message aside instead of delivering it again.
	DeadLetter bool
	// Reason is kept with a dead letter, for people.
	Reason string
}

// Capabilities are what a driver does more or less well. The conformance suite
// asks for exactly what is declared here.
type Capabilities struct {
	Durable      bool          // published messages survive the process and the machine
	MultiProcess bool          // several processes may share the queue
	Delay        time.Duration // accuracy of NotBefore and NackOptions.Delay; 0: not supported, delivered at once
	DeadLetters  bool          // DeadLetterer is implemented
}

// Queue is implemented by drivers. All methods are safe for concurrent use and
// return promptly with ctx.Err() once ctx is done.
type Queue interface {
	// Publish returns nil once every message is durable (as far as the driver
	// is Durable) and routed to every group that ever subscribed to the topic.
	// A topic that never had a reader of either kind keeps messages for the
	// group that comes first; one that only broadcasts keeps none. When some
	// messages failed and others did not the error is a *PublishError. After
	// ErrInvalid nothing was published; after any other error the outcome is
	// unknown, and publishing again may duplicate messages. Messages of one
	// call keep their order within a group until one is redelivered or delayed.
	Publish(ctx context.Context, topic string, msgs []Message, o PublishOptions) error
	// Subscribe starts reading. The subscription outlives ctx; end it with Close.
	Subscribe(ctx context.Context, topic string, o SubscribeOptions) (Subscription, error)
	Capabilities() Capabilities
	// Close releases the queue; later calls, and blocked ones, fail with
	// ErrClosed. Unsettled deliveries are redelivered to other readers.
	Close() error
}

// Subscription is one reader.
type Subscription interface {
	// Next blocks until a delivery, ctx's end or ErrClosed. Lost connections
	// are the driver's to mend, not an error of Next. Broadcast deliveries
	// need no settling.
	Next(ctx context.Context) (Delivery, error)
	// Close gives unsettled deliveries back at once.
	Close() error
}

// Delivery is one message in hand. Settle it once; a second settlement wraps
// ErrSettled and changes nothing.
type Delivery interface {
	Message() Message
	// Attempt counts deliveries of this message to this group, from 1.
	Attempt() int
	// Ack removes the message for the group. After an error other than
	// ErrSettled and a ctx that was done before the call, the outcome is
	// unknown: the message is removed or delivered again.
	Ack(ctx context.Context) error
	// Nack has the message delivered again, or dead-lettered. A crash in the
	// middle may duplicate the message, never lose it.
	Nack(ctx context.Context, o NackOptions) error
}

// DeadLetter is a message a group gave up on.
type DeadLetter struct {
	Message Message
	Topic   string
	Group   string
	Reason  string
	Attempt int
	Time    time.Time
}

// DeadLetterer is implemented by drivers whose dead letters can be looked at;
// get it with [As].
type DeadLetterer interface {
	// DeadLetters lists at most limit letters of a group, oldest first. An
	// unknown topic or group has none.
	DeadLetters(ctx context.Context, topic, group string, limit int) ([]DeadLetter, error)
	// Replay publishes the letters with the given message IDs to their group
	// again, with a fresh count of attempts, and reports how many there were.
	// Without IDs it does nothing.
	Replay(ctx context.Context, topic, group string, ids ...string) (int, error)
	// Drop deletes letters. Without IDs it does nothing.
	Drop(ctx context.Context, topic, group string, ids ...string) (int, error)
}

// As returns q as the optional interface T. A wrapper answers for what it
// wraps through a method As(target any) bool, which gets a *T to fill in.
func As[T any](q Queue) (T, bool) {
	if w, ok := q.(interface{ As(target any) bool }); ok {
		var t T
		return t, w.As(&t)
	}
	t, ok := q.(T)
	return t, ok
}

// PublishError names the messages of a Publish call that failed; the others
// were published.
type PublishError struct {
	Failed map[int]error // by index into msgs
}

func (e *PublishError) Error() string {
	keys := slices.Sorted(maps.Keys(e.Failed))
	if len(keys) == 0 {
		return "queue: publish failed"
	}
	return fmt.Sprintf("queue: %d messages not published, first: message %d: %v", len(keys), keys[0], e.Failed[keys[0]])
}

// Unwrap gives errors.Is and errors.As access to every cause.
func (e *PublishError) Unwrap() []error {
	errs := make([]error, 0, len(e.Failed))
	for _, k := range slices.Sorted(maps.Keys(e.Failed)) {
		errs = append(errs, e.Failed[k])
	}
	return errs
}

// Validate checks what a driver must refuse, and gives the options their
// defaults. Drivers call it first in Subscribe.
func (o *SubscribeOptions) Validate(topic string) error {
	if err := ValidateName("topic", topic); err != nil {
		return err
	}
	if o.Group != "" {
		if err := ValidateName("group", o.Group); err != nil {
			return err
		}
	}
	if o.Prefetch < 0 || o.MaxAttempts < 0 {
		return fmt.Errorf("%w: negative prefetch or attempts", ErrInvalid)
	}
	if o.Prefetch == 0 {
		o.Prefetch = DefaultPrefetch
	}
	if o.MaxAttempts == 0 {
		o.MaxAttempts = DefaultMaxAttempts
	}
	return nil
}

// Prepare checks the arguments of Publish and returns deep copies of the
// messages with their IDs filled in, which the driver may keep.
// Drivers call it first in Publish.
func Prepare(topic string, msgs []Message) ([]Message, error) {
	if err := ValidateName("topic", topic); err != nil {
		return nil, err
	}
	out := make([]Message, len(msgs))
	for i, m := range msgs {
		if err := m.validate(); err != nil {
			return nil, fmt.Errorf("message %d: %w", i, err)
		}
		if m.ID == "" {
			m.ID = rand.Text()
		}
		out[i] = m.Clone()
	}
	return out, nil
}

// Clone returns a copy that shares no memory with m.
func (m Message) Clone() Message {
	m.Body = slices.Clone(m.Body)
	m.Attributes = maps.Clone(m.Attributes)
	return m
}

func (m *Message) validate() error {
	if len(m.Body) > MaxBodyBytes {
		return fmt.Errorf("%w: body of %d bytes, at most %d", ErrInvalid, len(m.Body), MaxBodyBytes)
	}
	if len(m.ID) > MaxIDBytes || len(m.ContentType) > MaxIDBytes {
		return fmt.Errorf("%w: ID or content type longer than %d bytes", ErrInvalid, MaxIDBytes)
	}
	if !isText(m.ID) || !isText(m.ContentType) {
		return fmt.Errorf("%w: ID or content type is not UTF-8 text", ErrInvalid)
	}
	size := 0
	for k, v := range m.Attributes {
		size += len(k) + len(v)
		if k == "" || len(k) > MaxIDBytes || !isText(k) || !isText(v) {
			return fmt.Errorf("%w: attribute %q is empty, too long or not UTF-8 text", ErrInvalid, k)
		}
	}
	if size > MaxAttributeBytes {
		return fmt.Errorf("%w: %d bytes of attributes, at most %d", ErrInvalid, size, MaxAttributeBytes)
	}
	return nil
}

// isText says that s is UTF-8 without NUL, which PostgreSQL cannot store.
func isText(s string) bool {
	return utf8.ValidString(s) && strings.IndexByte(s, 0) < 0
}

// ValidateName checks a topic or group name: 1 to 100 characters of a-z, 0-9,
// '-', '_' and '.', beginning with a letter or digit. Drivers call it.
func ValidateName(kind, name string) error {
	ok := name != "" && len(name) <= 100 && !strings.ContainsAny(name[:1], "-_.")
	for i := 0; ok && i < len(name); i++ {
		c := name[i]
		ok = c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.'
	}
	if !ok {
		return fmt.Errorf("%w: %s %q: want 1 to 100 of a-z 0-9 - _ . beginning with a letter or digit", ErrInvalid, kind, name)
	}
	return nil
}
