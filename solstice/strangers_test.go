package solstice

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/selfca"
)

// A guest that opens connection after connection is closed the oldest of them;
// who is known, and who comes anew, is served.
func TestStrangers(t *testing.T) {
	ca, err := selfca.New("agents.test")
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca.PEM())
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	const limit = 4
	s := newALPNSplit(l, ca.ServerConfig(), limit)
	served := make(chan struct{})
	go func() { defer close(served); s.serve() }()
	stop := func() { s.close(); <-served }
	defer stop()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	greet := func() net.Conn { // a peer that does its handshake, as one that speaks HTTP/2
		t.Helper()
		cfg := &tls.Config{RootCAs: roots, ServerName: "agents.test", MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}}
		c, err := (&tls.Dialer{Config: cfg}).DialContext(ctx, "tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	greet()
	known, err := s.h2.Accept()
	if err != nil {
		t.Fatal(err)
	}
	done := known.(*tls.Conn).NetConn().(*guestConn).trust()
	var silent []net.Conn
	for range 3 * limit {
		c, err := new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		silent = append(silent, c)
	}
	greet()
	anew, err := s.h2.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := silent[0].Read(make([]byte, 1)); err == nil {
		t.Error("a silent connection was sent something")
	}
	s.strangers.mu.Lock()
	n := len(s.strangers.all)
	s.strangers.mu.Unlock()
	if n > limit {
		t.Errorf("%d strangers", n)
	}
	if known.(*tls.Conn).NetConn().(*guestConn).closed {
		t.Error("the known connection was closed")
	}
	done() // a stranger again, and the youngest
	_, _ = known.Close(), anew.Close()
	stop() // ends the handshakes under way
	if n := len(s.strangers.all) + len(s.strangers.from); n != 0 {
		t.Errorf("%d connections are still counted", n)
	}
}

// Of the addresses the one with the most connections has to give.
func TestStrangersByAddress(t *testing.T) {
	s := newStrangers(3)
	conn := func(addr string) *guestConn {
		a, b := net.Pipe()
		t.Cleanup(func() { _ = b.Close() })
		return s.admit(fromAddr{a, addr})
	}
	quiet := conn("192.0.2.1:1")
	var loud []*guestConn
	for range 5 {
		loud = append(loud, conn("192.0.2.2:1"))
	}
	if quiet.closed {
		t.Error("the only connection of an address had to give")
	}
	for i, g := range loud {
		if g.closed != (i < 3) {
			t.Errorf("connection %d: closed %t", i, g.closed)
		}
	}
	s.relieve()
	if !loud[3].closed || quiet.closed {
		t.Error("the wrong one had to give for a file descriptor")
	}
}

type fromAddr struct {
	net.Conn
	addr string
}

func (c fromAddr) RemoteAddr() net.Addr { return textAddr(c.addr) }

type textAddr string

func (textAddr) Network() string  { return "tcp" }
func (a textAddr) String() string { return string(a) }
