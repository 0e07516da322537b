// Package selfca is the private certificate authority by which agents know
// their orchestrators where the operator brings none: in memory, or in a file.
package selfca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Lifetimes of certificates; each is replaced when a third of its is left.
const (
	caLifetime     = 10 * 365 * 24 * time.Hour
	serverLifetime = 30 * 24 * time.Hour
	clockSkew      = time.Hour // of guests, whose clocks may be behind
)

// CA is a certificate authority of a program's own, for an endpoint whose
// clients are handed the authority's certificate. The key lives in one file;
// server certificates are made in memory and replaced before they expire.
type CA struct {
	key   *ecdsa.PrivateKey
	cert  *x509.Certificate
	hosts []string
	now   func() time.Time

	mu     sync.Mutex
	server *tls.Certificate
}

// New makes an authority that lives in memory. The server certificate is for
// hosts, names or IP addresses, of which there is at least one.
func New(hosts ...string) (*CA, error) {
	key, der, err := generate(time.Now())
	if err != nil {
		return nil, fmt.Errorf("selfca: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("selfca: %w", err)
	}
	ca := &CA{key: key, cert: cert, hosts: hosts, now: time.Now}
	_, err = ca.certificate()
	return ca, err
}

// LoadOrCreate returns the authority kept in dir/ca.pem (mode 0600: key and
// certificate, ECDSA P-256), made when it is not there; several processes may do
// so at once and get the same one. A certificate near its end is replaced by one
// of the same key and name, so that clients with the old one go on trusting
// what it signs. The server certificate is for hosts, names or IP addresses.
func LoadOrCreate(dir string, hosts ...string) (*CA, error) {
	return loadOrCreate(dir, hosts, time.Now)
}

func loadOrCreate(dir string, hosts []string, now func() time.Time) (*CA, error) {
	path := filepath.Join(dir, "ca.pem")
	ca, err := readCA(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := createCA(path, now()); err != nil {
			return nil, fmt.Errorf("selfca: create certificate authority: %w", err)
		}
		ca, err = readCA(path)
	}
	if err != nil {
		return nil, fmt.Errorf("selfca: load certificate authority: %w", err)
	}
	ca.hosts, ca.now = hosts, now
	if now().After(renewal(ca.cert)) {
		if err := ca.renew(path); err != nil {
			return nil, fmt.Errorf("selfca: renew certificate authority: %w", err)
		}
	}
	if _, err := ca.certificate(); err != nil {
		return nil, err
	}
	return ca, nil
}

// PEM is the authority's certificate, for clients.
func (ca *CA) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})
}

// ServerConfig returns a new TLS 1.3 configuration for a server; set NextProtos
// as needed.
func (ca *CA) ServerConfig() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return ca.certificate() },
	}
}

// renewal is the time when a third of a certificate's life is left.
func renewal(c *x509.Certificate) time.Time {
	return c.NotAfter.Add(-c.NotAfter.Sub(c.NotBefore) / 3)
}

// certificate returns the server certificate, a new one when it is due.
func (ca *CA) certificate() (*tls.Certificate, error) {
	ca.mu.Lock()
	defer ca.mu.Unlock()
	now := ca.now()
	if ca.server != nil && now.Before(renewal(ca.server.Leaf)) {
		return ca.server, nil
	}
	if len(ca.hosts) == 0 {
		return nil, errors.New("selfca: no host names")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("selfca: server key: %w", err)
	}
	t := &x509.Certificate{
		SerialNumber: serial(),
		Subject:      pkix.Name{CommonName: ca.hosts[0]},
		NotBefore:    now.Add(-clockSkew),
		NotAfter:     now.Add(serverLifetime),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, h := range ca.hosts {
		if ip := net.ParseIP(h); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, h)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		return nil, fmt.Errorf("selfca: server certificate for %q: %w", ca.hosts, err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("selfca: server certificate: %w", err)
	}
	ca.server = &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
	return ca.server, nil
}

func serial() *big.Int {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails
	b[0] &= 0x7f        // positive
	return new(big.Int).SetBytes(b)
}

func signCA(key *ecdsa.PrivateKey, name pkix.Name, now time.Time) ([]byte, error) {
	t := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               name,
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(caLifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	return x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
}

func generate(now time.Time) (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	// The name tells authorities of several installations apart.
	der, err := signCA(key, pkix.Name{CommonName: fmt.Sprintf("Solstice CA %x", serial().Bytes()[:4])}, now)
	return key, der, err
}

// createCA writes a new authority unless another process is first.
func createCA(path string, now time.Time) error {
	key, der, err := generate(now)
	if err != nil {
		return err
	}
	err = writeCA(path, key, der, os.Link)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

func (ca *CA) renew(path string) error {
	der, err := signCA(ca.key, ca.cert.Subject, ca.now())
	if err != nil {
		return err
	}
	if err := writeCA(path, ca.key, der, os.Rename); err != nil {
		return err
	}
	ca.cert, err = x509.ParseCertificate(der)
	return err
}

// writeCA makes the file durable under a temporary name before publish, which
// is os.Link (never replaces) or os.Rename, gives it its own.
func writeCA(path string, key *ecdsa.PrivateKey, der []byte, publish func(from, to string) error) (err error) {
	k, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	for _, block := range []*pem.Block{{Type: "PRIVATE KEY", Bytes: k}, {Type: "CERTIFICATE", Bytes: der}} {
		if err := pem.Encode(&b, block); err != nil {
			return err
		}
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".ca-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(f.Name()) }() // gone already after a rename
	_, err = f.Write(b.Bytes())
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := publish(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func readCA(path string) (*CA, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(data, data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || !pair.Leaf.IsCA {
		return nil, fmt.Errorf("%s: not an ECDSA certificate authority", path)
	}
	return &CA{key: key, cert: pair.Leaf}, nil
}
