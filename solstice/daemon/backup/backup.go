// Package backup copies the embedded state of a daemon, its state directory,
// into one file, also while the daemon runs, and makes a state directory of such
// a file.
//
// The file is a tar archive: first FirstName, which says what it is, then the
// files of the state directory (a snapshot of the database, logs, the
// certificate authority, the first token, statuses, agents for guests), at the
// end a list of them with sizes and SHA-256, and the SHA-256 of that list. It
// holds secrets.
//
// The database is first, so the logs are at least as long as it says. Meanwhile
// retention removes nothing: the backup holds its lease.
package backup

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"time"

	"github.com/google/uuid"
	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
	"github.com/solstice-ci/solstice-go/solstice/logstream/filelog"
)

// Format is the version of the archive that this package writes and reads.
const Format = 1

// Names in an archive that are not the state directory's.
const (
	FirstName = "solstice-backup.json"
	listName  = "files.json"
	sumName   = "files.json.sha256"
)

// Names in the state directory.
const (
	database   = "solstice.db"
	logs       = "logs"
	daemonName = "orchestrator" // whose lock the state directory's is
)

// What is copied as it is, where it is there.
var (
	singleFiles = []string{"ca.pem", "admin.token"}
	directories = []string{"statuses", "runner"}
)

// Info says what an archive is.
type Info struct {
	Format    int       `json:"format"`
	Schema    string    `json:"schema"`  // the last migration of its database
	Version   string    `json:"version"` // of the program that made it
	CreatedAt time.Time `json:"created_at"`
	Files     int       `json:"-"` // in it, without its own
	Bytes     int64     `json:"-"` // of them
}

// file is an entry of the list.
type file struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// Source is what to back up.
type Source struct {
	StateDir string
	DB       *bun.DB // SQLite, with the schema of this program
}

// Create makes an archive of the embedded state in a file that does not exist
// yet, of mode 0600. The daemon may be running. The file appears whole or not at
// all; what a killed Create leaves beside it the next one removes.
func Create(ctx context.Context, name string, s Source) (Info, error) {
	if sqldb.IsPostgres(s.DB) {
		return Info{}, problem("a backup of PostgreSQL is not made by this program", nil, "use pg_dump, and then copy the blob store, which may hold more than the dump speaks of")
	}
	info := Info{Format: Format, Version: daemon.Version(), CreatedAt: time.Now().UTC().Truncate(time.Second)}
	if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
		if err == nil {
			err = fs.ErrExist
		}
		return info, problem("cannot write the backup "+name, err, "choose a file that does not exist")
	}
	err := create(ctx, name, s, &info)
	var p *daemon.Problem
	if err != nil && !errors.As(err, &p) {
		err = problem("cannot make the backup", err, "")
	}
	return info, err
}

func create(ctx context.Context, name string, s Source, info *Info) (err error) {
	st, err := store.New(ctx, s.DB, store.Options{})
	if errors.Is(err, store.ErrSchema) {
		return problem("the database's schema is not this version's", err, "make the backup with the version that uses it")
	}
	if err != nil {
		return err
	}
	if info.Schema, err = store.SchemaOf(ctx, s.DB); err != nil {
		return err
	}
	if err := settle(s.StateDir); err != nil {
		return err
	}
	work, done, err := workDir(filepath.Dir(name), filepath.Base(name), "backup")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	ctx, release, err := holdLogs(ctx, st)
	if err != nil {
		return err
	}
	defer release()

	snapshot := filepath.Join(work, database)
	if _, err := s.DB.NewRaw("VACUUM INTO ?", snapshot).Exec(ctx); err != nil {
		return fmt.Errorf("snapshot of the database: %w", err)
	}
	archive := filepath.Join(work, "archive")
	out, err := os.OpenFile(archive, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	w := &writer{ctx: ctx, tar: tar.NewWriter(out), info: info}
	err = w.all(s.StateDir, snapshot)
	if err = errors.Join(err, context.Cause(ctx), out.Sync(), out.Close()); err != nil {
		return err
	}
	if err := os.Rename(archive, name); err != nil {
		return err
	}
	return syncDir(filepath.Dir(name))
}

// settle brings to the logs' files what a daemon that was killed, or lost power,
// has only in its journal. One that runs does so by itself.
func settle(stateDir string) error {
	dir := filepath.Join(stateDir, logs)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	unlock, err := storage.Lock(stateDir, daemonName)
	if errors.Is(err, storage.ErrLocked) {
		return nil
	}
	if err != nil {
		return err
	}
	l, err := filelog.Open(dir, filelog.Options{})
	if err == nil {
		err = l.Close()
	}
	return errors.Join(err, unlock())
}

// How long the lease is taken for, and how often it is renewed.
const (
	leaseTTL = time.Minute
	renewal  = leaseTTL / 4
)

// holdLogs keeps retention from removing logs until release is called. The
// context ends when that cannot be said any more.
func holdLogs(ctx context.Context, st *store.Store) (held context.Context, release func(), err error) {
	owner := "backup/" + uuid.NewString()
	for { // a collector lets go after a while
		mine, err := st.Lease(ctx, store.CollectorLease, owner, leaseTTL)
		if err != nil {
			return nil, nil, err
		}
		if mine {
			break
		}
		select {
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	held, cancel := context.WithCancelCause(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-held.Done():
				return
			case <-time.After(renewal):
			}
			mine, err := st.Lease(held, store.CollectorLease, owner, leaseTTL)
			if err == nil && !mine {
				err = errors.New("retention could not be kept from removing logs")
			}
			if err != nil {
				cancel(err)
				return
			}
		}
	}()
	return held, func() {
		cancel(nil)
		<-ended
		after, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		_ = st.Unlease(after, store.CollectorLease, owner) // otherwise it expires
	}, nil
}

// writer writes an archive and remembers what is in it.
type writer struct {
	ctx  context.Context
	tar  *tar.Writer
	info *Info
	list []file
}

func (w *writer) all(stateDir, snapshot string) error {
	first, err := json.Marshal(w.info)
	if err != nil {
		return err
	}
	if err := w.bytes(FirstName, first); err != nil {
		return err
	}
	if err := w.file(database, snapshot); err != nil {
		return err
	}
	err = filelog.Snapshot(w.ctx, filepath.Join(stateDir, logs), func(name string, size int64, r io.Reader) error {
		return w.add(path.Join(logs, name), size, r)
	})
	if err != nil {
		return err
	}
	for _, name := range singleFiles {
		if err := w.file(name, filepath.Join(stateDir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for _, dir := range directories {
		if err := w.directory(stateDir, dir); err != nil {
			return err
		}
	}
	w.info.Files = len(w.list)
	list, err := json.Marshal(w.list)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(list)
	return errors.Join(w.bytes(listName, list), w.bytes(sumName, []byte(hex.EncodeToString(sum[:]))), w.tar.Close())
}

// directory adds the regular files of a directory of the state directory. They
// may grow meanwhile.
func (w *writer) directory(stateDir, dir string) error {
	return fs.WalkDir(os.DirFS(stateDir), dir, func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			err = w.file(name, filepath.Join(stateDir, filepath.FromSlash(name)))
		}
		if errors.Is(err, fs.ErrNotExist) { // gone just now
			return nil
		}
		return err
	})
}

func (w *writer) file(name, from string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // only read from
	info, err := f.Stat()
	if err != nil {
		return err
	}
	return w.add(name, info.Size(), f)
}

// add adds size bytes of r.
func (w *writer) add(name string, size int64, r io.Reader) error {
	if err := w.header(name, size); err != nil {
		return err
	}
	h := sha256.New()
	if _, err := io.CopyN(io.MultiWriter(w.tar, h), contextReader{w.ctx, r}, size); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	w.list = append(w.list, file{name, size, hex.EncodeToString(h.Sum(nil))})
	w.info.Bytes += size
	return nil
}

// bytes adds what belongs to the archive itself.
func (w *writer) bytes(name string, data []byte) error {
	if err := w.header(name, int64(len(data))); err != nil {
		return err
	}
	_, err := w.tar.Write(data)
	return err
}

func (w *writer) header(name string, size int64) error {
	return w.tar.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o600, ModTime: w.info.CreatedAt})
}

type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c contextReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}

func problem(what string, err error, advice string) error {
	return &daemon.Problem{What: what, Err: err, Advice: advice}
}
