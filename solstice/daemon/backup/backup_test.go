package backup

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
	"github.com/solstice-ci/solstice-go/solstice/logstream/filelog"
)

// state makes a state directory, which nobody has open but the test, and its
// database.
func state(t *testing.T) (string, *bun.DB) {
	t.Helper()
	dir := t.TempDir()
	for name, content := range map[string]string{
		"ca.pem": "key", "admin.token": "sol_X\n", "statuses/a%2Fb/c0ffee.jsonl": "\n{}\n", "runner/agent-linux-amd64": strings.Repeat("agent", 1000),
		"machines/sol-1/console": "not kept", "solstice.db.old.bak": "not kept",
	} {
		path := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(path), 0o700))
		must(t, os.WriteFile(path, []byte(content), 0o600))
	}
	l, err := filelog.Open(filepath.Join(dir, "logs"), filelog.Options{NoSync: true})
	must(t, err)
	for i := range 3 {
		name := fmt.Sprintf("runs/%d/log", i)
		_, err := l.Append(t.Context(), name, logstream.AppendOptions{Epoch: 1}, 0, fmt.Appendf(nil, "log %d\n", i))
		must(t, err)
		if i > 0 { // the first is under way
			must(t, l.Seal(t.Context(), name, logstream.SealOptions{Epoch: 1, Size: -1}))
		}
	}
	must(t, l.Close())
	db := openDB(t, "sqlite:"+filepath.Join(dir, "solstice.db"))
	must(t, store.Migrate(t.Context(), db))
	s, err := store.New(t.Context(), db, store.Options{})
	must(t, err)
	must(t, s.InsertRun(t.Context(), &store.Run{ID: "run-1", State: store.RunErrored, WorkflowPath: "w"}, nil))
	return dir, db
}

func openDB(t *testing.T, url string) *bun.DB {
	t.Helper()
	db, err := sqldb.Open(t.Context(), url, sqldb.Options{})
	must(t, err)
	t.Cleanup(func() { _ = db.Close() })
	return db
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// archive makes a backup.
func archive(t *testing.T) string {
	t.Helper()
	dir, db := state(t)
	name := filepath.Join(t.TempDir(), "backup.tar")
	_, err := Create(t.Context(), name, Source{dir, db})
	must(t, err)
	return name
}

// problemWith checks that an error is a diagnostic with this text in it.
func problemWith(t *testing.T, what string, err error, text string) {
	t.Helper()
	var p *daemon.Problem
	if !errors.As(err, &p) || !strings.Contains(fmt.Sprint(p.What, p.Err, p.Advice), text) {
		t.Errorf("%s: %v, want %q", what, err, text)
	}
}

// only lists what is in a directory.
func only(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if strings.Join(names, " ") != strings.Join(want, " ") {
		t.Errorf("%s has %q, want %q", dir, names, want)
	}
}

func TestRoundTrip(t *testing.T) {
	dir, db := state(t)
	name := filepath.Join(t.TempDir(), "backup.tar")
	made, err := Create(t.Context(), name, Source{dir, db})
	must(t, err)
	st, err := os.Stat(name)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the archive: %v, %v", st.Mode(), err)
	}
	only(t, filepath.Dir(name), "backup.tar")

	to := filepath.Join(t.TempDir(), "new", "state")
	got, err := Restore(t.Context(), name, to)
	must(t, err)
	if got != made || got.Files < 10 || got.Schema == "" || time.Since(got.CreatedAt) > time.Hour {
		t.Errorf("made %+v, restored %+v", made, got)
	}
	only(t, to, "admin.token", "ca.pem", "logs", "orchestrator.lock", "runner", "solstice.db", "statuses")
	only(t, filepath.Dir(to), "state")
	for _, f := range []string{"ca.pem", "admin.token", "statuses/a%2Fb/c0ffee.jsonl", "runner/agent-linux-amd64"} {
		want, err := os.ReadFile(filepath.Join(dir, f))
		must(t, err)
		if got, err := os.ReadFile(filepath.Join(to, f)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is %q, %v", f, got, err)
		}
	}
	s, err := store.New(t.Context(), openDB(t, "sqlite:"+filepath.Join(to, "solstice.db")), store.Options{})
	must(t, err)
	if r, err := s.Run(t.Context(), "run-1"); err != nil || r.State != store.RunErrored {
		t.Errorf("the run: %+v, %v", r, err)
	}
	l, err := filelog.Open(filepath.Join(to, "logs"), filelog.Options{})
	must(t, err)
	defer func() { must(t, l.Close()) }()
	for i := range 3 {
		info, err := l.Stat(t.Context(), fmt.Sprintf("runs/%d/log", i))
		if err != nil || info.Size != 6 || info.Sealed != (i > 0) {
			t.Errorf("log %d: %+v, %v", i, info, err)
		}
	}
	if unlock, err := storage.Lock(to, "orchestrator"); err != nil {
		t.Errorf("the restored directory is locked: %v", err)
	} else {
		must(t, unlock())
	}
}

func TestCreateRefuses(t *testing.T) {
	dir, db := state(t)
	there := filepath.Join(t.TempDir(), "there")
	must(t, os.WriteFile(there, []byte("precious"), 0o600))
	_, err := Create(t.Context(), there, Source{dir, db})
	problemWith(t, "a file that exists", err, "does not exist")
	if data, err := os.ReadFile(there); string(data) != "precious" {
		t.Errorf("it has %q, %v", data, err)
	}
	_, err = Create(t.Context(), filepath.Join(dir, "none", "backup"), Source{dir, db})
	problemWith(t, "no directory", err, "no such file")
	old := openDB(t, testenv.SQLite(t))
	_, err = Create(t.Context(), filepath.Join(t.TempDir(), "b"), Source{dir, old})
	problemWith(t, "another schema", err, "version")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	into := t.TempDir()
	if _, err = Create(ctx, filepath.Join(into, "b"), Source{dir, db}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	only(t, into)
}

func TestCreateOnPostgres(t *testing.T) {
	db := openDB(t, testenv.Postgres(t))
	_, err := Create(t.Context(), filepath.Join(t.TempDir(), "b"), Source{t.TempDir(), db})
	problemWith(t, "PostgreSQL", err, "pg_dump")
}

// TestRetentionWaits: from the snapshot on no log is removed.
func TestRetentionWaits(t *testing.T) {
	_, db := state(t)
	s, err := store.New(t.Context(), db, store.Options{})
	must(t, err)
	take := func(owner string) bool {
		t.Helper()
		mine, err := s.Lease(t.Context(), store.CollectorLease, owner, time.Minute)
		must(t, err)
		return mine
	}
	if !take("collector") {
		t.Fatal("the lease is not free")
	}
	type result struct {
		release func()
		err     error
	}
	got := make(chan result)
	go func() {
		_, release, err := holdLogs(t.Context(), s)
		got <- result{release, err}
	}()
	select {
	case <-got:
		t.Error("a backup begins while a collector is at work")
	default:
	}
	must(t, s.Unlease(t.Context(), store.CollectorLease, "collector"))
	r := <-got
	must(t, r.err)
	if take("collector") {
		t.Error("a collector works while a backup does")
	}
	r.release()
	if !take("collector") {
		t.Error("the lease is not given back")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := holdLogs(ctx, s); !errors.Is(err, context.Canceled) {
		t.Errorf("waiting for a collector: %v", err)
	}
}

func TestRestoreRefusesATargetInUse(t *testing.T) {
	name := archive(t)
	parent := t.TempDir()
	full := filepath.Join(parent, "full")
	must(t, os.Mkdir(full, 0o700))
	must(t, os.WriteFile(filepath.Join(full, "precious"), nil, 0o600))
	_, err := Restore(t.Context(), name, full)
	problemWith(t, "a directory with something in it", err, "precious")
	only(t, full, "precious")

	used := filepath.Join(parent, "used")
	must(t, os.Mkdir(used, 0o700))
	unlock, err := storage.Lock(used, "orchestrator")
	must(t, err)
	_, err = Restore(t.Context(), name, used)
	if !errors.Is(err, storage.ErrLocked) {
		t.Errorf("a directory in use: %v", err)
	}
	only(t, used, "orchestrator.lock")
	must(t, unlock())
	_, err = Restore(t.Context(), name, used)
	must(t, err)
	only(t, parent, "full", "used")

	file := filepath.Join(parent, "file")
	must(t, os.WriteFile(file, nil, 0o600))
	_, err = Restore(t.Context(), name, file)
	problemWith(t, "a file", err, "not a directory")
	_, err = Restore(t.Context(), filepath.Join(parent, "none"), filepath.Join(parent, "new"))
	problemWith(t, "no archive", err, "no such file")
}

// refused restores damaged archives, which must touch nothing.
func refused(t *testing.T, what string, data []byte, text string) {
	t.Helper()
	dir := t.TempDir()
	name := filepath.Join(dir, "backup")
	must(t, os.WriteFile(name, data, 0o600))
	_, err := Restore(t.Context(), name, filepath.Join(dir, "state"))
	problemWith(t, what, err, text)
	only(t, dir, "backup")
}

func TestDamagedArchives(t *testing.T) {
	data, err := os.ReadFile(archive(t))
	must(t, err)
	refused(t, "empty", nil, "damaged")
	refused(t, "something else", []byte(strings.Repeat("no archive", 1000)), "damaged")
	// The end of a tar archive is two empty blocks, which say nothing.
	last := len(bytes.TrimRight(data, "\x00"))
	for n := 1; n < last; n += 1 + last/60 {
		refused(t, fmt.Sprintf("cut after %d of %d bytes", n, last), data[:n], "damaged")
	}
	// One byte of every block is changed; what is behind the end of an entry is
	// none of it.
	for at := 100; at < last; at += 512 * (1 + last/512/60) {
		if data[at] == 0 && bytes.Count(data[at&^511:at&^511+512], []byte{0}) > 300 {
			continue // most likely padding
		}
		changed := bytes.Clone(data)
		changed[at] ^= 0x20
		refused(t, fmt.Sprintf("byte %d is changed", at), changed, "")
	}
}

// rewrite makes an archive of other entries.
func rewrite(t *testing.T, entries ...any) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	var list []file
	for i := 0; i < len(entries); i += 2 {
		name, content := entries[i].(string), entries[i+1].(string)
		must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(content)), Mode: 0o600}))
		_, err := io.WriteString(w, content)
		must(t, err)
		if i > 0 {
			sum := sha256.Sum256([]byte(content))
			list = append(list, file{name, int64(len(content)), hex.EncodeToString(sum[:])})
		}
	}
	text, err := json.Marshal(list)
	must(t, err)
	sum := sha256.Sum256(text)
	for name, content := range map[string]string{listName: string(text)} {
		must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(content))}))
		_, err := io.WriteString(w, content)
		must(t, err)
	}
	must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: sumName, Size: 64}))
	_, err = io.WriteString(w, hex.EncodeToString(sum[:]))
	must(t, errors.Join(err, w.Close()))
	return b.Bytes()
}

func TestArchivesOfOtherMaking(t *testing.T) {
	schema, err := store.SchemaOf(t.Context(), func() *bun.DB { _, db := state(t); return db }())
	must(t, err)
	good := fmt.Sprintf(`{"format":1,"schema":%q,"version":"v9"}`, schema)
	dir := t.TempDir()
	name := filepath.Join(dir, "good")
	must(t, os.WriteFile(name, rewrite(t, FirstName, good, database, "x"), 0o600))
	if _, err := Restore(t.Context(), name, filepath.Join(dir, "state")); err != nil {
		t.Fatalf("the archive that the others are made of: %v", err)
	}
	for _, c := range []struct {
		what, text string
		entries    []any
	}{
		{"a later format", "format 2", []any{FirstName, `{"format":2,"version":"v9"}`, database, "x"}},
		{"no format", "format 0", []any{FirstName, `{}`, database, "x"}},
		{"a later schema", "20990101000000_later", []any{FirstName, `{"format":1,"schema":"20990101000000_later","version":"v9"}`, database, "x"}},
		{"no schema", "schema", []any{FirstName, `{"format":1}`, database, "x"}},
		{"no database", "no database", []any{FirstName, good, "ca.pem", "x"}},
		{"another beginning", "begin", []any{"readme", good, database, "x"}},
		{"twice the same", "twice", []any{FirstName, good, database, "x", database, "y"}},
		{"a way out", "no file of a state directory", []any{FirstName, good, database, "x", "logs/../../evil", "x"}},
		{"an absolute name", "no file of a state directory", []any{FirstName, good, database, "x", "/logs/evil", "x"}},
		{"a file of no backup", "no file of a state directory", []any{FirstName, good, database, "x", "orchestrator.lock", "x"}},
	} {
		refused(t, c.what, rewrite(t, c.entries...), c.text)
	}
}

// TestLeftovers: what was killed is removed, what is in use stays.
func TestLeftovers(t *testing.T) {
	name := archive(t)
	parent := t.TempDir()
	to := filepath.Join(parent, "state")
	for _, d := range []string{".state.restore-1", ".state.restore-2", ".other.restore-1"} {
		must(t, os.MkdirAll(filepath.Join(parent, d, "logs"), 0o700))
	}
	unlock, err := storage.Lock(filepath.Join(parent, ".state.restore-2"), "orchestrator")
	must(t, err)
	_, err = Restore(t.Context(), name, to)
	must(t, err)
	only(t, parent, ".other.restore-1", ".state.restore-2", "state")
	must(t, unlock())
	if err := os.Mkdir(to, 0o700); !errors.Is(err, fs.ErrExist) {
		t.Error(err)
	}
}
