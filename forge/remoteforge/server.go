package remoteforge

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/plugin"
	pb "github.com/solstice-ci/solstice-go/solstice/api/forgev1"
)

// Bounds of a server.
const (
	maxCall    = 10 * time.Minute // of a call
	maxHandles = 4096             // credentials that can be revoked; the oldest go first
)

// ServerOptions of NewServer.
type ServerOptions struct {
	Name, Version string // of the plugin, for people
	// Secret gives the secrets of webhooks; nil: the plugin has no webhooks.
	Secret forge.SecretFunc
	// Logger is told of panics; nil: nobody.
	Logger *slog.Logger
}

// Server serves a forge as solstice.forge.v1: what a plugin is made of. The forge
// stays the caller's to close, after the gRPC server has ended.
type Server struct {
	pb.UnimplementedForgeServiceServer
	f    forge.Forge
	o    ServerOptions
	info *pb.InfoResponse

	mu      sync.Mutex
	revokes map[string]func(context.Context) error
	order   []string // of handles, the oldest first
}

// NewServer returns the service; register it with
// forgev1.RegisterForgeServiceServer on a grpc.Server that has GRPCOptions, or give
// it to Serve.
func NewServer(f forge.Forge, o ServerOptions) *Server {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	c := f.Capabilities()
	s := &Server{f: f, o: o, revokes: map[string]func(context.Context) error{}}
	s.info = &pb.InfoResponse{
		Name: o.Name, Version: o.Version,
		Capabilities: &pb.Capabilities{Webhooks: c.Webhooks && o.Secret != nil, Statuses: c.Statuses, StatusKeysFold: c.StatusKeysFold},
	}
	for _, v := range []struct {
		verb pb.Verb
		has  bool
	}{
		{pb.Verb_VERB_CHANGED_PATHS, has[forge.ChangedPaths](f)},
		{pb.Verb_VERB_MAY_APPROVE, has[forge.Permissions](f)},
		{pb.Verb_VERB_MERGE_COMMIT, has[forge.Merger](f)},
		{pb.Verb_VERB_COMMENT, has[forge.Commenter](f)},
		{pb.Verb_VERB_HEADS, has[forge.HeadLister](f)},
		{pb.Verb_VERB_FORGET_STATUSES, has[forge.StatusForgetter](f)},
		{pb.Verb_VERB_PULL_REQUESTS, has[forge.PullRequestLister](f)},
		{pb.Verb_VERB_CHECK, has[forge.Checker](f)},
	} {
		if v.has {
			s.info.Verbs = append(s.info.Verbs, v.verb)
		}
	}
	return s
}

func has[T any](f forge.Forge) bool {
	_, ok := forge.As[T](f)
	return ok
}

// Serve is most of a plugin's main: it serves at unix:PATH, in place of whoever
// was there, to this user only; or at HOST:PORT with TLS, to whom tlsConfig
// verifies, which has to ask for certificates. It returns nil once ctx has ended
// and the calls under way have, or after 10 s.
func Serve(ctx context.Context, listen string, s *Server, tlsConfig *tls.Config) error {
	return plugin.Serve(ctx, listen, tlsConfig, wraps, func(r grpc.ServiceRegistrar) { pb.RegisterForgeServiceServer(r, s) }, s.GRPCOptions()...)
}

// GRPCOptions bound messages and calls, have a panic cost one call, and let clients
// of this package look now and then whether the server is still there.
func (s *Server) GRPCOptions() []grpc.ServerOption {
	return append(plugin.ServerOptions(),
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage), grpc.UnaryInterceptor(s.around))
}

// around is what all calls have in common.
func (s *Server) around(ctx context.Context, q any, i *grpc.UnaryServerInfo, next grpc.UnaryHandler) (r any, err error) {
	if _, ok := ctx.Deadline(); !ok {
		return nil, status.Error(codes.InvalidArgument, "a call needs a deadline")
	}
	ctx, cancel := context.WithTimeout(ctx, maxCall)
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			s.o.Logger.ErrorContext(ctx, "a call panicked", "method", i.FullMethod, "panic", p, "stack", string(debug.Stack()))
			err = status.Errorf(codes.Internal, "%s panicked", i.FullMethod)
		}
	}()
	if r, err = next(ctx, q); err != nil {
		return nil, toStatus(err)
	}
	return r, nil
}

// Info implements the service.
func (s *Server) Info(context.Context, *pb.InfoRequest) (*pb.InfoResponse, error) {
	return s.info, nil
}

// ParseWebhook implements the service.
func (s *Server) ParseWebhook(ctx context.Context, q *pb.ParseWebhookRequest) (*pb.ParseWebhookResponse, error) {
	if !s.info.GetCapabilities().GetWebhooks() {
		return nil, errors.ErrUnsupported
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "/", bytes.NewReader(q.GetRawBody()))
	if err != nil {
		return nil, err
	}
	r.Header = fromHeaders(q.GetHeaders())
	e, err := s.f.ParseWebhook(ctx, r, s.o.Secret)
	switch {
	case errors.Is(err, forge.ErrIgnored):
		return &pb.ParseWebhookResponse{Result: &pb.ParseWebhookResponse_Ignored{Ignored: clean(err.Error())}}, nil
	case err != nil:
		return nil, err
	}
	return &pb.ParseWebhookResponse{Result: &pb.ParseWebhookResponse_Event{Event: toEvent(e)}}, nil
}

// Resolve implements the service.
func (s *Server) Resolve(ctx context.Context, q *pb.ResolveRequest) (*pb.ResolveResponse, error) {
	commit, err := s.f.Resolve(ctx, fromRepo(q.GetRepo()), q.GetRef())
	return &pb.ResolveResponse{Commit: commit}, err
}

// ReadFile implements the service.
func (s *Server) ReadFile(ctx context.Context, q *pb.ReadFileRequest) (*pb.ReadFileResponse, error) {
	content, err := s.f.ReadFile(ctx, fromRepo(q.GetRepo()), q.GetCommit(), string(q.GetPath()))
	return &pb.ReadFileResponse{Content: content}, err
}

// ListFiles implements the service.
func (s *Server) ListFiles(ctx context.Context, q *pb.ListFilesRequest) (*pb.ListFilesResponse, error) {
	names, err := s.f.ListFiles(ctx, fromRepo(q.GetRepo()), q.GetCommit(), string(q.GetDir()))
	return &pb.ListFilesResponse{Names: toBytes(names)}, err
}

// CloneInfo implements the service.
func (s *Server) CloneInfo(ctx context.Context, q *pb.CloneInfoRequest) (*pb.CloneInfoResponse, error) {
	c, err := s.f.CloneInfo(ctx, fromRepo(q.GetRepo()), forge.CloneOptions{})
	if err != nil {
		return nil, err
	}
	r := &pb.CloneInfoResponse{Dir: c.Dir, Url: c.URL, Headers: c.Header, ExpiresAt: toTime(c.ExpiresAt)}
	if c.Revoke != nil {
		r.RevokeHandle = rand.Text()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.revokes[r.RevokeHandle] = c.Revoke
		s.order = append(s.order, r.RevokeHandle)
		if len(s.order) > maxHandles {
			delete(s.revokes, s.order[0])
			s.order = slices.Delete(s.order, 0, 1)
		}
	}
	return r, nil
}

// RevokeClone implements the service. What could not be revoked can be tried again.
func (s *Server) RevokeClone(ctx context.Context, q *pb.RevokeCloneRequest) (*pb.RevokeCloneResponse, error) {
	s.mu.Lock()
	revoke := s.revokes[q.GetHandle()]
	s.mu.Unlock()
	if revoke == nil {
		return nil, fmt.Errorf("%w: these credentials are not known any more", forge.ErrNotFound)
	}
	if err := revoke(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.revokes, q.GetHandle())
	s.order = slices.DeleteFunc(s.order, func(h string) bool { return h == q.GetHandle() })
	return &pb.RevokeCloneResponse{}, nil
}

// ReportStatus implements the service.
func (s *Server) ReportStatus(ctx context.Context, q *pb.ReportStatusRequest) (*pb.ReportStatusResponse, error) {
	return &pb.ReportStatusResponse{}, s.f.ReportStatus(ctx, fromRepo(q.GetRepo()), q.GetCommit(), fromState(q.GetStatus()))
}

// ChangedPaths implements the service.
func (s *Server) ChangedPaths(ctx context.Context, q *pb.ChangedPathsRequest) (*pb.ChangedPathsResponse, error) {
	v, ok := forge.As[forge.ChangedPaths](s.f)
	if !ok {
		return nil, errors.ErrUnsupported
	}
	paths, truncated, err := v.ChangedPaths(ctx, fromRepo(q.GetRepo()), q.GetBase(), q.GetHead(), int(q.GetLimit()))
	return &pb.ChangedPathsResponse{Paths: toBytes(paths), Truncated: truncated}, err
}

// MayApprove implements the service.
func (s *Server) MayApprove(ctx context.Context, q *pb.MayApproveRequest) (*pb.MayApproveResponse, error) {
	v, ok := forge.As[forge.Permissions](s.f)
	if !ok {
		return nil, errors.ErrUnsupported
	}
	may, err := v.MayApprove(ctx, fromRepo(q.GetRepo()), fromUser(q.GetUser()))
	return &pb.MayApproveResponse{May: may}, err
}

// MergeCommit implements the service.
func (s *Server) MergeCommit(ctx context.Context, q *pb.MergeCommitRequest) (*pb.MergeCommitResponse, error) {
	v, ok := forge.As[forge.Merger](s.f)
	if !ok {
		return nil, errors.ErrUnsupported
	}
	if q.GetPullRequest() == nil {
		return nil, fmt.Errorf("%w: no pull request", forge.ErrInvalid)
	}
	commit, err := v.MergeCommit(ctx, fromRepo(q.GetRepo()), *fromPullRequest(q.GetPullRequest()))
	return &pb.MergeCommitResponse{Commit: commit}, err
}

// Comment implements the service.
func (s *Server) Comment(ctx context.Context, q *pb.CommentRequest) (*pb.CommentResponse, error) {
	v, ok := forge.As[forge.Commenter](s.f)
	if !ok {
		return nil, errors.ErrUnsupported
	}
	return &pb.CommentResponse{}, v.Comment(ctx, fromRepo(q.GetRepo()), int(q.GetPullRequest()), q.GetKey(), q.GetText())
}

// Heads implements the service.
func (s *Server) Heads(ctx context.Context, q *pb.HeadsRequest) (*pb.HeadsResponse, error) {
	v, ok := forge.As[forge.HeadLister](s.f)
	if !ok {
		return nil, errors.ErrUnsupported
	}
	heads, err := v.Heads(ctx, fromRepo(q.GetRepo()))
	r := &pb.HeadsResponse{}
	for ref, commit := range heads {
		r.Heads = append(r.Heads, &pb.Head{Ref: []byte(ref), Commit: commit})
	}
	return r, err
}

// ForgetStatuses implements the service.
func (s *Server) ForgetStatuses(ctx context.Context, q *pb.ForgetStatusesRequest) (*pb.ForgetStatusesResponse, error) {
	v, ok := forge.As[forge.StatusForgetter](s.f)
	if !ok {
		return nil, errors.ErrUnsupported
	}
	return &pb.ForgetStatusesResponse{}, v.ForgetStatuses(ctx, fromRepo(q.GetRepo()), q.GetCommit())
}

// PullRequests implements the service.
func (s *Server) PullRequests(ctx context.Context, q *pb.PullRequestsRequest) (*pb.PullRequestsResponse, error) {
	v, ok := forge.As[forge.PullRequestLister](s.f)
	if !ok {
		return nil, errors.ErrUnsupported
	}
	all, err := v.PullRequests(ctx, fromRepo(q.GetRepo()), int(q.GetLimit()))
	r := &pb.PullRequestsResponse{}
	for i := range all {
		r.PullRequests = append(r.PullRequests, toPullRequest(&all[i]))
	}
	return r, err
}

// Check implements the service.
func (s *Server) Check(ctx context.Context, q *pb.CheckRequest) (*pb.CheckResponse, error) {
	v, ok := forge.As[forge.Checker](s.f)
	if !ok {
		return nil, errors.ErrUnsupported
	}
	o := forge.CheckOptions{WebhookURL: q.GetWebhookUrl()}
	for _, repo := range q.GetRepos() {
		o.Repos = append(o.Repos, fromRepo(repo))
	}
	all, err := v.Check(ctx, o)
	r := &pb.CheckResponse{}
	for _, x := range all {
		r.Findings = append(r.Findings, toFinding(x))
	}
	return r, err
}
