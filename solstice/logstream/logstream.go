// Package logstream stores the logs of jobs: append-only byte streams that are
// written at explicit offsets by one writer at a time, followed live by any
// number of readers, and sealed once complete.
//
// Bytes are stored as printed. A side index of [Mark]s maps offsets to times,
// steps and output streams, so that a viewer can show them without the bytes
// being changed.
//
// Implementations: logstream/filelog (append-only files, one machine) and
// logstream/bloblog (chunks in any blobstore.Store, shared by a fleet).
// logstream/logstreamtest is their conformance suite.
package logstream

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"iter"
	"math"
	"strings"
	"time"
)

// Errors that callers act on; implementations wrap them.
var (
	// ErrNotFound: no such stream.
	ErrNotFound = errors.New("logstream: not found")
	// ErrFenced: the caller's epoch is older than one the stream has seen.
	ErrFenced = errors.New("logstream: fenced by a newer epoch")
	// ErrSealed: the stream is sealed and the append was not a repeat.
	ErrSealed = errors.New("logstream: sealed")
	// ErrConflict: other bytes are already stored at that offset, or a seal
	// names another size or hash than the stream has.
	ErrConflict = errors.New("logstream: conflicting content")
	// ErrInvalid: a stream name, offset or option breaks the rules.
	ErrInvalid = errors.New("logstream: invalid argument")
	// ErrClosed: the store was closed.
	ErrClosed = errors.New("logstream: closed")
	// ErrNoSpace: the disk is full; the same append may succeed later.
	ErrNoSpace = errors.New("logstream: no space left")
	// ErrCorrupt: what is stored is damaged.
	ErrCorrupt = errors.New("logstream: stored data is damaged")
)

// OffsetError refuses an append that would leave a gap, and ends a Tail from
// beyond the end of a sealed stream.
type OffsetError struct {
	Stream string
	Want   int64 // the stream's size: where the next append has to begin
	Got    int64
}

func (e *OffsetError) Error() string {
	return fmt.Sprintf("logstream: %s: offset %d is beyond the end at %d", e.Stream, e.Got, e.Want)
}

// Mark says that the bytes from Offset up to the next mark's were read at Time
// from the given output of the given step.
type Mark struct {
	Offset int64     `json:"o"`
	Time   time.Time `json:"t"` // microsecond precision survives storage
	Step   int       `json:"s"`
	FD     int       `json:"f"` // 1 stdout, 2 stderr
}

// AppendOptions says who writes.
type AppendOptions struct {
	// Epoch fences: a stream remembers the highest epoch it has seen and
	// refuses lower ones.
	Epoch int64
	// Marks for the appended bytes, strictly ascending offsets within them.
	// Marks of bytes that are stored already are dropped; the one in force
	// where the new bytes begin is kept.
	Marks []Mark
}

// SealOptions ends a stream.
type SealOptions struct {
	Epoch int64
	// Size and SHA256 are what the writer counted over the whole stream; the
	// seal is refused with ErrConflict when the stream differs. A nil SHA256
	// is not compared. Size -1 seals at whatever size the stream has (the
	// writer is gone and its tail is lost).
	Size   int64
	SHA256 []byte
}

// Chunk is what a follower gets. The receiver may keep Data but must not
// change it.
type Chunk struct {
	Offset int64
	Data   []byte // never empty
	Marks  []Mark // those whose offsets lie within Data, and the one in force at Offset first
	// Durable is false for bytes that were passed on before they were safe; a
	// crash of the machine may take those back until their writer sends them
	// again.
	Durable bool
}

// Info describes a stream.
type Info struct {
	Stream string
	Size   int64 // durable bytes
	Epoch  int64
	Sealed bool
	SHA256 []byte // of the whole, once sealed
}

// Store is safe for concurrent use; all methods honour ctx. Stream names obey
// [ValidateStream].
type Store interface {
	// Append stores p at offset off and returns the next offset, off+len(p),
	// once the bytes are durable. Where bytes are stored already they must be
	// the same (else ErrConflict), and only what is new is added; so a repeat
	// is a no-op. An append that begins beyond the end returns *OffsetError,
	// one that would grow a sealed stream ErrSealed, one of an older epoch
	// ErrFenced; what is refused changes nothing, the epoch included. A stream
	// begins to exist with its first append, which may be empty: that also
	// fences older epochs. After any other error, a cancelled ctx included,
	// the bytes may or may not be stored: repeat it. MaxAppendBytes and
	// MaxMarks bound it.
	Append(ctx context.Context, stream string, o AppendOptions, off int64, p []byte) (next int64, err error)
	// Seal ends the stream; a repeat with the same outcome is a no-op, also by
	// a newer epoch. A stream that does not exist is created empty. Marks and
	// bytes of a sealed stream never change, nor does its epoch.
	Seal(ctx context.Context, stream string, o SealOptions) error
	// Stat wraps ErrNotFound for a stream that never was appended to or sealed.
	Stat(ctx context.Context, stream string) (Info, error)
	// Tail yields the stream's bytes from the given offset, in order and
	// without gaps, and follows until the seal (end without error), ctx's end
	// or an error, which comes with the last pair. A stream that does not
	// exist yet is waited for; one that is sealed before the offset is reached
	// ends with *OffsetError. Breaking out releases everything. A slow reader
	// never slows the writer.
	Tail(ctx context.Context, stream string, from int64) iter.Seq2[Chunk, error]
	// Delete removes the stream; absent is no error. Its followers end with
	// ErrNotFound.
	Delete(ctx context.Context, stream string) error
	// Close waits for appends under way; followers end with ErrClosed.
	Close() error
}

// Limits every implementation accepts.
const (
	MaxStreamBytes  = 400      // of a stream name
	MaxElementBytes = 120      // of one element of it
	MaxAppendBytes  = 16 << 20 // of one append
	MaxMarks        = 1 << 20  // of one append
)

// ValidateStream checks a stream name: slash-separated elements of 1 to
// MaxElementBytes bytes of [A-Za-z0-9._-], none of them "." or "..", at most
// MaxStreamBytes in all.
func ValidateStream(stream string) error {
	bad := func(why string) error { return fmt.Errorf("%w: stream %q: %s", ErrInvalid, stream, why) }
	if len(stream) > MaxStreamBytes {
		return bad("name is too long")
	}
	for elem := range strings.SplitSeq(stream, "/") {
		switch {
		case elem == "" || elem == "." || elem == "..":
			return bad(fmt.Sprintf("has the path element %q", elem))
		case len(elem) > MaxElementBytes:
			return bad("has a path element that is too long")
		}
		for i := range len(elem) {
			switch c := elem[i]; {
			case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '_', c == '-':
			default:
				return bad(fmt.Sprintf("has the character %q", c))
			}
		}
	}
	return nil
}

// ValidateAppend checks the arguments of Append alone; implementations call it
// before anything else.
func ValidateAppend(stream string, o AppendOptions, off int64, p []byte) error {
	if err := ValidateStream(stream); err != nil {
		return err
	}
	bad := func(why string) error { return fmt.Errorf("%w: %s: %s", ErrInvalid, stream, why) }
	switch {
	case o.Epoch < 0:
		return bad(fmt.Sprintf("epoch %d", o.Epoch))
	case off < 0 || off > math.MaxInt64-int64(len(p)):
		return bad(fmt.Sprintf("offset %d", off))
	case len(p) > MaxAppendBytes:
		return bad(fmt.Sprintf("append of %d bytes, at most %d are allowed", len(p), MaxAppendBytes))
	}
	if len(o.Marks) > MaxMarks {
		return bad(fmt.Sprintf("%d marks, at most %d are allowed", len(o.Marks), MaxMarks))
	}
	next := off
	for _, m := range o.Marks {
		if m.Step != int(int32(m.Step)) || m.FD != int(int32(m.FD)) {
			return bad(fmt.Sprintf("mark with step %d, fd %d", m.Step, m.FD))
		}
		if m.Offset < next || m.Offset >= off+int64(len(p)) {
			return bad(fmt.Sprintf("mark at %d, bytes from %d to %d", m.Offset, off, off+int64(len(p))))
		}
		next = m.Offset + 1
	}
	return nil
}

// ValidateSeal checks the arguments of Seal alone.
func ValidateSeal(stream string, o SealOptions) error {
	if err := ValidateStream(stream); err != nil {
		return err
	}
	if o.Epoch < 0 || o.Size < -1 || o.SHA256 != nil && len(o.SHA256) != sha256.Size {
		return fmt.Errorf("%w: %s: seal with epoch %d, size %d, SHA-256 of %d bytes", ErrInvalid, stream, o.Epoch, o.Size, len(o.SHA256))
	}
	return nil
}
