package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/solstice-ci/solstice-go/internal/testenv" //nolint:depguard // the test is not part of the main that is copied
	"github.com/solstice-ci/solstice-go/solstice/agent"
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
)

// issue writes a certificate for hosts, its key and its authority, a new one,
// as cert.pem, key.pem and trust.pem.
func issue(t *testing.T, dir string, hosts ...string) {
	t.Helper()
	ca, err := daemon.LoadOrCreateCA(t.TempDir(), hosts...)
	if err != nil {
		t.Fatal(err)
	}
	c, err := ca.ServerConfig().GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"cert.pem":  pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Leaf.Raw}),
		"key.pem":   pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}),
		"trust.pem": ca.PEM(),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCertificatesAreReadAgain(t *testing.T) {
	dir := t.TempDir()
	issue(t, dir, "127.0.0.1")
	o := start(t, filepath.Join(t.TempDir(), "state"),
		"--grpc-tls-cert", filepath.Join(dir, "cert.pem"), "--grpc-tls-key", filepath.Join(dir, "key.pem"))
	call := func(trust string) error {
		c := pb.NewOrchestratorServiceClient(o.dial(trust))
		return errOf(c.ListPools(as(t, o.adminToken()), &pb.ListPoolsRequest{}))
	}
	trust := filepath.Join(dir, "trust.pem")
	if err := call(trust); err != nil {
		t.Fatal(err)
	}
	if err := call(filepath.Join(o.dir, "ca.pem")); status.Code(err) != codes.Unavailable {
		t.Errorf("trusting another authority: %v", err)
	}
	old := filepath.Join(t.TempDir(), "old.pem")
	if err := os.Rename(trust, old); err != nil {
		t.Fatal(err)
	}
	issue(t, dir, "127.0.0.1")
	if err := call(trust); err != nil {
		t.Errorf("with the new authority: %v", err)
	}
	if err := call(old); status.Code(err) != codes.Unavailable {
		t.Errorf("with the old authority: %v", err)
	}
}

// TestOnPostgreSQL: certificates are required, and so is a schema that fits.
func TestOnPostgreSQL(t *testing.T) {
	url := testenv.Postgres(t)
	dir := t.TempDir()
	issue(t, dir, "127.0.0.1", agent.ServerName)
	file := func(name string) string { return filepath.Join(dir, name) }
	certificates := []string{
		"--grpc-tls-cert", file("cert.pem"), "--grpc-tls-key", file("key.pem"),
		"--agent-tls-cert", file("cert.pem"), "--agent-tls-key", file("key.pem"), "--agent-tls-ca", file("trust.pem"),
	}
	refused := func(want string, args ...string) {
		t.Helper()
		cmd := command(t, append([]string{"--state-dir", filepath.Join(t.TempDir(), "state"), "--database-url", url}, args...)...)
		if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), want) {
			t.Errorf("%q: ended with %v, does not say %q:\n%s", args, err, want, out)
		}
	}
	refused("--auto-migrate", certificates...)
	refused("certificates have to be given", "--auto-migrate")

	o := start(t, filepath.Join(t.TempDir(), "state"), append(certificates, "--database-url", url, "--auto-migrate")...)
	c := pb.NewOrchestratorServiceClient(o.dial(file("trust.pem")))
	if err := errOf(c.ListPools(as(t, ""), &pb.ListPoolsRequest{})); status.Code(err) != codes.Unauthenticated {
		t.Errorf("without a token: %v", err)
	}
}

// TestClientCertificate: one that --grpc-tls-ca verifies has the role of
// --mtls-role, and none where that is none.
func TestClientCertificate(t *testing.T) {
	for role, want := range map[string][2]codes.Code{ // of reading, and of writing
		"none": {codes.Unauthenticated, codes.Unauthenticated},
		"read": {codes.OK, codes.PermissionDenied},
	} {
		t.Run(role, func(t *testing.T) {
			dir := t.TempDir()
			pair := clientCertificate(t, dir)
			o := start(t, filepath.Join(t.TempDir(), "state"), "--grpc-tls-ca", filepath.Join(dir, "trust.pem"), "--mtls-role", role)
			c := pb.NewOrchestratorServiceClient(o.dial(filepath.Join(o.dir, "ca.pem"), pair))
			got := [2]codes.Code{
				status.Code(errOf(c.ListPools(as(t, ""), &pb.ListPoolsRequest{}))),
				status.Code(errOf(c.CancelRun(as(t, ""), &pb.CancelRunRequest{}))),
			}
			if got != want {
				t.Errorf("got %v, want %v", got, want)
			}
			if err := errOf(c.CancelRun(as(t, o.adminToken()), &pb.CancelRunRequest{})); status.Code(err) != codes.NotFound {
				t.Errorf("with a token as well: %v", err)
			}
		})
	}
}

// clientCertificate makes one, and its authority's file trust.pem.
func clientCertificate(t *testing.T, dir string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	self := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, self, self, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	pair := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	data := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]})
	if err := os.WriteFile(filepath.Join(dir, "trust.pem"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	return pair
}
