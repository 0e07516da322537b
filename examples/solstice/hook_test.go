package main

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/orchestrator/client"
)

// losing is an orchestrator of which the first answer to each submission is lost: it
// was accepted, and the connection breaks.
type losing struct {
	pb.UnimplementedOrchestratorServiceServer
	to *client.Client

	mu    sync.Mutex
	conns []net.Conn
	keys  []string
}

func (l *losing) Accept(lis net.Listener) (net.Conn, error) {
	c, err := lis.Accept()
	if err == nil {
		l.mu.Lock()
		l.conns = append(l.conns, c)
		l.mu.Unlock()
	}
	return c, err
}

type losingListener struct {
	net.Listener
	l *losing
}

func (l losingListener) Accept() (net.Conn, error) { return l.l.Accept(l.Listener) }

func (l *losing) Submit(ctx context.Context, r *pb.SubmitRequest) (*pb.SubmitResponse, error) {
	resp, err := l.to.Submit(ctx, r)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil && (len(l.keys) == 0 || l.keys[len(l.keys)-1] != r.GetIdempotencyKey()) {
		for _, c := range l.conns {
			_ = c.Close()
		}
		l.conns = nil
	}
	l.keys = append(l.keys, r.GetIdempotencyKey())
	if md, _ := metadata.FromIncomingContext(ctx); len(md.Get("authorization")) != 1 {
		return nil, errors.New("no token")
	}
	return resp, err
}

// lossy stands between clients and a server; its address, and its authority's file.
func lossy(t *testing.T, s *server) (l *losing, addr, ca string) {
	t.Helper()
	c := &connection{Server: s.Said("grpc_addr"), StateDir: s.dir, GRPCTimeoutMS: 60000}
	to, err := c.dial()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	authority, err := daemon.LoadOrCreateCA(dir, "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	ca = filepath.Join(dir, "trust.pem")
	if err := os.WriteFile(ca, authority.PEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l = &losing{to: to}
	srv := grpc.NewServer(grpc.Creds(credentials.NewTLS(authority.ServerConfig())))
	pb.RegisterOrchestratorServiceServer(srv, l)
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(losingListener{lis, l}) }()
	t.Cleanup(func() { srv.Stop(); <-done; _ = to.Close() })
	return l, lis.Addr().String(), ca
}

// push gives what the pusher is told. The push succeeds, whatever the hook says.
func push(t *testing.T, dir string, args ...string) string {
	t.Helper()
	out := git(t, dir, append([]string{"push", "origin"}, args...)...)
	return strings.ReplaceAll(out, "remote: ", "")
}

var runOfPush = regexp.MustCompile(`  run ([0-9a-f-]{36})  `)

// TestHook: what a pusher is told, on good days and bad ones.
func TestHook(t *testing.T) {
	t.Parallel()
	s := serve(t)
	dir := workflowRepo(t, "name: check\non: { push: { branches: [main, 'many/*'] } }\njobs: { good: { runs-on: nowhere, steps: [{ run: 'true' }] } }\n")
	bare := filepath.Join(t.TempDir(), "it's here.git")
	git(t, dir, "init", "-q", "--bare", "-b", "main", bare)
	git(t, dir, "remote", "add", "origin", bare)
	u := s.user(dir)
	install := func(args ...string) string {
		t.Helper() // --wait is long: a machine may be slow
		return u.ok(append([]string{"hook", "install", bare, "--wait=3m"}, args...)...)
	}
	has(t, "install", install(), filepath.Join(bare, "hooks", "post-receive")+": pushes start runs at "+s.Said("grpc_addr"))
	install() // again

	runs := func() int { return len(decoded[runList](t, u.ok("status", "--json", "--limit", "500")).Runs) }
	out := push(t, dir, "main")
	has(t, "push", out, "solstice: refs/heads/main  run ", "  check queued: good")
	id := runOfPush.FindStringSubmatch(out)
	if id == nil || runs() != 1 {
		t.Fatalf("%d runs after a push", runs())
	}
	run := decoded[runDetails](t, u.ok("status", "--json", id[1]))
	if run.Event != "push" || "/"+run.Repo.FullName() != bare || run.Ref != "refs/heads/main" || run.Commit != git(t, dir, "rev-parse", "HEAD") {
		t.Errorf("run %+v", run.Run)
	}
	has(t, "another branch", push(t, dir, "main:topic"), "solstice: refs/heads/topic: no workflow is concerned")
	if out := push(t, dir, ":topic"); strings.Contains(out, "solstice") {
		t.Errorf("a branch goes: %s", out)
	}

	// Some servers of git give no more of an environment.
	cmd := exec.CommandContext(t.Context(), filepath.Join(bare, "hooks", "post-receive"))
	cmd.Dir, cmd.Env = bare, []string{"GIT_DIR=."}
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("without an environment: %v\n%s", err, out)
	}

	// From A to B, back and again is a push each.
	first := git(t, dir, "rev-parse", "HEAD")
	write(t, dir, map[string]string{"f": "2"})
	commit(t, dir)
	push(t, dir, "main")
	push(t, dir, "--force", first+":main")
	push(t, dir, "main")
	if n := runs(); n != 4 {
		t.Errorf("%d runs after four pushes", n)
	}

	// Many at once: those beyond the bound are counted.
	install("--max-refs", "2")
	has(t, "many", push(t, dir, "main:a", "main:b", "main:c", "main:d", "main:e"),
		"solstice: 3 more branches and tags were pushed: a push starts the runs of the first 2", "refs/heads/b: no workflow")

	// What is wrong with the workflow is said where it is.
	write(t, dir, map[string]string{workflowFile: "name: check\njobs:\n  good: { stesp: [] }\n"})
	commit(t, dir)
	has(t, "an error", push(t, dir, "main"), `solstice: .solstice/workflow.yaml:3:11: error: unknown key "stesp"`, "did you mean", "check errored: nothing is run")
	git(t, dir, "rm", "-q", workflowFile)
	git(t, dir, "commit", "-q", "-m", "no workflow")
	has(t, "no workflow", push(t, dir, "main"), "solstice: refs/heads/main: no workflow file")
	git(t, dir, "reset", "-q", "--hard", "HEAD~2")

	// An answer is lost: the same run, once.
	before := runs()
	lost, addr, ca := lossy(t, s)
	token := filepath.Join(s.dir, "admin.token")
	install("--server", addr, "--ca", ca, "--token-file", token)
	has(t, "a lost answer", push(t, dir, "--force", "main"), "is not available, waiting up to 3m0s for it", "check queued: good")
	if len(lost.keys) != 2 || lost.keys[0] != lost.keys[1] || runs() != before+1 {
		t.Errorf("%d runs for a push that was sent as %q", runs()-before, lost.keys)
	}

	// A token that may only read, and none.
	secrets := t.TempDir()
	reader := filepath.Join(secrets, "reader")
	write(t, secrets, map[string]string{"reader": u.ok("token", "create", "reader", "--role", "read")})
	install("--token-file", reader)
	out = push(t, dir, "--force", first+":main")
	has(t, "a reader's", out, "error: runs were not started", "the token of a larger role", "solstice: not started; later: solstice enqueue --server "+s.Said("grpc_addr")+" --forge local --repo '")

	// It is down: what the pusher is told to do does it.
	install("--wait=200ms")
	kill(s)
	out = push(t, dir, "main")
	has(t, "down", out, "is not available, waiting up to 200ms for it", "error: runs were not started: the orchestrator at", "nothing listens there")
	s.args = append(s.args, "--grpc-addr="+s.Said("grpc_addr"))
	s.again()
	_, later, ok := strings.Cut(out, "not started; later: solstice ")
	if !ok {
		t.Fatalf("the pusher was told %q", out)
	}
	later, _, _ = strings.Cut(later, "\n")
	exe, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	before = runs()
	shell(t, "sh", quoted(exe)+" "+later+" --state-dir "+quoted(s.dir))
	shell(t, "sh", quoted(exe)+" "+later+" --state-dir "+quoted(s.dir)) // which has the same key
	if n := runs(); n != before+1 {
		t.Errorf("%d runs after what the pusher was told to do", n-before)
	}

	// Another's hook, and secrets that would be read by others.
	if err := os.WriteFile(filepath.Join(bare, "hooks", "post-receive"), []byte("#!/bin/sh\necho mine\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	r := u.solstice("hook", "install", bare)
	r.want(t, 2)
	has(t, "another's", r.stderr, "add this line to it", "'hook' 'post-receive' '--server=")
	r = u.solstice("hook", "install", bare, "--token", "sol_x")
	r.want(t, 2)
	has(t, "a token", r.stderr, "a token is not written into a hook", "--token-file")
	if strings.Contains(read(t, filepath.Join(bare, "hooks", "post-receive")), "sol_x") {
		t.Error("the token was written")
	}
	u.solstice("hook", "install", t.TempDir()).want(t, 2)
}
