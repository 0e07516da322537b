package solstice_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/amqpqueue"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
)

// TestBrokerFaults: what RabbitMQ does to an engine's messages costs it seconds
// and nothing else. On one broker, which closes the channel of a reader that
// holds a message for 10 s,
//   - a job of 60 s is not run twice: its run request is acknowledged once it is
//     in the database;
//   - jobs come to their ends though every queue is emptied again and again, and
//     those of broadcasts are deleted: the database is the truth;
//   - a broker that is killed, and comes back, costs no run and no status.
func TestBrokerFaults(t *testing.T) {
	t.Parallel() // most of the time a job sleeps
	broker := testenv.StartRabbitMQ(t, testenv.RabbitMQOptions{
		Config: "consumer_timeout = 10000", Advanced: "[{rabbit,[{channel_tick_interval,1000}]}].",
	})
	vhost := broker.VHost(t)
	open := func() queue.Queue {
		q, err := amqpqueue.Open(t.Context(), amqpqueue.Options{URL: vhost})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = q.Close() })
		return q
	}
	q := open()
	p := newPlant(t, testenv.Postgres(t))
	eng, _ := p.start(t, func(c *solstice.Config) { c.Queue = q })
	clients := open() // a forge integration's

	// request has a run begun by a message.
	request := func(workflow string) string {
		t.Helper()
		commit := p.commit(t, map[string]string{".solstice/workflow.yaml": workflow})
		m, err := messages.Encode(messages.RunRequest{Repo: forge.Repo{Name: "repo"}, Commit: commit})
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "the broker takes a run request", func() bool { // as an outbox repeats it
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			return clients.Publish(ctx, messages.TopicRunRequest, []queue.Message{m}, queue.PublishOptions{}) == nil
		})
		return commit
	}
	runOf := func(commit string) (id string) {
		t.Helper()
		eventually(t, "the run is accepted", func() bool {
			runs, err := eng.Runs(t.Context(), solstice.RunFilter{})
			for _, r := range runs {
				if r.Commit == commit {
					id = r.ID
				}
			}
			return err == nil && id != ""
		})
		return id
	}
	succeeded := func(what, id string) {
		t.Helper()
		r := finishWithin(t, eng, id, 3*time.Minute)
		if r.State != solstice.RunSucceeded {
			t.Errorf("%s: the run is %s: %s", what, r.State, r.Reason)
		}
		for _, j := range r.Jobs {
			if j.Attempts != 1 {
				t.Errorf("%s: job %s had %d attempts", what, j.Name, j.Attempts)
			}
		}
	}

	count := filepath.Join(p.Dir, "count")
	long := runOf(request(fmt.Sprintf("checkout: false\njobs: { long: { steps: [ { run: 'echo x >> %s; sleep 60' } ] } }\n", count)))

	// While jobs are queued behind a pool that is too small for them.
	var few strings.Builder
	few.WriteString("checkout: false\njobs:\n")
	for i := range 8 {
		fmt.Fprintf(&few, "  j%d: { steps: [ { run: 'sleep 0.2' } ] }\n", i)
	}
	commit := p.commit(t, map[string]string{".solstice/workflow.yaml": few.String()})
	runs, err := eng.Submit(t.Context(), solstice.RunRequest{Repo: forge.Repo{Name: "repo"}, Commit: commit})
	if err != nil || len(runs) != 1 {
		t.Fatalf("%d runs, %v", len(runs), err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	dropped := make(chan int)
	go func() {
		n := 0
		for ctx.Err() == nil {
			n += broker.DropMessages(t, vhost)
			time.Sleep(50 * time.Millisecond) // or the broker does nothing else
		}
		dropped <- n
	}()
	succeeded("queues dropped", runs[0].ID)
	cancel()
	if n := <-dropped; n == 0 {
		t.Error("no queue was dropped")
	}
	// And it listens again.
	succeeded("after that", runOf(request("checkout: false\njobs: { again: { steps: [ { run: 'true' } ] } }\n")))

	succeeded("long", long)
	if b, err := os.ReadFile(count); err != nil || string(b) != "x\n" {
		t.Errorf("the job of 60 s ran %q, %v", b, err)
	}

	during := runOf(request("checkout: false\njobs: { during: { steps: [ { run: 'sleep 1' } ] } }\n"))
	broker.Kill(t)
	// Work goes on without a broker: the slow tick finds it.
	commit = p.commit(t, map[string]string{".solstice/workflow.yaml": trivial})
	runs, err = eng.Submit(t.Context(), solstice.RunRequest{Repo: forge.Repo{Name: "repo"}, Commit: commit})
	if err != nil || len(runs) != 1 {
		t.Fatalf("%d runs, %v", len(runs), err)
	}
	succeeded("under way", during)
	succeeded("without a broker", runs[0].ID)
	ready := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		return eng.Ready(ctx)
	}
	if err := ready(); err == nil || !strings.Contains(err.Error(), "queue") {
		t.Errorf("without a broker it is ready: %v", err)
	}
	broker.Start(t)
	eventually(t, "it is ready", func() bool { return ready() == nil })
	repo, err := localgit.Open(t.Context(), localgit.Config{Dir: p.repoDir(), StatusDir: filepath.Join(p.Dir, "statuses")})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = repo.Close() }()
	eventually(t, "the forge is told of the run and its job", func() bool {
		told, err := repo.Statuses(t.Context(), forge.Repo{Name: "repo"}, commit)
		return err == nil && len(told) == 2 && !slices.ContainsFunc(told, func(s forge.Status) bool { return s.State != forge.StatusSuccess })
	})
	succeeded("with the broker again", runOf(request("checkout: false\njobs: { after: { steps: [ { run: 'true' } ] } }\n")))
}
