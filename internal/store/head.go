package store

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/uptrace/bun"
)

// Watched is a repository whose heads are looked at.
type Watched struct {
	bun.BaseModel `bun:"table:watched,alias:watched"`

	Forge     string          `bun:",pk"`
	Name      string          `bun:",pk"` // full
	Repo      json.RawMessage // forge.Repo
	RepoID    string          // the forge's own; empty: not known
	WantedAt  int64           // the last reason to look at it, about
	HeadsAt   int64           // the first look at branches and tags, which starts nothing; 0: it is yet to come
	PullsAt   int64           // the same of pull requests
	PullsFrom int             // those up to this number may have been open then without having been seen
	NextAt    int64           // the next look; 0: none, it has another name by now
}

// Head is a branch, a tag or a pull request, and where it is.
//
// A webhook moves it to what it says, a look to what the forge says, which is right:
// what it finds moved has missed its webhook, unless that is still on its way (so
// that it is found at the second look only), or came in another order than the
// pushes. For that is told: a commit that webhooks named since the last look that
// agreed, or that was the head when a webhook moved another one, has its runs, and the
// head is put there without a word. So a branch that goes from A to B and back to A
// without a second webhook stays unnoticed when all of it, with both webhooks before,
// was between two looks; A has its runs.
//
// found is the other side: of what was found by looking the webhook may come after
// all, and is a duplicate.
type Head struct {
	bun.BaseModel `bun:"table:heads,alias:head"`

	Forge     string    `bun:",pk"`
	Repo      string    `bun:",pk"`
	Ref       string    `bun:",pk"` // full; of a pull request see PullRef
	Commit    string    // empty: it is not there, as far as known
	Told      []string  // commits
	Found     []Finding // at most as old as a webhook may be
	Other     string    // what the last look saw instead of Commit, empty: nothing
	OtherAt   int64     // when it was first seen; 0: the last look agreed
	ChangedAt int64     // when it last came to Commit otherwise than by a first look
	Version   int64
}

// Finding is a commit that was found without a webhook.
type Finding struct {
	Commit   string `json:"commit"`
	Delivery string `json:"delivery"` // ID
	At       int64  `json:"at"`
	Late     string `json:"late,omitempty"` // the body's sum of the webhook that came after all
}

// mostTold and mostFound bound what a head remembers; more between two looks, or
// within a day, is nobody's push.
const mostTold, mostFound = 32, 32

// PullRef is the Ref of a pull request's Head, whatever the forge calls it.
func PullRef(number int) string { return fmt.Sprintf("%s%d/head", pulls, number) }

const pulls = "refs/pull/"

// Told is what a webhook says of a head.
type Told struct {
	Repo   json.RawMessage // forge.Repo
	Name   string          // full
	RepoID string
	Ref    string
	Commit string // empty: it is gone
	Before string // where it was; empty or zeros only: unknown, or it was not there
}

// told moves a head, and reports the delivery by which that was found already.
func told(ctx context.Context, tx bun.Tx, now int64, d *Delivery, within time.Duration, t Told) (as string, err error) {
	w := &Watched{Forge: d.Forge, Name: t.Name, Repo: t.Repo, RepoID: t.RepoID}
	if err := watch(ctx, tx, now, w); err != nil {
		return "", err
	}
	h := &Head{Forge: d.Forge, Repo: t.Name, Ref: t.Ref}
	err = lockRow(tx, tx.NewSelect().Model(h).WherePK()).Scan(ctx)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return "", err
	}
	is := *h
	if as = h.hear(t, d.BodySum, now, now-micros(within)); as == "" {
		h.ChangedAt = now
	}
	_, err = save(ctx, tx, &is, h)
	return as, err
}

// hear changes the head as a webhook says.
func (h *Head) hear(t Told, sum string, now, since int64) (as string) {
	before := strings.Trim(t.Before, "0")
	h.forget(since)
	for i := range h.Found {
		f := &h.Found[i]
		again := before != "" && before == h.Commit && before != t.Commit // it moves what is there
		if f.Commit == t.Commit && (f.Late == sum || f.Late == "" && !again) {
			f.Late = sum
			return f.Delivery
		}
	}
	h.Other, h.OtherAt = "", 0
	if t.Commit == "" {
		h.Commit, h.Told = "", nil
		return ""
	}
	if h.Commit != "" && h.Commit != before {
		h.tell(h.Commit)
	}
	h.tell(t.Commit)
	h.Commit = t.Commit
	return ""
}

func (h *Head) tell(commit string) {
	h.Told = slices.DeleteFunc(slices.Clone(h.Told), func(c string) bool { return c == commit })
	h.Told = append(h.Told, commit)
	h.Told = h.Told[max(0, len(h.Told)-mostTold):]
}

// forget drops findings whose webhooks do not come any more.
func (h *Head) forget(since int64) {
	h.Found = slices.DeleteFunc(slices.Clone(h.Found), func(f Finding) bool { return f.At <= since })
}

// see changes the head as a look says that began then; empty: it is not there. It
// reports whether the look is to be repeated, and whether the webhook was missed.
func (h *Head) see(commit string, began, since int64, grace time.Duration) (again, missed bool) {
	if h.ChangedAt >= began { // a webhook came while the forge was asked
		return false, false
	}
	// Of a tag a webhook may name the tag's object, where looks see its commit.
	tag := commit != "" && len(h.Told) > 0 && strings.HasPrefix(h.Ref, "refs/tags/")
	gone := commit == "" && h.OtherAt > 0 && h.Other == "" && began-h.OtherAt >= micros(grace)
	switch {
	case commit == h.Commit, gone, tag, slices.Contains(h.Told, commit):
		h.Commit, h.Told, h.Other, h.OtherAt = commit, nil, "", 0
		h.forget(since)
	case h.OtherAt == 0, h.Other != commit:
		h.Other, h.OtherAt = commit, began
		return true, false
	case began-h.OtherAt >= micros(grace):
		return true, true
	default:
		return true, false
	}
	return false, false
}

// idle reports whether there is nothing to know about the head.
func (h *Head) idle() bool { return h.Commit == "" && h.OtherAt == 0 && len(h.Found) == 0 }

func (h *Head) equal(o *Head) bool {
	return h.Commit == o.Commit && h.Other == o.Other && h.OtherAt == o.OtherAt && h.ChangedAt == o.ChangedAt &&
		slices.Equal(h.Told, o.Told) && slices.Equal(h.Found, o.Found)
}

// save writes what became of a head, unless somebody else was first.
func save(ctx context.Context, tx bun.Tx, was, h *Head) (bool, error) {
	var res sql.Result
	var err error
	switch {
	case was.Version == 0 && h.idle():
		return true, nil
	case h.idle():
		res, err = tx.NewDelete().Model(h).WherePK().Where("version = ?", was.Version).Exec(ctx)
	case was.Version == 0:
		h.Version = 1
		res, err = tx.NewInsert().Model(h).Exec(ctx)
	default:
		h.Version = was.Version + 1
		res, err = tx.NewUpdate().Model(h).WherePK().Where("version = ?", was.Version).Exec(ctx)
	}
	return changed(res, err)
}

// wantedEvery is how exact WantedAt is: not every webhook writes it.
const wantedEvery = time.Hour

// watch has a repository looked at. One of the same ID, or a name without an ID that
// differs in upper and lower case alone, is the same under another name, which is
// looked at no more: what happens to it comes once.
func watch(ctx context.Context, tx bun.Tx, now int64, w *Watched) error {
	is := new(Watched)
	err := tx.NewSelect().Model(is).Where("forge = ? AND name = ?", w.Forge, w.Name).Scan(ctx)
	switch {
	case errors.Is(err, sql.ErrNoRows):
	case err != nil:
		return err
	case is.NextAt > 0 && is.WantedAt > now-micros(wantedEvery) && is.RepoID == w.RepoID && string(is.Repo) == string(w.Repo):
		return nil
	case is.NextAt == 0: // it has its old name back
		if _, err := tx.NewDelete().Model(is).WherePK().Exec(ctx); err != nil {
			return err
		}
	}
	w.WantedAt, w.NextAt = now, now
	_, err = tx.NewInsert().Model(w).On("CONFLICT (forge, name) DO UPDATE").
		Set("repo = excluded.repo, repo_id = excluded.repo_id, wanted_at = excluded.wanted_at").Exec(ctx)
	if err != nil {
		return err
	}
	_, err = tx.NewUpdate().Model((*Watched)(nil)).Set("next_at = 0").
		Where("forge = ? AND name <> ? AND next_at > 0", w.Forge, w.Name).
		Where("repo_id = ? AND repo_id <> '' OR repo_id = '' AND lower(name) = ?", w.RepoID, strings.ToLower(w.Name)).Exec(ctx)
	return err
}

// WatchNamed has repositories looked at that no webhook spoke of, by their names.
func (s *Store) WatchNamed(ctx context.Context, all []Watched) error {
	for _, w := range all {
		err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
			res, err := tx.NewUpdate().Model((*Watched)(nil)).Set("wanted_at = ?", now).
				Where("forge = ? AND lower(name) = ?", w.Forge, strings.ToLower(w.Name)).Exec(ctx)
			if there, err := changed(res, err); there || err != nil {
				return err
			}
			w.WantedAt, w.NextAt = now, now
			_, err = tx.NewInsert().Model(&w).On("CONFLICT DO NOTHING").Exec(ctx)
			return err
		})
		if err != nil {
			return fmt.Errorf("store: watch %s: %w", w.Name, err)
		}
	}
	return nil
}

// Unwatch forgets a repository and its heads.
func (s *Store) Unwatch(ctx context.Context, w *Watched) error {
	_, err := s.db.NewDelete().Model(w).WherePK().Exec(ctx)
	if err != nil {
		return fmt.Errorf("store: unwatch %s: %w", w.Name, err)
	}
	return nil
}

// Look is one look at a repository, of whoever claimed it.
type Look struct {
	Watched
	Began int64
	Of    int // how many repositories of the forge are looked at
}

// ClaimLook gives the repository of a forge whose look is due for longest, whose next
// look is that much later; nil: none is due.
func (s *Store) ClaimLook(ctx context.Context, forge string, every time.Duration) (*Look, error) {
	var l *Look
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		l = nil
		var due []Watched
		q := tx.NewSelect().Model(&due).Where("forge = ? AND next_at > 0 AND next_at <= ?", forge, now).OrderBy("next_at", bun.OrderAsc).Limit(1)
		if err := lockRow(tx, q).Scan(ctx); err != nil || len(due) == 0 {
			return err
		}
		l = &Look{Watched: due[0], Began: now}
		l.NextAt = now + max(1, micros(every))
		if _, err := tx.NewUpdate().Model(&l.Watched).Column("next_at").WherePK().Exec(ctx); err != nil {
			return err
		}
		return tx.NewSelect().Model((*Watched)(nil)).ColumnExpr("count(*)").Where("forge = ? AND next_at > 0", forge).Scan(ctx, &l.Of)
	})
	if err != nil {
		return nil, fmt.Errorf("store: claim a look: %w", err)
	}
	return l, nil
}

// LookWithin has no look at a forge's repositories be further away than every: what put
// it off was another configuration.
func (s *Store) LookWithin(ctx context.Context, forge string, every time.Duration) error {
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		_, err := tx.NewUpdate().Model((*Watched)(nil)).Set("next_at = ?", now+micros(every)).
			Where("forge = ? AND next_at > ?", forge, now+micros(every)).Exec(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("store: next looks: %w", err)
	}
	return nil
}

// LookAgain ends a look whose next one comes so long after its beginning.
func (s *Store) LookAgain(ctx context.Context, l *Look, after time.Duration) error {
	_, err := s.db.NewUpdate().Model((*Watched)(nil)).Set("next_at = ?", l.Began+max(1, micros(after))).
		Where("forge = ? AND name = ? AND next_at = ?", l.Forge, l.Name, l.NextAt).Exec(ctx) // nobody else looks at it meanwhile
	if err != nil {
		return fmt.Errorf("store: next look: %w", err)
	}
	return nil
}

// Sight is what a look saw.
type Sight struct {
	Pulls bool              // pull requests, by PullRef; otherwise branches and tags
	Heads map[string]string // commits by Ref
	// Partial: what is not in it may be there all the same.
	Partial bool
	Grace   time.Duration // that a webhook has
	Within  time.Duration // how late one may be
}

// Seen compares what a look saw with what is known, writes down what differs, and
// gives the heads that moved without a webhook, with where they are in Other; again:
// the look is to be repeated after the grace. The first look takes what is new to it
// as it is.
func (s *Store) Seen(ctx context.Context, l *Look, v Sight) (missed []*Head, again bool, err error) {
	now, err := s.Now(ctx)
	if err != nil {
		return nil, false, err
	}
	since := now - micros(v.Within)
	known, err := s.headsOf(ctx, l, v.Pulls)
	if err != nil {
		return nil, false, err
	}
	refs := maps.Clone(v.Heads)
	if !v.Partial {
		for ref := range known {
			refs[ref] = v.Heads[ref]
		}
	}
	first := l.HeadsAt == 0
	if v.Pulls {
		first = l.PullsAt == 0
	}
	var was, is []*Head
	for _, ref := range slices.Sorted(maps.Keys(refs)) {
		h, ok := known[ref]
		switch {
		case ok:
		case first, v.Pulls && numberOf(ref) <= l.PullsFrom:
			h = &Head{Forge: l.Forge, Repo: l.Name, Ref: ref, Commit: refs[ref]}
			was, is = append(was, &Head{}), append(is, h)
			continue
		default:
			h = &Head{Forge: l.Forge, Repo: l.Name, Ref: ref}
		}
		before := *h
		more, found := h.see(refs[ref], l.Began, since, v.Grace)
		again = again || more
		if found {
			missed = append(missed, h)
		} else {
			was, is = append(was, &before), append(is, h)
		}
	}
	if err := s.saveHeads(ctx, was, is); err != nil {
		return nil, false, fmt.Errorf("store: heads of %s: %w", l.Name, err)
	}
	if first {
		err = s.lookedFirst(ctx, l, v)
	}
	return missed, again, err
}

// headsOf are the pull requests, or the branches and tags, of a repository.
func (s *Store) headsOf(ctx context.Context, l *Look, ofPulls bool) (map[string]*Head, error) {
	const pull = "ref >= 'refs/pull/' AND ref < 'refs/pull0'"
	q := "NOT (" + pull + ")"
	if ofPulls {
		q = pull
	}
	var rows []*Head
	if err := s.db.NewSelect().Model(&rows).Where("forge = ? AND repo = ?", l.Forge, l.Name).Where(q).Scan(ctx); err != nil {
		return nil, fmt.Errorf("store: heads of %s: %w", l.Name, err)
	}
	out := make(map[string]*Head, len(rows))
	for _, h := range rows {
		out[h.Ref] = h
	}
	return out, nil
}

// saveHeads writes what became of heads, but for those that somebody else wrote
// meanwhile, in transactions that hold up nobody for long.
func (s *Store) saveHeads(ctx context.Context, was, is []*Head) error {
	var fresh []*Head
	var old [][2]*Head
	for i, h := range is {
		switch {
		case was[i].Version > 0:
			if !was[i].equal(h) || h.idle() {
				old = append(old, [2]*Head{was[i], h})
			}
		case !h.idle():
			h.Version = 1
			fresh = append(fresh, h)
		}
	}
	const batch = 500
	for some := range slices.Chunk(fresh, batch) {
		err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, _ int64) error {
			_, err := tx.NewInsert().Model(&some).On("CONFLICT DO NOTHING").Exec(ctx)
			return err
		})
		if err != nil {
			return err
		}
	}
	for some := range slices.Chunk(old, batch) {
		err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, _ int64) error {
			for _, h := range some {
				if _, err := save(ctx, tx, h[0], h[1]); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// lookedFirst ends the first look.
func (s *Store) lookedFirst(ctx context.Context, l *Look, v Sight) error {
	q := s.db.NewUpdate().Model((*Watched)(nil)).Where("forge = ? AND name = ?", l.Forge, l.Name)
	if v.Pulls {
		highest := 0
		for ref := range v.Heads {
			highest = max(highest, numberOf(ref))
		}
		if !v.Partial { // all others are new
			highest = 0
		}
		q = q.Set("pulls_at = ?, pulls_from = ?", l.Began, highest)
	} else {
		q = q.Set("heads_at = ?", l.Began)
	}
	if _, err := q.Exec(ctx); err != nil {
		return fmt.Errorf("store: first look at %s: %w", l.Name, err)
	}
	return nil
}

// numberOf a pull request by its PullRef; 0: it is none.
func numberOf(ref string) int {
	n, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(ref, pulls), "/head"))
	return n
}

// Missed writes the delivery of a head that Seen gave, and the messages that it
// causes. ErrStale: its webhook came, or somebody else found it.
func (s *Store) Missed(ctx context.Context, h *Head, within time.Duration, d *Delivery, msgs []OutboxMessage) error {
	err := s.inTx(ctx, func(ctx context.Context, tx bun.Tx, now int64) error {
		is := *h
		is.forget(now - micros(within))
		is.Found = append(is.Found, Finding{Commit: h.Other, Delivery: d.ID, At: now})
		is.Found = is.Found[max(0, len(is.Found)-mostFound):]
		is.Commit, is.Told, is.Other, is.OtherAt, is.ChangedAt = h.Other, nil, "", 0, now
		if mine, err := save(ctx, tx, h, &is); err != nil || !mine {
			return cmp.Or(err, ErrStale)
		}
		d.ReceivedAt = now
		if err := insertDelivery(ctx, tx, now, d, msgs); err != nil {
			return err
		}
		_, err := tx.NewUpdate().Model((*Watched)(nil)).Set("wanted_at = ?", now).Where("forge = ? AND name = ?", h.Forge, h.Repo).Exec(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("store: missed head: %w", err)
	}
	return nil
}

// deleteWatched forgets at most limit repositories that nobody wanted looked at since
// before, with their heads.
func (s *Store) deleteWatched(ctx context.Context, before int64, limit int) (n int64, err error) {
	var old []*Watched
	if err := s.db.NewSelect().Model(&old).Where("wanted_at <= ?", before).Limit(int64(limit)).Scan(ctx); err != nil {
		return 0, err
	}
	for _, w := range old { // one by one, for each may have many heads
		did, err := changed(s.db.NewDelete().Model(w).WherePK().Where("wanted_at <= ?", before).Exec(ctx))
		if err != nil {
			return n, err
		}
		if did {
			n++
		}
	}
	return n, nil
}
