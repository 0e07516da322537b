// Command embed shows how a Go program runs CI jobs with Solstice inside it:
//
//	go run ./examples/embed DIR
//
// runs the workflow of the git repository in DIR here and prints its logs.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
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

func main() {
	agent.Hook() // machines of the process pool are this program, started again
	if len(os.Args) != 2 {
		log.Fatal("usage: embed DIR")
	}
	if err := run(context.Background(), os.Args[1], os.Stdout); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, dir string, out io.Writer) (err error) {
	state, err := os.MkdirTemp("", "embed-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(state)) }()
	db, err := storage.Database{DBPoolMaxSize: 4, DBPoolTimeoutMS: 5000}.Open(ctx, state, nil) // SQLite; or PostgreSQL by URL
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	if err := solstice.Migrate(ctx, db); err != nil {
		return err
	}
	repo, err := localgit.Open(ctx, localgit.Config{Dir: dir, Name: "repo", StatusDir: filepath.Join(state, "statuses")})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close()) }()
	machines, err := processvm.New(processvm.Config{
		Root: filepath.Join(state, "machines"), Command: agent.Command(),
		StepEnv: map[string]string{"PATH": "/usr/local/bin:/usr/bin:/bin"},
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, machines.Close()) }()
	eng, err := solstice.New(solstice.Config{
		DB: db, Queue: memqueue.New(), Blobs: memblob.New(),
		Pools:  []solstice.Pool{{Labels: []string{solstice.DefaultLabel}, Provider: machines}},
		Forges: map[string]forge.Forge{"local": repo},
	})
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- eng.Run(ctx) }()
	defer func() { stop(); err = errors.Join(err, <-ended) }()

	runs, err := eng.Submit(ctx, solstice.RunRequest{Repo: forge.Repo{Name: "repo"}})
	if err != nil {
		return err
	}
	for _, r := range runs {
		for _, j := range r.Jobs {
			for c, err := range eng.FollowJob(ctx, j.ID) { // until the job is over
				if err != nil {
					return err
				}
				if _, err := out.Write(c.Chunk.Data); err != nil {
					return err
				}
			}
		}
		for r, err = range eng.Watch(ctx, r.ID) { // until the run is over
			if err != nil {
				return err
			}
		}
		fmt.Fprintln(out, r.Workflow, r.State)
	}
	return nil
}
