package forge_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/forge"
)

func valid(kind forge.Kind) forge.Event {
	commit := strings.Repeat("a1", 20)
	e := forge.Event{Kind: kind, Repo: forge.Repo{Owner: "team", Name: "app"}, Commit: commit}
	switch kind {
	case forge.KindPush:
		e.Ref = "refs/heads/feature/-x"
	case forge.KindTag:
		e.Ref = "refs/tags/v1.0"
	case forge.KindPullRequest:
		e.Action, e.Ref = "opened", "refs/pull/3/head"
		e.PullRequest = &forge.PullRequest{
			Number: 3, HeadRef: "x", HeadCommit: commit, HeadRepo: e.Repo, BaseRef: "main", BaseCommit: commit, MergeRef: "refs/pull/3/merge",
		}
	case forge.KindRerun:
		e.Action, e.ExternalID = "all", "run/1"
	case forge.KindInstallation:
		e = forge.Event{Kind: kind, Action: "added", Repos: []forge.Repo{e.Repo}}
	case forge.KindPing:
		e = forge.Event{Kind: kind}
	}
	return e
}

func TestEventValidate(t *testing.T) {
	for _, kind := range []forge.Kind{
		forge.KindPush, forge.KindTag, forge.KindPullRequest, forge.KindManual, forge.KindRerun,
		forge.KindCancel, forge.KindApprove, forge.KindInstallation, forge.KindPing,
	} {
		if err := valid(kind).Validate(); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
	}
	for name, tc := range map[string]struct {
		kind   forge.Kind
		change func(*forge.Event)
	}{
		"unknown kind":            {"star", func(*forge.Event) {}},
		"no repository":           {forge.KindPush, func(e *forge.Event) { e.Repo = forge.Repo{} }},
		"repository elsewhere":    {forge.KindPing, func(e *forge.Event) { e.Repo.Name = "../x" }},
		"no commit":               {forge.KindPush, func(e *forge.Event) { e.Commit = "" }},
		"an option":               {forge.KindManual, func(e *forge.Event) { e.Commit = "--upload-pack=x" }},
		"upper case":              {forge.KindPush, func(e *forge.Event) { e.Commit = strings.ToUpper(e.Commit) }},
		"short commit":            {forge.KindPush, func(e *forge.Event) { e.Before = "abc123" }},
		"a tag in a push":         {forge.KindPush, func(e *forge.Event) { e.Ref = "refs/tags/v1" }},
		"short ref":               {forge.KindPush, func(e *forge.Event) { e.Ref = "main" }},
		"ref that leaves":         {forge.KindPush, func(e *forge.Event) { e.Ref = "refs/heads/../x" }},
		"ref of two lines":        {forge.KindTag, func(e *forge.Event) { e.Ref = "refs/tags/a\nb" }},
		"action of a push":        {forge.KindPush, func(e *forge.Event) { e.Action = "opened" }},
		"unknown action":          {forge.KindPullRequest, func(e *forge.Event) { e.Action = "labelled" }},
		"no pull request":         {forge.KindPullRequest, func(e *forge.Event) { e.PullRequest = nil }},
		"number 0":                {forge.KindPullRequest, func(e *forge.Event) { e.PullRequest.Number = 0 }},
		"head repository":         {forge.KindPullRequest, func(e *forge.Event) { e.PullRequest.HeadRepo.Owner = ".." }},
		"base branch":             {forge.KindPullRequest, func(e *forge.Event) { e.PullRequest.BaseRef = "a b" }},
		"merge ref":               {forge.KindPullRequest, func(e *forge.Event) { e.PullRequest.MergeRef = "merge" }},
		"head commit":             {forge.KindPullRequest, func(e *forge.Event) { e.PullRequest.HeadCommit = "HEAD" }},
		"rerun of nothing":        {forge.KindRerun, func(e *forge.Event) { e.ExternalID, e.Commit = "", "" }},
		"delivery of two lines":   {forge.KindPing, func(e *forge.Event) { e.Delivery = "a\nb" }},
		"installation's own list": {forge.KindInstallation, func(e *forge.Event) { e.Repos[0].Name = "" }},
	} {
		e := valid(tc.kind)
		tc.change(&e)
		if err := e.Validate(); !errors.Is(err, forge.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	gone := valid(forge.KindPullRequest)
	gone.PullRequest.HeadRepo = forge.Repo{}
	if err := gone.Validate(); err != nil {
		t.Errorf("head repository is gone: %v", err)
	}
}
