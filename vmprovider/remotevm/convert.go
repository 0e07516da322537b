package remotevm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/solstice-ci/solstice-go/solstice/api/providerv1"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

// kinds are the errors that callers act on, and their codes.
var kinds = []struct {
	is   error
	code codes.Code
}{
	{vmprovider.ErrNotFound, codes.NotFound},
	{vmprovider.ErrExists, codes.AlreadyExists},
	{vmprovider.ErrCapacity, codes.ResourceExhausted},
	{vmprovider.ErrInvalid, codes.InvalidArgument},
	{vmprovider.ErrUnavailable, codes.Unavailable},
	{vmprovider.ErrClosed, codes.Unavailable}, // the plugin ends
	{errors.ErrUnsupported, codes.Unimplemented},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{context.Canceled, codes.Canceled},
}

// toStatus is what a plugin answers. The other side is trusted, so it is told
// all.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	for _, k := range kinds {
		if errors.Is(err, k.is) {
			return status.Error(k.code, err.Error())
		}
	}
	return status.Error(codes.Unknown, err.Error())
}

// fromStatus gives what a plugin answered its sentinel back.
func fromStatus(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if cause := ctx.Err(); cause != nil {
		return cause
	}
	s, ok := status.FromError(err)
	if !ok {
		return fmt.Errorf("%w: %w", vmprovider.ErrUnavailable, err)
	}
	for _, k := range kinds {
		if s.Code() == k.code {
			return &answer{k.is, s.Message()}
		}
	}
	return errors.New(s.Message())
}

// answer is an error in the plugin's words.
type answer struct {
	is   error
	text string
}

func (a *answer) Error() string { return a.text }
func (a *answer) Unwrap() error { return a.is }

var states = map[vmprovider.State]pb.State{
	vmprovider.StateCreating: pb.State_STATE_CREATING,
	vmprovider.StateRunning:  pb.State_STATE_RUNNING,
	vmprovider.StateStopped:  pb.State_STATE_STOPPED,
	vmprovider.StateLeftover: pb.State_STATE_LEFTOVER,
	vmprovider.StateGone:     pb.State_STATE_GONE,
}

// stateOf is one that callers know; another one is of no use but to Destroy.
func stateOf(s pb.State) vmprovider.State {
	for state, p := range states {
		if p == s {
			return state
		}
	}
	return vmprovider.StateLeftover
}

func toInstance(i vmprovider.Instance) *pb.Instance {
	return &pb.Instance{
		Id: i.ID, Owner: i.Owner, State: states[i.State], Host: i.Host, Reason: i.Reason,
		CreatedAt: toTime(i.CreatedAt), ExpiresAt: toTime(i.ExpiresAt),
	}
}

func fromInstance(i *pb.Instance) vmprovider.Instance {
	return vmprovider.Instance{
		ID: i.GetId(), Owner: i.GetOwner(), State: stateOf(i.GetState()), Host: i.GetHost(), Reason: i.GetReason(),
		CreatedAt: fromTime(i.GetCreatedAt()), ExpiresAt: fromTime(i.GetExpiresAt()),
	}
}

func toTime(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func fromTime(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func toImage(i vmprovider.Image) *pb.Image {
	return &pb.Image{Path: i.Path, Digest: i.Digest, Format: i.Format}
}

func fromImage(i *pb.Image) vmprovider.Image {
	return vmprovider.Image{Path: i.GetPath(), Digest: i.GetDigest(), Format: i.GetFormat()}
}

func toSpec(s vmprovider.Spec) *pb.Spec {
	b := s.Bootstrap
	return &pb.Spec{
		Id: s.ID, Owner: s.Owner, Image: toImage(s.Image), Cpus: int32(s.CPUs), //nolint:gosec // a machine has fewer
		MemoryBytes: s.MemoryBytes, DiskBytes: s.DiskBytes, Labels: s.Labels, ExpiresAt: toTime(s.ExpiresAt),
		Bootstrap: &pb.Bootstrap{
			Contacts: b.Contacts, Ca: b.CA, Token: b.Token, RunnerUrl: b.RunnerURL, AgentSha256: b.AgentSHA256,
			Hostname: b.Hostname, InstanceId: b.InstanceID,
		},
	}
}

func fromSpec(s *pb.Spec) vmprovider.Spec {
	b := s.GetBootstrap()
	return vmprovider.Spec{
		ID: s.GetId(), Owner: s.GetOwner(), Image: fromImage(s.GetImage()), CPUs: int(s.GetCpus()),
		MemoryBytes: s.GetMemoryBytes(), DiskBytes: s.GetDiskBytes(), Labels: s.GetLabels(), ExpiresAt: fromTime(s.GetExpiresAt()),
		Bootstrap: vmprovider.Bootstrap{
			Contacts: b.GetContacts(), CA: b.GetCa(), Token: b.GetToken(), RunnerURL: b.GetRunnerUrl(), AgentSHA256: b.GetAgentSha256(),
			Hostname: b.GetHostname(), InstanceID: b.GetInstanceId(),
		},
	}
}

func toCapabilities(c vmprovider.Capabilities) *pb.Capabilities {
	return &pb.Capabilities{Isolated: c.Isolated, Adopts: c.Adopts, Platforms: c.Platform}
}

func fromCapabilities(c *pb.Capabilities) vmprovider.Capabilities {
	return vmprovider.Capabilities{Isolated: c.GetIsolated(), Adopts: c.GetAdopts(), Platform: c.GetPlatforms()}
}
