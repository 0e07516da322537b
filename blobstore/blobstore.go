// Package blobstore stores immutable objects under slash-separated keys: log
// segments, and later artifacts and caches.
//
// The interface is what a driver implements. Drivers: blobstore/memblob,
// blobstore/fsblob (a directory), blobstore/s3blob (S3 and compatible).
// blobstore/blobstoretest is the conformance suite that a driver has to pass.
package blobstore

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
	"time"
	"unicode/utf8"
)

// Errors that callers act on; drivers wrap them, callers use errors.Is.
var (
	ErrNotFound   = errors.New("blobstore: not found")
	ErrExists     = errors.New("blobstore: already exists")
	ErrInvalid    = errors.New("blobstore: invalid argument")
	ErrChecksum   = errors.New("blobstore: content does not match its checksum or size")
	ErrClosed     = errors.New("blobstore: closed")
	ErrOutOfRange = errors.New("blobstore: range begins beyond the end of the object")
	// ErrNoSpace: the store is full (as far as a driver can tell).
	ErrNoSpace = errors.New("blobstore: no space left")
)

// Info describes an object.
type Info struct {
	Key         string
	Size        int64 // of the whole object, in bytes, also where a range was asked for
	ModTime     time.Time
	ContentType string // where Capabilities.ContentType; List may leave it empty
}

// PutOptions qualifies a Put; the zero value overwrites and verifies nothing.
type PutOptions struct {
	// ContentType is at most MaxContentTypeBytes of printable ASCII.
	ContentType string
	// IfAbsent refuses to overwrite: Put wraps ErrExists.
	IfAbsent bool
	// Size, when not zero, is how many bytes the reader must give; another
	// count wraps ErrChecksum and leaves nothing.
	Size int64
	// SHA256, when not nil, is what the content must hash to; anything else
	// wraps ErrChecksum and leaves nothing.
	SHA256 []byte
}

// Validate checks the options alone; drivers call it before anything else.
func (o PutOptions) Validate() error {
	switch {
	case len(o.ContentType) > MaxContentTypeBytes:
		return fmt.Errorf("%w: content type of %d bytes, at most %d are allowed", ErrInvalid, len(o.ContentType), MaxContentTypeBytes)
	case strings.ContainsFunc(o.ContentType, func(r rune) bool { return r < 0x20 || r > 0x7e }):
		return fmt.Errorf("%w: content type %q is not printable ASCII", ErrInvalid, o.ContentType)
	case o.Size < 0:
		return fmt.Errorf("%w: size %d", ErrInvalid, o.Size)
	case o.SHA256 != nil && len(o.SHA256) != sha256.Size:
		return fmt.Errorf("%w: SHA-256 of %d bytes", ErrInvalid, len(o.SHA256))
	}
	return nil
}

// GetOptions selects a range: Length bytes from Offset, or to the end when
// Length is 0. A range that reaches beyond the end is cut there.
type GetOptions struct {
	Offset int64
	Length int64
}

// Range returns how many bytes of an object of the given size are asked for,
// or an error that wraps ErrInvalid or ErrOutOfRange.
func (o GetOptions) Range(size int64) (length int64, err error) {
	switch {
	case o.Offset < 0 || o.Length < 0:
		return 0, fmt.Errorf("%w: range of %d bytes from %d", ErrInvalid, o.Length, o.Offset)
	case o.Offset > size:
		return 0, fmt.Errorf("%w: %d of %d bytes", ErrOutOfRange, o.Offset, size)
	case o.Length == 0:
		return size - o.Offset, nil
	}
	return min(o.Length, size-o.Offset), nil
}

// DeleteOptions has no fields yet; its zero value is the default.
type DeleteOptions struct{}

// ListOptions selects keys.
type ListOptions struct {
	Prefix string // of the key, not only whole path elements
	After  string // keys strictly greater; resumes a listing
}

// Capabilities are what a driver does more or less well.
type Capabilities struct {
	Durable     bool // what Put returned survives the machine
	ContentType bool // content types are kept
	MultiWriter bool // IfAbsent holds between processes
}

// Store is implemented by drivers; all methods are safe for concurrent use and
// honour ctx. Keys obey [ValidateKey].
type Store interface {
	// Put stores an object atomically: readers see the old or the new content,
	// and a failed read from r or a cancelled ctx leaves nothing behind. Of
	// concurrent Puts to one key one wins whole. A Read of r that blocks is the
	// caller's to end; ctx is looked at between reads.
	Put(ctx context.Context, key string, r io.Reader, o PutOptions) (Info, error)
	// Get opens an object; absent wraps ErrNotFound, an Offset beyond the size
	// (equal gives an empty reader) wraps ErrOutOfRange. The caller closes the
	// reader; ctx ends it.
	Get(ctx context.Context, key string, o GetOptions) (io.ReadCloser, Info, error)
	// Stat describes an object; absent wraps ErrNotFound.
	Stat(ctx context.Context, key string) (Info, error)
	// Delete removes an object; absent is no error.
	Delete(ctx context.Context, key string, o DeleteOptions) error
	// List yields objects in ascending byte order of their keys. An error
	// comes with the last pair; breaking out releases everything. Objects put
	// or deleted meanwhile may or may not be seen.
	List(ctx context.Context, o ListOptions) iter.Seq2[Info, error]
	// Capabilities are fixed for the life of the store.
	Capabilities() Capabilities
	// Close releases the store; later calls wrap ErrClosed.
	Close() error
}

// Presigner is implemented by drivers that can hand out URLs; get it with [As].
type Presigner interface {
	// PresignGet and PresignPut return a URL that reads or writes the object
	// without further credentials until it expires.
	PresignGet(ctx context.Context, key string, expires time.Duration) (string, error)
	PresignPut(ctx context.Context, key string, expires time.Duration) (string, error)
}

// Sweeper is implemented by drivers in which a Put can leave something behind
// that takes up room when its process dies; get it with [As].
type Sweeper interface {
	// Sweep removes what Puts began more than minAge ago and never ended, of
	// whichever process. A Put that takes longer than minAge may fail by it.
	Sweep(ctx context.Context, minAge time.Duration) (removed int, err error)
}

// Checker is implemented by drivers that can tell more of whether the store can
// be used than the answer about an object does; get it with [As].
type Checker interface {
	Check(ctx context.Context) error
}

// As returns s as the optional interface T. A wrapper answers for what it
// wraps through a method As(target any) bool, which gets a *T to fill in.
func As[T any](s Store) (T, bool) {
	if w, ok := s.(interface{ As(target any) bool }); ok {
		var t T
		return t, w.As(&t)
	}
	t, ok := s.(T)
	return t, ok
}

// MaxContentTypeBytes is the longest content type every driver accepts.
const MaxContentTypeBytes = 255

// MaxKeyBytes is the longest key every driver accepts.
const MaxKeyBytes = 512

// ValidateKey checks a key: UTF-8, 1 to MaxKeyBytes bytes, slash-separated
// elements of 1 to 200 bytes, none of them "." or "..", no control characters,
// no backslash. Drivers call it before anything else.
func ValidateKey(key string) error {
	bad := func(why string) error { return fmt.Errorf("%w: key %q: %s", ErrInvalid, key, why) }
	switch {
	case key == "":
		return bad("empty")
	case len(key) > MaxKeyBytes:
		return bad(fmt.Sprintf("%d bytes, at most %d are allowed", len(key), MaxKeyBytes))
	case !utf8.ValidString(key):
		return bad("not UTF-8")
	case strings.ContainsFunc(key, func(r rune) bool { return r < 0x20 || r == 0x7f || r == '\\' }):
		return bad("has a control character or a backslash")
	}
	for elem := range strings.SplitSeq(key, "/") {
		switch {
		case elem == "" || elem == "." || elem == "..":
			return bad(fmt.Sprintf("has the path element %q", elem))
		case len(elem) > 200:
			return bad("has a path element of more than 200 bytes")
		}
	}
	return nil
}
