package image

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/sys/unix"
)

// maxRetryAfter bounds how long a server can have us wait between attempts.
const maxRetryAfter = time.Minute

// newClient returns one that uses no proxy.
func newClient(o Options) *http.Client {
	config := o.TLS.Clone()
	if config == nil {
		config = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	return &http.Client{
		Transport: &http.Transport{
			DialContext:            (&net.Dialer{Timeout: min(10*time.Second, o.StallTimeout)}).DialContext,
			TLSClientConfig:        config,
			TLSHandshakeTimeout:    o.StallTimeout,
			ResponseHeaderTimeout:  o.StallTimeout,
			IdleConnTimeout:        o.StallTimeout,
			DisableCompression:     true, // the hash is of what is stored there
			MaxResponseHeaderBytes: 64 << 10,
		},
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			if len(via) > o.MaxRedirects {
				return fmt.Errorf("%w: more than %d redirects", ErrSource, o.MaxRedirects)
			}
			if req.URL.Scheme != "http" && req.URL.Scheme != "https" {
				return fmt.Errorf("%w: redirected to a URL of scheme %s", ErrSource, req.URL.Scheme)
			}
			return nil
		},
	}
}

// origin says what a partial download is part of.
type origin struct {
	Source       string `json:"source"`
	ETag         string `json:"etag,omitempty"` // strong
	LastModified string `json:"last_modified,omitempty"`
	Total        int64  `json:"total,omitempty"` // bytes; 0: not known
}

// validator for If-Range; "" when the server gave none.
func (o origin) validator() string {
	if o.ETag != "" {
		return o.ETag
	}
	return o.LastModified
}

func (s *Store) origin(key string) (o origin) {
	if data, err := s.root.ReadFile(key + ".part.json"); err != nil || json.Unmarshal(data, &o) != nil {
		return origin{}
	}
	return o
}

// fetch is one download, into KEY.part.
type fetch struct {
	s         *Store
	key       string
	img       Image
	report    func(Progress)
	limit     int64 // bytes
	f         *os.File
	sum       hash.Hash // of what is in f
	have      int64     // bytes in f
	resumed   bool      // the bytes in f may be of different files
	resumable bool      // by a later call
	from      origin
}

// fetch makes KEY.part the file that the image is made of, whole, verified and
// durable. When it fails, KEY.part is what can be resumed, or is not there.
func (s *Store) fetch(ctx context.Context, key string, img Image, r *reporter) (err error) {
	if _, err := checkSource(img.Source, "/"); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	_ = s.root.Chmod(key+".part", 0o600) // it may have been finished
	d := &fetch{s: s, key: key, img: img, report: r.report, limit: s.limit(img), sum: sha256.New()}
	if img.compressed() { // what cannot be compressed becomes larger
		d.limit += d.limit/64 + 1<<20
	}
	if d.f, err = s.root.OpenFile(key+".part", os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.f.Close()) }()
	get := d.copy
	if _, ok := remote(img.Source); ok {
		get = d.download
	}
	if err = d.there(ctx); err == nil && !d.good() {
		err = get(ctx)
		if err == nil && !d.good() && d.resumed { // a mixture, perhaps, of what was there before and after a change
			if err = d.restart(); err == nil {
				err = get(ctx)
			}
		}
		if err == nil && !d.good() {
			err = fmt.Errorf("%w: what %s gives has %s, the catalogue says %s", ErrChecksum, shown(img.Source), sumText(d.sum.Sum(nil)), img.SHA256)
		}
	}
	switch {
	case err == nil:
		return d.f.Sync()
	case errors.Is(err, ErrSource), errors.Is(err, ErrTooLarge), errors.Is(err, ErrChecksum), d.have == 0, !d.resumable:
		return errors.Join(err, s.discard(key, ".part", ".part.json"))
	}
	return err
}

func (d *fetch) good() bool { return sumText(d.sum.Sum(nil)) == d.img.SHA256 }

// there takes up what an earlier download left.
func (d *fetch) there(ctx context.Context) error {
	info, err := d.f.Stat()
	if err != nil || info.Size() == 0 {
		return err
	}
	if info.Size() > d.limit {
		return d.restart()
	}
	d.from = d.s.origin(d.key)
	err = copyTo(ctx, d.sum, d.f, func(done int64) { d.report(Progress{Verifying, done, info.Size()}) })
	d.have, d.resumable = info.Size(), true
	return err
}

// restart begins from nothing.
func (d *fetch) restart() error {
	d.sum.Reset()
	d.have, d.resumed, d.from = 0, false, origin{}
	return d.f.Truncate(0)
}

// take appends to what is there.
func (d *fetch) take(p []byte) error {
	if d.have+int64(len(p)) > d.limit {
		return d.tooLarge()
	}
	n, err := d.f.WriteAt(p, d.have)
	_, _ = d.sum.Write(p[:n]) // never fails
	d.have += int64(n)
	d.report(Progress{Downloading, d.have, d.from.Total})
	return err
}

func (d *fetch) tooLarge() error {
	return fmt.Errorf("%w: what %s gives has more than %d bytes", ErrTooLarge, shown(d.img.Source), d.limit)
}

// expect is told how large all of it will be; 0 is not known.
func (d *fetch) expect(total int64) error {
	if total > d.limit {
		return d.tooLarge()
	}
	var st unix.Statfs_t
	if err := unix.Statfs(d.s.dir, &st); err == nil && total > d.have && uint64(total-d.have) > st.Bavail*uint64(st.Bsize) {
		return fmt.Errorf("%d more bytes are to come: %w", total-d.have, unix.ENOSPC)
	}
	return nil
}

// copy gets an image from a path.
func (d *fetch) copy(ctx context.Context) error {
	d.resumable = false
	if err := d.restart(); err != nil {
		return err
	}
	info, err := os.Stat(d.img.Source) // before it is opened, for which a pipe would wait
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a file", d.img.Source)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrSource, err)
	}
	in, err := os.Open(d.img.Source)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrSource, err)
	}
	defer func() { _ = in.Close() }() // only read from
	if err := d.expect(info.Size()); err != nil {
		return err
	}
	d.from.Total = info.Size()
	return copyTo(ctx, writerFunc(d.take), in, func(int64) {})
}

type writerFunc func([]byte) error

func (f writerFunc) Write(p []byte) (int, error) {
	if err := f(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// transient is a failure that trying again may cure.
type transient struct {
	err   error
	after time.Duration // what the server asks to wait
}

func (t *transient) Error() string { return t.err.Error() }
func (t *transient) Unwrap() error { return t.err }

// download gets an image from a URL, in as many attempts as it takes as long as
// they get on.
func (d *fetch) download(ctx context.Context) error {
	d.resumable = true
	pause := backoff.NewExponentialBackOff()
	pause.MaxInterval = 30 * time.Second
	for failed := 0; ; {
		before := d.have
		err := d.request(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		t, ok := errors.AsType[*transient](err)
		if !ok {
			return err
		}
		if d.have > before {
			failed = 0
			pause.Reset()
		}
		if failed++; failed >= d.s.o.Attempts {
			return fmt.Errorf("%s: %d attempts got no further: %w", shown(d.img.Source), failed, t.err)
		}
		wait := max(pause.NextBackOff(), t.after)
		d.s.o.Logger.WarnContext(ctx, "a download goes on after an error", "image", d.img.Label, "bytes", d.have, "in", wait, "err", t.err)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

var errStalled = errors.New("nothing came any more")

// request asks for what is missing, and takes what comes.
func (d *fetch) request(parent context.Context) error {
	ctx, cancel := context.WithCancelCause(parent)
	defer cancel(nil)
	stalled := time.AfterFunc(d.s.o.StallTimeout, func() { cancel(errStalled) })
	defer stalled.Stop()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, d.img.Source, nil)
	if err != nil {
		return fmt.Errorf("%w: the URL is wrong", ErrSource)
	}
	if d.have > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", d.have))
		if v := d.from.validator(); v != "" && d.from.Source == d.img.Source { // not of a mirror
			req.Header.Set("If-Range", v)
		}
	}
	resp, err := d.s.client.Do(req)
	if err != nil {
		return network(ctx, err)
	}
	defer func() { _ = resp.Body.Close() }() // only read from
	if err := d.answer(resp); err != nil {
		return err
	}
	buf := make([]byte, 256<<10)
	for {
		n, err := resp.Body.Read(buf)
		if n > 0 {
			stalled.Reset(d.s.o.StallTimeout)
			if err := d.take(buf[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return network(ctx, err)
		}
	}
}

// answer looks at what a server says before the bytes come.
func (d *fetch) answer(resp *http.Response) error {
	from := origin{Source: d.img.Source, Total: max(resp.ContentLength, 0), LastModified: resp.Header.Get("Last-Modified")}
	if tag := resp.Header.Get("ETag"); !strings.HasPrefix(tag, "W/") {
		from.ETag = tag
	}
	switch code := resp.StatusCode; {
	case code == http.StatusOK:
		if err := d.restart(); err != nil { // it gives all of it, or has changed
			return err
		}
	case code == http.StatusPartialContent:
		first, total, ok := contentRange(resp.Header.Get("Content-Range"))
		changed := d.from.Source == from.Source && (d.from.Total != 0 && total != 0 && d.from.Total != total || d.from.ETag != "" && d.from.ETag != from.ETag)
		if !ok || first != d.have || changed {
			if err := d.restart(); err != nil {
				return err
			}
			return &transient{err: errors.New("the server does not go on where it was asked to, or the file has changed")}
		}
		from.Total, d.resumed = total, true
	case code == http.StatusRequestedRangeNotSatisfiable && d.have > 0:
		if err := d.restart(); err != nil {
			return err
		}
		return &transient{err: errors.New("the file has become shorter")}
	case code == http.StatusRequestTimeout, code == http.StatusTooEarly, code == http.StatusTooManyRequests, code >= 500:
		return &transient{fmt.Errorf("the server says %s", resp.Status), retryAfter(resp.Header.Get("Retry-After"))}
	default:
		return fmt.Errorf("%w: %s: the server says %s", ErrSource, shown(d.img.Source), resp.Status)
	}
	if err := d.expect(from.Total); err != nil {
		return err
	}
	if from == d.from {
		return nil
	}
	d.from = from
	return d.s.writeJSON(d.key+".part.json", from)
}

// network says whether trying again may cure a failure of the client's, without
// the URL, which the caller knows.
func network(ctx context.Context, err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err
	}
	if errors.Is(context.Cause(ctx), errStalled) {
		err = errStalled
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok || errors.Is(err, ErrSource) {
		return err
	}
	return &transient{err: err}
}

// contentRange reads "bytes FIRST-LAST/TOTAL" (RFC 9110, 14.4); a total of "*"
// is 0.
func contentRange(s string) (first, total int64, ok bool) {
	span, size, ok := strings.Cut(strings.TrimPrefix(s, "bytes "), "/")
	begin, _, dash := strings.Cut(span, "-")
	first, err := strconv.ParseInt(begin, 10, 64)
	if size != "*" && err == nil {
		total, err = strconv.ParseInt(size, 10, 64)
	}
	return first, total, ok && dash && err == nil && strings.HasPrefix(s, "bytes ")
}

// retryAfter is what a server asks to wait (RFC 9110, 10.2.3), within reason.
func retryAfter(s string) time.Duration {
	if n, err := strconv.ParseUint(s, 10, 16); err == nil {
		return min(time.Duration(n)*time.Second, maxRetryAfter)
	}
	if t, err := http.ParseTime(s); err == nil {
		return min(max(time.Until(t), 0), maxRetryAfter)
	}
	return 0
}
