package solstice

import (
	"net"
	"slices"
	"sync"
)

// strangers bounds the connections whose peers have not shown who they are, so
// that a guest which opens many keeps nobody else's agent out. When there are
// too many, the oldest of the address with the most is closed: an agent needs
// its connection for moments before it is known, and comes back if that was
// its own.
type strangers struct {
	max int

	mu   sync.Mutex
	all  []*guestConn   // oldest first
	from map[string]int // their number by address
}

func newStrangers(limit int) *strangers {
	return &strangers{max: limit, from: map[string]int{}}
}

// guestConn is a connection to the agents' endpoint.
type guestConn struct {
	net.Conn
	s    *strangers
	addr string // without port

	// Owned by s.
	stranger bool
	known    int // calls under way that showed a credential
	closed   bool
}

// admit takes a new connection on.
func (s *strangers) admit(c net.Conn) *guestConn {
	addr, _, err := net.SplitHostPort(c.RemoteAddr().String())
	if err != nil {
		addr = c.RemoteAddr().String()
	}
	g := &guestConn{Conn: c, s: s, addr: addr}
	s.mu.Lock()
	s.enter(g)
	s.mu.Unlock()
	s.trim(s.max)
	return g
}

// trim closes connections until there are at most limit.
func (s *strangers) trim(limit int) {
	for {
		s.mu.Lock()
		if len(s.all) <= limit {
			s.mu.Unlock()
			return
		}
		most := ""
		for addr, n := range s.from {
			if n > s.from[most] {
				most = addr
			}
		}
		g := s.all[slices.IndexFunc(s.all, func(g *guestConn) bool { return g.addr == most })]
		s.leave(g)
		s.mu.Unlock()
		_ = g.Close()
	}
}

// relieve closes one connection, where there is one, since the process has no
// more file descriptors.
func (s *strangers) relieve() {
	s.mu.Lock()
	n := len(s.all)
	s.mu.Unlock()
	s.trim(max(n-1, 0))
}

func (s *strangers) enter(g *guestConn) {
	g.stranger = true
	s.all = append(s.all, g)
	s.from[g.addr]++
}

func (s *strangers) leave(g *guestConn) {
	if !g.stranger {
		return
	}
	g.stranger = false
	i := slices.Index(s.all, g)
	s.all = slices.Delete(s.all, i, i+1)
	if s.from[g.addr]--; s.from[g.addr] == 0 {
		delete(s.from, g.addr)
	}
}

// trust keeps the connection open as long as a call of a peer that showed a
// credential is under way: until done is called, once.
func (g *guestConn) trust() (done func()) {
	s := g.s
	s.mu.Lock()
	defer s.mu.Unlock()
	g.known++
	s.leave(g)
	return func() {
		s.mu.Lock()
		g.known--
		if g.known == 0 && !g.closed {
			s.enter(g)
		}
		s.mu.Unlock()
		s.trim(s.max)
	}
}

// Close implements net.Conn.
func (g *guestConn) Close() error {
	g.s.mu.Lock()
	g.closed = true
	g.s.leave(g)
	g.s.mu.Unlock()
	return g.Conn.Close()
}
