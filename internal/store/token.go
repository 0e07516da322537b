package store

import (
	"context"
	"fmt"
	"time"

	"github.com/uptrace/bun"
)

// Token is a bearer token, without the secret itself.
type Token struct {
	bun.BaseModel `bun:"table:tokens,alias:token"`

	ID        string `bun:",pk"`
	Name      string // unique
	Hash      string // hex SHA-256 of the secret, unique
	Role      string
	CreatedAt int64
	ExpiresAt int64 // 0: never
	UsedAt    int64 // about; 0: never
}

// usedEvery is how coarsely a token's last use is recorded, in microseconds.
const usedEvery = int64(time.Minute / time.Microsecond)

// InsertToken keeps a token, for a time to live or for ever (0). One of that
// name wraps ErrDuplicate.
func (s *Store) InsertToken(ctx context.Context, name, hash, role string, ttl time.Duration) (*Token, error) {
	t := &Token{ID: newID(), Name: name, Hash: hash, Role: role}
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		t.CreatedAt = now
		if ttl > 0 {
			t.ExpiresAt = now + micros(ttl)
		}
		ok, err := changed(tx.NewInsert().Model(t).On("CONFLICT DO NOTHING").Exec(ctx))
		if err == nil && !ok {
			err = fmt.Errorf("%w: token %s", ErrDuplicate, name)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return t, nil
}

// UseToken gives the token with that hash and notes its use, at most once a
// minute. An unknown or expired one wraps ErrNotFound.
func (s *Store) UseToken(ctx context.Context, hash string) (*Token, error) {
	now, err := s.Now(ctx)
	if err != nil {
		return nil, err
	}
	t := &Token{}
	err = s.db.NewSelect().Model(t).Where("hash = ?", hash).Where("expires_at = 0 OR expires_at > ?", now).Scan(ctx)
	if err != nil {
		return nil, found(err, "token", "")
	}
	if t.UsedAt > now-usedEvery {
		return t, nil
	}
	_, err = s.db.NewUpdate().Model((*Token)(nil)).Set("used_at = ?", now).
		Where("id = ?", t.ID).Where("used_at <= ?", now-usedEvery).Exec(ctx)
	return t, err
}

// Tokens lists tokens by name, expired ones too.
func (s *Store) Tokens(ctx context.Context) ([]*Token, error) {
	var out []*Token
	err := s.db.NewSelect().Model(&out).OrderBy("name", bun.OrderAsc).Scan(ctx)
	return out, err
}

// DeleteToken forgets a token by id or name.
func (s *Store) DeleteToken(ctx context.Context, idOrName string) error {
	ok, err := changed(s.db.NewDelete().Model((*Token)(nil)).Where("id = ? OR name = ?", idOrName, idOrName).Exec(ctx))
	if err == nil && !ok {
		err = fmt.Errorf("%w: token %s", ErrNotFound, idOrName)
	}
	return err
}
