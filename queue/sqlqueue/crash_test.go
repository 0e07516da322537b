package sqlqueue_test

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/sqlqueue"
)

// lease is short, so that the tests need not wait long for the dead.
const lease = 900 * time.Millisecond

// TestMain is also the main function of the processes that tests kill: they run
// this binary with the arguments "worker NAME URL".
func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Arg(0) == "worker" {
		if err := work(flag.Arg(1), flag.Arg(2)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

const (
	workers   = 3  // processes
	writers   = 17 // publishers and as many consumers in each
	maxHeld   = 8  // messages that a worker keeps in hand
	killAfter = 150
)

// work publishes and consumes until it is killed, and says on stdout what it
// did: "p ID" published, "c ID" about to ack, "a ID" acked, "h ID" kept.
func work(name, url string) error {
	ctx := context.Background()
	db, err := sqldb.Open(ctx, url, sqldb.Options{})
	if err != nil {
		return err
	}
	q, err := sqlqueue.New(ctx, db, sqlqueue.Options{Lease: lease}) // all workers create the tables at once
	if err != nil {
		return err
	}
	sub, err := q.Subscribe(ctx, "t", queue.SubscribeOptions{Group: "g", Prefetch: 2 * writers})
	if err != nil {
		return err
	}
	var mu sync.Mutex
	say := func(what, id string) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Println(what, id)
	}
	errs := make(chan error)
	var held sync.Map
	slots := make(chan struct{}, maxHeld)
	for i := range writers {
		go func() {
			for n := 0; ; n++ {
				id := fmt.Sprintf("%s-%d-%d", name, i, n)
				if err := q.Publish(ctx, "t", []queue.Message{{ID: id, Body: []byte(id)}}, queue.PublishOptions{}); err != nil {
					errs <- err
					return
				}
				say("p", id)
			}
		}()
		go func() {
			for n := 0; ; n++ {
				d, err := sub.Next(ctx)
				if err != nil {
					errs <- err
					return
				}
				id := d.Message().ID
				if n%3 == 0 {
					select {
					case slots <- struct{}{}:
						held.Store(id, d)
						say("h", id)
						continue
					default:
					}
				}
				say("c", id)
				if err := d.Ack(ctx); err != nil {
					errs <- fmt.Errorf("ack %s: %w", id, err)
					return
				}
				say("a", id)
			}
		}()
	}
	return <-errs
}

// history is what killed workers said.
type history struct {
	mu                             sync.Mutex
	published, intent, acked, kept map[string]bool
}

func (h *history) note(line string) {
	what, id, _ := strings.Cut(line, " ")
	h.mu.Lock()
	defer h.mu.Unlock()
	map[string]map[string]bool{"p": h.published, "c": h.intent, "a": h.acked, "h": h.kept}[what][id] = true
}

// runAndKill runs a worker until it has said enough, and ends it with SIGKILL.
func (h *history) runAndKill(t *testing.T, name, url string) {
	exe, err := os.Executable()
	if err != nil {
		t.Error(err)
		return
	}
	cmd := exec.Command(exe, "worker", name, url)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Error(err)
		return
	}
	if err := cmd.Start(); err != nil {
		t.Error(err)
		return
	}
	lines := bufio.NewScanner(out)
	acks, n := 0, 0
	for lines.Scan() {
		line := lines.Text()
		h.note(line)
		if strings.HasPrefix(line, "a ") {
			acks++
		}
		if n++; n >= killAfter && acks > 20 {
			_ = cmd.Process.Kill() // what it still says is in the pipe
		}
	}
	if n < killAfter || acks <= 20 {
		t.Errorf("worker %s ended by itself", name)
	}
	_ = cmd.Wait() // killed
}

func TestKilledProcesses(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		h := &history{published: map[string]bool{}, intent: map[string]bool{}, acked: map[string]bool{}, kept: map[string]bool{}}
		var wg sync.WaitGroup
		for i := range workers {
			wg.Go(func() { h.runAndKill(t, fmt.Sprintf("w%d", i), url) })
		}
		wg.Wait()
		if len(h.published) == 0 || len(h.acked) == 0 || len(h.kept) == 0 {
			t.Fatalf("workers published %d, acked %d, kept %d", len(h.published), len(h.acked), len(h.kept))
		}

		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		db := open(t, url)
		q := newQueue(t, db, sqlqueue.Options{Lease: lease})
		defer q.Close()
		sub, err := q.Subscribe(ctx, "t", queue.SubscribeOptions{Group: "g"})
		if err != nil {
			t.Fatal(err)
		}
		missing := map[string]bool{}
		for id := range h.published {
			if !h.acked[id] && !h.intent[id] {
				missing[id] = true
			}
		}
		returned := 0
		for len(missing) > 0 {
			d, err := sub.Next(ctx)
			if err != nil {
				t.Fatalf("%d published messages are lost: %v", len(missing), err)
			}
			id := d.Message().ID
			if h.acked[id] {
				t.Errorf("%s was acked and came back", id)
			}
			if h.kept[id] {
				returned++
				if d.Attempt() < 2 {
					t.Errorf("%s was in a killed process's hands, this is attempt %d", id, d.Attempt())
				}
			}
			delete(missing, id)
			if err := d.Ack(ctx); err != nil {
				t.Errorf("Ack: %v", err)
			}
		}
		if returned == 0 {
			t.Error("no message came back from the hands of a killed process")
		}
		if !sqldb.IsPostgres(db) {
			var result string
			if err := db.DB.QueryRowContext(ctx, "PRAGMA integrity_check").Scan(&result); err != nil || result != "ok" {
				t.Errorf("integrity_check: %q, %v", result, err)
			}
		}
	})
}

// TestTakenForDead: a process whose row vanished goes on under a new name, and
// what it had in hand is the others'.
func TestTakenForDead(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		ctx := t.Context()
		db := open(t, url)
		q := newQueue(t, db, sqlqueue.Options{Lease: lease})
		defer q.Close()
		sub, err := q.Subscribe(ctx, "t", queue.SubscribeOptions{Group: "g"})
		if err != nil {
			t.Fatal(err)
		}
		heard, err := q.Subscribe(ctx, "t", queue.SubscribeOptions{})
		if err != nil {
			t.Fatal(err)
		}
		say := func(q queue.Queue, id string) {
			t.Helper()
			if err := q.Publish(ctx, "t", []queue.Message{{ID: id}}, queue.PublishOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		say(q, "1")
		d, err := sub.Next(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := db.ExecContext(ctx, "DELETE FROM queue_readers"); err != nil {
			t.Fatal(err)
		}
		again, err := sub.Next(ctx) // the sweep released it, the new name claims it
		if err != nil || again.Message().ID != "1" || again.Attempt() < 2 {
			t.Fatalf("redelivered %v, %v", again, err)
		}
		if err := d.Ack(ctx); !errors.Is(err, queue.ErrSettled) {
			t.Errorf("Ack of the first delivery: %v, want ErrSettled", err)
		}
		// On PostgreSQL a claim may have been made under the old name still.
		for err := again.Ack(ctx); err != nil; err = again.Ack(ctx) {
			if !errors.Is(err, queue.ErrSettled) {
				t.Fatalf("Ack: %v", err)
			}
			if again, err = sub.Next(ctx); err != nil {
				t.Fatal(err)
			}
		}
		// Broadcasts of other handles are heard again.
		other := newQueue(t, open(t, url), sqlqueue.Options{})
		defer other.Close()
		say(other, "2")
		for _, want := range []string{"1", "2"} {
			d, err := heard.Next(ctx)
			if err != nil || d.Message().ID != want {
				t.Fatalf("heard %v, %v, want %s", d, err, want)
			}
		}
	})
}

func TestRefusesWhatCannotWork(t *testing.T) {
	db := open(t, "sqlite::memory:")
	if _, err := sqlqueue.New(t.Context(), db, sqlqueue.Options{}); err == nil {
		t.Error("an in-memory database was accepted")
	}
	db = open(t, testenv.SQLite(t))
	db.SetMaxOpenConns(2)
	if _, err := sqlqueue.New(t.Context(), db, sqlqueue.Options{}); err == nil {
		t.Error("a pool of two connections was accepted")
	}
}
