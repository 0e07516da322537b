package agent

import (
	"log/slog"
	"slices"
	"sync"
)

// contacts is the list of endpoints, and which of them is in use. It is safe
// for concurrent use.
type contacts struct {
	log  *slog.Logger
	mu   sync.Mutex
	list []string
	pos  int
}

func (c *contacts) current() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.list[c.pos]
}

// next moves on from a contact that failed.
func (c *contacts) next() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pos = (c.pos + 1) % len(c.list)
}

// all lists the contacts, the one in use first.
func (c *contacts) all() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append(slices.Clone(c.list[c.pos:]), c.list[:c.pos]...)
}

// replace takes a list from the server; malformed entries are left out, and an
// empty list is ignored. The contact in use stays in use where it is listed.
func (c *contacts) replace(list []string) {
	var ok []string
	for _, addr := range list {
		if err := checkContact(addr); err != nil {
			c.log.Warn("the server named a contact that is none", "error", err)
			continue
		}
		if !slices.Contains(ok, addr) {
			ok = append(ok, addr)
		}
	}
	if len(ok) == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	pos := slices.Index(ok, c.list[c.pos])
	c.list, c.pos = ok, max(pos, 0)
}
