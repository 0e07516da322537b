// Package memblob keeps blobs in memory: for tests, simulations and programs
// that need no durability. Nothing survives Close.
package memblob

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/blobstore"
)

// Store is a blobstore.Store in memory. Make one with New.
type Store struct {
	mu      sync.RWMutex
	objects map[string]object
	closed  bool
}

type object struct {
	info blobstore.Info
	data []byte // never changed once stored, so that readers need no lock
}

// New returns an empty store.
func New() *Store { return &Store{objects: map[string]object{}} }

var _ blobstore.Store = (*Store)(nil)

// Capabilities implements blobstore.Store.
func (s *Store) Capabilities() blobstore.Capabilities {
	return blobstore.Capabilities{ContentType: true}
}

// Close drops everything.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.objects, s.closed = nil, true
	return nil
}

// Put implements blobstore.Store.
func (s *Store) Put(ctx context.Context, key string, r io.Reader, o blobstore.PutOptions) (blobstore.Info, error) {
	if err := blobstore.ValidateKey(key); err != nil {
		return blobstore.Info{}, err
	}
	if err := o.Validate(); err != nil {
		return blobstore.Info{}, err
	}
	if _, err := s.lookup(ctx, key); err == nil && o.IfAbsent {
		return blobstore.Info{}, fmt.Errorf("%w: %s", blobstore.ErrExists, key) // before reading for nothing
	}
	if o.Size > 0 { // one byte more shows a reader that gives too much
		r = io.LimitReader(r, o.Size+1)
	}
	data, err := io.ReadAll(ctxReader{ctx, r})
	if err != nil {
		return blobstore.Info{}, fmt.Errorf("memblob: put %s: %w", key, err)
	}
	if o.Size > 0 && int64(len(data)) != o.Size {
		return blobstore.Info{}, fmt.Errorf("%w: %s: not the %d bytes announced", blobstore.ErrChecksum, key, o.Size)
	}
	if sum := sha256.Sum256(data); o.SHA256 != nil && !bytes.Equal(sum[:], o.SHA256) {
		return blobstore.Info{}, fmt.Errorf("%w: %s: SHA-256 is %x", blobstore.ErrChecksum, key, sum)
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	switch _, exists := s.objects[key]; {
	case s.closed:
		return blobstore.Info{}, blobstore.ErrClosed
	case ctx.Err() != nil:
		return blobstore.Info{}, ctx.Err()
	case exists && o.IfAbsent:
		return blobstore.Info{}, fmt.Errorf("%w: %s", blobstore.ErrExists, key)
	}
	info := blobstore.Info{Key: key, Size: int64(len(data)), ModTime: time.Now(), ContentType: o.ContentType}
	s.objects[key] = object{info, data}
	return info, nil
}

func (s *Store) lookup(ctx context.Context, key string) (object, error) {
	if err := blobstore.ValidateKey(key); err != nil {
		return object{}, err
	}
	if err := ctx.Err(); err != nil {
		return object{}, err
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return object{}, blobstore.ErrClosed
	}
	obj, ok := s.objects[key]
	if !ok {
		return object{}, fmt.Errorf("%w: %s", blobstore.ErrNotFound, key)
	}
	return obj, nil
}

// Get implements blobstore.Store.
func (s *Store) Get(ctx context.Context, key string, o blobstore.GetOptions) (io.ReadCloser, blobstore.Info, error) {
	obj, err := s.lookup(ctx, key)
	if err != nil {
		return nil, blobstore.Info{}, err
	}
	n, err := o.Range(obj.info.Size)
	if err != nil {
		return nil, blobstore.Info{}, fmt.Errorf("%s: %w", key, err)
	}
	return io.NopCloser(ctxReader{ctx, bytes.NewReader(obj.data[o.Offset : o.Offset+n])}), obj.info, nil
}

// Stat implements blobstore.Store.
func (s *Store) Stat(ctx context.Context, key string) (blobstore.Info, error) {
	obj, err := s.lookup(ctx, key)
	return obj.info, err
}

// Delete implements blobstore.Store.
func (s *Store) Delete(ctx context.Context, key string, _ blobstore.DeleteOptions) error {
	if err := blobstore.ValidateKey(key); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return blobstore.ErrClosed
	}
	delete(s.objects, key)
	return nil
}

// List implements blobstore.Store. It sees the store as it was at the start.
func (s *Store) List(ctx context.Context, o blobstore.ListOptions) iter.Seq2[blobstore.Info, error] {
	return func(yield func(blobstore.Info, error) bool) {
		var infos []blobstore.Info
		s.mu.RLock()
		closed := s.closed
		for key, obj := range s.objects {
			if strings.HasPrefix(key, o.Prefix) && key > o.After {
				infos = append(infos, obj.info)
			}
		}
		s.mu.RUnlock()
		if closed {
			yield(blobstore.Info{}, blobstore.ErrClosed)
			return
		}
		slices.SortFunc(infos, func(a, b blobstore.Info) int { return strings.Compare(a.Key, b.Key) })
		for _, info := range infos {
			if err := ctx.Err(); err != nil {
				yield(blobstore.Info{}, err)
				return
			}
			if !yield(info, nil) {
				return
			}
		}
		if err := ctx.Err(); err != nil {
			yield(blobstore.Info{}, err)
		}
	}
}

type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
