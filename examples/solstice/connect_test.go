package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestConnecting: how the flags find a server and prove who calls.
func TestConnecting(t *testing.T) {
	t.Parallel()
	certs := t.TempDir()
	ca, cert, key := filepath.Join(certs, "ca.pem"), filepath.Join(certs, "cert.pem"), filepath.Join(certs, "key.pem")
	issue(t, x509.ExtKeyUsageClientAuth, ca, cert, key)
	notForClients := filepath.Join(certs, "server.pem")
	issue(t, x509.ExtKeyUsageServerAuth, filepath.Join(certs, "other-ca.pem"), notForClients, filepath.Join(certs, "server-key.pem"))
	s := serve(t, "--grpc-tls-ca="+ca)
	admin := filepath.Join(s.dir, "admin.token")
	addr := s.Said("grpc_addr")
	dir := t.TempDir()
	empty := filepath.Join(dir, "no-state")
	config := filepath.Join(dir, "solstice.yaml")
	write(t, dir, map[string]string{
		"solstice.yaml": "server: " + addr + "\nstate-dir: " + s.dir + "\n", "empty": "", "wrong": "sol_WRONG\n", "bad.yaml": "servr: x\n",
	})
	silent, err := net.Listen("tcp", "127.0.0.1:0") // takes connections and says nothing
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = silent.Close() })
	trust := []string{"--server", addr, "--state-dir", empty, "--ca", filepath.Join(s.dir, "ca.pem")}
	_, port, _ := net.SplitHostPort(addr)
	for _, c := range []struct {
		name   string
		args   []string
		code   int
		stderr []string
	}{
		{"state directory", []string{"--server", addr, "--state-dir", s.dir}, 0, nil},
		{"by name", []string{"--server", "localhost:" + port, "--state-dir", s.dir}, 0, nil},
		{"file of flags", []string{"--config", config}, 0, nil},
		{"token and authority", append(trust, "--token-file", admin), 0, nil},
		{"client certificate", append(trust, "--client-cert", cert, "--client-key", key), 0, nil},
		{"client certificate, and the state directory's trust", []string{"--server", addr, "--state-dir", s.dir, "--client-cert", cert, "--client-key", key}, 0, nil},

		{"no token", trust, 2, []string{"a token is needed", "--token-file", "solstice token create"}},
		{"wrong token", append(trust, "--token-file", filepath.Join(dir, "wrong")), 2, []string{"unknown, expired or revoked", "another token"}},
		{"no such token file", append(trust, "--token-file", filepath.Join(dir, "none")), 2, []string{"cannot read the secret of --token-file"}},
		{"empty token file", append(trust, "--token-file", filepath.Join(dir, "empty")), 2, []string{"is empty"}},
		{"token twice", append(trust, "--token-file", admin, "--token", "x"), 2, []string{"both given"}},
		{"token of two lines", append(trust, "--token", "a\nb"), 2, []string{"white space"}},
		{"certificate without key", append(trust, "--client-cert", cert), 2, []string{"--client-key"}},
		{"certificate of a stranger", append(trust, "--client-cert", notForClients, "--client-key", filepath.Join(certs, "server-key.pem")), 2, []string{"the orchestrator at " + addr}},
		{"certificate that is none", append(trust, "--client-cert", config, "--client-key", key), 2, []string{"cannot use the client certificate"}},
		{"untrusted", []string{"--server", addr, "--state-dir", empty, "--token-file", admin}, 2, []string{"unknown authority", "--ca", "ca.pem"}},
		{"another authority", []string{"--server", addr, "--ca", ca, "--token-file", admin}, 2, []string{"unknown authority", "--ca"}},
		{"authority that is none", []string{"--server", addr, "--ca", config}, 2, []string{"no PEM certificate"}},
		{"not TLS", []string{"--server", s.Said("http_addr")}, 2, []string{"does not speak TLS", "--grpc-addr"}},
		{"another service", []string{"--server", s.Said("agent_addr"), "--state-dir", s.dir}, 2, []string{"unknown service", "correct --server"}},
		{"nothing listens", []string{"--server", freeAddr(t)}, 2, []string{"connection refused", "start the orchestrator"}},
		{"nobody says anything", []string{"--server", silent.Addr().String(), "--grpc-timeout-ms", "300"}, 2, []string{"the orchestrator at " + silent.Addr().String()}},
		{"no such name", []string{"--server", "no-such-host.invalid:50051"}, 2, []string{"no-such-host.invalid does not resolve"}},
		{"no port", []string{"--server", "localhost"}, 2, []string{"not HOST:PORT"}},
		{"timeout", []string{"--grpc-timeout-ms", "0"}, 2, []string{"--grpc-timeout-ms"}},
		{"wrong key in the file", []string{"--config", filepath.Join(dir, "bad.yaml")}, 2, []string{`bad.yaml:1`, `did you mean "server"`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			u := newUser(t, dir)
			r := u.solstice(append([]string{"pools"}, c.args...)...)
			has(t, "stderr", r.stderr, c.stderr...)
			if c.code == 0 {
				has(t, "stdout", r.stdout, "POOL")
			}
			r.want(t, c.code)
		})
	}
	t.Run("variables", func(t *testing.T) {
		u := newUser(t, dir)
		u.env = []string{"SOLSTICE_SERVER=" + addr, "SOLSTICE_CA=" + filepath.Join(s.dir, "ca.pem"), "SOLSTICE_TOKEN_FILE=" + admin, "STATE_DIR=" + empty}
		u.ok("pools")
	})
	t.Run("role of a certificate", func(t *testing.T) {
		r := newUser(t, dir).solstice(append(append([]string{"cancel", "00000000-0000"}, trust...), "--client-cert", cert, "--client-key", key)...)
		r.want(t, 1) // it may look, and there is none
		r = newUser(t, dir).solstice(append(append([]string{"token", "list"}, trust...), "--client-cert", cert, "--client-key", key)...)
		has(t, "stderr", r.stderr, "needs role admin, yours is read")
		r.want(t, 2)
	})
}

// TestTokenStaysHere: that of the state directory is for a server on this
// machine only.
func TestTokenStaysHere(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, map[string]string{"admin.token": "sol_SECRET\n"})
	for server, want := range map[string]string{
		"127.0.0.1:1": "sol_SECRET", "[::1]:1": "sol_SECRET", "localhost:1": "sol_SECRET", "127.8.9.1:1": "sol_SECRET",
		"192.0.2.1:1": "", "example.com:1": "", "localhost.example.com:1": "", "0.0.0.0:1": "", "x": "",
	} {
		c := connection{Server: server, StateDir: dir}
		if got, err := c.token(); err != nil || got != want {
			t.Errorf("%s gets %q, %v; want %q", server, got, err, want)
		}
	}
}

// issue writes a certificate, its key and its authority.
func issue(t *testing.T, use x509.ExtKeyUsage, ca, cert, key string) {
	t.Helper()
	var serial int64
	sign := func(template, parent *x509.Certificate, signer *ecdsa.PrivateKey) (*ecdsa.PrivateKey, []byte) {
		t.Helper()
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if signer == nil {
			signer = k
		}
		serial++
		template.SerialNumber, template.NotBefore, template.NotAfter = big.NewInt(serial), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
		der, err := x509.CreateCertificate(rand.Reader, template, parent, &k.PublicKey, signer)
		if err != nil {
			t.Fatal(err)
		}
		return k, der
	}
	authority := &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	signer, root := sign(authority, authority, nil)
	k, leaf := sign(&x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{use}}, authority, signer)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		ca: {Type: "CERTIFICATE", Bytes: root}, cert: {Type: "CERTIFICATE", Bytes: leaf}, key: {Type: "PRIVATE KEY", Bytes: pkcs8},
	} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
