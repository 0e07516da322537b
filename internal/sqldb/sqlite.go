package sqldb

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/uptrace/bun"
	"github.com/uptrace/bun/dialect/sqlitedialect"
	"modernc.org/sqlite"
)

// memory is the path of a private database that lives and dies with its pool.
const memory = ":memory:"

// minSQLite is the first version without the WAL-reset bug
// (https://www.sqlite.org/releaselog/3_51_3.html).
var minSQLite = [3]int{3, 51, 3}

func openSQLite(path string, o Options) (*bun.DB, error) {
	if path == "" {
		return nil, fmt.Errorf("%w: sqlite: names no file", ErrURL)
	}
	name, key := path, path
	if path == memory {
		o.MaxConns = 1 // every connection to :memory: has a database of its own
	} else {
		var err error
		if key, err = makeFile(path); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrFile, err)
		}
		name = (&url.URL{Scheme: "file", Path: filepath.ToSlash(key)}).String()
	}
	q := url.Values{
		"_busy_timeout": {strconv.FormatInt(o.PoolTimeout.Milliseconds(), 10)},
		"_journal_mode": {"WAL"},
		"_synchronous":  {"FULL"},
		"_foreign_keys": {"1"},
		"_txlock":       {"immediate"},
		"_dqs":          {"0"},                            // a mistyped "name" is an error, not a string
		"_pragma":       {"journal_size_limit(67108864)"}, // a WAL that grew once is cut again
	}
	c, err := sqlite.NewConnector(name + "?" + q.Encode())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFile, err)
	}
	db := sql.OpenDB(newPool(c, key, o))
	db.SetMaxIdleConns(0) // the pool below keeps them
	return bun.NewDB(db, sqlitedialect.New()), nil
}

// makeFile makes an absent file, readable for its owner only (SQLite gives its
// WAL the same mode), and returns its canonical path.
func makeFile(path string) (string, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	switch {
	case err == nil:
		if err := f.Close(); err != nil {
			return "", err
		}
	case !errors.Is(err, fs.ErrExist):
		return "", err
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(abs)
}

func checkSQLiteVersion(ctx context.Context, db *bun.DB) error {
	var v string
	if err := db.NewRaw("SELECT sqlite_version()").Scan(ctx, &v); err != nil {
		return fmt.Errorf("sqldb: version of SQLite: %w", err)
	}
	return checkVersion(v)
}

func checkVersion(v string) error {
	var have [3]int
	for i, part := range strings.SplitN(v, ".", 3) {
		n, err := strconv.Atoi(part)
		if err != nil {
			return fmt.Errorf("%w: %q is not a version", ErrVersion, v)
		}
		have[i] = n
	}
	for i := range have {
		if have[i] != minSQLite[i] {
			if have[i] < minSQLite[i] {
				return fmt.Errorf("%w: %s, need %d.%d.%d", ErrVersion, v, minSQLite[0], minSQLite[1], minSQLite[2])
			}
			break
		}
	}
	return nil
}
