package s3blob

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

// BenchmarkPutGet measures a Put and a Get beside the same through a bare
// minio-go client with its defaults, by turns in one run and on one server.
// x/minio-go is the ratio of their rates, put/ and get/ those of each half.
func BenchmarkPutGet(b *testing.B) {
	for _, size := range []int{1 << 10, 1 << 20, 256 << 20} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			bucket := testenv.S3(b)
			s := open(b, optionsFor(bucket))
			transport, err := minio.DefaultTransport(false)
			if err != nil {
				b.Fatal(err)
			}
			defer transport.CloseIdleConnections()
			bare, err := minio.New(bucket.Endpoint[len("http://"):], &minio.Options{
				Creds:  credentials.NewStaticV4(bucket.AccessKey, bucket.SecretKey, ""),
				Region: bucket.Region, Transport: http.RoundTripper(transport),
			})
			if err != nil {
				b.Fatal(err)
			}
			data := bytes.Repeat([]byte("0123456789abcdef"), size/16)
			ctx := context.Background()
			ours := [2]func() error{
				func() error {
					_, err := s.Put(ctx, "ours/k", bytes.NewReader(data), blobstore.PutOptions{Size: int64(size)})
					return err
				},
				func() error {
					r, _, err := s.Get(ctx, "ours/k", blobstore.GetOptions{})
					return drain(r, err, size)
				},
			}
			theirs := [2]func() error{
				func() error {
					_, err := bare.PutObject(ctx, bucket.Bucket, "bare/k", bytes.NewReader(data), int64(size), minio.PutObjectOptions{})
					return err
				},
				func() error {
					r, err := bare.GetObject(ctx, bucket.Bucket, "bare/k", minio.GetObjectOptions{})
					return drain(r, err, size)
				},
			}
			var took [2][2]time.Duration
			b.SetBytes(2 * int64(size))
			for i := 0; b.Loop(); i++ {
				for half := range 2 {
					for turn := range 2 { // who goes first changes
						who := (turn + i) % 2
						f := [2][2]func() error{ours, theirs}[who][half]
						start := time.Now()
						if err := f(); err != nil {
							b.Fatal(err)
						}
						took[who][half] += time.Since(start)
					}
				}
			}
			ratio := func(ours, theirs time.Duration) float64 { return float64(theirs) / float64(ours) }
			b.ReportMetric(ratio(took[0][0], took[1][0]), "put/minio-go")
			b.ReportMetric(ratio(took[0][1], took[1][1]), "get/minio-go")
			b.ReportMetric(ratio(took[0][0]+took[0][1], took[1][0]+took[1][1]), "x/minio-go")
		})
	}
}

func drain(r io.ReadCloser, err error, size int) error {
	if err != nil {
		return err
	}
	defer r.Close()
	n, err := io.Copy(io.Discard, r)
	if err == nil && n != int64(size) {
		err = fmt.Errorf("%d bytes, want %d", n, size)
	}
	return err
}
