package image

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// maxWindow bounds the memory for unpacking zstd; it is the zstd program's own.
const maxWindow = 128 << 20

// limit is how large an image may become, in bytes.
func (s *Store) limit(img Image) int64 { return cmp.Or(img.MaxBytes, s.o.MaxImageBytes) }

// unpacker is a reader of what is compressed in r.
func unpacker(compression string, r io.Reader) (io.Reader, func(), error) {
	switch compression {
	case XZ:
		x, err := xz.NewReader(r)
		return x, func() {}, err
	case Zstd:
		z, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	default:
		z, err := gzip.NewReader(r)
		return z, func() {}, err
	}
}

// unpack makes KEY.new of a verified KEY.part, durable, and returns its SHA-256.
// A KEY.part of which no image can be made is removed.
func (s *Store) unpack(ctx context.Context, key string, img Image, r *reporter) (sum string, err error) {
	in, err := s.root.Open(key + ".part")
	if err != nil {
		return "", err
	}
	defer func() { _ = in.Close() }() // only read from
	info, err := in.Stat()
	if err != nil {
		return "", err
	}
	f, err := s.root.OpenFile(key+".new", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()

	useless := func(err error) error { return errors.Join(err, s.discard(key, ".part", ".part.json")) }
	limit, hash, out := s.limit(img), sha256.New(), &sparse{f: f}
	var read atomic.Int64 // zstd reads ahead, in a goroutine of its own
	counted := readerFunc(func(p []byte) (int, error) {
		n, err := in.Read(p)
		read.Add(int64(n))
		return n, err
	})
	z, end, err := unpacker(img.Compression, counted)
	if err == nil {
		defer end()
		err = copyTo(ctx, io.MultiWriter(hash, out), io.LimitReader(z, limit+1), func(int64) { r.report(Progress{Unpacking, read.Load(), info.Size()}) })
	}
	switch {
	case ctx.Err() != nil:
		return "", context.Cause(ctx)
	case out.err != nil: // the packed file is good
		return "", out.err
	case err != nil:
		return "", useless(fmt.Errorf("%w: it cannot be unpacked as %s: %w", ErrInvalid, img.Compression, err))
	case out.size > limit:
		return "", useless(fmt.Errorf("%w: unpacked it has more than %d bytes", ErrTooLarge, limit))
	}
	sum = sumText(hash.Sum(nil))
	if img.ImageSHA256 != "" && sum != img.ImageSHA256 {
		return "", useless(fmt.Errorf("%w: unpacked it has %s, the catalogue says %s", ErrChecksum, sum, img.ImageSHA256))
	}
	return sum, errors.Join(f.Truncate(out.size), f.Sync())
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// sparse leaves holes where there are zeros, which most of a raw disk is. The
// file has to be truncated to size at the end.
type sparse struct {
	f    *os.File
	size int64
	err  error
}

var zeros [64 << 10]byte

func (s *sparse) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0 && s.err == nil; {
		piece := rest[:min(len(rest), len(zeros))]
		if !bytes.Equal(piece, zeros[:len(piece)]) {
			_, s.err = s.f.WriteAt(piece, s.size)
		}
		s.size += int64(len(piece))
		rest = rest[len(piece):]
	}
	return len(p), s.err
}
