package solstice

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/blobstore/memblob"
	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/memqueue"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logstream/bloblog"
)

// keeper is a forge that keeps statuses; it has nothing else.
type keeper struct {
	forge.Forge
	mu   sync.Mutex
	kept map[string]bool // commits
}

func (k *keeper) ForgetStatuses(_ context.Context, _ forge.Repo, commit string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.kept, commit)
	return nil
}

// archive is a database, a blob store and an engine on them whose time the test
// moves. The engine does not run: the test calls its collector.
type archive struct {
	t      *testing.T
	url    string
	db     *bun.DB
	blobs  blobstore.Store
	forge  *keeper
	queue  queue.Queue
	offset atomic.Int64
	n      int
}

func newArchive(t *testing.T, url string) *archive {
	t.Helper()
	a := &archive{t: t, url: url, blobs: memblob.New(), forge: &keeper{kept: map[string]bool{}}, queue: memqueue.New()}
	a.db = a.open()
	if err := Migrate(t.Context(), a.db); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *archive) open() *bun.DB {
	a.t.Helper()
	db, err := sqldb.Open(a.t.Context(), a.url, sqldb.Options{})
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { _ = db.Close() })
	return db
}

func (a *archive) clock(db *bun.DB) store.Clock {
	return store.NewClock(db, store.ClockOptions{Offset: func() time.Duration { return time.Duration(a.offset.Load()) }})
}

// engine makes one on a connection pool; wrap replaces its log store.
func (a *archive) engine(db *bun.DB, r Retention, wrap func(logstream.Store) logstream.Store) *Engine {
	a.t.Helper()
	index, err := store.New(a.t.Context(), db, store.Options{})
	a.must(err)
	// As an engine makes it, but it waits for no company.
	logs, err := bloblog.New(a.blobs, index.LogIndex(), bloblog.Options{Linger: -1, NoCompaction: true})
	a.must(err)
	cfg := Config{DB: db, Queue: a.queue, Logs: logs, Retention: r, Forges: map[string]forge.Forge{"local": a.forge}, clock: a.clock(db)}
	if wrap != nil {
		cfg.Logs = wrap(logs)
	}
	e, err := New(cfg)
	a.must(err)
	a.t.Cleanup(func() {
		if err := errors.Join(e.Close(), logs.Close()); err != nil {
			a.t.Error(err)
		}
	})
	return e
}

func (a *archive) pass(d time.Duration) { a.offset.Add(int64(d)) }

func (a *archive) must(err error) {
	a.t.Helper()
	if err != nil {
		a.t.Fatal(err)
	}
}

// ended makes a run of two jobs with logs that ended just now.
func (a *archive) ended(e *Engine, repo string) *store.Run {
	a.t.Helper()
	ctx := a.t.Context()
	a.n++
	run := &store.Run{
		ID: newID(), State: store.RunQueued, Forge: "local", Repo: encode(forge.Repo{Name: repo}), RepoKey: "local/" + repo,
		Commit: fmt.Sprintf("c%d", a.n), WorkflowPath: "w",
	}
	a.forge.kept[run.Commit] = true
	var jobs []*store.Job
	for i := range 2 {
		jobs = append(jobs, &store.Job{ID: newID(), Idx: i, Key: fmt.Sprint(i), Name: fmt.Sprint(i), Label: "l", State: store.JobQueued, RepoKey: run.RepoKey})
	}
	a.must(e.store.InsertRun(ctx, run, jobs))
	claims, err := e.store.Claim(ctx, store.ClaimRequest{
		Owner: e.id, Lease: time.Minute, Labels: []string{"l"}, Pool: "p", PoolCapacity: 10, Host: "h", HostCapacity: 10, Max: 2,
		NewMachine: func() *store.Machine { return &store.Machine{ID: newID()} }, Boot: time.Minute, Expire: func(*store.Job) time.Duration { return time.Hour },
	})
	a.must(err)
	for _, c := range claims {
		log := []byte("log of " + c.Attempt.ID + "\n")
		_, err := e.logs.Append(ctx, c.Attempt.LogStream, logstream.AppendOptions{Epoch: 1}, 0, log)
		a.must(err)
		a.must(e.logs.Seal(ctx, c.Attempt.LogStream, logstream.SealOptions{Epoch: 1, Size: int64(len(log))}))
		_, err = e.store.WithRun(ctx, run.ID, func(ctx context.Context, t *store.RunTx) error {
			ref := store.AttemptRef{ID: c.Attempt.ID, Epoch: 1}
			if err := t.StartAttempt(ctx, ref, time.Hour); err != nil {
				return err
			}
			return t.FinishAttempt(ctx, ref, store.Finish{State: store.JobSucceeded, AckedSeq: 1, LogSize: int64(len(log)), Steps: []*store.Step{{Name: "s"}}})
		})
		a.must(err)
		_, err = e.store.MachineGone(ctx, c.Machine.ID)
		a.must(err)
	}
	return run
}

func (a *archive) collect(e *Engine) *collector {
	a.t.Helper()
	c := &collector{e: e}
	for more := true; more; {
		var err error
		more, err = c.pass(a.t.Context())
		a.must(err)
	}
	return c
}

func (a *archive) count(table string) int {
	a.t.Helper()
	var n int
	a.must(a.db.NewSelect().TableExpr(table).ColumnExpr("count(*)").Scan(context.WithoutCancel(a.t.Context()), &n))
	return n
}

func (a *archive) objects() (keys []string) {
	a.t.Helper()
	for info, err := range a.blobs.List(context.WithoutCancel(a.t.Context()), blobstore.ListOptions{}) {
		a.must(err)
		keys = append(keys, info.Key)
	}
	return keys
}

// sound checks that rows and objects name each other, and how many runs there
// are and have logs.
func (a *archive) sound(what string, runs, logs int) {
	a.t.Helper()
	for table, want := range map[string]int{
		"runs": runs, "jobs": 2 * runs, "attempts": 2 * runs, "steps": 2 * runs, "log_streams": 2 * logs, "log_entries": 2 * logs,
		"runs WHERE retention = ''": logs, "runs WHERE retention = 'logs_gone'": runs - logs,
	} {
		if n := a.count(table); n != want {
			a.t.Errorf("%s: %d in %s, want %d", what, n, table, want)
		}
	}
	var listed []string
	a.must(a.db.NewSelect().TableExpr("log_entries").Column("key").Scan(context.WithoutCancel(a.t.Context()), &listed))
	stored := a.objects()
	slices.Sort(listed)
	slices.Sort(stored)
	if !slices.Equal(listed, stored) {
		a.t.Errorf("%s: listed %q, stored %q", what, listed, stored)
	}
	if len(a.forge.kept) != runs {
		a.t.Errorf("%s: statuses of %d commits, want %d", what, len(a.forge.kept), runs)
	}
}

// testRules are short, and keep nothing for its newness.
var testRules = Retention{RunAge: 48 * time.Hour, LogAge: 24 * time.Hour, Newest: -1}

func TestRetentionByAge(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		a := newArchive(t, url)
		e := a.engine(a.db, testRules, nil)
		first := a.ended(e, "a")
		a.pass(12 * time.Hour)
		a.ended(e, "a")
		a.ended(e, "b")
		c := a.collect(e)
		a.sound("nothing is old enough", 3, 3)
		// From now on the collector has to find by itself where something happens.
		step := func(d time.Duration, what string, runs, logs int) {
			t.Helper()
			a.pass(d)
			_, err := c.pass(t.Context())
			a.must(err)
			a.sound(what, runs, logs)
		}
		step(12*time.Hour+time.Minute, "the first's logs are old", 3, 2)
		if r, err := e.GetRun(t.Context(), first.ID); err != nil || !r.LogsRemoved || r.State != RunSucceeded || len(r.Jobs) != 2 {
			t.Errorf("run without logs: %+v, %v", r, err)
		}
		step(12*time.Hour, "the others' logs are", 3, 0)
		step(12*time.Hour, "the first is old", 2, 0)
		if _, err := e.GetRun(t.Context(), first.ID); !errors.Is(err, ErrNotFound) {
			t.Errorf("a run that is gone: %v", err)
		}
		step(12*time.Hour, "all are", 0, 0)
		if n := a.count("machines"); n != 0 {
			t.Errorf("%d machines are left", n)
		}
	})
}

func TestRetentionByCount(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		a := newArchive(t, url)
		e := a.engine(a.db, Retention{RunAge: -1, LogAge: -1, RunCount: 4, LogCount: 2}, nil)
		c := a.collect(e)
		for range 6 {
			a.ended(e, "a")
			a.ended(e, "b")
			a.pass(time.Minute)
		}
		_, err := c.pass(t.Context())
		a.must(err)
		a.sound("too soon", 12, 12)
		a.pass(MinRetention)
		_, err = c.pass(t.Context())
		a.must(err)
		a.sound("only so many", 8, 4)
		a.ended(e, "a")
		_, err = c.pass(t.Context())
		a.must(err)
		a.sound("another pushes one out", 8, 4)
	})
}

func TestRetentionKeepsTheNewest(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		a := newArchive(t, url)
		e := a.engine(a.db, Retention{RunAge: 48 * time.Hour, LogAge: 24 * time.Hour, Newest: 2}, nil)
		for range 4 {
			a.ended(e, "a")
		}
		a.ended(e, "b")
		a.pass(1000 * time.Hour)
		c := a.collect(e)
		a.sound("all are old", 3, 3)
		a.ended(e, "b")
		a.ended(e, "b")
		_, err := c.pass(t.Context())
		a.must(err)
		a.sound("the old one of b is not among the newest any more", 4, 4)
	})
}

func TestRetentionKeepsForEver(t *testing.T) {
	a := newArchive(t, testenv.SQLite(t))
	e := a.engine(a.db, Retention{RunAge: -1, LogAge: -1, DeliveryAge: -1, Newest: -1}, nil)
	a.ended(e, "a")
	a.pass(100000 * time.Hour)
	a.collect(e)
	a.sound("for ever", 1, 1)
}

func TestRetentionConfig(t *testing.T) {
	var r Retention
	if err := r.fill(); err != nil || r.RunAge != 90*24*time.Hour || r.LogAge >= r.RunAge || r.Newest != 10 {
		t.Errorf("defaults %+v, %v", r, err)
	}
	for _, bad := range []Retention{{RunAge: time.Minute}, {LogAge: 1}, {DeliveryAge: MinRetention - 1}, {RunCount: -1}, {LogCount: -1}} {
		if err := bad.fill(); err == nil {
			t.Errorf("%+v was accepted", bad)
		}
	}
}

// mortal is a process that dies at a chosen moment: of its statements and of
// its calls of log store and forge, the one of that number and all after it
// fail.
type mortal struct {
	logstream.Store
	left atomic.Int64
	half bool // the last call of the log store is carried out
}

var errDead = errors.New("the process is dead")

func (m *mortal) alive() bool { return m.left.Add(-1) >= 0 }

func (m *mortal) Delete(ctx context.Context, stream string) error {
	if !m.alive() {
		if m.half && m.left.Load() == -1 {
			_ = m.Store.Delete(ctx, stream)
		}
		return errDead
	}
	return m.Store.Delete(ctx, stream)
}

// BeforeQuery implements bun.QueryHook.
func (m *mortal) BeforeQuery(ctx context.Context, q *bun.QueryEvent) context.Context {
	// To die before BEGIN is to die before the statement after it.
	if q.Query == "BEGIN" || m.alive() {
		return ctx
	}
	dead, cancel := context.WithCancelCause(ctx)
	cancel(errDead)
	return dead
}

// AfterQuery implements bun.QueryHook.
func (m *mortal) AfterQuery(context.Context, *bun.QueryEvent) {}

// dyingBlobs fails with its process.
type dyingBlobs struct {
	blobstore.Store
	m *mortal
}

func (b dyingBlobs) Delete(ctx context.Context, key string, o blobstore.DeleteOptions) error {
	if !b.m.alive() {
		if b.m.half && b.m.left.Load() == -1 {
			_ = b.Store.Delete(ctx, key, o)
		}
		return errDead
	}
	return b.Store.Delete(ctx, key, o)
}

// TestCollectorDiesAnywhere kills the collector before every statement, and
// before and after every call of the log store: the next one leaves nothing.
func TestCollectorDiesAnywhere(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		for _, half := range []bool{false, true} {
			if half && sqldb.IsPostgres(newArchive(t, url).db) {
				continue // says nothing of the database
			}
			a := newArchive(t, url)
			e := a.engine(a.db, testRules, nil)
			died := 0
			for at := int64(0); ; at++ {
				// One goes as a whole, of one only the logs.
				a.ended(e, "a")
				a.pass(30 * time.Hour)
				a.ended(e, "b")
				a.pass(30 * time.Hour)
				m := &mortal{half: half}
				m.left.Store(1 << 30)
				db := a.open().WithQueryHook(m)
				state, err := store.New(t.Context(), db, store.Options{Clock: a.clock(db)})
				a.must(err)
				logs, err := bloblog.New(dyingBlobs{a.blobs, m}, state.LogIndex(), bloblog.Options{})
				a.must(err)
				m.Store = logs
				// As much of an engine as a collector needs.
				victim := &Engine{cfg: e.cfg, id: newID(), store: state, logs: m, log: e.log, metrics: e.metrics}
				m.left.Store(at)
				_, err = (&collector{e: victim}).pass(t.Context())
				whole := m.left.Load() >= 0
				m.left.Store(1 << 30)
				a.must(logs.Close())
				a.must(db.Close())
				if whole {
					a.must(err)
				} else {
					died++
				}
				a.pass(2 * collectorTTL)
				a.collect(e)
				a.sound(fmt.Sprintf("died at %d", at), 1, 0)
				a.pass(30 * time.Hour)
				a.collect(e)
				a.sound("all are old", 0, 0)
				if whole {
					break
				}
			}
			if died < 20 {
				t.Errorf("it died at %d moments only", died)
			}
			a.must(a.db.Close())
		}
	})
}

// TestOneCollector: an engine that does not have the lease removes nothing.
func TestOneCollector(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		a := newArchive(t, url)
		e := a.engine(a.db, testRules, nil)
		a.ended(e, "a")
		a.pass(1000 * time.Hour)
		if mine, err := e.store.Lease(t.Context(), store.CollectorLease, "a backup", time.Hour); err != nil || !mine {
			t.Fatal(mine, err)
		}
		c := a.collect(e)
		a.sound("a backup has the lease", 1, 1)
		a.must(e.store.Unlease(t.Context(), store.CollectorLease, "a backup"))
		_, err := c.pass(t.Context())
		a.must(err)
		a.sound("it is given back", 0, 0)
		if mine, err := e.store.Lease(t.Context(), store.CollectorLease, "a backup", time.Hour); err != nil || !mine {
			t.Errorf("the lease is not free after a pass: %v, %v", mine, err)
		}
	})
}

// slowLogs lets a test look at a log before it is deleted.
type slowLogs struct {
	logstream.Store
	before func(stream string)
}

func (s slowLogs) Delete(ctx context.Context, stream string) error {
	s.before(stream)
	return s.Store.Delete(ctx, stream)
}

// openLogs pretends that logs have no end yet, so that their readers wait.
type openLogs struct{ logstream.Store }

func (s openLogs) Tail(ctx context.Context, stream string, from int64) iter.Seq2[logstream.Chunk, error] {
	return func(yield func(logstream.Chunk, error) bool) {
		for c, err := range s.Store.Tail(ctx, stream, from) {
			if !yield(c, err) || err != nil {
				return
			}
		}
		<-ctx.Done()
		yield(logstream.Chunk{}, ctx.Err())
	}
}

func TestReadersOfRemovedLogs(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		a := newArchive(t, url)
		e := a.engine(a.db, testRules, nil)
		run := a.ended(e, "a")
		r, err := e.GetRun(t.Context(), run.ID)
		a.must(err)
		attempt := r.Jobs[0].AttemptID
		reader := a.engine(a.db, testRules, func(s logstream.Store) logstream.Store { return openLogs{s} })
		begun, end := make(chan struct{}), make(chan error, 1)
		go func() {
			for c, err := range reader.Log(t.Context(), attempt, 0) {
				if len(c.Data) > 0 {
					close(begun)
				}
				if err != nil {
					end <- err
				}
			}
		}()
		<-begun
		a.pass(1000 * time.Hour)
		e.logs = slowLogs{e.logs, func(string) {
			// Marked, not deleted: nobody gets to see half of it.
			for _, err := range e.Log(t.Context(), attempt, 0) {
				if !errors.Is(err, ErrRemoved) && !errors.Is(err, ErrNotFound) {
					t.Errorf("a log that is being removed: %v", err)
				}
			}
		}}
		_, err = e.store.MarkLogs(t.Context(), "local/a", store.Rule{Most: 0}, 10)
		a.must(err)
		a.must((&collector{e: e, failed: map[string]error{}}).remove(t.Context()))
		if err := <-end; !errors.Is(err, ErrRemoved) || !strings.Contains(err.Error(), "removed by retention") {
			t.Errorf("a follower ends with %v", err)
		}
		for _, err := range e.Log(t.Context(), attempt, 0) {
			if !errors.Is(err, ErrRemoved) || !errors.Is(err, ErrNotFound) {
				t.Errorf("a removed log: %v", err)
			}
		}
		for _, err := range e.FollowJob(t.Context(), r.Jobs[0].ID) {
			if err != nil && !errors.Is(err, ErrRemoved) {
				t.Errorf("a job's removed log: %v", err)
			}
		}
	})
}

// TestReaderDoesNotBringALogBack: who reads the log of a lost attempt seals it.
func TestReaderDoesNotBringALogBack(t *testing.T) {
	a := newArchive(t, testenv.SQLite(t))
	e := a.engine(a.db, testRules, nil)
	run := a.ended(e, "a")
	var lost store.Attempt
	_, err := a.db.NewRaw("UPDATE attempts SET state = 'lost' WHERE run_id = ?", run.ID).Exec(t.Context())
	a.must(err)
	a.must(a.db.NewSelect().Model(&lost).Where("run_id = ?", run.ID).Limit(1).Scan(t.Context()))
	// A store that does not know of retention, as filelog.
	mem, err := bloblog.New(memblob.New(), &bloblog.MemIndex{}, bloblog.Options{})
	a.must(err)
	defer func() { a.must(mem.Close()) }()
	own := e.logs
	collects := a.engine(a.db, testRules, func(logstream.Store) logstream.Store { return mem })
	e.logs = sealing{mem, func() { // the collector comes just before the seal
		if _, err := e.store.MarkLogs(t.Context(), "local/a", store.Rule{Most: 0}, 10); err != nil {
			t.Error(err)
		}
		if err := (&collector{e: collects, failed: map[string]error{}}).remove(t.Context()); err != nil {
			t.Error(err)
		}
	}}
	for _, err := range e.Log(t.Context(), lost.ID, 0) {
		if err != nil && !errors.Is(err, ErrRemoved) {
			t.Errorf("log: %v", err)
		}
	}
	if _, err := mem.Stat(t.Context(), lost.LogStream); !errors.Is(err, logstream.ErrNotFound) {
		t.Errorf("the log is back: %v", err)
	}
	e.logs = own
}

type sealing struct {
	logstream.Store
	before func()
}

func (s sealing) Seal(ctx context.Context, stream string, o logstream.SealOptions) error {
	s.before()
	return s.Store.Seal(ctx, stream, o)
}

func TestKeptRerunOutlivesItsOriginal(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		a := newArchive(t, url)
		e := a.engine(a.db, testRules, nil)
		first := a.ended(e, "a")
		_, err := a.db.NewRaw("UPDATE jobs SET state = 'failed' WHERE run_id = ? AND idx = 1", first.ID).Exec(t.Context())
		a.must(err)
		again, err := e.Rerun(t.Context(), first.ID, RerunOptions{Failed: true})
		a.must(err)
		a.pass(1000 * time.Hour)
		c := a.collect(e)
		if n := a.count("runs"); n != 2 {
			t.Fatalf("%d runs: the original has to stay while its rerun lives", n)
		}
		a.must(e.Cancel(t.Context(), again.ID, "enough"))
		_, err = c.pass(t.Context())
		a.must(err)
		if _, err := e.GetRun(t.Context(), first.ID); !errors.Is(err, ErrNotFound) {
			t.Errorf("the original: %v", err)
		}
		r, err := e.GetRun(t.Context(), again.ID)
		if err != nil || r.Jobs[0].State != JobSucceeded {
			t.Fatalf("the rerun: %+v, %v", r, err)
		}
		got := error(nil)
		for _, err := range e.FollowJob(t.Context(), r.Jobs[0].ID) {
			got = err
		}
		if !errors.Is(got, ErrRemoved) {
			t.Errorf("the log of a kept result whose run is gone: %v", got)
		}
		if _, err := e.LogAttempts(t.Context(), r.Jobs[0].ID); !errors.Is(err, ErrRemoved) {
			t.Errorf("its attempts: %v", err)
		}
		if as, err := e.LogAttempts(t.Context(), r.Jobs[1].ID); err != nil || len(as) != 0 {
			t.Errorf("of a job that never ran: %v, %v", as, err)
		}
		if _, err := e.Rerun(t.Context(), first.ID, RerunOptions{}); !errors.Is(err, ErrNotFound) {
			t.Errorf("a rerun of what is gone: %v", err)
		}
	})
}
