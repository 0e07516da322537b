package seed

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/blobstore/memblob"
	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue/memqueue"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
	"github.com/solstice-ci/solstice-go/vmprovider"
	"github.com/solstice-ci/solstice-go/vmprovider/memvm"
)

// buildAgents builds the real agent for this machine and for the mini guest into a
// directory that is served to guests, and returns the SHA-256 of each.
func buildAgents(t *testing.T, dir string) map[string]string {
	t.Helper()
	sums := map[string]string{}
	for _, arch := range []string{runtime.GOARCH, "amd64"} {
		file := filepath.Join(dir, "agent-linux-"+arch)
		run(t, "env", "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "go", "build", "-o", file, "../../examples/agent")
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(content)
		sums["linux/"+arch] = hex.EncodeToString(sum[:])
	}
	return sums
}

// runJob has an engine run a job on a machine that machine makes of what the
// engine tells a hypervisor. The engine and the agent's server are at host, as
// the machine sees it.
func runJob(t *testing.T, agents string, sums map[string]string, host string, machine func(b vmprovider.Bootstrap)) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	dir := t.TempDir()
	db, err := storage.Database{DBPoolMaxSize: 4, DBPoolTimeoutMS: 5000}.Open(ctx, dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	if err := solstice.Migrate(ctx, db); err != nil {
		t.Fatal(err)
	}
	repo := filepath.Join(dir, "repo")
	if err := os.MkdirAll(filepath.Join(repo, ".solstice"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(repo, ".solstice", "workflow.yaml"), []byte("jobs: { a: { steps: [ { run: 'umask && cat README && echo the job ran' } ] } }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(repo, "README"), []byte("a file of the repository\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"init", "-q"}, {"add", "-A"}, {"-c", "user.name=T", "-c", "user.email=t@localhost", "commit", "-q", "-m", "test"}} {
		run(t, "git", append([]string{"-C", repo}, args...)...)
	}
	source, err := localgit.Open(ctx, localgit.Config{Dir: repo, Name: "repo", StatusDir: filepath.Join(dir, "statuses")})
	if err != nil {
		t.Fatal(err)
	}
	at := func(l net.Listener) string {
		_, port, _ := net.SplitHostPort(l.Addr().String()) // as a listener gives it
		return net.JoinHostPort(host, port)
	}
	runner := httptest.NewServer(daemon.RunnerHandler(agents))
	defer runner.Close()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}

	// The machine itself is run here, where a test may fail.
	created, off := make(chan vmprovider.Bootstrap, 10), make(chan struct{})
	provider := memvm.New(memvm.Config{Script: func(vmprovider.Spec) memvm.Script {
		return memvm.Script{Agent: func(ctx context.Context, m memvm.Machine) error {
			created <- m.Spec.Bootstrap
			select {
			case <-ctx.Done():
			case <-off:
			}
			return nil
		}}
	}})
	defer func() { _ = provider.Close() }()
	eng, err := solstice.New(solstice.Config{
		DB: db, Queue: memqueue.New(), Blobs: memblob.New(), AgentListener: listener, Contacts: []string{at(listener)}, RunnerURL: "http://" + at(runner.Listener) + "/runner",
		Pools:  []solstice.Pool{{Labels: []string{solstice.DefaultLabel}, Provider: provider, AgentSHA256: sums}},
		Forges: map[string]forge.Forge{"local": source},
	})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- eng.Run(ctx) }()
	defer func() {
		stop()
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}()
	runs, err := eng.Submit(ctx, solstice.RunRequest{Repo: forge.Repo{Name: "repo"}})
	if err != nil {
		t.Fatal(err)
	}
	machine(<-created)
	close(off)
	var log strings.Builder
	for c, err := range eng.FollowJob(ctx, runs[0].Jobs[0].ID) {
		if err != nil {
			t.Fatal(err)
		}
		log.Write(c.Chunk.Data)
	}
	if !strings.Contains(log.String(), "22\na file of the repository\nthe job ran\n") {
		t.Errorf("the job's log: %q", log.String())
	}
}

// TestAgent: the real agent, fetched and started by the script, runs a job.
func TestAgent(t *testing.T) {
	agents := t.TempDir()
	sums := buildAgents(t, agents)
	for _, shell := range shells {
		if runtime.GOOS != "linux" {
			break // which agents there are for
		}
		t.Run(shell[0], func(t *testing.T) {
			t.Parallel()
			runJob(t, agents, sums, "127.0.0.1", func(b vmprovider.Bootstrap) {
				g := newGuest(t, "curl", "sha256sum")
				base := filepath.Dir(g.path)
				// This machine stays on, and has its own directories of that kind.
				g.edits = []string{" --poweroff\n", "\n", `{"contacts"`, `{"state_dir":"` + base + `/state","work_dir":"` + base + `/work","contacts"`}
				console, err := g.boot(shell, b)
				if err != nil || !strings.Contains(console, "solstice: starting the agent\ntime=") || strings.Contains(console, b.Token) {
					t.Errorf("%v\n%s", err, console)
				}
			})
		})
	}
	t.Run("guest", func(t *testing.T) {
		t.Parallel()
		image := testenv.MiniGuest(t)
		runJob(t, agents, sums, "10.0.2.2", func(b vmprovider.Bootstrap) {
			disk := filepath.Join(t.TempDir(), "seed")
			if err := os.WriteFile(disk, build(t, b, Options{}), 0o600); err != nil {
				t.Fatal(err)
			}
			g := testenv.StartQEMU(t, image, disk)
			g.Wait(t)
			if console := strings.ReplaceAll(g.Console(t), "\r", ""); !strings.Contains(console, "solstice: starting the agent\ntime=") || strings.Contains(console, b.Token) {
				t.Error(console)
			}
		})
	})
}
