package sqldb

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"strings"
	"syscall"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// What can be wrong with a database. Open and every statement wrap these, so
// that a daemon can tell a person what to do.
var (
	// ErrURL: the database URL is not understood or incomplete.
	ErrURL = errors.New("sqldb: database URL not valid")
	// ErrHostNotFound: the server's name does not resolve.
	ErrHostNotFound = errors.New("sqldb: database host name does not resolve")
	// ErrRefused: nothing listens there, or the server takes no connections now.
	ErrRefused = errors.New("sqldb: database refused the connection")
	// ErrUnreachable: no answer from the network.
	ErrUnreachable = errors.New("sqldb: database host not reachable")
	// ErrAuth: user or password is wrong, or pg_hba.conf forbids it.
	ErrAuth = errors.New("sqldb: database authentication failed")
	// ErrNoDatabase: the server does not have that database.
	ErrNoDatabase = errors.New("sqldb: database does not exist")
	// ErrTLS: certificates, or one side insists on TLS and the other has none.
	ErrTLS = errors.New("sqldb: TLS to the database failed")
	// ErrFile: the SQLite file can't be opened, or is not a database.
	ErrFile = errors.New("sqldb: cannot open database file")
	// ErrVersion: this SQLite is older than 3.51.3, whose WAL reset can corrupt
	// a database.
	ErrVersion = errors.New("sqldb: SQLite version too old")
	// ErrPoolTimeout: no connection, or no turn to write, within
	// Options.PoolTimeout.
	ErrPoolTimeout = errors.New("sqldb: timed out waiting for a database connection")
	// ErrCommitUnknown: the connection was lost during COMMIT; the transaction
	// may or may not have happened. Read again before repeating it.
	ErrCommitUnknown = errors.New("sqldb: outcome of the commit is unknown")
)

// PostgreSQL's codes: https://www.postgresql.org/docs/15/errcodes-appendix.html
const (
	pgUniqueViolation    = "23505"
	pgSerialization      = "40001"
	pgDeadlock           = "40P01"
	pgInvalidCatalog     = "3D000"
	pgDiskFull           = "53100"
	pgTooManyConnections = "53300"
	pgCannotConnectNow   = "57P03"
	pgClassAuth          = "28"
	pgClassConnection    = "08"
	pgClassOperator      = "57P" // shutdown, crash, idle session; the session is gone
	pgIdleInTransaction  = "25P03"
	pgTransactionTimeout = "25P04"
)

// IsUnique reports whether err says that a unique constraint or primary key
// refused a row.
func IsUnique(err error) bool {
	if pe, ok := errors.AsType[*pgconn.PgError](err); ok {
		return pe.Code == pgUniqueViolation
	}
	if se, ok := errors.AsType[*sqlite.Error](err); ok {
		return se.Code() == sqlite3.SQLITE_CONSTRAINT_UNIQUE || se.Code() == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY
	}
	return false
}

// IsFull reports whether err says that the database's disk is full: nothing was
// written, or it is not known (ErrCommitUnknown).
func IsFull(err error) bool {
	if pe, ok := errors.AsType[*pgconn.PgError](err); ok {
		return pe.Code == pgDiskFull
	}
	if se, ok := errors.AsType[*sqlite.Error](err); ok {
		// Growing the index of the WAL has a code of its own.
		return se.Code()&0xff == sqlite3.SQLITE_FULL || se.Code() == sqlite3.SQLITE_IOERR_SHMSIZE
	}
	return false
}

// IsRetryable reports whether a transaction of InTx that failed with err did
// not happen and may succeed when it is run again: serialization failures,
// deadlocks, busy or locked databases, exhausted pools and lost connections.
// ErrCommitUnknown is not retryable: the transaction may have happened. For a
// single statement outside a transaction a lost connection means the same as
// ErrCommitUnknown, so write through InTx.
func IsRetryable(err error) bool {
	switch {
	case err == nil, errors.Is(err, ErrCommitUnknown):
		return false
	case errorsIsAny(err, ErrAuth, ErrNoDatabase, ErrTLS, ErrURL, ErrFile, ErrVersion, context.Canceled, context.DeadlineExceeded):
		return false
	}
	if pe, ok := errors.AsType[*pgconn.PgError](err); ok {
		switch pe.Code {
		case pgSerialization, pgDeadlock, pgTooManyConnections, pgIdleInTransaction, pgTransactionTimeout:
			return true
		}
		return strings.HasPrefix(pe.Code, pgClassOperator) || strings.HasPrefix(pe.Code, pgClassConnection)
	}
	return isSQLiteBusy(err) || isConnectionLost(err) ||
		errorsIsAny(err, ErrPoolTimeout, ErrRefused, ErrUnreachable, errGroup)
}

func isSQLiteBusy(err error) bool {
	se, ok := errors.AsType[*sqlite.Error](err)
	if !ok {
		return false
	}
	switch se.Code() & 0xff {
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED:
		return true
	}
	return false
}

// isConnectionLost reports whether the connection broke, or was found broken.
func isConnectionLost(err error) bool {
	if errorsIsAny(err, driver.ErrBadConn, pgconn.ErrConnClosed, io.EOF, io.ErrUnexpectedEOF, net.ErrClosed) {
		return true
	}
	if _, ok := errors.AsType[net.Error](err); ok {
		return true
	}
	return pgconn.SafeToRetry(err)
}

// isDefinite reports whether a failed COMMIT certainly left nothing behind.
func isDefinite(err error) bool {
	if errorsIsAny(err, sql.ErrTxDone, pgx.ErrTxCommitRollback, pgx.ErrTxClosed) {
		return true
	}
	if pe, ok := errors.AsType[*pgconn.PgError](err); ok {
		// A session that is being ended may have committed before it noticed.
		return !strings.HasPrefix(pe.Code, pgClassOperator) && !strings.HasPrefix(pe.Code, pgClassConnection)
	}
	// SQLite's driver rolls back whatever it could not commit, except that an
	// I/O error leaves open what the next reader of the WAL will find.
	if se, ok := errors.AsType[*sqlite.Error](err); ok {
		return se.Code()&0xff != sqlite3.SQLITE_IOERR
	}
	// Not pgconn.SafeToRetry: a connection that breaks after COMMIT was sent
	// is reported by pgx as closed before.
	return false
}

// classifyPostgres adds the sentinel that says why connecting failed.
// wantsTLS: the URL accepts no connection without TLS.
func classifyPostgres(err error, where string, wantsTLS bool) error {
	var reason error
	_, isDNS := errors.AsType[*net.DNSError](err)
	pe, isPg := errors.AsType[*pgconn.PgError](err)
	ne, isNet := errors.AsType[net.Error](err)
	switch {
	case isPg && pe.Code == pgInvalidCatalog:
		reason = ErrNoDatabase
	case isPg && strings.HasPrefix(pe.Code, pgClassAuth):
		reason = ErrAuth
	case isPg && (pe.Code == pgCannotConnectNow || pe.Code == pgTooManyConnections || strings.HasPrefix(pe.Code, pgClassOperator)):
		reason = ErrRefused
	case isPg:
	case isTLS(err):
		reason = ErrTLS
	case isDNS:
		reason = ErrHostNotFound
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist): // no socket file
		reason = ErrRefused
	case errors.Is(err, context.Canceled):
	case isNet && ne.Timeout(), errorsIsAny(err, syscall.EHOSTUNREACH, syscall.ENETUNREACH, context.DeadlineExceeded):
		reason = ErrUnreachable
	case errorsIsAny(err, io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET):
		reason = ErrRefused
	case wantsTLS: // "server refused TLS connection" has no type of its own
		reason = ErrTLS
	}
	if reason == nil {
		return fmt.Errorf("sqldb: connect to %s: %w", where, err)
	}
	return fmt.Errorf("%w: %s: %w", reason, where, err)
}

func isTLS(err error) bool {
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return true
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return true
	}
	if _, ok := errors.AsType[tls.AlertError](err); ok {
		return true
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return true
	}
	if _, ok := errors.AsType[x509.CertificateInvalidError](err); ok {
		return true
	}
	_, ok := errors.AsType[x509.HostnameError](err)
	return ok
}

// classifySQLite adds ErrFile to what is wrong with the file itself.
func classifySQLite(err error, path string) error {
	if se, ok := errors.AsType[*sqlite.Error](err); ok {
		switch se.Code() & 0xff {
		case sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CORRUPT:
			return fmt.Errorf("%w: %s: %w", ErrFile, path, err)
		}
	}
	return fmt.Errorf("sqldb: open %s: %w", path, err)
}
