//go:build linux

package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/vmprovider"
)

// Guests are a boot sector in 16-bit code: what they do they do at once, and need
// neither a kernel nor much memory.
var (
	halt     = []byte{0xf4, 0xeb, 0xfd}                                          // hlt; jmp $-1
	powerOff = append([]byte{0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef}, halt...) // mov dx,0x604; mov ax,0x2000; out dx,ax: ACPI
	panics   = append([]byte{0xba, 0x05, 0x05, 0xb0, 0x01, 0xee}, halt...)       // mov dx,0x505; mov al,1; out dx,al: pvpanic
)

// says prints text, which follows the boot sector, to the serial port, and halts.
func says(text string) []byte {
	sectors := byte(len(text)/512 + 1) //nolint:gosec // a test's text is short
	code := append([]byte{
		0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, // xor ax,ax; mov ds,ax; mov es,ax
		0xb8, sectors, 0x02, 0xbb, 0x00, 0x7e, 0xb9, 0x02, 0x00, 0xb6, 0x00, 0xcd, 0x13, // read them to 0x7e00 by int 0x13
		0xfc, 0xbe, 0x00, 0x7e, // cld; mov si,0x7e00
		0xac, 0x84, 0xc0, 0x74, 0x12, 0x88, 0xc4, // next: lodsb; test al,al; jz done; mov ah,al
		0xba, 0xfd, 0x03, 0xec, 0xa8, 0x20, 0x74, 0xfb, // mov dx,0x3fd; wait: in al,dx; test al,0x20; jz wait
		0xba, 0xf8, 0x03, 0x88, 0xe0, 0xee, 0xeb, 0xe9, // mov dx,0x3f8; mov al,ah; out dx,al; jmp next
	}, halt...) // done:
	return append(append(code, make([]byte, 512-len(code))...), text...)
}

// image writes a raw disk that boots code.
func image(t *testing.T, dir string, code []byte) string {
	t.Helper()
	disk := make([]byte, 1<<20)
	copy(disk, code)
	disk[510], disk[511] = 0x55, 0xaa
	f, err := os.CreateTemp(dir, "image-")
	if err == nil {
		_, err = f.Write(disk)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// certificate writes one that is its own authority, for this host, and its key.
func certificate(t *testing.T, dir string) (cert, key string) {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	write := func(kind string, b []byte) string {
		f := filepath.Join(dir, kind)
		if err := os.WriteFile(f, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}), 0o600); err != nil {
			t.Fatal(err)
		}
		return f
	}
	return write("CERTIFICATE", der), write("PRIVATE KEY", pkcs8)
}

// bootstrap is one that a seed can be made of.
func bootstrap(t *testing.T, dir string) vmprovider.Bootstrap {
	t.Helper()
	cert, _ := certificate(t, dir)
	ca, err := os.ReadFile(cert)
	if err != nil {
		t.Fatal(err)
	}
	return vmprovider.Bootstrap{
		Contacts: []string{"10.0.2.2:50052"}, CA: ca, Token: "secret",
		RunnerURL: "http://10.0.2.2:50053/runner", AgentSHA256: map[string]string{"linux/amd64": strings.Repeat("0", 64)},
		Hostname: "guest", InstanceID: "guest",
	}
}
