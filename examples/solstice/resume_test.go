package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestFollowersOutliveTheOrchestrator: it is killed, twice, while a log is
// followed, a run is watched and another is printed; then it comes back.
func TestFollowersOutliveTheOrchestrator(t *testing.T) {
	t.Parallel()
	s := serve(t, "--grpc-addr="+freeAddr(t), "--agent-addr="+freeAddr(t))
	gates := t.TempDir()
	gate := func(n int) string { return filepath.Join(gates, fmt.Sprint(n)) }
	wait := func(n int) string { return fmt.Sprintf("while ! test -e %s; do sleep 0.1; done", gate(n)) }
	u := s.user(workflowRepo(t, fmt.Sprintf(`
name: count
checkout: false
jobs:
  count:
    steps:
      - run: |
          seq 1 4000
          %s
          seq 4001 7000
          %s
          seq 7001 10000
`, wait(1), wait(2))))
	run := u.enqueue()
	log := u.start("logs", "--follow", run.ID, "count")
	whole := u.start("logs", "--follow", "--timestamps", run.ID)
	watch := u.start("status", "--watch", run.ID)
	lines := u.start("status", "--watch", "--json", run.ID)
	again := u.start("enqueue", "--follow", "--idempotency-key", "same")
	impatient := u.start("logs", "--follow", "--retry-for", "0", run.ID)

	log.says("\n4000\n")
	whole.says(" 4000\n")
	impatient.says("\n4000\n")
	watch.says("count  running")
	lines.says(`"running"`)
	again.says("| 4000\n")
	kill(s)
	if code := impatient.end(); code != 2 {
		t.Errorf("a follower that must not try again: exit status %d", code)
	}
	<-impatient.eof
	has(t, "impatient", impatient.output(), "error: cannot read the log: the orchestrator at")
	r := u.solstice("status")
	has(t, "while it is away", r.stderr, "connection refused", "start the orchestrator")
	r.want(t, 2)
	s.again()
	open(t, gate(1))
	log.says("\n7000\n")
	again.says("| 7000\n")
	kill(s)
	open(t, gate(2))
	s.again()

	for name, f := range map[string]*session{"log": log, "with times": whole, "watch": watch, "JSON": lines, "printed run": again} {
		if code := f.end(); code != 0 {
			t.Errorf("%s: exit status %d:\n%.2000s", name, code, f.output())
		}
		<-f.eof
	}
	var want strings.Builder
	for i := range 10000 {
		fmt.Fprintln(&want, i+1)
	}
	if got := log.output(); got != want.String() {
		t.Errorf("the log has %d bytes, want %d:\n%.300s", len(got), want.Len(), got)
	}
	var stamped strings.Builder
	for l := range strings.Lines(whole.output()) {
		_, text, _ := strings.Cut(l, " ")
		stamped.WriteString(text)
	}
	if stamped.String() != want.String() {
		t.Errorf("with times it has %d bytes, want %d", stamped.Len(), want.Len())
	}
	numbers := strings.Join(linesOf(again.output(), "count"), "\n")
	if !strings.Contains(numbers, strings.TrimSpace(want.String())) {
		t.Errorf("the printed run has other lines:\n%.300s", numbers)
	}
	if n := strings.Count(watch.output(), "count  running"); n != 1 {
		t.Errorf("the watcher was told %d times that it runs:\n%s", n, watch.output())
	}
	has(t, "watch", watch.output(), "count succeeded")
	if out := u.ok("logs", run.ID, "count"); out != want.String() {
		t.Errorf("what is stored has %d bytes, want %d", len(out), want.Len())
	}
}

// TestListIsWatched across a restart.
func TestListIsWatched(t *testing.T) {
	t.Parallel()
	s := serve(t, "--grpc-addr="+freeAddr(t))
	u := s.user(workflowRepo(t, stuckWorkflow))
	first := u.enqueue()
	list := u.start("status", "--watch")
	list.says(first.ID[:13])
	s.Stop(syscall.SIGTERM)
	s.again()
	u.ok("cancel", first.ID)
	list.says("cancelled")
	list.signal(syscall.SIGINT)
	if code := list.end(); code != exitInterrupted {
		t.Errorf("exit status %d", code)
	}
}

func open(t *testing.T, gate string) {
	t.Helper()
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
}
