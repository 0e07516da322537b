package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
)

// Watch yields a run with its jobs, now and after every change, until it is
// over. The run is named by its whole ID. When the orchestrator goes away it
// goes on as soon as one is there again; see [Config.Patience]. The error comes
// with the last pair.
func (c *Client) Watch(ctx context.Context, runID string) iter.Seq2[*pb.Run, error] {
	return func(yield func(*pb.Run, error) bool) {
		var last *pb.Run
		stopped := false
		err := c.persist(ctx, func(ctx context.Context, this *try) error {
			s, err := c.WatchRun(ctx, &pb.WatchRunRequest{RunId: runID})
			if err != nil {
				return err
			}
			this.accept(s)
			for {
				m, err := s.Recv()
				if err != nil {
					return ended(err)
				}
				this.heard = true
				if proto.Equal(last, m.GetRun()) {
					continue // as it was before the connection broke
				}
				last = m.GetRun()
				if !yield(last, nil) {
					stopped = true
					return nil
				}
			}
		})
		if err != nil && !stopped {
			yield(nil, err)
		}
	}
}

// Tail yields the log of an attempt or a job, as the request says: every byte
// once and in order. Messages without data announce the attempts of a job. When
// the orchestrator goes away it goes on, from the last durable byte, as soon as
// one is there again; see [Config.Patience]. The error comes with the last pair.
func (c *Client) Tail(ctx context.Context, r *pb.TailLogRequest) iter.Seq2[*pb.TailLogResponse, error] {
	return func(yield func(*pb.TailLogResponse, error) bool) {
		t := tail{req: proto.CloneOf(r), next: r.GetFrom()}
		stopped := false
		err := c.persist(ctx, func(ctx context.Context, this *try) error {
			s, err := c.TailLog(ctx, t.req)
			if err != nil {
				return err
			}
			this.accept(s)
			for {
				m, err := s.Recv()
				if err != nil {
					return ended(err)
				}
				this.heard = true
				news, err := t.take(m)
				if err != nil {
					return err
				}
				if news && !yield(m, nil) {
					stopped = true
					return nil
				}
			}
		})
		if err != nil && !stopped {
			yield(nil, err)
		}
	}
}

// tail is how far a log was passed on.
type tail struct {
	req  *pb.TailLogRequest // from where to go on
	next int64              // offset of the next byte in the attempt under way
	seen int32              // number of that attempt, of a job
}

// take makes of a message what is new in it, and reports whether anything is.
func (t *tail) take(m *pb.TailLogResponse) (bool, error) {
	if a := m.GetAttempt(); a != nil {
		if a.GetNumber() == t.seen {
			return false, nil // announced before the connection broke
		}
		if t.seen != 0 || a.GetNumber() != max(1, t.req.GetAttempt()) {
			t.req.From = 0
		}
		t.seen, t.next = a.GetNumber(), t.req.From
		t.req.Attempt = t.seen
		return true, nil
	}
	if m.GetOffset() > t.next {
		return false, &Error{Kind: ErrInternal, Message: fmt.Sprintf("bytes %d to %d of the log are missing", t.next, m.GetOffset())}
	}
	end := m.GetOffset() + int64(len(m.GetData()))
	// What is not durable may be asked for again: the orchestrator may have
	// lost it, and its agent sends it again.
	if m.GetDurable() && end > t.req.From {
		t.req.From = end
	}
	if skip := t.next - m.GetOffset(); skip > 0 {
		if skip >= int64(len(m.GetData())) {
			return false, nil
		}
		m.Data, m.Offset = m.GetData()[skip:], t.next
		m.Marks = marksFrom(m.GetMarks(), t.next)
	}
	t.next = end
	return len(m.GetData()) > 0, nil
}

// marksFrom leaves away what ends before an offset.
func marksFrom(marks []*pb.LogMark, offset int64) []*pb.LogMark {
	for len(marks) > 1 && marks[1].GetOffset() <= offset {
		marks = marks[1:]
	}
	if len(marks) > 0 && marks[0].GetOffset() < offset {
		marks[0].Offset = offset
	}
	return marks
}

func ended(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// Pauses between tries.
const (
	firstPause = 50 * time.Millisecond
	longPause  = 2 * time.Second
)

// try is one attempt to have a stream.
type try struct {
	accepted time.Time // by the server; zero: not yet
	heard    bool      // there was a message
}

// accept waits until the server took the stream, which may be long before it
// has something to say.
func (t *try) accept(s interface{ Header() (metadata.MD, error) }) {
	if md, err := s.Header(); err == nil && md != nil { // otherwise Recv says what happened
		t.accepted = time.Now()
	}
}

// persist repeats a stream that broke, until it ends by itself or the
// orchestrator was away for too long.
func (c *Client) persist(ctx context.Context, stream func(context.Context, *try) error) error {
	var away time.Time // since when
	pause := firstPause
	for {
		again, cancel := context.WithCancel(ctx)
		var t try
		err := stream(again, &t)
		cancel()
		if err == nil || !c.cured(err, &t) {
			return err
		}
		// Accepted and broken at once is not there yet.
		if t.heard || !t.accepted.IsZero() && time.Since(t.accepted) > longPause {
			away, pause = time.Time{}, firstPause
		}
		if away.IsZero() {
			away = time.Now()
		}
		left := c.patience - time.Since(away)
		if left <= 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(pause/2+rand.N(pause/2), left)):
		}
		pause = min(2*pause, longPause)
	}
}

// cured reports whether a stream that failed may be repeated: where the server
// was there before, and is away, or gave up a reader that was slow.
func (c *Client) cured(err error, t *try) bool {
	return c.patience > 0 && c.line.wasUp() && (errors.Is(err, ErrUnavailable) || errors.Is(err, ErrTooMuch) && t.heard)
}
