package orchestrator

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
)

// Role says what a caller may; each includes those below it.
type Role int

// Roles.
const (
	Nobody Role = iota // what needs no role
	Read
	Write
	Admin
)

var roleNames = []string{"nobody", "read", "write", "admin"}

func (r Role) String() string {
	if r < 0 || int(r) >= len(roleNames) {
		return fmt.Sprintf("Role(%d)", int(r))
	}
	return roleNames[r]
}

// ParseRole reads read, write or admin.
func ParseRole(s string) (Role, error) {
	for r := Read; r <= Admin; r++ {
		if s == r.String() {
			return r, nil
		}
	}
	return 0, fmt.Errorf("orchestrator: %q is not a role: read, write or admin", s)
}

// rules has the role that each method needs.
var rules = map[string]Role{
	orchestratorv1.OrchestratorService_Submit_FullMethodName:       Write,
	orchestratorv1.OrchestratorService_GetRun_FullMethodName:       Read,
	orchestratorv1.OrchestratorService_ListRuns_FullMethodName:     Read,
	orchestratorv1.OrchestratorService_WatchRun_FullMethodName:     Read,
	orchestratorv1.OrchestratorService_GetJob_FullMethodName:       Read,
	orchestratorv1.OrchestratorService_TailLog_FullMethodName:      Read,
	orchestratorv1.OrchestratorService_CancelRun_FullMethodName:    Write,
	orchestratorv1.OrchestratorService_RerunRun_FullMethodName:     Write,
	orchestratorv1.OrchestratorService_ApproveRun_FullMethodName:   Write,
	orchestratorv1.OrchestratorService_ListPools_FullMethodName:    Read,
	orchestratorv1.OrchestratorService_ListMachines_FullMethodName: Read,
	orchestratorv1.OrchestratorService_CreateToken_FullMethodName:  Admin,
	orchestratorv1.OrchestratorService_ListTokens_FullMethodName:   Admin,
	orchestratorv1.OrchestratorService_RevokeToken_FullMethodName:  Admin,

	healthpb.Health_Check_FullMethodName: Nobody,
	healthpb.Health_List_FullMethodName:  Nobody,
	healthpb.Health_Watch_FullMethodName: Nobody,

	// Only there when it was asked for.
	"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo":      Nobody,
	"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Nobody,
}

// unruled finds methods without a rule.
func unruled(services map[string]grpc.ServiceInfo) error {
	var errs []error
	for name, info := range services {
		for _, m := range info.Methods {
			if _, ok := rules["/"+name+"/"+m.Name]; !ok {
				errs = append(errs, fmt.Errorf("orchestrator: no rule says who may call /%s/%s", name, m.Name))
			}
		}
	}
	return errors.Join(errs...)
}

// authorize lets a caller in who has the role that a method needs.
func (s *Server) authorize(ctx context.Context, method string) error {
	need, ok := rules[method]
	if !ok {
		return status.Error(codes.PermissionDenied, "nobody may call this")
	}
	if need == Nobody {
		return nil
	}
	has, err := s.role(ctx)
	if (err != nil || has < need) && method == orchestratorv1.OrchestratorService_TailLog_FullMethodName && s.isPeer(ctx) {
		return nil
	}
	switch {
	case err != nil:
		return err
	case has < need:
		return status.Errorf(codes.PermissionDenied, "this needs role %s, yours is %s", need, has)
	}
	return nil
}

func (s *Server) role(ctx context.Context) (Role, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	if auth := md.Get("authorization"); len(auth) > 0 {
		scheme, token, _ := strings.Cut(auth[0], " ")
		if len(auth) > 1 || !strings.EqualFold(scheme, "bearer") || token == "" {
			return 0, status.Error(codes.Unauthenticated, "the authorization is not one Bearer token")
		}
		return s.cfg.Tokens.role(ctx, token)
	}
	if s.cfg.CertRole != Nobody && certificate(ctx) != nil {
		return s.cfg.CertRole, nil
	}
	return 0, status.Error(codes.Unauthenticated, "a token is needed")
}

// certificate is the caller's, if it was verified.
func certificate(ctx context.Context) *x509.Certificate {
	if p, ok := peer.FromContext(ctx); ok {
		if t, ok := p.AuthInfo.(credentials.TLSInfo); ok && len(t.State.VerifiedChains) > 0 {
			return t.State.VerifiedChains[0][0]
		}
	}
	return nil
}

// isPeer says that the caller is another orchestrator: it shows a verified
// certificate for the host at which one of those that are there is reached.
func (s *Server) isPeer(ctx context.Context) bool {
	cert := certificate(ctx)
	if cert == nil {
		return false
	}
	peers, err := s.cfg.Engine.Peers(ctx)
	if err != nil {
		s.log.WarnContext(ctx, "whether the caller is a peer is not known", "error", err)
		return false
	}
	return slices.ContainsFunc(peers, func(addr string) bool {
		host, _, err := net.SplitHostPort(addr)
		return err == nil && cert.VerifyHostname(host) == nil
	})
}

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	err := s.authorize(ctx, info.FullMethod)
	if err == nil {
		var resp any
		if resp, err = next(ctx, req); err == nil {
			return resp, nil
		}
	}
	return nil, s.code(ctx, info.FullMethod, err)
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	ctx, cancel := context.WithCancel(ss.Context())
	defer cancel()
	defer context.AfterFunc(s.closing, cancel)()
	err := s.authorize(ctx, info.FullMethod)
	if err == nil {
		// A follower learns that it follows, also where there is nothing to say yet.
		err = ss.SendHeader(nil)
	}
	if err == nil {
		err = next(srv, &follower{ServerStream: ss, ctx: ctx, s: s, method: info.FullMethod})
	}
	if err != nil && s.closing.Err() != nil && ss.Context().Err() == nil {
		return status.Error(codes.Unavailable, "the orchestrator stops: connect again")
	}
	return s.code(ctx, info.FullMethod, err)
}
