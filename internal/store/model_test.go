package store_test

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/uptrace/bun"
	"pgregory.net/rapid"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

// step is one operation of a program. Its numbers choose from what there is
// when it runs, so that programs shrink to readable ones.
type step struct {
	Op      string
	A, B, C int
}

// GoString is what rapid prints.
func (s step) GoString() string { return fmt.Sprintf("%s(%d,%d,%d)", s.Op, s.A, s.B, s.C) }

// weights of the operations in a program.
var weights = map[string]int{
	"submit": 6, "approve": 2, "claim": 10, "enroll": 4, "attach": 9, "start": 8, "progress": 8, "finish": 7, "retry": 3, "lose": 4,
	"cancel": 1, "renew": 3, "release": 1, "reap": 2, "discard": 2, "discard-idle": 2, "make-room": 4, "gone": 8, "unhold": 2, "lease": 2,
	"relay": 3, "relay-done": 3, "relay-crash": 1, "pass": 4, "jump": 1, "restart": 2,
}

// programs of about forty steps. Numbers are drawn bit by bit, since rapid
// prefers small ones, and steps in groups, since its slices are short.
func programs() *rapid.Generator[[]step] {
	var ops []string
	for _, op := range slices.Sorted(maps.Keys(weights)) {
		for range weights[op] {
			ops = append(ops, op)
		}
	}
	number := func(t *rapid.T, bits int) (n int) {
		for range bits {
			n <<= 1
			if rapid.Bool().Draw(t, "bit") {
				n++
			}
		}
		return n
	}
	one := rapid.Custom(func(t *rapid.T) step {
		return step{Op: ops[number(t, 10)%len(ops)], A: number(t, 6), B: number(t, 6), C: number(t, 6)}
	})
	groups := rapid.SliceOfN(rapid.SliceOfN(one, 1, 40), 2, 40)
	return rapid.Map(groups, func(g [][]step) []step { return slices.Concat(g...) })
}

// subject is what the model is compared with: the store, or one with a fault.
type subject interface {
	Now(ctx context.Context) (int64, error)
	InsertRun(ctx context.Context, run *store.Run, jobs []*store.Job) error
	WithRun(ctx context.Context, runID string, fn func(ctx context.Context, t *store.RunTx) error) (store.Change, error)
	Claim(ctx context.Context, r store.ClaimRequest) ([]store.Claimed, error)
	Enroll(ctx context.Context, r store.EnrollRequest) (*store.Machine, error)
	Attach(ctx context.Context, machineID, owner string, lease time.Duration) (*store.Machine, *store.Attempt, *store.Job, *store.Run, error)
	Progress(ctx context.Context, ref store.AttemptRef, acked, logSize int64, steps []*store.Step) error
	Renew(ctx context.Context, owner string, lease time.Duration, attempts, machines []string) (map[string]int64, map[string]int64, error)
	Release(ctx context.Context, owner string) error
	Overdue(ctx context.Context, deadline time.Duration) (store.Due, error)
	MachineDestroying(ctx context.Context, id, reason string) error
	DiscardIdle(ctx context.Context, id, reason string) (bool, error)
	WarmFailed(ctx context.Context, id, reason string, first, most time.Duration) (bool, error)
	MakeRoom(ctx context.Context, r store.ClaimRequest, n int) ([]*store.Machine, error)
	MachineGone(ctx context.Context, id string) ([]string, error)
	ReleaseHolds(ctx context.Context, olderThan time.Duration) ([]string, error)
	Lease(ctx context.Context, name, owner string, ttl time.Duration) (bool, error)
	OutboxClaim(ctx context.Context, owner string, limit int, lease time.Duration) ([]*store.OutboxMessage, error)
	OutboxDone(ctx context.Context, ids ...int64) error
	OutboxRelease(ctx context.Context, owner string) error
}

// fault makes a store wrong, to see that the model notices.
type fault struct {
	wrap func(s subject, db *bun.DB) subject
	// ref alters what a transition is fenced with.
	ref func(ctx context.Context, t *store.RunTx, ref store.AttemptRef) store.AttemptRef
	// restart happens before a new process opens the database.
	restart func(ctx context.Context, db *bun.DB) error
}

// The model: what there is, in words of its own.
type (
	mRun struct {
		id, state, cancel, delivery, key, path string
		begun                                  bool
	}
	mJob struct {
		id, run, key, label, repo string
		needs                     []string
		state, attempt, hold      string
		prio, attempts            int
		queued                    int64
		retries                   map[string]int
	}
	mAttempt struct {
		id, job, run, machine, state, owner, cancel string
		epoch, acked, size                          int64
		lease, contact, deadline                    int64
	}
	mMachine struct {
		id, pool, host, state, owner, attempt, nonce string
		lease, contact, bootBy, destroying           int64
		created, ready                               int64
	}
	mFailure struct {
		n         int
		at, retry int64
	}
	mClaim struct {
		owner string
		until int64
	}
)

// model drives a store and predicts it.
type model struct {
	db    *bun.DB
	fault fault
	s     subject

	wall     time.Time // time of day
	elapsed  time.Duration
	now      int64 // the store's time
	durable  int64 // the latest time of a committed transaction
	latest   int64
	ids      int
	runs     map[string]*mRun
	jobs     map[string]*mJob
	attempts map[string]*mAttempt
	machines map[string]*mMachine
	failures map[string]*mFailure // of warm machines, by pool
	leases   map[string]mClaim
	claims   map[int64]mClaim                  // of messages
	refs     []store.AttemptRef                // all that anybody ever had
	taken    map[string][]*store.OutboxMessage // by relay: claimed, not settled
	sent     *published
	rows     *rows
	quiet    int // steps since rows were read
}

// newModel empties the database.
func newModel(ctx context.Context, db *bun.DB, f fault) (*model, error) {
	for _, table := range []string{"outbox", "leases", "steps", "machines", "warm_failures", "attempts", "jobs", "runs"} {
		if _, err := db.NewRaw("DELETE FROM ?", bun.Ident(table)).Exec(ctx); err != nil {
			return nil, err
		}
	}
	if _, err := db.NewRaw("UPDATE meta SET value = '0' WHERE key = 'clock'").Exec(ctx); err != nil {
		return nil, err
	}
	m := &model{
		db: db, fault: f, wall: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
		runs: map[string]*mRun{}, jobs: map[string]*mJob{}, attempts: map[string]*mAttempt{}, machines: map[string]*mMachine{}, failures: map[string]*mFailure{},
		leases: map[string]mClaim{}, claims: map[int64]mClaim{},
		taken: map[string][]*store.OutboxMessage{}, sent: newPublished(),
	}
	return m, m.restart(ctx)
}

// handClock is PostgreSQL's clock in the hands of the model: all processes
// share it, and it jumps with the server's time of day.
type handClock struct{ m *model }

func (c handClock) Now(context.Context, bun.IDB) (int64, error) { return c.m.wall.UnixMicro(), nil }

// restart begins a process, without a word from the one before. On SQLite its
// time goes on from the mark, which may be a second behind.
func (m *model) restart(ctx context.Context) error {
	if m.fault.restart != nil {
		if err := m.fault.restart(ctx, m.db); err != nil {
			return err
		}
	}
	clock := store.Clock(handClock{m})
	if !sqldb.IsPostgres(m.db) {
		clock = store.NewClock(m.db, store.ClockOptions{Wall: func() time.Time { return m.wall }, Elapsed: func() time.Duration { return m.elapsed }})
	}
	s, err := store.New(ctx, m.db, store.Options{Changed: modelMessages, Clock: clock})
	if err != nil {
		return err
	}
	m.s = s
	if m.fault.wrap != nil {
		m.s = m.fault.wrap(s, m.db)
	}
	now, err := s.Now(ctx)
	if err != nil {
		return err
	}
	first, last := m.wall.UnixMicro(), m.wall.UnixMicro()
	if !sqldb.IsPostgres(m.db) {
		first, last = max(first, m.durable-time.Second.Microseconds()), max(last, m.durable)
	}
	if now < first || now > last {
		return fmt.Errorf("a process begins at %d; the time of day is %d, the last commit was at %d", now, m.wall.UnixMicro(), m.durable)
	}
	m.now = now
	return nil
}

// run runs a program and then, where end says so, everything to its end. Its
// error says what the store did wrong.
func (m *model) run(ctx context.Context, program []step, end bool) error {
	for i, s := range program {
		if err := m.step(ctx, s, i == len(program)-1); err != nil {
			return fmt.Errorf("step %d, %#v: %w", i, s, err)
		}
	}
	if !end {
		return nil
	}
	if sqldb.IsPostgres(m.db) { // corrected, however far it jumped back
		m.pass(time.Duration(max(0, m.latest-m.now)) * time.Microsecond)
	}
	return drain(ctx, m.s, m.db, m.sent, func(d time.Duration) { m.pass(d) })
}

func (m *model) pass(d time.Duration) {
	m.wall, m.elapsed = m.wall.Add(d), m.elapsed+d
}

func (m *model) step(ctx context.Context, s step, last bool) error {
	m.latest = max(m.latest, m.now)
	wrote, err := m.ops()[s.Op](ctx, s)
	if err != nil {
		return err
	}
	if wrote {
		m.durable = m.now
	}
	now, err := m.s.Now(ctx)
	if err != nil {
		return err
	}
	if now != m.now {
		return fmt.Errorf("the time is %d, want %d", now, m.now)
	}
	if m.quiet++; !wrote && !last && m.quiet < 8 {
		return nil // what a refusal changed nevertheless shows later, for less
	}
	m.quiet = 0
	seen, err := look(ctx, m.db)
	if err != nil {
		return err
	}
	if err := audit(m.rows, seen, m.sent, max(m.latest, m.now)); err != nil {
		return err
	}
	m.rows = seen
	return m.compare()
}

type opFunc = func(ctx context.Context, s step) (wrote bool, err error)

func (m *model) ops() map[string]opFunc {
	return map[string]opFunc{
		"submit": m.submit, "approve": m.approve, "claim": m.claim, "enroll": m.enroll, "attach": m.attach,
		"start": m.start, "progress": m.progress, "finish": m.finish, "retry": m.retry, "lose": m.lose,
		"cancel": m.cancel, "renew": m.renew, "release": m.release, "reap": m.reap,
		"discard": m.discard, "discard-idle": m.discardIdle, "make-room": m.makeRoom, "gone": m.gone, "unhold": m.unhold, "lease": m.lease,
		"relay": m.relay, "relay-done": m.relayDone, "relay-crash": m.relayCrash,
		"pass": func(_ context.Context, s step) (bool, error) {
			d := []time.Duration{400 * time.Millisecond, time.Minute, 4 * time.Minute, 15 * time.Minute}[s.A%4]
			m.pass(d)
			m.now += d.Microseconds()
			return false, nil
		},
		"jump": func(_ context.Context, s step) (bool, error) {
			m.wall = m.wall.Add([]time.Duration{-24 * time.Hour, 24 * time.Hour}[s.A%2])
			if sqldb.IsPostgres(m.db) {
				m.now = m.wall.UnixMicro() // there the server's time is the time
			}
			return false, nil
		},
		"restart": func(ctx context.Context, _ step) (bool, error) { return false, m.restart(ctx) },
	}
}

// ---- picking

func owner(n int) string { return fmt.Sprint("o", n%3) }

func pick[T any](from map[string]*T, n int, fits func(*T) bool) *T {
	var ids []string
	for id, x := range from {
		if fits == nil || fits(x) {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	slices.Sort(ids)
	return from[ids[n%len(ids)]]
}

func (m *model) id(prefix string) string {
	m.ids++
	return fmt.Sprintf("%s%05d", prefix, m.ids)
}

// ref gives the current epoch of an attempt, mostly, or what somebody had once.
func (m *model) ref(s step) (store.AttemptRef, *mAttempt) {
	if s.B%3 == 0 && len(m.refs) > 0 {
		ref := m.refs[s.A%len(m.refs)]
		return ref, m.attempts[ref.ID]
	}
	a := pick(m.attempts, s.A, (*mAttempt).live)
	if a == nil {
		if a = pick(m.attempts, s.A, nil); a == nil {
			return store.AttemptRef{}, nil
		}
	}
	return store.AttemptRef{ID: a.id, Epoch: a.epoch}, a
}

func (a *mAttempt) live() bool { return a.state == "assigned" || a.state == "running" }

func wantError(what string, got, want error) error {
	if errors.Is(got, want) { // also none
		return nil
	}
	return fmt.Errorf("%s: error %s, want %s", what, fmt.Sprint(got), fmt.Sprint(want))
}

// ---- runs

// shapes of runs: each job with its key and the keys it needs.
var shapes = [][][]string{
	{{"a"}},
	{{"a"}, {"b"}},
	{{"a"}, {"a"}, {"a"}},
	{{"a"}, {"b", "a"}},
	{{"a"}, {"a"}, {"b", "a"}, {"c", "a"}, {"d", "b", "c"}},
}

func (m *model) submit(ctx context.Context, s step) (bool, error) {
	r := &mRun{id: m.id("run"), state: "queued", path: fmt.Sprint("w", s.C%2)}
	switch s.B % 4 {
	case 1:
		r.delivery = fmt.Sprint("d", s.A%2)
	case 2:
		r.key = fmt.Sprint("k", s.A%2)
	case 3:
		r.state = "awaiting_approval"
	}
	repo, shape := fmt.Sprint("forge/", s.A%3), shapes[s.C%len(shapes)]
	var js []*mJob
	for i, keys := range shape {
		j := &mJob{
			id: m.id("job"), run: r.id, key: keys[0], needs: keys[1:], label: fmt.Sprint("l", (s.B+i)%2), repo: repo,
			state: "queued", prio: s.A / 32, queued: m.now, retries: map[string]int{},
		}
		if len(j.needs) > 0 || r.state == "awaiting_approval" {
			j.state, j.queued = "waiting", 0
		}
		js = append(js, j)
	}
	run, jobs := rowsOf(r, repo, js)
	var want error
	for _, o := range m.runs {
		if o.path == r.path && (r.delivery != "" && o.delivery == r.delivery || r.key != "" && o.key == r.key) {
			want = store.ErrDuplicate
		}
	}
	if err := wantError("submit", m.s.InsertRun(ctx, run, jobs), want); err != nil || want != nil {
		return false, err
	}
	m.runs[r.id] = r
	for _, j := range js {
		m.jobs[j.id] = j
	}
	return true, nil
}

func rowsOf(r *mRun, repo string, js []*mJob) (*store.Run, []*store.Job) {
	run := &store.Run{ID: r.id, State: store.RunState(r.state), Forge: "forge", RepoKey: repo, Delivery: r.delivery, IdempotencyKey: r.key, WorkflowPath: r.path}
	var jobs []*store.Job
	for i, j := range js {
		needs, err := json.Marshal(append([]string{}, j.needs...))
		if err != nil {
			panic(err)
		}
		jobs = append(jobs, &store.Job{ID: j.id, Idx: i, Key: j.key, Name: j.id, Label: j.label, State: store.JobState(j.state), Needs: needs, Priority: j.prio, RepoKey: j.repo})
	}
	return run, jobs
}

func (m *model) approve(ctx context.Context, s step) (bool, error) {
	r := pick(m.runs, s.A, func(r *mRun) bool { return r.state == "awaiting_approval" })
	if r == nil {
		return false, nil
	}
	_, err := m.s.WithRun(ctx, r.id, func(ctx context.Context, t *store.RunTx) error {
		if err := t.SetRun(ctx, store.RunQueued, ""); err != nil {
			return err
		}
		return advanceRun(ctx, t)
	})
	r.state = "queued"
	m.advance(r)
	return true, wantError("approve", err, nil)
}

func (m *model) cancel(ctx context.Context, s step) (bool, error) {
	r := pick(m.runs, s.A, func(r *mRun) bool { return !store.RunState(r.state).Terminal() || s.B%8 == 0 })
	if r == nil {
		return false, nil
	}
	reason := fmt.Sprint("reason ", s.C)
	_, err := m.s.WithRun(ctx, r.id, func(ctx context.Context, t *store.RunTx) error { return cancelRun(ctx, t, reason) })
	if store.RunState(r.state).Terminal() {
		return true, wantError("cancel", err, nil)
	}
	r.cancel = cmp.Or(r.cancel, reason)
	for _, j := range m.of(r) {
		switch j.state {
		case "waiting", "queued":
			j.state, j.hold = "cancelled", ""
		case "assigned", "running":
			a := m.attempts[j.attempt]
			a.cancel = cmp.Or(a.cancel, reason)
		}
	}
	m.advance(r)
	return true, wantError("cancel", err, nil)
}

// cancelRun is what the engine does to cancel a run.
func cancelRun(ctx context.Context, t *store.RunTx, reason string) error {
	if t.Run.State.Terminal() {
		return nil
	}
	if t.Run.CancelReason == "" {
		t.Run.CancelReason = reason
		if err := t.SetRun(ctx, t.Run.State, reason); err != nil {
			return err
		}
	}
	for _, j := range t.Jobs {
		var err error
		switch j.State {
		case store.JobWaiting, store.JobQueued:
			err = t.EndJob(ctx, j, store.JobCancelled, "cancelled", reason, nil)
		case store.JobAssigned, store.JobRunning:
			err = t.CancelAttempt(ctx, j.AttemptID, reason)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (m *model) of(r *mRun) []*mJob {
	var out []*mJob
	for _, id := range slices.Sorted(maps.Keys(m.jobs)) {
		if m.jobs[id].run == r.id {
			out = append(out, m.jobs[id])
		}
	}
	return out
}

// advance moves the run on after a change of its jobs.
func (m *model) advance(r *mRun) {
	jobs := m.of(r)
	over := func(j *mJob) bool { return store.JobState(j.state).Terminal() }
	for again := r.state != "awaiting_approval"; again; {
		again = false
		for _, j := range jobs {
			if j.state != "waiting" {
				continue
			}
			free, well := true, true
			for _, n := range jobs {
				if slices.Contains(j.needs, n.key) {
					free, well = free && over(n), well && n.state == "succeeded"
				}
			}
			switch {
			case !free:
				continue
			case well:
				j.state, j.queued = "queued", m.now
			default:
				j.state = "skipped"
			}
			again = true
		}
	}
	all, count := true, map[string]int{}
	for _, j := range jobs {
		all = all && over(j)
		count[j.state]++
		r.begun = r.begun || j.state != "waiting" && j.state != "queued"
	}
	switch {
	case !all && r.state == "awaiting_approval":
	case !all && r.begun:
		r.state = "running"
	case !all:
		r.state = "queued"
	case count["errored"] > 0:
		r.state = "errored"
	case count["failed"]+count["timed_out"] > 0:
		r.state = "failed"
	case count["cancelled"] > 0:
		r.state = "cancelled"
	case count["succeeded"] > 0:
		r.state = "succeeded"
	default:
		r.state = "skipped"
	}
}

// ---- claims and machines

func (m *model) claim(ctx context.Context, s step) (bool, error) {
	p, o := modelPools[s.A%len(modelPools)], owner(s.B)
	q := claimRequest(p, o, func() string { return m.id("m") })
	q.Max, q.Warm = s.C%3, max(0, s.C/3%4-1)
	q.Ready = slices.Sorted(maps.Keys(m.machines)) // also some that are not
	got, err := m.s.Claim(ctx, q)
	if err != nil {
		return false, err
	}
	ready := slices.DeleteFunc(slices.Clone(q.Ready), func(id string) bool {
		x := m.machines[id]
		return x.state != "ready" || x.owner != o || x.pool != p.name
	})
	began := q.Warm > 0 // a transaction: without a job, or room for one, there is none
	for i := range q.Max {
		best, room := m.best(p.labels), m.room(p)
		began = began || best != nil && (len(q.Ready) > 0 || room > 0)
		if best == nil || len(ready) == 0 && room <= 0 {
			break
		}
		if i >= len(got) {
			return false, fmt.Errorf("claim for %s: nothing after %d, want %s, room for %d", p.name, i, best.id, room)
		}
		c := got[i]
		if c.Job == nil || c.Job.ID != best.id {
			return false, fmt.Errorf("claim %d for %s: %+v, want %s", i, p.name, c.Job, best.id)
		}
		x := m.provision(p, c.Machine.ID, o)
		a := &mAttempt{id: c.Attempt.ID, job: best.id, run: best.run, machine: x.id, state: "assigned", owner: o, epoch: 1, lease: m.now + modelLease.Microseconds()}
		if m.attempts[a.id] != nil {
			return false, fmt.Errorf("attempt %s was claimed before", a.id)
		}
		if len(ready) > 0 {
			x = m.machines[ready[0]]
			a.machine, a.contact, x.state, ready = x.id, m.now, "bound", ready[1:]
		}
		if c.Machine.ID != x.id || c.Fresh != (x.state == "provisioning") || c.Fresh && m.machines[x.id] != nil {
			return false, fmt.Errorf("claim of %s: machine %s, fresh %v, want %s", best.id, c.Machine.ID, c.Fresh, x.id)
		}
		x.attempt = a.id
		best.state, best.attempt = "assigned", a.id
		best.attempts++
		m.machines[x.id], m.attempts[a.id] = x, a
		m.refs = append(m.refs, store.AttemptRef{ID: a.id, Epoch: 1})
		m.advance(m.runs[best.run])
		got = slices.Delete(got, i, i+1)
		got = slices.Insert(got, i, store.Claimed{})
	}
	warm := slices.DeleteFunc(got, func(c store.Claimed) bool { return c.Machine == nil })
	if want := m.warmMissing(p, q.Warm); len(warm) != want {
		return false, fmt.Errorf("claim for %s: %d more results than jobs, want %d", p.name, len(warm), want)
	}
	for _, c := range warm {
		if c.Job != nil || !c.Fresh {
			return false, fmt.Errorf("claim for %s: %+v after the last job", p.name, c.Job)
		}
		m.machines[c.Machine.ID] = m.provision(p, c.Machine.ID, o)
	}
	return began, nil
}

func (m *model) provision(p modelPool, id, owner string) *mMachine {
	return &mMachine{
		id: id, pool: p.name, host: p.host, state: "provisioning", owner: owner,
		lease: m.now + modelLease.Microseconds(), bootBy: m.now + modelBoot.Microseconds(), created: m.now,
	}
}

// idle are the machines that wait for a job or boot to do so.
func (m *model) idle(fits func(*mMachine) bool) (all []*mMachine) {
	for _, x := range m.machines {
		if x.attempt == "" && (x.state == "ready" || x.state == "provisioning") && fits(x) {
			all = append(all, x)
		}
	}
	return all
}

// warmMissing is how many machines a claim adds that wait for a job.
func (m *model) warmMissing(p modelPool, warm int) int {
	idle := m.idle(func(x *mMachine) bool { return x.pool == p.name })
	n := warm - len(idle)
	if f := m.failures[p.name]; f != nil {
		if f.retry > m.now {
			return 0
		}
		n = min(n, 1)
		for _, x := range idle {
			if x.state == "provisioning" {
				n = 0
			}
		}
	}
	left := m.roomOf(p)
	for _, o := range modelPools {
		if o.host == p.host && o.name != p.name { // its jobs come first
			wanted := max(0, min(m.queued(o), m.roomOf(o)["pool"]))
			left["host"] -= wanted
			left["boots"] -= wanted
		}
	}
	return max(0, min(n, left["host"], left["pool"], left["boots"]))
}

func (m *model) queued(p modelPool) (n int) {
	for _, j := range m.jobs {
		if j.state == "queued" && j.hold == "" && slices.Contains(p.labels, j.label) {
			n++
		}
	}
	return n
}

// makeRoom has warm machines of other pools give way.
func (m *model) makeRoom(ctx context.Context, s step) (bool, error) {
	p, n := modelPools[s.A%len(modelPools)], s.C%3
	got, err := m.s.MakeRoom(ctx, claimRequest(p, owner(s.B), func() string { return "none" }), n)
	if err != nil {
		return false, err
	}
	left := m.roomOf(p)
	n = min(n, m.queued(p), left["pool"])
	if n <= 0 || n <= left["host"] {
		n = 0
	} else {
		n -= max(0, left["host"])
	}
	for _, x := range m.machines {
		if n > 0 && x.host == p.host && x.state == "destroying" {
			n--
		}
	}
	rivals := m.idle(func(x *mMachine) bool { return x.host == p.host && x.pool != p.name })
	slices.SortFunc(rivals, func(a, b *mMachine) int { return cmp.Or(cmp.Compare(a.ready, b.ready), -strings.Compare(a.id, b.id)) })
	rivals = rivals[:min(n, len(rivals))]
	if len(got) != len(rivals) {
		return false, fmt.Errorf("room for %s: %d machines go, want %d", p.name, len(got), len(rivals))
	}
	for i, x := range rivals {
		if got[i].ID != x.id {
			return false, fmt.Errorf("room for %s: %s goes, want %s", p.name, got[i].ID, x.id)
		}
		x.state, x.destroying = "destroying", m.now
	}
	return n > 0, nil
}

// discardIdle gets rid of a machine unless it has a job; every other time it
// counts as a failure of its pool's warm machines.
func (m *model) discardIdle(ctx context.Context, s step) (bool, error) {
	x := pick(m.machines, s.A, func(x *mMachine) bool { return s.C%4 == 0 || x.state != "gone" && x.attempt == "" })
	if x == nil {
		return false, nil
	}
	var got bool
	var err error
	if s.B%2 == 0 {
		got, err = m.s.DiscardIdle(ctx, x.id, "discarded")
	} else {
		got, err = m.s.WarmFailed(ctx, x.id, "failed", modelFirst, modelMost)
	}
	want := x.attempt == "" && (x.state == "ready" || x.state == "provisioning")
	if err != nil || got != want {
		return false, fmt.Errorf("discard of %s: %v, %w, want %v", x.id, got, err, want)
	}
	if !want {
		return true, nil
	}
	x.state, x.destroying = "destroying", m.now
	f := m.failures[x.pool]
	if s.B%2 == 0 || f != nil && x.created <= f.at {
		return true, nil
	}
	if f == nil {
		f = &mFailure{}
		m.failures[x.pool] = f
	}
	f.at, f.retry = m.now, m.now+min(modelFirst<<f.n, modelMost).Microseconds()
	f.n++
	return true, nil
}

func claimRequest(p modelPool, owner string, id func() string) store.ClaimRequest {
	var others []store.PoolRoom
	for _, o := range modelPools {
		if o.host == p.host && o.name != p.name {
			others = append(others, store.PoolRoom{Pool: o.name, Labels: o.labels, Capacity: o.capacity})
		}
	}
	return store.ClaimRequest{
		Owner: owner, Lease: modelLease, Labels: p.labels, Pool: p.name, PoolCapacity: p.capacity, Host: p.host, HostCapacity: modelHosts[p.host],
		HostBoots: modelBoots[p.host], Others: others,
		NewMachine: func() *store.Machine { id := id(); return &store.Machine{ID: id, TokenHash: "token " + id} },
		Boot:       modelBoot, Expire: func(*store.Job) time.Duration { return 24 * time.Hour },
	}
}

// best is the job to be claimed: the highest priority, then the repository with
// the fewest assigned and running jobs, then the oldest.
func (m *model) best(labels []string) *mJob {
	active := map[string]int{}
	var queue []*mJob
	for _, j := range m.jobs {
		switch {
		case j.state == "assigned" || j.state == "running":
			active[j.repo]++
		case j.state == "queued" && j.hold == "" && slices.Contains(labels, j.label):
			queue = append(queue, j)
		}
	}
	if len(queue) == 0 {
		return nil
	}
	return slices.MinFunc(queue, func(a, b *mJob) int {
		return cmp.Or(b.prio-a.prio, active[a.repo]-active[b.repo], cmp.Compare(a.queued, b.queued), strings.Compare(a.id, b.id))
	})
}

func (m *model) room(p modelPool) int {
	left := m.roomOf(p)
	return min(left["host"], left["pool"], left["boots"])
}

func (m *model) roomOf(p modelPool) map[string]int {
	left := map[string]int{"host": modelHosts[p.host], "pool": p.capacity, "boots": cmp.Or(modelBoots[p.host], 1000)}
	for _, x := range m.machines {
		if x.state != "gone" && x.host == p.host {
			left["host"]--
			if x.pool == p.name {
				left["pool"]--
			}
			if x.state == "provisioning" {
				left["boots"]--
			}
		}
	}
	return left
}

func (m *model) enroll(ctx context.Context, s step) (bool, error) {
	x := pick(m.machines, s.A, func(x *mMachine) bool { return s.C%4 == 0 || x.state == "provisioning" })
	if x == nil {
		return false, nil
	}
	nonce := fmt.Sprint("nonce ", s.B/16)
	_, err := m.s.Enroll(ctx, enrollment("token "+x.id, nonce, m.id("cred")))
	a := m.attempts[x.attempt]
	again := x.nonce == nonce
	ok := x.bootBy > m.now && (x.nonce == "" || again) &&
		(x.state == "provisioning" || again && (x.state == "ready" || x.state == "bound")) &&
		(!again || a == nil || a.acked == 0)
	if !ok {
		return false, wantError("enroll", err, store.ErrToken)
	}
	x.nonce, x.contact = nonce, m.now
	return true, wantError("enroll", err, nil)
}

func (m *model) attach(ctx context.Context, s step) (bool, error) {
	x := pick(m.machines, s.A, func(x *mMachine) bool { return s.C%8 == 0 || x.state != "gone" && x.state != "destroying" })
	if x == nil {
		return false, nil
	}
	o := owner(s.B)
	_, got, _, _, err := m.s.Attach(ctx, x.id, o, modelLease)
	a := m.attempts[x.attempt]
	switch {
	case a != nil && !a.live():
		return false, wantError("attach", err, store.ErrOver)
	case x.state == "destroying" || x.state == "gone":
		return false, wantError("attach", err, store.ErrGone)
	}
	if err := wantError("attach", err, nil); err != nil {
		return false, err
	}
	x.owner, x.lease, x.contact = o, m.now+modelLease.Microseconds(), m.now
	if x.state == "provisioning" {
		x.ready = m.now
		delete(m.failures, x.pool)
	}
	if a == nil {
		x.state = "ready"
		return true, nil
	}
	x.state = "bound"
	a.owner, a.lease, a.contact = o, x.lease, m.now
	a.epoch++
	m.refs = append(m.refs, store.AttemptRef{ID: a.id, Epoch: a.epoch})
	if got == nil || got.ID != a.id || got.Epoch != a.epoch {
		return false, fmt.Errorf("attach to %s: %+v, want epoch %d", a.id, got, a.epoch)
	}
	return true, nil
}

// heard reports whether a machine may go away without its attempt: one whose
// agent was never heard of is ended with the attempt only.
func (m *model) heard(x *mMachine) bool {
	a := m.attempts[x.attempt]
	return a == nil || !a.live() || a.contact > 0
}

func (m *model) discard(ctx context.Context, s step) (bool, error) {
	x := pick(m.machines, s.A, m.heard)
	if x == nil {
		return false, nil
	}
	if x.state != "destroying" && x.state != "gone" {
		x.state, x.destroying = "destroying", m.now
	}
	return true, wantError("discard", m.s.MachineDestroying(ctx, x.id, "discarded"), nil)
}

func (m *model) gone(ctx context.Context, s step) (bool, error) {
	x := pick(m.machines, s.A, func(x *mMachine) bool { return x.state == "destroying" || s.B%8 == 0 && m.heard(x) })
	if x == nil {
		return false, nil
	}
	labels, err := m.s.MachineGone(ctx, x.id)
	x.state, x.owner, x.lease = "gone", "", 0
	return true, cmp.Or(wantError("gone", err, nil), m.free(x, labels))
}

// free lets the jobs go on that wait for a machine.
func (m *model) free(x *mMachine, labels []string) error {
	for _, j := range m.jobs {
		if j.hold == x.id {
			j.hold = ""
			if !slices.Contains(labels, j.label) {
				return fmt.Errorf("nobody hears that %s is free for %s", j.id, j.label)
			}
		}
	}
	return nil
}

func (m *model) unhold(ctx context.Context, _ step) (bool, error) {
	labels, err := m.s.ReleaseHolds(ctx, modelHold)
	if err != nil {
		return false, err
	}
	for _, x := range m.machines {
		if x.state == "destroying" && x.destroying <= m.now-modelHold.Microseconds() {
			if err := m.free(x, labels); err != nil {
				return false, err
			}
		}
	}
	return true, nil
}

// ---- attempts

// transition runs fn fenced by ref and then lets the run go on.
func (m *model) transition(ctx context.Context, a *mAttempt, ref store.AttemptRef, fn func(ctx context.Context, t *store.RunTx, ref store.AttemptRef) error) error {
	_, err := m.s.WithRun(ctx, a.run, func(ctx context.Context, t *store.RunTx) error {
		ref := ref
		if m.fault.ref != nil {
			ref = m.fault.ref(ctx, t, ref)
		}
		if err := fn(ctx, t, ref); err != nil {
			return err
		}
		return advanceRun(ctx, t)
	})
	return err
}

// stale is the error of a write under ref.
func (a *mAttempt) stale(ref store.AttemptRef) error {
	if a.live() && a.epoch == ref.Epoch {
		return nil
	}
	return store.ErrStale
}

func (m *model) start(ctx context.Context, s step) (bool, error) {
	ref, a := m.ref(s)
	if a == nil {
		return false, nil
	}
	err := m.transition(ctx, a, ref, func(ctx context.Context, t *store.RunTx, ref store.AttemptRef) error {
		return t.StartAttempt(ctx, ref, modelJob)
	})
	want := a.stale(ref)
	if want == nil && a.state == "assigned" {
		a.state, a.deadline, m.jobs[a.job].state = "running", m.now+modelJob.Microseconds(), "running"
	}
	return want == nil, wantError("start", err, want)
}

func (m *model) progress(ctx context.Context, s step) (bool, error) {
	ref, a := m.ref(s)
	if a == nil {
		return false, nil
	}
	acked, size := a.acked+[]int64{1, 2, 1, 0, 1, -1}[s.C%6], a.size+int64(s.A%3)*10-10*int64(s.C/60)
	err := m.s.Progress(ctx, ref, acked, size, []*store.Step{{Idx: 0, Name: "build"}})
	want := a.stale(ref)
	if acked <= a.acked || size < a.size {
		want = store.ErrStale
	}
	if want == nil {
		a.acked, a.size, a.contact = acked, size, m.now
	}
	return want == nil, wantError("progress", err, want)
}

func (m *model) finish(ctx context.Context, s step) (bool, error) {
	ref, a := m.ref(s)
	if a == nil {
		return false, nil
	}
	f := store.Finish{State: []store.JobState{"succeeded", "succeeded", "failed", "timed_out", "cancelled"}[s.C%5], AckedSeq: a.acked + 1, LogSize: a.size, Outputs: json.RawMessage(`{"from":"` + a.id + `"}`)}
	if s.B%8 == 1 {
		f.AckedSeq = a.acked // of one that is over: the reply was lost
	}
	do := func() error {
		return m.transition(ctx, a, ref, func(ctx context.Context, t *store.RunTx, ref store.AttemptRef) error {
			return t.FinishAttempt(ctx, ref, f)
		})
	}
	want := a.stale(ref)
	if a.state == "finished" && a.epoch == ref.Epoch && a.acked == f.AckedSeq {
		want = nil
	}
	if err := wantError("finish", do(), want); err != nil || want != nil || !a.live() {
		return false, err
	}
	a.state, a.acked = "finished", f.AckedSeq
	m.over(a, string(f.State), "")
	return true, wantError("finish again", do(), nil)
}

func (m *model) retry(ctx context.Context, s step) (bool, error) {
	ref, a := m.ref(s)
	if a == nil {
		return false, nil
	}
	f := store.Finish{State: store.JobErrored, Class: "infra", AckedSeq: a.acked + 1, LogSize: a.size}
	err := m.transition(ctx, a, ref, func(ctx context.Context, t *store.RunTx, ref store.AttemptRef) error {
		if mayRetry(t, a.job, f.Class) {
			return t.RetryAttempt(ctx, ref, f)
		}
		return t.FinishAttempt(ctx, ref, f)
	})
	want := a.stale(ref)
	if want == nil {
		a.state, a.acked = "finished", f.AckedSeq
		m.over(a, "errored", f.Class)
	}
	return want == nil, wantError("retry", err, want)
}

func (m *model) lose(ctx context.Context, s step) (bool, error) {
	ref, a := m.ref(s)
	if a == nil {
		return false, nil
	}
	return m.giveUp(ctx, a, ref, []string{"boot", "agent_lost", "infra", "timeout"}[s.C%4])
}

func (m *model) giveUp(ctx context.Context, a *mAttempt, ref store.AttemptRef, class string) (bool, error) {
	err := m.transition(ctx, a, ref, func(ctx context.Context, t *store.RunTx, ref store.AttemptRef) error {
		return loseAttempt(ctx, t, a.job, ref, class)
	})
	want := a.stale(ref)
	if want == nil {
		a.state = "lost"
		a.epoch++
		end := "errored"
		if class == "timeout" {
			end, class = "timed_out", ""
		}
		if m.runs[a.run].cancel != "" {
			end, class = "cancelled", ""
		}
		m.over(a, end, class)
	}
	return want == nil, wantError("lose", err, want)
}

// loseAttempt is what the engine does with an attempt that nobody hears of.
func loseAttempt(ctx context.Context, t *store.RunTx, jobID string, ref store.AttemptRef, class string) error {
	l := store.Loss{Class: class, Reason: "lost", JobState: store.JobErrored}
	switch {
	case t.Run.CancelReason != "":
		l.Class, l.JobState = "cancelled", store.JobCancelled
	case class == "timeout":
		l.JobState = store.JobTimedOut
	default:
		l.Retry = mayRetry(t, jobID, class)
	}
	return t.LoseAttempt(ctx, ref, l)
}

func mayRetry(t *store.RunTx, jobID, class string) bool {
	for _, j := range t.Jobs {
		if j.ID == jobID {
			return t.Run.CancelReason == "" && retriesOf(j)[class] < modelBudget
		}
	}
	return false
}

// over ends an attempt's machine, and ends or queues its job.
func (m *model) over(a *mAttempt, end, class string) {
	x, j := m.machines[a.machine], m.jobs[a.job]
	if x.state != "gone" && x.state != "destroying" {
		x.state, x.destroying = "destroying", m.now
	}
	if class != "" && m.runs[a.run].cancel == "" && j.retries[class] < modelBudget {
		j.retries[class]++
		j.state = "queued"
		if x.state != "gone" {
			j.hold = x.id
		}
	} else {
		j.state = end
	}
	m.advance(m.runs[a.run])
}

func (m *model) renew(ctx context.Context, s step) (bool, error) {
	o := owner(s.A)
	var as, ms []string
	for id, a := range m.attempts {
		if (len(id)+int(a.epoch)+s.B)%2 == 0 { // also some of others
			as = append(as, id)
		}
	}
	for id := range m.machines {
		ms = append(ms, id)
	}
	stillA, stillM, err := m.s.Renew(ctx, o, modelLease, as, ms)
	if err != nil {
		return false, err
	}
	wantA, wantM := map[string]int64{}, map[string]int64{}
	for id, a := range m.attempts {
		if a.owner == o && a.live() {
			wantA[id], a.lease = a.epoch, m.now+modelLease.Microseconds()
			if slices.Contains(as, id) {
				a.contact = m.now
			}
		}
	}
	for id, x := range m.machines {
		if x.owner == o && x.state != "gone" {
			wantM[id], x.lease, x.contact = 0, m.now+modelLease.Microseconds(), m.now
		}
	}
	if !maps.Equal(stillA, wantA) || !maps.Equal(stillM, wantM) {
		return false, fmt.Errorf("renewed %v and %v, want %v and %v", stillA, stillM, wantA, wantM)
	}
	return true, nil
}

func (m *model) release(ctx context.Context, s step) (bool, error) {
	o := owner(s.A)
	for _, a := range m.attempts {
		if a.owner == o && a.live() {
			a.owner, a.lease = "", 0
		}
	}
	for _, x := range m.machines {
		if x.owner == o && x.state != "gone" {
			x.owner, x.lease = "", 0
		}
	}
	return true, m.s.Release(ctx, o)
}

// reap gives up what the store says is overdue.
func (m *model) reap(ctx context.Context, _ step) (bool, error) {
	due, err := m.s.Overdue(ctx, modelSilent)
	if err != nil {
		return false, err
	}
	var got, want []string
	for _, a := range due.Lost {
		got = append(got, "lost "+a.ID)
	}
	for _, a := range due.TimedOut {
		got = append(got, "timed out "+a.ID)
	}
	for _, x := range due.Boot {
		got = append(got, "not booted "+x.ID)
	}
	for id, a := range m.attempts {
		switch {
		case !a.live():
		case a.contact > 0 && a.contact+modelSilent.Microseconds() < m.now:
			want = append(want, "lost "+id)
		case a.deadline > 0 && a.deadline < m.now:
			want = append(want, "timed out "+id)
		}
	}
	for id, x := range m.machines {
		if x.state == "provisioning" && x.bootBy < m.now {
			want = append(want, "not booted "+id)
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		return false, fmt.Errorf("overdue: %q, want %q", got, want)
	}
	for _, d := range got {
		what, id, _ := cutLast(d)
		class := map[string]string{"lost": "agent_lost", "timed out": "timeout", "not booted": "boot"}[what]
		a := m.attempts[id]
		if x := m.machines[id]; x != nil {
			if a = m.attempts[x.attempt]; a == nil {
				x.state, x.destroying = "destroying", m.now
				if err := m.s.MachineDestroying(ctx, id, "not booted"); err != nil {
					return false, err
				}
				continue
			}
		}
		if _, err := m.giveUp(ctx, a, store.AttemptRef{ID: a.id, Epoch: a.epoch}, class); err != nil {
			return false, err
		}
	}
	return len(got) > 0, nil
}

func cutLast(s string) (before, after string, found bool) {
	i := strings.LastIndexByte(s, ' ')
	return s[:max(i, 0)], s[i+1:], i >= 0
}

func (m *model) lease(ctx context.Context, s step) (bool, error) {
	name, o := fmt.Sprint("reaper/", s.A%2), owner(s.B)
	got, err := m.s.Lease(ctx, name, o, modelLease)
	if err != nil {
		return false, err
	}
	was := m.leases[name]
	want := was.owner == o || was.until <= m.now
	if got != want {
		return false, fmt.Errorf("lease %s for %s: %v; %s has it until %d, now is %d", name, o, got, was.owner, was.until, m.now)
	}
	if want {
		was.owner, was.until = o, m.now+modelLease.Microseconds()
		m.leases[name] = was
	}
	return true, nil
}

// ---- outbox

func (m *model) relay(ctx context.Context, s step) (bool, error) {
	o, limit := owner(s.A), 1+s.B%8
	got, err := m.s.OutboxClaim(ctx, o, limit, modelOutbox)
	if err != nil {
		return false, err
	}
	var outbox map[int64]*store.OutboxMessage
	if m.rows != nil {
		outbox = m.rows.outbox
	}
	// Keys of which a message is claimed are nobody else's.
	busy, newest := map[string]bool{}, map[string]int64{}
	for id, x := range outbox {
		busy[x.Key] = busy[x.Key] || m.claims[id].until > m.now
		if x.Coalesce {
			newest[x.Key] = max(newest[x.Key], id)
		}
	}
	var want []int64
	for _, id := range slices.Sorted(maps.Keys(outbox)) {
		x := outbox[id]
		if busy[x.Key] {
			continue
		}
		if limit--; limit < 0 {
			break
		}
		if x.Coalesce {
			id = newest[x.Key]
		}
		if !slices.Contains(want, id) {
			want = append(want, id)
		}
		m.claims[id] = mClaim{o, m.now + modelOutbox.Microseconds()}
	}
	var ids []int64
	for _, x := range got {
		ids = append(ids, x.ID)
	}
	if !slices.Equal(ids, want) {
		return false, fmt.Errorf("outbox: %v, want %v", ids, want)
	}
	m.taken[o] = append(m.taken[o], got...)
	return true, nil
}

// relayDone publishes some of what a relay took, in order, and gives the rest
// back, however long that took.
func (m *model) relayDone(ctx context.Context, s step) (bool, error) {
	o := owner(s.A)
	mine := m.taken[o]
	n := len(mine) - s.B%4%(len(mine)+1)
	var done []int64
	for _, x := range mine[:n] {
		m.sent.receive(x)
		done = append(done, x.ID)
	}
	m.taken[o] = nil
	maps.DeleteFunc(m.claims, func(_ int64, c mClaim) bool { return c.owner == o })
	return true, cmp.Or(m.s.OutboxDone(ctx, done...), m.s.OutboxRelease(ctx, o))
}

// relayCrash publishes something and dies before it can say so.
func (m *model) relayCrash(_ context.Context, s step) (bool, error) {
	o := owner(s.A)
	if mine := m.taken[o]; len(mine) > 0 {
		m.sent.receive(mine[0])
	}
	m.taken[o] = nil
	return false, nil
}

// ---- comparing

// compare says where the database differs from the model.
func (m *model) compare() error {
	var got, want []string
	for id, r := range m.rows.runs {
		got = append(got, fmt.Sprintf("run %s %s cancel=%q", id, r.State, r.CancelReason))
	}
	for id, r := range m.runs {
		want = append(want, fmt.Sprintf("run %s %s cancel=%q", id, r.state, r.cancel))
	}
	job := "job %s %s attempt=%s n=%d hold=%s queued=%d retries=%v"
	for id, j := range m.rows.jobs {
		got = append(got, fmt.Sprintf(job, id, j.State, j.AttemptID, j.Attempts, j.HoldID, j.QueuedAt, retriesOf(j)))
	}
	for id, j := range m.jobs {
		want = append(want, fmt.Sprintf(job, id, j.state, j.attempt, j.attempts, j.hold, j.queued, j.retries))
	}
	attempt := "attempt %s of %s on %s %s epoch=%d owner=%s acked=%d size=%d lease=%d contact=%d deadline=%d cancel=%q"
	for id, a := range m.rows.attempts {
		got = append(got, fmt.Sprintf(attempt, id, a.JobID, a.MachineID, a.State, a.Epoch, a.Owner, a.AckedSeq, a.LogSize, a.LeaseUntil, a.ContactAt, a.DeadlineAt, a.CancelReason))
	}
	for id, a := range m.attempts {
		want = append(want, fmt.Sprintf(attempt, id, a.job, a.machine, a.state, a.epoch, a.owner, a.acked, a.size, a.lease, a.contact, a.deadline, a.cancel))
	}
	machine := "machine %s %s/%s %s attempt=%s owner=%s nonce=%q lease=%d contact=%d boot=%d destroying=%d"
	for id, x := range m.rows.machines {
		got = append(got, fmt.Sprintf(machine, id, x.Host, x.Pool, x.State, x.AttemptID, x.Owner, x.NonceHash, x.LeaseUntil, x.ContactAt, x.BootBy, x.DestroyingAt))
	}
	for id, x := range m.machines {
		want = append(want, fmt.Sprintf(machine, id, x.host, x.pool, x.state, x.attempt, x.owner, x.nonce, x.lease, x.contact, x.bootBy, x.destroying))
	}
	slices.Sort(got)
	slices.Sort(want)
	var diff violations
	for _, l := range got {
		_, same := slices.BinarySearch(want, l)
		diff.say(!same, "%s  (in the database)", l)
	}
	for _, l := range want {
		_, same := slices.BinarySearch(got, l)
		diff.say(!same, "%s  (expected)", l)
	}
	return diff.err()
}

// ---- the end

// drain drives everything to its end as orchestrators would that know nothing
// but the database, and audits what comes out.
func drain(ctx context.Context, s subject, db *bun.DB, sent *published, pass func(time.Duration)) error {
	ids := 0
	var before *rows
	latest := int64(0)
	for range 200 {
		now, err := s.Now(ctx)
		if err != nil {
			return err
		}
		latest = max(latest, now)
		r, err := look(ctx, db)
		if err != nil {
			return err
		}
		if err := audit(before, r, sent, latest); err != nil {
			return fmt.Errorf("at the end: %w", err)
		}
		before = r
		open, destroying := 0, 0
		for _, run := range r.runs {
			if run.State.Terminal() {
				continue
			}
			open++
			_, err := s.WithRun(ctx, run.ID, func(ctx context.Context, t *store.RunTx) error {
				if t.Run.State == store.RunAwaitingApproval {
					if err := t.SetRun(ctx, store.RunQueued, ""); err != nil {
						return err
					}
				}
				return advanceRun(ctx, t)
			})
			if err != nil {
				return err
			}
		}
		due, err := s.Overdue(ctx, modelSilent)
		if err != nil {
			return err
		}
		for _, x := range due.Boot {
			if x.AttemptID == "" {
				err = s.MachineDestroying(ctx, x.ID, "not booted")
			} else {
				a := r.attempts[x.AttemptID]
				_, err = s.WithRun(ctx, a.RunID, func(ctx context.Context, t *store.RunTx) error {
					return errors.Join(loseAttempt(ctx, t, a.JobID, store.AttemptRef{ID: a.ID, Epoch: a.Epoch}, "boot"), advanceRun(ctx, t))
				})
			}
			if err != nil {
				return err
			}
		}
		for _, a := range slices.Concat(due.Lost, due.TimedOut) { // some did not boot either
			_, err := s.WithRun(ctx, a.RunID, func(ctx context.Context, t *store.RunTx) error {
				return errors.Join(loseAttempt(ctx, t, a.JobID, store.AttemptRef{ID: a.ID, Epoch: a.Epoch}, "agent_lost"), advanceRun(ctx, t))
			})
			if err != nil && !errors.Is(err, store.ErrStale) {
				return err
			}
		}
		for _, x := range r.machines {
			if x.State == store.MachineReady {
				if err = s.MachineDestroying(ctx, x.ID, "idle"); err != nil {
					return err
				}
			}
			if x.State == store.MachineDestroying {
				destroying++
				if _, err := s.MachineGone(ctx, x.ID); err != nil {
					return err
				}
			}
		}
		for _, p := range modelPools {
			q := claimRequest(p, "last", func() string { ids++; return fmt.Sprintf("x%05d", ids) })
			q.Max = 10
			claimed, err := s.Claim(ctx, q)
			if err != nil {
				return err
			}
			for _, c := range claimed {
				_, a, _, _, err := s.Attach(ctx, c.Machine.ID, "last", modelLease)
				if err != nil {
					return err
				}
				ref := store.AttemptRef{ID: a.ID, Epoch: a.Epoch}
				_, err = s.WithRun(ctx, c.Run.ID, func(ctx context.Context, t *store.RunTx) error {
					return errors.Join(t.StartAttempt(ctx, ref, modelJob), t.FinishAttempt(ctx, ref, store.Finish{State: store.JobSucceeded, AckedSeq: 1}), advanceRun(ctx, t))
				})
				if err != nil {
					return err
				}
			}
		}
		msgs, err := s.OutboxClaim(ctx, "last", 1000, modelOutbox)
		if err != nil {
			return err
		}
		var done []int64
		for _, x := range msgs {
			sent.receive(x)
			done = append(done, x.ID)
		}
		if err := s.OutboxDone(ctx, done...); err != nil {
			return err
		}
		if open == 0 && destroying == 0 && len(msgs) == 0 && len(r.outbox) == 0 {
			return nil
		}
		pass(15 * time.Minute)
	}
	var left violations
	for id, j := range before.jobs {
		left.say(!j.State.Terminal(), "job %s is lost: %s, hold %q, attempt %q", id, j.State, j.HoldID, j.AttemptID)
	}
	for id, x := range before.machines {
		left.say(x.State != store.MachineGone, "machine %s is left %s", id, x.State)
	}
	left.say(len(before.outbox) > 0, "%d messages are left", len(before.outbox))
	return left.err()
}

// modelDatabases are both, migrated. SQLite's needs no disk: nothing crashes
// here but processes.
func modelDatabases(t *testing.T, fn func(t *testing.T, db *bun.DB)) {
	t.Helper()
	for name, url := range map[string]func(testing.TB) string{
		"sqlite": func(testing.TB) string { return "sqlite::memory:" }, "postgres": testenv.Postgres,
	} {
		t.Run(name, func(t *testing.T) {
			db := open(t, url(t))
			must(t, store.Migrate(t.Context(), db))
			fn(t, db)
		})
	}
}

// TestModel compares the store with the model over random programs;
// -rapid.checks says how many.
func TestModel(t *testing.T) {
	modelDatabases(t, func(t *testing.T, db *bun.DB) {
		gen := programs()
		rapid.Check(t, func(t *rapid.T) {
			m, err := newModel(context.Background(), db, fault{})
			if err != nil {
				t.Fatal(err)
			}
			end := rapid.Bool().Draw(t, "to the end") && rapid.Bool().Draw(t, "indeed")
			if err := m.run(context.Background(), gen.Draw(t, "program"), end); err != nil {
				t.Fatal(err)
			}
		})
	})
}
