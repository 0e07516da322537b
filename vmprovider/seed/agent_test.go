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

// buildAgent builds the real agent, for this machine and the mini guest, into a
// directory that is served to guests, and returns its SHA-256.
func buildAgent(t *testing.T, dir string) (sum string) {
	t.Helper()
	file := filepath.Join(dir, "agent-linux-amd64")
	run(t, "env", "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "go", "build", "-trimpath", "-ldflags=-s -w", "-o", file, "../../examples/agent")
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	raw := sha256.Sum256(content)
	return hex.EncodeToString(raw[:])
}

// machines is a provider whose machines are run by the test, which receives what
// the engine tells each, until they are told to go off.
func machines(t *testing.T, off <-chan struct{}) (vmprovider.Provider, <-chan vmprovider.Bootstrap) {
	t.Helper()
	created := make(chan vmprovider.Bootstrap, 10)
	p := memvm.New(memvm.Config{Script: func(vmprovider.Spec) memvm.Script {
		return memvm.Script{Agent: func(ctx context.Context, m memvm.Machine) error {
			created <- m.Spec.Bootstrap
			select {
			case <-ctx.Done():
			case <-off:
			}
			return nil
		}}
	}})
	t.Cleanup(func() { _ = p.Close() })
	return p, created
}

// TestAgent: the real agent, fetched and started by the script, runs a job, under
// each shell on this machine, and in a real guest.
func TestAgent(t *testing.T) {
	t.Parallel()
	if runtime.GOOS+"/"+runtime.GOARCH != "linux/amd64" {
		testenv.Missing(t, "a machine like the mini guest", "the agent is built for linux/amd64")
	}
	image := testenv.MiniGuest(t)
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
	names := make([]string, len(shells))
	for i, shell := range shells {
		names[i] = shell[0]
	}
	const steps = "steps: [ { run: 'umask && cat README && echo the job ran' } ]"
	for name, content := range map[string]string{
		".solstice/workflow.yaml": "jobs:\n  shell: { matrix: { shell: [" + strings.Join(names, ", ") + "] }, " + steps + " }\n  guest: { runs-on: guest, " + steps + " }\n",
		"README":                  "a file of the repository\n",
	} {
		if err := os.WriteFile(filepath.Join(repo, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{{"init", "-q"}, {"add", "-A"}, {"-c", "user.name=T", "-c", "user.email=t@localhost", "commit", "-q", "-m", "test"}} {
		run(t, "git", append([]string{"-C", repo}, args...)...)
	}
	source, err := localgit.Open(ctx, localgit.Config{Dir: repo, Name: "repo", StatusDir: filepath.Join(dir, "statuses")})
	if err != nil {
		t.Fatal(err)
	}
	agents := t.TempDir()
	sums := map[string]string{"linux/amd64": buildAgent(t, agents)}
	runner := httptest.NewServer(daemon.NewAgents(agents).Handler())
	defer runner.Close()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	off := make(chan struct{})
	pool := func(label, host string) (solstice.Pool, <-chan vmprovider.Bootstrap) {
		at := func(l net.Listener) string {
			_, port, _ := net.SplitHostPort(l.Addr().String()) // as a listener gives it
			return net.JoinHostPort(host, port)
		}
		provider, created := machines(t, off)
		return solstice.Pool{
			Labels: []string{label}, Provider: provider, AgentSHA256: sums, Capacity: 10,
			Contacts: []string{at(listener)}, RunnerURL: "http://" + at(runner.Listener) + "/runner",
		}, created
	}
	here, bootstraps := pool(solstice.DefaultLabel, "127.0.0.1")
	there, guestBootstrap := pool("guest", "10.0.2.2")
	eng, err := solstice.New(solstice.Config{
		DB: db, Queue: memqueue.New(), Blobs: memblob.New(), AgentListener: listener, MaxConcurrency: 10,
		Pools: []solstice.Pool{here, there}, Forges: map[string]forge.Forge{"local": source},
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

	console := func(name string, b vmprovider.Bootstrap, said string) {
		if !strings.Contains(said, "solstice: starting the agent\ntime=") || strings.Contains(said, b.Token) {
			t.Errorf("%s: the console shows\n%s", name, said)
		}
	}
	var ends []func()
	for _, shell := range shells {
		g, b := newGuest(t, "curl", "sha256sum"), <-bootstraps
		base := filepath.Dir(g.path)
		// This machine stays on, and has its own directories of that kind.
		g.edits = []string{" --poweroff\n", "\n", `{"contacts"`, `{"state_dir":"` + base + `/state","work_dir":"` + base + `/work","contacts"`}
		end := g.start(shell, b)
		ends = append(ends, func() {
			said, err := end()
			if err != nil {
				t.Errorf("%s: %v", shell[0], err)
			}
			console(shell[0], b, said)
		})
	}
	b := <-guestBootstrap
	console("guest", b, bootGuest(t, image, b, Options{}))
	for _, end := range ends {
		end()
	}
	close(off)
	for _, j := range runs[0].Jobs {
		var log strings.Builder
		for c, err := range eng.FollowJob(ctx, j.ID) {
			if err != nil {
				t.Fatal(err)
			}
			log.Write(c.Chunk.Data)
		}
		if !strings.Contains(log.String(), "22\na file of the repository\nthe job ran\n") {
			t.Errorf("the log of %s: %q", j.Name, log.String())
		}
	}
}
