package orchestrator

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
)

// stuck is a stream whose client reads nothing.
type stuck struct {
	grpc.ServerStream
	ctx context.Context
}

func (s stuck) Context() context.Context { return s.ctx }

func (s stuck) SendMsg(any) error {
	<-s.ctx.Done()
	return s.ctx.Err()
}

func TestFollowerThatDoesNotReadIsLetGo(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	s := &Server{cfg: Config{SendTimeout: time.Millisecond}}
	f := &follower{ServerStream: stuck{ctx: ctx}, ctx: ctx, s: s, method: "/grpc.health.v1.Health/Watch"}
	if err := f.SendMsg(nil); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("nothing was read: %v", err)
	}
	cancel() // as the end of the call does: the one that sends ends as well
	if err := f.SendMsg(nil); err == nil {
		t.Error("sent to a call that is over")
	}
}

func TestEveryMethodNeedsARule(t *testing.T) {
	service := orchestratorv1.OrchestratorService_ServiceDesc.ServiceName
	info := func(method string) map[string]grpc.ServiceInfo {
		return map[string]grpc.ServiceInfo{service: {Methods: []grpc.MethodInfo{{Name: method}}}}
	}
	if err := unruled(info("Submit")); err != nil {
		t.Error(err)
	}
	if err := unruled(info("Destroy")); err == nil {
		t.Error("a method without a rule would be served")
	}
	if err := (&Server{}).authorize(t.Context(), "/"+service+"/Destroy"); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a method without a rule: %v", err)
	}
}
