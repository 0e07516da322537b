package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
)

// subcommand runs one to its end.
func subcommand(t *testing.T, args ...string) (string, error) {
	t.Helper()
	out, err := command(t, args...).CombinedOutput()
	return string(out), err
}

// counting is a job that prints numbered lines until a file says that it is
// enough, and the workflow around it.
func counting(enough string) string {
	return fmt.Sprintf(`
name: counting
checkout: false
jobs:
  count:
    steps:
      - run: |
          n=0
          while [ ! -e %s ]; do
            seq $n $((n + 99)) || exit
            n=$((n + 100))
          done
          echo enough
`, enough)
}

// TestBackupWhileJobsRun copies a daemon's state while a job prints, and goes on
// from the copy elsewhere: what was over is there, byte for byte, and what was
// under way comes to one end.
func TestBackupWhileJobsRun(t *testing.T) {
	dir := t.TempDir()
	enough := filepath.Join(dir, "enough")
	o := start(t, filepath.Join(dir, "state"), "--capacity-map=host=4")
	c, ctx := o.client()
	logs := map[string][32]byte{} // of jobs that are over
	log := func(c pb.OrchestratorServiceClient, job string) [32]byte {
		return sha256.Sum256(tail(ctx, t, c, &pb.TailLogRequest{Of: &pb.TailLogRequest_JobId{JobId: job}}, nil))
	}
	for i := range 5 {
		r := over(ctx, t, c, submit(ctx, t, c, fmt.Sprintf("name: w\ncheckout: false\njobs: {j: {steps: [{run: 'seq %d %d'}]}}", i, 20000+i)).GetId())
		if r.GetState() != pb.RunState_RUN_STATE_SUCCEEDED {
			t.Fatalf("run %v", r)
		}
		logs[r.GetJobs()[0].GetId()] = log(c, r.GetJobs()[0].GetId())
	}
	running := submit(ctx, t, c, counting(enough))
	job := running.GetJobs()[0].GetId()
	printing := func(c pb.OrchestratorServiceClient, n int) []byte {
		return tail(ctx, t, c, &pb.TailLogRequest{Of: &pb.TailLogRequest_JobId{JobId: job}, Follow: true}, func(b []byte) bool { return len(b) > n })
	}
	before := printing(c, 100_000)

	file := filepath.Join(dir, "backup.tar")
	out, err := subcommand(t, "backup", file, "--state-dir", o.dir)
	if err != nil || !strings.Contains(out, "secrets") {
		t.Fatalf("backup: %v\n%s", err, out)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	// The job goes on here, as if nothing were.
	printing(c, len(before)+100_000)

	elsewhere := filepath.Join(dir, "elsewhere")
	if out, err := subcommand(t, "restore", file, "--state-dir", elsewhere); err != nil {
		t.Fatalf("restore: %v\n%s", err, out)
	}
	second := start(t, elsewhere, "--capacity-map=host=4")
	copied, ctx := second.client()
	for id, want := range logs {
		if log(copied, id) != want {
			t.Errorf("the log of job %s differs", id)
		}
	}
	// The machine is not there: the attempt is lost, with the log that there was,
	// and the job is tried again.
	if err := os.WriteFile(enough, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := over(ctx, t, copied, running.GetId())
	got, err := copied.GetJob(ctx, &pb.GetJobRequest{JobId: job})
	if err != nil || r.GetState() != pb.RunState_RUN_STATE_SUCCEEDED || len(got.GetAttempts()) != 2 {
		t.Fatalf("the run that was under way: %v\n%v, %v", r, got, err)
	}
	first, last := got.GetAttempts()[0], got.GetAttempts()[1]
	if first.GetClass() != pb.FailureClass_FAILURE_CLASS_AGENT_LOST || last.GetState() != pb.AttemptState_ATTEMPT_STATE_FINISHED {
		t.Errorf("attempts %v", got.GetAttempts())
	}
	part := tail(ctx, t, copied, &pb.TailLogRequest{Of: &pb.TailLogRequest_AttemptId{AttemptId: first.GetId()}, Follow: true}, nil)
	whole := tail(ctx, t, c, &pb.TailLogRequest{Of: &pb.TailLogRequest_JobId{JobId: job}, Follow: true}, nil)
	if len(part) < len(before) || !bytes.HasPrefix(whole, part) {
		t.Errorf("of the lost attempt %d bytes are there; %d were read before the backup", len(part), len(before))
	}
	if r := over(ctx, t, c, running.GetId()); r.GetState() != pb.RunState_RUN_STATE_SUCCEEDED {
		t.Errorf("the original ends as %v", r)
	}

	// Nothing is overwritten, and nothing in use is touched.
	for what, args := range map[string][]string{
		"over a backup":          {"backup", file, "--state-dir", o.dir},
		"into a directory used":  {"restore", file, "--state-dir", o.dir},
		"of nothing":             {"backup", filepath.Join(dir, "b2"), "--state-dir", filepath.Join(dir, "nowhere")},
		"with another database":  {"restore", file, "--state-dir", filepath.Join(dir, "new"), "--database-url", "sqlite:x"},
		"of what is no backup":   {"restore", enough, "--state-dir", filepath.Join(dir, "new")},
		"without being told how": {"restore", "--state-dir", filepath.Join(dir, "new")},
	} {
		out, err := subcommand(t, args...)
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() == 0 || !strings.Contains(out, "error: ") {
			t.Errorf("%s: %v\n%s", what, err, out)
		}
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) != 4 {
		t.Errorf("left: %q, %v", left, err)
	}
}

// TestBackupAndRestoreAreKilled: what is killed leaves nothing that looks done,
// and the next one cleans up after it.
func TestBackupAndRestoreAreKilled(t *testing.T) {
	dir := t.TempDir()
	state := filepath.Join(dir, "state")
	o := start(t, state)
	c, ctx := o.client()
	done := over(ctx, t, c, submit(ctx, t, c, "name: w\ncheckout: false\njobs: {j: {steps: [{run: 'seq 3000000'}]}}").GetId())
	job := done.GetJobs()[0].GetId()
	want := tail(ctx, t, c, &pb.TailLogRequest{Of: &pb.TailLogRequest_JobId{JobId: job}}, nil)

	file, to := filepath.Join(dir, "backup.tar"), filepath.Join(dir, "restored")
	// killed starts a subcommand and kills it a while after its directory for
	// what is half done appears; it reports whether it was in the middle.
	killed := func(half string, after time.Duration, args ...string) bool {
		t.Helper()
		cmd := command(t, args...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		for {
			if found, _ := filepath.Glob(filepath.Join(dir, half)); len(found) > 0 {
				break
			}
			select {
			case err := <-ended:
				t.Fatalf("%q ended without beginning: %v", args, err)
			case <-time.After(time.Millisecond):
			}
		}
		select {
		case err := <-ended:
			return err != nil
		case <-time.After(after):
			_ = cmd.Process.Kill()
			return <-ended != nil
		}
	}
	gone := func(what, path string) {
		t.Helper()
		if _, err := os.Stat(path); err == nil {
			t.Errorf("%s was killed, and %s is there", what, path)
		}
	}
	for i := range 4 {
		if killed(".backup.tar.backup-*", time.Duration(i)*5*time.Millisecond, "backup", file, "--state-dir", state) {
			gone("a backup", file)
		} else if err := os.Remove(file); err != nil { // it was faster
			t.Fatal(err)
		}
	}
	if out, err := subcommand(t, "backup", file, "--state-dir", state); err != nil {
		t.Fatalf("backup: %v\n%s", err, out)
	}
	for i := range 4 {
		if killed(".restored.restore-*", time.Duration(i)*5*time.Millisecond, "restore", file, "--state-dir", to) {
			gone("a restore", to)
		} else if err := os.RemoveAll(to); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := subcommand(t, "restore", file, "--state-dir", to); err != nil {
		t.Fatalf("restore: %v\n%s", err, out)
	}
	if left, err := filepath.Glob(filepath.Join(dir, ".*")); err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
	o.Stop(syscall.SIGTERM)
	second := start(t, to)
	copied, ctx := second.client()
	if got := tail(ctx, t, copied, &pb.TailLogRequest{Of: &pb.TailLogRequest_JobId{JobId: job}}, nil); !bytes.Equal(got, want) {
		t.Errorf("the log has %d bytes, want %d", len(got), len(want))
	}
	if out, err := subcommand(t, "backup", filepath.Join(dir, "of-nobody.tar"), "--state-dir", state); err != nil {
		t.Errorf("backup without a daemon: %v\n%s", err, out)
	}
}

// TestRetentionFlags: what is wrong is said before anything starts.
func TestRetentionFlags(t *testing.T) {
	for _, c := range []struct{ arg, says string }{
		{"--retain-runs=5m", "1h"}, {"--retain-logs=soon", "30d"}, {"--retain-newest=-1", "--retain-newest"}, {"--retain-run-count=-1", "negative"},
	} {
		out, err := subcommand(t, c.arg, "--state-dir", filepath.Join(t.TempDir(), "state"))
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 2 || !strings.Contains(out, c.says) {
			t.Errorf("%s: %v\n%s", c.arg, err, out)
		}
	}
}
