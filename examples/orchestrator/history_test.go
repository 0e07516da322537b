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
	t      *testing.T
	dir    string // the victim's state directory
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

func newHistory(t *testing.T, dir string) *history {
	return &history{t: t, dir: dir, out: t.TempDir(), pause: "0.2", runs: map[string]accepted{}, states: map[string]string{}}
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
	db, err := storage.Database{DBPoolMaxSize: 2, DBPoolTimeoutMS: 60000}.Open(context.WithoutCancel(h.t.Context()), h.dir, nil)
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
		"held jobs":      "jobs WHERE hold_id <> ''",
		// Wake-ups of a killed process's subscription stay until that expires.
		"undelivered statuses": "queue_messages AS m JOIN queue_groups AS g ON g.id = m.gid WHERE g.topic LIKE 'status%' OR g.topic = 'runrequest'",
	} {
		var n int
		if err := db.NewRaw("SELECT count(*) FROM "+where).Scan(ctx, &n); err != nil {
			left = append(left, fmt.Sprintf("%s: %v", what, err))
		} else if n > 0 {
			left = append(left, fmt.Sprintf("%d %s are left", n, what))
		}
	}
	return left
}

// check compares everything with what was promised, after the orchestrator has
// ended.
func (h *history) check(ctx context.Context) []string {
	db := h.open()
	defer func() { _ = db.Close() }()
	var sound string
	if err := db.NewRaw("PRAGMA integrity_check").Scan(ctx, &sound); err != nil || sound != "ok" {
		h.violation("the database is not sound: %s, %v", sound, err)
	}
	for _, left := range h.rows(ctx, db) {
		h.violation("%s", left)
	}
	var runs int
	if err := db.NewRaw("SELECT count(*) FROM runs").Scan(ctx, &runs); err != nil || runs != len(h.runs) {
		h.violation("%d runs were accepted, there are %d: %v", len(h.runs), runs, err)
	}
	logs, err := filelog.Open(filepath.Join(h.dir, "logs"), filelog.Options{})
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = logs.Close() }()
	repos, err := localgit.Open(ctx, localgit.Config{Root: "/", StatusDir: filepath.Join(h.dir, "statuses")})
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = repos.Close() }()
	for key, a := range h.runs {
		h.checkRun(ctx, key, a, db, repos)
		names := jobNames(key)
		for _, id := range a.jobs {
			if name := h.checkLog(ctx, key, id, db, logs); name != "" {
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
	h.checkLeft()
	return h.found
}

// lost tells of the attempts of a run that were given up.
func (h *history) lost(ctx context.Context, run string, db *bun.DB) string {
	var attempts []struct{ MachineID, Class, Reason, Console string }
	err := db.NewRaw("SELECT machine_id, class, reason, console FROM attempts WHERE run_id = ? AND state = 'lost'", run).Scan(ctx, &attempts)
	return fmt.Sprintf("given up: %+v, %v", attempts, err)
}

// checkRun compares what was seen of a run with what is stored, and with what
// the forge was told in the end.
func (h *history) checkRun(ctx context.Context, key string, a accepted, db *bun.DB, repos *localgit.Forge) {
	var state string
	if err := db.NewRaw("SELECT state FROM runs WHERE id = ? AND idempotency_key = ?", a.id, key).Scan(ctx, &state); err != nil || state != "succeeded" {
		h.violation("%s is %s: %v", key, state, err)
	}
	for _, id := range append([]string{a.id}, a.jobs...) {
		if s := h.states[id]; !strings.HasSuffix(s, "_SUCCEEDED") {
			h.violation("%s: %s was last seen as %s", key, id, s)
		}
	}
	told, err := repos.Statuses(ctx, a.repo, a.commit)
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
// its bytes, its seal and its row, and returns the name that it begins with.
func (h *history) checkLog(ctx context.Context, key, job string, db *bun.DB, logs *filelog.Store) (name string) {
	var row struct {
		LogStream string
		LogSize   int64
		State     string
	}
	if err := db.NewRaw("SELECT log_stream, log_size, state FROM attempts WHERE job_id = ? ORDER BY number DESC LIMIT 1", job).Scan(ctx, &row); err != nil {
		h.violation("%s: job %s has no attempt: %v", key, job, err)
		return ""
	}
	info, err := logs.Stat(ctx, row.LogStream)
	if err != nil || !info.Sealed || row.State != "finished" {
		h.violation("%s: log of job %s, attempt %s: %+v, %v", key, job, row.State, info, err)
		return ""
	}
	var got []byte
	for c, err := range logs.Tail(ctx, row.LogStream, 0) {
		if err != nil {
			h.violation("%s: log of job %s: %v", key, job, err)
			return ""
		}
		got = append(got, c.Data...)
	}
	first, _, _ := strings.Cut(string(got), "\n")
	want := printed(first)
	sum := sha256.Sum256(want)
	if !bytes.Equal(got, want) || info.Size != int64(len(want)) || row.LogSize != info.Size || !bytes.Equal(info.SHA256, sum[:]) {
		h.violation("%s: the log of job %s differs: %d bytes, sealed with %d, recorded as %d, want %d", first, job, len(got), info.Size, row.LogSize, len(want))
	}
	return first
}

// checkLeft looks for machines and processes of the victim.
func (h *history) checkLeft() {
	entries, err := os.ReadDir(filepath.Join(h.dir, "machines"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		h.violation("%v", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "sol-") {
			h.violation("the directory of machine %s is left", e.Name())
		}
	}
	for pid, why := range processesOf(h.dir) {
		h.violation("process %s is left: %s", pid, why)
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
