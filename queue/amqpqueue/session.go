package amqpqueue

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/solstice-ci/solstice-go/queue"
)

// Kept bare for comparisons without a search through wrapped errors.
var (
	errClosed = queue.ErrClosed
	// errNoCertificate: nothing to show to a broker that asks.
	errNoCertificate = errors.New("the broker asks for one, none was given")

	errReturned = errors.New("amqpqueue: message returned as unroutable")
)

// session is one connection.
type session struct {
	q       *Queue
	raw     *transport
	conn    *amqp.Connection
	blocked atomic.Bool

	ctx  context.Context // ends, with the cause, when the connection does
	end  context.CancelCauseFunc
	work sync.WaitGroup // all that uses the connection; see spawn

	admin   chan struct{} // capacity 1: who holds it may use adminCh
	adminCh *amqp.Channel

	letters chan struct{} // capacity 1: who holds it may walk through dead letters

	mu    sync.Mutex
	pub   *publisher
	over  bool
	known map[string]struct{} // see knows
}

// connect opens a connection, or says why it can't.
func (q *Queue) connect(ctx context.Context) (*session, error) {
	ctx, cancel := context.WithTimeout(ctx, q.o.ConnectTimeout)
	defer cancel()
	where := net.JoinHostPort(q.uri.Host, strconv.Itoa(q.uri.Port))
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", where)
	if err != nil {
		return nil, classifyDial(err, where)
	}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() }) // ends whatever below waits for the broker
	defer stop()
	s, err := q.open(ctx, c, where)
	if err == nil {
		return s, nil
	}
	_ = c.Close()
	if s != nil {
		s.raw.Close()
		s.end(err)
	}
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, context.Canceled):
		return nil, cause
	case cause != nil:
		return nil, fmt.Errorf("%w: %s: %w", ErrUnreachable, where, cause)
	}
	return nil, err
}

func (q *Queue) open(ctx context.Context, c net.Conn, where string) (*session, error) {
	var shown error // what was wrong with our certificate
	if q.uri.Scheme == "amqps" {
		tc := tls.Client(c, q.identified(&shown))
		if err := tc.HandshakeContext(ctx); err != nil {
			if !isTLS(err) && ctx.Err() == nil {
				err = fmt.Errorf("%w: %w", ErrTLS, err)
			}
			return nil, because(classifyDial(err, where), shown)
		}
		c = tc
	}
	s := &session{q: q, raw: newTransport(c), admin: make(chan struct{}, 1), letters: make(chan struct{}, 1), known: map[string]struct{}{}}
	s.ctx, s.end = context.WithCancelCause(context.Background())
	properties := amqp.NewConnectionProperties()
	properties["product"], properties["connection_name"] = "Solstice", q.o.ConnectionName
	delete(properties, "version")
	conn, err := amqp.Open(s.raw, amqp.Config{
		SASL: q.sasl, Vhost: q.uri.Vhost, Heartbeat: q.o.Heartbeat, Properties: properties, Locale: "en_US",
	})
	if err != nil {
		return s, because(classifyOpen(err, s.raw.cause(), where), shown)
	}
	s.conn = conn
	closes := conn.NotifyClose(make(chan *amqp.Error, 1))
	blocks := conn.NotifyBlocked(make(chan amqp.Blocking, 1))
	s.spawn(func() {
		err, ok := <-closes
		if !ok {
			s.end(errClosed)
			return
		}
		if cause := s.raw.cause(); cause != nil && !err.Server {
			s.end(fmt.Errorf("%w: %w", ErrConnectionLost, cause))
			return
		}
		s.end(fmt.Errorf("%w: %w", ErrConnectionLost, err))
	})
	s.spawn(func() {
		for b := range blocks {
			s.blocked.Store(b.Active)
			q.log.Warn("amqpqueue: broker blocks publishing", "blocked", b.Active, "reason", b.Reason)
		}
	})
	if err := q.prepare(s); err != nil {
		return s, fmt.Errorf("connect to %s: %w", where, classify(err))
	}
	return s, nil
}

// identified is the TLS configuration of a connection, which notes when the
// broker asks for a certificate that we have not: its alert often does not say.
func (q *Queue) identified(shown *error) *tls.Config {
	if q.tls.GetClientCertificate != nil {
		return q.tls
	}
	c := q.tls.Clone()
	c.GetClientCertificate = func(r *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		*shown = errNoCertificate
		for i := range c.Certificates {
			if *shown = r.SupportsCertificate(&c.Certificates[i]); *shown == nil {
				return &c.Certificates[i], nil
			}
		}
		return new(tls.Certificate), nil
	}
	return c
}

// because adds to a failure of TLS what was wrong with our certificate.
func because(err, shown error) error {
	if shown == nil || !errors.Is(err, ErrTLS) {
		return err
	}
	return fmt.Errorf("%w; client certificate: %w", err, shown)
}

// prepare opens the channels that every session has.
func (q *Queue) prepare(s *session) (err error) {
	if s.adminCh, err = s.conn.Channel(); err != nil {
		return err
	}
	if err := q.declareExchanges(s.adminCh); err != nil {
		return err
	}
	return s.beginPublishing()
}

// beginPublishing opens the channel to publish on, and another one each time the
// broker closes it, as it does with what it refuses.
func (s *session) beginPublishing() error {
	ch, err := s.conn.Channel()
	if err != nil {
		return err
	}
	closes := ch.NotifyClose(make(chan *amqp.Error, 1))
	p, err := newPublisher(s, ch)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.pub = p
	s.mu.Unlock()
	s.spawn(func() {
		defer close(p.over)
		err, ok := <-closes
		if !ok || !err.Server || s.conn.IsClosed() {
			return
		}
		s.q.log.Error("amqpqueue: broker closed the publishing channel", "error", err)
		p.refuse(err)
		// Where an exchange is gone all has to be declared anew.
		if err.Code == amqp.NotFound || s.beginPublishing() != nil {
			_ = s.raw.Close()
		}
	})
	return nil
}

// publisher waits for a channel to publish on.
func (s *session) publisher(ctx context.Context) (*publisher, error) {
	for {
		s.mu.Lock()
		p := s.pub
		s.mu.Unlock()
		if !p.ch.IsClosed() {
			return p, nil
		}
		select {
		case <-p.over:
			s.mu.Lock()
			replaced := s.pub != p
			s.mu.Unlock()
			if replaced {
				continue
			}
			<-s.ctx.Done()
		case <-s.ctx.Done():
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		return nil, context.Cause(s.ctx)
	}
}

// spawn runs fn, for which the session's end waits. It returns false where that
// has come.
func (s *session) spawn(fn func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return false
	}
	s.work.Go(fn)
	return true
}

// wait waits for all that was spawned, which has to end since the connection
// was closed.
func (s *session) wait() {
	s.mu.Lock()
	s.over = true
	s.mu.Unlock()
	s.work.Wait()
}

// lost says that what was under way failed with the connection, and why.
func (s *session) lost(err error) error {
	if cause := context.Cause(s.ctx); cause != nil {
		return cause
	}
	return fmt.Errorf("%w: %w", ErrConnectionLost, err)
}

// do runs declarations on the channel for them, one caller at a time. It does
// not wait for them longer than ctx, so they must be such that do no harm when
// they happen later.
func (s *session) do(ctx context.Context, fn func(ch *amqp.Channel) error) error {
	select {
	case s.admin <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	case <-s.ctx.Done():
		return context.Cause(s.ctx)
	}
	done := make(chan error, 1)
	ok := s.spawn(func() {
		defer func() { <-s.admin }()
		if s.adminCh.IsClosed() { // the broker closes it with every refusal
			ch, err := s.conn.Channel()
			if err != nil {
				done <- s.lost(err)
				return
			}
			s.adminCh = ch
		}
		done <- fn(s.adminCh)
	})
	if !ok {
		return context.Cause(s.ctx)
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// channel opens a channel of one's own.
func (s *session) channel(ctx context.Context) (*amqp.Channel, error) {
	type result struct {
		ch  *amqp.Channel
		err error
	}
	done := make(chan result, 1)
	ok := s.spawn(func() {
		ch, err := s.conn.Channel()
		done <- result{ch, err}
	})
	if !ok {
		return nil, context.Cause(s.ctx)
	}
	select {
	case r := <-done:
		if r.err != nil {
			return nil, s.lost(r.err)
		}
		return r.ch, nil
	case <-ctx.Done():
		s.spawn(func() {
			if r := <-done; r.err == nil {
				_ = r.ch.Close() // nobody waits for it
			}
		})
		return nil, ctx.Err()
	}
}

// knows reports whether learn was called with that name in this session, for
// what need not be asked or declared again.
func (s *session) knows(name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.known[name]
	return ok
}

func (s *session) learn(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known[name] = struct{}{}
}

// close ends the session in good order within ctx, otherwise at once.
func (s *session) close(ctx context.Context) (err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		err = s.conn.Close()
	}()
	select {
	case <-done:
	case <-ctx.Done():
		_ = s.raw.Close()
		<-done
		err = ErrUnreachable
	}
	_ = s.raw.Close()
	s.end(errClosed)
	s.wait()
	if errors.Is(err, amqp.ErrClosed) {
		err = nil // it had ended by itself
	}
	return err
}

// supervise keeps the queue connected until it closes.
func (q *Queue) supervise(s *session) {
	for s != nil {
		q.setLive(s, nil)
		select {
		case <-q.finish:
			return
		case <-s.ctx.Done():
		}
		cause := context.Cause(s.ctx)
		q.setLive(nil, cause)
		q.log.Warn("amqpqueue: disconnected", "error", cause)
		_ = s.raw.Close()
		s.wait()
		s = q.reconnect()
	}
}

// reconnect tries for ever, or until the queue closes.
func (q *Queue) reconnect() *session {
	ctx := q.ctx
	retry := backoff.NewExponentialBackOff()
	retry.InitialInterval, retry.MaxInterval = 100*time.Millisecond, 10*time.Second
	for {
		s, err := q.connect(ctx)
		if err == nil {
			q.log.Info("amqpqueue: connected again")
			q.m.reconnects.Add(ctx, 1)
			return s
		}
		if ctx.Err() != nil {
			return nil
		}
		q.setLive(nil, err)
		wait := retry.NextBackOff()
		q.log.Warn("amqpqueue: cannot connect", "error", err, "again_in", wait)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
	}
}

// setLive says which session is in use, or why none is.
func (q *Queue) setLive(s *session, why error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.live, q.why = s, why
	close(q.changed)
	q.changed = make(chan struct{})
}

// session waits for a connection.
func (q *Queue) session(ctx context.Context) (*session, error) {
	for {
		q.mu.Lock()
		s, changed, why := q.live, q.changed, q.why
		q.mu.Unlock()
		if s != nil {
			return s, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w: %w", ctx.Err(), ErrNotConnected, why)
		case <-q.ctx.Done():
			return nil, errClosed
		}
	}
}
