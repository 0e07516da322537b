package integration_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/solstice/integration"
)

// polled is a forge whose repositories can be looked at.
type polled struct {
	*plain
	mu    sync.Mutex
	heads map[string]string
	pulls []forge.PullRequest
	fails []error        // the next looks, one each
	slow  time.Duration  // a look takes so long
	seen  map[string]int // looks by repository

	// With a gate a look waits until it may go on.
	arrived, pass chan struct{}
}

func (p *polled) Heads(ctx context.Context, r forge.Repo) (map[string]string, error) {
	time.Sleep(p.slow)
	if p.arrived != nil {
		select {
		case p.arrived <- struct{}{}:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		select {
		case <-p.pass:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.seen == nil {
		p.seen = map[string]int{}
	}
	p.seen[r.FullName()]++
	if len(p.fails) > 0 {
		err := p.fails[0]
		p.fails = p.fails[1:]
		return nil, err
	}
	if !strings.EqualFold(r.Name, "widget") {
		return nil, fmt.Errorf("%w: %s", forge.ErrNotFound, r.FullName())
	}
	return maps.Clone(p.heads), nil
}

func (p *polled) PullRequests(_ context.Context, _ forge.Repo, limit int) ([]forge.PullRequest, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.pulls[:min(len(p.pulls), limit)]), nil
}

func (p *polled) set(ref, commit string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.heads[ref] = commit; commit == "" {
		delete(p.heads, ref)
	}
}

func (p *polled) setPulls(prs ...forge.PullRequest) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pulls = prs
}

func (p *polled) looks(repo string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.seen[repo]
}

// sha is a commit's name.
func sha(c string) string { return strings.Repeat(fmt.Sprintf("%x", c), 20)[:40] }

const main, tag = "refs/heads/main", "refs/tags/v1"

func pushFrom(before, commit string, message ...string) []byte {
	b, _ := json.Marshal(forge.Event{Kind: forge.KindPush, Message: strings.Join(message, "\n"), Repo: forge.Repo{Owner: "acme", Name: "widget"}, Ref: main, Before: sha(before), Commit: sha(commit)})
	return b
}

func pull(number int, head string) forge.PullRequest {
	return forge.PullRequest{Number: number, Title: "change", HeadCommit: sha(head), BaseRef: "main", MergeRef: fmt.Sprintf("refs/merge-requests/%d/merge", number)}
}

func pullEvent(action string, number int, head string) []byte {
	pr := pull(number, head)
	b, _ := json.Marshal(forge.Event{
		Kind: forge.KindPullRequest, Action: action, Repo: forge.Repo{Owner: "acme", Name: "widget"}, Ref: fmt.Sprintf("refs/merge-requests/%d/head", number),
		Commit: pr.HeadCommit, PullRequest: &pr,
	})
	return b
}

// said is what was asked for, in short.
func (r *rig) said() (out []string) {
	for _, a := range r.asked() {
		by := "webhook"
		if strings.HasPrefix(a.Event.Delivery, "poll/") {
			by = "poll"
		}
		commit := func(s string) string {
			for c := 'A'; c <= 'Z'; c++ {
				if s == sha(string(c)) {
					return string(c)
				}
			}
			return strings.Trim(s, "0")
		}
		out = append(out, strings.TrimSpace(fmt.Sprintf("%s %s %s %s>%s %s", by, a.Event.Kind, a.Ref, commit(a.Event.Before), commit(a.Commit), a.Event.Action)))
	}
	return out
}

func (r *rig) wantSaid(what string, want ...string) {
	r.t.Helper()
	r.eventually(fmt.Sprintf("%s: %q", what, want), func() bool { return len(r.said()) >= len(want) })
	if got := r.said(); !slices.Equal(got, want) {
		r.t.Fatalf("%s:\n%s\nwant:\n%s", what, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// newPolled gives a rig that looks for heads.
func newPolled(t *testing.T, url string, p *polled, edit func(*integration.Config)) *rig {
	return newRig(t, url, func(c *integration.Config) {
		f := c.Forges["f"]
		f.Forge, f.Allow, f.Poll = p, []string{"Acme/Widget", "acme/group"}, 20*time.Millisecond
		c.Forges["f"], c.ReportStatuses = f, false
		if edit != nil {
			edit(c)
		}
	})
}

// TestPoll: what moves without a webhook is found once by those that look, and what
// was there before is not.
func TestPoll(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		p := &polled{plain: &plain{}, heads: map[string]string{main: sha("A"), tag: sha("A")}, pulls: []forge.PullRequest{pull(7, "P")}}
		p.slow = 50 * time.Millisecond // longer than their interval: both look at the same time
		r := newPolled(t, url, p, func(c *integration.Config) {
			other, err := integration.New(t.Context(), *c) // on the same database
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan struct{})
			ctx, cancel := context.WithCancel(t.Context())
			go func() { defer close(done); _ = other.Run(ctx) }()
			t.Cleanup(func() { cancel(); <-done })
		})
		settled := func() {
			t.Helper()
			n := p.looks("Acme/Widget")
			r.eventually("more looks", func() bool { return p.looks("Acme/Widget") >= n+5 })
		}
		settled()
		r.wantSaid("the first look")

		p.set(main, sha("B"))
		want := []string{"poll push refs/heads/main A>B"}
		r.wantSaid("a push", want...)
		p.set(tag, sha("B"))
		want = append(want, "poll tag refs/tags/v1 A>B")
		r.wantSaid("a tag", want...)
		p.set("refs/heads/topic", sha("C"))
		want = append(want, "poll push refs/heads/topic >C")
		r.wantSaid("a branch", want...)
		p.setPulls(pull(8, "Q"), pull(7, "P"))
		want = append(want, "poll pull_request refs/merge-requests/8/head >Q opened")
		r.wantSaid("a pull request", want...)
		p.setPulls(pull(8, "R"), pull(7, "P"))
		want = append(want, "poll pull_request refs/merge-requests/8/head >R synchronized")
		r.wantSaid("a push to it", want...)
		p.setPulls()
		p.set("refs/heads/topic", "")
		settled()
		r.wantSaid("what is gone", want...)

		list, err := r.in.Deliveries().List(t.Context(), integration.DeliveryFilter{})
		if err != nil || len(list) != len(want) {
			t.Fatalf("%d deliveries, %v", len(list), err)
		}
		if d := list[len(list)-1]; d.State != "accepted" || d.Reason != "found by looking: its webhook did not come" || d.Repo != "Acme/Widget" || d.Kind != forge.KindPush {
			t.Errorf("%+v", d)
		}
		if n := p.looks("acme/group"); n > 2 { // one may have started after the other's look
			t.Errorf("what is not there was looked at %d times", n)
		}
	})
}

// TestPollWithWebhooks: whatever comes first, in whatever order, each push has its
// runs once.
func TestPollWithWebhooks(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		p := &polled{plain: &plain{}, heads: map[string]string{main: sha("A")}, arrived: make(chan struct{}), pass: make(chan struct{})}
		r := newPolled(t, url, p, func(c *integration.Config) {
			f := c.Forges["f"]
			f.Allow = []string{"acme/widget"}
			c.Forges["f"] = f
		})
		ready := func() {
			t.Helper()
			select {
			case <-p.arrived:
			case <-time.After(time.Minute):
				t.Fatal("no look")
			}
		}
		// look lets n looks finish; the next one has begun by then, and waits.
		look := func(n int) {
			t.Helper()
			for range n {
				p.pass <- struct{}{}
				ready()
			}
		}
		n := 0
		hook := func(state string, body []byte) {
			t.Helper()
			n++
			if s, text := r.good(fmt.Sprint("d", n), body); s != 202 || !strings.HasPrefix(text, state) {
				t.Errorf("webhook %d: %d %s", n, s, text)
			}
		}
		var want []string
		says := func(what string, more ...string) {
			t.Helper()
			want = append(want, more...)
			r.wantSaid(what, want...)
		}
		ready()
		look(1)

		p.set(main, sha("B"))
		look(1)
		hook("accepted", pushFrom("A", "B"))
		look(4)
		says("a webhook after the first look that saw its push", "webhook push refs/heads/main A>B")

		hook("accepted", pushFrom("B", "C")) // while the forge still says B
		look(1)
		p.set(main, sha("C"))
		look(4)
		says("a webhook while it is looked", "webhook push refs/heads/main B>C")

		p.set(main, sha("E"))
		hook("accepted", pushFrom("D", "E"))
		hook("accepted", pushFrom("C", "D"))
		look(4)
		says("webhooks in another order", "webhook push refs/heads/main D>E", "webhook push refs/heads/main C>D")

		p.set(main, sha("G"))
		look(3)
		says("two pushes without webhooks", "poll push refs/heads/main E>G")
		late := pushFrom("F", "G")
		hook("duplicate", late)
		hook("duplicate", late)
		look(3)
		hook("accepted", pushFrom("E", "F")) // was never taken
		look(4)
		says("late webhooks", "webhook push refs/heads/main E>F")

		p.set(main, sha("F"))
		hook("accepted", pushFrom("G", "F"))
		p.set(main, sha("G"))
		hook("accepted", pushFrom("F", "G", "again"))
		look(4)
		says("there and back", "webhook push refs/heads/main G>F", "webhook push refs/heads/main F>G")
		p.set(main, sha("F"))
		look(3)
		says("and there again, without a webhook", "poll push refs/heads/main G>F")
		p.set(main, sha("G"))
		hook("accepted", pushFrom("F", "G", "and again"))
		look(3)
		says("and back", "webhook push refs/heads/main F>G")

		p.set(main, "")
		look(3)
		p.set(main, sha("H"))
		look(3)
		says("a branch that is made again", "poll push refs/heads/main >H")

		// The forge is away for a while, and a missed push is found afterwards.
		p.mu.Lock()
		p.fails = []error{
			fmt.Errorf("%w: 502", forge.ErrUnavailable), &forge.RetryError{After: time.Millisecond, Err: fmt.Errorf("429")},
		}
		p.mu.Unlock()
		p.set(main, sha("I"))
		look(5)
		says("after an outage", "poll push refs/heads/main H>I")

		p.setPulls(pull(1, "P"))
		hook("accepted", pullEvent("opened", 1, "P"))
		look(3)
		p.setPulls(pull(1, "Q"))
		look(3)
		hook("duplicate", pullEvent("synchronized", 1, "Q"))
		p.setPulls()
		hook("accepted", pullEvent("closed", 1, "Q"))
		look(3)
		p.setPulls(pull(1, "Q"))
		hook("accepted", pullEvent("reopened", 1, "Q"))
		look(3)
		const pr = " pull_request refs/merge-requests/1/head "
		says("a pull request", "webhook"+pr+">P opened", "poll"+pr+">Q synchronized", "webhook"+pr+">Q closed", "webhook"+pr+">Q reopened")
		r.forge = p.plain
	})
}

// TestPollMany: as many heads as may be looked at; a repository of more is left.
func TestPollMany(t *testing.T) {
	p := &polled{plain: &plain{}, heads: map[string]string{}}
	for i := range 10_000 {
		p.heads[fmt.Sprintf("refs/tags/%d", i)] = sha("A")
	}
	for n := 1; n <= 250; n++ { // of which the last 200 are listed
		p.pulls = append(p.pulls, pull(251-n, "P"))
	}
	r := newPolled(t, testenv.SQLite(t), p, nil)
	looks := func(n int) {
		t.Helper()
		n += p.looks("Acme/Widget")
		r.eventually("more looks", func() bool { return p.looks("Acme/Widget") >= n })
	}
	looks(3)
	p.setPulls(append([]forge.PullRequest{pull(3, "P")}, p.pulls...)...) // somebody said something about it
	looks(4)
	r.wantSaid("the first looks")
	p.set("refs/tags/5000", sha("B"))
	want := []string{"poll tag refs/tags/5000 A>B"}
	r.wantSaid("one of many", want...)
	p.setPulls(append([]forge.PullRequest{pull(251, "Q")}, p.pulls...)...)
	want = append(want, "poll pull_request refs/merge-requests/251/head >Q opened")
	r.wantSaid("a new one of many", want...)
	p.set("refs/tags/x", sha("C"))
	looks(1)
}
