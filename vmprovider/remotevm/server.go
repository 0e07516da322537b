package remotevm

import (
	"context"
	"errors"
	"io"
	"sync"

	"google.golang.org/grpc"

	"github.com/solstice-ci/solstice-go/internal/plugin"
	pb "github.com/solstice-ci/solstice-go/solstice/api/providerv1"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

// Server serves a provider as solstice.provider.v1: what a plugin is made of. The
// provider stays the caller's to close, after the gRPC server has ended.
type Server struct {
	pb.UnimplementedProviderServiceServer
	p    vmprovider.Provider
	info *pb.InfoResponse

	mu       sync.Mutex
	creating map[string][]*creation
}

// creation is a Create under way.
type creation struct {
	ctx  context.Context
	done chan struct{}
}

// ServerOptions of NewServer.
type ServerOptions struct {
	Name, Version string // of the plugin, for people
}

// NewServer returns the service; register it with
// providerv1.RegisterProviderServiceServer on a grpc.Server that has GRPCOptions.
func NewServer(p vmprovider.Provider, o ServerOptions) *Server {
	s := &Server{p: p, creating: map[string][]*creation{}}
	s.info = &pb.InfoResponse{Name: o.Name, Version: o.Version, Capabilities: toCapabilities(p.Capabilities())}
	if _, ok := vmprovider.As[vmprovider.Consoler](p); ok {
		s.info.Verbs = append(s.info.Verbs, pb.Verb_VERB_CONSOLE)
	}
	if _, ok := vmprovider.As[vmprovider.Watcher](p); ok {
		s.info.Verbs = append(s.info.Verbs, pb.Verb_VERB_WATCH)
	}
	if _, ok := vmprovider.As[vmprovider.ImagePreparer](p); ok {
		s.info.Verbs = append(s.info.Verbs, pb.Verb_VERB_PREPARE_IMAGE)
	}
	return s
}

// GRPCOptions let clients of this package look now and then whether the server is
// still there.
func GRPCOptions() []grpc.ServerOption { return plugin.ServerOptions() }

// Info implements the service.
func (s *Server) Info(context.Context, *pb.InfoRequest) (*pb.InfoResponse, error) {
	return s.info, nil
}

// Create implements the service.
func (s *Server) Create(ctx context.Context, r *pb.CreateRequest) (*pb.CreateResponse, error) {
	if err := ctx.Err(); err != nil {
		return nil, toStatus(err)
	}
	spec := fromSpec(r.GetSpec())
	c := &creation{ctx, make(chan struct{})}
	s.mu.Lock()
	s.creating[spec.ID] = append(s.creating[spec.ID], c)
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		rest := s.creating[spec.ID]
		for i := range rest {
			if rest[i] == c {
				rest = append(rest[:i:i], rest[i+1:]...)
				break
			}
		}
		if s.creating[spec.ID] = rest; len(rest) == 0 {
			delete(s.creating, spec.ID)
		}
		close(c.done)
	}()
	inst, err := s.p.Create(ctx, spec)
	if err != nil {
		return nil, toStatus(err)
	}
	return &pb.CreateResponse{Instance: toInstance(inst)}, nil
}

// Get implements the service.
func (s *Server) Get(ctx context.Context, r *pb.GetRequest) (*pb.GetResponse, error) {
	inst, err := s.p.Get(ctx, r.GetId())
	if err != nil {
		return nil, toStatus(err)
	}
	return &pb.GetResponse{Instance: toInstance(inst)}, nil
}

// List implements the service.
func (s *Server) List(r *pb.ListRequest, out grpc.ServerStreamingServer[pb.ListResponse]) error {
	for inst, err := range s.p.List(out.Context(), vmprovider.ListOptions{Owner: r.GetOwner()}) {
		if err != nil {
			return toStatus(err)
		}
		if err := out.Send(&pb.ListResponse{Instance: toInstance(inst)}); err != nil {
			return err
		}
	}
	return nil
}

// Destroy implements the service. A Create that its client has given up ends here
// some time later, which the client does not see: what it leaves goes, too.
func (s *Server) Destroy(ctx context.Context, r *pb.DestroyRequest) (*pb.DestroyResponse, error) {
	s.mu.Lock()
	var abandoned []*creation
	for _, c := range s.creating[r.GetId()] {
		if c.ctx.Err() != nil {
			abandoned = append(abandoned, c)
		}
	}
	s.mu.Unlock()
	err := s.p.Destroy(ctx, r.GetId(), vmprovider.DestroyOptions{})
	for _, c := range abandoned {
		select {
		case <-c.done:
		case <-ctx.Done():
			return nil, toStatus(ctx.Err())
		}
	}
	if len(abandoned) > 0 {
		err = s.p.Destroy(ctx, r.GetId(), vmprovider.DestroyOptions{})
	}
	if err != nil {
		return nil, toStatus(err)
	}
	return &pb.DestroyResponse{}, nil
}

// Console implements the service.
func (s *Server) Console(r *pb.ConsoleRequest, out grpc.ServerStreamingServer[pb.ConsoleResponse]) error {
	p, ok := vmprovider.As[vmprovider.Consoler](s.p)
	if !ok {
		return toStatus(errors.ErrUnsupported)
	}
	console, err := p.Console(out.Context(), r.GetId(), r.GetFollow())
	if err != nil {
		return toStatus(err)
	}
	defer func() { _ = console.Close() }()
	if err := out.Send(&pb.ConsoleResponse{}); err != nil {
		return err
	}
	buf := make([]byte, 32<<10)
	for {
		n, err := console.Read(buf)
		if n > 0 {
			if err := out.Send(&pb.ConsoleResponse{Data: buf[:n]}); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return toStatus(err)
		}
	}
}

// Watch implements the service.
func (s *Server) Watch(_ *pb.WatchRequest, out grpc.ServerStreamingServer[pb.WatchResponse]) error {
	p, ok := vmprovider.As[vmprovider.Watcher](s.p)
	if !ok {
		return toStatus(errors.ErrUnsupported)
	}
	for inst, err := range p.Watch(out.Context()) {
		if err != nil {
			return toStatus(err)
		}
		m := &pb.WatchResponse{}
		if inst != (vmprovider.Instance{}) { // which says that these were all
			m.Instance = toInstance(inst)
		}
		if err := out.Send(m); err != nil {
			return err
		}
	}
	return nil
}

// PrepareImage implements the service.
func (s *Server) PrepareImage(ctx context.Context, r *pb.PrepareImageRequest) (*pb.PrepareImageResponse, error) {
	p, ok := vmprovider.As[vmprovider.ImagePreparer](s.p)
	if !ok {
		return nil, toStatus(errors.ErrUnsupported)
	}
	if err := p.PrepareImage(ctx, fromImage(r.GetImage())); err != nil {
		return nil, toStatus(err)
	}
	return &pb.PrepareImageResponse{}, nil
}
