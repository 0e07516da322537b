package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/uptrace/bun"
)

// Finish is how an attempt's journal ended.
type Finish struct {
	State   JobState // the job's; ignored by RetryAttempt
	Class   string
	Reason  string
	Outputs json.RawMessage
	// AckedSeq, LogSize and Steps move with it, as in Progress.
	AckedSeq int64
	LogSize  int64
	Steps    []*Step
}

// Loss is why an attempt's journal will never end.
type Loss struct {
	Class   string
	Reason  string
	Console string // the end of the serial console
	// Retry queues the job again; otherwise it ends as JobState.
	Retry    bool
	JobState JobState
}

// StartAttempt notes that the agent has the job: attempt and job are running,
// and the server gives up at now + deadline. A repeat at the same epoch, also
// after a take-over, changes nothing.
func (t *RunTx) StartAttempt(ctx context.Context, ref AttemptRef, deadline time.Duration) error {
	a, j, err := t.live(ctx, ref)
	if err != nil || a.State == AttemptRunning {
		return err
	}
	a.State, a.StartedAt, a.DeadlineAt = AttemptRunning, t.Now, t.Now+micros(deadline)
	if err := t.setAttempt(ctx, a, ref, AttemptAssigned, "state", "started_at", "deadline_at"); err != nil {
		return err
	}
	return t.setJob(ctx, j, func(j *Job) {
		j.State = JobRunning
		if j.StartedAt == 0 {
			j.StartedAt = t.Now
		}
	})
}

// FinishAttempt records the end of the journal: the attempt is finished, its
// job ends as f.State, and its machine is to be destroyed. A repeat of what was
// recorded at the same epoch changes nothing. A journal or log shorter than
// what was acknowledged before is ErrStale.
func (t *RunTx) FinishAttempt(ctx context.Context, ref AttemptRef, f Finish) error {
	if !f.State.Terminal() {
		return wrongState("job of attempt", ref.ID, f.State)
	}
	return t.finish(ctx, ref, f, false)
}

// RetryAttempt is FinishAttempt for a journal that ended with a failure that
// is not the job's: the job is queued again, in its old place, and waits for
// the machine to be gone.
func (t *RunTx) RetryAttempt(ctx context.Context, ref AttemptRef, f Finish) error {
	return t.finish(ctx, ref, f, true)
}

func (t *RunTx) finish(ctx context.Context, ref AttemptRef, f Finish, retry bool) error {
	a, j, err := t.live(ctx, ref)
	if errors.Is(err, ErrStale) && a != nil && a.State == AttemptFinished && a.Epoch == ref.Epoch && a.AckedSeq == f.AckedSeq {
		return nil
	}
	if err != nil {
		return err
	}
	if f.AckedSeq < a.AckedSeq || f.LogSize < a.LogSize {
		return wrongState("attempt", a.ID, "further already")
	}
	from := a.State
	a.State, a.Class, a.Reason, a.Result, a.FinishedAt = AttemptFinished, f.Class, f.Reason, string(f.State), t.Now
	a.AckedSeq, a.LogSize = f.AckedSeq, f.LogSize
	if err := t.setAttempt(ctx, a, ref, from, "state", "class", "reason", "result", "finished_at", "acked_seq", "log_size"); err != nil {
		return err
	}
	if err := upsertSteps(ctx, t.tx, a.ID, f.Steps); err != nil {
		return err
	}
	return t.afterAttempt(ctx, a, j, f.Class, f.Reason, retry, f.State, f.Outputs)
}

// LoseAttempt gives an attempt up, and raises its epoch so that whoever still
// thinks it has it is refused.
func (t *RunTx) LoseAttempt(ctx context.Context, ref AttemptRef, l Loss) error {
	if !l.Retry && !l.JobState.Terminal() {
		return wrongState("job of attempt", ref.ID, l.JobState)
	}
	a, j, err := t.live(ctx, ref)
	if err != nil {
		return err
	}
	from := a.State
	a.State, a.Class, a.Reason, a.Console, a.FinishedAt = AttemptLost, l.Class, l.Reason, l.Console, t.Now
	a.LogLost, a.Epoch = true, a.Epoch+1
	if !l.Retry {
		a.Result = string(l.JobState)
	}
	if err := t.setAttempt(ctx, a, ref, from, "state", "class", "reason", "console", "finished_at", "log_lost", "epoch", "result"); err != nil {
		return err
	}
	return t.afterAttempt(ctx, a, j, l.Class, l.Reason, l.Retry, l.JobState, nil)
}

// CancelAttempt asks for a live attempt's end; the first to ask gives the
// reason. An attempt that is over is left alone.
func (t *RunTx) CancelAttempt(ctx context.Context, id, reason string) error {
	_, err := t.tx.NewUpdate().Model((*Attempt)(nil)).Set("cancel_reason = ?, cancel_at = ?", reason, t.Now).
		Where("id = ? AND run_id = ? AND cancel_reason = ''", id, t.Run.ID).Where(liveAttempt).Exec(ctx)
	return err
}

// live loads an attempt and its job for a change under ref. With ErrStale it
// returns the attempt as it is.
func (t *RunTx) live(ctx context.Context, ref AttemptRef) (*Attempt, *Job, error) {
	a, err := t.Attempt(ctx, ref.ID)
	if err != nil {
		return nil, nil, err
	}
	j := t.job(a.JobID)
	switch {
	case a.Epoch != ref.Epoch:
		return a, j, wrongState("attempt", a.ID, fmt.Sprintf("at epoch %d, not %d", a.Epoch, ref.Epoch))
	case a.State != AttemptAssigned && a.State != AttemptRunning:
		return a, j, wrongState("attempt", a.ID, a.State)
	case j == nil || j.AttemptID != a.ID || j.State != JobAssigned && j.State != JobRunning:
		return a, j, wrongState("job of attempt", a.ID, "not its own any more")
	}
	return a, j, nil
}

func (t *RunTx) setAttempt(ctx context.Context, a *Attempt, ref AttemptRef, from AttemptState, columns ...string) error {
	ok, err := changed(t.tx.NewUpdate().Model(a).Column(columns...).
		Where("id = ? AND epoch = ? AND state = ?", ref.ID, ref.Epoch, from).Exec(ctx))
	if err == nil && !ok {
		err = wrongState("attempt", a.ID, "changed")
	}
	return err
}

// afterAttempt ends the machine of an attempt that is over, and ends or
// requeues the job. The machine comes first: MachineGone locks in that order.
func (t *RunTx) afterAttempt(ctx context.Context, a *Attempt, j *Job, class, reason string, retry bool, state JobState, outputs json.RawMessage) error {
	m := new(Machine)
	if err := lockRow(t.tx, t.tx.NewSelect().Model(m).Where("id = ?", a.MachineID)).Scan(ctx); err != nil {
		return found(err, "machine", a.MachineID)
	}
	if _, err := destroying(ctx, t.tx, t.Now, m.ID, "its attempt is over"); err != nil {
		return err
	}
	if !retry {
		return t.setJob(ctx, j, func(j *Job) {
			j.State, j.Class, j.Reason, j.Outputs, j.FinishedAt = state, class, reason, outputs, t.Now
		})
	}
	used := map[string]int{}
	if len(j.Retries) > 0 {
		if err := json.Unmarshal(j.Retries, &used); err != nil {
			return fmt.Errorf("store: retries of job %s: %w", j.ID, err)
		}
	}
	used[class]++
	retries, err := json.Marshal(used)
	if err != nil {
		return err
	}
	return t.setJob(ctx, j, func(j *Job) {
		j.State, j.Class, j.Reason, j.Retries = JobQueued, class, reason, retries
		if m.State != MachineGone {
			j.HoldID = m.ID
		}
	})
}

// Progress moves an attempt's acknowledged sequence and log size, with what the
// acknowledged events say about steps, and notes its agent as alive. It refuses
// with ErrStale unless the epoch is current, the attempt live, acked beyond
// what was acknowledged before, and the log no shorter.
func (s *Store) Progress(ctx context.Context, ref AttemptRef, acked, logSize int64, steps []*Step) error {
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		ok, err := changed(tx.NewUpdate().Model((*Attempt)(nil)).
			Set("acked_seq = ?, log_size = ?, contact_at = ?", acked, logSize, now).
			Where("id = ? AND epoch = ? AND acked_seq < ? AND log_size <= ?", ref.ID, ref.Epoch, acked, logSize).Where(liveAttempt).Exec(ctx))
		if err != nil {
			return err
		}
		if !ok {
			return wrongState("attempt", ref.ID, "over, of another epoch, or further already")
		}
		return upsertSteps(ctx, tx, ref.ID, steps)
	})
	if err != nil {
		return fmt.Errorf("store: progress: %w", err)
	}
	return nil
}

// upsertSteps merges what is known of steps: what is set wins over what is not.
func upsertSteps(ctx context.Context, tx bun.Tx, attemptID string, steps []*Step) error {
	for _, st := range steps {
		row := *st
		row.AttemptID = attemptID
		_, err := tx.NewInsert().Model(&row).On("CONFLICT (attempt_id, idx) DO UPDATE").
			Set("name = CASE WHEN excluded.name <> '' THEN excluded.name ELSE step.name END").
			Set("started_at = CASE WHEN excluded.started_at <> 0 THEN excluded.started_at ELSE step.started_at END").
			Set("result = CASE WHEN excluded.result <> '' THEN excluded.result ELSE step.result END").
			Set("exit_code = CASE WHEN excluded.result <> '' THEN excluded.exit_code ELSE step.exit_code END").
			Set("signal = CASE WHEN excluded.result <> '' THEN excluded.signal ELSE step.signal END").
			Set("reason = CASE WHEN excluded.reason <> '' THEN excluded.reason ELSE step.reason END").
			Set("outputs = COALESCE(excluded.outputs, step.outputs)").
			Set("continued = CASE WHEN excluded.result <> '' THEN excluded.continued ELSE step.continued END").
			Set("finished_at = CASE WHEN excluded.finished_at <> 0 THEN excluded.finished_at ELSE step.finished_at END").
			Exec(ctx)
		if err != nil {
			return err
		}
	}
	return nil
}
