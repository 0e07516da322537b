package s3blob

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/minio/minio-go/v7"
	"golang.org/x/sync/errgroup"

	"github.com/solstice-ci/solstice-go/blobstore"
)

// pools of the smaller buffers, which most objects fit into with a byte to spare
// that shows that they have ended.
type pools [2]struct {
	size int
	sync.Pool
}

func newPools() *pools {
	p := &pools{}
	for i, size := range []int{64<<10 + 1, 1<<20 + 1} {
		p[i].size = size
		p[i].New = func() any { b := make([]byte, size); return &b }
	}
	return p
}

// buffers are those of one Put. The ones for parts go with it: they are too
// large to be kept for the next.
type buffers struct {
	*pools
	part int
	mu   sync.Mutex
	free []*[]byte // for parts
}

// get returns a buffer of at least n bytes, or for a part.
func (b *buffers) get(n int) *[]byte {
	for i := range b.pools {
		if b.pools[i].size >= n {
			return b.pools[i].Get().(*[]byte)
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if last := len(b.free) - 1; last >= 0 {
		p := b.free[last]
		b.free = b.free[:last]
		return p
	}
	p := make([]byte, b.part)
	return &p
}

func (b *buffers) put(p *[]byte) {
	for i := range b.pools {
		if b.pools[i].size == len(*p) {
			b.pools[i].Put(p)
			return
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free = append(b.free, p)
}

// source reads what is to be stored, and checks it.
type source struct {
	ctx  context.Context
	r    io.Reader
	o    blobstore.PutOptions
	size int64
	done bool
}

// fill reads until p is full or the content has ended, and has the right size.
func (s *source) fill(p []byte) (n int, err error) {
	for n < len(p) && !s.done {
		if err := s.ctx.Err(); err != nil {
			return n, err
		}
		m, err := s.r.Read(p[n:])
		n += m
		s.size += int64(m)
		// A reader ends with io.EOF itself; one that wraps it has failed.
		if err == io.EOF {
			s.done = true
		} else if err != nil {
			return n, err
		}
		if s.o.Size > 0 && (s.size > s.o.Size || s.done && s.size < s.o.Size) {
			return n, fmt.Errorf("%w: not the %d bytes announced", blobstore.ErrChecksum, s.o.Size)
		}
	}
	return n, nil
}

func (s *source) verify(sum []byte) error {
	if s.o.SHA256 != nil && !bytes.Equal(sum, s.o.SHA256) {
		return fmt.Errorf("%w: SHA-256 is %x", blobstore.ErrChecksum, sum)
	}
	return nil
}

// Put implements blobstore.Store. ModTime is the service's clock, in whole
// seconds. The largest object has 10,000 parts of Options.PartSize, or, where
// its size is announced, whatever the service takes.
func (s *Store) Put(ctx context.Context, key string, r io.Reader, o blobstore.PutOptions) (blobstore.Info, error) {
	if err := blobstore.ValidateKey(key); err != nil {
		return blobstore.Info{}, err
	}
	if err := o.Validate(); err != nil {
		return blobstore.Info{}, err
	}
	c, err := s.begin(ctx, "put", key)
	if err != nil {
		return blobstore.Info{}, err
	}
	info, err := c.put(&source{ctx: c.ctx, r: r, o: o})
	if err != nil {
		if c.ctx.Err() != nil {
			err = c.ended(c.ctx)
		}
		err, info = c.failed(err), blobstore.Info{}
	}
	c.size = info.Size
	c.end(err)
	return info, err
}

func (c *call) put(src *source) (blobstore.Info, error) {
	pool := &buffers{pools: c.s.pools, part: int(max(c.s.o.PartSize, (src.o.Size+maxParts-1)/maxParts))}
	hint := int(min(src.o.Size+1, c.s.o.PartSize))
	if l, ok := src.r.(interface{ Len() int }); ok && src.o.Size == 0 {
		hint = l.Len() + 1
	}
	// A buffer that turns out too small is exchanged for the next larger one.
	buf := pool.get(hint)
	n, err := src.fill(*buf)
	for err == nil && !src.done && len(*buf) < pool.part {
		larger := pool.get(len(*buf) + 1)
		copy(*larger, (*buf)[:n])
		pool.put(buf)
		buf = larger
		var m int
		m, err = src.fill((*buf)[n:])
		n += m
	}
	if err != nil || src.done {
		defer pool.put(buf)
		if err != nil {
			return blobstore.Info{}, err
		}
		return c.single(src, (*buf)[:n])
	}
	// Full: is there more?
	next := pool.get(len(*buf))
	m, err := src.fill(*next)
	if err != nil || m == 0 && src.done {
		defer pool.put(buf)
		defer pool.put(next)
		if err != nil {
			return blobstore.Info{}, err
		}
		return c.single(src, (*buf)[:n])
	}
	return c.multipart(src, pool, buf, next, m)
}

func (c *call) options(o blobstore.PutOptions, id string, sum []byte) minio.PutObjectOptions {
	opts := minio.PutObjectOptions{
		ContentType: o.ContentType,
		// The hash of the whole body is signed instead of one per chunk.
		DisableContentSha256: true,
		UserMetadata:         map[string]string{},
	}
	if opts.ContentType == "" {
		opts.ContentType = noType
	}
	if id != "" {
		opts.UserMetadata[metaPut] = id
	}
	if sum != nil {
		opts.UserMetadata[metaSHA256] = hex.EncodeToString(sum)
	}
	return opts
}

// single stores content in one request.
func (c *call) single(src *source, content []byte) (blobstore.Info, error) {
	sum := sha256.Sum256(content)
	if err := src.verify(sum[:]); err != nil {
		return blobstore.Info{}, err
	}
	id := ""
	if src.o.IfAbsent {
		id = rand.Text()
	}
	opts := c.options(src.o, id, sum[:])
	if src.o.IfAbsent {
		opts.SetMatchETagExcept("*")
	}
	rec, repeated, err := c.try(c.ctx, func(ctx context.Context) error {
		_, err := c.s.s3.PutObject(ctx, c.s.o.Bucket, c.s.name(c.key), bytes.NewReader(content), int64(len(content)), "", hex.EncodeToString(sum[:]), opts)
		return err
	})
	return c.settle(src, id, rec, repeated, err)
}

// settle ends a Put. Where an earlier attempt, whose answer was lost, may have
// been the one that succeeded, the object itself says whether it was.
func (c *call) settle(src *source, id string, rec *record, repeated bool, err error) (blobstore.Info, error) {
	if repeated && (errors.Is(err, blobstore.ErrExists) || errors.Is(err, errNoUpload)) {
		switch object, serr := c.head(); {
		case serr == nil && object.UserMetadata[metaPut] == id:
			return infoOf(c.key, object), nil
		case serr != nil && !errors.Is(serr, blobstore.ErrNotFound):
			return blobstore.Info{}, fmt.Errorf("an answer was lost, and what became of it is unknown: %w", serr)
		}
	}
	if err != nil {
		return blobstore.Info{}, err
	}
	info := blobstore.Info{Key: c.key, Size: src.size, ModTime: rec.date, ContentType: src.o.ContentType}
	if info.ModTime.IsZero() {
		info.ModTime = time.Now()
	}
	return info, nil
}

// multipart stores content that begins with a full buffer and m bytes of next.
func (c *call) multipart(src *source, pool *buffers, buf, next *[]byte, m int) (_ blobstore.Info, err error) {
	free := func(bufs ...*[]byte) {
		for _, b := range bufs {
			pool.put(b)
		}
	}
	if src.o.IfAbsent { // spare the work; what decides is the end of the upload
		_, err := c.stat()
		if err == nil {
			err = blobstore.ErrExists
		}
		if !errors.Is(err, blobstore.ErrNotFound) {
			free(buf, next)
			return blobstore.Info{}, err
		}
	}
	bucket, name, id := c.s.o.Bucket, c.s.name(c.key), rand.Text()
	var upload string
	err = c.do(c.ctx, func(ctx context.Context) (err error) {
		upload, err = c.s.s3.NewMultipartUpload(ctx, bucket, name, c.options(src.o, id, src.o.SHA256))
		return err
	})
	if err != nil {
		free(buf, next)
		return blobstore.Info{}, err
	}
	defer func() {
		if err != nil {
			c.abort(name, upload)
		}
	}()

	parts, err := c.parts(src, pool, name, upload, buf, next, m)
	if err != nil {
		return blobstore.Info{}, err
	}
	var opts minio.PutObjectOptions
	if src.o.IfAbsent {
		opts.SetMatchETagExcept("*")
	}
	rec, repeated, err := c.try(c.ctx, func(ctx context.Context) error {
		_, err := c.s.s3.CompleteMultipartUpload(ctx, bucket, name, upload, parts, opts)
		return err
	})
	return c.settle(src, id, rec, repeated, err)
}

// parts uploads all parts, and verifies the whole.
func (c *call) parts(src *source, pool *buffers, name, upload string, buf, next *[]byte, m int) ([]minio.CompletePart, error) {
	var sum hash.Hash
	if src.o.SHA256 != nil {
		sum = sha256.New()
	}
	ctx, stop := context.WithCancel(c.ctx)
	defer stop()
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(c.s.o.Parallel)
	src.ctx = ctx
	var mu sync.Mutex
	var done []minio.CompletePart
	number := 0
	send := func(buf *[]byte, n int) {
		number++
		if sum != nil {
			sum.Write((*buf)[:n])
		}
		part := number
		group.Go(func() error { // waits for its turn
			defer pool.put(buf)
			if ctx.Err() != nil {
				return nil // another one says why
			}
			p, err := c.part(ctx, name, upload, part, (*buf)[:n])
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			done = append(done, p)
			return nil
		})
	}
	send(buf, len(*buf))
	send(next, m)
	err := func() error {
		for !src.done && ctx.Err() == nil {
			if number == maxParts {
				return fmt.Errorf("%w: more than %d parts; announce the size, or raise the part size", blobstore.ErrInvalid, maxParts)
			}
			buf := pool.get(len(*next))
			n, err := src.fill(*buf)
			if err != nil || n == 0 {
				pool.put(buf)
				return err
			}
			send(buf, n)
		}
		return nil
	}()
	if err != nil && ctx.Err() == nil {
		stop() // what is under way is not wanted any more
		_ = group.Wait()
		return nil, err
	}
	err = cmp.Or(group.Wait(), err, c.ctx.Err())
	if err == nil && sum != nil {
		err = src.verify(sum.Sum(nil))
	}
	slices.SortFunc(done, func(a, b minio.CompletePart) int { return a.PartNumber - b.PartNumber })
	return done, err
}

func (c *call) part(ctx context.Context, name, upload string, number int, content []byte) (minio.CompletePart, error) {
	sum := sha256.Sum256(content)
	var part minio.ObjectPart
	err := c.do(ctx, func(ctx context.Context) (err error) {
		part, err = c.s.s3.PutObjectPart(ctx, c.s.o.Bucket, name, upload, number, bytes.NewReader(content), int64(len(content)), minio.PutObjectPartOptions{
			Sha256Hex: hex.EncodeToString(sum[:]), DisableContentSha256: true,
		})
		return err
	})
	return minio.CompletePart{PartNumber: number, ETag: part.ETag}, err
}

// How long an abort is tried, how long a Put whose context has ended waits for
// it, and how long Close.
const (
	abortTimeout = time.Minute
	abortWait    = time.Second
	closeWait    = 5 * time.Second
)

// abort removes the parts of an upload, if need be after the Put has returned.
func (c *call) abort(name, upload string) {
	s := c.s
	s.calls.Add(1) // the Put holds one still
	done := make(chan struct{})
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.ctx), abortTimeout)
	unwatch := context.AfterFunc(s.ctx, func() {
		select {
		case <-time.After(closeWait):
			cancel()
		case <-done:
		}
	})
	go func() {
		defer s.calls.Done()
		defer cancel()
		defer unwatch()
		defer close(done)
		a := &call{s: s, op: c.op, key: c.key, parent: ctx, ctx: ctx, attempts: c.attempts, span: c.span}
		err := a.do(ctx, func(ctx context.Context) error {
			return s.s3.AbortMultipartUpload(ctx, s.o.Bucket, name, upload)
		})
		if err != nil && !errors.Is(err, errNoUpload) {
			s.o.Logger.WarnContext(ctx, "s3blob: parts of a failed upload are left for Sweep", "key", c.key, "upload", upload, "error", err)
		}
	}()
	select {
	case <-done:
		return
	case <-c.ctx.Done():
	}
	select {
	case <-done:
	case <-time.After(abortWait):
	}
}
