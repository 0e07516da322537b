package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	"github.com/solstice-ci/solstice-go/internal/testenv" //nolint:depguard // the test is not part of the main that is copied
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
)

// patience bounds every wait for a condition; it only ends what hangs.
const patience = 3 * time.Minute

var scratch string

func TestMain(m *testing.M) {
	var err error
	if scratch, err = os.MkdirTemp("", "solstice-orchestrator-test-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	if err := os.RemoveAll(scratch); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

// binary builds the program, once.
var binary = sync.OnceValues(func() (string, error) { return build("orchestrator") })

// commandLine builds the one of people.
var commandLine = sync.OnceValues(func() (string, error) { return buildOf("../solstice", "solstice") })

func build(name string, flags ...string) (string, error) { return buildOf(".", name, flags...) }

// buildOf makes a program, with the race detector if the tests have it.
func buildOf(dir, name string, flags ...string) (string, error) {
	exe := filepath.Join(scratch, name)
	return exe, testenv.Build(append(append([]string{"-o", exe}, flags...), dir)...)
}

// command has the search path and nothing else of the environment.
func command(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	exe, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	return commandOf(exe, args...)
}

func commandOf(exe string, args ...string) *exec.Cmd {
	cmd := exec.Command(exe, args...)
	cmd.Env = []string{"PATH=" + daemon.Environment("PATH")["PATH"], "HOME=" + scratch}
	return cmd
}

// process is a daemon that runs.
type process struct {
	*testenv.Daemon
	t     testing.TB
	dir   string
	grpc  string
	http  string
	agent string
}

// start runs a daemon on free ports; args win.
func start(t testing.TB, dir string, args ...string) *process {
	t.Helper()
	exe, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	o := launch(t, exe, dir, args...)
	o.Await()
	o.grpc, o.http, o.agent = o.Said("grpc_addr"), o.Said("http_addr"), o.Said("agent_addr")
	return o
}

// launch is start without waiting for anything.
func launch(t testing.TB, exe, dir string, args ...string) *process {
	t.Helper()
	return &process{t: t, dir: dir, Daemon: testenv.Launch(t, commandOf(exe, append([]string{
		"--state-dir", dir, "--grpc-addr=127.0.0.1:0", "--http-addr=127.0.0.1:0", "--agent-addr=127.0.0.1:0", "--runner-addr=127.0.0.1:0",
	}, args...)...), "orchestrator started")}
}

// adminToken is that of the state directory.
func (o *process) adminToken() string {
	o.t.Helper()
	data, err := os.ReadFile(filepath.Join(o.dir, "admin.token"))
	if err != nil {
		o.t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

// dial connects without a token; trust is a PEM file.
func (o *process) dial(trust string, certs ...tls.Certificate) *grpc.ClientConn {
	o.t.Helper()
	pem, err := os.ReadFile(trust)
	if err != nil {
		o.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		o.t.Fatalf("%s has no certificate", trust)
	}
	conn, err := grpc.NewClient("passthrough:///"+o.grpc, grpc.WithNoProxy(),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13, Certificates: certs})))
	if err != nil {
		o.t.Fatal(err)
	}
	o.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (o *process) conn() *grpc.ClientConn {
	o.t.Helper()
	return o.dial(filepath.Join(o.dir, "ca.pem"))
}

// client gives a client, and a context for its calls as admin.
func (o *process) client() (pb.OrchestratorServiceClient, context.Context) {
	o.t.Helper()
	return pb.NewOrchestratorServiceClient(o.conn()), as(o.t, o.adminToken())
}

func as(t testing.TB, token string) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	if token == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
}

// get reads a page for people.
func (o *process) get(path string) (int, string) {
	o.t.Helper()
	resp, err := http.Get("http://" + o.http + path)
	if err != nil {
		o.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		o.t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// repository makes one with a workflow, and gives its name and commit.
func repository(t testing.TB, workflow string) (*pb.Repo, string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, ".solstice"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, ".solstice", "workflow.yaml"), []byte(workflow), 0o644); err != nil {
		t.Fatal(err)
	}
	git := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("git", append([]string{"-C", dir, "-c", "user.name=u", "-c", "user.email=u@example.com"}, args...)...)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("git %q: %v", args, err)
		}
		return strings.TrimSpace(string(out))
	}
	git("init", "-q", "-b", "main")
	git("add", ".")
	git("commit", "-q", "-m", "workflow")
	owner, name := filepath.Split(strings.TrimPrefix(dir, "/"))
	return &pb.Repo{Owner: strings.TrimSuffix(owner, "/"), Name: name}, git("rev-parse", "HEAD")
}

// submit accepts the one run of a repository's workflow.
func submit(ctx context.Context, t testing.TB, c pb.OrchestratorServiceClient, workflow string) *pb.Run {
	t.Helper()
	repo, commit := repository(t, workflow)
	resp, err := c.Submit(ctx, &pb.SubmitRequest{Repo: repo, Commit: commit, Ref: "refs/heads/main"})
	if err != nil || len(resp.GetRuns()) != 1 {
		t.Fatalf("submit: %v, %v", resp, err)
	}
	return resp.GetRuns()[0]
}

// over watches a run to its end.
func over(ctx context.Context, t testing.TB, c pb.OrchestratorServiceClient, id string) *pb.Run {
	t.Helper()
	stream, err := c.WatchRun(ctx, &pb.WatchRunRequest{RunId: id})
	if err != nil {
		t.Fatal(err)
	}
	var last *pb.Run
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return last
		}
		if err != nil {
			t.Fatalf("watch: %v", err)
		}
		last = m.GetRun()
	}
}

// tail reads a log until enough says so, or its end.
func tail(ctx context.Context, t testing.TB, c pb.OrchestratorServiceClient, r *pb.TailLogRequest, enough func([]byte) bool) []byte {
	t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.TailLog(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	var out []byte
	for enough == nil || !enough(out) {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatalf("tail: %v", err)
		}
		if at := m.GetOffset() - r.GetFrom(); len(m.GetData()) > 0 {
			if at > int64(len(out)) {
				t.Fatalf("bytes from %d to %d are missing", len(out), at)
			}
			out = append(out[:at], m.GetData()...)
		}
	}
	return out
}
