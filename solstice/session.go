package solstice

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

// errReplaced ends a session whose agent attached anew.
var errReplaced = errors.New("solstice: the agent attached anew")

type agentStream = grpc.BidiStreamingServer[agentv1.AttachRequest, agentv1.AttachResponse]

// session is one agent's open stream. Its loop is the only writer of the
// attempt's progress in this process.
type session struct {
	e       *Engine
	stream  agentStream
	machine *store.Machine
	ctx     context.Context
	cancel  context.CancelCauseFunc
	// work does not end with the stream: what was received is brought into
	// the store even if the connection is cut meanwhile. Without that an agent
	// behind a bad line would send the same bytes for ever.
	work    context.Context
	done    chan struct{}
	in      chan *agentv1.AttachRequest
	assign  chan store.Claimed
	cancels chan string
	contact atomic.Int64 // when the agent was last heard, Unix nanoseconds of this process

	// Owned by the loop.
	attempt   *store.Attempt
	job       *store.Job
	run       *store.Run
	spec      *agentv1.JobSpec
	confirmed bool
	told      *fleet // whose contacts the agent was told last
	stored    int64  // seq of the last event that is in the log, and on its way to the database
	logSize   int64
	steps     map[int]*store.Step
	buf       []byte // of log that comes in several events, while much does
	resume    *resume

	// For other goroutines: ref mirrors attempt, idle says that the agent is
	// attached and has none.
	ref  atomic.Pointer[store.AttemptRef]
	idle atomic.Bool

	sending sync.Mutex // a stream has one sender at a time
	cut     bool       // the stream is over; under sending
}

// attach serves one stream. An agent that attaches anew replaces its older
// session, which is waited for, so that a machine has one writer here.
func (e *Engine) attach(stream agentStream, m *store.Machine) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	hello := first.GetHello()
	if hello == nil {
		return status.Error(codes.InvalidArgument, "the first message has to be a hello")
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	s := &session{
		e: e, stream: stream, machine: m, ctx: ctx, cancel: cancel, work: context.WithoutCancel(ctx), done: make(chan struct{}),
		in: make(chan *agentv1.AttachRequest, 8), assign: make(chan store.Claimed, 1), cancels: make(chan string, 1), steps: map[int]*store.Step{},
	}
	s.resume = newResume(s)
	defer close(s.done)
	defer func() { _ = s.resume.wait() }() // its failure was told
	s.heard()
	if err := e.register(s); err != nil {
		return err
	}
	defer e.unregister(s)
	defer trusted(ctx)() // one stream of a machine is, however many it opens
	err = s.serve(hello)
	if cause := context.Cause(ctx); errors.Is(cause, errReplaced) {
		return status.Error(codes.Aborted, "the agent attached anew")
	}
	return err
}

func (e *Engine) register(s *session) error {
	for {
		e.mu.Lock()
		old := e.sessions[s.machine.ID]
		if old == nil {
			e.sessions[s.machine.ID] = s
			e.mu.Unlock()
			return nil
		}
		e.mu.Unlock()
		old.cancel(errReplaced)
		select {
		case <-old.done:
		case <-s.ctx.Done():
			return status.FromContextError(s.ctx.Err()).Err()
		}
	}
}

func (e *Engine) unregister(s *session) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.sessions[s.machine.ID] == s {
		delete(e.sessions, s.machine.ID)
	}
}

// readyMachines lists idle machines of a pool whose agents are attached here and
// were heard of lately, oldest first: those are replaced next.
func (e *Engine) readyMachines(poolName string) []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var ids []string
	since := time.Now().Add(-e.answerTime()).UnixNano()
	for id, s := range e.sessions {
		if s.machine.Pool == poolName && s.idle.Load() && len(s.assign) == 0 && s.ctx.Err() == nil && s.contact.Load() >= since {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// assignReady tells a waiting agent of the job that was bound to its machine.
// If it is just reconnecting it learns by attaching.
func (e *Engine) assignReady(c store.Claimed) {
	e.mu.Lock()
	s := e.sessions[c.Machine.ID]
	e.mu.Unlock()
	if s == nil {
		return
	}
	select {
	case s.assign <- c:
	default:
	}
}

// cancelAttempt tells an attached agent to stop its job.
func (e *Engine) cancelAttempt(machineID, reason string) {
	e.mu.Lock()
	s := e.sessions[machineID]
	e.mu.Unlock()
	if s == nil {
		return
	}
	select {
	case s.cancels <- reason:
	default:
	}
}

func (s *session) heard() { s.contact.Store(time.Now().UnixNano()) }

// serve takes the machine, and the attempt if there is one, and then follows
// the stream until it ends.
func (s *session) serve(hello *agentv1.Hello) error {
	e := s.e
	_, a, j, r, err := e.store.Attach(s.ctx, s.machine.ID, e.id, e.cfg.Timing.Lease)
	if err != nil {
		return e.rpcError(s.ctx, "attach", err)
	}
	if a == nil && hello.GetAttemptId() != "" || a != nil && hello.GetAttemptId() != "" && hello.GetAttemptId() != a.ID {
		return status.Error(codes.FailedPrecondition, "the attempt is not this machine's")
	}
	if s.machine.State == store.MachineProvisioning {
		e.kickHost(s.machine.Host) // another may boot
	}
	p := e.poolNamed(s.machine.Pool)
	if a == nil && (p == nil || p.Host != s.machine.Host) {
		// Only an engine with its pool has a job for it: the agent goes on to that
		// one, which may be just restarting.
		return status.Error(codes.Unavailable, "this machine waits for a job of a pool that another orchestrator has")
	}
	if a == nil && p.made != s.machine.Recipe {
		e.discard(s.ctx, s.machine, "its pool makes machines from another image, of another size or with another agent by now")
		return e.rpcError(s.ctx, "attach", store.ErrGone)
	}
	welcome := &agentv1.Welcome{}
	if a != nil {
		if err := s.take(a, j, r); err != nil {
			return e.rpcError(s.ctx, "attach", err)
		}
		welcome = &agentv1.Welcome{Epoch: a.Epoch, AckedSeq: a.AckedSeq, LogOffset: a.LogSize}
		s.confirmed = hello.GetAttemptId() == a.ID
	}
	if err := s.send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Welcome{Welcome: welcome}}); err != nil {
		return err
	}
	if err := s.sendContacts(); err != nil {
		return err
	}
	if a != nil {
		if s.confirmed {
			if err := s.start(); err != nil {
				return e.rpcError(s.ctx, "attach", err)
			}
		} else if err := s.sendAssign(); err != nil {
			return err
		}
		if a.CancelReason != "" {
			if err := s.sendCancel(a.CancelReason); err != nil {
				return err
			}
		}
	} else {
		s.idle.Store(true)
		p.kick.set() // a warm machine is room for a job
	}
	recvErr := make(chan error, 1)
	go s.receive(recvErr)
	return s.loop(recvErr)
}

// receive passes messages on in order; the bounded channel pushes back on the
// agent when storage is slow.
func (s *session) receive(ended chan<- error) {
	for {
		m, err := s.stream.Recv()
		if n := len(m.GetEvents().GetEvents()); err == nil && n > maxEvents {
			err = status.Errorf(codes.InvalidArgument, "a batch of %d events: %d are allowed", n, maxEvents)
		}
		if err != nil {
			ended <- err
			return
		}
		s.heard()
		select {
		case s.in <- m:
		case <-s.ctx.Done():
			return
		}
	}
}

func (s *session) loop(recvErr <-chan error) error {
	resend := time.NewTicker(s.e.cfg.Timing.Heartbeat)
	defer resend.Stop()
	for {
		var err error
		select {
		case <-s.ctx.Done():
			s.drain()
			return status.FromContextError(s.ctx.Err()).Err()
		case m := <-s.in:
			var over bool
			if over, err = s.handle(m); over && err == nil {
				return nil
			}
		case err = <-recvErr:
			s.drain()
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case c := <-s.assign:
			if err = s.take(c.Attempt, c.Job, c.Run); err == nil {
				err = s.sendAssign()
			}
		case reason := <-s.cancels:
			err = s.sendCancel(reason)
		case err = <-s.resume.failed:
		case <-resend.C:
			if s.attempt != nil && !s.confirmed {
				err = s.sendAssign()
			}
		}
		if err != nil {
			return s.e.rpcError(s.ctx, "attach", err)
		}
	}
}

// drain handles what was received before the stream ended.
func (s *session) drain() {
	s.sending.Lock()
	s.cut = true
	s.sending.Unlock()
	for {
		select {
		case m := <-s.in:
			if over, err := s.handle(m); over || err != nil {
				return
			}
		default:
			return
		}
	}
}

// take makes the attempt this session's.
func (s *session) take(a *store.Attempt, j *store.Job, r *store.Run) error {
	spec, err := s.e.jobSpec(s.ctx, r, j, a)
	if err != nil {
		return err
	}
	s.attempt, s.job, s.run, s.spec = a, j, r, spec
	s.stored, s.logSize = a.AckedSeq, a.LogSize
	s.resume.moved(a.AckedSeq)
	s.idle.Store(false)
	s.ref.Store(&store.AttemptRef{ID: a.ID, Epoch: a.Epoch})
	return nil
}

func (s *session) send(m *agentv1.AttachResponse) error {
	s.sending.Lock()
	defer s.sending.Unlock()
	if s.cut {
		return nil // the agent asks again when it is back
	}
	return s.stream.Send(m)
}

// bounded is the context of one durable write.
func (s *session) bounded() (context.Context, context.CancelFunc) {
	return context.WithTimeout(s.work, 30*time.Second)
}

func (s *session) sendAssign() error {
	trace := map[string]string{}
	if s.run.Trace != "" {
		trace["traceparent"] = s.run.Trace
	}
	return s.send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Assign{Assign: &agentv1.Assign{
		AttemptId: s.attempt.ID, Epoch: s.attempt.Epoch, JobSpec: s.spec, TraceContext: trace,
	}}})
}

// sendContacts tells the agent where else to go, when that has changed.
func (s *session) sendContacts() error {
	now := s.e.fleet.Load()
	if now == s.told {
		return nil
	}
	s.told = now
	return s.send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Contacts{Contacts: &agentv1.ContactList{Contacts: s.e.contactsFor(s.machine.Pool)}}})
}

func (s *session) sendCancel(reason string) error {
	if s.attempt == nil {
		return nil
	}
	return s.send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Cancel{Cancel: &agentv1.Cancel{
		AttemptId: s.attempt.ID, Grace: durationpb.New(s.e.cfg.CancelGrace), Reason: reason,
	}}})
}

// groupBytes of a journal share one durable write, if that much waits.
const groupBytes = 2 << 20

// handle processes one message and, for a journal, all batches that wait
// behind it, so that they share one durable write. over: the journal ended.
func (s *session) handle(m *agentv1.AttachRequest) (over bool, err error) {
	for m != nil {
		var next *agentv1.AttachRequest
		switch msg := m.GetMsg().(type) {
		case *agentv1.AttachRequest_Heartbeat:
			err = errors.Join(s.send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Heartbeat{Heartbeat: msg.Heartbeat}}), s.sendContacts())
		case *agentv1.AttachRequest_AssignConfirm:
			if s.attempt == nil || msg.AssignConfirm.GetAttemptId() != s.attempt.ID {
				return false, status.Error(codes.FailedPrecondition, "confirmation of another attempt")
			}
			if !s.confirmed {
				s.confirmed = true
				err = s.start()
			}
		case *agentv1.AttachRequest_Events:
			if s.attempt == nil {
				return false, status.Error(codes.FailedPrecondition, "journal without an attempt")
			}
			events := msg.Events.GetEvents()
			for size := proto.Size(m); len(events) < 256 && size < groupBytes; {
				select {
				case next = <-s.in:
					if ev := next.GetEvents(); ev != nil {
						events, size = append(events, ev.GetEvents()...), size+proto.Size(next)
						next = nil
						continue
					}
				default:
				}
				break
			}
			over, err = s.journal(events)
		default:
			err = status.Error(codes.InvalidArgument, "unexpected message")
		}
		if over || err != nil {
			return over, err
		}
		m = next
	}
	return false, nil
}

// start records that the agent has the job.
func (s *session) start() error {
	ref := *s.ref.Load()
	// The server gives up on the job's timeout itself, a while after the agent should have.
	limit := s.spec.GetLimits().GetJobTimeout().AsDuration() + 2*s.e.cfg.CancelGrace + s.e.cfg.Timing.DeadlineMargin
	ctx, cancel := s.bounded()
	defer cancel()
	return s.e.withRun(ctx, s.run.ID, func(ctx context.Context, t *store.RunTx) error {
		return t.StartAttempt(ctx, ref, limit)
	})
}

// batch is what a run of journal events comes to.
type batch struct {
	last     int64 // seq
	off      int64
	data     []byte
	marks    []logstream.Mark
	steps    []*store.Step
	finished *agentv1.JobFinished
}

// text makes what an agent says fit for a column: at most n bytes, and no NUL,
// which PostgreSQL refuses.
func text(v string, n int) string {
	return clip(strings.ReplaceAll(v, "\x00", "\uFFFD"), n)
}

// moment is the time of an event by the agent's clock, which may be wrong, but
// not by more than a day around the attempt: nobody could show such times.
func (s *session) moment(ev *agentv1.Event) int64 {
	const day = int64(24 * time.Hour / time.Microsecond)
	return min(max(ev.GetTimeMicros(), s.attempt.CreatedAt-day), time.Now().UnixMicro()+day)
}

// collect validates events and gathers what has to be stored. Events that are
// stored already are skipped; a gap is refused.
func (s *session) collect(events []*agentv1.Event) (*batch, error) {
	b := &batch{last: s.stored, off: s.logSize}
	size := 0
	for _, ev := range events {
		size += len(ev.GetLog().GetData())
	}
	touched := map[int]bool{}
	for _, ev := range events {
		if ev.GetSeq() <= b.last {
			continue
		}
		if ev.GetSeq() != b.last+1 {
			return nil, status.Errorf(codes.InvalidArgument, "journal has a gap: %d after %d", ev.GetSeq(), b.last)
		}
		if b.finished != nil {
			return nil, status.Error(codes.InvalidArgument, "journal goes on after the job finished")
		}
		b.last = ev.GetSeq()
		switch x := ev.GetEvent().(type) {
		case *agentv1.Event_Log:
			l := x.Log
			if l.GetLogOffset() != b.off+int64(len(b.data)) {
				return nil, status.Errorf(codes.InvalidArgument, "log has a gap: offset %d, want %d", l.GetLogOffset(), b.off+int64(len(b.data)))
			}
			if len(l.GetData()) == 0 {
				continue
			}
			b.marks = append(b.marks, logstream.Mark{Offset: l.GetLogOffset(), Time: time.UnixMicro(s.moment(ev)), Step: int(l.GetStep()), FD: int(l.GetFd())})
			switch {
			case b.data == nil && len(l.GetData()) == size:
				b.data = l.GetData() // the message is ours: the common single chunk is not copied
			case b.data == nil:
				if cap(s.buf) < size {
					s.buf = make([]byte, 0, size)
				}
				b.data = append(s.buf[:0], l.GetData()...)
			default:
				b.data = append(b.data, l.GetData()...)
			}
		case *agentv1.Event_StepStarted:
			st, err := s.step(x.StepStarted.GetStep())
			if err != nil {
				return nil, err
			}
			st.StartedAt = s.moment(ev)
			touched[st.Idx] = true
		case *agentv1.Event_StepFinished:
			f := x.StepFinished
			st, err := s.step(f.GetStep())
			if err != nil {
				return nil, err
			}
			st.Result, st.ExitCode, st.Signal, st.Reason = resultName(f.GetResult()), int(f.GetExitCode()), text(f.GetSignal(), 32), text(f.GetReason(), 1024)
			st.Continued, st.FinishedAt, st.Outputs = f.GetContinued(), s.moment(ev), encode(f.GetOutputs())
			touched[st.Idx] = true
		case *agentv1.Event_Truncated:
			s.e.log.InfoContext(s.ctx, "log truncated", "attempt", s.attempt.ID, "job_id", s.job.ID, "from", x.Truncated.GetFrom(), "to", x.Truncated.GetTo(), "reason", clip(x.Truncated.GetReason(), 200))
		case *agentv1.Event_JobFinished:
			b.finished = x.JobFinished
		default: // from a newer agent: acknowledged, not understood
		}
	}
	for i := range touched {
		b.steps = append(b.steps, s.steps[i])
	}
	return b, nil
}

func (s *session) step(i int32) (*store.Step, error) {
	if i < 0 || int(i) >= len(s.spec.GetSteps()) {
		return nil, status.Errorf(codes.InvalidArgument, "there is no step %d", i)
	}
	st := s.steps[int(i)]
	if st == nil {
		st = &store.Step{AttemptID: s.attempt.ID, Idx: int(i), Name: stepName(s.spec.GetSteps(), int(i))}
		s.steps[int(i)] = st
	}
	return st, nil
}

func resultName(r agentv1.Result) string {
	switch r {
	case agentv1.Result_RESULT_SUCCEEDED:
		return string(store.JobSucceeded)
	case agentv1.Result_RESULT_CANCELLED:
		return string(store.JobCancelled)
	case agentv1.Result_RESULT_TIMED_OUT:
		return string(store.JobTimedOut)
	case agentv1.Result_RESULT_SKIPPED:
		return string(store.JobSkipped)
	}
	return string(store.JobFailed)
}

// journal stores events and has them acknowledged: log bytes first, then, in
// one transaction, the resume point with the steps, or the end of the job.
func (s *session) journal(events []*agentv1.Event) (over bool, err error) {
	e, ref := s.e, *s.ref.Load()
	ctx, cancel := s.bounded()
	defer cancel()
	b, err := s.collect(events)
	if err != nil {
		return false, err
	}
	if b.last == s.stored {
		return false, s.ack()
	}
	size := b.off + int64(len(b.data))
	if size > e.cfg.LogBytes+quotaSlack {
		e.lose(ctx, s.attempt, ClassUser, fmt.Sprintf("the agent sent more log than the quota of %d bytes", e.cfg.LogBytes), "")
		return true, status.Error(codes.FailedPrecondition, "log quota exceeded")
	}
	if len(b.data) > 0 {
		if _, err := e.logs.Append(ctx, s.attempt.LogStream, logstream.AppendOptions{Epoch: ref.Epoch, Marks: b.marks}, b.off, b.data); err != nil {
			return false, s.logError(err)
		}
	}
	if len(b.data) < cap(s.buf)/8 {
		s.buf = nil
	}
	s.stored, s.logSize = b.last, size
	if b.finished == nil {
		s.resume.put(b.last, size, b.steps)
		return false, nil
	}
	if err := s.resume.wait(); err != nil {
		return false, err
	}
	if err := s.finish(ctx, b, size); err != nil {
		return false, err
	}
	s.resume.moved(b.last)
	return true, s.ack()
}

// quotaSlack is what an agent may add to a full log: the line that says so.
const quotaSlack = 64 << 10

// ack tells the agent what is durable.
func (s *session) ack() error {
	return s.send(&agentv1.AttachResponse{Msg: &agentv1.AttachResponse_Ack{Ack: &agentv1.Ack{Seq: s.resume.durable()}}})
}

func (s *session) logError(err error) error {
	var gap *logstream.OffsetError
	switch {
	case errors.Is(err, logstream.ErrFenced), errors.Is(err, logstream.ErrSealed):
		return fmt.Errorf("%w: %w", store.ErrStale, err)
	case errors.As(err, &gap), errors.Is(err, logstream.ErrConflict):
		s.e.log.ErrorContext(s.ctx, "journal and log disagree", "attempt", s.attempt.ID, "error", err)
		return status.Error(codes.DataLoss, "journal and log disagree")
	}
	return err
}

// finish ends the attempt as the journal says.
func (s *session) finish(ctx context.Context, b *batch, size int64) error {
	e, f, ref := s.e, b.finished, *s.ref.Load()
	if f.GetLogSize() != size {
		return status.Errorf(codes.InvalidArgument, "the agent counted %d log bytes, %d arrived", f.GetLogSize(), size)
	}
	seal := logstream.SealOptions{Epoch: ref.Epoch, Size: size, SHA256: f.GetLogSha256()}
	if err := e.logs.Seal(ctx, s.attempt.LogStream, seal); err != nil {
		return s.logError(err)
	}
	fin := store.Finish{Reason: text(f.GetReason(), 2048), Outputs: encode(f.GetOutputs()), AckedSeq: b.last, LogSize: size, Steps: b.steps}
	var retried bool
	err := e.withRun(ctx, s.run.ID, func(ctx context.Context, t *store.RunTx) error {
		end := fin
		var retry bool
		end.State, end.Class, retry = e.verdict(t, s.job.ID, f)
		retried = retry
		if retry {
			return t.RetryAttempt(ctx, ref, end)
		}
		return t.FinishAttempt(ctx, ref, end)
	})
	if err != nil {
		return err
	}
	e.log.InfoContext(ctx, "attempt finished", "run_id", s.run.ID, "job_id", s.job.ID, "attempt", s.attempt.Number,
		"result", resultName(f.GetResult()), "retried", retried, "log_bytes", size)
	e.attemptOver(s.attempt, s.run.Trace)
	return nil
}

// verdict maps what the agent says to the job's state, its class, and whether
// it is tried again.
func (e *Engine) verdict(t *store.RunTx, jobID string, f *agentv1.JobFinished) (store.JobState, string, bool) {
	switch f.GetResult() {
	case agentv1.Result_RESULT_SUCCEEDED:
		return store.JobSucceeded, "", false
	case agentv1.Result_RESULT_CANCELLED:
		return store.JobCancelled, string(ClassCancelled), false
	case agentv1.Result_RESULT_TIMED_OUT:
		return store.JobTimedOut, string(ClassTimeout), false
	}
	if f.GetClass() == agentv1.FailureClass_FAILURE_CLASS_INFRA {
		return store.JobErrored, string(ClassInfra), e.mayRetry(t, jobID, ClassInfra)
	}
	return store.JobFailed, string(ClassUser), false
}

// noAnswers is how often a job is tried again, at no cost, after machines that had
// waited for a job did not answer.
const noAnswers = 3

// mayRetry reports whether a job has retries of a class left and is still
// wanted.
func (e *Engine) mayRetry(t *store.RunTx, jobID string, c Class) bool {
	if t.Run.CancelReason != "" {
		return false
	}
	for _, j := range t.Jobs {
		if j.ID == jobID {
			used := decode[map[string]int](j.Retries)[string(c)]
			return c == ClassCapacity || c == ClassNoAnswer && used < noAnswers || used < e.cfg.Retries[c]
		}
	}
	return false
}
