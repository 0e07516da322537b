package memqueue_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/memqueue"
	"github.com/solstice-ci/solstice-go/queue/queuetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConformance(t *testing.T) {
	queuetest.Run(t, queuetest.Harness{New: func(queuetest.TB) queue.Queue { return memqueue.New() }})
}
