package selfca

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// dials reports how a client that trusts pem gets on with a server of ca, by
// the clock now.
func dials(t *testing.T, ca *CA, pem []byte, name string, now time.Time) error {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if c, err := lis.Accept(); err == nil {
			_ = tls.Server(c, ca.ServerConfig()).HandshakeContext(t.Context())
			_ = c.Close()
		}
	}()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	c, err := net.Dial("tcp", lis.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	err = tls.Client(c, &tls.Config{RootCAs: pool, ServerName: name, Time: func() time.Time { return now }}).HandshakeContext(t.Context())
	_, _ = c.Close(), lis.Close()
	<-done
	return err
}

func TestCAServesItsNames(t *testing.T) {
	dir := t.TempDir()
	ca, err := LoadOrCreate(dir, "orch.example.com", "192.0.2.1")
	if err != nil {
		t.Fatal(err)
	}
	for name, ok := range map[string]bool{"orch.example.com": true, "192.0.2.1": true, "other.example.com": false, "192.0.2.2": false} {
		if err := dials(t, ca, ca.PEM(), name, time.Now()); (err == nil) != ok {
			t.Errorf("as %s: %v", name, err)
		}
	}
	info, err := os.Stat(filepath.Join(dir, "ca.pem"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("ca.pem: %v, %v; want mode 0600", info.Mode(), err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestCAIsKeptAcrossConcurrentStarts(t *testing.T) {
	dir := t.TempDir()
	var wg sync.WaitGroup
	cas := make([]*CA, 16)
	for i := range cas {
		wg.Go(func() {
			ca, err := LoadOrCreate(dir, "orch.example.com")
			if err != nil {
				t.Error(err)
				return
			}
			cas[i] = ca
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	for _, ca := range cas {
		if string(ca.PEM()) != string(cas[0].PEM()) {
			t.Fatal("two starts have different authorities")
		}
	}
}

func TestCertificatesAreRenewed(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	clock := func() time.Time { return now }
	ca, err := loadOrCreate(dir, []string{"orch.example.com"}, clock)
	if err != nil {
		t.Fatal(err)
	}
	start := now
	first, err := ca.certificate()
	if err != nil {
		t.Fatal(err)
	}
	now = start.Add(serverLifetime / 2)
	if same, err := ca.certificate(); err != nil || same != first {
		t.Errorf("renewed at half its life (%v)", err)
	}
	now = start.Add(serverLifetime * 3 / 4)
	if second, err := ca.certificate(); err != nil || second == first {
		t.Errorf("not renewed with a quarter of its life left (%v)", err)
	}

	now = start.Add(caLifetime * 3 / 4)
	renewed, err := loadOrCreate(dir, []string{"orch.example.com"}, clock)
	if err != nil {
		t.Fatal(err)
	}
	if string(renewed.PEM()) == string(ca.PEM()) {
		t.Fatal("the authority was not renewed with a quarter of its life left")
	}
	again, err := loadOrCreate(dir, []string{"orch.example.com"}, clock)
	if err != nil || string(again.PEM()) != string(renewed.PEM()) {
		t.Errorf("the renewed authority was not kept (%v)", err)
	}
	for who, pem := range map[string][]byte{"old": ca.PEM(), "new": renewed.PEM()} {
		if err := dials(t, renewed, pem, "orch.example.com", now); err != nil {
			t.Errorf("a client with the %s authority: %v", who, err)
		}
	}
}

func TestDamagedCAIsNotReplaced(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(path, []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadOrCreate(dir, "orch.example.com"); err == nil {
		t.Error("a damaged authority was accepted")
	}
	if data, _ := os.ReadFile(path); string(data) != "damaged" {
		t.Error("a damaged authority was overwritten: clients of the old one would be cut off without a word")
	}
}
