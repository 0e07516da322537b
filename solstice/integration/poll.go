package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/google/uuid"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/store"
)

// Bounds of looking for heads.
const (
	maxHeads    = 10_000           // branches and tags of a repository that is looked at
	maxPulls    = 200              // pull requests, those that changed last
	maxFound    = 32               // webhooks missed that one look makes up for; the rest waits for the next
	lookTimeout = 2 * time.Minute  // for a forge's answers
	pauseAtMost = 10 * time.Second // between two looks at a forge, when both are due
	lookGrace   = time.Minute      // that a webhook has; less with Poll below it
	notThere    = 24 * time.Hour   // until what cannot be looked at is tried again
	askAgain    = time.Hour        // most that a forge may have us wait
	namedEvery  = time.Hour        // how often the names of Allow are looked through
)

// poller looks for heads of a forge whose webhooks never came: of the repositories
// that sent a webhook, and those that Allow names, each once in every, one at a time.
// Several on one database share them.
type poller struct {
	*Integration
	name  string
	forge Instance
	heads forge.HeadLister
	pulls forge.PullRequestLister // nil: it has none
	every time.Duration
	named time.Time // when the names of Allow were last looked through
}

// poll starts those that are wanted.
func (in *Integration) poll(ctx context.Context, wg *sync.WaitGroup) {
	for name, f := range in.cfg.Forges {
		p := &poller{Integration: in, name: name, forge: f, every: f.Poll}
		if p.every == 0 {
			p.every = in.cfg.Poll
		}
		var ok bool
		if p.heads, ok = forge.As[forge.HeadLister](f.Forge); !ok || p.every < 0 {
			continue
		}
		p.pulls, _ = forge.As[forge.PullRequestLister](f.Forge)
		wg.Go(func() { p.run(ctx) })
	}
}

func (p *poller) run(ctx context.Context) {
	retry := backoff.NewExponentialBackOff()
	retry.InitialInterval, retry.MaxInterval = min(time.Second, p.every), p.every
	for ctx.Err() == nil {
		pause, err := p.next(ctx)
		var later *forge.RetryError
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			retry.Reset()
		case errors.As(err, &later):
			pause = max(pause, min(later.After, askAgain))
		default:
			pause = max(pause, retry.NextBackOff())
		}
		if err != nil {
			p.log.WarnContext(ctx, "cannot look for missed webhooks", "forge", p.name, "error", err, "again_in", pause)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// next has one look, if one is due, and says for how long to rest.
func (p *poller) next(ctx context.Context) (pause time.Duration, err error) {
	if err := p.watchNamed(ctx); err != nil {
		return 0, err
	}
	l, err := p.store.ClaimLook(ctx, p.name, max(p.every, time.Millisecond))
	if err != nil {
		return 0, err
	}
	if l == nil {
		return min(p.every/10, pauseAtMost), nil
	}
	// After a long rest all are due: they get half of the time.
	pause = min(p.every/time.Duration(2*max(l.Of, 1)), pauseAtMost)
	var repo forge.Repo
	if err := json.Unmarshal(l.Repo, &repo); err != nil {
		return pause, fmt.Errorf("integration: watched %s: %w", l.Name, err)
	}
	if !p.forge.allows(repo) {
		return pause, p.store.Unwatch(ctx, &l.Watched)
	}
	again, err := p.look(ctx, l, repo)
	switch {
	case errors.Is(err, forge.ErrUnavailable), ctx.Err() != nil:
		return pause, err
	case errors.Is(err, forge.ErrNotFound), errors.Is(err, forge.ErrPermission), errors.Is(err, forge.ErrInvalid), errors.Is(err, forge.ErrTooLarge), errors.Is(err, errors.ErrUnsupported):
		p.log.WarnContext(ctx, "missed webhooks of a repository are not looked for", "forge", p.name, "repo", l.Name, "why", err, "again_in", notThere)
		return pause, p.store.LookAgain(ctx, l, notThere)
	case err != nil:
		return pause, err
	case again:
		return pause, p.store.LookAgain(ctx, l, min(p.every, p.grace()))
	}
	return pause, nil
}

// grace is what a webhook has before it counts as missed.
func (p *poller) grace() time.Duration { return min(p.every, lookGrace) }

// watchNamed has those repositories looked at that Allow names.
func (p *poller) watchNamed(ctx context.Context) error {
	switch {
	case p.named.IsZero(): // another program may have put it off, or a refusal that is no more
		if err := p.store.LookWithin(ctx, p.name, p.every); err != nil {
			return err
		}
	case time.Since(p.named) < namedEvery:
		return nil
	}
	var all []store.Watched
	for _, a := range p.forge.Allow {
		i := strings.LastIndex(a, "/")
		if i < 0 {
			continue
		}
		repo := forge.Repo{Owner: a[:i], Name: a[i+1:]}
		b, err := json.Marshal(repo)
		if err != nil {
			return err
		}
		all = append(all, store.Watched{Forge: p.name, Name: repo.FullName(), Repo: b})
	}
	if err := p.store.WatchNamed(ctx, all); err != nil {
		return err
	}
	p.named = time.Now()
	return nil
}

// look compares a repository with what is known of it.
func (p *poller) look(ctx context.Context, l *store.Look, repo forge.Repo) (again bool, err error) {
	ctx, span := p.tracer.Start(ctx, "look for missed webhooks", trace.WithNewRoot(), trace.WithAttributes(attribute.String("forge", p.name)))
	defer span.End()
	asking, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	heads, err := p.heads.Heads(asking, repo)
	if err != nil {
		return false, err
	}
	maps.DeleteFunc(heads, func(ref, commit string) bool {
		return !forge.IsRef(ref) || !forge.IsCommit(commit) || !strings.HasPrefix(ref, "refs/heads/") && !strings.HasPrefix(ref, "refs/tags/")
	})
	if len(heads) > maxHeads {
		return false, fmt.Errorf("%w: %d branches and tags, more than %d", forge.ErrTooLarge, len(heads), maxHeads)
	}
	again, err = p.compare(ctx, l, store.Sight{Heads: heads}, func(h *store.Head) forge.Event {
		ev := forge.Event{Kind: forge.KindPush, Repo: repo, Ref: h.Ref, Commit: h.Other, Before: h.Commit}
		if strings.HasPrefix(h.Ref, "refs/tags/") {
			ev.Kind = forge.KindTag
		}
		if ev.Before == "" {
			ev.Before = strings.Repeat("0", len(ev.Commit))
		}
		return ev
	})
	if err != nil || p.pulls == nil {
		return again, err
	}

	open, err := p.pulls.PullRequests(asking, repo, maxPulls)
	if errors.Is(err, errors.ErrUnsupported) {
		return again, nil
	}
	if err != nil {
		return false, err
	}
	events := map[string]forge.Event{}
	heads = map[string]string{}
	for _, pr := range open[:min(len(open), maxPulls)] {
		ev := forge.Event{
			Kind: forge.KindPullRequest, Action: "synchronized", Repo: repo, Ref: store.PullRef(pr.Number), Commit: pr.HeadCommit,
			Sender: pr.Author, Title: pr.Title, PullRequest: &pr,
		}
		if at, ok := strings.CutSuffix(pr.MergeRef, "/merge"); ok { // GitLab has other names
			ev.Ref = at + "/head"
		}
		if ev.Validate() == nil {
			heads[store.PullRef(pr.Number)], events[store.PullRef(pr.Number)] = pr.HeadCommit, ev
		}
	}
	more, err := p.compare(ctx, l, store.Sight{Pulls: true, Heads: heads, Partial: len(open) >= maxPulls}, func(h *store.Head) forge.Event {
		ev := events[h.Ref]
		if h.Commit == "" {
			ev.Action = "opened"
		}
		return ev
	})
	return again || more, err
}

// compare makes up for webhooks that were missed.
func (p *poller) compare(ctx context.Context, l *store.Look, v store.Sight, event func(*store.Head) forge.Event) (again bool, err error) {
	v.Grace, v.Within = p.grace(), p.cfg.DuplicateBody
	missed, again, err := p.store.Seen(ctx, l, v)
	if err != nil {
		return false, err
	}
	for _, h := range missed[:min(len(missed), maxFound)] {
		if err := p.found(ctx, h, event(h)); err != nil {
			return false, err
		}
	}
	return again, nil
}

// found writes the delivery of a webhook that never came.
func (p *poller) found(ctx context.Context, h *store.Head, ev forge.Event) error {
	d := &store.Delivery{
		ID: uuid.Must(uuid.NewV7()).String(), Forge: p.name, Kind: string(ev.Kind), Repo: ev.Repo.FullName(),
		State: store.DeliveryAccepted, Reason: "found by looking: its webhook did not come",
	}
	ev.Delivery = "poll/" + d.ID
	d.Delivery = ev.Delivery
	var err error
	if d.Event, err = json.Marshal(ev); err != nil {
		return err
	}
	msgs, err := request(ctx, p.name, ev, "")
	if err != nil {
		return err
	}
	err = p.store.Missed(ctx, h, p.cfg.DuplicateBody, d, msgs)
	if errors.Is(err, store.ErrStale) { // it came, or another integration found it
		return nil
	}
	if err != nil {
		return err
	}
	p.kicked()
	p.webhooks.Add(ctx, 1, metric.WithAttributes(attribute.String("forge", p.name), attribute.String("outcome", "missed")))
	p.log.WarnContext(ctx, "found by looking: its webhook did not come", "forge", p.name, "repo", d.Repo, "ref", ev.Ref, "commit", ev.Commit, "delivery", d.ID)
	return nil
}

// toldOf is what an accepted event says of a head that is looked at; nil: nothing.
func toldOf(f Instance, ev forge.Event) (*store.Told, error) {
	t := &store.Told{Name: ev.Repo.FullName(), RepoID: ev.Repo.ID, Ref: ev.Ref, Commit: ev.Commit, Before: ev.Before}
	_, looked := forge.As[forge.HeadLister](f.Forge)
	switch {
	case ev.Kind == forge.KindPush, ev.Kind == forge.KindTag:
	case ev.Kind == forge.KindPullRequest && ev.PullRequest != nil:
		_, ok := forge.As[forge.PullRequestLister](f.Forge)
		looked = looked && ok
		t.Ref = store.PullRef(ev.PullRequest.Number)
		if ev.Action == "closed" {
			t.Commit = ""
		}
	default:
		looked = false
	}
	if !looked {
		return nil, nil
	}
	var err error
	t.Repo, err = json.Marshal(ev.Repo)
	return t, err
}
