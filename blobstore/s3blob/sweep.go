package s3blob

import (
	"context"
	"errors"
	"time"

	"github.com/minio/minio-go/v7"
)

// Sweep implements blobstore.Sweeper: it aborts multipart uploads that began
// more than minAge ago, by the service's clock. Those that other programs made
// in the bucket, by names this package does not give, are left alone.
func (s *Store) Sweep(ctx context.Context, minAge time.Duration) (removed int, err error) {
	c, err := s.begin(ctx, "sweep", s.o.Prefix)
	if err != nil {
		return 0, err
	}
	removed, err = c.sweep(minAge)
	err = c.failed(err)
	c.end(err)
	return removed, err
}

func (c *call) sweep(minAge time.Duration) (removed int, err error) {
	s := c.s
	keyMarker, uploadMarker := "", ""
	for {
		var page minio.ListMultipartUploadsResult
		rec, _, err := c.try(c.ctx, func(ctx context.Context) (err error) {
			page, err = s.s3.ListMultipartUploads(ctx, s.o.Bucket, s.o.Prefix, keyMarker, uploadMarker, "", pageSize)
			return err
		})
		if err != nil {
			return removed, err
		}
		now := time.Now()
		if !rec.date.IsZero() {
			now = rec.date.Add(time.Second) // it is in whole seconds
		}
		for _, u := range page.Uploads {
			if _, ours := s.key(u.Key); !ours || now.Sub(u.Initiated) < minAge {
				continue
			}
			err := c.do(c.ctx, func(ctx context.Context) error {
				return s.s3.AbortMultipartUpload(ctx, s.o.Bucket, u.Key, u.UploadID)
			})
			switch {
			case err == nil:
				removed++
			case !errors.Is(err, errNoUpload): // ended meanwhile
				return removed, err
			}
		}
		if !page.IsTruncated || page.NextKeyMarker == keyMarker && page.NextUploadIDMarker == uploadMarker {
			return removed, nil
		}
		keyMarker, uploadMarker = page.NextKeyMarker, page.NextUploadIDMarker
	}
}
