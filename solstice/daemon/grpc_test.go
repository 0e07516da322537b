package daemon

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// pemFiles writes a server's certificate and key, from an authority of their own,
// whose pool it returns.
func pemFiles(t *testing.T, dir string) *x509.CertPool {
	t.Helper()
	ca, err := LoadOrCreateCA(t.TempDir(), "127.0.0.1")
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
	for name, data := range map[string][]byte{"cert.pem": pemBlock("CERTIFICATE", c.Leaf.Raw), "key.pem": pemBlock("PRIVATE KEY", key)} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca.PEM())
	return pool
}

func pemBlock(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func TestGRPCServer(t *testing.T) {
	dir := t.TempDir()
	pool := pemFiles(t, dir)
	g := GRPC{
		GRPCAddr: "127.0.0.1:0", ServerTLS: ServerTLS{GRPCTLSCert: filepath.Join(dir, "cert.pem"), GRPCTLSKey: filepath.Join(dir, "key.pem")},
		GRPCKeepaliveMS: 20000, GRPCMaxMessageMB: 32, GRPCTimeoutMS: 10000,
	}
	lis, err := g.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	opts, err := g.ServerOptions(nil)
	if err != nil {
		t.Fatal(err)
	}
	srv, done := grpc.NewServer(opts...), make(chan error, 1)
	healthpb.RegisterHealthServer(srv, health.NewServer())
	go func() { done <- srv.Serve(lis) }()
	t.Cleanup(func() {
		srv.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})

	check := func(pool *x509.CertPool, deadline bool) error {
		conn, err := grpc.NewClient("passthrough:///"+lis.Addr().String(), grpc.WithNoProxy(),
			grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13})))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		ctx := t.Context()
		if deadline {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, time.Minute)
			defer cancel()
		}
		_, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
		return err
	}
	if err := check(pool, true); err != nil {
		t.Errorf("call over TLS: %v", err)
	}
	if err := check(pool, false); status.Code(err) != codes.InvalidArgument {
		t.Errorf("call without a deadline: %v, want InvalidArgument", err)
	}

	// New files, from another authority, are served without a restart.
	next := pemFiles(t, dir)
	if err := check(next, true); err != nil {
		t.Errorf("after the certificate changed: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "key.pem")); err != nil {
		t.Fatal(err)
	}
	if err := check(next, true); err != nil {
		t.Errorf("while a file is missing: %v", err)
	}
}

func TestGRPCNeedsTLS(t *testing.T) {
	ca, err := LoadOrCreateCA(t.TempDir(), "localhost")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (GRPC{}).ServerOptions(nil); err == nil {
		t.Error("no certificate at all was accepted")
	}
	if _, err := (GRPC{ServerTLS: ServerTLS{GRPCTLSCert: "cert.pem"}}).ServerOptions(ca.ServerConfig()); err == nil {
		t.Error("a certificate without key was accepted")
	}
	if _, err := (GRPC{}).ServerOptions(ca.ServerConfig()); err != nil {
		t.Errorf("with a certificate of our own: %v", err)
	}
}

func TestDeadlinesAreCapped(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	far, _ := ctx.Deadline()
	_, err := deadlines(time.Second)(ctx, nil, nil, func(ctx context.Context, _ any) (any, error) {
		if inner, ok := ctx.Deadline(); !ok || !inner.Before(far) {
			t.Errorf("deadline %v is not before the caller's %v", inner, far)
		}
		return nil, nil
	})
	if err != nil {
		t.Error(err)
	}
}
