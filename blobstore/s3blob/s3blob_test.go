package s3blob

import (
	"fmt"
	"testing"

	"github.com/minio/minio-go/v7"
	"go.uber.org/goleak"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/blobstore/blobstoretest"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

func TestMain(m *testing.M) {
	// The server that the tests share is waited for beyond their end.
	const testenv = "github.com/solstice-ci/solstice-go/internal/testenv."
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction(testenv+"spawn.func1"), goleak.IgnoreAnyFunction(testenv+"supervise.func1"))
}

func optionsFor(b testenv.S3Bucket) Options {
	return Options{Endpoint: b.Endpoint, Bucket: b.Bucket, Region: b.Region, AccessKey: b.AccessKey, SecretKey: b.SecretKey}
}

func open(tb testing.TB, o Options) *Store {
	tb.Helper()
	s, err := Open(tb.Context(), o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { s.Close() })
	return s
}

// uploads lists what is unfinished in a store's bucket.
func uploads(tb testing.TB, s *Store) (left []string) {
	tb.Helper()
	page, err := s.s3.ListMultipartUploads(tb.Context(), s.o.Bucket, "", "", "", "", 1000)
	if err != nil {
		tb.Fatal(err)
	}
	for _, u := range page.Uploads {
		left = append(left, fmt.Sprintf("upload %s of %s", u.UploadID, u.Key))
	}
	return left
}

func harness(change func(*Options)) blobstoretest.Harness {
	again := func(tb testing.TB, s blobstore.Store) blobstore.Store { return open(tb, s.(*Store).o) }
	return blobstoretest.Harness{
		Open: func(tb testing.TB) blobstore.Store {
			o := optionsFor(testenv.S3(tb))
			change(&o)
			return open(tb, o)
		},
		Reopen: func(tb testing.TB, s blobstore.Store) blobstore.Store {
			if err := s.Close(); err != nil {
				tb.Fatal(err)
			}
			return again(tb, s)
		},
		Second:    again,
		Leftovers: func(tb testing.TB, s blobstore.Store) []string { return uploads(tb, s.(*Store)) },
		Abandon: func(tb testing.TB, s blobstore.Store) {
			if _, err := s.(*Store).s3.NewMultipartUpload(tb.Context(), s.(*Store).o.Bucket, s.(*Store).name("abandoned"), minio.PutObjectOptions{}); err != nil {
				tb.Fatal(err)
			}
		},
	}
}

func TestConformance(t *testing.T) {
	blobstoretest.Run(t, harness(func(*Options) {}))
}

// In a part of a bucket, with pages and parts so small that there are many.
func TestConformanceSmall(t *testing.T) {
	defer func(n int) { pageSize = n }(pageSize)
	pageSize = 7
	blobstoretest.Run(t, harness(func(o *Options) { o.Prefix, o.PartSize, o.VerifyReads = "some/prefix", minPart, true }))
}
