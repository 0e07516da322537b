package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/uptrace/bun"
)

// EnrollRequest is what an agent says of itself, with the hashes of its
// secrets.
type EnrollRequest struct {
	TokenHash string
	NonceHash string
	CredHash  string
	OS        string
	Arch      string
	Version   string
	Protocol  int
	HasGit    bool
}

// Enroll uses up a machine's token and gives its agent a credential. The same
// nonce may repeat it, since the reply may have been lost, until the first
// journal entry is acknowledged; only the last credential counts. Everything
// else is ErrToken.
func (s *Store) Enroll(ctx context.Context, r EnrollRequest) (*Machine, error) {
	m := new(Machine)
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		*m = Machine{}
		if r.TokenHash == "" || r.NonceHash == "" || r.CredHash == "" {
			return ErrToken
		}
		err := lockRow(tx, tx.NewSelect().Model(m).Where("token_hash = ? AND token_hash <> ''", r.TokenHash)).Scan(ctx)
		if errors.Is(err, sql.ErrNoRows) {
			return ErrToken
		}
		if err != nil {
			return err
		}
		repeat := m.NonceHash == r.NonceHash
		switch {
		case m.TokenExpires <= now, m.NonceHash != "" && !repeat:
			return ErrToken
		case m.State == MachineProvisioning:
		case (m.State == MachineReady || m.State == MachineBound) && repeat:
		default:
			return ErrToken
		}
		if repeat && m.AttemptID != "" {
			var acked int64
			if err := tx.NewSelect().Model((*Attempt)(nil)).Column("acked_seq").Where("id = ?", m.AttemptID).Scan(ctx, &acked); err != nil {
				return err
			}
			if acked > 0 {
				return ErrToken
			}
		}
		m.NonceHash, m.CredHash, m.ContactAt = r.NonceHash, r.CredHash, now
		m.OS, m.Arch, m.AgentVersion, m.Protocol, m.HasGit = r.OS, r.Arch, r.Version, r.Protocol, r.HasGit
		_, err = tx.NewUpdate().Model(m).Column("nonce_hash", "cred_hash", "contact_at", "os", "arch", "agent_version", "protocol", "has_git").
			Where("id = ?", m.ID).Exec(ctx)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("store: enroll: %w", err)
	}
	return m, nil
}

// MachineByToken finds the machine whose enrolment token this is, as long as
// nobody has enrolled with it; everything else is ErrToken.
func (s *Store) MachineByToken(ctx context.Context, tokenHash string) (*Machine, error) {
	now, err := s.Now(ctx)
	if err != nil {
		return nil, err
	}
	m := new(Machine)
	err = s.db.NewSelect().Model(m).Where("token_hash = ? AND token_hash <> ''", tokenHash).Scan(ctx)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return nil, ErrToken
	case err != nil:
		return nil, fmt.Errorf("store: machine by token: %w", err)
	case m.State != MachineProvisioning || m.NonceHash != "" || m.TokenExpires <= now:
		return nil, ErrToken
	}
	return m, nil
}

// MachineByCredential finds the machine an agent belongs to: ErrNotFound when
// there is none, ErrGone when it is being destroyed or gone.
func (s *Store) MachineByCredential(ctx context.Context, credHash string) (*Machine, error) {
	m := new(Machine)
	err := s.db.NewSelect().Model(m).Where("cred_hash = ? AND cred_hash <> ''", credHash).Scan(ctx)
	if err != nil {
		return nil, found(err, "machine", "of that credential")
	}
	if m.State == MachineDestroying || m.State == MachineGone {
		return nil, fmt.Errorf("%w: %s", ErrGone, m.ID)
	}
	return m, nil
}

// Attach records that a machine's agent reached this orchestrator, which takes
// the machine and, where there is one, its attempt with the next epoch, also
// from an owner whose lease lives. Without an attempt the last three results
// are nil. An attempt that is over returns ErrOver, a machine that is being
// destroyed or gone ErrGone.
func (s *Store) Attach(ctx context.Context, machineID, owner string, lease time.Duration) (*Machine, *Attempt, *Job, *Run, error) {
	var m *Machine
	var a *Attempt
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		m, a = new(Machine), nil
		if err := tx.NewSelect().Model(m).Where("id = ?", machineID).Scan(ctx); err != nil {
			return found(err, "machine", machineID)
		}
		if m.AttemptID != "" { // an attempt is locked before its machine
			a = new(Attempt)
			if err := lockRow(tx, tx.NewSelect().Model(a).Where("id = ?", m.AttemptID)).Scan(ctx); err != nil {
				return found(err, "attempt", m.AttemptID)
			}
		}
		intended := m.AttemptID
		if err := lockRow(tx, tx.NewSelect().Model(m).Where("id = ?", machineID)).Scan(ctx); err != nil {
			return err
		}
		switch {
		case m.AttemptID != intended:
			return fmt.Errorf("%w: machine %s was bound", ErrStale, m.ID)
		case a != nil && (a.State == AttemptFinished || a.State == AttemptLost || a.MachineID != m.ID):
			return fmt.Errorf("%w: %s", ErrOver, a.ID)
		case m.State == MachineDestroying || m.State == MachineGone:
			return fmt.Errorf("%w: %s", ErrGone, m.ID)
		}
		m.Owner, m.LeaseUntil, m.ContactAt = owner, now+micros(lease), now
		if m.State == MachineProvisioning {
			m.State, m.ReadyAt = MachineReady, now
			if err := warmAgain(ctx, tx, m); err != nil {
				return err
			}
		}
		if a != nil {
			m.State = MachineBound
			a.Owner, a.LeaseUntil, a.ContactAt = owner, m.LeaseUntil, now
			a.Epoch++
			if _, err := tx.NewUpdate().Model(a).Column("owner", "lease_until", "contact_at", "epoch").Where("id = ?", a.ID).Exec(ctx); err != nil {
				return err
			}
		}
		_, err := tx.NewUpdate().Model(m).Column("owner", "lease_until", "contact_at", "state", "ready_at").Where("id = ?", m.ID).Exec(ctx)
		return err
	})
	if errors.Is(err, ErrStale) && ctx.Err() == nil { // a machine is bound once, so this ends
		return s.Attach(ctx, machineID, owner, lease)
	}
	if err != nil {
		return nil, nil, nil, nil, fmt.Errorf("store: attach: %w", err)
	}
	if a == nil {
		return m, nil, nil, nil, nil
	}
	j, err := s.Job(ctx, a.JobID)
	if err != nil {
		return nil, nil, nil, nil, err
	}
	r, err := s.Run(ctx, a.RunID)
	if err != nil {
		return nil, nil, nil, nil, err
	}
	return m, a, j, r, nil
}

// MachineDestroying marks a machine to be destroyed; one that is already, or
// gone, is left alone.
func (s *Store) MachineDestroying(ctx context.Context, id, reason string) error {
	return s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		ok, err := destroying(ctx, tx, now, id, reason)
		if err != nil || ok {
			return err
		}
		exists, err := tx.NewSelect().Model((*Machine)(nil)).Where("id = ?", id).Exists(ctx)
		if err == nil && !exists {
			err = fmt.Errorf("%w: machine %s", ErrNotFound, id)
		}
		return err
	})
}

func destroying(ctx context.Context, tx bun.Tx, now int64, id, reason string) (bool, error) {
	return changed(tx.NewUpdate().Model((*Machine)(nil)).
		Set("state = ?, reason = ?, destroying_at = ?", MachineDestroying, reason, now).
		Where("id = ?", id).Where(usable).Exec(ctx))
}

// MachineGone records that a machine does not exist any more, lets the jobs
// that waited for that be claimed, and returns their labels.
func (s *Store) MachineGone(ctx context.Context, id string) ([]string, error) {
	var labels []string
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		labels = nil
		m := new(Machine)
		if err := lockRow(tx, tx.NewSelect().Model(m).Where("id = ?", id)).Scan(ctx); err != nil {
			return found(err, "machine", id)
		}
		if m.State != MachineGone {
			if _, err := tx.NewUpdate().Model((*Machine)(nil)).Set("state = ?, gone_at = ?, owner = '', lease_until = 0", MachineGone, now).
				Where("id = ?", id).Exec(ctx); err != nil {
				return err
			}
		}
		var err error
		labels, err = clearHolds(ctx, tx, []string{id})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("store: machine gone: %w", err)
	}
	return labels, nil
}

// ReleaseHolds lets jobs go on whose old machines have been in destruction for
// longer than olderThan, because their provider cannot be reached, and returns
// their labels. From then on two machines may run the same job.
func (s *Store) ReleaseHolds(ctx context.Context, olderThan time.Duration) ([]string, error) {
	var labels []string
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		labels = nil
		var held, late []string
		err := tx.NewSelect().Model((*Job)(nil)).Distinct().Column("hold_id").Where("hold_id <> ''").Scan(ctx, &held)
		if err != nil || len(held) == 0 {
			return err
		}
		err = tx.NewSelect().Model((*Machine)(nil)).Column("id").
			Where("id IN (?) AND state = ? AND destroying_at <= ?", bun.List(held), MachineDestroying, now-micros(olderThan)).Scan(ctx, &late)
		if err != nil || len(late) == 0 {
			return err
		}
		labels, err = clearHolds(ctx, tx, late)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("store: release holds: %w", err)
	}
	return labels, nil
}

func clearHolds(ctx context.Context, tx bun.Tx, machines []string) ([]string, error) {
	var jobs []*Job
	err := lockRow(tx, tx.NewSelect().Model(&jobs).Column("id", "label", "state").
		Where("hold_id IN (?) AND hold_id <> ''", bun.List(machines)).OrderBy("id", bun.OrderAsc)).Scan(ctx)
	if err != nil || len(jobs) == 0 {
		return nil, err
	}
	var ids, labels []string
	for _, j := range jobs {
		ids = append(ids, j.ID)
		if j.State == JobQueued && !slices.Contains(labels, j.Label) {
			labels = append(labels, j.Label)
		}
	}
	_, err = tx.NewUpdate().Model((*Job)(nil)).Set("hold_id = ''").Where("id IN (?)", bun.List(ids)).Exec(ctx)
	return labels, err
}

// MachinesNotGone lists the machines that a host has or is to have.
func (s *Store) MachinesNotGone(ctx context.Context, host string) ([]*Machine, error) {
	var out []*Machine
	err := s.db.NewSelect().Model(&out).Where("host = ?", host).Where(notGone).OrderBy("id", bun.OrderAsc).Scan(ctx)
	return out, err
}

// Lease takes a named lease or renews it, and reports whether it is the
// owner's now.
func (s *Store) Lease(ctx context.Context, name, owner string, ttl time.Duration) (bool, error) {
	var mine bool
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		var err error
		mine, err = changed(tx.NewRaw(`INSERT INTO leases (name, owner, until) VALUES (?, ?, ?)
			ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, until = excluded.until
			WHERE leases.owner = excluded.owner OR leases.until <= ?`, name, owner, now+micros(ttl), now).Exec(ctx))
		return err
	})
	if err != nil {
		return false, fmt.Errorf("store: lease %s: %w", name, err)
	}
	return mine, nil
}
