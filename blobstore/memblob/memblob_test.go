package memblob_test

import (
	"testing"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/blobstore/blobstoretest"
	"github.com/solstice-ci/solstice-go/blobstore/memblob"
)

func TestConformance(t *testing.T) {
	blobstoretest.Run(t, blobstoretest.Harness{
		Open: func(testing.TB) blobstore.Store { return memblob.New() },
	})
}
