package solstice

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/blobstore"
	"github.com/solstice-ci/solstice-go/internal/store"
)

// offer is what an engine tells the others of one of its pools, as JSON in its
// row.
type offer struct {
	Name         string   `json:"name"`
	Labels       []string `json:"labels"`
	Host         string   `json:"host"`
	Capacity     int      `json:"capacity"`
	HostCapacity int      `json:"host_capacity"`
	HostBoots    int      `json:"host_boots,omitempty"`
	Warm         int      `json:"warm"`
	Problem      string   `json:"problem,omitempty"` // why it takes no jobs
}

// beat records that this engine is there, and what it offers. A draining one
// offers nothing.
func (e *Engine) beat(ctx context.Context) {
	offers := []offer{}
	e.mu.Lock()
	draining := e.draining
	e.mu.Unlock()
	if !draining {
		for _, p := range e.pools {
			offers = append(offers, offer{p.Name, p.Labels, p.Host, p.Capacity, p.HostCapacity, p.HostBoots, p.Warm, p.unprepared()})
		}
	}
	o := store.Orchestrator{
		ID: e.id, Addr: e.cfg.PeerAddr, Contacts: encode(e.contacts), Pools: encode(offers), Slots: e.cfg.MaxConcurrency,
	}
	if e.space.err() != nil {
		o.Slots = 0
	}
	if err := e.store.Beat(ctx, o, e.cfg.Timing.Lease); err != nil {
		if ctx.Err() == nil {
			e.log.WarnContext(ctx, "presence not recorded", "error", e.noted(err))
		}
		return
	}
	e.meet(ctx)
}

// fleet is the engines that are there, as one of them knows them.
type fleet struct {
	ids      []string
	contacts []string // where agents reach them, our own first
	offers   []offer  // pools of the others
}

// meet takes note of the engines that are there.
func (e *Engine) meet(ctx context.Context) {
	there, err := e.store.Orchestrators(ctx)
	if err != nil {
		if ctx.Err() == nil {
			e.log.WarnContext(ctx, "other orchestrators not known", "error", err)
		}
		return
	}
	f := &fleet{ids: []string{e.id}, contacts: slices.Clone(e.contacts)}
	for _, o := range there {
		if o.ID == e.id {
			continue
		}
		f.ids = append(f.ids, o.ID)
		f.offers = append(f.offers, decode[[]offer](o.Pools)...)
		for _, c := range decode[[]string](o.Contacts) {
			if !slices.Contains(f.contacts, c) {
				f.contacts = append(f.contacts, c)
			}
		}
	}
	if now := e.fleet.Load(); !slices.Equal(now.ids, f.ids) || !slices.Equal(now.contacts, f.contacts) || !reflect.DeepEqual(now.offers, f.offers) {
		e.fleet.Store(f)
	}
}

// heardOf meets an engine that is not known yet, so that agents hear of it at
// once. One that cannot be met is forgotten with the next beat.
func (e *Engine) heardOf(ctx context.Context, id string) {
	if id == "" || slices.Contains(e.fleet.Load().ids, id) {
		return
	}
	e.meet(ctx)
	if now := e.fleet.Load(); !slices.Contains(now.ids, id) {
		e.fleet.Store(&fleet{append(slices.Clone(now.ids), id), now.contacts, now.offers})
	}
}

// Contacts lists where agents are told to go, in order: to this engine, and then
// to the others that are there.
func (e *Engine) Contacts() []string { return slices.Clone(e.fleet.Load().contacts) }

// contactsFor is Contacts for the agents of a pool.
func (e *Engine) contactsFor(pool string) []string {
	if p := e.poolNamed(pool); p != nil && len(p.Contacts) > 0 {
		return slices.Clone(p.Contacts)
	}
	return e.Contacts()
}

// Peers lists where the other orchestrators that are there are reached, as
// their Config.PeerAddr says.
func (e *Engine) Peers(ctx context.Context) ([]string, error) {
	there, err := e.store.Orchestrators(ctx)
	if err != nil {
		return nil, fmt.Errorf("solstice: peers: %w", err)
	}
	var out []string
	for _, o := range there {
		if o.ID != e.id && o.Addr != "" {
			out = append(out, o.Addr)
		}
	}
	return out, nil
}

// PoolInfo is a pool of an orchestrator that is there.
type PoolInfo struct {
	Name         string    `json:"name"`
	Labels       []string  `json:"labels"`
	Host         string    `json:"host"`
	Orchestrator string    `json:"orchestrator"`
	Capacity     int       `json:"capacity"` // machines
	Machines     int       `json:"machines"` // not gone
	Busy         int       `json:"busy"`     // of these, with a job
	Warm         int       `json:"warm"`     // to be kept ready
	Ready        int       `json:"ready"`    // waiting for a job
	Booting      int       `json:"booting"`  // for a job or to wait for one
	Queued       int64     `json:"queued"`   // jobs queued for its labels, at most 1000
	SeenAt       time.Time `json:"seen_at"`  // when its orchestrator was there last
	// Problem says for people why no machines are made, or why none come to wait for
	// jobs; empty: they do.
	Problem string `json:"problem,omitempty"`

	room  int    // jobs that it could begin now
	boots string // why it cannot begin more, where that is the host's boots
}

// Pools lists the pools of all orchestrators that are there, by name.
func (e *Engine) Pools(ctx context.Context) ([]PoolInfo, error) {
	pools, err := e.poolInfos(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("solstice: pools: %w", err)
	}
	queued := map[string]int64{}
	for i := range pools {
		for _, label := range pools[i].Labels {
			if _, ok := queued[label]; !ok {
				if queued[label], err = e.store.QueuedJobs(ctx, label); err != nil {
					return nil, fmt.Errorf("solstice: pools: %w", err)
				}
			}
			pools[i].Queued = min(pools[i].Queued+queued[label], store.CountMax)
		}
	}
	return pools, nil
}

// poolInfos lists the pools that serve a label, or all, without Queued.
func (e *Engine) poolInfos(ctx context.Context, label string) ([]PoolInfo, error) {
	rows, err := e.store.Orchestrators(ctx)
	if err != nil {
		return nil, err
	}
	counts, err := e.store.MachineCounts(ctx)
	if err != nil {
		return nil, err
	}
	busy, err := e.store.AttemptCounts(ctx)
	if err != nil {
		return nil, err
	}
	failures, err := e.store.WarmFailures(ctx)
	if err != nil {
		return nil, err
	}
	now, err := e.store.Now(ctx)
	if err != nil {
		return nil, err
	}
	var out []PoolInfo
	for _, row := range rows {
		for _, o := range decode[[]offer](row.Pools) {
			if label != "" && !slices.Contains(o.Labels, label) {
				continue
			}
			p := PoolInfo{
				Name: o.Name, Labels: o.Labels, Host: o.Host, Orchestrator: row.ID, Capacity: o.Capacity, Warm: o.Warm, SeenAt: timeOf(row.SeenAt),
			}
			host, booting := 0, 0
			for _, c := range counts {
				if c.Host != o.Host {
					continue
				}
				host += c.Machines
				booting += c.Booting
				if c.Pool == o.Name {
					p.Machines, p.Busy, p.Ready, p.Booting = c.Machines, c.Busy, c.Idle, c.Booting
				}
			}
			for _, f := range failures {
				if f.Host == o.Host && f.Pool == o.Name && o.Warm > 0 {
					p.Problem = warmProblem(f, now)
				}
			}
			// A ready machine is room; it counts against neither capacity again.
			p.room = min(o.Capacity-p.Machines, o.HostCapacity-host)
			if o.HostBoots > 0 && p.room > 0 && booting >= o.HostBoots {
				p.boots = fmt.Sprintf("%s boots %s, as many as it may at once", o.Host, count(int64(booting), "machine"))
				p.room = 0
			}
			p.room = min(p.Ready+max(p.room, 0), row.Slots-busy[row.ID])
			if o.Problem != "" {
				p.Problem, p.room = o.Problem, 0
			}
			out = append(out, p)
		}
	}
	slices.SortStableFunc(out, func(a, b PoolInfo) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.Host, b.Host))
	})
	return out, nil
}

// Machine is a machine that is not gone.
type Machine struct {
	ID           string        `json:"id"`
	Pool         string        `json:"pool"`
	Host         string        `json:"host"`
	State        string        `json:"state"` // provisioning, ready, bound, destroying
	AttemptID    string        `json:"attempt_id,omitempty"`
	OS           string        `json:"os,omitempty"`
	Arch         string        `json:"arch,omitempty"`
	AgentVersion string        `json:"agent_version,omitempty"`
	CreatedAt    time.Time     `json:"created_at"`
	ContactAt    time.Time     `json:"contact_at,omitzero"` // when its agent was heard of last
	Age          time.Duration `json:"age"`                 // by the clock of the state, as CreatedAt
}

// MachineFilter selects machines; its zero value selects the first 50.
type MachineFilter struct {
	Pool  string // name; empty: all
	Limit int    // 0: 50, at most 500
	After string // machine ID: only those beyond it, for paging
}

// Machines lists machines that are not gone, oldest first.
func (e *Engine) Machines(ctx context.Context, f MachineFilter) ([]Machine, error) {
	if f.Limit <= 0 {
		f.Limit = 50
	}
	now, err := e.store.Now(ctx)
	if err != nil {
		return nil, fmt.Errorf("solstice: machines: %w", err)
	}
	rows, err := e.store.Machines(ctx, f.Pool, f.After, min(f.Limit, 500))
	if err != nil {
		return nil, fmt.Errorf("solstice: machines: %w", err)
	}
	out := make([]Machine, 0, len(rows))
	for _, m := range rows {
		out = append(out, Machine{
			ID: m.ID, Pool: m.Pool, Host: m.Host, State: string(m.State), AttemptID: m.AttemptID,
			OS: m.OS, Arch: m.Arch, AgentVersion: m.AgentVersion, CreatedAt: timeOf(m.CreatedAt), ContactAt: timeOf(m.ContactAt),
			Age: time.Duration(max(now-m.CreatedAt, 0)) * time.Microsecond,
		})
	}
	return out, nil
}

// ErrNotReady: the engine does not take on jobs, or what it needs is away.
var ErrNotReady = errors.New("solstice: not ready")

// probe is a name that no blob has.
const probe = "probe/none"

// Ready reports what keeps this engine from its work: it does not run or
// drains, has no room on disk, or database, queue or blob store do not answer.
// The error wraps
// ErrNotReady and names everything that is away. It costs a broadcast message,
// so ask every few seconds at most.
func (e *Engine) Ready(ctx context.Context) error {
	e.mu.Lock()
	serving, draining := e.serving, e.draining
	e.mu.Unlock()
	var errs []error
	failed := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%w: %s: %w", ErrNotReady, what, err))
		}
	}
	switch {
	case draining:
		failed("engine", errors.New("it drains"))
	case !serving:
		failed("engine", errors.New("it does not run"))
	}
	failed("disk", e.space.err())
	// At once: what does not answer uses up ctx, and is not to take others along.
	var database, queued, blobs error
	var asked sync.WaitGroup
	asked.Go(func() { _, database = e.store.Orchestrators(ctx) })
	asked.Go(func() { queued = e.publishWake(ctx, nil) }) // which wakes nobody
	if e.cfg.Blobs != nil {
		asked.Go(func() { blobs = checkBlobs(ctx, e.cfg.Blobs) })
	}
	asked.Wait()
	failed("database", database)
	failed("queue", queued)
	failed("blob store", blobs)
	return errors.Join(errs...)
}

func checkBlobs(ctx context.Context, s blobstore.Store) error {
	if c, ok := blobstore.As[blobstore.Checker](s); ok {
		return c.Check(ctx)
	}
	if _, err := s.Stat(ctx, probe); !errors.Is(err, blobstore.ErrNotFound) {
		return err
	}
	return nil
}
