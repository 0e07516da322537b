package remoteforge

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/solstice-ci/solstice-go/forge"
)

// kinds are the errors that callers act on, and their codes. ErrIgnored is an
// answer.
var kinds = []struct {
	is   error
	code codes.Code
}{
	{forge.ErrSignature, codes.Unauthenticated},
	{forge.ErrNotFound, codes.NotFound},
	{forge.ErrPermission, codes.PermissionDenied},
	{forge.ErrInvalid, codes.InvalidArgument},
	{forge.ErrTooLarge, codes.ResourceExhausted}, // also what gRPC says of a message
	{forge.ErrConflict, codes.FailedPrecondition},
	{forge.ErrUnavailable, codes.Unavailable},
	{errors.ErrUnsupported, codes.Unimplemented},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{context.Canceled, codes.Canceled},
}

// toStatus is what a plugin answers. The other side is trusted, so it is told
// all.
func toStatus(err error) error {
	code := codes.Unknown
	for _, k := range kinds {
		if errors.Is(err, k.is) {
			code = k.code
			break
		}
	}
	s := status.New(code, clean(err.Error()))
	var retry *forge.RetryError
	if errors.As(err, &retry) {
		if with, err := s.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(retry.After)}); err == nil {
			s = with
		}
	}
	return s.Err()
}

// fromStatus gives what a plugin answered its sentinel back.
func fromStatus(ctx context.Context, err error) error {
	if cause := ctx.Err(); cause != nil {
		return cause
	}
	s, ok := status.FromError(err)
	if !ok {
		return fmt.Errorf("%w: %w", forge.ErrUnavailable, err)
	}
	a := &answer{text: s.Message()}
	for _, k := range kinds {
		if s.Code() == k.code {
			a.is = []error{k.is}
		}
	}
	switch s.Code() {
	case codes.DeadlineExceeded, codes.Canceled: // not ours, which has not ended
		a.is = append(a.is, forge.ErrUnavailable)
	case codes.Unavailable:
		for _, d := range s.Details() {
			if info, ok := d.(*errdetails.RetryInfo); ok {
				return &forge.RetryError{After: max(0, min(info.GetRetryDelay().AsDuration(), maxRetry)), Err: a}
			}
		}
	}
	return a
}

// maxRetry is the longest time that a plugin is believed it wants to be left alone.
const maxRetry = 24 * time.Hour

// answer is an error in the plugin's words.
type answer struct {
	text string
	is   []error
}

func (a *answer) Error() string   { return a.text }
func (a *answer) Unwrap() []error { return a.is }
