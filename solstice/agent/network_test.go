package agent_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/solstice-ci/solstice-go/solstice/agent"
)

// splitALPN serves gRPC and HTTPS on one port, told apart by ALPN.
func splitALPN(ln net.Listener, cert tls.Certificate, g *grpc.Server, h *http.Server) (stop func()) {
	conf := &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2", "http/1.1"},
	}
	lg, lh := newChanListener(ln.Addr()), newChanListener(ln.Addr())
	var wg sync.WaitGroup
	wg.Go(func() { _ = g.Serve(lg) })
	wg.Go(func() { _ = h.Serve(lh) })
	wg.Go(func() {
		for {
			raw, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				conn := tls.Server(raw, conf)
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				defer cancel()
				if err := conn.HandshakeContext(ctx); err != nil {
					_ = raw.Close()
					return
				}
				switch conn.ConnectionState().NegotiatedProtocol {
				case "h2":
					lg.put(conn)
				case "http/1.1":
					lh.put(conn)
				default:
					_ = conn.Close()
				}
			})
		}
	})
	return func() {
		_ = ln.Close()
		_ = lg.Close()
		_ = lh.Close()
		g.Stop()
		_ = h.Close()
		wg.Wait()
	}
}

type chanListener struct {
	addr net.Addr
	ch   chan net.Conn
	done chan struct{}
	once sync.Once
}

func newChanListener(a net.Addr) *chanListener {
	return &chanListener{addr: a, ch: make(chan net.Conn), done: make(chan struct{})}
}

func (l *chanListener) put(c net.Conn) {
	select {
	case l.ch <- c:
	case <-l.done:
		_ = c.Close()
	}
}

func (l *chanListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.ch:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *chanListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *chanListener) Addr() net.Addr { return l.addr }

// cutListener breaks connections after so many bytes.
type cutListener struct {
	net.Listener
	s *server
}

func (l *cutListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &cutConn{Conn: c, s: l.s}, nil
}

type cutConn struct {
	net.Conn
	s *server
	n int64
}

func (c *cutConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.n += int64(n)
	c.s.bytesRead.Add(int64(n))
	if c.s.cutEvery > 0 && c.n > c.s.cutEvery {
		_ = c.Close()
		return 0, io.ErrUnexpectedEOF
	}
	return n, err
}

func makeCert(t testing.TB) (caPEM []byte, leaf tls.Certificate) {
	t.Helper()
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	must(t, err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(2), DNSNames: []string{agent.ServerName}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, cert, ca, &key.PublicKey, caKey)
	must(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		tls.Certificate{Certificate: [][]byte{leafDER}, PrivateKey: key}
}

// startRelay forwards connections from ln to target; the result ends it all.
func startRelay(ln net.Listener, target string, count *atomic.Int32) (stop func()) {
	var (
		mu    sync.Mutex
		wg    sync.WaitGroup
		over  bool
		conns []net.Conn
	)
	track := func(c net.Conn) bool {
		mu.Lock()
		defer mu.Unlock()
		if over {
			_ = c.Close()
			return false
		}
		conns = append(conns, c)
		return true
	}
	wg.Go(func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			count.Add(1)
			out, err := net.Dial("tcp", target)
			if err != nil {
				_ = in.Close()
				continue
			}
			if !track(in) || !track(out) {
				_ = out.Close()
				return
			}
			for _, p := range [][2]net.Conn{{in, out}, {out, in}} {
				wg.Go(func() {
					_, _ = io.Copy(p[0], p[1])
					_ = p[0].Close()
				})
			}
		}
	})
	return func() {
		_ = ln.Close()
		mu.Lock()
		over = true
		for _, c := range conns {
			_ = c.Close()
		}
		mu.Unlock()
		wg.Wait()
	}
}

// reopenRelay listens again where a relay was closed.
func reopenRelay(t *testing.T, r *relay, target string) error {
	ln, err := net.Listen("tcp", r.addr)
	if err != nil {
		return err
	}
	t.Cleanup(startRelay(ln, target, &r.conns))
	return nil
}
