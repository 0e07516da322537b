package store_test

import (
	"context"
	"math"
	"testing"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/store"
)

// faulty is a store with some of its methods replaced.
type faulty struct {
	subject
	db        *bun.DB
	insert    func(f *faulty, ctx context.Context, run *store.Run, jobs []*store.Job) error
	claim     func(f *faulty, ctx context.Context, q store.ClaimRequest) ([]store.Claimed, error)
	attach    func(f *faulty, ctx context.Context, machineID, owner string) error
	progress  func(f *faulty, ctx context.Context, ref store.AttemptRef, acked, size int64) error
	gone      func(f *faulty, ctx context.Context, id string) error
	withRun   func(f *faulty, ctx context.Context, runID string) error
	published func(f *faulty, ctx context.Context, msgs []*store.OutboxMessage) error
}

func (f *faulty) exec(ctx context.Context, statement string, args ...any) error {
	_, err := f.db.NewRaw(statement, args...).Exec(ctx)
	return err
}

func (f *faulty) InsertRun(ctx context.Context, run *store.Run, jobs []*store.Job) error {
	if f.insert != nil {
		return f.insert(f, ctx, run, jobs)
	}
	return f.subject.InsertRun(ctx, run, jobs)
}

func (f *faulty) Claim(ctx context.Context, q store.ClaimRequest) ([]store.Claimed, error) {
	if f.claim != nil {
		return f.claim(f, ctx, q)
	}
	return f.subject.Claim(ctx, q)
}

func (f *faulty) Attach(ctx context.Context, machineID, owner string, lease time.Duration) (*store.Machine, *store.Attempt, *store.Job, *store.Run, error) {
	m, a, j, r, err := f.subject.Attach(ctx, machineID, owner, lease)
	if err == nil && f.attach != nil {
		err = f.attach(f, ctx, machineID, owner)
	}
	return m, a, j, r, err
}

func (f *faulty) Progress(ctx context.Context, ref store.AttemptRef, acked, size int64, steps []*store.Step) error {
	if f.progress != nil {
		return f.progress(f, ctx, ref, acked, size)
	}
	return f.subject.Progress(ctx, ref, acked, size, steps)
}

func (f *faulty) MachineGone(ctx context.Context, id string) ([]string, error) {
	if f.gone != nil {
		return nil, f.gone(f, ctx, id)
	}
	return f.subject.MachineGone(ctx, id)
}

func (f *faulty) WithRun(ctx context.Context, runID string, fn func(ctx context.Context, t *store.RunTx) error) (store.Change, error) {
	c, err := f.subject.WithRun(ctx, runID, fn)
	if err == nil && f.withRun != nil {
		err = f.withRun(f, ctx, runID)
	}
	return c, err
}

func (f *faulty) OutboxClaim(ctx context.Context, owner string, limit int, lease time.Duration) ([]*store.OutboxMessage, error) {
	msgs, err := f.subject.OutboxClaim(ctx, owner, limit, lease)
	if err == nil && f.published != nil {
		err = f.published(f, ctx, msgs)
	}
	return msgs, err
}

func with(f faulty) fault {
	return fault{wrap: func(s subject, db *bun.DB) subject {
		own := f
		own.subject, own.db = s, db
		return &own
	}}
}

// faults are ways in which a store may be wrong.
var faults = map[string]fault{
	"duplicates are accepted": with(faulty{insert: func(f *faulty, ctx context.Context, run *store.Run, jobs []*store.Job) error {
		run.Delivery, run.IdempotencyKey = "", ""
		return f.subject.InsertRun(ctx, run, jobs)
	}}),
	"jobs of an accepted run are dropped": with(faulty{insert: func(f *faulty, ctx context.Context, run *store.Run, jobs []*store.Job) error {
		return f.subject.InsertRun(ctx, run, jobs[:len(jobs)-1])
	}}),
	"capacity is not counted": with(faulty{claim: func(f *faulty, ctx context.Context, q store.ClaimRequest) ([]store.Claimed, error) {
		q.PoolCapacity, q.HostCapacity = math.MaxInt32, math.MaxInt32
		return f.subject.Claim(ctx, q)
	}}),
	"a host's pools are counted apart": with(faulty{claim: func(f *faulty, ctx context.Context, q store.ClaimRequest) ([]store.Claimed, error) {
		q.HostCapacity = math.MaxInt32
		return f.subject.Claim(ctx, q)
	}}),
	"boots of a host are not counted": with(faulty{claim: func(f *faulty, ctx context.Context, q store.ClaimRequest) ([]store.Claimed, error) {
		q.HostBoots = 0
		return f.subject.Claim(ctx, q)
	}}),
	"warm machines come before another pool's jobs": with(faulty{claim: func(f *faulty, ctx context.Context, q store.ClaimRequest) ([]store.Claimed, error) {
		q.Others = nil
		return f.subject.Claim(ctx, q)
	}}),
	"warm machines that fail are made again at once": with(faulty{claim: func(f *faulty, ctx context.Context, q store.ClaimRequest) ([]store.Claimed, error) {
		if err := f.exec(ctx, "DELETE FROM warm_failures"); err != nil {
			return nil, err
		}
		return f.subject.Claim(ctx, q)
	}}),
	"priorities are ignored": with(faulty{claim: func(f *faulty, ctx context.Context, q store.ClaimRequest) ([]store.Claimed, error) {
		if err := f.exec(ctx, "UPDATE jobs SET priority = 0"); err != nil {
			return nil, err
		}
		return f.subject.Claim(ctx, q)
	}}),
	"the newest job goes first": with(faulty{claim: func(f *faulty, ctx context.Context, q store.ClaimRequest) ([]store.Claimed, error) {
		if err := f.exec(ctx, "UPDATE jobs SET queued_at = -queued_at"); err != nil {
			return nil, err
		}
		c, err := f.subject.Claim(ctx, q)
		if err == nil {
			err = f.exec(ctx, "UPDATE jobs SET queued_at = -queued_at")
		}
		return c, err
	}}),
	"a job is claimed twice": with(faulty{claim: func(f *faulty, ctx context.Context, q store.ClaimRequest) ([]store.Claimed, error) {
		if err := f.exec(ctx, "UPDATE jobs SET state = 'queued' WHERE state = 'assigned'"); err != nil {
			return nil, err
		}
		return f.subject.Claim(ctx, q)
	}}),
	"a retry does not wait for the old machine": with(faulty{withRun: func(f *faulty, ctx context.Context, _ string) error {
		return f.exec(ctx, "UPDATE jobs SET hold_id = ''")
	}}),
	"retries are not counted": with(faulty{withRun: func(f *faulty, ctx context.Context, _ string) error {
		return f.exec(ctx, "UPDATE jobs SET retries = '{}'")
	}}),
	"a job that is over runs again": with(faulty{withRun: func(f *faulty, ctx context.Context, runID string) error {
		return f.exec(ctx, "UPDATE jobs SET state = 'queued' WHERE state IN ('errored', 'failed', 'timed_out') AND run_id = ?", runID)
	}}),
	"a run's state is overwritten": with(faulty{withRun: func(f *faulty, ctx context.Context, runID string) error {
		return f.exec(ctx, "UPDATE runs SET state = 'succeeded' WHERE state = 'failed' AND id = ?", runID)
	}}),
	"taking over keeps the epoch": with(faulty{attach: func(f *faulty, ctx context.Context, machineID, _ string) error {
		return f.exec(ctx, "UPDATE attempts SET epoch = epoch - 1 WHERE machine_id = ?", machineID)
	}}),
	"progress ignores the epoch": with(faulty{progress: func(f *faulty, ctx context.Context, ref store.AttemptRef, acked, size int64) error {
		var epoch int64
		if err := f.db.NewRaw("SELECT epoch FROM attempts WHERE id = ?", ref.ID).Scan(ctx, &epoch); err != nil {
			return err
		}
		return f.subject.Progress(ctx, store.AttemptRef{ID: ref.ID, Epoch: epoch}, acked, size, nil)
	}}),
	"progress goes back": with(faulty{progress: func(f *faulty, ctx context.Context, ref store.AttemptRef, acked, size int64) error {
		return f.exec(ctx, "UPDATE attempts SET acked_seq = ?, log_size = ? WHERE id = ? AND epoch = ?", acked, size, ref.ID, ref.Epoch)
	}}),
	"transitions ignore the epoch": {ref: func(ctx context.Context, t *store.RunTx, ref store.AttemptRef) store.AttemptRef {
		if a, err := t.Attempt(ctx, ref.ID); err == nil {
			ref.Epoch = a.Epoch
		}
		return ref
	}},
	"a machine that is gone is forgotten by who waits": with(faulty{gone: func(f *faulty, ctx context.Context, id string) error {
		return f.exec(ctx, "UPDATE machines SET state = 'gone', owner = '', lease_until = 0 WHERE id = ?", id)
	}}),
	"messages are deleted before they are published": with(faulty{published: func(f *faulty, ctx context.Context, msgs []*store.OutboxMessage) error {
		for _, m := range msgs {
			if err := f.exec(ctx, "DELETE FROM outbox WHERE id = ?", m.ID); err != nil {
				return err
			}
		}
		return nil
	}}),
	"a claim of messages is not recorded": with(faulty{published: func(f *faulty, ctx context.Context, _ []*store.OutboxMessage) error {
		return f.exec(ctx, "UPDATE outbox SET claimed_by = '', claimed_until = 0")
	}}),
	"a change causes no message": with(faulty{withRun: func(f *faulty, ctx context.Context, runID string) error {
		return f.exec(ctx, "DELETE FROM outbox WHERE key = ?", "run/"+runID)
	}}),
	"the clock's mark is lost": {restart: func(ctx context.Context, db *bun.DB) error {
		_, err := db.NewRaw("UPDATE meta SET value = '0' WHERE key = 'clock'").Exec(ctx)
		return err
	}},
}

// TestModelNotices shows that the model is worth something: every fault is
// found within some programs.
func TestModelNotices(t *testing.T) {
	db := open(t, "sqlite::memory:")
	must(t, store.Migrate(t.Context(), db))
	gen := programs()
	for name, f := range faults {
		t.Run(name, func(t *testing.T) {
			for seed := range 500 {
				m, err := newModel(t.Context(), db, f)
				must(t, err)
				if err := m.run(t.Context(), gen.Example(seed), false); err != nil {
					t.Logf("program %d: %.300q", seed, err)
					return
				}
			}
			t.Error("not noticed")
		})
	}
}
