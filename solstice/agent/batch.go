package agent

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// A batch is events of the journal as the spool has them, encoded: they go to the
// connection without being copied or decoded again.
type batch struct {
	records [][]byte
	last    int64 // number of the last one
	size    int   // of the EventBatch, encoded
}

// Field numbers of agent.proto.
const (
	fieldEvents = 4 // AttachRequest.events
	fieldEvent  = 1 // EventBatch.events
)

func eventSize(rec []byte) int {
	return protowire.SizeTag(fieldEvent) + protowire.SizeBytes(len(rec))
}

// encode makes the batch an AttachRequest.
func (b *batch) encode() mem.BufferSlice {
	out := make(mem.BufferSlice, 0, 2*len(b.records))
	head := protowire.AppendTag(nil, fieldEvents, protowire.BytesType)
	head = protowire.AppendVarint(head, uint64(b.size))
	for _, rec := range b.records {
		head = protowire.AppendTag(head, fieldEvent, protowire.BytesType)
		head = protowire.AppendVarint(head, uint64(len(rec)))
		out = append(out, mem.SliceBuffer(head), mem.SliceBuffer(rec))
		head = nil
	}
	return out
}

// batchCodec is the codec of a stream that sends batches too.
type batchCodec struct{ encoding.CodecV2 }

// Marshal implements encoding.CodecV2.
func (c batchCodec) Marshal(v any) (mem.BufferSlice, error) {
	if b, ok := v.(*batch); ok {
		return b.encode(), nil
	}
	return c.CodecV2.Marshal(v)
}

// reader reads a journal's events in order, for one stream.
type reader struct {
	j    *journal
	c    cursor
	held []byte // read, but did not fit into the last batch
}

// reader begins after seq, or after what is acknowledged if that is more.
func (j *journal) reader(seq int64) *reader {
	return &reader{j: j, c: cursor{s: j.spool, seq: seq}}
}

// batch gives the next events, as many as fit into limit bytes but at least
// one; nil when there are none now.
func (r *reader) batch(limit int) (*batch, error) {
	r.j.mu.Lock()
	defer r.j.mu.Unlock()
	b := &batch{}
	for {
		rec := r.held
		r.held = nil
		if rec == nil || r.c.seq <= r.j.acked {
			seq, next, err := r.c.next()
			if err != nil {
				return nil, fmt.Errorf("event %d: %w", r.c.seq+1, err)
			}
			if next == nil {
				break
			}
			if last := b.last; last > 0 && seq != last+1 {
				return nil, fmt.Errorf("%w: event %d after %d", errCorrupt, seq, last)
			}
			rec = next
		}
		n := eventSize(rec)
		if b.size > 0 && b.size+n > min(limit, r.j.maxBatch) {
			r.held = rec
			break
		}
		b.records, b.last = append(b.records, rec), r.c.seq
		b.size += n
	}
	if b.size == 0 {
		return nil, nil
	}
	return b, nil
}

func (r *reader) close() {
	r.j.mu.Lock()
	defer r.j.mu.Unlock()
	r.c.close()
}
