package store

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
)

// Secret gives the 32 random bytes that every process on this database has under a name,
// made when they are asked for first.
func (s *Store) Secret(ctx context.Context, name string) ([]byte, error) {
	fresh := make([]byte, 32)
	_, _ = rand.Read(fresh) // does not fail
	var value string
	_, err := s.db.NewRaw("INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO NOTHING", "secret/"+name, hex.EncodeToString(fresh)).Exec(ctx)
	if err == nil {
		err = s.db.NewRaw("SELECT value FROM meta WHERE key = ?", "secret/"+name).Scan(ctx, &value)
	}
	if err != nil {
		return nil, fmt.Errorf("store: secret %s: %w", name, err)
	}
	return hex.DecodeString(value)
}
