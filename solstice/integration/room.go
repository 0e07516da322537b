package integration

import (
	"container/list"
	"sync"
)

// room is what the requests of a server share: places, and bytes of bodies. What has
// arrived keeps its part. Of those that are still being read the one that is so for
// longest makes way when there is too little: who sends slowly keeps nobody out, and
// who does not is done before as many others have come as there are places.
type room struct {
	mu      sync.Mutex
	places  int   // free
	bytes   int64 // free
	reading list.List
}

// guest has a place.
type guest struct {
	room *room
	held int64
	end  func()        // ends the read that is under way
	at   *list.Element // of room.reading; nil: it is not being read
	gone bool          // it has had to make way
}

// enter takes a place; nil: there is none. end is called at most once, while the
// guest is being read.
func (m *room) enter(end func()) *guest {
	m.mu.Lock()
	defer m.mu.Unlock()
	g := &guest{room: m, end: end}
	if !m.free(g, 1, 0) {
		return nil
	}
	m.places--
	g.at = m.reading.PushBack(g)
	return g
}

// free makes room for what g wants; it does not for one that came before all others.
func (m *room) free(g *guest, places int, bytes int64) bool {
	for m.places < places || m.bytes < bytes {
		first := m.reading.Front()
		if first == nil || first == g.at {
			return false
		}
		first.Value.(*guest).makeWay()
	}
	return true
}

func (g *guest) makeWay() {
	g.release()
	g.gone = true
	g.end()
}

func (g *guest) release() {
	if g.at != nil {
		g.room.reading.Remove(g.at)
		g.at = nil
	}
	g.room.places++
	g.room.bytes += g.held
	g.held = 0
}

// grow takes more bytes; false: there are none for it, or it has had to make way.
func (g *guest) grow(n int64) bool {
	m := g.room
	m.mu.Lock()
	defer m.mu.Unlock()
	if g.gone || !m.free(g, 0, n) {
		return false
	}
	m.bytes -= n
	g.held += n
	return true
}

// arrived says that nothing more is read; false: it has had to make way before.
// After that end is not called any more.
func (g *guest) arrived() bool {
	m := g.room
	m.mu.Lock()
	defer m.mu.Unlock()
	if g.at != nil {
		m.reading.Remove(g.at)
		g.at = nil
	}
	return !g.gone
}

func (g *guest) leave() {
	g.room.mu.Lock()
	defer g.room.mu.Unlock()
	if !g.gone {
		g.release()
	}
}
