package sqldb

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/uptrace/bun"
	"github.com/uptrace/bun/dialect/pgdialect"
)

// pinned holds a value for every setting that pgx would otherwise look up in
// a PG* variable or below the home directory. The URL may set them.
var pinned = map[string]string{
	"port": "5432", "password": "", "passfile": os.DevNull,
	"sslmode": "prefer", "sslkey": "", "sslcert": "", "sslcertmode": "allow", "sslsni": "1",
	"sslrootcert": "", "sslpassword": "", "sslnegotiation": "postgres",
	"target_session_attrs": "any", "timezone": "UTC", "options": "",
	"min_protocol_version": "3.0", "max_protocol_version": "3.0",
	"channel_binding": "prefer", "require_auth": "", "connect_timeout": "0",
}

// serviceName is a section of a service file of our own.
const serviceName = "none"

func openPostgres(raw string, o Options) (*bun.DB, error) {
	cfg, where, wantsTLS, err := postgresConfig(raw, o)
	if err != nil {
		return nil, err
	}
	pool, err := pgxpool.NewWithConfig(context.Background(), cfg)
	if err != nil {
		return nil, fmt.Errorf("sqldb: %w", err)
	}
	db := sql.OpenDB(&pgConnector{
		Connector: stdlib.GetPoolConnector(pool),
		pool:      pool, timeout: o.PoolTimeout, where: where, wantsTLS: wantsTLS,
	})
	db.SetMaxIdleConns(0) // the pgx pool keeps them
	return bun.NewDB(db, pgdialect.New()), nil
}

// pgConnector bounds the wait for the pool's next connection and says what is
// wrong with the server.
type pgConnector struct {
	driver.Connector
	pool     *pgxpool.Pool
	timeout  time.Duration
	where    string
	wantsTLS bool
}

// Connect implements driver.Connector.
func (c *pgConnector) Connect(ctx context.Context) (driver.Conn, error) {
	actx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	conn, err := c.Connector.Connect(actx)
	switch {
	case err == nil:
		return conn, nil
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case actx.Err() != nil && c.pool.Stat().AcquiredConns() >= c.pool.Config().MaxConns:
		return nil, fmt.Errorf("%w within %v: all %d are in use", ErrPoolTimeout, c.timeout, c.pool.Config().MaxConns)
	}
	return nil, classifyPostgres(err, c.where, c.wantsTLS)
}

// Close implements io.Closer; sql.DB.Close calls it.
func (c *pgConnector) Close() error {
	c.pool.Close()
	return nil
}

var _ io.Closer = (*pgConnector)(nil)

func postgresConfig(raw string, o Options) (cfg *pgxpool.Config, where string, wantsTLS bool, err error) {
	u, err := url.Parse(raw)
	if err != nil {
		// The parser's error quotes the URL and with it a password.
		return nil, "", false, fmt.Errorf("%w: it does not parse as a URL (are special characters in the password percent-encoded?)", ErrURL)
	}
	q := u.Query()
	for _, k := range []string{"service", "servicefile"} {
		if q.Has(k) {
			return nil, "", false, fmt.Errorf("%w: parameter %q is not supported", ErrURL, k)
		}
	}
	host, user := u.Host, u.User.Username()
	if host == "" {
		host = q.Get("host")
	}
	if user == "" {
		user = q.Get("user")
	}
	database := u.Path
	if len(database) <= 1 {
		database = "/" + q.Get("dbname")
	}
	for _, part := range []struct{ what, value string }{{"host", host}, {"user", user}, {"database", database[1:]}} {
		if part.value == "" {
			return nil, "", false, fmt.Errorf("%w: it names no %s (postgres://USER@HOST/DATABASE)", ErrURL, part.what)
		}
	}
	for k, v := range pinned {
		switch {
		case q.Has(k):
		case k == "port" && u.Port() != "":
		case k == "password" && hasPassword(u):
		default:
			q.Set(k, v)
		}
	}
	if !q.Has("application_name") {
		q.Set("application_name", o.Name)
	}
	// pgx reads the service file that PGSERVICE and PGSERVICEFILE name even
	// when nothing of it is used; an empty service of our own keeps it off.
	file, err := emptyServiceFile()
	if err != nil {
		return nil, "", false, err
	}
	defer os.Remove(file)
	q.Set("service", serviceName)
	q.Set("servicefile", file)
	u.RawQuery = q.Encode()

	cfg, err = pgxpool.ParseConfig(u.String())
	if err != nil {
		return nil, "", false, fmt.Errorf("%w: %w", ErrURL, errors.Unwrap(err)) // the outer one quotes the URL
	}
	cc := cfg.ConnConfig
	if cc.ConnectTimeout == 0 {
		cc.ConnectTimeout = o.ConnectTimeout
	}
	// bun puts values into the text, so a prepared statement is never met twice.
	cc.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
	for k, v := range cc.RuntimeParams {
		if v == "" {
			delete(cc.RuntimeParams, k)
		}
	}
	setDefault(cc.RuntimeParams, "statement_timeout", strconv.FormatInt(o.StatementTimeout.Milliseconds(), 10))
	// A process that was stopped in the middle of a transaction must not hold
	// the locks of everybody else for ever.
	setDefault(cc.RuntimeParams, "idle_in_transaction_session_timeout", "30000")
	cfg.MaxConns = int32(min(o.MaxConns, 10000))
	cfg.MinConns = 0

	wantsTLS = cc.TLSConfig != nil
	for _, f := range cc.Fallbacks {
		wantsTLS = wantsTLS && f.TLSConfig != nil
	}
	return cfg, fmt.Sprintf("%s:%d/%s as %s", cc.Host, cc.Port, cc.Database, cc.User), wantsTLS, nil
}

func hasPassword(u *url.URL) bool {
	_, ok := u.User.Password()
	return ok
}

func setDefault(m map[string]string, k, v string) {
	if _, ok := m[k]; !ok {
		m[k] = v
	}
}

func emptyServiceFile() (path string, err error) {
	f, err := os.CreateTemp("", "pg_service-*.conf")
	if err != nil {
		return "", fmt.Errorf("sqldb: keep PGSERVICE off: %w", err)
	}
	_, err = f.WriteString("[" + serviceName + "]\n")
	if err := errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(f.Name())
		return "", fmt.Errorf("sqldb: keep PGSERVICE off: %w", err)
	}
	return f.Name(), nil
}
