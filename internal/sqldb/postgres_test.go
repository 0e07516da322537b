package sqldb_test

import (
	"context"
	"database/sql"
	"errors"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/uptrace/bun"
	"github.com/uptrace/bun/dialect/sqlitedialect"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

var sqlReadOnly = &sql.TxOptions{ReadOnly: true}

func foreignSQLite(t *testing.T, path string) *bun.DB {
	t.Helper()
	raw, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	raw.SetMaxOpenConns(1)
	t.Cleanup(func() { raw.Close() })
	return bun.NewDB(raw, sqlitedialect.New())
}

func TestHostileEnvironment(t *testing.T) {
	dsn := testenv.Postgres(t)
	dir := t.TempDir()
	service := filepath.Join(dir, "service.conf")
	if err := os.WriteFile(service, []byte("[evil]\nhost=192.0.2.1\nuser=evil\noptions=-c statement_timeout=1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{
		"PGHOST": "192.0.2.1", "PGPORT": "1", "PGDATABASE": "evil", "PGUSER": "evil", "PGPASSWORD": "evil",
		"PGPASSFILE": filepath.Join(dir, "pass"), "PGAPPNAME": "evil", "PGCONNECT_TIMEOUT": "x", "PGSSLMODE": "verify-full",
		"PGSSLKEY": "/evil", "PGSSLCERT": "/evil", "PGSSLCERTMODE": "require", "PGSSLSNI": "0", "PGSSLROOTCERT": "/evil",
		"PGSSLPASSWORD": "evil", "PGSSLNEGOTIATION": "direct", "PGTARGETSESSIONATTRS": "standby",
		"PGSERVICE": "evil", "PGSERVICEFILE": service, "PGTZ": "Asia/Kathmandu", "PGOPTIONS": "-c search_path=evil",
		"PGMINPROTOCOLVERSION": "3.2", "PGMAXPROTOCOLVERSION": "3.2", "PGCHANNELBINDING": "require", "PGREQUIREAUTH": "scram-sha-256",
		"HOME": dir, "USER": "evil",
	}
	for k, v := range env {
		t.Setenv(k, v)
	}
	check := func(dsn string) {
		t.Helper()
		db := open(t, dsn, sqldb.Options{})
		for q, want := range map[string]string{
			"SELECT current_user": "postgres", "SHOW application_name": "solstice", "SHOW timezone": "UTC",
			"SHOW search_path": `"$user", public`, "SHOW statement_timeout": "0",
		} {
			if got := scan[string](t, db, q); got != want {
				t.Errorf("%s: %q, want %q", q, got, want)
			}
		}
	}
	check(dsn)
	u, err := url.Parse(dsn) // without sslmode, where PGSSLMODE would apply
	if err != nil {
		t.Fatal(err)
	}
	u.RawQuery = ""
	check(u.String())
	t.Setenv("PGSERVICE", "no-such-service")
	t.Setenv("PGSERVICEFILE", "/does/not/exist")
	check(dsn)
	for _, cut := range []string{"user", "db", "host"} { // what the URL leaves out is an error, never the environment's
		v := *u
		switch cut {
		case "user":
			v.User = nil
		case "db":
			v.Path = "/"
		case "host":
			v.Host = ""
		}
		if _, err := sqldb.Open(t.Context(), v.String(), sqldb.Options{}); !errors.Is(err, sqldb.ErrURL) {
			t.Errorf("without %s: %v, want ErrURL", cut, err)
		}
	}
}

func TestURLParametersApply(t *testing.T) {
	db := open(t, testenv.Postgres(t)+"&application_name=mine&timezone=Asia/Kathmandu&search_path=pg_catalog", sqldb.Options{StatementTimeout: time.Minute})
	for q, want := range map[string]string{
		"SHOW application_name": "mine", "SHOW timezone": "Asia/Kathmandu", "SHOW search_path": "pg_catalog", "SHOW statement_timeout": "1min",
	} {
		if got := scan[string](t, db, q); got != want {
			t.Errorf("%s: %q, want %q", q, got, want)
		}
	}
}

func TestConnectErrors(t *testing.T) {
	dsn := testenv.Postgres(t)
	with := func(change func(*url.URL)) string {
		u, err := url.Parse(dsn)
		if err != nil {
			t.Fatal(err)
		}
		change(u)
		return u.String()
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // accepts by its backlog and never answers
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	for _, c := range []struct {
		name, url string
		want      error
	}{
		{"name", with(func(u *url.URL) { u.Host = "no-such-host.invalid:5432" }), sqldb.ErrHostNotFound},
		{"refused", with(func(u *url.URL) { u.Host = free.Addr().String() }), sqldb.ErrRefused},
		{"silent", with(func(u *url.URL) { u.Host = l.Addr().String() }), sqldb.ErrUnreachable},
		{"no database", with(func(u *url.URL) { u.Path = "/nope" }), sqldb.ErrNoDatabase},
		{"role", with(func(u *url.URL) { u.User = url.UserPassword("nobody", "s3cret") }), sqldb.ErrAuth},
		{"no tls", with(func(u *url.URL) { u.RawQuery = "sslmode=require" }), sqldb.ErrTLS},
		{"socket", "postgres://postgres@/db?host=/does/not/exist", sqldb.ErrRefused},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := sqldb.Options{ConnectTimeout: time.Minute}
			if errors.Is(c.want, sqldb.ErrUnreachable) {
				o.ConnectTimeout = 100 * time.Millisecond
			}
			_, err := sqldb.Open(t.Context(), c.url, o)
			if !errors.Is(err, c.want) {
				t.Fatalf("%v, want %v", err, c.want)
			}
			if strings.Contains(err.Error(), "s3cret") {
				t.Errorf("the error tells the password: %v", err)
			}
		})
	}
}

// proxy passes bytes on until armed; then it drops the connection instead of
// passing on the server's answer to a COMMIT.
type proxy struct {
	net.Listener
	armed atomic.Bool
}

func (p *proxy) serve(t *testing.T, backend string) {
	for {
		front, err := p.Accept()
		if err != nil {
			return
		}
		back, err := net.Dial("tcp", backend)
		if err != nil {
			t.Error(err)
			front.Close()
			return
		}
		var committing atomic.Bool
		go func() {
			defer back.Close()
			buf := make([]byte, 64<<10)
			for {
				n, err := front.Read(buf)
				if p.armed.Load() && strings.Contains(strings.ToLower(string(buf[:n])), "commit") {
					committing.Store(true)
				}
				if _, werr := back.Write(buf[:n]); err != nil || werr != nil {
					return
				}
			}
		}()
		go func() {
			defer front.Close()
			buf := make([]byte, 64<<10)
			for {
				n, err := back.Read(buf)
				if committing.Load() {
					return
				}
				if _, werr := front.Write(buf[:n]); err != nil || werr != nil {
					return
				}
			}
		}()
	}
}

func TestUnknownCommit(t *testing.T) {
	dsn := testenv.Postgres(t)
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{Listener: l}
	defer p.Close()
	go p.serve(t, u.Host)
	u.Host = l.Addr().String()
	db, direct := open(t, u.String(), sqldb.Options{}), open(t, dsn, sqldb.Options{})
	exec(t, direct, "CREATE TABLE t (x INTEGER)")

	p.armed.Store(true)
	calls := 0
	err = sqldb.InTx(t.Context(), db, func(ctx context.Context, tx bun.Tx) error {
		calls++
		_, err := tx.NewRaw("INSERT INTO t VALUES (1)").Exec(ctx)
		return err
	})
	if !errors.Is(err, sqldb.ErrCommitUnknown) || sqldb.IsRetryable(err) || calls != 1 {
		t.Fatalf("after %d calls: %v, want ErrCommitUnknown after one", calls, err)
	}
	p.armed.Store(false)
	if n := scan[int](t, direct, "SELECT count(*) FROM t"); n != 1 {
		t.Errorf("%d rows; the commit had reached the server", n)
	}
}

func TestInTxSurvivesRestart(t *testing.T) {
	s := testenv.StartPostgres(t)
	db := open(t, s.Database(t), sqldb.Options{})
	exec(t, db, "CREATE TABLE t (x INTEGER)")
	calls := 0
	err := sqldb.InTx(t.Context(), db, func(ctx context.Context, tx bun.Tx) error {
		if calls++; calls == 1 {
			s.Restart(t)
		}
		_, err := tx.NewRaw("INSERT INTO t VALUES (1)").Exec(ctx)
		return err
	})
	if err != nil || calls < 2 {
		t.Fatalf("after %d calls: %v", calls, err)
	}
	if n := scan[int](t, db, "SELECT count(*) FROM t"); n != 1 {
		t.Errorf("%d rows, want 1", n)
	}
}
