package agent_test

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
)

// heapWatch samples the heap with every so many events, the server's included.
type heapWatch struct {
	n    int
	most atomic.Uint64
}

func (h *heapWatch) sample(*session, *agentv1.Event) {
	if h.n++; h.n%64 != 0 {
		return
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	h.most.Store(max(h.most.Load(), m.HeapAlloc))
}

func (h *heapWatch) check(t *testing.T) {
	t.Helper()
	const bound = 64 << 20
	switch most := h.most.Load(); {
	case most == 0:
		t.Error("the heap was never measured")
	case most > bound:
		t.Errorf("heap grew to %d MiB", most>>20)
	default:
		t.Logf("heap at most %d MiB", most>>20)
	}
}

// TestLongLine: one line of 200 MB, complete and in flat memory.
func TestLongLine(t *testing.T) {
	size := int64(200_000_000)
	if testing.Short() {
		size /= 10
	}
	s := newServer(t)
	s.keepLog = false
	var heap heapWatch
	s.onEvent = heap.sample
	s.spec = jobOf(script(fmt.Sprintf(`head -c %d /dev/zero | tr '\0' x`, size)))
	f := s.run()
	checkResult(t, f, succeeded, classNone)
	if f.GetLogSize() != size {
		t.Errorf("log of %d bytes", f.GetLogSize())
	}
	heap.check(t)
}

// TestEndlessLog: beyond the quota output is counted and dropped, the job goes
// on, and the log says so once.
func TestEndlessLog(t *testing.T) {
	const quota, printed = 4 << 20, 60_000_001
	s := newServer(t)
	var heap heapWatch
	s.onEvent = heap.sample
	s.spec = jobOf(script(fmt.Sprintf("yes 'all work and no play' | head -c %d; echo x >done", printed)), script("cat done"))
	s.spec.Limits.LogBytes = quota
	f := s.run()
	checkResult(t, f, succeeded, classNone)
	log := s.logText()
	const mark = "[solstice] log truncated: quota of 4 MiB reached\n"
	if !strings.HasSuffix(log, "\n"+mark) || strings.Count(log, mark) != 1 || len(log) > quota {
		t.Errorf("log of %d bytes ends %q", len(log), log[len(log)-100:])
	}
	kept := int64(strings.LastIndex(log, mark))
	tr := s.truncated()
	// The mark begins on a line of its own, for which a newline may have been added.
	if tr.GetFrom() != kept && tr.GetFrom() != kept-1 {
		t.Errorf("truncated from %d, kept %d", tr.GetFrom(), kept)
	}
	if tr.GetTo() != printed+2 {
		t.Errorf("truncated to %d, printed %d", tr.GetTo(), printed+2)
	}
	heap.check(t)
}

// TestQuotaNotReached: a log that fits is not touched.
func TestQuotaNotReached(t *testing.T) {
	s := newServer(t)
	s.spec = jobOf(script("head -c 60000 /dev/zero | tr '\\0' y"))
	s.spec.Limits.LogBytes = 64 << 10
	if f := s.run(); f.GetLogSize() != 60000 || s.truncated() != nil {
		t.Errorf("log of %d bytes, truncated: %v", f.GetLogSize(), s.truncated())
	}
}

// TestServerAway: what a job prints while nobody listens waits on disk, not in
// memory.
func TestServerAway(t *testing.T) {
	s := newServer(t)
	s.keepLog = false
	cfg := s.config()
	relay := relayTo(t, s.addr)
	cfg.Contacts = []string{relay.addr}
	var heap heapWatch
	s.onEvent = func(ses *session, e *agentv1.Event) {
		heap.sample(ses, e)
		if e.GetSeq() != 1 {
			return
		}
		relay.close()
		// The job ends before anybody listens again.
		go func() {
			waitFile(t, filepath.Join(cfg.WorkDir, "printed"))
			if err := reopenRelay(t, relay, s.addr); err != nil {
				t.Error(err)
			}
		}()
	}
	s.spec = jobOf(script("head -c 50000000 /dev/zero | tr '\\0' z; echo >printed"))
	must(t, s.runConfig(cfg))
	if f := s.verdict(); f.GetLogSize() != 50_000_000 {
		t.Errorf("log of %d bytes", f.GetLogSize())
	}
	heap.check(t)
}

// TestPartialLine: what is printed is seen although neither the line nor the
// process ends.
func TestPartialLine(t *testing.T) {
	s := newServer(t)
	s.spec = jobOf(script("printf 'no newline'; while [ ! -e go ]; do sleep 0.01; done; echo; echo end"))
	cfg := s.config()
	s.onEvent = func(_ *session, e *agentv1.Event) {
		if string(e.GetLog().GetData()) == "no newline" {
			must(t, os.WriteFile(filepath.Join(cfg.WorkDir, "go"), nil, 0o600))
		}
	}
	must(t, s.runConfig(cfg))
	checkLog(t, s, []byte("no newline\nend\n"))
}

// TestSpoolFails: without a spool there is no log; the job is ended and that is
// no fault of its own.
func TestSpoolFails(t *testing.T) {
	s := newServer(t)
	s.spec = jobOf(
		script(`: > "${SOLSTICE_OUTPUT%/*}/../journal"; head -c 20000000 /dev/zero | tr '\0' z; sleep 1000`),
		when("always()", script("echo unwanted")),
	)
	cfg := s.config()
	cfg.SetSpoolMemory(100)
	must(t, s.runConfig(cfg))
	f := s.verdict()
	checkResult(t, f, failed, classInfra)
	checkSteps(t, s, cancelled, skipped)
	if tr := s.truncated(); tr.GetFrom() != f.GetLogSize() || !strings.Contains(tr.GetReason(), "spool") {
		t.Errorf("truncated: %v, log of %d bytes", tr, f.GetLogSize())
	}
	nothingLeft(t)
}
