package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	"github.com/solstice-ci/solstice-go/internal/fakeforge"                     //nolint:depguard // the test is not part of the main that is copied
	fakeforgejo "github.com/solstice-ci/solstice-go/internal/fakeforge/forgejo" //nolint:depguard // the same
	fakegithub "github.com/solstice-ci/solstice-go/internal/fakeforge/github"   //nolint:depguard // the same
	"github.com/solstice-ci/solstice-go/internal/testenv"                       //nolint:depguard // the same
	"github.com/solstice-ci/solstice-go/solstice/agent"
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
)

// patience bounds every wait for a condition; it only ends what hangs.
const patience = 3 * time.Minute

var scratch string

func TestMain(m *testing.M) {
	var err error
	if scratch, err = os.MkdirTemp("", "solstice-integration-test-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	if err := os.RemoveAll(scratch); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

// binaries builds the programs, once, with the race detector if the tests have it.
var binaries = sync.OnceValue(func() error {
	return testenv.Build("-o", scratch+"/", ".", "../github-integration", "../orchestrator")
})

// command has the search path and nothing else of the environment.
func command(t testing.TB, program string, args ...string) *exec.Cmd {
	t.Helper()
	if err := binaries(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(scratch, program), args...)
	cmd.Env = []string{"PATH=" + daemon.Environment("PATH")["PATH"], "HOME=" + scratch}
	return cmd
}

// said is what a program prints, and the status that it ends with.
func said(t testing.TB, program string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, complaints bytes.Buffer
	cmd := command(t, program, args...)
	cmd.Stdout, cmd.Stderr = &out, &complaints
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return out.String(), complaints.String(), cmd.ProcessState.ExitCode()
}

// written gives a new directory with files.
func written(t testing.TB, files map[string]string) string {
	t.Helper()
	dir, err := os.MkdirTemp(scratch, "d") // names of sockets are short
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func freeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for began := time.Now(); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Since(began) > patience {
			t.Fatalf("in vain: %s", what)
		}
	}
}

// owner is a daemon that owns a forge.
type owner struct {
	*testenv.Daemon
	program, dir string
	args         []string
	http         string
}

func (o *owner) start(t testing.TB) {
	t.Helper()
	o.Daemon = testenv.Launch(t, command(t, o.program, append([]string{"--http-addr=127.0.0.1:0"}, o.args...)...), o.program+" started")
	o.Await()
	o.http = o.Said("http_addr")
}

// fleet is a Forgejo and a GitHub, each with its daemon, and an orchestrator that has
// credentials of neither.
type fleet struct {
	forgejo *fakeforgejo.Server
	github  *fakegithub.Server
	web     struct{ forgejo, github *httptest.Server }
	owners  struct{ forgejo, github *owner }
	amqp    string

	orchestrator *testenv.Daemon
	state        string // of the orchestrator
	trust        string // PEM file
	sent         int
}

// newFleet starts them: the forges' daemons have databases of their own and share
// RabbitMQ with the orchestrator, which is on PostgreSQL.
func newFleet(t *testing.T) *fleet {
	t.Helper()
	f := &fleet{amqp: testenv.SharedRabbitMQ(t).VHost(t)}
	var err error
	if f.forgejo, err = fakeforgejo.New(t.Context(), t.TempDir()); err != nil {
		t.Fatal(err)
	}
	if f.github, err = fakegithub.New(t.Context(), t.TempDir()); err != nil {
		t.Fatal(err)
	}
	f.web.forgejo, f.web.github = httptest.NewServer(f.forgejo.Handler()), f.github.Start()
	t.Cleanup(f.web.forgejo.Close)
	t.Cleanup(f.web.github.Close)
	for _, repos := range []*fakeforge.Repos{f.forgejo.Repos, f.github.Repos} {
		if err := repos.Create(t.Context(), "acme/widget"); err != nil {
			t.Fatal(err)
		}
	}
	key, err := fakegithub.AppKey()
	if err != nil {
		t.Fatal(err)
	}
	ca := testenv.NewAuthority(t)
	serving, asking := ca.Issue(t, "github-integration", "127.0.0.1"), ca.Issue(t, "orchestrator", "127.0.0.1", agent.ServerName)
	f.trust = ca.File
	at := freeAddr(t)
	dir := written(t, map[string]string{
		"token": f.forgejo.Token + "\n", "secret": "s3cret\n", "key.pem": string(key), "amqp": f.amqp + "\n",
		"forges.yaml": "forges: { codeberg: { driver: forgejo, url: '" + f.web.forgejo.URL + "', token_file: token, webhook_secret_file: secret, allow: [acme/widget], serve: 'unix:codeberg.sock' } }\n",
		"orchestrator.yaml": fmt.Sprintf(`forges:
  codeberg: { driver: 'grpc+unix:codeberg.sock', owned_elsewhere: true }
  github: { driver: 'grpc+tls:%s', owned_elsewhere: true, plugin: { tls_ca: %s, tls_cert: %s, tls_key: %s } }
`, at, ca.File, asking.Cert, asking.Key),
	})
	in := func(name string) string { return filepath.Join(dir, name) }
	f.owners.forgejo = &owner{program: "forge-integration", dir: in("state-1"), args: []string{
		"--state-dir", in("state-1"), "--amqp-url-file", in("amqp"), "--forges", in("forges.yaml"),
	}}
	f.owners.github = &owner{program: "github-integration", dir: in("state-2"), args: []string{
		"--state-dir", in("state-2"), "--amqp-url-file", in("amqp"), "--github-url", f.web.github.URL, "--github-app-id", fmt.Sprint(fakegithub.AppID),
		"--github-app-key-file", in("key.pem"), "--webhook-secret-file", in("secret"), "--webhook-path", "/hook", "--allow", "acme",
		"--listen", at, "--grpc-tls-cert", serving.Cert, "--grpc-tls-key", serving.Key, "--grpc-tls-ca", serving.CA,
	}}
	f.owners.forgejo.start(t)
	f.owners.github.start(t)
	f.state = in("orchestrator")
	f.orchestrator = testenv.Launch(t, command(t, "orchestrator",
		"--state-dir", f.state, "--grpc-addr=127.0.0.1:0", "--http-addr=127.0.0.1:0", "--agent-addr=127.0.0.1:0", "--runner-addr=127.0.0.1:0",
		"--database-url", testenv.Postgres(t), "--auto-migrate", "--amqp-url-file", in("amqp"), "--forges", in("orchestrator.yaml"),
		"--grpc-tls-cert", asking.Cert, "--grpc-tls-key", asking.Key, "--grpc-tls-ca", asking.CA,
		"--agent-tls-cert", asking.Cert, "--agent-tls-key", asking.Key, "--agent-tls-ca", asking.CA,
	), "orchestrator started")
	f.orchestrator.Await()
	return f
}

// client gives a client of the orchestrator, and a context for its calls as admin.
func (f *fleet) client(t testing.TB) (pb.OrchestratorServiceClient, context.Context) {
	t.Helper()
	token, err := os.ReadFile(filepath.Join(f.state, "admin.token"))
	if err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(f.trust)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	conn, err := grpc.NewClient("passthrough:///"+f.orchestrator.Said("grpc_addr"), grpc.WithNoProxy(),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	t.Cleanup(cancel)
	return pb.NewOrchestratorServiceClient(conn), metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+strings.TrimSpace(string(token)))
}

// runs of a commit.
func (f *fleet) runs(t testing.TB, forge, commit string) (out []*pb.Run) {
	t.Helper()
	c, ctx := f.client(t)
	resp, err := c.ListRuns(ctx, &pb.ListRunsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range resp.GetRuns() {
		if r.GetForge() == forge && (commit == "" || r.GetCommit() == commit) {
			out = append(out, r)
		}
	}
	return out
}

func commit(t testing.TB, repos *fakeforge.Repos, ref string, files map[string]string, parents ...string) string {
	t.Helper()
	tree := map[string]fakeforge.File{}
	for name, content := range files {
		tree[name] = fakeforge.File{Content: content}
	}
	c, err := repos.Commit(t.Context(), "acme/widget", ref, tree, parents...)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// answered sends a webhook.
func answered(t testing.TB, r *http.Request, err error) (int, string) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

func get(t testing.TB, url string) (int, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	return answered(t, r, err)
}

// pushToForgejo sends the webhook of a push to main.
func (f *fleet) pushToForgejo(t testing.TB, commit string) {
	t.Helper()
	body, err := f.forgejo.Push(t.Context(), f.web.forgejo.URL, "acme/widget", "refs/heads/main", strings.Repeat("0", 40), commit)
	if err != nil {
		t.Fatal(err)
	}
	f.sent++
	r, err := fakeforgejo.Request(t.Context(), "http://"+f.owners.forgejo.http+"/webhooks/codeberg", "push", fmt.Sprint("delivery-", f.sent), body, []byte("s3cret"))
	if code, text := answered(t, r, err); code != http.StatusAccepted || !strings.HasPrefix(text, "accepted") {
		t.Fatalf("push: %d %s", code, text)
	}
}

// tellGitHub sends a webhook of GitHub's.
func (f *fleet) tellGitHub(t testing.TB, event string, payload map[string]any) {
	t.Helper()
	body, err := json.Marshal(payload)
	if err != nil {
		t.Fatal(err)
	}
	r, err := fakegithub.Webhook(t.Context(), "http://"+f.owners.github.http+"/hook", event, body, []byte("s3cret"))
	if code, text := answered(t, r, err); code != http.StatusAccepted || !strings.HasPrefix(text, "accepted") {
		t.Fatalf("%s: %d %s", event, code, text)
	}
}

// stop ends a daemon in good order.
func (o *owner) stop(t testing.TB) {
	t.Helper()
	o.Stop(syscall.SIGTERM)
	if code := o.Cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("%s ended with %d", o.program, code)
	}
}
