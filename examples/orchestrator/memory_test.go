package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"

	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
)

// resident reads a figure of /proc/PID/status, in bytes: VmRSS is now, VmHWM the
// most since the last call of forgetPeak.
func (o *process) resident(name string) int64 {
	o.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", o.Cmd.Process.Pid))
	if err != nil {
		o.t.Fatal(err)
	}
	for line := range strings.SplitSeq(string(status), "\n") {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			kb, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			if err != nil {
				o.t.Fatal(err)
			}
			return kb << 10
		}
	}
	o.t.Fatalf("no %s in\n%s", name, status)
	return 0
}

// forgetPeak begins VmHWM anew, see clear_refs in proc(5).
func (o *process) forgetPeak() {
	o.t.Helper()
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", o.Cmd.Process.Pid), []byte("5"), 0o600); err != nil {
		o.t.Fatal(err)
	}
}

const million = `jobs: {a: {checkout: false, steps: [{run: "seq 1000000"}]}}`

// millionLines runs the job with a follower that reads all the time, and one that
// reads a message and then nothing until the job is over, if slow. Both get all.
func millionLines(ctx context.Context, t testing.TB, c pb.OrchestratorServiceClient, slow bool) {
	t.Helper()
	var want bytes.Buffer
	for i := range 1000000 {
		fmt.Fprintln(&want, i+1)
	}
	run := submit(ctx, t, c, million)
	log := &pb.TailLogRequest{Of: &pb.TailLogRequest_JobId{JobId: run.GetJobs()[0].GetId()}, Follow: true}
	late, err := c.TailLog(ctx, log)
	if err != nil {
		t.Fatal(err)
	}
	var got []byte
	read := func() bool {
		m, err := late.Recv()
		if errors.Is(err, io.EOF) {
			return false
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, m.GetData()...)
		return true
	}
	if slow {
		for len(got) == 0 && read() {
		}
	} else {
		for read() {
		}
	}
	if all := tail(ctx, t, c, log, nil); !bytes.Equal(all, want.Bytes()) {
		t.Errorf("the log has %d bytes, want %d", len(all), want.Len())
	}
	if r := over(ctx, t, c, run.GetId()); r.GetState() != pb.RunState_RUN_STATE_SUCCEEDED {
		t.Errorf("the run is %s: %s", r.GetState(), r.GetReason())
	}
	for slow && read() {
	}
	if !bytes.Equal(got, want.Bytes()) {
		t.Errorf("the follower has %d bytes, want %d", len(got), want.Len())
	}
}

// TestMemoryOfAMillionLines: neither a long log nor a follower that does not read
// it makes the orchestrator large.
func TestMemoryOfAMillionLines(t *testing.T) {
	limit := int64(120 << 20)
	if info, ok := debug.ReadBuildInfo(); ok && strings.Contains(fmt.Sprint(info.Settings), "{-race true}") {
		limit *= 4 // the detector keeps a shadow of all memory
	}
	o := start(t, filepath.Join(t.TempDir(), "state"))
	c, ctx := o.client()
	for _, slow := range []bool{false, true} {
		o.forgetPeak()
		millionLines(ctx, t, c, slow)
		if peak := o.resident("VmHWM"); peak > limit {
			t.Errorf("slow follower: %v: %d MiB, at most %d", slow, peak>>20, limit>>20)
		}
	}
}

// BenchmarkMemory measures the resident memory of an orchestrator, its program
// included: idle, at most during a job of a million lines with a follower, and
// with one that does not read.
func BenchmarkMemory(b *testing.B) {
	var idle, peak, slow int64
	for range b.N {
		o := start(b, filepath.Join(b.TempDir(), "state"))
		c, ctx := o.client()
		if _, err := c.ListPools(ctx, &pb.ListPoolsRequest{}); err != nil {
			b.Fatal(err)
		}
		idle = max(idle, o.resident("VmRSS"))
		o.forgetPeak()
		millionLines(ctx, b, c, false)
		peak = max(peak, o.resident("VmHWM"))
		o.forgetPeak()
		millionLines(ctx, b, c, true)
		slow = max(slow, o.resident("VmHWM"))
	}
	b.ReportMetric(float64(idle)/1e6, "idle-MB")
	b.ReportMetric(float64(peak)/1e6, "lines-MB")
	b.ReportMetric(float64(slow)/1e6, "slow-follower-MB")
}
