package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
	"github.com/solstice-ci/solstice-go/solstice/logstream/filelog"
)

// history is what was seen of an orchestrator from outside, and checks it
// against what the orchestrator promises. It trusts nothing that the victim
// keeps.
type history struct {
	t        *testing.T
	dirs     []string // the victims' state directories
	database string   // URL; empty: SQLite in the one directory
	machines string   // directory
	// log reads the log of an attempt; nil: from the files in the one directory.
	log func(ctx context.Context, attempt string) ([]byte, error)
	// queued counts the messages in the broker's queues; nil: they are in the
	// database.
	queued func() int
	out    string // where jobs note by themselves that they begin and end
	pause  string // in the middle of a job; s
	client pb.OrchestratorServiceClient

	mu     sync.Mutex
	runs   map[string]accepted // by key
	states map[string]string   // the last one seen, by the ID of run or job
	found  []string
}

// accepted is a run that was acknowledged.
type accepted struct {
	id     string
	repo   forge.Repo
	commit string
	jobs   []string // IDs
}

func newHistory(t *testing.T, dirs ...string) *history {
	return &history{
		t: t, dirs: dirs, machines: filepath.Join(dirs[0], "machines"), out: t.TempDir(), pause: "0.2",
		runs: map[string]accepted{}, states: map[string]string{},
	}
}

// lines is how many a job prints, in two halves.
const lines = 10000

// workflow is a run's: jobs that print their names and then numbered lines, and
// note outside that they begin and end.
func (h *history) workflow(key string) string {
	script := func(name string) string {
		file := filepath.Join(h.out, name)
		return fmt.Sprintf(`
          echo begin >> %s
          echo %s
          seq 1 %d
          sleep %s
          seq %d %d
          echo end >> %s
`, file, name, lines/2, h.pause, lines/2+1, lines, file)
	}
	return `
name: load
checkout: false
jobs:
  a:
    matrix: { n: [1, 2, 3] }
    steps:
      - run: |` + script(key+"-a${{ matrix.n }}") + `
  b:
    needs: a
    steps:
      - run: |` + script(key+"-b")
}

// jobs are the names that a run's jobs print.
func jobNames(key string) []string {
	return []string{key + "-a1", key + "-a2", key + "-a3", key + "-b"}
}

// printed is a job's log.
func printed(name string) []byte {
	var b bytes.Buffer
	fmt.Fprintln(&b, name)
	for i := range lines {
		fmt.Fprintln(&b, i+1)
	}
	return b.Bytes()
}

// violation notes what must not be.
func (h *history) violation(format string, args ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.found = append(h.found, fmt.Sprintf(format, args...))
}

// accepted notes a run that was acknowledged.
func (h *history) accepted(key string, repo *pb.Repo, commit string, run *pb.Run) error {
	a := accepted{id: run.GetId(), repo: forge.Repo{Owner: repo.GetOwner(), Name: repo.GetName()}, commit: commit}
	for _, j := range run.GetJobs() {
		a.jobs = append(a.jobs, j.GetId())
	}
	if len(a.jobs) != len(jobNames(key)) {
		return fmt.Errorf("%s has %d jobs", key, len(a.jobs))
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.runs[key] = a
	return nil
}

// terminal is a state of run or job that never changes.
func terminal(state string) bool {
	for _, end := range []string{"_SUCCEEDED", "_FAILED", "_CANCELLED", "_ERRORED", "_SKIPPED", "_TIMED_OUT"} {
		if strings.HasSuffix(state, end) {
			return true
		}
	}
	return false
}

// observe notes the states of a run and its jobs, and reports whether it is over.
func (h *history) observe(r *pb.Run) bool {
	now := map[string]string{r.GetId(): r.GetState().String()}
	for _, j := range r.GetJobs() {
		now[j.GetId()] = j.GetState().String()
	}
	for id, state := range now {
		h.mu.Lock()
		before := h.states[id]
		h.states[id] = state
		h.mu.Unlock()
		if terminal(before) && state != before {
			h.violation("%s was %s and is %s", id, before, state)
		}
	}
	return terminal(r.GetState().String())
}

// settle waits until the orchestrator has nothing left to do: every machine is
// gone and every message is delivered.
func (h *history) settle(ctx context.Context) {
	db := h.open()
	defer func() { _ = db.Close() }()
	for ctx.Err() == nil && len(h.rows(ctx, db)) > 0 {
		wait(ctx, 100*time.Millisecond)
	}
}

func (h *history) open() *bun.DB {
	db, err := storage.Database{DatabaseURL: h.database, DBPoolMaxSize: 2, DBPoolTimeoutMS: 60000}.Open(context.WithoutCancel(h.t.Context()), h.dirs[0], nil)
	if err != nil {
		h.t.Fatal(err)
	}
	return db
}

// rows are those that have to be gone when everything is over.
func (h *history) rows(ctx context.Context, db *bun.DB) (left []string) {
	for what, where := range map[string]string{
		"machines":       "machines WHERE state <> 'gone'",
		"live attempts":  "attempts WHERE state NOT IN ('finished', 'lost')",
		"unsent changes": "outbox",
		"reports to be":  "reports WHERE due_at > 0",
		"held jobs":      "jobs WHERE hold_id <> ''",
		// Wake-ups of a killed process's subscription stay until that expires.
		"undelivered statuses": "queue_messages AS m JOIN queue_groups AS g ON g.id = m.gid WHERE g.topic LIKE 'status%' OR g.topic = 'runrequest'",
	} {
		if h.queued != nil && strings.Contains(where, "queue_messages") {
			continue
		}
		var n int
		if err := db.NewRaw("SELECT count(*) FROM "+where).Scan(ctx, &n); err != nil {
			left = append(left, fmt.Sprintf("%s: %v", what, err))
		} else if n > 0 {
			left = append(left, fmt.Sprintf("%d %s are left", n, what))
		}
	}
	if h.queued != nil {
		if n := h.queued(); n > 0 {
			left = append(left, fmt.Sprintf("%d messages are left in queues", n))
		}
	}
	return left
}

// check compares everything with what was promised, after the orchestrator has
// ended.
func (h *history) check(ctx context.Context) []string {
	h.checkKept(ctx)
	h.checkLeft()
	return h.found
}

// checkKept looks at what is stored.
func (h *history) checkKept(ctx context.Context) {
	db := h.open()
	defer func() { _ = db.Close() }()
	if h.database == "" {
		var sound string
		if err := db.NewRaw("PRAGMA integrity_check").Scan(ctx, &sound); err != nil || sound != "ok" {
			h.violation("the database is not sound: %s, %v", sound, err)
		}
	}
	for _, left := range h.rows(ctx, db) {
		h.violation("%s", left)
	}
	var runs int
	if err := db.NewRaw("SELECT count(*) FROM runs").Scan(ctx, &runs); err != nil || runs != len(h.runs) {
		h.violation("%d runs were accepted, there are %d: %v", len(h.runs), runs, err)
	}
	read, done := h.log, func() {}
	if read == nil {
		read, done = h.files(db)
	}
	defer done()
	for key, a := range h.runs {
		h.checkRun(ctx, key, a, db)
		names := jobNames(key)
		for _, id := range a.jobs {
			if name := h.checkLog(ctx, key, id, db, read); name != "" {
				names = slices.DeleteFunc(names, func(n string) bool { return n == name })
			}
		}
		for _, name := range names {
			h.violation("%s: no job has its log", name)
		}
		for _, name := range jobNames(key) {
			if did, err := os.ReadFile(filepath.Join(h.out, name)); string(did) != "begin\nend\n" {
				h.violation("%s did not run once: %q, %v\n%s", name, did, err, h.lost(ctx, a.id, db))
			}
		}
	}
}

// files reads logs from the victim's files, where each has to be sealed with its
// sum.
func (h *history) files(db *bun.DB) (read func(context.Context, string) ([]byte, error), done func()) {
	logs, err := filelog.Open(filepath.Join(h.dirs[0], "logs"), filelog.Options{})
	if err != nil {
		h.t.Fatal(err)
	}
	read = func(ctx context.Context, attempt string) ([]byte, error) {
		var stream string
		if err := db.NewRaw("SELECT log_stream FROM attempts WHERE id = ?", attempt).Scan(ctx, &stream); err != nil {
			return nil, err
		}
		info, err := logs.Stat(ctx, stream)
		if err != nil {
			return nil, err
		}
		var got []byte
		for c, err := range logs.Tail(ctx, stream, 0) {
			if err != nil {
				return nil, err
			}
			got = append(got, c.Data...)
		}
		if sum := sha256.Sum256(got); !info.Sealed || info.Size != int64(len(got)) || !bytes.Equal(info.SHA256, sum[:]) {
			return got, fmt.Errorf("the log is %+v, it has %d bytes", info, len(got))
		}
		return got, nil
	}
	return read, func() { _ = logs.Close() }
}

// told is what the forge was told of a commit, by whichever orchestrator told
// the newest.
func (h *history) told(ctx context.Context, a accepted) (map[string]forge.Status, error) {
	newest := map[string]forge.Status{}
	for _, dir := range h.dirs {
		repos, err := localgit.Open(ctx, localgit.Config{Root: "/", StatusDir: filepath.Join(dir, "statuses")})
		if err != nil {
			return nil, err
		}
		statuses, err := repos.Statuses(ctx, a.repo, a.commit)
		if err := errors.Join(err, repos.Close()); err != nil {
			return nil, err
		}
		for _, s := range statuses {
			if was, ok := newest[s.Key]; !ok || s.Version > was.Version {
				newest[s.Key] = s
			}
		}
	}
	return newest, nil
}

// lost tells of the attempts of a run that were given up.
func (h *history) lost(ctx context.Context, run string, db *bun.DB) string {
	var attempts []struct {
		JobID                                       string
		Number                                      int
		MachineID                                   string
		CreatedAt, StartedAt, ContactAt, FinishedAt int64
		AckedSeq                                    int64
		Class, Reason, Console                      string
	}
	err := db.NewRaw("SELECT job_id, number, machine_id, created_at, started_at, contact_at, finished_at, acked_seq, class, reason, console FROM attempts WHERE run_id = ? AND state = 'lost'", run).Scan(ctx, &attempts)
	return fmt.Sprintf("given up: %+v, %v", attempts, err)
}

// checkRun compares what was seen of a run with what is stored, and with what
// the forge was told in the end.
func (h *history) checkRun(ctx context.Context, key string, a accepted, db *bun.DB) {
	var state string
	if err := db.NewRaw("SELECT state FROM runs WHERE id = ? AND idempotency_key = ?", a.id, key).Scan(ctx, &state); err != nil || state != "succeeded" {
		h.violation("%s is %s: %v", key, state, err)
	}
	for _, id := range append([]string{a.id}, a.jobs...) {
		if s := h.states[id]; !strings.HasSuffix(s, "_SUCCEEDED") {
			h.violation("%s: %s was last seen as %s", key, id, s)
		}
	}
	told, err := h.told(ctx, a)
	if err != nil || len(told) != len(a.jobs)+1 {
		h.violation("%s: %d statuses, %v", key, len(told), err)
	}
	for _, s := range told {
		if s.State != forge.StatusSuccess {
			h.violation("%s: the forge was told that %s is %s", key, s.Key, s.State)
		}
	}
}

// checkLog compares the log of a job's last attempt with what it printed, by
// its bytes and its row, and returns the name that it begins with.
func (h *history) checkLog(ctx context.Context, key, job string, db *bun.DB, read func(context.Context, string) ([]byte, error)) (name string) {
	var row struct {
		ID      string
		LogSize int64
		State   string
	}
	if err := db.NewRaw("SELECT id, log_size, state FROM attempts WHERE job_id = ? ORDER BY number DESC LIMIT 1", job).Scan(ctx, &row); err != nil {
		h.violation("%s: job %s has no attempt: %v", key, job, err)
		return ""
	}
	got, err := read(ctx, row.ID)
	if err != nil || row.State != "finished" {
		h.violation("%s: log of job %s, attempt %s: %v", key, job, row.State, err)
		return ""
	}
	first, _, _ := strings.Cut(string(got), "\n")
	want := printed(first)
	if !bytes.Equal(got, want) || row.LogSize != int64(len(want)) {
		h.violation("%s: the log of job %s differs: %d bytes, recorded as %d, want %d", first, job, len(got), row.LogSize, len(want))
	}
	return first
}

// checkLeft looks for machines and processes of the victim.
func (h *history) checkLeft() {
	entries, err := os.ReadDir(h.machines)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		h.violation("%v", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "sol-") {
			h.violation("the directory of machine %s is left", e.Name())
		}
	}
	for _, dir := range append(h.dirs, h.machines) {
		for pid, why := range processesOf(dir) {
			h.violation("process %s is left: %s", pid, why)
		}
	}
}

// processesOf finds the processes that have a directory, or something in it, as
// working directory, argument or in their environment. Where there is no /proc
// it finds nothing.
func processesOf(dir string) map[string]string {
	found := map[string]string{}
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		if filepath.Base(p) == fmt.Sprint(os.Getpid()) {
			continue
		}
		cwd, _ := os.Readlink(filepath.Join(p, "cwd")) // of a process that ended: nothing
		for _, file := range []string{"cmdline", "environ"} {
			text, _ := os.ReadFile(filepath.Join(p, file))
			cwd += " " + string(text)
		}
		if strings.Contains(cwd, dir) {
			found[filepath.Base(p)] = strings.ReplaceAll(cwd, "\x00", " ")
		}
	}
	return found
}
