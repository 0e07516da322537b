package solstice_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/logstream"
)

// neighbours are engines of this process that reach each other by a name.
type neighbours struct {
	mu    sync.Mutex
	there map[string]*solstice.Engine
	asked map[string]int
	told  atomic.Int64 // bytes
}

func (n *neighbours) questions(addr string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.asked[addr]
}

var errAway = errors.New("the neighbour is away")

func (n *neighbours) set(addr string, e *solstice.Engine) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.there[addr] = e
}

func (n *neighbours) at(addr string) *solstice.Engine {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.there[addr]
}

// Tail implements solstice.Peers.
func (n *neighbours) Tail(ctx context.Context, addr, attemptID string, from int64) iter.Seq2[logstream.Chunk, error] {
	return func(yield func(logstream.Chunk, error) bool) {
		n.mu.Lock()
		n.asked[addr]++
		n.mu.Unlock()
		e := n.at(addr)
		if e == nil {
			yield(logstream.Chunk{}, errAway)
			return
		}
		for c, err := range e.LocalLog(ctx, attemptID, from) {
			if err == nil && n.at(addr) != e {
				err = errAway
			}
			if err == nil {
				n.told.Add(int64(len(c.Data)))
			}
			if !yield(c, err) || err != nil {
				return
			}
		}
	}
}

// TestFollowAtPeer: an engine follows a log that another one receives, through
// that one, reads what is stored when it goes away, and is with the next one
// when the agent is; every byte comes once and in order.
func TestFollowAtPeer(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		p := newPlant(t, url)
		n := &neighbours{there: map[string]*solstice.Engine{}, asked: map[string]int{}}
		with := func(addr string, edit func(*solstice.Config)) (*solstice.Engine, func()) {
			e, stop := p.start(t, func(c *solstice.Config) {
				c.PeerAddr, c.Peers = addr, n
				edit(c)
			})
			n.set(addr, e)
			return e, func() { n.set(addr, nil); stop() }
		}
		ofNoPool := func(c *solstice.Config) { c.Pools = nil }
		owner, stopOwner := with("owner:1", func(*solstice.Config) {})
		reader, _ := with("reader:1", func(c *solstice.Config) {
			c.Pools, c.Contacts = nil, []string{"127.0.0.1:1"} // no agent gets there
		})

		gates := filepath.Join(p.Dir, "gate")
		open := func(s string) {
			if err := os.WriteFile(gates+s, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		wait := func(s string) string { return "while [ ! -e " + gates + s + " ]; do sleep 0.05; done; " }
		r := p.submit(t, owner, `
jobs:
  a:
    checkout: false
    steps:
      - run: |
          seq 1 20000; `+wait("1")+`
          seq 20001 40000; `+wait("2")+`
          seq 40001 60000; `+wait("3")+`
          echo the end
`)
		var attempt string
		eventually(t, "the job runs", func() bool {
			as, err := owner.Attempts(t.Context(), r.Jobs[0].ID)
			if err == nil && len(as) > 0 && as[0].State == solstice.AttemptRunning {
				attempt = as[0].ID
			}
			return attempt != ""
		})
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		var mu sync.Mutex
		var got strings.Builder
		ended := make(chan error, 1)
		go func() {
			for c, err := range reader.Log(ctx, attempt, 0) {
				if err != nil {
					ended <- err
					return
				}
				mu.Lock()
				if c.Offset != int64(got.Len()) {
					t.Errorf("bytes at %d, expected at %d", c.Offset, got.Len())
				}
				got.Write(c.Data)
				mu.Unlock()
			}
			ended <- nil
		}()
		has := func(s string) {
			t.Helper()
			eventually(t, "the reader has "+s, func() bool {
				mu.Lock()
				defer mu.Unlock()
				return strings.HasSuffix(got.String(), s+"\n")
			})
		}
		has("20000")
		if n.told.Load() == 0 {
			t.Error("nothing came through the peer")
		}
		// The owner cannot be asked, but receives on.
		n.set("owner:1", nil)
		open("1")
		has("40000")
		// It is gone, and the agent moves to a third, of which it knows from the first.
		third, _ := with("third:1", ofNoPool)
		eventually(t, "the owner knows the third", func() bool { return slices.Contains(owner.Contacts(), third.AgentAddr()) })
		for range 2 { // the agent was heard of after that, and so was told
			var last time.Time
			eventually(t, "the agent is in contact", func() bool {
				ms, err := owner.Machines(ctx, solstice.MachineFilter{})
				was := last
				if err == nil && len(ms) == 1 {
					last = ms[0].ContactAt
				}
				return !was.IsZero() && last.After(was)
			})
		}
		stopOwner()
		open("2")
		has("60000")
		eventually(t, "the third is asked", func() bool { return n.questions("third:1") > 0 })
		open("3")
		if err := <-ended; err != nil {
			t.Errorf("the log ended with %v", err)
		}
		var want strings.Builder
		for i := range 60000 {
			fmt.Fprintln(&want, i+1)
		}
		want.WriteString("the end\n")
		if got.String() != want.String() {
			t.Errorf("%d bytes, want %d", got.Len(), want.Len())
		}
		if r := finish(t, reader, r.ID); r.State != solstice.RunSucceeded || r.Jobs[0].Attempts != 1 {
			t.Errorf("run: %+v", r)
		}
		// What is over is nobody's to tell.
		asked := n.questions("third:1")
		if log := jobLog(t, reader, r.Jobs[0].ID); log != want.String() || n.questions("third:1") != asked {
			t.Errorf("%d bytes of the log that is over, %d more questions", len(log), n.questions("third:1")-asked)
		}
		// The machine is its pool's to destroy, which comes again.
		p.start(t)
		eventually(t, "the machine is gone", func() bool {
			ms, err := reader.Machines(ctx, solstice.MachineFilter{})
			return err == nil && len(ms) == 0
		})
	})
}
