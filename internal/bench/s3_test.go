package bench

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/blobstore/s3blob"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

const partSize = 16 << 20

// BenchmarkS3: one object after the other, put and then read to its end, through
// s3blob and through minio-go with the same part size and as many parts at once.
// What is put is in memory, or where the name says so in a file.
func BenchmarkS3(b *testing.B) {
	at := testenv.S3(b)
	store, err := s3blob.Open(b.Context(), s3blob.Options{
		Endpoint: at.Endpoint, Region: at.Region, Bucket: at.Bucket, AccessKey: at.AccessKey, SecretKey: at.SecretKey,
		PartSize: partSize, Parallel: 4,
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = store.Close() })
	endpoint, err := url.Parse(at.Endpoint)
	if err != nil {
		b.Fatal(err)
	}
	client, err := minio.New(endpoint.Host, &minio.Options{
		Creds: credentials.NewStaticV4(at.AccessKey, at.SecretKey, ""), Region: at.Region, BucketLookup: minio.BucketLookupPath,
	})
	if err != nil {
		b.Fatal(err)
	}
	for _, c := range []struct {
		name     string
		size     int
		perRound int
		file     bool
	}{{"1KiB", 1 << 10, 256, false}, {"1MiB", 1 << 20, 64, false}, {"256MiB", 256 << 20, 1, false}, {"256MiB-file", 256 << 20, 1, true}} {
		if c.size > 16<<20 && testing.Short() {
			continue
		}
		content := make([]byte, c.size)
		_, _ = rand.Read(content)
		times := func(n int, f func(key string) error) error {
			for i := range n {
				if err := f(fmt.Sprintf("%s/%d", c.name, i)); err != nil {
					return err
				}
			}
			return nil
		}
		size := int64(c.size)
		with := func(f func(io.Reader) error) error { return f(bytes.NewReader(content)) }
		if c.file {
			name := filepath.Join(b.TempDir(), "content")
			if err := os.WriteFile(name, content, 0o600); err != nil {
				b.Fatal(err)
			}
			with = func(f func(io.Reader) error) error {
				r, err := os.Open(name)
				if err != nil {
					return err
				}
				defer r.Close()
				return f(r)
			}
		}
		ours := func(key string) error {
			return with(func(r io.Reader) error {
				_, err := store.Put(context.Background(), "ours/"+key, r, blobstore.PutOptions{Size: size})
				return err
			})
		}
		bare := func(key string) error {
			return with(func(r io.Reader) error {
				_, err := client.PutObject(context.Background(), at.Bucket, "bare/"+key, r, size,
					minio.PutObjectOptions{PartSize: partSize, NumThreads: 4})
				return err
			})
		}
		stored := sync.OnceValue(func() error {
			return errors.Join(times(c.perRound, ours), times(c.perRound, bare))
		})
		b.Run("put/"+c.name, func(b *testing.B) {
			compare(b, c.perRound, contender{name: "s3blob", run: func(n int) error { return times(n, ours) }},
				contender{name: "bare", run: func(n int) error { return times(n, bare) }})
		})
		b.Run("get/"+c.name, func(b *testing.B) {
			if err := stored(); err != nil {
				b.Fatal(err)
			}
			compare(b, c.perRound, contender{name: "s3blob", run: func(n int) error {
				return times(n, func(key string) error {
					r, _, err := store.Get(context.Background(), "ours/"+key, blobstore.GetOptions{})
					if err != nil {
						return err
					}
					return discard(r, size)
				})
			}}, contender{name: "bare", run: func(n int) error {
				return times(n, func(key string) error {
					r, err := client.GetObject(context.Background(), at.Bucket, "bare/"+key, minio.GetObjectOptions{})
					if err != nil {
						return err
					}
					return discard(r, size)
				})
			}})
		})
	}
}

// discard reads r to its end, and closes it.
func discard(r io.ReadCloser, size int64) error {
	n, err := io.Copy(io.Discard, r)
	if err == nil && n != size {
		err = fmt.Errorf("%d bytes, want %d", n, size)
	}
	if cerr := r.Close(); err == nil {
		err = cerr
	}
	return err
}
