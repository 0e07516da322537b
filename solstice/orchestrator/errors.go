package orchestrator

import (
	"context"
	"errors"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

// errAway: something the orchestrator needs cannot be reached just now.
var errAway = errors.New("orchestrator: not reachable")

// said are the errors whose text is the caller's business.
var said = []struct {
	is   error
	code codes.Code
}{
	{solstice.ErrInvalid, codes.InvalidArgument},
	{solstice.ErrNotFound, codes.NotFound},
	{solstice.ErrNoWorkflow, codes.FailedPrecondition},
	{solstice.ErrOver, codes.FailedPrecondition},
	{ErrExists, codes.FailedPrecondition},
	{forge.ErrNotFound, codes.NotFound},
	{forge.ErrInvalid, codes.InvalidArgument},
	{forge.ErrTooLarge, codes.FailedPrecondition},
	{logstream.ErrNotFound, codes.NotFound},
	{logstream.ErrInvalid, codes.InvalidArgument},
}

// transient are the errors that a retry may cure.
var transient = []error{
	errAway, solstice.ErrNotReady, forge.ErrUnavailable, logstream.ErrClosed, logstream.ErrNoSpace,
	sqldb.ErrHostNotFound, sqldb.ErrRefused, sqldb.ErrUnreachable, sqldb.ErrPoolTimeout, sqldb.ErrCommitUnknown,
}

// code maps errors to codes, in this one place. What is not the caller's
// business stays in the log.
func (s *Server) code(ctx context.Context, method string, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	if _, ok := errors.AsType[*logstream.OffsetError](err); ok {
		return status.Error(codes.InvalidArgument, "the offset is beyond the end of the log")
	}
	if errors.Is(err, solstice.ErrNoSpace) {
		s.log.WarnContext(ctx, "call failed", "rpc.method", method, "error", err)
		return status.Error(codes.ResourceExhausted, "no runs are accepted now: the orchestrator's disk is full; try again later")
	}
	for _, k := range said {
		if errors.Is(err, k.is) {
			return status.Error(k.code, strings.TrimPrefix(err.Error(), "solstice: "))
		}
	}
	// A database may report the end of a call's context in its own words.
	switch cause := ctx.Err(); {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(cause, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, "the call's time is up")
	case errors.Is(err, context.Canceled), cause != nil:
		return status.Error(codes.Canceled, "cancelled")
	}
	for _, k := range transient {
		if errors.Is(err, k) {
			s.log.WarnContext(ctx, "call failed", "rpc.method", method, "error", err)
			return status.Error(codes.Unavailable, "not possible now, try again; the orchestrator's log says why")
		}
	}
	s.log.ErrorContext(ctx, "call failed", "rpc.method", method, "error", err)
	return status.Error(codes.Internal, "failed; the orchestrator's log says why")
}
