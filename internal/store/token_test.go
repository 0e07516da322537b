package store_test

import (
	"errors"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/store"
)

func TestTokens(t *testing.T) {
	both(t, func(t *testing.T, r *rig) {
		ctx := t.Context()
		a, err := r.InsertToken(ctx, "a", "hash-a", "read", 0)
		must(t, err)
		_, err = r.InsertToken(ctx, "b", "hash-b", "admin", time.Hour)
		must(t, err)
		if _, err := r.InsertToken(ctx, "a", "hash-c", "read", 0); !errors.Is(err, store.ErrDuplicate) {
			t.Errorf("a second token of that name: %v, want ErrDuplicate", err)
		}

		used := func() int64 {
			t.Helper()
			got, err := r.UseToken(ctx, "hash-a")
			must(t, err)
			if got.ID != a.ID || got.Role != "read" {
				t.Fatalf("token %+v, want %+v", got, a)
			}
			list, err := r.Tokens(ctx)
			must(t, err)
			return list[0].UsedAt
		}
		first := used()
		if first == 0 {
			t.Error("the first use was not noted")
		}
		r.offset.Add(int64(30 * time.Second))
		if again := used(); again != first {
			t.Errorf("noted again after half a minute: %d, then %d", first, again)
		}
		r.offset.Add(int64(31 * time.Second))
		if later := used(); later <= first {
			t.Errorf("not noted again after a minute: %d, then %d", first, later)
		}

		r.offset.Add(int64(time.Hour))
		for _, hash := range []string{"hash-b", "hash-c"} {
			if _, err := r.UseToken(ctx, hash); !errors.Is(err, store.ErrNotFound) {
				t.Errorf("%s, expired or unknown: %v, want ErrNotFound", hash, err)
			}
		}
		must(t, r.DeleteToken(ctx, "b"))
		must(t, r.DeleteToken(ctx, a.ID))
		if err := r.DeleteToken(ctx, "a"); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("deleted twice: %v, want ErrNotFound", err)
		}
		if _, err := r.UseToken(ctx, "hash-a"); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("deleted, then used: %v, want ErrNotFound", err)
		}
	})
}
