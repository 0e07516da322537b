// Package storage holds the flag groups of a daemon that keep state: database,
// blobs and queue. Each opens what it describes. They are apart from package
// daemon so that programs without them do not link a database driver.
package storage

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/uptrace/bun"
	"go.opentelemetry.io/otel"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/blobstore/fsblob"
	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/queue/sqlqueue"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
)

// Database are the flags of the database.
type Database struct {
	DatabaseURL          string `group:"Database" env:"DATABASE_URL" placeholder:"URL" help:"postgres://USER:PASSWORD@HOST/NAME or sqlite:FILE. Default: SQLite in the state directory."`
	DatabaseURLFile      string `group:"Database" env:"DATABASE_URL_FILE" placeholder:"FILE" help:"File with the database's URL."`
	DBPoolMaxSize        int    `group:"Database" name:"db-pool-max-size" env:"DB_POOL_MAX_SIZE" default:"16" help:"Most connections at once."`
	DBPoolTimeoutMS      int    `group:"Database" name:"db-pool-timeout-ms" env:"DB_POOL_TIMEOUT_MS" default:"5000" help:"Longest wait for a connection."`
	DBStatementTimeoutMS int    `group:"Database" name:"db-statement-timeout-ms" env:"DB_STATEMENT_TIMEOUT_MS" default:"0" help:"Longest time for a statement; 0: no limit."`
}

// Open connects, and returns once the database answered. Without a URL it is
// SQLite, in the file solstice.db of stateDir. A nil log discards.
func (d Database) Open(ctx context.Context, stateDir string, log *slog.Logger) (*bun.DB, error) {
	if d.DBPoolMaxSize < 1 || d.DBPoolTimeoutMS < 1 || d.DBStatementTimeoutMS < 0 {
		return nil, usage("the sizes and timeouts of the database must be positive", "correct --db-pool-max-size, --db-pool-timeout-ms or --db-statement-timeout-ms")
	}
	url, err := daemon.Secret("database-url", d.DatabaseURL, d.DatabaseURLFile)
	if err != nil {
		return nil, err
	}
	if url == "" {
		if stateDir == "" {
			return nil, usage("there is neither a database nor a state directory for one", "give --database-url or --state-dir")
		}
		url = "sqlite:" + filepath.Join(stateDir, "solstice.db")
	}
	db, err := sqldb.Open(ctx, url, sqldb.Options{
		MaxConns:         d.DBPoolMaxSize,
		PoolTimeout:      time.Duration(d.DBPoolTimeoutMS) * time.Millisecond,
		StatementTimeout: time.Duration(d.DBStatementTimeoutMS) * time.Millisecond,
		Logger:           log,
		TracerProvider:   otel.GetTracerProvider(),
	})
	if err != nil {
		return nil, &daemon.Problem{What: "cannot open the database", Err: err, Advice: databaseAdvice(err)}
	}
	return db, nil
}

func databaseAdvice(err error) string {
	for _, known := range []struct {
		is     error
		advice string
	}{
		{sqldb.ErrURL, "give --database-url as postgres://USER:PASSWORD@HOST:5432/NAME or sqlite:FILE"},
		{sqldb.ErrHostNotFound, "the host in --database-url does not resolve: check its spelling and this machine's DNS"},
		{sqldb.ErrRefused, "nothing answers at host and port of --database-url: start PostgreSQL, or correct them"},
		{sqldb.ErrUnreachable, "the host in --database-url does not answer: check the address, and firewalls on the way"},
		{sqldb.ErrAuth, "correct user and password in --database-url, or what pg_hba.conf on the server allows"},
		{sqldb.ErrNoDatabase, "create the database (createdb NAME), or correct its name in --database-url"},
		{sqldb.ErrTLS, "check sslmode and sslrootcert in --database-url against what the server offers"},
		{sqldb.ErrFile, "check that the file is a SQLite database, and owner and mode of it and its directory"},
		{sqldb.ErrPoolTimeout, "another program holds the database: stop it, or raise --db-pool-timeout-ms"},
	} {
		if errors.Is(err, known.is) {
			return known.advice
		}
	}
	return ""
}

// Blobs is the flag of the blob store, a directory.
type Blobs struct {
	BlobFSRoot string `group:"Storage" name:"blob-fs-root" env:"BLOB_FS_ROOT" placeholder:"DIR" help:"Directory for logs and other large objects. Default: blobs in the state directory."`
}

// Open opens the store; without a directory of its own in stateDir.
func (b Blobs) Open(stateDir string) (blobstore.Store, error) {
	dir := b.BlobFSRoot
	if dir == "" {
		if stateDir == "" {
			return nil, usage("there is neither a directory for blobs nor a state directory", "give --blob-fs-root or --state-dir")
		}
		dir = filepath.Join(stateDir, "blobs")
	}
	s, err := fsblob.Open(dir, fsblob.Options{})
	if err != nil {
		return nil, &daemon.Problem{What: "cannot open the blob store", Err: err}
	}
	return s, nil
}

// OpenQueue opens the queue kept in db.
func OpenQueue(ctx context.Context, db *bun.DB, log *slog.Logger) (queue.Queue, error) {
	q, err := sqlqueue.New(ctx, db, sqlqueue.Options{Logger: log})
	if err != nil {
		return nil, &daemon.Problem{What: "cannot open the queue in the database", Err: err, Advice: databaseAdvice(err)}
	}
	return q, nil
}

func usage(what, advice string) error {
	return &daemon.ExitError{Code: daemon.ExitUsage, Err: &daemon.Problem{What: what, Advice: advice}}
}

// IsPostgres tells a database that several orchestrators can share from an
// embedded one.
func IsPostgres(db *bun.DB) bool { return sqldb.IsPostgres(db) }
