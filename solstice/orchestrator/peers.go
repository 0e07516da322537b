package orchestrator

import (
	"context"
	"crypto/tls"
	"iter"
	"sync"

	"github.com/solstice-ci/solstice-go/solstice"
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/orchestrator/client"
)

// Peers is a [solstice.Peers] that calls the other orchestrators' TailLog. It
// holds a connection to each for as long as it reads a log there.
type Peers struct {
	tls func() (*tls.Config, error)

	mu    sync.Mutex
	lines map[string]*line
}

type line struct {
	*client.Client
	users int
}

var _ solstice.Peers = (*Peers)(nil)

// NewPeers makes Peers. tls gives the authorities that peers' certificates are
// verified by (RootCAs) and the certificate shown to them (Certificates), which
// is to be for the host of this orchestrator's PeerAddr; it is asked for each
// connection.
func NewPeers(tls func() (*tls.Config, error)) *Peers {
	return &Peers{tls: tls, lines: map[string]*line{}}
}

// Tail implements solstice.Peers.
func (p *Peers) Tail(ctx context.Context, addr, attemptID string, from int64) iter.Seq2[logstream.Chunk, error] {
	return func(yield func(logstream.Chunk, error) bool) {
		l, err := p.acquire(addr)
		if err != nil {
			yield(logstream.Chunk{}, err)
			return
		}
		defer p.release(addr, l)
		req := &pb.TailLogRequest{Of: &pb.TailLogRequest_AttemptId{AttemptId: attemptID}, From: from, Follow: true, Local: true}
		for m, err := range l.Tail(ctx, req) {
			if err != nil {
				yield(logstream.Chunk{}, err)
				return
			}
			if !yield(chunkOf(m), nil) {
				return
			}
		}
	}
}

func chunkOf(m *pb.TailLogResponse) logstream.Chunk {
	c := logstream.Chunk{Offset: m.GetOffset(), Data: m.GetData(), Durable: m.GetDurable()}
	for _, k := range m.GetMarks() {
		c.Marks = append(c.Marks, logstream.Mark{Offset: k.GetOffset(), Time: k.GetTime().AsTime(), Step: int(k.GetStep()), FD: int(k.GetFd())})
	}
	return c
}

func (p *Peers) acquire(addr string) (*line, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.lines[addr]
	if l == nil {
		cfg, err := p.tls()
		if err != nil {
			return nil, err
		}
		c, err := client.New(client.Config{Server: addr, Roots: cfg.RootCAs, Certificates: cfg.Certificates, Patience: -1})
		if err != nil {
			return nil, err
		}
		l = &line{Client: c}
		p.lines[addr] = l
	}
	l.users++
	return l, nil
}

func (p *Peers) release(addr string, l *line) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if l.users--; l.users == 0 {
		delete(p.lines, addr)
		_ = l.Close() // nobody calls through it any more
	}
}
