package solstice

import "sync"

// flag is a wake-up that is remembered until it is taken: set never blocks.
type flag struct{ c chan struct{} }

func newFlag() flag { return flag{make(chan struct{}, 1)} }

func (f flag) set() {
	select {
	case f.c <- struct{}{}:
	default:
	}
}

// hub tells the followers of a run, job or attempt in this process that it
// changed. It carries no data: who is told reads again.
type hub struct {
	mu   sync.Mutex
	subs map[string]map[*flag]struct{}
}

func newHub() *hub { return &hub{subs: map[string]map[*flag]struct{}{}} }

func (h *hub) notify(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for f := range h.subs[id] {
		f.set()
	}
}

// subscribe returns a flag that is set whenever one of ids changes, and a
// function that ends it.
func (h *hub) subscribe(ids ...string) (<-chan struct{}, func()) {
	f := newFlag()
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, id := range ids {
		if h.subs[id] == nil {
			h.subs[id] = map[*flag]struct{}{}
		}
		h.subs[id][&f] = struct{}{}
	}
	return f.c, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		for _, id := range ids {
			delete(h.subs[id], &f)
			if len(h.subs[id]) == 0 {
				delete(h.subs, id)
			}
		}
	}
}
