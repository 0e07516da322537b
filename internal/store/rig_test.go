package store_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/uptrace/bun"
	"go.uber.org/goleak"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == store.MigrateArg {
		if err := migrate(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// migrate is the main function of a process that migrates as soon as its
// standard input ends, and says which installation it found.
func migrate(url string) error {
	ctx := context.Background()
	db, err := sqldb.Open(ctx, url, sqldb.Options{})
	if err != nil {
		return err
	}
	defer db.Close()
	fmt.Println("ready")
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	if err := store.Migrate(ctx, db); err != nil {
		return err
	}
	s, err := store.New(ctx, db, store.Options{})
	if err != nil {
		return err
	}
	fmt.Println(s.Installation())
	return nil
}

// rig is a store whose clock tests move.
type rig struct {
	*store.Store
	t      *testing.T
	db     *bun.DB
	offset atomic.Int64
	ids    atomic.Int64
}

func open(t *testing.T, url string) *bun.DB {
	t.Helper()
	db, err := sqldb.Open(t.Context(), url, sqldb.Options{PoolTimeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func newRig(t *testing.T, url string, changed func(*store.Run, []*store.Job, []*store.Job) []store.OutboxMessage) *rig {
	t.Helper()
	r := &rig{t: t, db: open(t, url)}
	must(t, store.Migrate(t.Context(), r.db))
	clock := store.NewClock(r.db, store.ClockOptions{Offset: func() time.Duration { return time.Duration(r.offset.Load()) }})
	s, err := store.New(t.Context(), r.db, store.Options{Changed: changed, Clock: clock})
	must(t, err)
	r.Store = s
	return r
}

// both runs a test on both databases.
func both(t *testing.T, fn func(t *testing.T, r *rig)) {
	t.Helper()
	testenv.Databases(t, func(t *testing.T, url string) { fn(t, newRig(t, url, nil)) })
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}

func (r *rig) pass(d time.Duration) { r.offset.Add(int64(d)) }

func (r *rig) id(prefix string) string { return fmt.Sprintf("%s-%06d", prefix, r.ids.Add(1)) }

// run inserts a run; each job is changed by its function.
func (r *rig) run(jobs ...func(*store.Job)) (*store.Run, []*store.Job) {
	r.t.Helper()
	return r.runOf("forge/a", jobs...)
}

func (r *rig) runOf(repo string, jobs ...func(*store.Job)) (*store.Run, []*store.Job) {
	r.t.Helper()
	run := &store.Run{ID: r.id("run"), State: store.RunQueued, Forge: "forge", RepoKey: repo, WorkflowPath: "w.yaml", Event: json.RawMessage(`{"a":"b'c"}`)}
	var js []*store.Job
	for i, f := range jobs {
		j := &store.Job{ID: r.id("job"), Idx: i, Key: fmt.Sprint("k", i), Name: fmt.Sprint("job ", i), Label: "linux", State: store.JobQueued, RepoKey: repo, Needs: json.RawMessage(`[]`)}
		if f != nil {
			f(j)
		}
		js = append(js, j)
	}
	must(r.t, r.InsertRun(r.t.Context(), run, js))
	return run, js
}

func waiting(j *store.Job) { j.State = store.JobWaiting }

// request is a claim by owner with plenty of room.
func (r *rig) request(owner string) store.ClaimRequest {
	return store.ClaimRequest{
		Owner: owner, Lease: 30 * time.Second, Labels: []string{"linux"}, Pool: "pool", PoolCapacity: 100, Host: "host", HostCapacity: 100, Max: 1,
		NewMachine: func() *store.Machine { id := r.id("m"); return &store.Machine{ID: id, TokenHash: "token " + id} },
		Boot:       time.Minute, Expire: func(*store.Job) time.Duration { return time.Hour },
	}
}

func (r *rig) claim(q store.ClaimRequest) []store.Claimed {
	r.t.Helper()
	c, err := r.Claim(r.t.Context(), q)
	must(r.t, err)
	return c
}

// attached claims one job for o1 and attaches its agent: epoch 2.
func (r *rig) attached() (store.Claimed, store.AttemptRef) {
	r.t.Helper()
	cs := r.claim(r.request("o1"))
	if len(cs) != 1 {
		r.t.Fatalf("%d claims, want 1", len(cs))
	}
	_, a, _, _, err := r.Attach(r.t.Context(), cs[0].Machine.ID, "o1", 30*time.Second)
	must(r.t, err)
	return cs[0], store.AttemptRef{ID: a.ID, Epoch: a.Epoch}
}

// in runs one transition.
func (r *rig) in(runID string, fn func(ctx context.Context, t *store.RunTx) error) (store.Change, error) {
	return r.WithRun(r.t.Context(), runID, fn)
}

func (r *rig) start(c store.Claimed, ref store.AttemptRef) error {
	_, err := r.in(c.Run.ID, func(ctx context.Context, t *store.RunTx) error { return t.StartAttempt(ctx, ref, time.Hour) })
	return err
}

func (r *rig) finish(c store.Claimed, ref store.AttemptRef, f store.Finish) error {
	_, err := r.in(c.Run.ID, func(ctx context.Context, t *store.RunTx) error { return t.FinishAttempt(ctx, ref, f) })
	return err
}

func (r *rig) lose(c store.Claimed, ref store.AttemptRef, l store.Loss) error {
	_, err := r.in(c.Run.ID, func(ctx context.Context, t *store.RunTx) error { return t.LoseAttempt(ctx, ref, l) })
	return err
}

func (r *rig) job(id string) *store.Job {
	r.t.Helper()
	j, err := r.Job(r.t.Context(), id)
	must(r.t, err)
	return j
}

func (r *rig) runState(id string) store.RunState {
	r.t.Helper()
	run, err := r.Run(r.t.Context(), id)
	must(r.t, err)
	return run.State
}

func (r *rig) attempt(id string) *store.Attempt {
	r.t.Helper()
	a, err := r.Attempt(r.t.Context(), id)
	must(r.t, err)
	return a
}

func (r *rig) machine(id string) *store.Machine {
	r.t.Helper()
	m, err := r.Machine(r.t.Context(), id)
	must(r.t, err)
	return m
}

func eq[T comparable](t *testing.T, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}
