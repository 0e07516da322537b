package amqpqueue

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"

	amqp "github.com/rabbitmq/amqp091-go"
)

// What can be wrong with a broker. Open and the methods of Queue wrap these, so
// that a daemon can tell a person what to do.
var (
	// ErrURL: the broker's URL is not understood.
	ErrURL = errors.New("amqpqueue: broker URL not valid")
	// ErrHostNotFound: the broker's name does not resolve.
	ErrHostNotFound = errors.New("amqpqueue: broker host name does not resolve")
	// ErrRefused: nothing listens there, or what does speaks no AMQP 0-9-1.
	ErrRefused = errors.New("amqpqueue: broker refused the connection")
	// ErrUnreachable: no answer within Options.ConnectTimeout.
	ErrUnreachable = errors.New("amqpqueue: broker does not answer")
	// ErrTLS: certificates, or one side insists on TLS and the other has none.
	ErrTLS = errors.New("amqpqueue: TLS to the broker failed")
	// ErrAuth: user or password is wrong.
	ErrAuth = errors.New("amqpqueue: broker refused user or password")
	// ErrVHost: the virtual host does not exist, or is not the user's.
	ErrVHost = errors.New("amqpqueue: no access to the virtual host")
	// ErrPermission: the user may not declare, write or read what the queue
	// needs.
	ErrPermission = errors.New("amqpqueue: user lacks permissions")
	// ErrTopology: an exchange or queue of that name exists and is different.
	ErrTopology = errors.New("amqpqueue: exchange or queue exists with other properties")
	// ErrConnectionLost: the connection, or one channel of it, ended during the
	// call. Whether the broker did what was asked is unknown.
	ErrConnectionLost = errors.New("amqpqueue: connection to the broker lost")
	// ErrNotConnected: there is no connection at the moment.
	ErrNotConnected = errors.New("amqpqueue: not connected to the broker")
	// ErrBlocked: the broker takes no messages, for want of memory or disk.
	ErrBlocked = errors.New("amqpqueue: broker takes no messages for now")
	// ErrRejected: the broker refused a message.
	ErrRejected = errors.New("amqpqueue: broker refused the message")
	// ErrUnroutable: no queue took a message, although one was declared for it.
	ErrUnroutable = errors.New("amqpqueue: message could not be routed")
)

// classifyDial adds the sentinel that says why there is no transport.
func classifyDial(err error, where string) error {
	var reason error
	_, isDNS := errors.AsType[*net.DNSError](err)
	ne, isNet := errors.AsType[net.Error](err)
	switch {
	case isTLS(err), errors.Is(err, ErrTLS):
		reason = ErrTLS
	case isDNS:
		reason = ErrHostNotFound
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET), errors.Is(err, io.EOF):
		reason = ErrRefused
	case isNet && ne.Timeout(), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH), errors.Is(err, context.DeadlineExceeded):
		reason = ErrUnreachable
	}
	if reason == nil {
		return fmt.Errorf("amqpqueue: connect to %s: %w", where, err)
	}
	return fmt.Errorf("%w: %s: %w", reason, where, err)
}

// classifyOpen does so for AMQP's handshake on a transport whose last read
// failed with cause, which the client library forgets.
func classifyOpen(err, cause error, where string) error {
	ae, _ := errors.AsType[*amqp.Error](err)
	if ae != nil && ae.Server {
		if ae.Code == amqp.AccessRefused {
			return fmt.Errorf("%w: %s: %w", ErrAuth, where, err)
		}
		return fmt.Errorf("connect to %s: %w", where, classify(err))
	}
	if cause != nil && !errors.Is(cause, io.EOF) && !errors.Is(cause, syscall.ECONNRESET) {
		return classifyDial(cause, where)
	}
	switch {
	case errors.Is(err, amqp.ErrCredentials), errors.Is(err, amqp.ErrSASL): // brokers hang up at these steps
		return fmt.Errorf("%w: %s", ErrAuth, where)
	case errors.Is(err, amqp.ErrVhost):
		return fmt.Errorf("%w: %s", ErrVHost, where)
	}
	return fmt.Errorf("%w: %s: %w", ErrRefused, where, err)
}

// classify adds the sentinel for what a broker answers.
func classify(err error) error {
	ae, ok := errors.AsType[*amqp.Error](err)
	if !ok {
		return err
	}
	reason := ErrConnectionLost
	switch {
	case !ae.Server:
	case ae.Code == amqp.NotAllowed:
		reason = ErrVHost
	case ae.Code == amqp.AccessRefused:
		reason = ErrPermission
	case ae.Code == amqp.PreconditionFailed:
		reason = ErrTopology
	}
	return fmt.Errorf("%w: %w", reason, err)
}

// hasCode reports whether the broker answered with that reply code.
func hasCode(err error, code int) bool {
	ae, ok := errors.AsType[*amqp.Error](err)
	return ok && ae.Server && ae.Code == code
}

// isTLS says that TLS failed on this side or, which is an alert, on the other:
// in TLS 1.3 a client learns only after its handshake that the server refuses its
// certificate.
func isTLS(err error) bool {
	if op, ok := errors.AsType[*net.OpError](err); ok && (op.Op == "remote error" || op.Op == "local error") {
		return true // what crypto/tls calls alerts, whose type it keeps to itself
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return true
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return true
	}
	if _, ok := errors.AsType[tls.AlertError](err); ok {
		return true
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return true
	}
	_, ok := errors.AsType[x509.HostnameError](err)
	return ok
}
