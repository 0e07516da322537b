package orchestrator

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// follower is a stream whose caller may be slow, gone, or no longer let in. It
// holds one message at most beyond what the transport's window does.
type follower struct {
	grpc.ServerStream
	ctx    context.Context
	s      *Server
	method string
}

// Context implements grpc.ServerStream.
func (f *follower) Context() context.Context { return f.ctx }

// SendMsg implements grpc.ServerStream. It asks again whether the caller is let
// in, since a stream may last for hours.
func (f *follower) SendMsg(m any) error {
	if err := f.s.authorize(f.ctx, f.method); err != nil {
		return err
	}
	sent := make(chan error, 1)
	go func() { sent <- f.ServerStream.SendMsg(m) }()
	timeout := time.NewTimer(f.s.cfg.SendTimeout)
	defer timeout.Stop()
	// Leaving the handler ends the stream, and that the goroutine.
	select {
	case err := <-sent:
		return err
	case <-f.ctx.Done():
		return f.ctx.Err()
	case <-timeout.C:
		return status.Errorf(codes.ResourceExhausted, "nothing was read for %s: follow again from where you are", f.s.cfg.SendTimeout)
	}
}
