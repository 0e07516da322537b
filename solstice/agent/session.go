package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"

	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
)

const (
	// windowBytes of the journal may be on their way unacknowledged: enough to
	// fill any link, little enough that heartbeats are not stuck behind it.
	windowBytes = 8 << 20
	// startBytes is the window of a fresh stream, which grows with every ack: a
	// line that is cut again and again loses what it had in flight, so each
	// stream first brings one batch home.
	startBytes = batchTarget / 2
	// silentIntervals without a word from the server end a stream.
	silentIntervals = 3
)

// A session is one Attach stream.
type session struct {
	a        *agent
	stream   grpc.BidiStreamingClient[agentv1.AttachRequest, agentv1.AttachResponse]
	welcomed bool
	att      *attempt      // that this stream speaks of, set before attached is closed
	attached chan struct{} // closed when the journal may be sent
	from     int64         // journal position to send after
	confirm  chan string   // attempt IDs to confirm

	mu       sync.Mutex
	inflight []sent
	bytes    int           // of inflight
	window   int           // bound of bytes
	acked    chan struct{} // something left the window
}

type sent struct {
	seq  int64 // last of the batch
	size int
}

var errDrain = errors.New("agent: the orchestrator is leaving")

// attach opens a stream and serves it until it fails, the job's end is
// acknowledged or ctx ends. It closes conn.
func (a *agent) attach(ctx context.Context, conn clientConn) (*session, error) {
	defer func() { _ = conn.Close() }()
	s := &session{
		a: a, attached: make(chan struct{}), confirm: make(chan string, 16), acked: make(chan struct{}, 1),
		window: startBytes,
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := silentIntervals * a.heartbeat
	watchdog := time.AfterFunc(connectTimeout+silence, func() {
		cancel(fmt.Errorf("agent: nothing heard for %s", silence))
	})
	defer watchdog.Stop()
	fail := func(err error) (*session, error) {
		if cause := context.Cause(ctx); cause != nil {
			return s, cause
		}
		return s, err
	}

	var err error
	if s.stream, err = agentv1.NewAgentServiceClient(conn).Attach(a.authorize(ctx), grpc.ForceCodecV2(batchCodec{encoding.GetCodecV2(proto.Name)})); err != nil {
		return fail(err)
	}
	if err := s.hello(); err != nil && !errors.Is(err, io.EOF) { // of which Recv knows the reason
		return fail(err)
	}
	var sender sync.WaitGroup
	defer sender.Wait()
	defer cancel(nil)
	for {
		m, err := s.stream.Recv()
		if err != nil {
			return fail(err)
		}
		watchdog.Reset(silence)
		a.seen()
		if !s.welcomed {
			if err := s.welcome(m.GetWelcome()); err != nil {
				return s, err
			}
			sender.Go(func() {
				if err := a.guard(func() error { return s.send(ctx) }); err != nil && !errors.Is(err, io.EOF) { // as above
					cancel(err)
				}
			})
			continue
		}
		if err := s.handle(ctx, m); err != nil {
			return s, err
		}
		if a.finished() {
			// The end is acknowledged: a clean goodbye, which the server need
			// not answer.
			return s, nil
		}
	}
}

func (s *session) hello() error {
	h := &agentv1.Hello{}
	s.a.mu.Lock()
	s.att = s.a.att
	if s.att != nil {
		h.AttemptId, h.Epoch = s.att.id, s.att.epoch
	}
	s.a.mu.Unlock()
	if s.att != nil {
		h.FirstSpooledSeq, h.LastSeq = s.att.journal.bounds()
	}
	return s.stream.Send(&agentv1.AttachRequest{Msg: &agentv1.AttachRequest_Hello{Hello: h}})
}

// welcome takes the server's answer to Hello: where to resume.
func (s *session) welcome(w *agentv1.Welcome) error {
	if w == nil {
		return fmt.Errorf("%w: the stream does not begin with Welcome", errRefused)
	}
	s.welcomed = true
	if s.att == nil {
		return nil
	}
	if err := s.a.newEpoch(s.att, w.GetEpoch()); err != nil {
		return err
	}
	first, last := s.att.journal.bounds()
	switch from := w.GetAckedSeq(); {
	case from > last:
		return fmt.Errorf("%w: resume after event %d, only %d written", ErrProtocol, from, last)
	case first > 0 && from < first-1, first == 0 && from < last:
		return fmt.Errorf("%w: resume after event %d, which was acknowledged before", ErrProtocol, from)
	default:
		s.from = from
		if err := s.att.journal.ack(from); err != nil {
			return err
		}
	}
	close(s.attached)
	return nil
}

// errRefused: this server is not worth talking to now; another may be.
var errRefused = errors.New("agent: unexpected answer")

// newEpoch notes the epoch; one that is older than the last was given by an
// orchestrator that has lost the attempt.
func (a *agent) newEpoch(att *attempt, epoch int64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if epoch < att.epoch {
		return fmt.Errorf("%w: epoch %d after %d", errRefused, epoch, att.epoch)
	}
	att.epoch = epoch
	return nil
}

func (s *session) handle(ctx context.Context, m *agentv1.AttachResponse) error {
	s.a.cfg.failpoint("receive")
	switch m := m.GetMsg().(type) {
	case *agentv1.AttachResponse_Assign:
		return s.assign(ctx, m.Assign)
	case *agentv1.AttachResponse_Ack:
		if s.att == nil {
			return fmt.Errorf("%w: an ack without an attempt", errRefused)
		}
		if err := s.att.journal.ack(m.Ack.GetSeq()); err != nil {
			return err
		}
		s.slide(m.Ack.GetSeq())
	case *agentv1.AttachResponse_Cancel:
		s.a.cancelJob(m.Cancel)
	case *agentv1.AttachResponse_Contacts:
		s.a.contacts.replace(m.Contacts.GetContacts())
	case *agentv1.AttachResponse_Drain:
		return errDrain
	case *agentv1.AttachResponse_Welcome:
		return fmt.Errorf("%w: a second Welcome", errRefused)
	}
	return nil // heartbeats are contact and no more; what is new is ignored
}

// assign starts the job, once, and confirms it every time.
func (s *session) assign(ctx context.Context, m *agentv1.Assign) error {
	att, err := s.a.assigned(m)
	if err != nil {
		return err
	}
	if att == nil {
		return nil
	}
	if s.att == nil {
		s.att = att
		close(s.attached)
	}
	select {
	case s.confirm <- att.id:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// slide takes what is acknowledged out of the window.
func (s *session) slide(seq int64) {
	s.forget(seq)
	select {
	case s.acked <- struct{}{}:
	default:
	}
}

func (s *session) forget(seq int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for n < len(s.inflight) && s.inflight[n].seq <= seq {
		s.bytes -= s.inflight[n].size
		s.window = min(2*s.window, windowBytes)
		n++
	}
	s.inflight = append(s.inflight[:0], s.inflight[n:]...)
}

// room is how large the next batch may be, 0 when the window is full.
func (s *session) room() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bytes >= s.window {
		return 0
	}
	return min(max(s.window/8, batchTarget), batchMost)
}

func (s *session) track(seq int64, size int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inflight = append(s.inflight, sent{seq, size})
	s.bytes += size
}

// send writes to the stream: confirmations, heartbeats and the journal.
func (s *session) send(ctx context.Context) error {
	s.a.cfg.failpoint("send")
	beat := time.NewTicker(s.a.heartbeat)
	defer beat.Stop()
	var (
		id       int64
		rd       *reader
		ready    <-chan struct{} // the journal has more
		attached = s.attached
	)
	defer func() {
		if rd != nil {
			rd.close()
		}
	}()
	for {
		// What is small and urgent goes first.
		var m any
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case att := <-s.confirm:
			m = confirmation(att)
		case <-beat.C:
			id++
			m = heartbeat(id)
		default:
			b, err := s.events(rd)
			if err != nil {
				return err
			}
			if b != nil {
				m = b
			}
		}
		if m == nil {
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case att := <-s.confirm:
				m = confirmation(att)
			case <-beat.C:
				id++
				m = heartbeat(id)
			case <-attached:
				attached = nil
				rd = s.att.journal.reader(s.from)
				ready = s.att.journal.ready
				continue
			case <-ready:
				continue
			case <-s.acked:
				continue
			}
		}
		if err := s.stream.SendMsg(m); err != nil {
			return err
		}
	}
}

// events gives the next batch, nil when there is none or the window is full.
func (s *session) events(rd *reader) (*batch, error) {
	if rd == nil {
		return nil, nil
	}
	limit := s.room()
	if limit == 0 {
		return nil, nil
	}
	b, err := rd.batch(limit)
	if b != nil {
		s.track(b.last, b.size)
	}
	return b, err
}

func confirmation(att string) *agentv1.AttachRequest {
	return &agentv1.AttachRequest{Msg: &agentv1.AttachRequest_AssignConfirm{
		AssignConfirm: &agentv1.AssignConfirm{AttemptId: att},
	}}
}

func heartbeat(id int64) *agentv1.AttachRequest {
	return &agentv1.AttachRequest{Msg: &agentv1.AttachRequest_Heartbeat{Heartbeat: &agentv1.Heartbeat{Id: id}}}
}
