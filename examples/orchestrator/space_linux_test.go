package main

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/solstice-ci/solstice-go/internal/testenv" //nolint:depguard // the test is not part of the main that is copied
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
)

// TestDiskFull: an orchestrator whose disk is nearly full says so and accepts
// nothing, and goes on by itself.
func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=24m"); err != nil {
		testenv.Missing(t, "tmpfs", "run as root: "+err.Error())
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) })
	o := start(t, filepath.Join(dir, "state"), "--min-free-mb=8")
	c, ctx := o.client()
	workflow := "checkout: false\njobs: { a: { steps: [ { run: echo hi } ] } }\n"
	if r := over(ctx, t, c, submit(ctx, t, c, workflow).GetId()); r.GetState() != pb.RunState_RUN_STATE_SUCCEEDED {
		t.Fatalf("run is %s", r.GetState())
	}
	until := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(patience); !ok(); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("not in time: %s", what)
			}
		}
	}
	metric := func(line string) bool {
		code, page := o.get("/metrics")
		return code == http.StatusOK && strings.Contains(page, "\n"+line)
	}
	until("it is ready", func() bool { code, _ := o.get("/readyz"); return code == http.StatusOK })
	if !metric("solstice_intake_stopped") || !metric("solstice_disk_free_bytes{") {
		t.Error("there is no metric of the room on disk")
	}
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 18<<20), 0o600); err != nil && !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	until("it is not ready for its disk", func() bool {
		code, page := o.get("/readyz")
		return code == http.StatusServiceUnavailable && strings.Contains(page, "MiB free, 8 are needed")
	})
	repo, commit := repository(t, workflow)
	_, err := c.Submit(ctx, &pb.SubmitRequest{Repo: repo, Commit: commit, Ref: "refs/heads/main"})
	if status.Code(err) != codes.ResourceExhausted || strings.Contains(fmt.Sprint(err), dir) {
		t.Errorf("submit: %v, want ResourceExhausted that does not name files", err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	until("it is ready again", func() bool { code, _ := o.get("/readyz"); return code == http.StatusOK })
	if r := over(ctx, t, c, submit(ctx, t, c, workflow).GetId()); r.GetState() != pb.RunState_RUN_STATE_SUCCEEDED {
		t.Errorf("run is %s", r.GetState())
	}
}
