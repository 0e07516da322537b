// Package s3blob keeps blobs in a bucket of an S3 service: AWS, or anything that
// speaks its protocol. Keys are named in the bucket as keys.go describes.
//
// A Put of up to [Options].PartSize bytes is one request, a larger one a
// multipart upload whose parts travel side by side; either becomes visible as a
// whole. What was sent is checked by the service against the SHA-256 of each
// request, IfAbsent is decided by it (If-None-Match). A Put that fails aborts
// its upload; what is left of processes that died is removed by
// [Store.Sweep]. Requests that may succeed later (throttling, errors of the
// server, lost connections) are repeated with backoff, and a connection on which
// nothing moves is given up. Where a Put's last reply is lost and no repeat
// settles it, its error does not tell whether the object is there.
//
// Nothing is read from the environment or from configuration files of other
// programs: neither credentials nor proxies.
//
// Telemetry: a span of each operation ("s3blob.Put"; attributes s3.bucket, s3.key, size
// and outcome; an event for each repeated request), and the metrics
//
//	solstice.blob.duration  histogram, seconds, by op and outcome
//	solstice.blob.bytes     counter, bytes that Put stored and Get gave, by op
//	solstice.blob.retries   counter, repeated requests, by op
//
// op is put, get, stat, delete, list, presign, sweep or check; outcome is ok, not_found,
// exists, cancelled or error.
package s3blob

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
	"github.com/minio/minio-go/v7/pkg/s3utils"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/solstice-ci/solstice-go/blobstore"
)

// Options says where the bucket is; Bucket is required.
type Options struct {
	// Endpoint is the service's URL, such as http://127.0.0.1:9000; without a
	// scheme it is https. Empty: AWS, in Region.
	Endpoint string
	// Bucket must exist.
	Bucket string
	// Region that requests are signed for. Default us-east-1.
	Region string
	// Prefix, a key, is put before all keys, so that a bucket can be shared.
	Prefix string

	// AccessKey and SecretKey are static credentials, SessionToken belongs to
	// temporary ones.
	AccessKey, SecretKey, SessionToken string
	// Credentials replaces them. Without either they are the machine's role:
	// [InstanceCredentials].
	Credentials CredentialsFunc

	// VirtualHost addresses the bucket as a part of the host's name. Without it
	// that is done at AWS only; elsewhere the bucket is a part of the path.
	VirtualHost bool
	// PresignEndpoint is the service's URL as those reach it who get presigned
	// URLs. Default Endpoint.
	PresignEndpoint string
	// TLS for https; nil: the system's authorities.
	TLS *tls.Config

	// ConnectTimeout bounds connecting and the TLS handshake, each. Default 5 s.
	ConnectTimeout time.Duration
	// StallTimeout gives a connection up on which nothing moved for so long,
	// also while an answer is waited for. Default 30 s.
	StallTimeout time.Duration
	// Attempts is how often a request is sent at most. Default 5.
	Attempts int
	// PartSize is the size of a multipart upload's parts, in bytes, at least
	// 5 MiB. Default 8 MiB. An object has at most 10,000 parts; where
	// PutOptions.Size asks for it, they are larger.
	PartSize int64
	// Parallel is how many parts of a Put travel at once. The Put holds one
	// more in memory. Default 3.
	Parallel int
	// VerifyReads checks what Get read from beginning to end against the SHA-256
	// that Put kept with the object; a mismatch wraps blobstore.ErrChecksum. Of
	// multipart uploads only those have one whose PutOptions gave it.
	VerifyReads bool

	// Logger; nil discards.
	Logger *slog.Logger
	// TracerProvider and MeterProvider; nil: otel's global ones.
	TracerProvider trace.TracerProvider
	MeterProvider  metric.MeterProvider
}

const (
	minPart  = 5 << 20
	maxParts = 10_000
	// maxPrefix leaves room for a key in the 1024 bytes that a name may have.
	maxPrefix = 256
)

func (o *Options) fill() error {
	invalid := func(format string, a ...any) error {
		return fmt.Errorf("s3blob: %w: %s", blobstore.ErrInvalid, fmt.Sprintf(format, a...))
	}
	if err := s3utils.CheckValidBucketName(o.Bucket); err != nil {
		return invalid("bucket %q: %v", o.Bucket, err)
	}
	if o.Prefix = strings.Trim(o.Prefix, "/"); o.Prefix != "" {
		if err := blobstore.ValidateKey(o.Prefix); err != nil || len(o.Prefix) > maxPrefix {
			return invalid("prefix %q", o.Prefix)
		}
		o.Prefix += "/"
	}
	if (o.AccessKey == "") != (o.SecretKey == "") {
		return invalid("an access key needs its secret key, and the other way round")
	}
	switch {
	case o.AccessKey != "":
		static := Credentials{AccessKey: o.AccessKey, SecretKey: o.SecretKey, SessionToken: o.SessionToken}
		o.Credentials = func(context.Context) (Credentials, error) { return static, nil }
	case o.Credentials == nil:
		o.Credentials = InstanceCredentials("")
	}
	if o.Region == "" {
		o.Region = "us-east-1"
	}
	if o.Endpoint == "" {
		o.Endpoint = "https://s3." + o.Region + ".amazonaws.com"
	}
	if o.PresignEndpoint == "" {
		o.PresignEndpoint = o.Endpoint
	}
	orDefault(&o.ConnectTimeout, 5*time.Second)
	orDefault(&o.StallTimeout, 30*time.Second)
	orDefault(&o.Attempts, 5)
	orDefault(&o.PartSize, 8<<20)
	orDefault(&o.Parallel, 3)
	if o.PartSize < minPart || o.Attempts < 0 || o.Parallel < 0 || o.ConnectTimeout < 0 || o.StallTimeout < 0 {
		return invalid("a part size below 5 MiB, or something negative")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

func orDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// Store is a blobstore.Store in a bucket. Make one with Open.
type Store struct {
	o         Options
	s3        *minio.Core
	presign   *minio.Client
	transport *http.Transport
	creds     *credentialsCache
	signer    *credentials.Credentials // minio's view of creds, one for both clients
	telemetry *telemetry
	pools     *pools

	mu     sync.Mutex
	closed bool
	calls  sync.WaitGroup // calls and aborts under way
	ctx    context.Context
	cancel context.CancelCauseFunc
}

var (
	_ blobstore.Store     = (*Store)(nil)
	_ blobstore.Presigner = (*Store)(nil)
	_ blobstore.Sweeper   = (*Store)(nil)
	_ blobstore.Checker   = (*Store)(nil)
)

// Open returns a store once the bucket has answered. Errors wrap the sentinels
// of this package, or blobstore.ErrInvalid for options that cannot be.
func Open(ctx context.Context, o Options) (*Store, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	s := newStore(o)
	var err error
	if s.telemetry, err = newTelemetry(o); err != nil {
		return nil, fmt.Errorf("s3blob: metrics: %w", err)
	}
	s.transport = newTransport(o)
	if s.s3, err = s.client(o.Endpoint); err != nil {
		return nil, err
	}
	public, err := s.client(o.PresignEndpoint)
	if err != nil {
		return nil, err
	}
	s.presign = public.Client
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	if err := s.check(ctx, 1); err != nil {
		_ = s.Close()
		return nil, err
	}
	return s, nil
}

func newStore(o Options) *Store {
	creds := newCredentialsCache(o)
	return &Store{o: o, creds: creds, signer: credentials.New(creds), pools: newPools()}
}

func (s *Store) client(endpoint string) (*minio.Core, error) {
	if !strings.Contains(endpoint, "://") {
		endpoint = "https://" + endpoint
	}
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil {
		// Its text is not shown: a password may be in it.
		return nil, fmt.Errorf("s3blob: %w: the endpoint must be http://HOST[:PORT] or https://HOST[:PORT]", ErrEndpoint)
	}
	lookup := minio.BucketLookupPath
	if s.o.VirtualHost || s3utils.IsAmazonEndpoint(*u) {
		lookup = minio.BucketLookupDNS
	}
	core, err := minio.NewCore(u.Host, &minio.Options{
		Creds:        s.signer,
		Secure:       u.Scheme == "https",
		Transport:    recorder{s.transport},
		Region:       s.o.Region,
		BucketLookup: lookup,
		MaxRetries:   1, // call.do repeats
	})
	if err != nil {
		return nil, fmt.Errorf("s3blob: %w: %w", ErrEndpoint, err)
	}
	return core, nil
}

// Capabilities implements blobstore.Store.
func (s *Store) Capabilities() blobstore.Capabilities {
	return blobstore.Capabilities{Durable: true, ContentType: true, MultiWriter: true}
}

// Close ends calls under way and open readers; they wrap blobstore.ErrClosed.
func (s *Store) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel(blobstore.ErrClosed)
	s.calls.Wait()
	s.transport.CloseIdleConnections()
	return nil
}

// Check implements blobstore.Checker: whether the bucket answers. Errors are
// Open's.
func (s *Store) Check(ctx context.Context) error { return s.check(ctx, s.o.Attempts) }

func (s *Store) check(ctx context.Context, attempts int) error {
	c, err := s.begin(ctx, "check", "")
	if err != nil {
		return err
	}
	c.attempts = attempts
	// Listing is what the store needs to be allowed anyway, and its errors have
	// a body, other than those of HEAD.
	err = c.do(c.ctx, func(ctx context.Context) error {
		for info := range s.s3.ListObjectsIter(ctx, s.o.Bucket, minio.ListObjectsOptions{Prefix: s.o.Prefix, Recursive: true, MaxKeys: 1}) {
			return info.Err
		}
		return ctx.Err() // the iterator says nothing of it
	})
	if err != nil {
		err = fmt.Errorf("s3blob: bucket %s: %w", s.o.Bucket, err)
	}
	c.end(err)
	return err
}

// call is one operation, which may take several requests.
type call struct {
	s        *Store
	op, key  string
	parent   context.Context
	ctx      context.Context // ends with the parent and with the store
	cancel   context.CancelFunc
	unwatch  func() bool
	attempts int // of each request
	span     trace.Span
	start    time.Time
	size     int64
	held     bool // Close waits for it
}

// begin starts an operation; the caller ends it.
func (s *Store) begin(parent context.Context, op, key string) (*call, error) {
	if err := parent.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil, blobstore.ErrClosed
	}
	s.calls.Add(1)
	s.mu.Unlock()
	c := &call{s: s, op: op, key: key, parent: parent, attempts: s.o.Attempts, start: time.Now(), held: true}
	c.ctx, c.span = s.telemetry.begin(parent, c)
	c.ctx, c.cancel = context.WithCancel(c.ctx)
	c.unwatch = context.AfterFunc(s.ctx, c.cancel)
	if err := s.creds.ensure(c.ctx); err != nil {
		if c.ctx.Err() != nil {
			err = c.ended(c.ctx)
		}
		c.end(err)
		return nil, err
	}
	return c, nil
}

// end ends the operation with its outcome.
func (c *call) end(err error) {
	c.unwatch()
	c.cancel()
	c.s.telemetry.end(c, err)
	c.release()
}

// release lets Close go on without waiting for the rest of the operation.
func (c *call) release() {
	if c.held {
		c.held = false
		c.s.calls.Done()
	}
}

// ended says why ctx, one of the operation, has ended.
func (c *call) ended(ctx context.Context) error {
	if err := c.parent.Err(); err != nil {
		return err
	}
	if c.s.ctx.Err() != nil {
		return blobstore.ErrClosed
	}
	return ctx.Err()
}

// failed wraps an error of the operation with what it was about.
func (c *call) failed(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, blobstore.ErrNotFound), errors.Is(err, blobstore.ErrExists):
		return fmt.Errorf("%w: %s", err, c.key)
	}
	return fmt.Errorf("s3blob: %s %s: %w", c.op, c.key, err)
}
