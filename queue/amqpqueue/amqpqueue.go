// Package amqpqueue is a durable queue.Queue on RabbitMQ (3.10 or newer, AMQP
// 0-9-1), for several processes on several machines.
//
// # Topology
//
// With the default options, everything is published to the durable direct
// exchange solstice.jobs with the topic as routing key. The first group of a
// topic has the quorum queue solstice.TOPIC.v1, every later one
// solstice.TOPIC:GROUP.v1; the durable exchange solstice.TOPIC.v1, to which
// nothing is published, remembers which group was first. Dead letters go
// through the exchange solstice.dlx to the queue of the same name with .dlq,
// at least once. A broadcast reader has an exclusive queue, and
// solstice.TOPIC.sink, which keeps nothing, marks a topic that has had one.
// Delays are made by the queues solstice.delay.MILLISECONDS, one for each power
// of two. All of it is declared when it is first needed and after every
// reconnect. Installations that share a virtual host need exchanges and
// prefixes of their own.
//
// # What differs from other drivers
//
//   - A reader is sent what its calls of Next ask for and nothing in advance,
//     so messages never wait for a reader that is busy.
//   - AMQP does not confirm an ack: a connection that breaks within
//     milliseconds of one may deliver the message again.
//   - Deliveries under way when a connection breaks count as attempts, even if
//     the reader never saw them. MaxAttempts above 1000 means 1000.
//   - Delayed and replayed messages come last, and a nack with a delay or to
//     the dead letters may duplicate a message when it fails.
//   - The broker closes the channel of a reader that holds a delivery longer
//     than its consumer_timeout (30 minutes by default); everything that reader
//     holds is delivered again, and settling it wraps queue.ErrSettled.
//   - While a group's queue is missing because somebody deleted it, messages
//     for a topic with other readers are lost to that group, until a reader of
//     it, which notices at once, has declared the queue anew. Without other
//     readers Publish declares it.
//   - Dead letters are in the hand of who looks at them, one at a time, and come
//     back in any order: see DeadLetters, which sorts them.
//   - A message that comes for a Next whose context has just ended, and for no
//     other one, goes back to the queue's end.
//   - A broadcast reader misses what is published while it is disconnected.
//   - RabbitMQ 3 writes what is declared to disk some seconds later, but confirms
//     messages at once: one that is killed within seconds of a topic's first use
//     may forget the queue, with what was confirmed in it.
//
// # Metrics
//
//	messaging.client.sent.messages       counter, by messaging.destination.name (the topic) and error.type
//	messaging.client.consumed.messages   counter, by messaging.destination.name (the topic) and messaging.consumer.group.name
//	messaging.client.operation.duration  histogram in seconds, from Publish to the last confirm
//	solstice.amqp.connected              gauge: 1 while connected
//	solstice.amqp.blocked                gauge: 1 while the broker takes no messages (memory or disk alarm)
//	solstice.amqp.reconnects             counter
//	solstice.amqp.returned               counter: messages that found no queue at first
//	solstice.amqp.resubscribes           counter: readers that lost their channel or queue and got another
//
// Publish makes the producer span "publish TOPIC". A delivery to a group has the
// client span "receive TOPIC", in the trace that callers of Publish put into the
// message with queue.Inject, and "ack TOPIC" or "nack TOPIC", in the trace of who
// settles it. Attributes are those of OTel's conventions for RabbitMQ
// (https://opentelemetry.io/docs/specs/semconv/messaging/rabbitmq/), so
// messaging.destination.name is EXCHANGE:KEY, of deliveries EXCHANGE:KEY:QUEUE.
// No span holds bodies.
package amqpqueue

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"slices"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/solstice-ci/solstice-go/queue"
)

// closeTimeout bounds Close, of the queue and of a subscription.
const closeTimeout = 5 * time.Second

// Options for Open. URL is required; the zero value of all others is the
// default.
type Options struct {
	// URL of the broker, amqp://USER:PASSWORD@HOST:PORT/VHOST or amqps://….
	// Of its query heartbeat, connection_timeout, server_name_indication and
	// auth_mechanism are understood (plain, amqplain or external; see
	// https://www.rabbitmq.com/docs/uri-query-parameters). No error shows the
	// user's password.
	URL string
	// TLS for amqps: authorities, client certificates. Nil trusts the system's.
	TLS *tls.Config
	// Exchange for messages; empty means solstice.jobs.
	Exchange string
	// Prefix of the names of queues and other exchanges; empty means solstice.
	Prefix string
	// Prefetch for subscriptions that do not say; 0 means
	// queue.DefaultPrefetch.
	Prefetch int
	// ConnectTimeout bounds connecting, with all handshakes; 0 means 10 s.
	ConnectTimeout time.Duration
	// Heartbeat is how often both sides show that they live; a broker that
	// does not for 1.5 times as long has its connection closed. 0 means 10 s.
	Heartbeat time.Duration
	// ConnectionName is what the broker shows to its operators.
	ConnectionName string
	// Logger: nil discards.
	Logger *slog.Logger
	// TracerProvider and MeterProvider: nil means OTel's global one.
	TracerProvider trace.TracerProvider
	MeterProvider  metric.MeterProvider
}

// Queue is a queue on a broker. Make it with Open.
type Queue struct {
	o    Options
	uri  amqp.URI
	tls  *tls.Config
	sasl []amqp.Authentication
	log  *slog.Logger
	m    *metrics

	ctx      context.Context // ended by Close, first of all
	cancel   context.CancelFunc
	finish   chan struct{} // closed by Close when the connection may go
	closed   chan struct{} // Close is complete
	closeErr error
	wg       sync.WaitGroup // the supervisor

	mu      sync.Mutex
	live    *session
	why     error         // there is none
	changed chan struct{} // closed when live or why do
	readers map[*reader]struct{}
}

// Open connects, and returns once the broker has what the queue needs. Later it
// reconnects by itself, for ever.
func Open(ctx context.Context, o Options) (*Queue, error) {
	uri, err := parse(o.URL)
	if err != nil {
		return nil, err
	}
	o.Exchange, o.Prefix = cmp.Or(o.Exchange, "solstice.jobs"), cmp.Or(o.Prefix, "solstice")
	for what, name := range map[string]string{"exchange": o.Exchange, "prefix": o.Prefix} {
		if err := queue.ValidateName(what, name); err != nil {
			return nil, err
		}
	}
	if len(o.Prefix) > 40 { // names of queues have at most 255 bytes
		return nil, fmt.Errorf("%w: prefix longer than 40 characters", queue.ErrInvalid)
	}
	if o.Prefetch < 0 || o.ConnectTimeout < 0 || o.Heartbeat < 0 {
		return nil, fmt.Errorf("%w: negative prefetch, timeout or heartbeat", queue.ErrInvalid)
	}
	o.Prefetch = cmp.Or(o.Prefetch, queue.DefaultPrefetch)
	o.ConnectTimeout = cmp.Or(o.ConnectTimeout, time.Duration(uri.ConnectionTimeout)*time.Millisecond, 10*time.Second)
	o.Heartbeat = cmp.Or(o.Heartbeat, heartbeat(o.URL), 10*time.Second)
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	q := &Queue{
		o: o, uri: uri, log: o.Logger, tls: o.TLS.Clone(),
		finish: make(chan struct{}), closed: make(chan struct{}),
		changed: make(chan struct{}), readers: map[*reader]struct{}{},
	}
	if q.tls == nil {
		q.tls = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	q.tls.ServerName = cmp.Or(q.tls.ServerName, uri.ServerName, uri.Host)
	if q.sasl, err = mechanisms(uri); err != nil {
		return nil, err
	}
	if q.m, err = newMetrics(q); err != nil {
		return nil, err
	}
	q.ctx, q.cancel = context.WithCancel(context.Background())
	s, err := q.connect(ctx)
	if err != nil {
		q.cancel()
		q.m.unregister()
		return nil, err
	}
	q.live = s
	q.wg.Go(func() { q.supervise(s) })
	return q, nil
}

// parse does not repeat the URL, which holds a password.
func parse(s string) (amqp.URI, error) {
	uri, err := amqp.ParseURI(s)
	if err != nil {
		if _, ok := errors.AsType[*url.Error](err); ok {
			err = errors.New("it does not parse") // the cause may quote the password
		}
		return uri, fmt.Errorf("%w: %w", ErrURL, err)
	}
	if uri.CertFile != "" || uri.KeyFile != "" || uri.CACertFile != "" {
		return uri, fmt.Errorf("%w: certificates are given apart from it", ErrURL)
	}
	return uri, nil
}

// heartbeat is what the URL, which parsed before, says about it.
func heartbeat(s string) time.Duration {
	u, err := url.Parse(s)
	if err != nil {
		return 0
	}
	d, err := time.ParseDuration(u.Query().Get("heartbeat") + "s")
	if err != nil {
		return 0
	}
	return d
}

func mechanisms(uri amqp.URI) ([]amqp.Authentication, error) {
	var out []amqp.Authentication
	for _, m := range uri.AuthMechanism {
		switch m {
		case "plain", "PLAIN":
			out = append(out, uri.PlainAuth())
		case "amqplain", "AMQPLAIN":
			out = append(out, uri.AMQPlainAuth())
		case "external", "EXTERNAL":
			out = append(out, &amqp.ExternalAuth{})
		default:
			return nil, fmt.Errorf("%w: auth_mechanism %q", ErrURL, m)
		}
	}
	if out == nil {
		out = []amqp.Authentication{uri.PlainAuth()}
	}
	return out, nil
}

// Capabilities implements queue.Queue.
func (q *Queue) Capabilities() queue.Capabilities {
	return queue.Capabilities{Durable: true, MultiProcess: true, Delay: accuracy, DeadLetters: true}
}

// Ready returns nil while the broker is connected and takes messages, and
// otherwise says why not. It wraps ErrNotConnected, with the cause, ErrBlocked
// or queue.ErrClosed.
func (q *Queue) Ready(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if q.ctx.Err() != nil {
		return errClosed
	}
	q.mu.Lock()
	s, why := q.live, q.why
	q.mu.Unlock()
	switch {
	case s == nil:
		return fmt.Errorf("%w: %w", ErrNotConnected, why)
	case s.blocked.Load():
		return ErrBlocked
	}
	return nil
}

// Subscribe implements queue.Queue.
func (q *Queue) Subscribe(ctx context.Context, topic string, o queue.SubscribeOptions) (queue.Subscription, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	o.Prefetch = cmp.Or(o.Prefetch, q.o.Prefetch)
	if err := o.Validate(topic); err != nil {
		return nil, err
	}
	o.MaxAttempts = min(o.MaxAttempts, deliveryLimit)
	r := newReader(q, topic, o.Group)
	if o.Group == "" {
		l := newListener(r)
		if err := r.start(ctx, l.serve); err != nil {
			return nil, err
		}
		return l, nil
	}
	s := newSubscription(r, o)
	if err := r.start(ctx, s.serve); err != nil {
		return nil, err
	}
	return s, nil
}

// Close implements queue.Queue. It waits at most a few seconds for the broker;
// where that does not answer, it delivers again what was not settled as soon as
// it notices that the connection is gone, and the error says so.
func (q *Queue) Close() error {
	q.mu.Lock()
	if q.ctx.Err() != nil {
		q.mu.Unlock()
		<-q.closed
		return q.closeErr
	}
	q.cancel()
	readers := slices.Collect(maps.Keys(q.readers))
	q.mu.Unlock()

	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	for _, r := range readers {
		r.cancel()
	}
	for _, r := range readers {
		select {
		case <-r.finished:
		case <-ctx.Done():
		}
	}
	close(q.finish)
	q.wg.Wait()
	if s := q.live; s != nil { // the supervisor, which sets it, is gone
		if err := s.close(ctx); err != nil {
			q.closeErr = fmt.Errorf("amqpqueue: close: %w", err)
		}
	}
	for _, r := range readers {
		<-r.finished // without a connection nothing holds them up
	}
	q.m.unregister()
	close(q.closed)
	return q.closeErr
}

var (
	_ queue.Queue        = (*Queue)(nil)
	_ queue.DeadLetterer = (*Queue)(nil)
)
