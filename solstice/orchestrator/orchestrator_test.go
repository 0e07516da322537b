package orchestrator_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/uptrace/bun"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/solstice-ci/solstice-go/blobstore/memblob"
	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue/memqueue"
	"github.com/solstice-ci/solstice-go/solstice"
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/orchestrator"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds every wait for a condition; it only ends what hangs.
const patience = 2 * time.Minute

// oneFile is a forge with one workflow.
type oneFile struct{ forge.Forge }

func (oneFile) ReadFile(_ context.Context, _ forge.Repo, _, path string) ([]byte, error) {
	if path != ".solstice/workflow.yaml" {
		return nil, forge.ErrNotFound
	}
	return []byte("name: w\njobs: {w: {runs-on: nowhere, steps: [{run: 'true'}]}}"), nil
}

func (oneFile) Resolve(context.Context, forge.Repo, string) (string, error) {
	return strings.Repeat("a", 40), nil
}

func (oneFile) ListFiles(context.Context, forge.Repo, string, string) ([]string, error) {
	return nil, nil
}

// rig is a server whose engine has no machines: its one job waits.
type rig struct {
	t      *testing.T
	db     *bun.DB
	tokens *orchestrator.Tokens
	srv    *orchestrator.Server
	conn   *grpc.ClientConn
	client pb.OrchestratorServiceClient
	secret string        // of a read token
	begun  chan struct{} // gets one when a stream begins on the server
	ended  chan struct{} // and when it ended there
	run    solstice.Run
}

func newRig(t *testing.T, url string) *rig {
	t.Helper()
	r := &rig{t: t, begun: make(chan struct{}, 100), ended: make(chan struct{}, 100)}
	fatal := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	r.db, err = sqldb.Open(t.Context(), url, sqldb.Options{PoolTimeout: 10 * time.Second})
	fatal(err)
	t.Cleanup(func() { _ = r.db.Close() })
	fatal(solstice.Migrate(t.Context(), r.db))
	q := memqueue.New()
	t.Cleanup(func() { _ = q.Close() })
	eng, err := solstice.New(solstice.Config{DB: r.db, Queue: q, Blobs: memblob.New(), Forges: map[string]forge.Forge{"f": oneFile{}}})
	fatal(err)
	runs, err := eng.Submit(t.Context(), solstice.RunRequest{Repo: forge.Repo{Name: "r"}})
	fatal(err)
	r.run = runs[0]
	r.tokens, err = orchestrator.OpenTokens(t.Context(), r.db)
	fatal(err)
	_, r.secret, err = r.tokens.Create(t.Context(), "reader", orchestrator.Read, 0)
	fatal(err)

	ca, err := daemon.LoadOrCreateCA(t.TempDir(), "127.0.0.1")
	fatal(err)
	opts, err := daemon.GRPC{GRPCKeepaliveMS: 20000, GRPCMaxMessageMB: 4, GRPCTimeoutMS: 60000}.ServerOptions(ca.ServerConfig())
	fatal(err)
	r.srv, err = orchestrator.New(orchestrator.Config{Engine: eng, Tokens: r.tokens, ReadyEvery: 500 * time.Millisecond},
		append(opts, grpc.ChainStreamInterceptor(r.count))...)
	fatal(err)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	fatal(err)

	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca.PEM())
	r.conn, err = grpc.NewClient("passthrough:///"+lis.Addr().String(), grpc.WithNoProxy(),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13})))
	fatal(err)
	r.client = pb.NewOrchestratorServiceClient(r.conn)

	ctx, stop := context.WithCancel(context.Background())
	engine, server := make(chan error, 1), make(chan error, 1)
	go func() { engine <- eng.Run(ctx) }()
	go func() { server <- r.srv.Serve(lis) }()
	t.Cleanup(func() {
		_ = r.conn.Close()
		r.srv.Close()
		stop()
		if err := errors.Join(<-engine, <-server); err != nil {
			t.Error(err)
		}
	})
	return r
}

// count sees streams from outside, until their work on the server is over.
func (r *rig) count(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	r.begun <- struct{}{}
	defer func() { r.ended <- struct{}{} }()
	return next(srv, ss)
}

func (r *rig) as(secret string, d time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(r.t.Context(), d)
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+secret), cancel
}

func (r *rig) await(what chan struct{}) {
	r.t.Helper()
	select {
	case <-what:
	case <-time.After(patience):
		r.t.Fatal("waited in vain for the beginning or the end of a call on the server")
	}
}

// follow are the long calls, none of which comes to its end; each returns how
// it ended.
func (r *rig) follow() map[string]func(ctx context.Context) error {
	return map[string]func(context.Context) error{
		"WatchRun": func(ctx context.Context) error {
			s, err := r.client.WatchRun(ctx, &pb.WatchRunRequest{RunId: r.run.ID})
			for err == nil {
				_, err = s.Recv()
			}
			return err
		},
		"TailLog": func(ctx context.Context) error {
			s, err := r.client.TailLog(ctx, &pb.TailLogRequest{Of: &pb.TailLogRequest_JobId{JobId: r.run.Jobs[0].ID}, Follow: true})
			for err == nil {
				_, err = s.Recv()
			}
			return err
		},
	}
}

func TestLongCallsEnd(t *testing.T) {
	r := newRig(t, testenv.SQLite(t))
	for name, follow := range r.follow() {
		// Where the machine is slow, a deadline may pass before the call gets there.
		for d := 200 * time.Millisecond; ; d *= 2 {
			ctx, cancel := r.as(r.secret, d)
			err := follow(ctx)
			cancel()
			if status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("%s with a short deadline: %v", name, err)
			}
			if len(r.begun) > 0 || t.Failed() {
				break
			}
		}
		r.await(r.begun)
		r.await(r.ended)

		ctx, cancel := r.as(r.secret, patience)
		go func() {
			<-r.begun
			cancel()
		}()
		if err := follow(ctx); status.Code(err) != codes.Canceled {
			t.Errorf("%s, cancelled: %v", name, err)
		}
		r.await(r.ended)
	}
}

func TestDrainEndsFollowers(t *testing.T) {
	r := newRig(t, testenv.SQLite(t))
	ctx, cancel := r.as(r.secret, patience)
	defer cancel()
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		<-r.begun
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		r.srv.Drain(ctx)
	}()
	err := r.follow()["WatchRun"](ctx)
	<-drained
	if status.Code(err) != codes.Unavailable {
		t.Errorf("a follower of a server that stops: %v, want Unavailable", err)
	}
}

// TestRevokedTokenIsRefused: other orchestrators notice within TokenTTL.
func TestRevokedTokenIsRefused(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		r := newRig(t, url)
		elsewhere, err := orchestrator.OpenTokens(t.Context(), r.db)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := r.as(r.secret, patience)
		defer cancel()
		call := func() error {
			_, err := r.client.ListRuns(ctx, &pb.ListRunsRequest{})
			return err
		}
		if err := call(); err != nil {
			t.Fatal(err)
		}
		if err := elsewhere.Revoke(t.Context(), "reader"); err != nil {
			t.Fatal(err)
		}
		for err = call(); err == nil; err = call() {
			time.Sleep(20 * time.Millisecond)
		}
		if status.Code(err) != codes.Unauthenticated {
			t.Errorf("after it was revoked: %v", err)
		}
		if err := elsewhere.Revoke(t.Context(), "reader"); !errors.Is(err, solstice.ErrNotFound) {
			t.Errorf("revoked twice: %v", err)
		}
	})
}

func TestReadinessFollowsTheDatabase(t *testing.T) {
	r := newRig(t, testenv.SQLite(t))
	ctx, cancel := r.as(r.secret, patience)
	defer cancel()
	watch, err := healthpb.NewHealthClient(r.conn).Watch(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	await := func(want healthpb.HealthCheckResponse_ServingStatus) {
		t.Helper()
		for {
			m, err := watch.Recv()
			if err != nil {
				t.Fatalf("waiting for %s: %v", want, err)
			}
			if m.GetStatus() == want {
				return
			}
		}
	}
	await(healthpb.HealthCheckResponse_SERVING)
	if _, err := r.client.ListRuns(ctx, &pb.ListRunsRequest{}); err != nil {
		t.Error(err)
	}
	if err := r.db.Close(); err != nil {
		t.Fatal(err)
	}
	await(healthpb.HealthCheckResponse_NOT_SERVING)
	// What the database said stays in the log.
	_, err = r.client.ListRuns(ctx, &pb.ListRunsRequest{})
	if c := status.Code(err); c != codes.Internal && c != codes.Unavailable || strings.Contains(err.Error(), "sql") {
		t.Errorf("without a database: %v", err)
	}
}

func TestFirstToken(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		r := newRig(t, url)
		ctx, file := t.Context(), filepath.Join(t.TempDir(), "admin.token")
		first := func() string {
			t.Helper()
			if err := r.tokens.First(ctx, file); err != nil {
				t.Fatal(err)
			}
			data, err := os.ReadFile(file)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
			return string(data)
		}
		works := func(secret string) error {
			ctx, cancel := r.as(strings.TrimSpace(secret), time.Minute)
			defer cancel()
			_, err := r.client.ListTokens(ctx, &pb.ListTokensRequest{})
			return err
		}
		if got := first(); got != "" {
			t.Error("made though there is a token")
		}
		if err := r.tokens.Revoke(ctx, "reader"); err != nil {
			t.Fatal(err)
		}
		made := first()
		if made == "" || first() != made {
			t.Error("not made, or made again")
		}
		// What was revoked stays so.
		if err := r.tokens.Revoke(ctx, "admin"); err != nil {
			t.Fatal(err)
		}
		again := first()
		if err := works(made); status.Code(err) != codes.Unauthenticated {
			t.Errorf("with the token that was revoked: %v", err)
		}
		if err := works(again); err != nil {
			t.Errorf("with the token after it: %v", err)
		}
		// As if a crash had come between the secret and the token, and between the
		// token and its file.
		made = again
		for _, crash := range []func() error{func() error { return r.tokens.Revoke(ctx, "admin") }, func() error { return nil }} {
			if err := errors.Join(crash(), os.Rename(file, file+".new")); err != nil {
				t.Fatal(err)
			}
			if again := first(); again != made {
				t.Error("the secret that was written before a crash is not used")
			}
			if err := works(made); err != nil {
				t.Errorf("with the token: %v", err)
			}
		}
		// Another orchestrator has a directory of its own, and takes nothing away.
		if err := r.tokens.First(ctx, filepath.Join(t.TempDir(), "admin.token")); err != nil {
			t.Fatal(err)
		}
		if err := works(made); err != nil {
			t.Errorf("after another orchestrator's start: %v", err)
		}
		// Those that start at once: one secret works, and the other files go.
		if err := r.tokens.Revoke(ctx, "admin"); err != nil {
			t.Fatal(err)
		}
		files := make([]string, 4)
		var all sync.WaitGroup
		for i := range files {
			files[i] = filepath.Join(t.TempDir(), "admin.token")
			all.Go(func() {
				if err := r.tokens.First(ctx, files[i]); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		var left []string
		for _, f := range files {
			if secret, err := os.ReadFile(f); err == nil {
				left = append(left, string(secret))
			}
		}
		if len(left) != 1 {
			t.Fatalf("%d files are left, want one", len(left))
		}
		for _, f := range files {
			if _, err := os.Stat(f + ".new"); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("what was begun is left: %v", err)
			}
		}
		if err := works(left[0]); err != nil {
			t.Errorf("with what is left: %v", err)
		}
	})
}

func TestConfigIsChecked(t *testing.T) {
	if _, err := orchestrator.New(orchestrator.Config{}); err == nil {
		t.Error("a server of nothing was made")
	}
	if _, err := orchestrator.ParseRole("root"); err == nil {
		t.Error("root is a role")
	}
}

// TestSubmitEvent: who may start runs may say what was pushed, and nothing else.
func TestSubmitEvent(t *testing.T) {
	r := newRig(t, testenv.SQLite(t))
	_, secret, err := r.tokens.Create(t.Context(), "writer", orchestrator.Write, 0)
	if err != nil {
		t.Fatal(err)
	}
	commit := strings.Repeat("b", 40)
	request := func(change func(*pb.SubmitRequest)) *pb.SubmitRequest {
		q := &pb.SubmitRequest{
			IdempotencyKey: "k", Repo: &pb.Repo{Name: "r"}, Commit: commit, Ref: "refs/heads/main",
			Event: &pb.Event{Kind: "push", Before: strings.Repeat("0", 40), Title: "t", Message: "t\n", Sender: "Ann", Time: timestamppb.Now()},
		}
		change(q)
		return q
	}
	ctx, cancel := r.as(r.secret, patience)
	defer cancel()
	if _, err := r.client.Submit(ctx, request(func(*pb.SubmitRequest) {})); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a reader: %v", err)
	}
	ctx, cancel = r.as(secret, patience)
	defer cancel()
	for name, change := range map[string]func(*pb.SubmitRequest){
		"a pull request":   func(q *pb.SubmitRequest) { q.Event.Kind = "pull_request" },
		"an approval":      func(q *pb.SubmitRequest) { q.Event.Kind = "approve" },
		"no kind":          func(q *pb.SubmitRequest) { q.Event.Kind = "" },
		"no commit":        func(q *pb.SubmitRequest) { q.Commit = "" },
		"a short ref":      func(q *pb.SubmitRequest) { q.Ref = "main" },
		"another's ref":    func(q *pb.SubmitRequest) { q.Event.Kind = "tag" },
		"a strange before": func(q *pb.SubmitRequest) { q.Event.Before = "main" },
		"inputs":           func(q *pb.SubmitRequest) { q.Inputs = map[string]string{"a": "b"} },
		"a long message":   func(q *pb.SubmitRequest) { q.Event.Message = strings.Repeat("x", 64<<10+1) },
		"no time":          func(q *pb.SubmitRequest) { q.Event.Time.Nanos = -1 },
	} {
		if resp, err := r.client.Submit(ctx, request(change)); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v, %v", name, resp, err)
		}
	}
	first, err := r.client.Submit(ctx, request(func(*pb.SubmitRequest) {}))
	if err != nil || len(first.GetRuns()) != 1 || first.GetRuns()[0].GetEvent() != "push" || first.GetRuns()[0].GetCommit() != commit {
		t.Fatalf("a push: %v, %v", first, err)
	}
	again, err := r.client.Submit(ctx, request(func(*pb.SubmitRequest) {}))
	if err != nil || len(again.GetRuns()) != 1 || again.GetRuns()[0].GetId() != first.GetRuns()[0].GetId() {
		t.Errorf("the same again: %v, %v", again, err)
	}
	skipped, err := r.client.Submit(ctx, request(func(q *pb.SubmitRequest) { q.IdempotencyKey, q.Event.Message = "k2", "x [skip ci]" }))
	if err != nil || len(skipped.GetRuns()) != 0 {
		t.Errorf("not wanted: %v, %v", skipped, err)
	}
}
