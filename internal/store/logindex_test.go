package store

import (
	"context"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/blobstore/memblob"
	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logstream/bloblog"
	"github.com/solstice-ci/solstice-go/solstice/logstream/logstreamtest"
)

// indexed is a log store that remembers what it is made of, to make another.
type indexed struct {
	*bloblog.Store
	blobs blobstore.Store
	index bloblog.Index
}

// TestLogIndex runs the log conformance suite on bloblog with the index in the
// database: what an engine uses.
func TestLogIndex(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		db, err := sqldb.Open(t.Context(), url, sqldb.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = db.Close() })
		if err := Migrate(t.Context(), db); err != nil {
			t.Fatal(err)
		}
		open := func(tb testing.TB, blobs blobstore.Store, index bloblog.Index) logstream.Store {
			s, err := bloblog.New(blobs, index, bloblog.Options{Poll: 5 * time.Millisecond})
			if err != nil {
				tb.Fatal(err)
			}
			return &indexed{s, blobs, index}
		}
		logstreamtest.Run(t, logstreamtest.Harness{
			Open: func(tb testing.TB) logstream.Store {
				// The checks are about one store each, and reuse names.
				ctx := context.WithoutCancel(tb.Context())
				for _, table := range []string{"log_entries", "log_streams"} {
					if _, err := db.NewDelete().Table(table).Where("true").Exec(ctx); err != nil {
						tb.Fatal(err)
					}
				}
				return open(tb, memblob.New(), logIndex{db})
			},
			Reopen: func(tb testing.TB, s logstream.Store) logstream.Store {
				if err := s.Close(); err != nil {
					tb.Fatal(err)
				}
				old := s.(*indexed)
				return open(tb, old.blobs, old.index)
			},
			Second: func(tb testing.TB, s logstream.Store) logstream.Store {
				old := s.(*indexed)
				return open(tb, old.blobs, old.index)
			},
			MemoryStored: true,
		})
	})
}
