package solstice_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/solstice-ci/solstice-go/blobstore/memblob"
	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	"github.com/solstice-ci/solstice-go/queue/memqueue"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
	"github.com/solstice-ci/solstice-go/vmprovider/processvm"
)

// An engine inside a program, with nothing but a directory: SQLite, a queue and
// blobs in memory, machines that are processes of this machine. The program's
// main begins with agent.Hook().
func Example() {
	ctx, stop := context.WithCancel(context.Background())
	dir, err := os.MkdirTemp("", "solstice-example-")
	check(err)
	defer os.RemoveAll(dir)
	exampleRepository(filepath.Join(dir, "repo"))

	db, err := storage.Database{DBPoolMaxSize: 4, DBPoolTimeoutMS: 5000}.Open(ctx, dir, nil)
	check(err)
	defer db.Close()
	check(solstice.Migrate(ctx, db))
	repo, err := localgit.Open(ctx, localgit.Config{Dir: filepath.Join(dir, "repo"), Name: "repo", StatusDir: filepath.Join(dir, "statuses")})
	check(err)
	machines, err := processvm.New(processvm.Config{
		Root: filepath.Join(dir, "machines"), Command: agent.Command(), StepEnv: map[string]string{"PATH": "/usr/bin:/bin"},
	})
	check(err)
	defer machines.Close()
	eng, err := solstice.New(solstice.Config{
		DB: db, Queue: memqueue.New(), Blobs: memblob.New(),
		Pools:  []solstice.Pool{{Labels: []string{solstice.DefaultLabel}, Provider: machines}},
		Forges: map[string]forge.Forge{"local": repo},
	})
	check(err)
	ended := make(chan error, 1)
	go func() { ended <- eng.Run(ctx) }()

	runs, err := eng.Submit(ctx, solstice.RunRequest{Repo: forge.Repo{Name: "repo"}})
	check(err)
	for _, job := range runs[0].Jobs {
		for c, err := range eng.FollowJob(ctx, job.ID) {
			check(err)
			fmt.Print(string(c.Chunk.Data))
		}
	}
	for run, err := range eng.Watch(ctx, runs[0].ID) {
		check(err)
		if run.State.Terminal() {
			fmt.Println(run.Workflow, run.State)
		}
	}
	stop()
	check(<-ended)
	// Output:
	// built 1.2
	// testing 1.2
	// greet succeeded
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// exampleRepository has a workflow of two jobs, the second with an output of
// the first.
func exampleRepository(dir string) {
	check(os.MkdirAll(filepath.Join(dir, ".solstice"), 0o755))
	check(os.WriteFile(filepath.Join(dir, ".solstice", "workflow.yaml"), []byte(`
name: greet
checkout: false
jobs:
  build:
    steps:
      - id: v
        run: |
          echo built 1.2
          echo version=1.2 >> "$SOLSTICE_OUTPUT"
    outputs: { version: "${{ steps.v.outputs.version }}" }
  test:
    needs: build
    env: { VERSION: "${{ needs.build.outputs.version }}" }
    steps: [{ run: echo testing $VERSION }]
`), 0o644))
	for _, args := range [][]string{{"init", "-q"}, {"add", "-A"}, {"-c", "user.name=T", "-c", "user.email=t@localhost", "commit", "-q", "-m", "test"}} {
		cmd := exec.Command("git", append([]string{"-C", dir}, args...)...)
		cmd.Env = []string{"HOME=" + dir, "GIT_CONFIG_NOSYSTEM=1"}
		check(cmd.Run())
	}
}
