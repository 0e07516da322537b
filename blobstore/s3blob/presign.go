package s3blob

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/solstice-ci/solstice-go/blobstore"
)

// maxExpires is what signatures of version 4 allow.
const maxExpires = 7 * 24 * time.Hour

// PresignGet implements blobstore.Presigner. Expires is one second to seven
// days, in whole seconds. A URL also ends with the credentials it was signed
// with, where they are temporary.
func (s *Store) PresignGet(ctx context.Context, key string, expires time.Duration) (string, error) {
	return s.sign(ctx, http.MethodGet, key, expires)
}

// PresignPut implements blobstore.Presigner; see PresignGet. What is uploaded
// through the URL is neither verified nor kept from overwriting the object.
func (s *Store) PresignPut(ctx context.Context, key string, expires time.Duration) (string, error) {
	return s.sign(ctx, http.MethodPut, key, expires)
}

func (s *Store) sign(ctx context.Context, method, key string, expires time.Duration) (string, error) {
	if err := blobstore.ValidateKey(key); err != nil {
		return "", err
	}
	if expires < time.Second || expires > maxExpires {
		return "", fmt.Errorf("s3blob: %w: a URL for %s; one second to seven days are possible", blobstore.ErrInvalid, expires)
	}
	c, err := s.begin(ctx, "presign", key)
	if err != nil {
		return "", err
	}
	u, err := s.presign.Presign(c.ctx, method, s.o.Bucket, s.name(key), expires, nil)
	err = c.failed(err)
	c.end(err)
	if err != nil {
		return "", err
	}
	return u.String(), nil
}
