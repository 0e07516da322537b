package solstice

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/internal/store"
)

// recipe says what a pool's machines are made from: a machine of another one
// gets none of its jobs.
func (p *Pool) recipe() string {
	image := p.Image
	if image.Digest != "" {
		image.Path = "" // the same file elsewhere
	}
	sum := sha256.Sum256(encode(struct {
		Image                  any
		CPUs                   int
		MemoryBytes, DiskBytes int64
		AgentSHA256            map[string]string
		Recipe                 string
	}{image, p.CPUs, p.MemoryBytes, p.DiskBytes, p.AgentSHA256, p.Recipe}))
	return hex.EncodeToString(sum[:16])
}

// others are the other pools of the host, of all engines that are there.
func (p *pool) others() []store.PoolRoom {
	var out []store.PoolRoom
	add := func(name string, labels []string, host string, capacity int) {
		same := func(o store.PoolRoom) bool { return o.Pool == name }
		if host == p.Host && name != p.Name && !slices.ContainsFunc(out, same) {
			out = append(out, store.PoolRoom{Pool: name, Labels: labels, Capacity: capacity})
		}
	}
	if p.e.slotsLeft() > 0 { // else their jobs would not begin here
		for _, o := range p.e.pools {
			add(o.Name, o.Labels, o.Host, o.Capacity)
		}
	}
	for _, o := range p.e.fleet.Load().offers {
		add(o.Name, o.Labels, o.Host, o.Capacity)
	}
	return out
}

// makeRoom has machines of other pools that wait for jobs give way to at most n
// of this pool's.
func (p *pool) makeRoom(ctx context.Context, r store.ClaimRequest, n int) error {
	if n <= 0 || len(r.Others) == 0 {
		return nil
	}
	going, err := p.e.store.MakeRoom(ctx, r, n)
	for _, m := range going {
		p.e.log.InfoContext(ctx, "a warm machine gives way to a job", "machine", m.ID, "pool", m.Pool, "to", p.Name)
		p.e.background(func() { p.e.destroy(context.WithoutCancel(ctx), m) })
	}
	return err
}

// kickHost has the pools of a host claim: there may be room.
func (e *Engine) kickHost(host string) {
	for _, p := range e.pools {
		if p.Host == host {
			p.kick.set()
		}
	}
}

// answerTime is how long an agent that waits for a job may be silent: several
// heartbeats.
func (e *Engine) answerTime() time.Duration {
	return max(2*e.cfg.Timing.Heartbeat, e.cfg.Timing.Lease/2)
}

// expectAnswer gives a job back that was bound to a waiting machine whose agent
// is silent from then on: the machine may have frozen since it was heard of. Its
// job goes to another one, once this one is destroyed.
func (e *Engine) expectAnswer(ctx context.Context, c store.Claimed) {
	bound := time.Now()
	e.background(func() {
		for {
			select {
			case <-ctx.Done():
				return // the agent deadline remains
			case <-time.After(e.answerTime()):
			}
			a, err := e.store.Attempt(ctx, c.Attempt.ID)
			switch {
			case err != nil:
				continue
			case a.State != store.AttemptAssigned || a.Epoch != c.Attempt.Epoch:
				return
			}
			heard := bound
			e.mu.Lock()
			if s := e.sessions[c.Machine.ID]; s != nil {
				heard = time.Unix(0, max(s.contact.Load(), bound.UnixNano()))
			}
			e.mu.Unlock()
			if time.Since(heard) >= e.answerTime() {
				e.lose(context.WithoutCancel(ctx), a, ClassNoAnswer, "its machine had waited for a job, and did not answer when it got this one", "")
			}
		}
	})
}

// warmFailed gets rid of a machine that did not come to wait for a job, or ended
// while it did. Its pool waits before it makes another one.
func (e *Engine) warmFailed(ctx context.Context, m *store.Machine, why string) {
	tick := e.cfg.Timing.Tick
	done, err := e.store.WarmFailed(ctx, m.ID, clip(why, 500), tick, 60*tick)
	if err != nil {
		e.log.WarnContext(ctx, "machine not marked for destruction", "machine", m.ID, "error", err)
		return
	}
	if done { // it got no job meanwhile
		e.log.WarnContext(ctx, "warm machine failed", "machine", m.ID, "pool", m.Pool, "reason", why)
		e.background(func() { e.destroy(context.WithoutCancel(ctx), m) })
	}
}

// lastLine is how a console ends, for a reason.
func lastLine(console string) string {
	lines := strings.Split(strings.TrimSpace(console), "\n")
	last := strings.TrimSpace(lines[len(lines)-1])
	if last == "" {
		return ""
	}
	return "; its console ends: " + clip(last, 200)
}

// tend replaces machines that waited too long for a job, and those whose agents
// are silent, and lets go what is more than Warm, oldest first. waiting is
// sorted by age; booting is how many are on the way there.
func (p *pool) tend(ctx context.Context, waiting []*store.Machine, booting int, now int64) {
	e, t := p.e, p.e.cfg.Timing
	quiet, oldest := (t.Lease + 2*t.Heartbeat).Microseconds(), p.WarmMaxAge.Microseconds()
	before := p.silent
	p.silent = map[string]suspect{}
	surplus := booting - p.Warm
	for _, m := range waiting {
		if m.Recipe == p.made {
			surplus++
		}
	}
	replacing := booting > 0
	for _, m := range waiting {
		why := ""
		if now-m.ContactAt > quiet {
			// As with attempts: neither a clock nor an outage makes it silent, and its
			// agent gets the time to find an engine that has just started.
			s, ok := before[m.ID]
			if !ok || s.contact != m.ContactAt {
				s = suspect{m.ContactAt, time.Now()}
			}
			p.silent[m.ID] = s
			if time.Since(s.since) >= 2*e.renewal() {
				why = "its agent was not heard of while it waited for a job"
			}
		}
		switch age := now - m.ReadyAt; {
		case why != "":
		case age > 2*oldest, age > oldest && !replacing: // one at a time
			why, replacing = "it waited too long for a job", true
		case surplus > 0 && m.Recipe == p.made && m.Owner == e.id:
			why = "more machines wait for a job than are to"
		default:
			continue
		}
		if m.Recipe == p.made {
			surplus--
		}
		e.discard(ctx, m, why)
	}
}

// warmProblem says for people why a pool's machines do not come to wait for jobs.
func warmProblem(f *store.WarmFailure, now int64) string {
	next := "one is tried now"
	if wait := time.Duration(f.RetryAt-now) * time.Microsecond; wait > 0 {
		next = "one is tried in " + wait.Round(time.Second).String()
	}
	return fmt.Sprintf("no machine comes to wait for a job, %s in a row: %s; %s", count(int64(f.Failures), "failure"), f.Reason, next)
}
