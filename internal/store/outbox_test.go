package store_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/uptrace/bun"

	"github.com/solstice-ci/solstice-go/internal/store"
	"github.com/solstice-ci/solstice-go/internal/testenv"
)

// outboxRig's runs cause the messages named in their reason: "key:body", with
// a star after the key where they coalesce.
func outboxRig(t *testing.T, url string) *rig {
	return newRig(t, url, func(run *store.Run, _, _ []*store.Job) []store.OutboxMessage {
		var out []store.OutboxMessage
		for f := range strings.FieldsSeq(run.Reason) {
			key, body, _ := strings.Cut(f, ":")
			plain, star := strings.CutSuffix(key, "*")
			out = append(out, store.OutboxMessage{Key: plain, Topic: "t", Body: []byte(body), Coalesce: star})
		}
		return out
	})
}

func (r *rig) put(messages string) {
	r.t.Helper()
	must(r.t, r.InsertRun(r.t.Context(), &store.Run{ID: r.id("run"), State: store.RunQueued, Reason: messages}, nil))
}

func (r *rig) take(owner string, limit int) ([]int64, string) {
	r.t.Helper()
	msgs, err := r.OutboxClaim(r.t.Context(), owner, limit, time.Minute)
	must(r.t, err)
	var ids []int64
	var out []string
	for _, m := range msgs {
		ids = append(ids, m.ID)
		out = append(out, m.Key+":"+string(m.Body))
	}
	return ids, strings.Join(out, " ")
}

func TestOutbox(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		r := outboxRig(t, url)
		ctx := t.Context()
		r.put("a:1 b:1 a:2 c*:1")
		r.put("c*:2 a:3 c*:3")
		first, got := r.take("o1", 2)
		eq(t, "oldest", got, "a:1 b:1")
		_, got = r.take("o2", 10)
		eq(t, "other keys, the newest where they coalesce", got, "c:3")
		_, got = r.take("o3", 10)
		eq(t, "nothing is left", got, "")
		must(t, r.OutboxDone(ctx, first...))
		must(t, r.OutboxDone(ctx))
		_, got = r.take("o3", 10)
		eq(t, "the rest of a key", got, "a:2 a:3")
		must(t, r.OutboxRelease(ctx, "o3"))
		_, got = r.take("o4", 10)
		eq(t, "given back", got, "a:2 a:3")
		r.put("c*:4")
		_, got = r.take("o4", 10)
		eq(t, "a claimed key", got, "")
		r.pass(2 * time.Minute)
		_, got = r.take("o5", 10)
		eq(t, "leases run out", got, "a:2 a:3 c:4")
	})
}

// before runs a function once, before the first statement that fits.
type before struct {
	fits func(statement string) bool
	run  func()
	once sync.Once
}

func (b *before) BeforeQuery(ctx context.Context, e *bun.QueryEvent) context.Context {
	if b.fits(e.Query) {
		b.once.Do(b.run)
	}
	return ctx
}

func (*before) AfterQuery(context.Context, *bun.QueryEvent) {}

// What commits while older messages of its key are taken is neither deleted
// nor forgotten. Only PostgreSQL has two writers at once.
func TestOutboxKeepsWhatComesMeanwhile(t *testing.T) {
	r := outboxRig(t, testenv.Postgres(t))
	r.put("c*:1 c*:2")
	b := &before{
		fits: func(s string) bool { return strings.HasPrefix(s, "DELETE") },
		run:  func() { r.put("c*:3") },
	}
	s, err := store.New(t.Context(), r.db.WithQueryHook(b), store.Options{})
	must(t, err)
	first, err := s.OutboxClaim(t.Context(), "o1", 10, time.Minute)
	must(t, err)
	if len(first) != 1 || string(first[0].Body) != "2" {
		t.Fatalf("claimed %v, want the newest that was read", first)
	}
	must(t, r.OutboxDone(t.Context(), first[0].ID))
	_, got := r.take("o1", 10)
	eq(t, "what came meanwhile", got, "c:3")
}

func TestOutboxKeepsOrderPerKey(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		r := outboxRig(t, url)
		const keys, each = 3, 8
		for i := range each {
			var ms []string
			for k := range keys {
				ms = append(ms, fmt.Sprintf("k%d:%d", k, i))
			}
			r.put(strings.Join(ms, " "))
		}
		var mu sync.Mutex
		sent := map[string]string{}
		var wg sync.WaitGroup
		for i := range 4 {
			owner := fmt.Sprint("o", i)
			wg.Go(func() {
				for range 50 {
					msgs, err := r.OutboxClaim(t.Context(), owner, 4, time.Hour)
					if err != nil {
						t.Error(err)
						return
					}
					var ids []int64
					mu.Lock()
					for _, m := range msgs {
						sent[m.Key] += string(m.Body)
						ids = append(ids, m.ID)
					}
					mu.Unlock()
					if err := r.OutboxDone(t.Context(), ids...); err != nil {
						t.Error(err)
					}
					mu.Lock()
					all := len(sent["k0"])+len(sent["k1"])+len(sent["k2"]) >= keys*each
					mu.Unlock()
					if all {
						return
					}
				}
			})
		}
		wg.Wait()
		for k := range keys {
			eq(t, fmt.Sprint("order of key ", k), sent[fmt.Sprint("k", k)], "01234567")
		}
	})
}

// TestOutboxKeepsTheNewest: what comes while older messages of its key are
// superseded is not superseded with them.
func TestOutboxKeepsTheNewest(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		r := outboxRig(t, url)
		for round := range 150 {
			var writer sync.WaitGroup
			var written atomic.Bool
			last := ""
			writer.Go(func() {
				for i := range 6 {
					last = fmt.Sprintf("%d-%d", round, i)
					if err := r.InsertRun(t.Context(), &store.Run{ID: "r" + last, State: store.RunQueued, Reason: "c*:" + last}, nil); err != nil {
						t.Error(err)
					}
				}
				written.Store(true)
			})
			sent := ""
			for {
				over := written.Load()
				msgs, err := r.OutboxClaim(t.Context(), "o", 10, time.Hour)
				must(t, err)
				var ids []int64
				for _, m := range msgs {
					ids, sent = append(ids, m.ID), string(m.Body)
				}
				must(t, r.OutboxDone(t.Context(), ids...))
				if over && len(msgs) == 0 {
					break
				}
			}
			writer.Wait()
			eq(t, "sent last", sent, last)
		}
	})
}
