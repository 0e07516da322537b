package main

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"

	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
)

const greeting = `
name: greet
jobs:
  hello:
    steps: [{run: "echo hello from $GREETER"}]
  fails:
    steps: [{run: "false"}]
  after:
    needs: [fails]
    steps: [{run: "true"}]
`

func TestEndToEnd(t *testing.T) {
	o := start(t, filepath.Join(t.TempDir(), "state"), "--capacity-map=host=3,debian-12=2")
	c, ctx := o.client()
	run := submit(ctx, t, c, greeting)
	done := over(ctx, t, c, run.GetId())
	if done.GetState() != pb.RunState_RUN_STATE_FAILED || len(done.GetJobs()) != 3 || done.GetEvent() != "manual" {
		t.Fatalf("run %v", done)
	}
	hello, fails, after := done.GetJobs()[0], done.GetJobs()[1], done.GetJobs()[2]
	if hello.GetState() != pb.JobState_JOB_STATE_SUCCEEDED || fails.GetClass() != pb.FailureClass_FAILURE_CLASS_USER || after.GetState() != pb.JobState_JOB_STATE_SKIPPED {
		t.Errorf("jobs %v", done.GetJobs())
	}

	for _, follow := range []bool{false, true} {
		whole := tail(ctx, t, c, &pb.TailLogRequest{Of: &pb.TailLogRequest_JobId{JobId: hello.GetId()}, Follow: follow}, nil)
		if !bytes.Contains(whole, []byte("hello from")) {
			t.Errorf("log %q", whole)
		}
		part := tail(ctx, t, c, &pb.TailLogRequest{Of: &pb.TailLogRequest_AttemptId{AttemptId: hello.GetAttemptId()}, From: 3, Follow: follow}, nil)
		if !bytes.Equal(part, whole[3:]) {
			t.Errorf("from offset 3: %q of %q", part, whole)
		}
	}
	job, err := c.GetJob(ctx, &pb.GetJobRequest{JobId: fails.GetId()})
	if err != nil || len(job.GetAttempts()) != 1 || !slices.ContainsFunc(job.GetAttempts()[0].GetSteps(), func(s *pb.Step) bool { return s.GetExitCode() == 1 }) {
		t.Errorf("job %v, %v", job, err)
	}
	if got, err := c.GetRun(ctx, &pb.GetRunRequest{RunId: run.GetId()[:13]}); err != nil || got.GetRun().GetId() != run.GetId() {
		t.Errorf("by a prefix: %v, %v", got, err)
	}

	again, err := c.RerunRun(ctx, &pb.RerunRunRequest{RunId: run.GetId(), Failed: true, IdempotencyKey: "k"})
	if err != nil || again.GetRun().GetRerunOf() != run.GetId() || again.GetRun().GetJobs()[0].GetCopiedFrom() != hello.GetId() {
		t.Fatalf("rerun %v, %v", again, err)
	}
	over(ctx, t, c, again.GetRun().GetId())

	// A page at a time.
	first, err := c.ListRuns(ctx, &pb.ListRunsRequest{PageSize: 1})
	if err != nil || len(first.GetRuns()) != 1 || first.GetRuns()[0].GetId() != again.GetRun().GetId() {
		t.Fatalf("first page %v, %v", first, err)
	}
	second, err := c.ListRuns(ctx, &pb.ListRunsRequest{PageSize: 2, PageToken: first.GetNextPageToken(), States: []pb.RunState{pb.RunState_RUN_STATE_FAILED}})
	if err != nil || len(second.GetRuns()) != 1 || second.GetRuns()[0].GetId() != run.GetId() || second.GetNextPageToken() != "" {
		t.Errorf("second page %v, %v", second, err)
	}

	waits := submit(ctx, t, c, "name: w\njobs: {w: {runs-on: nowhere, steps: [{run: 'true'}]}}")
	job, err = c.GetJob(ctx, &pb.GetJobRequest{JobId: waits.GetJobs()[0].GetId()})
	if err != nil || job.GetWaiting().GetReason() != pb.WaitReason_WAIT_REASON_NO_POOL {
		t.Errorf("a job that no pool serves: %v, %v", job, err)
	}
	if _, err := c.CancelRun(ctx, &pb.CancelRunRequest{RunId: waits.GetId(), Reason: "not needed"}); err != nil {
		t.Error(err)
	}
	if got := over(ctx, t, c, waits.GetId()); got.GetState() != pb.RunState_RUN_STATE_CANCELLED || got.GetReason() != "not needed" {
		t.Errorf("cancelled: %v", got)
	}

	pools, err := c.ListPools(ctx, &pb.ListPoolsRequest{})
	if err != nil || len(pools.GetPools()) != 2 || pools.GetPools()[0].GetCapacity() != 2 || pools.GetPools()[1].GetCapacity() != 3 {
		t.Errorf("pools %v, %v", pools, err)
	}
	for _, e := range []struct {
		err  error
		want codes.Code
	}{
		{errOf(c.GetRun(ctx, &pb.GetRunRequest{RunId: "00000000-0000"})), codes.NotFound},
		{errOf(c.GetRun(ctx, &pb.GetRunRequest{RunId: "short"})), codes.InvalidArgument},
		{errOf(c.RerunRun(ctx, &pb.RerunRunRequest{RunId: "none"})), codes.NotFound},
		{errOf(c.ApproveRun(ctx, &pb.ApproveRunRequest{RunId: run.GetId(), Commit: run.GetCommit()})), codes.FailedPrecondition},
		{errOf(c.Submit(ctx, &pb.SubmitRequest{Repo: &pb.Repo{Name: "no-such-repository"}})), codes.NotFound},
		{errOf(c.GetJob(t.Context(), &pb.GetJobRequest{})), codes.InvalidArgument}, // no deadline
	} {
		if status.Code(e.err) != e.want {
			t.Errorf("got %v, want %s", e.err, e.want)
		}
	}

	if code, body := o.get("/metrics"); code != 200 || !strings.Contains(body, `solstice_jobs_total{`) || !strings.Contains(body, "rpc_server") {
		t.Errorf("metrics %d:\n%s", code, body)
	}
	if code, body := o.get("/healthz"); code != 200 {
		t.Errorf("healthz %d %s", code, body)
	}
}

// TestPoolsOfFile: the pools are those of --pools and no others.
func TestPoolsOfFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pools.yaml")
	if err := os.WriteFile(file, []byte("pools:\n  small: { provider: process, labels: [host, tiny], capacity: 1 }\n  large: { provider: process, capacity: 3 }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	o := start(t, filepath.Join(t.TempDir(), "state"), "--pools", file)
	c, ctx := o.client()
	done := over(ctx, t, c, submit(ctx, t, c, `
name: both
jobs:
  a: { runs-on: tiny, steps: [{ run: 'true' }] }
  b: { runs-on: large, needs: a, steps: [{ run: 'true' }] }
`).GetId())
	if done.GetState() != pb.RunState_RUN_STATE_SUCCEEDED {
		t.Errorf("run %v", done)
	}
	pools, err := c.ListPools(ctx, &pb.ListPoolsRequest{})
	if err != nil || len(pools.GetPools()) != 2 || pools.GetPools()[0].GetName() != "large" || pools.GetPools()[0].GetCapacity() != 3 ||
		!slices.Equal(pools.GetPools()[1].GetLabels(), []string{"host", "tiny"}) {
		t.Errorf("pools %v, %v", pools, err)
	}
}

func errOf[T any](_ T, err error) error { return err }

// TestAuthorization asks for every method of the service in every role: what
// the protocol says of it decides.
func TestAuthorization(t *testing.T) {
	o := start(t, filepath.Join(t.TempDir(), "state"))
	c, admin := o.client()
	token := func(name string, role pb.Role, ttl time.Duration) string {
		t.Helper()
		r := &pb.CreateTokenRequest{Name: name, Role: role}
		if ttl > 0 {
			r.Ttl = durationpb.New(ttl)
		}
		resp, err := c.CreateToken(admin, r)
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetToken()
	}
	revoked := token("revoked", pb.Role_ROLE_ADMIN, 0)
	if _, err := c.ListPools(as(t, revoked), &pb.ListPoolsRequest{}); err != nil {
		t.Fatalf("before it was revoked: %v", err)
	}
	if _, err := c.RevokeToken(admin, &pb.RevokeTokenRequest{Id: "revoked"}); err != nil {
		t.Fatal(err)
	}
	callers := []struct {
		name, token string
		role        pb.Role
	}{
		{"nobody", "", 0},
		{"wrong", "sol_WRONG", 0},
		{"expired", token("expired", pb.Role_ROLE_ADMIN, time.Microsecond), 0},
		{"revoked", revoked, 0},
		{"read", token("read", pb.Role_ROLE_READ, 0), pb.Role_ROLE_READ},
		{"write", token("write", pb.Role_ROLE_WRITE, time.Hour), pb.Role_ROLE_WRITE},
		{"admin", token("other", pb.Role_ROLE_ADMIN, 0), pb.Role_ROLE_ADMIN},
	}
	need := map[string]pb.Role{
		"Submit": pb.Role_ROLE_WRITE, "CancelRun": pb.Role_ROLE_WRITE, "RerunRun": pb.Role_ROLE_WRITE, "ApproveRun": pb.Role_ROLE_WRITE,
		"GetRun": pb.Role_ROLE_READ, "ListRuns": pb.Role_ROLE_READ, "WatchRun": pb.Role_ROLE_READ, "GetJob": pb.Role_ROLE_READ,
		"TailLog": pb.Role_ROLE_READ, "ListPools": pb.Role_ROLE_READ, "ListMachines": pb.Role_ROLE_READ,
		"CreateToken": pb.Role_ROLE_ADMIN, "ListTokens": pb.Role_ROLE_ADMIN, "RevokeToken": pb.Role_ROLE_ADMIN,
	}
	conn := o.conn()
	desc := pb.File_solstice_orchestrator_v1_orchestrator_proto.Services().ByName("OrchestratorService").Methods()
	for i := range desc.Len() {
		name := string(desc.Get(i).Name())
		needs, ok := need[name]
		if !ok {
			t.Errorf("this test does not know who may call %s", name)
			continue
		}
		for _, caller := range callers {
			ctx := as(t, caller.token)
			method := "/" + string(desc.Get(i).Parent().FullName()) + "/" + name
			var err error
			if desc.Get(i).IsStreamingServer() {
				var s grpc.ClientStream
				if s, err = conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method); err == nil {
					if err = s.SendMsg(&emptypb.Empty{}); err == nil {
						_ = s.CloseSend() // never fails
						err = s.RecvMsg(&emptypb.Empty{})
					}
				}
			} else {
				err = conn.Invoke(ctx, method, &emptypb.Empty{}, &emptypb.Empty{})
			}
			got, want := status.Code(err), codes.OK
			switch {
			case caller.role == 0:
				want = codes.Unauthenticated
			case caller.role < needs:
				want = codes.PermissionDenied
			case got != codes.Unauthenticated && got != codes.PermissionDenied:
				want = got // let in: an empty request may well be refused
			}
			if got != want {
				t.Errorf("%s as %s: %v, want %s", name, caller.name, err, want)
			}
		}
	}

	list, err := c.ListTokens(admin, &pb.ListTokensRequest{})
	if err != nil || len(list.GetTokens()) != 5 || list.GetTokens()[0].GetName() != "admin" || list.GetTokens()[0].GetUsedAt() == nil {
		t.Errorf("tokens %v, %v", list, err)
	}
	if err := errOf(c.CreateToken(admin, &pb.CreateTokenRequest{Name: "read", Role: pb.Role_ROLE_READ})); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a name twice: %v", err)
	}
	if _, err := healthpb.NewHealthClient(conn).Check(as(t, ""), &healthpb.HealthCheckRequest{}); err != nil {
		t.Errorf("health without a token: %v", err)
	}
	if err := conn.Invoke(admin, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", &emptypb.Empty{}, &emptypb.Empty{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("reflection without --dev: %v", err)
	}
	if info, err := os.Stat(filepath.Join(o.dir, "admin.token")); err != nil || info.Mode() != 0o600 {
		t.Errorf("admin.token: %v, %v", info, err)
	}
}

// TestJobOutlivesItsOrchestrator: a job's process goes on without its
// orchestrator, and the next one on the same directory has all of its log.
func TestJobOutlivesItsOrchestrator(t *testing.T) {
	for _, how := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		t.Run(how.String(), func(t *testing.T) {
			dir, gate := filepath.Join(t.TempDir(), "state"), filepath.Join(t.TempDir(), "gate")
			o := start(t, dir, "--drain-timeout=100ms")
			c, ctx := o.client()
			run := submit(ctx, t, c, fmt.Sprintf(`
name: count
jobs:
  count:
    steps:
      - run: |
          seq 1 5000
          while ! test -e %s; do sleep 0.1; done
          seq 5001 10000
`, gate))
			of := &pb.TailLogRequest_JobId{JobId: run.GetJobs()[0].GetId()}
			half := func(p []byte) bool { return bytes.Contains(p, []byte("\n5000\n")) }
			tail(ctx, t, c, &pb.TailLogRequest{Of: of, Follow: true}, half)
			o.Stop(how)
			if how == syscall.SIGTERM && o.Err != nil {
				t.Errorf("after SIGTERM: %v", o.Err)
			}
			if err := os.WriteFile(gate, nil, 0o600); err != nil {
				t.Fatal(err)
			}

			o = start(t, dir, "--agent-addr="+o.agent)
			c, ctx = o.client()
			done := over(ctx, t, c, run.GetId())
			if done.GetState() != pb.RunState_RUN_STATE_SUCCEEDED || done.GetJobs()[0].GetAttempts() != 1 {
				t.Errorf("run %v", done)
			}
			var want bytes.Buffer
			fmt.Fprintf(&want, "HEAD is now at %s workflow\n", run.GetCommit()[:7])
			for i := range 10000 {
				fmt.Fprintln(&want, i+1)
			}
			if got := tail(ctx, t, c, &pb.TailLogRequest{Of: of}, nil); !bytes.Equal(got, want.Bytes()) {
				t.Errorf("the log has %d bytes, want %d: %.80q … ", len(got), want.Len(), got)
			}
		})
	}
}

func TestStartUpDiagnostics(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lis.Close() }()
	config := filepath.Join(t.TempDir(), "orchestrator.yaml")
	if err := os.WriteFile(config, []byte("log-level: info\nmax-concurency: 3\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	pools := func(text string) string {
		file := filepath.Join(t.TempDir(), "pools.yaml")
		if err := os.WriteFile(file, []byte("pools: { p: { "+text+" } }"), 0o600); err != nil {
			t.Fatal(err)
		}
		return "--pools=" + file
	}
	running := start(t, filepath.Join(t.TempDir(), "state"))
	for _, c := range []struct {
		name string
		args []string
		want []string
	}{
		{"wrong pools", []string{pools("provider: process, warn: 1")}, []string{"--pools cannot be used", "pools.yaml", "line 1: unknown key warn"}},
		{"pools twice", []string{pools("provider: process"), "--capacity-map=host=1"}, []string{"excludes --capacity-map"}},
		{"no such plugin", []string{pools("provider: command, plugin: { command: [/no/such/plugin] }")}, []string{"pool p", "/no/such/plugin"}},
		{"no libvirt", []string{pools("provider: libvirt, image_file: /i, image_format: raw, libvirt: { uri: 'qemu:///system', accelerator: kvm, storage_pool: s, network: user }")}, []string{"pool p", "libvirt_dlopen"}},
		{"address in use", []string{"--grpc-addr", lis.Addr().String()}, []string{"cannot listen at " + lis.Addr().String() + " (--grpc-addr)", "another program listens"}},
		{"wrong URL", []string{"--database-url=mysql://u:hunter2@h/d"}, []string{"cannot open the database", "postgres://"}},
		{"unknown key", []string{"--config", config}, []string{"orchestrator.yaml:2:", `unknown key "max-concurency"`, `did you mean "max-concurrency"`}},
		{"a second one", []string{"--state-dir", running.dir}, []string{"another orchestrator uses the state directory"}},
		{"undialable", []string{"--agent-addr=0.0.0.0:0", "--grpc-addr=127.0.0.1:0", "--http-addr=127.0.0.1:0", "--runner-addr=127.0.0.1:0"}, []string{"guests cannot dial", "--orch-contact-addr"}},
		{"half a certificate", []string{"--grpc-tls-cert", config}, []string{"--grpc-tls-key"}},
		{"capacity", []string{"--capacity-map=host=0"}, []string{"capacity of host"}},
		{"trusted", []string{"--trusted-pools=hots"}, []string{"no pool hots", "--capacity-map"}},
	} {
		cmd := command(t, append([]string{"--state-dir", filepath.Join(t.TempDir(), "state")}, c.args...)...)
		out, err := cmd.CombinedOutput()
		if err == nil || cmd.ProcessState.ExitCode() < 1 {
			t.Errorf("%s: ended with %v", c.name, err)
		}
		for _, w := range c.want {
			if !strings.Contains(string(out), w) {
				t.Errorf("%s: does not say %q:\n%s", c.name, w, out)
			}
		}
		if strings.Contains(string(out), "hunter2") {
			t.Errorf("%s: shows a password:\n%s", c.name, out)
		}
	}
}
