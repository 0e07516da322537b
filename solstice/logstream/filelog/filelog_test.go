package filelog

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logstream/logstreamtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func openStore(tb testing.TB, dir string, o Options) *Store {
	tb.Helper()
	s, err := Open(dir, o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { s.Close() })
	return s
}

func harness(o Options) logstreamtest.Harness {
	return logstreamtest.Harness{
		Open: func(tb testing.TB) logstream.Store { return openStore(tb, tb.TempDir(), o) },
		Reopen: func(tb testing.TB, s logstream.Store) logstream.Store {
			if err := s.Close(); err != nil {
				tb.Fatal(err)
			}
			return openStore(tb, s.(*Store).root.Name(), o)
		},
	}
}

func TestConformance(t *testing.T) { logstreamtest.Run(t, harness(Options{})) }

// With tiny bounds checkpoints run all the time and files are opened and
// closed for every append.
func TestConformanceTiny(t *testing.T) {
	logstreamtest.Run(t, harness(Options{JournalBytes: 1, MaxOpenStreams: 1, NoSync: true}))
}
