package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"syscall"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// What a call failed with, for errors.Is.
var (
	// ErrInvalid: the request, or the configuration, cannot be carried out as
	// it is.
	ErrInvalid = errors.New("invalid")
	// ErrNotFound: no such run, job, repository, token, …
	ErrNotFound = errors.New("not found")
	// ErrState: the run is not in a state for this, or a name is taken.
	ErrState = errors.New("not in a state for this")
	// ErrUnauthenticated: there is no token, or it is unknown, expired or revoked.
	ErrUnauthenticated = errors.New("not authenticated")
	// ErrPermission: the token's role is too small.
	ErrPermission = errors.New("not permitted")
	// ErrTooMuch: a limit of the server's.
	ErrTooMuch = errors.New("too much")
	// ErrUnavailable: the orchestrator, or something it needs, is away; a
	// retry may cure it. [Error.Cause] says more where the connection failed.
	ErrUnavailable = errors.New("unavailable")
	// ErrTimeout: the call's time was up.
	ErrTimeout = errors.New("timed out")
	// ErrUnknownMethod: the server is not an orchestrator, or an older one.
	ErrUnknownMethod = errors.New("method is not there")
	// ErrInternal: the orchestrator failed; its log says why.
	ErrInternal = errors.New("failed")

	// ErrRefused: the server ended the connection, as it does when it does not
	// accept the client's certificate.
	ErrRefused = errors.New("the server refused the connection")
	// ErrNotTLS: what answers at the server's address does not speak TLS.
	ErrNotTLS = errors.New("the server does not speak TLS")
)

var kinds = map[codes.Code]error{
	codes.InvalidArgument: ErrInvalid, codes.OutOfRange: ErrInvalid, codes.NotFound: ErrNotFound, codes.FailedPrecondition: ErrState,
	codes.AlreadyExists: ErrState, codes.Aborted: ErrState, codes.Unauthenticated: ErrUnauthenticated, codes.PermissionDenied: ErrPermission,
	codes.ResourceExhausted: ErrTooMuch, codes.Unavailable: ErrUnavailable, codes.DeadlineExceeded: ErrTimeout, codes.Unimplemented: ErrUnknownMethod,
}

// Error is a call that failed. It is its Kind and its Cause for errors.Is and
// errors.As, and has the gRPC status.
type Error struct {
	Kind    error  // one of this package's
	Message string // the server's words
	// Cause is why the connection failed, where it did: of package net (a name
	// that does not resolve, an address that refuses), crypto/x509 (who signed
	// the certificate, for whom) or crypto/tls. Nil otherwise.
	Cause error

	status *status.Status
}

func (e *Error) Error() string {
	if e.Cause != nil {
		return e.Cause.Error()
	}
	return e.Message
}

// Unwrap is for errors.Is and errors.As.
func (e *Error) Unwrap() []error {
	if e.Cause == nil {
		return []error{e.Kind}
	}
	return []error{e.Kind, e.Cause}
}

// GRPCStatus is for status.FromError.
func (e *Error) GRPCStatus() *status.Status { return e.status }

// error makes an [Error] of a call's. The end of a caller's context stays what
// it is.
func (c *Client) error(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	if st.Code() == codes.Canceled {
		return fmt.Errorf("%w: %s", context.Canceled, st.Message())
	}
	e := &Error{Kind: kinds[st.Code()], Message: st.Message(), status: st}
	if e.Kind == nil {
		e.Kind = ErrInternal
	}
	if st.Code() == codes.Unavailable || st.Code() == codes.DeadlineExceeded {
		e.Cause = c.line.broken()
	}
	return e
}

// handshakeError names what is wrong where crypto/tls cannot know it.
func handshakeError(err error) error {
	_, record := errors.AsType[tls.RecordHeaderError](err)
	if record || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) {
		return fmt.Errorf("%w: %w", ErrNotTLS, err)
	}
	return err
}
