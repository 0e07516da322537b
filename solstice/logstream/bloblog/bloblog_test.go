package bloblog

import (
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/blobstore/fsblob"
	"github.com/solstice-ci/solstice-go/blobstore/memblob"
	"github.com/solstice-ci/solstice-go/blobstore/s3blob"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logstream/logstreamtest"
)

func TestMain(m *testing.M) {
	// The server that the tests share is waited for beyond their end.
	const testenv = "github.com/solstice-ci/solstice-go/internal/testenv."
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction(testenv+"spawn.func1"), goleak.IgnoreAnyFunction(testenv+"supervise.func1"))
}

func open(tb testing.TB, blobs blobstore.Store, index Index, o Options) *Store {
	tb.Helper()
	s, err := New(blobs, index, o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { s.Close() })
	return s
}

// silent hides MemIndex's Watch, so that followers have to poll.
type silent struct{ Index }

func harness(o Options, blobs func(testing.TB) blobstore.Store, index func() Index) logstreamtest.Harness {
	again := func(tb testing.TB, s logstream.Store) logstream.Store {
		return open(tb, s.(*Store).blobs, s.(*Store).index, o)
	}
	return logstreamtest.Harness{
		Open: func(tb testing.TB) logstream.Store { return open(tb, blobs(tb), index(), o) },
		Reopen: func(tb testing.TB, s logstream.Store) logstream.Store {
			if err := s.Close(); err != nil {
				tb.Fatal(err)
			}
			return again(tb, s)
		},
		Second: again,
	}
}

func mem(testing.TB) blobstore.Store { return memblob.New() }

func files(tb testing.TB) blobstore.Store {
	s, err := fsblob.Open(tb.TempDir(), fsblob.Options{NoSync: true})
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

func bucket(tb testing.TB) blobstore.Store {
	b := testenv.S3(tb)
	s, err := s3blob.Open(tb.Context(), s3blob.Options{
		Endpoint: b.Endpoint, Bucket: b.Bucket, Region: b.Region, AccessKey: b.AccessKey, SecretKey: b.SecretKey,
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { s.Close() })
	return s
}

func memIndex() Index { return &MemIndex{} }

func TestConformanceMemory(t *testing.T) {
	h := harness(Options{}, mem, memIndex)
	h.MemoryStored = true
	logstreamtest.Run(t, h)
}

func TestConformanceFiles(t *testing.T) {
	logstreamtest.Run(t, harness(Options{Linger: -1}, files, memIndex))
}

// Without compaction, whose object is held in parts while it travels: more than
// the suite grants a reader. TestCompactInBucket does that.
func TestConformanceBucket(t *testing.T) {
	logstreamtest.Run(t, harness(Options{NoCompaction: true, Linger: -1}, bucket, memIndex))
}

// Without a Watcher, in chunks of a few bytes.
func TestConformancePolling(t *testing.T) {
	h := harness(Options{Linger: -1, ChunkBytes: 7, Poll: 5 * time.Millisecond}, mem, func() Index { return silent{&MemIndex{}} })
	h.MemoryStored = true
	logstreamtest.Run(t, h)
}

func TestConformanceUncompacted(t *testing.T) {
	h := harness(Options{NoCompaction: true, Linger: -1}, mem, memIndex)
	h.MemoryStored = true
	logstreamtest.Run(t, h)
}
