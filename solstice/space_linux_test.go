package solstice_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/solstice-ci/solstice-go/blobstore/fsblob"
	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/sqlqueue"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
	"github.com/solstice-ci/solstice-go/solstice/logstream/filelog"
)

// disk is a small file system.
type disk struct {
	t   *testing.T
	dir string
}

func newDisk(t *testing.T, megabytes int) *disk {
	t.Helper()
	d := &disk{t: t, dir: t.TempDir()}
	if err := syscall.Mount("tmpfs", d.dir, "tmpfs", 0, fmt.Sprintf("size=%dm", megabytes)); err != nil {
		testenv.Missing(t, "tmpfs", "run as root: "+err.Error())
	}
	t.Cleanup(func() { _ = syscall.Unmount(d.dir, syscall.MNT_DETACH) })
	return d
}

func (d *disk) path(name string) string { return filepath.Join(d.dir, name) }

func (d *disk) resize(megabytes int) {
	d.t.Helper()
	if err := syscall.Mount("tmpfs", d.dir, "tmpfs", syscall.MS_REMOUNT, fmt.Sprintf("size=%dm", megabytes)); err != nil {
		d.t.Fatal(err)
	}
}

// fill leaves so many bytes, and returns what frees the rest again.
func (d *disk) fill(leave int64) (free func()) {
	d.t.Helper()
	f, err := os.OpenFile(d.path("ballast"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	for {
		var st syscall.Statfs_t
		if err := syscall.Statfs(d.dir, &st); err != nil {
			d.t.Fatal(err)
		}
		n := int64(st.Bavail)*st.Bsize - leave
		if n <= 0 {
			break
		}
		if _, err := f.Write(make([]byte, n)); err != nil && !errors.Is(err, syscall.ENOSPC) {
			d.t.Fatal(err)
		}
	}
	return func() {
		d.t.Helper()
		if err := os.Remove(d.path("ballast")); err != nil {
			d.t.Fatal(err)
		}
	}
}

// sqlite is the URL of a database on the disk.
func (d *disk) sqlite() string { return "sqlite:" + d.path("test.db") }

// postgres is the URL of a database of which all but the log of transactions is
// on the disk.
func (d *disk) postgres() string {
	d.t.Helper()
	if err := os.Chmod(filepath.Dir(d.dir), 0o711); err != nil { // for the server's user
		d.t.Fatal(err)
	}
	return testenv.StartPostgres(d.t).DatabaseIn(d.t, d.dir)
}

// stored has an engine keep its logs on the disk, too.
func (d *disk) stored(database string) (*plant, func(*solstice.Config)) {
	d.t.Helper()
	p := newPlant(d.t, database)
	logs, err := filelog.Open(d.path("logs"), filelog.Options{})
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { _ = logs.Close() })
	return p, func(c *solstice.Config) { c.Logs = logs }
}

// healthy checks the SQLite file after the disk was full.
func (d *disk) healthy(p *plant) {
	d.t.Helper()
	var said string
	if err := p.openDB(d.t).NewRaw("PRAGMA integrity_check").Scan(context.Background(), &said); err != nil || said != "ok" {
		d.t.Errorf("integrity_check: %q, %v", said, err)
	}
}

// TestLowWater: below the mark nothing is accepted and no job begun, and the
// engine says so, once; what is under way goes on; above it all goes on.
func TestLowWater(t *testing.T) {
	d := newDisk(t, 8)
	p, embedded := d.stored(d.sqlite())
	p.Capacity = 2
	heard, log := hear(t)
	eng, _ := p.start(t, embedded, log, func(c *solstice.Config) {
		c.Space = solstice.Space{Dirs: []string{d.dir}, MinFree: 3 << 20}
	})
	workflow, begun, open := gated(p, 3) // for two there are slots
	r := p.submit(t, eng, workflow)
	eventually(t, "two jobs run", func() bool { return begun() == 2 })
	quiet := p.commit(t, map[string]string{".solstice/workflow.yaml": echo})
	submit := func(key string) ([]solstice.Run, error) {
		return eng.Submit(t.Context(), solstice.RunRequest{Repo: forge.Repo{Name: "repo"}, Commit: quiet, IdempotencyKey: key})
	}
	if err := eng.Ready(t.Context()); err != nil {
		t.Errorf("not ready: %v", err)
	}

	free := d.fill(2 << 20)
	eventually(t, "the engine notices", func() bool { return heard.said("no room on disk") })
	if _, err := submit("a"); !errors.Is(err, solstice.ErrNoSpace) {
		t.Errorf("submit: %v, want ErrNoSpace", err)
	}
	if _, err := eng.Rerun(t.Context(), r.ID, solstice.RerunOptions{}); !errors.Is(err, solstice.ErrNoSpace) {
		t.Errorf("rerun: %v, want ErrNoSpace", err)
	}
	if err := eng.Ready(t.Context()); !errors.Is(err, solstice.ErrNotReady) || !errors.Is(err, solstice.ErrNoSpace) || !strings.Contains(err.Error(), d.dir) {
		t.Errorf("ready: %v, want ErrNoSpace", err)
	}
	// Another process asks for a run.
	q, err := sqlqueue.New(t.Context(), p.openDB(t), sqlqueue.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = q.Close() })
	m, err := messages.Encode(messages.RunRequest{Repo: forge.Repo{Name: "repo"}, Commit: quiet, IdempotencyKey: "queued"})
	if err != nil {
		t.Fatal(err)
	}
	if err := q.Publish(t.Context(), messages.TopicRunRequest, []queue.Message{m}, queue.PublishOptions{}); err != nil {
		t.Fatal(err)
	}
	open()
	eventually(t, "what is under way ends", func() bool {
		now, err := eng.GetRun(t.Context(), r.ID)
		if err != nil {
			t.Fatal(err)
		}
		over := 0
		for _, j := range now.Jobs {
			if j.State.Terminal() {
				over++
			}
		}
		return over == 2
	})
	if n := begun(); n != 2 {
		t.Errorf("%d jobs began, two were under way", n)
	}
	if n := heard.count("no room on disk"); n != 1 {
		t.Errorf("said %d times", n)
	}
	runs, err := eng.Runs(t.Context(), solstice.RunFilter{})
	if err != nil || len(runs) != 1 {
		t.Errorf("%d runs, %v: one was accepted", len(runs), err)
	}

	free()
	eventually(t, "the engine notices", func() bool { return heard.said("there is room on disk again") })
	ranOnce(t, p, eng, finish(t, eng, r.ID))
	if err := eng.Ready(t.Context()); err != nil {
		t.Errorf("not ready: %v", err)
	}
	more, err := submit("a")
	if err != nil {
		t.Fatal(err)
	}
	finish(t, eng, more[0].ID)
	eventually(t, "what was asked for by the queue is accepted", func() bool {
		again, err := submit("queued")
		return err == nil && finish(t, eng, again[0].ID).State == solstice.RunSucceeded
	})
	runs, err = eng.Runs(t.Context(), solstice.RunFilter{})
	if err != nil || len(runs) != 3 {
		t.Errorf("%d runs, %v, want 3", len(runs), err)
	}
}

// TestDatabaseDiskFull fills the disk of the database and the logs, with no mark
// that would stop intake before: what was accepted stays, and nothing else is.
func TestDatabaseDiskFull(t *testing.T) {
	t.Run("sqlite", func(t *testing.T) {
		d := newDisk(t, 8)
		p := databaseDiskFull(t, d, d.sqlite(), 200<<10)
		d.healthy(p)
	})
	t.Run("postgres", func(t *testing.T) {
		d := newDisk(t, 64)
		databaseDiskFull(t, d, d.postgres(), 40<<10)
	})
}

func databaseDiskFull(t *testing.T, d *disk, database string, leave int64) *plant {
	t.Helper()
	p, embedded := d.stored(database)
	heard, log := hear(t)
	eng, _ := p.start(t, embedded, log)
	workflow, begun, open := gated(p, 3)
	r := p.submit(t, eng, workflow)
	eventually(t, "the jobs run", func() bool { return begun() == 3 })
	commit := p.commit(t, map[string]string{".solstice/workflow.yaml": echo})
	var accepted []string
	submit := func() error {
		runs, err := eng.Submit(t.Context(), solstice.RunRequest{Repo: forge.Repo{Name: "repo"}, Commit: commit, IdempotencyKey: fmt.Sprint(len(accepted))})
		if err == nil {
			accepted = append(accepted, runs[0].ID)
		}
		return err
	}
	if err := submit(); err != nil {
		t.Fatal(err)
	}
	free := d.fill(leave)
	eventually(t, "nothing more is accepted", func() bool {
		err := submit()
		if err != nil && !errors.Is(err, solstice.ErrNoSpace) {
			t.Errorf("submit: %v, want ErrNoSpace", err)
		}
		return err != nil
	})
	open() // what the jobs print now finds no room
	eventually(t, "the engine says so", func() bool {
		return heard.said("no room on disk") && errors.Is(eng.Ready(t.Context()), solstice.ErrNoSpace)
	})
	free()
	ranOnce(t, p, eng, finish(t, eng, r.ID))
	for _, id := range accepted {
		if r := finish(t, eng, id); r.State != solstice.RunSucceeded || jobLog(t, eng, r.Jobs[0].ID) != "hi\n" {
			t.Errorf("a run that was accepted is %s: %s", r.State, r.Reason)
		}
	}
	eventually(t, "runs are accepted again", func() bool {
		return submit() == nil && eng.Ready(t.Context()) == nil
	})
	runs, err := eng.Runs(t.Context(), solstice.RunFilter{})
	if err != nil || len(runs) != len(accepted)+1 {
		t.Errorf("%d runs, %v, want %d", len(runs), err, len(accepted)+1)
	}
	eventually(t, "all is over", func() bool {
		runs, err := eng.Runs(t.Context(), solstice.RunFilter{States: []solstice.RunState{solstice.RunQueued, solstice.RunRunning}})
		return err == nil && len(runs) == 0
	})
	return p
}

// TestLogDiskFull fills the file system that logs are on: what was acknowledged
// stays, and the job's log is whole once there is room again.
func TestLogDiskFull(t *testing.T) {
	for name, on := range map[string]func(t *testing.T, dir string) func(*solstice.Config){
		"filelog": func(t *testing.T, dir string) func(*solstice.Config) {
			logs, err := filelog.Open(dir, filelog.Options{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = logs.Close() })
			return func(c *solstice.Config) { c.Logs = logs }
		},
		"fsblob": func(t *testing.T, dir string) func(*solstice.Config) {
			blobs, err := fsblob.Open(dir, fsblob.Options{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = blobs.Close() })
			return func(c *solstice.Config) { c.Blobs = blobs }
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDisk(t, 3)
			p := newPlant(t, testenv.SQLite(t))
			heard, log := hear(t)
			eng, _ := p.start(t, log, on(t, d.path("store")))
			r := p.submit(t, eng, "checkout: false\njobs: { a: { steps: [ { run: 'seq 1 1000000' } ] } }\n")
			eventually(t, "the disk is full", func() bool { return heard.said("no space left on device") })
			eventually(t, "intake stops", func() bool { return errors.Is(eng.Ready(t.Context()), solstice.ErrNoSpace) })
			d.resize(64)
			r = finish(t, eng, r.ID)
			var want strings.Builder
			for i := 1; i <= 1000000; i++ {
				fmt.Fprintln(&want, i)
			}
			got := jobLog(t, eng, r.Jobs[0].ID)
			if r.State != solstice.RunSucceeded || r.Jobs[0].Attempts != 1 || got != want.String() {
				t.Errorf("run is %s after %d attempts, log of %d bytes, want %d", r.State, r.Jobs[0].Attempts, len(got), want.Len())
			}
			eventually(t, "intake goes on", func() bool { return eng.Ready(t.Context()) == nil })
		})
	}
}
