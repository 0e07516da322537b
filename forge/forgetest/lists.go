package forgetest

import (
	"context"
	"slices"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
)

func checkPullRequests(tb TB, f Fixture) {
	l, _ := forge.As[forge.PullRequestLister](f.Forge)
	r := f.Repo(tb, "repo")
	list := func(limit int) []forge.PullRequest {
		tb.Helper()
		all, err := l.PullRequests(tb.Context(), r, limit)
		must(tb, "PullRequests", err)
		return all
	}
	f.Commit(tb, r, "main", map[string]File{"a": {Content: "1"}})
	if all := list(10); len(all) != 0 {
		tb.Errorf("PullRequests where there are none: %+v", all)
	}
	want := []forge.PullRequest{}
	for _, content := range []string{"2", "3", "4"} {
		want = slices.Insert(want, 0, f.PullRequest(tb, r, map[string]File{"a": {Content: content}}))
	}
	for _, limit := range []int{10, 3, 2, 1, 0} {
		got := list(limit)
		if len(got) != min(limit, len(want)) {
			tb.Errorf("PullRequests with the limit %d: %d of %d", limit, len(got), len(want))
			continue
		}
		for i, pr := range got {
			if err := pr.Validate(); err != nil || pr.Number != want[i].Number || pr.HeadCommit != want[i].HeadCommit || pr.BaseRef != "main" || pr.Fork {
				tb.Errorf("pull request %d of those with the limit %d: %v, %+v, want %+v, the newest first", i, limit, err, pr, want[i])
			}
		}
	}
	_, err := l.PullRequests(tb.Context(), forge.Repo{Owner: r.Owner, Name: "absent"}, 10)
	wantErr(tb, "PullRequests of an absent repository", err, forge.ErrNotFound)
	_, err = l.PullRequests(tb.Context(), forge.Repo{Owner: r.Owner, Name: ".."}, 10)
	wantErr(tb, "PullRequests of what is no name", err, forge.ErrInvalid, forge.ErrNotFound)
}

// A poller takes what it finds for what a webhook would have said.
func checkPullRequestsAsWebhooks(tb TB, f Fixture) {
	l, _ := forge.As[forge.PullRequestLister](f.Forge)
	h := hooksOf(tb, f)
	r := f.Repo(tb, "repo")
	f.Commit(tb, r, "main", map[string]File{"a": {Content: "1"}})
	pr := f.PullRequest(tb, r, map[string]File{"a": {Content: "2"}})
	all, err := l.PullRequests(tb.Context(), r, 10)
	if err != nil || len(all) != 1 {
		tb.Fatalf("PullRequests: %+v, %v", all, err)
	}
	event, body := h.w.PullRequest(tb, r, pr.Number)
	e, err := h.parse("an opened pull request", h.w.Request(h, event, body, h.secret()))
	if err != nil || e.PullRequest == nil {
		tb.Fatalf("an opened pull request: %v, %+v", err, e)
	}
	if inJSON(all[0]) != inJSON(*e.PullRequest) {
		tb.Errorf("the list says\n%s\nand the webhook\n%s", inJSON(all[0]), inJSON(*e.PullRequest))
	}
}

// checkup runs Check, and makes sure that its findings can be read.
func checkup(tb TB, f Fixture, o forge.CheckOptions) []forge.Finding {
	tb.Helper()
	c, _ := forge.As[forge.Checker](f.Forge)
	found, err := c.Check(tb.Context(), o)
	must(tb, "Check", err)
	for _, x := range found {
		switch {
		case x.Level != forge.LevelNotice && x.Level != forge.LevelWarning && x.Level != forge.LevelFailure:
			tb.Errorf("the level of %+v is none", x)
		case x.What == "" || strings.HasSuffix(x.What, "."):
			tb.Errorf("finding %+v: what it says is no sentence without a full stop", x)
		case x.Level != forge.LevelNotice && x.Advice == "":
			tb.Errorf("finding %+v: there is no advice", x)
		}
	}
	return found
}

// wrong reports whether something is.
func wrong(found []forge.Finding) bool {
	return slices.ContainsFunc(found, func(x forge.Finding) bool { return x.Level != forge.LevelNotice })
}

func checkSetUp(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	f.Commit(tb, r, "main", map[string]File{"a": {}})
	found := checkup(tb, f, forge.CheckOptions{Repos: []forge.Repo{r}, WebhookURL: f.WebhookURL})
	if len(found) == 0 || wrong(found) {
		tb.Errorf("what is set up well is found to be %+v", found)
	}
}

func checkSetUpBadly(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	f.Commit(tb, r, "main", map[string]File{"a": {}})
	absent := forge.Repo{Owner: r.Owner, Name: "absent"}
	found := checkup(tb, f, forge.CheckOptions{Repos: []forge.Repo{r, absent}, WebhookURL: f.WebhookURL})
	if !slices.ContainsFunc(found, func(x forge.Finding) bool {
		return x.Level != forge.LevelNotice && strings.Contains(x.What, absent.FullName())
	}) {
		tb.Errorf("no warning names a repository that is not there: %+v", found)
	}
	if f.WebhookURL != "" {
		if found := checkup(tb, f, forge.CheckOptions{Repos: []forge.Repo{r}, WebhookURL: f.WebhookURL + "/elsewhere"}); !wrong(found) {
			tb.Errorf("webhooks that go elsewhere are found to be fine: %+v", found)
		}
	}
	ctx, cancel := context.WithCancel(tb.Context())
	cancel()
	c, _ := forge.As[forge.Checker](f.Forge)
	_, err := c.Check(ctx, forge.CheckOptions{Repos: []forge.Repo{r}})
	wantErr(tb, "Check with a cancelled context", err, context.Canceled)
}
