package store_test

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/sqldb"
	"github.com/solstice-ci/solstice-go/internal/store"
)

// What the model tests run with. Periods end between the steps in which their
// time passes.
const (
	modelLease  = 30 * time.Second
	modelBoot   = 3*time.Minute + 30*time.Second
	modelSilent = 5*time.Minute + 30*time.Second
	modelJob    = 20*time.Minute + 30*time.Second
	modelHold   = 10*time.Minute + 30*time.Second
	modelOutbox = 2*time.Minute + 30*time.Second
	modelBudget = 1 // retries of one class
	modelFirst  = 3*time.Minute + 30*time.Second
	modelMost   = 10*time.Minute + 30*time.Second
)

type modelPool struct {
	name, host string
	labels     []string
	capacity   int
}

var (
	modelPools = []modelPool{
		{"p0", "h0", []string{"l0", "l1"}, 2},
		{"p1", "h0", []string{"l1"}, 2},
		{"p2", "h1", []string{"l0"}, 2},
	}
	modelHosts = map[string]int{"h0": 3, "h1": 2}
	modelBoots = map[string]int{"h0": 2} // at once
)

// modelMessages are what a change of a run causes: its status, of which only
// the last counts, and an announcement of every job that is over.
func modelMessages(run *store.Run, jobs, _ []*store.Job) []store.OutboxMessage {
	out := []store.OutboxMessage{{Key: "run/" + run.ID, Topic: "status", Body: strconv.AppendInt(nil, run.Version, 10), Coalesce: true}}
	for _, j := range jobs {
		if j.State.Terminal() {
			out = append(out, store.OutboxMessage{Key: "ends/" + run.ID, Topic: "ends", Body: []byte(j.ID + "=" + string(j.State))})
		}
	}
	return out
}

// advanceRun lets jobs go on whose needs are over, as the engine does within
// every transition.
func advanceRun(ctx context.Context, t *store.RunTx) error {
	if t.Run.State == store.RunAwaitingApproval {
		return nil
	}
	for again := true; again; {
		again = false
		for _, j := range t.Jobs {
			if j.State != store.JobWaiting {
				continue
			}
			over, ok := needsOver(j, t.Jobs)
			var err error
			switch {
			case !over:
				continue
			case ok:
				err = t.QueueJob(ctx, j)
			default:
				err = t.EndJob(ctx, j, store.JobSkipped, "", "", nil)
			}
			if err != nil {
				return err
			}
			again = true
		}
	}
	return nil
}

// needsOver reports whether all that a job needs is over, and succeeded.
func needsOver(j *store.Job, jobs []*store.Job) (over, ok bool) {
	var needs []string
	if err := json.Unmarshal(j.Needs, &needs); err != nil {
		panic(err)
	}
	over, ok = true, true
	for _, n := range jobs {
		if slices.Contains(needs, n.Key) {
			over, ok = over && n.State.Terminal(), ok && n.State == store.JobSucceeded
		}
	}
	return over, ok
}

// retriesOf are the retries that a job has used up, by class.
func retriesOf(j *store.Job) map[string]int {
	used := map[string]int{}
	if len(j.Retries) > 0 {
		if err := json.Unmarshal(j.Retries, &used); err != nil {
			panic(err)
		}
	}
	return used
}

// published is what receivers got: it outlives every process.
type published struct {
	mu      sync.Mutex
	ids     map[int64]bool
	newest  map[string]int64 // ID by key
	version map[string]int64 // of a run, by key: the receiver drops older ones
	ends    map[string]string
	wrong   error
}

func newPublished() *published {
	return &published{ids: map[int64]bool{}, newest: map[string]int64{}, version: map[string]int64{}, ends: map[string]string{}}
}

func (p *published) receive(msgs ...*store.OutboxMessage) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, m := range msgs {
		if m.Coalesce {
			v, err := strconv.ParseInt(string(m.Body), 10, 64)
			if err != nil {
				p.wrong = err
			}
			p.version[m.Key] = max(p.version[m.Key], v)
		} else {
			if !p.ids[m.ID] && m.ID < p.newest[m.Key] {
				p.wrong = fmt.Errorf("message %d of %s arrives for the first time after %d", m.ID, m.Key, p.newest[m.Key])
			}
			job, state, _ := strings.Cut(string(m.Body), "=")
			if was := p.ends[job]; was != "" && was != state {
				p.wrong = fmt.Errorf("job %s ends as %s and as %s", job, was, state)
			}
			p.ends[job] = state
		}
		p.ids[m.ID] = true
		p.newest[m.Key] = max(p.newest[m.Key], m.ID)
	}
}

// rows are all rows at one moment.
type rows struct {
	runs     map[string]*store.Run
	jobs     map[string]*store.Job
	attempts map[string]*store.Attempt
	machines map[string]*store.Machine
	outbox   map[int64]*store.OutboxMessage
}

func look(ctx context.Context, db *bun.DB) (*rows, error) {
	o := &sql.TxOptions{ReadOnly: true}
	if sqldb.IsPostgres(db) {
		o.Isolation = sql.LevelRepeatableRead
	}
	tx, err := db.BeginTx(ctx, o)
	if err != nil {
		return nil, err
	}
	defer func() { _ = tx.Rollback() }()
	r := &rows{}
	if r.runs, err = all(ctx, tx, func(r *store.Run) string { return r.ID }); err != nil {
		return nil, err
	}
	if r.jobs, err = all(ctx, tx, func(j *store.Job) string { return j.ID }); err != nil {
		return nil, err
	}
	if r.attempts, err = all(ctx, tx, func(a *store.Attempt) string { return a.ID }); err != nil {
		return nil, err
	}
	if r.machines, err = all(ctx, tx, func(m *store.Machine) string { return m.ID }); err != nil {
		return nil, err
	}
	r.outbox, err = all(ctx, tx, func(m *store.OutboxMessage) int64 { return m.ID })
	return r, err
}

func all[K comparable, T any](ctx context.Context, tx bun.Tx, key func(*T) K) (map[K]*T, error) {
	var list []*T
	if err := tx.NewSelect().Model(&list).Scan(ctx); err != nil {
		return nil, err
	}
	out := make(map[K]*T, len(list))
	for _, x := range list {
		out[key(x)] = x
	}
	return out, nil
}

func (r *rows) jobsOf(runID string) []*store.Job {
	var out []*store.Job
	for _, j := range r.jobs {
		if j.RunID == runID {
			out = append(out, j)
		}
	}
	slices.SortFunc(out, func(a, b *store.Job) int { return a.Idx - b.Idx })
	return out
}

func live(a *store.Attempt) bool {
	return a.State == store.AttemptAssigned || a.State == store.AttemptRunning
}

// violations collects what is wrong.
type violations []string

func (v *violations) say(bad bool, format string, args ...any) {
	if bad {
		*v = append(*v, fmt.Sprintf(format, args...))
	}
}

func (v violations) err() error {
	if len(v) == 0 {
		return nil
	}
	slices.Sort(v)
	return fmt.Errorf("%s", strings.Join(v, "\n"))
}

// audit checks what holds of the rows at every moment, and between them and
// those of any earlier moment. latest is the latest time that there was.
func audit(before, now *rows, p *published, latest int64) error {
	var v violations
	now.consistent(&v, latest)
	now.withinCapacity(&v)
	if before != nil {
		before.became(now, &v)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	v.say(p.wrong != nil, "receiver: %v", p.wrong)
	if before != nil {
		for id, m := range before.outbox {
			_, there := now.outbox[id]
			superseded := m.Coalesce && p.newest[m.Key] > id
			for _, n := range now.outbox {
				superseded = superseded || m.Coalesce && n.Key == m.Key && n.ID > id
			}
			v.say(!there && !p.ids[id] && !superseded, "message %d of %s is gone, unpublished", id, m.Key)
		}
	}
	pending, ends := map[string]int64{}, map[string]bool{}
	for _, m := range now.outbox {
		if n, err := strconv.ParseInt(string(m.Body), 10, 64); err == nil {
			pending[m.Key] = max(pending[m.Key], n)
		} else {
			ends[string(m.Body)] = true
		}
	}
	for id, r := range now.runs {
		last := max(pending["run/"+id], p.version["run/"+id])
		v.say(last < r.Version, "run %s is at version %d, its statuses end with %d", id, r.Version, last)
	}
	for id, j := range now.jobs {
		v.say(j.State.Terminal() && p.ends[id] != string(j.State) && !ends[id+"="+string(j.State)], "nobody hears that job %s is %s", id, j.State)
	}
	return v.err()
}

func (r *rows) consistent(v *violations, latest int64) {
	byJob, byMachine := map[string][]*store.Attempt{}, map[string]string{}
	for id, a := range r.attempts {
		byJob[a.JobID] = append(byJob[a.JobID], a)
		other := byMachine[a.MachineID]
		v.say(other != "", "attempts %s and %s are on machine %s", id, other, a.MachineID)
		byMachine[a.MachineID] = id
		m := r.machines[a.MachineID]
		if m == nil {
			v.say(true, "attempt %s is on no machine", id)
			continue
		}
		v.say(m.AttemptID != id, "attempt %s is on machine %s, which is for %q", id, m.ID, m.AttemptID)
		v.say(!live(a) && m.State != store.MachineDestroying && m.State != store.MachineGone, "attempt %s is %s, its machine %s", id, a.State, m.State)
	}
	for id, j := range r.jobs {
		as := byJob[id]
		slices.SortFunc(as, func(a, b *store.Attempt) int { return a.Number - b.Number })
		v.say(len(as) != j.Attempts, "job %s counts %d attempts and has %d", id, j.Attempts, len(as))
		var alive []string
		for i, a := range as {
			v.say(a.Number != i+1, "attempt %d of job %s has number %d", i+1, id, a.Number)
			if live(a) {
				alive = append(alive, a.ID)
			}
		}
		v.say(len(alive) > 1, "job %s has %d live attempts", id, len(alive))
		taken := j.State == store.JobAssigned || j.State == store.JobRunning
		v.say(taken != (len(alive) == 1 && alive[0] == j.AttemptID), "job %s is %s with attempt %q and live ones %q", id, j.State, j.AttemptID, alive)
		if len(alive) > 0 {
			for _, a := range as[:len(as)-1] { // only time may let machines overlap
				m := r.machines[a.MachineID]
				v.say(m != nil && m.State != store.MachineGone && m.DestroyingAt+modelHold.Microseconds() > latest,
					"job %s has a new attempt while machine %s of an old one is %s", id, a.MachineID, m.State)
			}
		}
		if j.HoldID != "" {
			m := r.machines[j.HoldID]
			v.say(j.State != store.JobQueued || m == nil || m.State != store.MachineDestroying, "job %s is %s and waits for machine %s", id, j.State, j.HoldID)
		}
		used := 0
		for class, n := range retriesOf(j) {
			used += n
			v.say(n > modelBudget, "job %s was retried %d times for %s", id, n, class)
		}
		over := j.State.Terminal()
		v.say(j.Attempts != used && !(j.Attempts == used+1 && (taken || over)), "job %s is %s after %d attempts and %d retries", id, j.State, j.Attempts, used)
		if over != (j.FinishedAt != 0) {
			v.say(true, "job %s is %s, finished at %d", id, j.State, j.FinishedAt)
		}
	}
	for id, run := range r.runs {
		jobs := r.jobsOf(id)
		v.say(run.State != wantRunState(run, jobs), "run %s is %s, its jobs say %s", id, run.State, wantRunState(run, jobs))
		for _, j := range jobs {
			if j.State == store.JobWaiting && run.State != store.RunAwaitingApproval {
				over, _ := needsOver(j, jobs)
				v.say(over, "job %s waits for nothing", j.ID)
			}
		}
	}
}

// wantRunState is what a run's jobs make of it; whether it has begun is its
// history.
func wantRunState(run *store.Run, jobs []*store.Job) store.RunState {
	n := map[store.JobState]int{}
	for _, j := range jobs {
		if !j.State.Terminal() {
			if run.State.Terminal() {
				return store.RunRunning
			}
			return run.State
		}
		n[j.State]++
	}
	switch {
	case n[store.JobErrored] > 0:
		return store.RunErrored
	case n[store.JobFailed] > 0 || n[store.JobTimedOut] > 0:
		return store.RunFailed
	case n[store.JobCancelled] > 0:
		return store.RunCancelled
	case n[store.JobSucceeded] == 0:
		return store.RunSkipped
	}
	return store.RunSucceeded
}

func (r *rows) withinCapacity(v *violations) {
	hosts, pools, boots := map[string]int{}, map[string]int{}, map[string]int{}
	for _, m := range r.machines {
		if m.State != store.MachineGone {
			hosts[m.Host]++
			pools[m.Pool]++
		}
		if m.State == store.MachineProvisioning {
			boots[m.Host]++
		}
	}
	for host, most := range modelBoots {
		v.say(boots[host] > most, "host %s boots %d machines at once, it may %d", host, boots[host], most)
	}
	for host, capacity := range modelHosts {
		v.say(hosts[host] > capacity, "host %s has %d machines, room is for %d", host, hosts[host], capacity)
	}
	for _, p := range modelPools {
		v.say(pools[p.name] > p.capacity, "pool %s has %d machines, room is for %d", p.name, pools[p.name], p.capacity)
	}
}

var (
	attemptOrder = []store.AttemptState{store.AttemptAssigned, store.AttemptRunning, store.AttemptFinished, store.AttemptLost}
	machineOrder = []store.MachineState{store.MachineProvisioning, store.MachineReady, store.MachineBound, store.MachineDestroying, store.MachineGone}
)

// became checks what may become of rows.
func (r *rows) became(now *rows, v *violations) {
	for id, a := range r.runs {
		b := now.runs[id]
		if b == nil {
			v.say(true, "run %s is lost", id)
			continue
		}
		v.say(a.State.Terminal() && a.State != b.State, "run %s was %s and is %s", id, a.State, b.State)
		v.say(b.Version < a.Version || a.State != b.State && b.Version == a.Version, "run %s went from %s, version %d, to %s, version %d", id, a.State, a.Version, b.State, b.Version)
		v.say(a.FinishedAt != 0 && a.FinishedAt != b.FinishedAt, "run %s finished twice", id)
	}
	for id, a := range r.jobs {
		b := now.jobs[id]
		if b == nil {
			v.say(true, "job %s is lost", id)
			continue
		}
		v.say(a.State.Terminal() && (a.State != b.State || a.AttemptID != b.AttemptID || a.FinishedAt != b.FinishedAt || string(a.Outputs) != string(b.Outputs)),
			"job %s was %s and changed to %s", id, a.State, b.State)
		v.say(b.Attempts < a.Attempts || b.Version < a.Version, "job %s went back", id)
		v.say(a.State != store.JobWaiting && b.State == store.JobWaiting, "job %s was %s and waits", id, a.State)
	}
	for id, a := range r.attempts {
		b := now.attempts[id]
		if b == nil {
			v.say(true, "attempt %s is lost", id)
			continue
		}
		v.say(slices.Index(attemptOrder, b.State) < slices.Index(attemptOrder, a.State), "attempt %s went from %s to %s", id, a.State, b.State)
		v.say(!live(a) && (a.State != b.State || a.Epoch != b.Epoch || a.AckedSeq != b.AckedSeq || a.LogSize != b.LogSize || a.Result != b.Result || a.FinishedAt != b.FinishedAt),
			"attempt %s was %s and changed", id, a.State)
		v.say(b.Epoch < a.Epoch || b.AckedSeq < a.AckedSeq || b.LogSize < a.LogSize, "attempt %s went back from epoch %d, seq %d, size %d to %d, %d, %d",
			id, a.Epoch, a.AckedSeq, a.LogSize, b.Epoch, b.AckedSeq, b.LogSize)
		v.say(b.Owner != a.Owner && b.Owner != "" && b.Epoch == a.Epoch, "attempt %s changed hands within epoch %d", id, a.Epoch)
		v.say(a.CancelReason != "" && a.CancelReason != b.CancelReason, "attempt %s was cancelled for %q, then for %q", id, a.CancelReason, b.CancelReason)
	}
	for id, a := range r.machines {
		b := now.machines[id]
		if b == nil {
			v.say(true, "machine %s is lost", id)
			continue
		}
		v.say(slices.Index(machineOrder, b.State) < slices.Index(machineOrder, a.State), "machine %s went from %s to %s", id, a.State, b.State)
		v.say(a.AttemptID != "" && a.AttemptID != b.AttemptID, "machine %s serves %s and %s", id, a.AttemptID, b.AttemptID)
	}
}
