// Package remotevm has machines made by a plugin: any gRPC server of
// solstice.provider.v1, in any language, on this computer or another one. It is
// also what a plugin in Go is made of: NewServer serves any vmprovider.Provider,
// and Serve is most of a main.
//
// A plugin is reached on a Unix socket, whose directory decides who may, or by TCP
// with TLS and a client certificate (Open), or it is a command that the provider
// starts, and starts again when it ends (Start). Where a plugin is away calls wrap
// vmprovider.ErrUnavailable, and it is tried again with growing pauses; its
// machines are looked after once it is back.
package remotevm

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"iter"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"github.com/solstice-ci/solstice-go/internal/plugin"
	pb "github.com/solstice-ci/solstice-go/solstice/api/providerv1"
	"github.com/solstice-ci/solstice-go/vmprovider"
)

// Config says where a plugin is.
type Config struct {
	// Target is unix:PATH, or HOST:PORT with TLS; required.
	Target string
	// TLS verifies a plugin at HOST:PORT, and has the certificate to show it.
	TLS *tls.Config
	// ConnectTimeout bounds the wait for the plugin at first; 0: 10 s.
	ConnectTimeout time.Duration
	// CallTimeout bounds calls whose context has no deadline, other than Console,
	// Watch and List; 0: 10 min.
	CallTimeout time.Duration
}

var wraps = plugin.Errors{Invalid: vmprovider.ErrInvalid, Unavailable: vmprovider.ErrUnavailable}

// Provider is a vmprovider.Provider. Which of Consoler, Watcher and ImagePreparer
// it is too is the plugin's: ask vmprovider.As.
type Provider struct {
	cfg   Config
	conn  *grpc.ClientConn
	rpc   pb.ProviderServiceClient
	info  *pb.InfoResponse
	ended context.Context //nolint:containedctx // it ends with Close
	end   context.CancelFunc
	close func() error // once
}

// Open connects to a plugin, which has to be there. Errors wrap
// vmprovider.ErrInvalid (the configuration) or vmprovider.ErrUnavailable.
func Open(ctx context.Context, cfg Config) (*Provider, error) {
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = 10 * time.Second
	}
	if cfg.CallTimeout == 0 {
		cfg.CallTimeout = 10 * time.Minute
	}
	conn, err := plugin.Connect(cfg.Target, cfg.TLS, wraps)
	if err != nil {
		return nil, err
	}
	p := &Provider{cfg: cfg, conn: conn, rpc: pb.NewProviderServiceClient(conn), close: sync.OnceValue(conn.Close)}
	p.ended, p.end = context.WithCancel(context.Background())
	ictx, cancel := context.WithTimeout(ctx, cfg.ConnectTimeout)
	defer cancel()
	if p.info, err = p.rpc.Info(ictx, &pb.InfoRequest{}, grpc.WaitForReady(true)); err != nil {
		p.end()
		_ = conn.Close()
		if cause := ctx.Err(); cause != nil {
			return nil, cause
		}
		return nil, fmt.Errorf("%w: plugin %s: %w", vmprovider.ErrUnavailable, cfg.Target, err)
	}
	return p, nil
}

// Name of the plugin and its version, for people.
func (p *Provider) Name() (name, version string) { return p.info.GetName(), p.info.GetVersion() }

// begin has the end of the provider end a call.
func (p *Provider) begin(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(p.ended, cancel)
	return ctx, func() { stop(); cancel() }
}

// failed says what a call failed with.
func (p *Provider) failed(ctx context.Context, op string, err error) error {
	if err == nil {
		return nil
	}
	if p.ended.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("remotevm: %s: %w", op, vmprovider.ErrClosed)
	}
	return fmt.Errorf("remotevm: %s: %w", op, fromStatus(ctx, err))
}

// call makes a unary call, which has an end.
func call[Q, R any](ctx context.Context, p *Provider, op string, f func(context.Context, Q, ...grpc.CallOption) (R, error), q Q) (R, error) {
	var none R
	if err := p.usable(ctx, op); err != nil {
		return none, err
	}
	in, done := p.begin(ctx)
	defer done()
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		in, cancel = context.WithTimeout(in, p.cfg.CallTimeout)
		defer cancel()
	}
	r, err := f(in, q)
	if err != nil {
		return none, p.failed(ctx, op, err)
	}
	return r, nil
}

func (p *Provider) usable(ctx context.Context, op string) error {
	if p.ended.Err() != nil {
		return fmt.Errorf("remotevm: %s: %w", op, vmprovider.ErrClosed)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("remotevm: %s: %w", op, err)
	}
	return nil
}

// Create implements vmprovider.Provider.
func (p *Provider) Create(ctx context.Context, s vmprovider.Spec) (vmprovider.Instance, error) {
	if err := vmprovider.ValidateID(s.ID); err != nil {
		return vmprovider.Instance{}, err
	}
	r, err := call(ctx, p, "create "+s.ID, p.rpc.Create, &pb.CreateRequest{Spec: toSpec(s)})
	if err != nil {
		return vmprovider.Instance{}, err
	}
	return fromInstance(r.GetInstance()), nil
}

// Get implements vmprovider.Provider.
func (p *Provider) Get(ctx context.Context, id string) (vmprovider.Instance, error) {
	if err := vmprovider.ValidateID(id); err != nil {
		return vmprovider.Instance{}, err
	}
	r, err := call(ctx, p, "get "+id, p.rpc.Get, &pb.GetRequest{Id: id})
	if err != nil {
		return vmprovider.Instance{}, err
	}
	return fromInstance(r.GetInstance()), nil
}

// Destroy implements vmprovider.Provider.
func (p *Provider) Destroy(ctx context.Context, id string, _ vmprovider.DestroyOptions) error {
	if err := vmprovider.ValidateID(id); err != nil {
		return err
	}
	_, err := call(ctx, p, "destroy "+id, p.rpc.Destroy, &pb.DestroyRequest{Id: id})
	return err
}

// List implements vmprovider.Provider.
func (p *Provider) List(ctx context.Context, o vmprovider.ListOptions) iter.Seq2[vmprovider.Instance, error] {
	return stream(ctx, p, "list", func(ctx context.Context) (func() (vmprovider.Instance, error), error) {
		in, err := p.rpc.List(ctx, &pb.ListRequest{Owner: o.Owner})
		if err != nil {
			return nil, err
		}
		return func() (vmprovider.Instance, error) {
			m, err := in.Recv()
			return fromInstance(m.GetInstance()), err
		}, nil
	})
}

// stream yields what comes until its end, with the error last.
func stream(ctx context.Context, p *Provider, op string, open func(context.Context) (func() (vmprovider.Instance, error), error)) iter.Seq2[vmprovider.Instance, error] {
	return func(yield func(vmprovider.Instance, error) bool) {
		fail := func(err error) { yield(vmprovider.Instance{}, err) }
		if err := p.usable(ctx, op); err != nil {
			fail(err)
			return
		}
		in, done := p.begin(ctx)
		defer done()
		recv, err := open(in)
		if err != nil {
			fail(p.failed(ctx, op, err))
			return
		}
		for {
			inst, err := recv()
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil {
				fail(p.failed(ctx, op, err))
				return
			}
			if err := p.usable(ctx, op); err != nil {
				fail(err)
				return
			}
			if !yield(inst, nil) {
				return
			}
		}
	}
}

// Capabilities implements vmprovider.Provider.
func (p *Provider) Capabilities() vmprovider.Capabilities {
	return fromCapabilities(p.info.GetCapabilities())
}

// Close implements vmprovider.Provider. A plugin that Start started ends, others
// go on.
func (p *Provider) Close() error {
	p.end()
	return p.close()
}

// As gives the optional interfaces that the plugin has; see vmprovider.As.
func (p *Provider) As(target any) bool {
	for _, v := range p.info.GetVerbs() {
		switch t := target.(type) {
		case *vmprovider.Consoler:
			if v == pb.Verb_VERB_CONSOLE {
				*t = optional{p}
				return true
			}
		case *vmprovider.Watcher:
			if v == pb.Verb_VERB_WATCH {
				*t = optional{p}
				return true
			}
		case *vmprovider.ImagePreparer:
			if v == pb.Verb_VERB_PREPARE_IMAGE {
				*t = optional{p}
				return true
			}
		}
	}
	return false
}

// optional has the verbs that a plugin may have.
type optional struct{ p *Provider }

// Watch implements vmprovider.Watcher.
func (o optional) Watch(ctx context.Context) iter.Seq2[vmprovider.Instance, error] {
	p := o.p
	return func(yield func(vmprovider.Instance, error) bool) {
		more := true
		stream(ctx, p, "watch", func(ctx context.Context) (func() (vmprovider.Instance, error), error) {
			in, err := p.rpc.Watch(ctx, &pb.WatchRequest{})
			if err != nil {
				return nil, err
			}
			return func() (vmprovider.Instance, error) {
				m, err := in.Recv()
				if err != nil || m.GetInstance() == nil {
					return vmprovider.Instance{}, err
				}
				return fromInstance(m.GetInstance()), nil
			}, nil
		})(func(inst vmprovider.Instance, err error) bool {
			if more = yield(inst, err) && err == nil; !more {
				return false
			}
			return true
		})
		if more { // it has no other end
			yield(vmprovider.Instance{}, fmt.Errorf("remotevm: watch: %w: the plugin ended it", vmprovider.ErrUnavailable))
		}
	}
}

// PrepareImage implements vmprovider.ImagePreparer.
func (o optional) PrepareImage(ctx context.Context, img vmprovider.Image) error {
	_, err := call(ctx, o.p, "prepare image", o.p.rpc.PrepareImage, &pb.PrepareImageRequest{Image: toImage(img)})
	return err
}

// Console implements vmprovider.Consoler.
func (o optional) Console(ctx context.Context, id string, follow bool) (io.ReadCloser, error) {
	p, op := o.p, "console of "+id
	if err := vmprovider.ValidateID(id); err != nil {
		return nil, err
	}
	if err := p.usable(ctx, op); err != nil {
		return nil, err
	}
	in, done := p.begin(ctx)
	rpc, err := p.rpc.Console(in, &pb.ConsoleRequest{Id: id, Follow: follow})
	if err == nil {
		_, err = rpc.Recv() // says that it is open
	}
	if err != nil {
		done()
		return nil, p.failed(ctx, op, err)
	}
	return &console{ctx: ctx, p: p, op: op, recv: rpc.Recv, done: done}, nil
}

type console struct {
	ctx    context.Context //nolint:containedctx // that of the call that opened it
	p      *Provider
	op     string
	recv   func() (*pb.ConsoleResponse, error)
	done   func()
	data   []byte
	closed atomic.Bool
}

// Read has one caller at a time.
func (c *console) Read(p []byte) (int, error) {
	for len(c.data) == 0 {
		m, err := c.recv()
		switch {
		case errors.Is(err, io.EOF):
			return 0, io.EOF
		case err != nil && c.closed.Load():
			return 0, io.ErrClosedPipe
		case err != nil:
			return 0, c.p.failed(c.ctx, c.op, err)
		}
		c.data = m.GetData()
	}
	n := copy(p, c.data)
	c.data = c.data[n:]
	return n, nil
}

func (c *console) Close() error {
	c.closed.Store(true)
	c.done()
	return nil
}
