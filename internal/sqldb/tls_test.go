package sqldb_test

import (
	"errors"
	"net"
	"net/url"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

// TestTLS: what the URL says of TLS holds, both ways.
func TestTLS(t *testing.T) {
	s := testenv.StartPostgres(t)
	ours, theirs := testenv.NewAuthority(t), testenv.NewAuthority(t)
	s.EnableTLS(t, ours)
	mine, somebodys, strangers := ours.Issue(t, testenv.TLSUser), ours.Issue(t, "somebody"), theirs.Issue(t, testenv.TLSUser)
	at := func(host string, parameters ...string) string {
		q := url.Values{}
		for i := 0; i < len(parameters); i += 2 {
			q.Set(parameters[i], parameters[i+1])
		}
		u, err := url.Parse(s.TLSURL("postgres", q))
		if err != nil {
			t.Fatal(err)
		}
		u.Host = net.JoinHostPort(host, u.Port())
		return u.String()
	}
	const here = "127.0.0.1"
	for _, c := range []struct {
		name, url string
		want      error
	}{
		{"both verified", at(here, "sslmode", "verify-full", "sslrootcert", ours.File, "sslcert", mine.Cert, "sslkey", mine.Key), nil},
		{"server not verified", at(here, "sslmode", "require", "sslcert", mine.Cert, "sslkey", mine.Key), nil},
		{"preferred", at(here, "sslcert", mine.Cert, "sslkey", mine.Key), nil},
		{"the authority only", at("localhost", "sslmode", "verify-ca", "sslrootcert", ours.File, "sslcert", mine.Cert, "sslkey", mine.Key), nil},
		{"another authority", at(here, "sslmode", "verify-full", "sslrootcert", theirs.File, "sslcert", mine.Cert, "sslkey", mine.Key), sqldb.ErrTLS},
		{"another authority, require", at(here, "sslmode", "require", "sslrootcert", theirs.File, "sslcert", mine.Cert, "sslkey", mine.Key), sqldb.ErrTLS},
		{"another host", at("localhost", "sslmode", "verify-full", "sslrootcert", ours.File, "sslcert", mine.Cert, "sslkey", mine.Key), sqldb.ErrTLS},
		{"no authority", at(here, "sslmode", "verify-full", "sslcert", mine.Cert, "sslkey", mine.Key), sqldb.ErrTLS},
		{"no client certificate", at(here, "sslmode", "verify-full", "sslrootcert", ours.File), sqldb.ErrAuth},
		{"somebody's certificate", at(here, "sslmode", "verify-full", "sslrootcert", ours.File, "sslcert", somebodys.Cert, "sslkey", somebodys.Key), sqldb.ErrAuth},
		{"a stranger's certificate", at(here, "sslmode", "verify-full", "sslrootcert", ours.File, "sslcert", strangers.Cert, "sslkey", strangers.Key), sqldb.ErrTLS},
		{"no TLS", at(here, "sslmode", "disable"), sqldb.ErrAuth},
		{"a missing file", at(here, "sslmode", "verify-full", "sslrootcert", ours.File, "sslcert", mine.Cert+"x", "sslkey", mine.Key), sqldb.ErrURL},
	} {
		t.Run(c.name, func(t *testing.T) {
			db, err := sqldb.Open(t.Context(), c.url, sqldb.Options{})
			if c.want != nil {
				if err == nil {
					db.Close()
				}
				if !errors.Is(err, c.want) {
					t.Fatalf("%v, want %v", err, c.want)
				}
				if strings.Contains(err.Error(), "PRIVATE KEY") {
					t.Errorf("the error shows a key: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { db.Close() })
			if got := scan[string](t, db, "SELECT ssl || ' ' || version || ' ' || coalesce(client_dn, '') FROM pg_stat_ssl WHERE pid = pg_backend_pid()"); got != "true TLSv1.3 /CN="+testenv.TLSUser {
				t.Errorf("the server sees %q", got)
			}
		})
	}
}
