package s3blob

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"iter"
	"math"
	"net/http"
	"strconv"
	"strings"

	"github.com/minio/minio-go/v7"

	"github.com/solstice-ci/solstice-go/blobstore"
)

// Metadata of objects.
const (
	metaPut    = "Solstice-Put"    // a number of the Put that stored it
	metaSHA256 = "Solstice-Sha256" // of the content, in hexadecimal digits
)

// noType is S3's own default for objects that were given no content type.
const noType = "binary/octet-stream"

func infoOf(key string, o minio.ObjectInfo) blobstore.Info {
	info := blobstore.Info{Key: key, Size: o.Size, ModTime: o.LastModified, ContentType: o.ContentType}
	if info.ContentType == noType {
		info.ContentType = ""
	}
	return info
}

// Get implements blobstore.Store. A reader whose connection breaks goes on with
// another, as long as the object was not replaced.
func (s *Store) Get(ctx context.Context, key string, o blobstore.GetOptions) (io.ReadCloser, blobstore.Info, error) {
	if err := blobstore.ValidateKey(key); err != nil {
		return nil, blobstore.Info{}, err
	}
	if o.Offset < 0 || o.Length < 0 {
		_, err := o.Range(0)
		return nil, blobstore.Info{}, fmt.Errorf("%s: %w", key, err)
	}
	c, err := s.begin(ctx, "get", key)
	if err != nil {
		return nil, blobstore.Info{}, err
	}
	r, info, err := c.open(o)
	if err != nil {
		err = c.failed(err)
		c.end(err)
		return nil, blobstore.Info{}, err
	}
	c.release() // Close does not wait for who reads slowly
	return r, info, nil
}

// request asks for bytes from offset on, length of them or, when that is zero,
// to the end; with etag only of that version.
func (c *call) request(offset, length int64, etag string) (body io.ReadCloser, size int64, o minio.ObjectInfo, err error) {
	var opts minio.GetObjectOptions
	ranged := offset > 0 || length > 0
	if ranged {
		last := ""
		if length > 0 && offset <= math.MaxInt64-length {
			last = strconv.FormatInt(offset+length-1, 10)
		}
		opts.Set("Range", fmt.Sprintf("bytes=%d-%s", offset, last))
	}
	if etag != "" {
		opts.Set("If-Match", `"`+etag+`"`)
	}
	err = c.do(c.ctx, func(ctx context.Context) error {
		var h http.Header
		var err error
		body, o, h, err = c.s.s3.GetObject(ctx, c.s.o.Bucket, c.s.name(c.key), opts)
		if err != nil {
			return err
		}
		size = o.Size
		if ranged {
			from, total, ok := parseContentRange(h.Get("Content-Range"))
			if !ok || from != offset {
				body.Close()
				return fmt.Errorf("asked for bytes from %d, got %q", offset, h.Get("Content-Range"))
			}
			size = total
		}
		return nil
	})
	return body, size, o, err
}

// parseContentRange reads "bytes FROM-TO/TOTAL".
func parseContentRange(h string) (from, total int64, ok bool) {
	r, n, ok1 := strings.Cut(strings.TrimPrefix(h, "bytes "), "/")
	f, _, ok2 := strings.Cut(r, "-")
	from, err1 := strconv.ParseInt(f, 10, 64)
	total, err2 := strconv.ParseInt(n, 10, 64)
	return from, total, ok1 && ok2 && err1 == nil && err2 == nil
}

func (c *call) open(o blobstore.GetOptions) (io.ReadCloser, blobstore.Info, error) {
	for range 3 { // an object may grow between the two questions
		body, size, object, err := c.request(o.Offset, o.Length, "")
		if errors.Is(err, errRange) { // also of nothing at the very end
			info, serr := c.stat()
			if serr != nil {
				return nil, blobstore.Info{}, serr
			}
			n, rerr := o.Range(info.Size)
			if rerr != nil {
				return nil, blobstore.Info{}, rerr
			}
			if n == 0 {
				return &reader{c: c, body: http.NoBody}, info, nil
			}
			continue
		}
		if err != nil {
			return nil, blobstore.Info{}, err
		}
		info := infoOf(c.key, object)
		info.Size = size
		n, err := o.Range(size)
		if err != nil {
			body.Close()
			return nil, blobstore.Info{}, err
		}
		r := &reader{c: c, body: body, etag: object.ETag, offset: o.Offset, left: n}
		if sum, err := hex.DecodeString(object.UserMetadata[metaSHA256]); c.s.o.VerifyReads && err == nil && len(sum) == sha256.Size && n == size {
			r.hash, r.sum = sha256.New(), sum
		}
		return r, info, nil
	}
	return nil, blobstore.Info{}, errors.New("the object changes all the time")
}

type reader struct {
	c      *call
	body   io.ReadCloser
	etag   string
	offset int64 // of the next byte
	left   int64
	failed int // times in a row that nothing came
	hash   hash.Hash
	sum    []byte
	err    error // how it ended
	closed bool
}

func (r *reader) Read(p []byte) (int, error) {
	for {
		if r.err != nil {
			return 0, r.err
		}
		if r.c.ctx.Err() != nil {
			return 0, r.fail(r.c.ended(r.c.ctx))
		}
		if r.left == 0 {
			return 0, r.fail(r.verify())
		}
		n, err := r.body.Read(p[:min(int64(len(p)), r.left)])
		r.offset, r.left, r.c.size = r.offset+int64(n), r.left-int64(n), r.c.size+int64(n)
		if r.hash != nil {
			r.hash.Write(p[:n])
		}
		if n > 0 {
			r.failed = 0
			return n, nil // an error comes again, or is met by another request
		}
		if err == nil {
			return 0, nil
		}
		if r.c.ctx.Err() != nil {
			return 0, r.fail(r.c.ended(r.c.ctx))
		}
		if r.failed++; r.failed >= r.c.attempts {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return 0, r.fail(r.c.failed(fmt.Errorf("%w: %w", ErrUnreachable, err)))
		}
		r.body.Close()
		r.c.s.telemetry.retry(r.c, r.failed, err)
		body, _, _, err := r.c.request(r.offset, r.left, r.etag)
		if errors.Is(err, blobstore.ErrExists) || errors.Is(err, blobstore.ErrNotFound) || errors.Is(err, errRange) {
			err = fmt.Errorf("the connection broke, and the object was replaced or deleted meanwhile: %w", io.ErrUnexpectedEOF)
		}
		if err != nil {
			r.body = http.NoBody
			return 0, r.fail(r.c.failed(err))
		}
		r.body = body
	}
}

func (r *reader) fail(err error) error {
	r.err = err
	return err
}

// verify returns io.EOF or what is wrong with all that was read.
func (r *reader) verify() error {
	if r.hash != nil && !bytes.Equal(r.hash.Sum(nil), r.sum) {
		return fmt.Errorf("s3blob: get %s: %w: SHA-256 is not %x", r.c.key, blobstore.ErrChecksum, r.sum)
	}
	return io.EOF
}

func (r *reader) Close() error {
	if r.closed {
		return nil
	}
	r.closed = true
	err := r.err
	if errors.Is(err, io.EOF) {
		err = nil
	}
	if r.err == nil {
		r.err = errors.New("s3blob: read after Close")
	}
	if r.left > 0 {
		r.c.cancel() // so that the rest is not waited for
	}
	_ = r.body.Close() // says nothing about what was read
	r.c.end(err)
	return nil
}

func (c *call) stat() (info blobstore.Info, err error) {
	object, err := c.head()
	return infoOf(c.key, object), err
}

func (c *call) head() (o minio.ObjectInfo, err error) {
	err = c.do(c.ctx, func(ctx context.Context) error {
		o, err = c.s.s3.StatObject(ctx, c.s.o.Bucket, c.s.name(c.key), minio.StatObjectOptions{})
		return err
	})
	return o, err
}

// Stat implements blobstore.Store. ModTime is in whole seconds.
func (s *Store) Stat(ctx context.Context, key string) (blobstore.Info, error) {
	if err := blobstore.ValidateKey(key); err != nil {
		return blobstore.Info{}, err
	}
	c, err := s.begin(ctx, "stat", key)
	if err != nil {
		return blobstore.Info{}, err
	}
	info, err := c.stat()
	if err = c.failed(err); err != nil {
		info = blobstore.Info{}
	}
	c.end(err)
	return info, err
}

// Delete implements blobstore.Store. In a bucket with versions, old ones stay;
// give it a lifecycle rule.
func (s *Store) Delete(ctx context.Context, key string, _ blobstore.DeleteOptions) error {
	if err := blobstore.ValidateKey(key); err != nil {
		return err
	}
	c, err := s.begin(ctx, "delete", key)
	if err != nil {
		return err
	}
	err = c.do(c.ctx, func(ctx context.Context) error {
		return s.s3.RemoveObject(ctx, s.o.Bucket, s.name(key), minio.RemoveObjectOptions{})
	})
	if errors.Is(err, blobstore.ErrNotFound) {
		err = nil
	}
	err = c.failed(err)
	c.end(err)
	return err
}

// pageSize is what S3 gives at most at once; a variable for tests.
var pageSize = 1000

// List implements blobstore.Store; it leaves ContentType empty. Objects in the
// bucket that this package did not name are ignored.
func (s *Store) List(ctx context.Context, o blobstore.ListOptions) iter.Seq2[blobstore.Info, error] {
	return func(yield func(blobstore.Info, error) bool) {
		prefix := s.o.Prefix + escaper.Replace(valid(o.Prefix))
		after := ""
		if v := valid(o.After); o.After != "" {
			if after = s.o.Prefix + escaper.Replace(v); v == o.After {
				after += mark
			}
		}
		for more := true; more; {
			page, err := s.page(ctx, prefix, after)
			if err != nil {
				yield(blobstore.Info{}, err)
				return
			}
			more = len(page) >= pageSize
			for _, object := range page {
				after = object.Key
				key, ok := s.key(object.Key)
				if !ok || !strings.HasPrefix(key, o.Prefix) || key <= o.After {
					continue
				}
				if err := ctx.Err(); err != nil {
					yield(blobstore.Info{}, err)
					return
				}
				if !yield(blobstore.Info{Key: key, Size: object.Size, ModTime: object.LastModified}, nil) {
					return
				}
			}
		}
	}
}

// page returns the first pageSize objects named after after.
func (s *Store) page(ctx context.Context, prefix, after string) (page []minio.ObjectInfo, err error) {
	c, err := s.begin(ctx, "list", prefix)
	if err != nil {
		return nil, err
	}
	noOwner := false
	err = c.do(c.ctx, func(ctx context.Context) error {
		page = page[:0]
		for object := range s.s3.ListObjectsIter(ctx, s.o.Bucket, minio.ListObjectsOptions{
			Prefix: prefix, StartAfter: after, Recursive: true, MaxKeys: pageSize, FetchOwner: &noOwner,
		}) {
			if object.Err != nil {
				return object.Err
			}
			if page = append(page, object); len(page) >= pageSize {
				break
			}
		}
		return ctx.Err() // the iterator says nothing of it
	})
	err = c.failed(err)
	c.end(err)
	return page, err
}
