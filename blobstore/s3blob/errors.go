package s3blob

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/minio/minio-go/v7"

	"github.com/solstice-ci/solstice-go/blobstore"
)

// Errors of a service that cannot be used as it is configured; Open and Check
// tell them apart.
var (
	// ErrEndpoint: the endpoint is no URL that the driver can use.
	ErrEndpoint = errors.New("not a usable endpoint")
	// ErrHostNotFound: the endpoint's host does not resolve.
	ErrHostNotFound = errors.New("host not found")
	// ErrRefused: nothing listens at the endpoint.
	ErrRefused = errors.New("connection refused")
	// ErrUnreachable: the endpoint did not answer, or the connection broke.
	ErrUnreachable = errors.New("no answer")
	// ErrTLS: the two sides do not agree on TLS.
	ErrTLS = errors.New("TLS")
	// ErrAuth: the service does not accept the credentials.
	ErrAuth = errors.New("credentials are not accepted")
	// ErrDenied: the credentials are right but do not allow it.
	ErrDenied = errors.New("access denied")
	// ErrNoCredentials: none are configured, and the machine's role gives none.
	ErrNoCredentials = errors.New("no credentials")
	// ErrClock: the clocks of both sides differ too much for signatures.
	ErrClock = errors.New("clocks differ")
	// ErrNoBucket: there is no such bucket.
	ErrNoBucket = errors.New("bucket does not exist")
	// ErrRegion: the bucket or the service is in another region.
	ErrRegion = errors.New("wrong region")
	// ErrThrottled: the service asks for fewer requests.
	ErrThrottled = errors.New("throttled")
	// ErrNotS3: what answers does not speak S3.
	ErrNotS3 = errors.New("the answer is not one of S3")

	errNoUpload = errors.New("no such upload")
	errRange    = errors.New("range is not satisfiable")
	errCorrupt  = errors.New("content was damaged on its way") // may pass
	errExpired  = errors.New("temporary credentials have expired")
	errConflict = errors.New("another request is under way for the object") // may pass
)

// sentinels of the service's codes, https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
var sentinels = map[string]error{
	minio.NoSuchKey:                  blobstore.ErrNotFound,
	"NoSuchVersion":                  blobstore.ErrNotFound,
	minio.PreconditionFailed:         blobstore.ErrExists,
	minio.NoSuchBucket:               ErrNoBucket,
	minio.NoSuchUpload:               errNoUpload,
	"InvalidRange":                   errRange,
	"InvalidAccessKeyId":             ErrAuth,
	"SignatureDoesNotMatch":          ErrAuth,
	"InvalidToken":                   ErrAuth,
	"InvalidSecurity":                ErrAuth,
	"XAdminUserNotFound":             ErrAuth,
	"ExpiredToken":                   errExpired,
	"ExpiredTokenException":          errExpired,
	"TokenRefreshRequired":           errExpired,
	minio.AccessDenied:               ErrDenied,
	"AllAccessDisabled":              ErrDenied,
	"AccountProblem":                 ErrDenied,
	"RequestTimeTooSkewed":           ErrClock,
	"PermanentRedirect":              ErrRegion,
	"TemporaryRedirect":              ErrRegion,
	"IllegalLocationConstraint":      ErrRegion,
	minio.InvalidRegion:              ErrRegion,
	"IncorrectEndpoint":              ErrRegion,
	"SlowDown":                       ErrThrottled,
	"SlowDownRead":                   ErrThrottled,
	"SlowDownWrite":                  ErrThrottled,
	"Throttling":                     ErrThrottled,
	"ThrottlingException":            ErrThrottled,
	"RequestLimitExceeded":           ErrThrottled,
	"RequestThrottled":               ErrThrottled,
	"TooManyRequests":                ErrThrottled,
	"QuotaExceeded":                  blobstore.ErrNoSpace,
	"XMinioStorageFull":              blobstore.ErrNoSpace,
	"XMinioAdminBucketQuotaExceeded": blobstore.ErrNoSpace,
	"EntityTooLarge":                 blobstore.ErrInvalid,
	minio.InvalidBucketName:          blobstore.ErrInvalid,
	"KeyTooLongError":                blobstore.ErrInvalid,
	"BadDigest":                      errCorrupt,
	"XAmzContentSHA256Mismatch":      errCorrupt,
	"XAmzContentChecksumMismatch":    errCorrupt,
	"IncompleteBody":                 errCorrupt,
	"ConditionalRequestConflict":     errConflict,
	"OperationAborted":               errConflict,
}

// classify gives an error of a request its sentinel, and says whether the same
// request may succeed later.
func classify(err error, rec *record) (_ error, again bool) {
	var resp minio.ErrorResponse
	if !errors.As(err, &resp) || resp.StatusCode == 0 && resp.Code == "" {
		if rec.err != nil {
			err = rec.err // minio drops the type of some
		}
		return network(err, rec.answered)
	}
	sentinel := sentinels[resp.Code]
	switch {
	case sentinel != nil && !rec.page:
	case rec.page && resp.StatusCode < 500: // its code is minio's guess
		sentinel = ErrNotS3
	case resp.Code == "AuthorizationHeaderMalformed":
		// Of the things that may be wrong with it, the region is the one that
		// is configured.
		if sentinel = ErrAuth; resp.Region != "" || strings.Contains(strings.ToLower(resp.Message), "region") {
			sentinel = ErrRegion
		}
	case resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusServiceUnavailable:
		sentinel = ErrThrottled
	case resp.StatusCode == http.StatusConflict: // gateways to file systems have more names for it
		sentinel = errConflict
	case resp.StatusCode == http.StatusInsufficientStorage:
		sentinel = blobstore.ErrNoSpace
	case resp.StatusCode == http.StatusForbidden:
		sentinel = ErrDenied
	case resp.StatusCode == http.StatusMovedPermanently || resp.StatusCode == http.StatusTemporaryRedirect:
		sentinel = ErrRegion
	case resp.StatusCode == http.StatusRequestedRangeNotSatisfiable:
		sentinel = errRange
	case resp.StatusCode < 500 && strings.ContainsRune(resp.Code, ' '): // minio's name for what has none
		sentinel = ErrNotS3
	}
	isAny := func(errs ...error) bool { return slices.Contains(errs, sentinel) }
	again = isAny(ErrThrottled, errCorrupt, errExpired, errConflict) ||
		resp.StatusCode >= 500 && !isAny(blobstore.ErrNoSpace) ||
		resp.StatusCode == http.StatusRequestTimeout ||
		sentinel == nil && resp.StatusCode < 300 || // an error inside a 200
		resp.Code == "RequestTimeout" || resp.Code == "InternalError"
	what := resp.Code
	if resp.Message != "" && resp.Message != resp.Code {
		what += ": " + resp.Message
	}
	if resp.RequestID != "" {
		what += " (request " + resp.RequestID + ")"
	}
	if isAny(errCorrupt) {
		return fmt.Errorf("%w: %w: %s", blobstore.ErrChecksum, sentinel, what), again
	}
	if sentinel != nil {
		return fmt.Errorf("%w: %s", sentinel, what), again
	}
	return errors.New(what), again
}

// network classifies what went wrong below S3.
func network(err error, answered bool) (_ error, again bool) {
	wrap := func(sentinel error, again bool) (error, bool) { return fmt.Errorf("%w: %w", sentinel, err), again }
	if errors.Is(err, ErrNoCredentials) {
		return err, false
	}
	if d, ok := errors.AsType[*net.DNSError](err); ok {
		return wrap(ErrHostNotFound, d.IsTemporary || d.IsTimeout)
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		return wrap(ErrRefused, true)
	}
	if isTLS(err) {
		return wrap(ErrTLS, false)
	}
	if answered {
		return wrap(ErrNotS3, true) // perhaps cut short
	}
	return wrap(ErrUnreachable, true)
}

func isTLS(err error) bool {
	var (
		verify  *tls.CertificateVerificationError
		header  tls.RecordHeaderError
		alert   tls.AlertError
		unknown x509.UnknownAuthorityError
		host    x509.HostnameError
		invalid x509.CertificateInvalidError
	)
	return errors.As(err, &verify) || errors.As(err, &header) || errors.As(err, &alert) ||
		errors.As(err, &unknown) || errors.As(err, &host) || errors.As(err, &invalid) ||
		err != nil && strings.Contains(err.Error(), "server gave HTTP response to HTTPS client") // has no type
}

// do sends a request, again where that may help, and classifies its error.
func (c *call) do(ctx context.Context, request func(ctx context.Context) error) error {
	_, _, err := c.try(ctx, request)
	return err
}

// try is do; it also returns the record of the last attempt, and whether one
// before it may have had its effect.
func (c *call) try(ctx context.Context, request func(ctx context.Context) error) (rec *record, repeated bool, err error) {
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval, pause.MaxInterval = 100*time.Millisecond, 10*time.Second
	for n := 1; ; n++ {
		rec = &record{}
		err := request(context.WithValue(ctx, recordKey{}, rec))
		rec.sending.Wait() // whoever owns the content may use its memory again
		if err == nil {
			return rec, repeated, nil
		}
		if ctx.Err() != nil {
			return rec, repeated, c.ended(ctx)
		}
		err, again := classify(err, rec)
		if !again || n >= c.attempts {
			return rec, repeated, err
		}
		if errors.Is(err, errExpired) {
			c.s.creds.expire()
		}
		c.s.telemetry.retry(c, n, err)
		repeated = true
		select {
		case <-ctx.Done():
			return rec, repeated, c.ended(ctx)
		case <-time.After(max(pause.NextBackOff(), rec.retryAfter)):
		}
		if errors.Is(err, errExpired) {
			if err := c.s.creds.ensure(ctx); err != nil {
				return rec, repeated, err
			}
		}
	}
}
