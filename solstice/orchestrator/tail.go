package orchestrator

import (
	"context"
	"iter"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/solstice-ci/solstice-go/solstice"
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

// tail sends logs in messages of a bounded size.
type tail struct {
	out grpc.ServerStreamingServer[pb.TailLogResponse]
}

type logReader func(ctx context.Context, attemptID string, from int64) iter.Seq2[logstream.Chunk, error]

// attempt sends an attempt's log from an offset, up to what is durable now or,
// following, to its end.
func (t *tail) attempt(ctx context.Context, read logReader, a solstice.Attempt, from int64, follow bool) error {
	end := int64(-1)
	if !follow {
		end = a.LogSize
		if from >= end {
			return nil
		}
	}
	for c, err := range read(ctx, a.ID, from) {
		if err != nil {
			return err
		}
		if err := t.chunk(c, from, end); err != nil {
			return err
		}
		if end >= 0 && c.Offset+int64(len(c.Data)) >= end {
			return nil
		}
	}
	return nil
}

// chunk sends the part of a chunk between two offsets; end -1: all that follows.
func (t *tail) chunk(c logstream.Chunk, from, end int64) error {
	if skip := min(from-c.Offset, int64(len(c.Data))); skip > 0 {
		c.Data, c.Offset = c.Data[skip:], c.Offset+skip
	}
	if end >= 0 && c.Offset+int64(len(c.Data)) > end {
		c.Data = c.Data[:max(0, end-c.Offset)]
	}
	for len(c.Data) > 0 {
		n := min(len(c.Data), maxLogMessage)
		m := &pb.TailLogResponse{Offset: c.Offset, Data: c.Data[:n], Durable: c.Durable}
		for i, k := range c.Marks {
			// The one in force where the piece begins is kept, at its beginning.
			last := i == len(c.Marks)-1
			if k.Offset >= c.Offset+int64(n) || k.Offset < c.Offset && !last && c.Marks[i+1].Offset <= c.Offset {
				continue
			}
			m.Marks = append(m.Marks, &pb.LogMark{
				Offset: max(k.Offset, c.Offset), Time: timestamppb.New(k.Time), Step: int32(k.Step), Fd: int32(k.FD),
			})
		}
		if err := t.out.Send(m); err != nil {
			return err
		}
		c.Data, c.Offset = c.Data[n:], c.Offset+int64(n)
	}
	return nil
}

// clip bounds what people read.
func clip(s string) string {
	const longest = 1024
	if len(s) > longest {
		s = s[:longest]
	}
	return strings.ToValidUTF8(s, "")
}
