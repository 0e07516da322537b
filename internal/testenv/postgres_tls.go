package testenv

import (
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

// TLSUser is the role that EnableTLS makes.
const TLSUser = "tls"

// EnableTLS restarts the server with a certificate of the authority for
// 127.0.0.1. The superuser TLSUser gets in with a client certificate for its
// name from the same authority and in no other way; for others nothing changes.
func (s *PostgresServer) EnableTLS(t testing.TB, a *Authority) {
	t.Helper()
	data := filepath.Join(s.dir, "data")
	owner, err := s.dropPrivileges()
	if err != nil {
		t.Fatal(err)
	}
	c := a.Issue(t, "postgresql", "127.0.0.1")
	for name, from := range map[string]string{"server.crt": c.Cert, "server.key": c.Key, "clients.crt": c.CA} {
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		s.put(t, filepath.Join(data, name), b, owner)
	}
	s.put(t, filepath.Join(data, "pg_hba.conf"), []byte("hostssl all "+TLSUser+" all cert\nhost all "+TLSUser+" all reject\nhost all all all trust\n"), owner)
	for _, statement := range []string{
		"CREATE ROLE " + TLSUser + " LOGIN SUPERUSER", "ALTER SYSTEM SET ssl = on", "ALTER SYSTEM SET ssl_ca_file = 'clients.crt'",
	} {
		if err := s.admin(statement); err != nil {
			t.Fatal(err)
		}
	}
	s.Restart(t)
}

func (s *PostgresServer) put(t testing.TB, file string, b []byte, owner *account) {
	t.Helper()
	err := os.WriteFile(file, b, 0o600)
	if err == nil && owner != nil {
		err = os.Chown(file, owner.uid, owner.gid)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TLSURL is a database's URL for TLSUser, with these parameters (sslmode,
// sslrootcert, sslcert, sslkey, …).
func (s *PostgresServer) TLSURL(database string, parameters url.Values) string {
	u := url.URL{Scheme: "postgres", User: url.User(TLSUser), Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)), Path: "/" + database, RawQuery: parameters.Encode()}
	return u.String()
}
