package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
)

// TestTrustedJobEndsWithItsOrchestrator: an agent inside the orchestrator goes
// with it; the next one tries its job again, whatever it takes the pool for.
func TestTrustedJobEndsWithItsOrchestrator(t *testing.T) {
	for how, trusted := range map[syscall.Signal]bool{syscall.SIGKILL: true, syscall.SIGTERM: false} {
		t.Run(how.String(), func(t *testing.T) {
			dir, gate := filepath.Join(t.TempDir(), "state"), filepath.Join(t.TempDir(), "gate")
			o := start(t, dir, "--drain-timeout=100ms", "--capacity-map=host=2,other=1", "--trusted-pools=host")
			c, ctx := o.client()
			run := submit(ctx, t, c, fmt.Sprintf(`
name: gate
jobs:
  gate:
    steps:
      - run: |
          echo at the gate
          while ! test -e %s; do sleep 0.1; done
  other:
    needs: gate
    runs-on: other
    steps: [ { run: echo a process of its own } ]
`, gate))
			of := &pb.TailLogRequest_JobId{JobId: run.GetJobs()[0].GetId()}
			arrived := func(p []byte) bool { return bytes.Contains(p, []byte("at the gate\n")) }
			tail(ctx, t, c, &pb.TailLogRequest{Of: of, Follow: true}, arrived)
			o.Stop(how)
			if how == syscall.SIGTERM && o.Err != nil {
				t.Errorf("after SIGTERM: %v", o.Err)
			}
			if err := os.WriteFile(gate, nil, 0o600); err != nil {
				t.Fatal(err)
			}

			args := []string{"--capacity-map=host=2,other=1"}
			if trusted {
				args = append(args, "--trusted-pools=host")
			}
			o = start(t, dir, args...)
			c, ctx = o.client()
			done := over(ctx, t, c, run.GetId())
			if done.GetState() != pb.RunState_RUN_STATE_SUCCEEDED || done.GetJobs()[0].GetAttempts() != 2 || done.GetJobs()[1].GetAttempts() != 1 {
				t.Errorf("run %v", done)
			}
			o.Stop(syscall.SIGTERM)
			left, err := os.ReadDir(filepath.Join(dir, "machines"))
			if err != nil || len(left) > 0 {
				t.Errorf("left of the machines: %v, %v", left, err)
			}
		})
	}
}
