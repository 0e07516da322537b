package solstice_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/testenv"
	"github.com/solstice-ci/solstice-go/queue"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/api/messages"
)

// told is a forge that also knows people and merges, as the test says, and keeps
// what was reported.
type told struct {
	forge.Forge
	mu       sync.Mutex
	writers  map[string]bool // by user ID
	merge    string
	mergeErr error
	asked    []string
	reports  map[string]forge.Status // by commit and key: the newest
}

func (f *told) As(target any) bool {
	switch t := target.(type) {
	case *forge.Permissions:
		*t = f
	case *forge.Merger:
		*t = f
	case *forge.ChangedPaths:
		*t = f.Forge.(forge.ChangedPaths)
	default:
		return false
	}
	return true
}

func (f *told) MayApprove(_ context.Context, _ forge.Repo, u forge.User) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, u.ID)
	if _, known := f.writers[u.ID]; !known {
		return false, forge.ErrNotFound
	}
	return f.writers[u.ID], nil
}

func (f *told) MergeCommit(context.Context, forge.Repo, forge.PullRequest) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.merge, f.mergeErr
}

func (f *told) ReportStatus(_ context.Context, _ forge.Repo, commit string, s forge.Status) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if key := commit + " " + s.Key; f.reports[key].Version < s.Version {
		f.reports[key] = s
	}
	return nil
}

func (f *told) report(commit, key string) forge.Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.reports[commit+" "+key]
}

// pulls is a repository with a pull request.
type pulls struct {
	*plant
	t                 *testing.T
	eng               *solstice.Engine
	forge             *told
	queue             queue.Queue
	base, head, merge string
}

const (
	ofBase = "jobs: { base: { checkout: false, steps: [{ run: 'true' }] } }\n"
	ofHead = "jobs: { head: { checkout: false, steps: [{ run: 'true' }] } }\n"
)

func newPulls(t *testing.T, url string) *pulls {
	p := &pulls{plant: newPlant(t, url), t: t}
	p.base = p.commit(t, map[string]string{".solstice/workflow.yaml": ofBase, "a": ""})
	p.git(t, "checkout", "-qb", "change")
	p.head = p.commit(t, map[string]string{".solstice/workflow.yaml": ofHead, "docs/b": ""})
	p.merge = p.commit(t, map[string]string{"merged": ""}) // as good as a merge
	p.git(t, "checkout", "-q", "main")
	p.eng, _ = p.start(t, func(c *solstice.Config) {
		p.forge = &told{Forge: c.Forges["local"], writers: map[string]bool{"1": true, "2": false}, merge: p.merge, reports: map[string]forge.Status{}}
		c.Forges["local"], p.queue = p.forge, c.Queue
	})
	return p
}

// event is one of the pull request.
func (p *pulls) event(author string, fork bool) forge.Event {
	return forge.Event{
		Kind: forge.KindPullRequest, Action: "opened", Commit: p.head, Ref: "refs/pull/7/head",
		PullRequest: &forge.PullRequest{Number: 7, HeadRef: "change", HeadCommit: p.head, BaseRef: "main", BaseCommit: p.base, Author: forge.User{ID: author, Login: "mallory"}, Fork: fork},
	}
}

func (p *pulls) submitEvent(ev forge.Event) solstice.Run {
	p.t.Helper()
	runs, err := p.eng.Submit(p.t.Context(), solstice.RunRequest{Repo: forge.Repo{Name: "repo"}, Event: ev})
	if err != nil || len(runs) != 1 {
		p.t.Fatalf("%+v, %v", runs, err)
	}
	return runs[0]
}

// send is what a forge integration does.
func (p *pulls) send(ev forge.Event) {
	p.t.Helper()
	m, err := messages.Encode(messages.RunRequest{Repo: forge.Repo{Name: "repo"}, Event: ev})
	if err != nil {
		p.t.Fatal(err)
	}
	m.ID = ev.Delivery
	if err := p.queue.Publish(p.t.Context(), messages.TopicRunRequest, []queue.Message{m}, queue.PublishOptions{}); err != nil {
		p.t.Fatal(err)
	}
}

// TestTrust: who may not write to a repository does not start anything in it by a
// pull request from a fork, and does not say what is done.
func TestTrust(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		p := newPulls(t, url)
		for name, c := range map[string]struct {
			author string
			fork   bool
			job    string
			waits  bool
		}{
			"own branch":           {"2", false, "head", false},
			"a fork, of a writer":  {"1", true, "head", false},
			"a fork, of a reader":  {"2", true, "base", true},
			"a fork, of a ghost":   {"3", true, "base", true},
			"a fork, of no one":    {"", true, "base", true},
			"a fork, by login 'x'": {"x", true, "base", true},
		} {
			r := p.submitEvent(p.event(c.author, c.fork))
			if (r.State == solstice.RunAwaitingApproval) != c.waits || r.Jobs[0].Key != c.job || r.Commit != p.merge || r.Head != p.head {
				t.Errorf("%s: %s, job %s, tests %s for %s", name, r.State, r.Jobs[0].Key, r.Commit, r.Head)
			}
			if err := p.eng.Cancel(t.Context(), r.ID, "seen"); err != nil {
				t.Fatal(err)
			}
			finish(t, p.eng, r.ID)
		}

		// The status says what it waits for, and who may. The button is as good as
		// who presses it, and the commit that was looked at.
		r := p.submitEvent(p.event("2", true))
		eventually(t, "a status that says so", func() bool {
			s := p.forge.report(p.head, "solstice/workflow")
			return s.ExternalID == r.ID && strings.Contains(s.Description, "mallory, who made it from a fork") && strings.Contains(s.Description, "may approve it") && len(s.Actions) == 2
		})
		seen := func() int {
			p.forge.mu.Lock()
			defer p.forge.mu.Unlock()
			return len(p.forge.asked)
		}
		before := seen()
		button := forge.Event{Kind: forge.KindApprove, ExternalID: r.ID, Commit: p.head, Sender: forge.User{ID: "2"}, Delivery: "reader"}
		p.send(button)
		button.Sender.ID, button.Commit, button.Delivery = "1", p.base, "another commit"
		p.send(button)
		button.Commit, button.Delivery = p.head, "good"
		button.ExternalID = "0000"
		p.send(button)
		eventually(t, "the buttons are looked at", func() bool { return seen() == before+2 })
		if now, err := p.eng.GetRun(t.Context(), r.ID); err != nil || now.State != solstice.RunAwaitingApproval {
			t.Errorf("after buttons that should do nothing: %+v, %v", now, err)
		}
		button.ExternalID, button.Delivery = r.ID, "best"
		p.send(button)
		if r = finish(t, p.eng, r.ID); r.State != solstice.RunSucceeded {
			t.Errorf("approved: %+v", r)
		}
		// A push after the approval waits again.
		again := p.submitEvent(p.event("2", true))
		if again.State != solstice.RunAwaitingApproval {
			t.Errorf("the next push: %s", again.State)
		}
		button.Kind, button.ExternalID, button.Delivery = forge.KindCancel, again.Jobs[0].ID, "cancel"
		p.send(button)
		if again = finish(t, p.eng, again.ID); again.State != solstice.RunCancelled {
			t.Errorf("cancelled by its button: %s", again.State)
		}
		// A rerun of a job, and of the whole commit.
		button.Kind, button.ExternalID, button.Delivery = forge.KindRerun, r.Jobs[0].ID, "rerun"
		p.send(button)
		p.send(button)
		reruns := func() (n int) {
			runs, err := p.eng.Runs(t.Context(), solstice.RunFilter{})
			if err != nil {
				t.Fatal(err)
			}
			for _, x := range runs {
				if x.RerunOf == r.ID && x.State == solstice.RunSucceeded {
					n++
				}
			}
			return n
		}
		eventually(t, "a rerun", func() bool { return reruns() == 1 })
	})
}

// TestMergeCommit: the merge is tested, the head where there is none, and people
// are told why.
func TestMergeCommit(t *testing.T) {
	p := newPulls(t, testenv.SQLite(t))
	set := func(commit string, err error) {
		p.forge.mu.Lock()
		defer p.forge.mu.Unlock()
		p.forge.merge, p.forge.mergeErr = commit, err
	}
	set("", fmt.Errorf("%w: a", forge.ErrConflict))
	r := finish(t, p.eng, p.submitEvent(p.event("1", false)).ID)
	if r.State != solstice.RunSucceeded || r.Commit != p.head || r.Head != p.head || !strings.Contains(r.Note, "conflicts with main") {
		t.Errorf("with a conflict: %+v", r)
	}
	eventually(t, "the status says so", func() bool {
		s := p.forge.report(p.head, "solstice/workflow")
		return s.State == forge.StatusSuccess && strings.Contains(s.Description, "conflicts with main")
	})
	set("", errors.ErrUnsupported)
	if r := finish(t, p.eng, p.submitEvent(p.event("1", false)).ID); r.Commit != p.head || r.Note != "" {
		t.Errorf("of a forge without merges: %+v", r)
	}
	set("", forge.ErrPermission)
	if _, err := p.eng.Submit(t.Context(), solstice.RunRequest{Repo: forge.Repo{Name: "repo"}, Event: p.event("1", false)}); !errors.Is(err, forge.ErrPermission) {
		t.Errorf("of a forge that refuses: %v", err)
	}
}

// TestUnwantedEvents start nothing.
func TestUnwantedEvents(t *testing.T) {
	p := newPulls(t, testenv.SQLite(t))
	closed := p.event("1", false)
	closed.Action = "closed"
	push := func(message string) forge.Event {
		return forge.Event{Kind: forge.KindPush, Ref: "refs/heads/main", Commit: p.base, Message: message}
	}
	for name, ev := range map[string]forge.Event{
		"closed": closed, "skip ci": push("docs\n\n[skip ci]\n"), "CI SKIP": push("x [CI SKIP]"), "ping": {Kind: forge.KindPing}, "installation": {Kind: forge.KindInstallation},
	} {
		if runs, err := p.eng.Submit(t.Context(), solstice.RunRequest{Repo: forge.Repo{Name: "repo"}, Ref: "refs/heads/main", Event: ev}); err != nil || len(runs) != 0 {
			t.Errorf("%s: %+v, %v", name, runs, err)
		}
	}
	finish(t, p.eng, p.submitEvent(push("skip the CI")).ID)
}

// TestChangedPathsAsked: where an event does not say what changed, the forge is
// asked.
func TestChangedPathsAsked(t *testing.T) {
	p := newPulls(t, testenv.SQLite(t))
	filter := func(pattern string) string {
		return "on: { push: { paths: ['" + pattern + "'] } }\njobs: { a: { checkout: false, steps: [{ run: 'true' }] } }\n"
	}
	before := p.commit(t, map[string]string{".solstice/workflow.yaml": filter("src/**"), "src/x": "1"})
	after := p.commit(t, map[string]string{"docs/y": "1"})
	ev := forge.Event{Kind: forge.KindPush, Ref: "refs/heads/main", Before: before, Commit: after}
	if runs, err := p.eng.Submit(t.Context(), solstice.RunRequest{Repo: forge.Repo{Name: "repo"}, Event: ev}); err != nil || len(runs) != 0 {
		t.Errorf("nothing below src changed: %+v, %v", runs, err)
	}
	ev.Commit = p.commit(t, map[string]string{"src/x": "2"})
	finish(t, p.eng, p.submitEvent(ev).ID)
	ev.Before = strings.Repeat("ab", 20) // pushed over: not to be known
	finish(t, p.eng, p.submitEvent(ev).ID)
}

// TestConcurrencyGroups: one run of a group is under way, the newest of those that
// wait is next, and a newer push to a pull request ends the older run.
func TestConcurrencyGroups(t *testing.T) {
	testenv.Databases(t, func(t *testing.T, url string) {
		p := newPlant(t, url)
		p.Capacity = 8
		eng, _ := p.start(t)
		sleeper := func(group string) string {
			return "concurrency: " + group + "\njobs: { a: { checkout: false, steps: [{ run: 'echo up; sleep 600' }] } }\n"
		}
		state := func(id string, want solstice.RunState) {
			t.Helper()
			eventually(t, string(want), func() bool {
				r, err := eng.GetRun(t.Context(), id)
				if err != nil {
					t.Fatal(err)
				}
				return r.State == want
			})
		}
		wait := "{ group: 'deploy ${{ ref }}' }"
		a := p.submit(t, eng, sleeper(wait))
		state(a.ID, solstice.RunRunning)
		b := p.submit(t, eng, sleeper(wait)+"# b\n")
		other := p.submit(t, eng, sleeper("elsewhere"))
		state(other.ID, solstice.RunRunning)
		state(b.ID, solstice.RunPlanning)
		c := p.submit(t, eng, sleeper(wait)+"# c\n")
		state(b.ID, solstice.RunCancelled)
		state(c.ID, solstice.RunPlanning)
		if r, err := eng.GetRun(t.Context(), b.ID); err != nil || !strings.Contains(r.Reason, "superseded by run "+c.ID) && !strings.Contains(r.Jobs[0].Reason, "superseded by run "+c.ID) {
			t.Errorf("%+v, %v", r, err)
		}
		if err := eng.Cancel(t.Context(), a.ID, "enough"); err != nil {
			t.Fatal(err)
		}
		state(a.ID, solstice.RunCancelled)
		state(c.ID, solstice.RunRunning)
		d := p.submit(t, eng, sleeper("{ group: 'deploy ${{ ref }}', cancel-in-progress: true }"))
		state(c.ID, solstice.RunCancelled)
		state(d.ID, solstice.RunRunning)
		if r, err := eng.GetRun(t.Context(), c.ID); err != nil || r.FinishedAt.After(mustRun(t, eng, d.ID).Jobs[0].QueuedAt) {
			t.Errorf("two were under way at once: %+v, %v", r, err)
		}
		for _, id := range []string{d.ID, other.ID} {
			if err := eng.Cancel(t.Context(), id, "enough"); err != nil {
				t.Fatal(err)
			}
			state(id, solstice.RunCancelled)
		}
	})
}

func mustRun(t *testing.T, eng *solstice.Engine, id string) solstice.Run {
	t.Helper()
	r, err := eng.GetRun(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestStrangersEndNothing: a pull request that waits for approval is of a group that
// cancels, and what is under way in it goes on; approved it waits for its turn.
func TestStrangersEndNothing(t *testing.T) {
	p := newPulls(t, testenv.SQLite(t))
	p.base = p.commit(t, map[string]string{".solstice/workflow.yaml": "concurrency: { group: deploy, cancel-in-progress: true }\njobs: { a: { checkout: false, steps: [{ run: sleep 600 }] } }\n"})
	deploy := p.submitEvent(forge.Event{Kind: forge.KindPush, Ref: "refs/heads/main", Commit: p.base})
	eventually(t, "it runs", func() bool { return mustRun(t, p.eng, deploy.ID).State == solstice.RunRunning })
	stranger := p.submitEvent(p.event("2", true))
	if stranger.State != solstice.RunAwaitingApproval {
		t.Fatalf("a stranger's run is %s", stranger.State)
	}
	approved, err := p.eng.Approve(t.Context(), stranger.ID, p.head)
	if err != nil || approved.State != solstice.RunPlanning {
		t.Errorf("approved it is %s, %v", approved.State, err)
	}
	if r := mustRun(t, p.eng, deploy.ID); r.State != solstice.RunRunning {
		t.Errorf("what was under way is %s: %s", r.State, r.Reason)
	}
	for _, id := range []string{deploy.ID, stranger.ID} {
		if err := p.eng.Cancel(t.Context(), id, "seen"); err != nil {
			t.Fatal(err)
		}
		finish(t, p.eng, id)
	}
}

// TestNewerPush: see TestConcurrencyGroups.
func TestNewerPush(t *testing.T) {
	p := newPulls(t, testenv.SQLite(t))
	p.git(t, "checkout", "-q", "change")
	p.head = p.commit(t, map[string]string{".solstice/workflow.yaml": "jobs: { a: { checkout: false, steps: [{ run: sleep 600 }] } }\n"})
	p.forge.merge = p.head
	older := p.submitEvent(p.event("1", false))
	eventually(t, "it runs", func() bool { return mustRun(t, p.eng, older.ID).State == solstice.RunRunning })
	another := p.event("1", false)
	another.PullRequest.Number = 8
	beside := p.submitEvent(another)
	newer := p.submitEvent(p.event("1", false))
	if r := finish(t, p.eng, older.ID); r.State != solstice.RunCancelled || !strings.Contains(r.Jobs[0].Reason, "superseded") {
		t.Errorf("the older run: %+v", r)
	}
	for _, r := range []solstice.Run{newer, beside} {
		eventually(t, "the newer runs, and another pull request's", func() bool { return mustRun(t, p.eng, r.ID).State == solstice.RunRunning })
		if err := p.eng.Cancel(t.Context(), r.ID, "seen"); err != nil {
			t.Fatal(err)
		}
		finish(t, p.eng, r.ID)
	}
}
