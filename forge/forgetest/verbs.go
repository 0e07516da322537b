package forgetest

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
)

// merged asks until the forge knows.
func merged(tb TB, m forge.Merger, r forge.Repo, pr forge.PullRequest) (string, error) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		commit, err := m.MergeCommit(tb.Context(), r, pr)
		if !errors.Is(err, forge.ErrUnavailable) {
			return commit, err
		}
		select {
		case <-tick.C:
		case <-tb.Context().Done():
			return commit, err
		}
	}
}

func checkMerge(tb TB, f Fixture) {
	m, _ := forge.As[forge.Merger](f.Forge)
	r := f.Repo(tb, "repo")
	base := map[string]File{"same": {Content: "s"}, "a": {Content: "1"}}
	f.Commit(tb, r, "main", base)
	pr := f.PullRequest(tb, r, map[string]File{"same": base["same"], "a": {Content: "2"}, "new": {Content: "n"}})
	f.Commit(tb, r, "main", map[string]File{"same": base["same"], "a": base["a"], "later": {Content: "l"}})
	commit, err := merged(tb, m, r, pr)
	if err != nil {
		tb.Fatalf("MergeCommit: %v", err)
	}
	for name, want := range map[string]string{"same": "s", "a": "2", "new": "n", "later": "l"} {
		wantFile(tb, f, r, commit, name, want)
	}
}

func checkMergeConflict(tb TB, f Fixture) {
	m, _ := forge.As[forge.Merger](f.Forge)
	r := f.Repo(tb, "repo")
	f.Commit(tb, r, "main", map[string]File{"a": {Content: "1"}})
	pr := f.PullRequest(tb, r, map[string]File{"a": {Content: "2"}})
	f.Commit(tb, r, "main", map[string]File{"a": {Content: "3"}})
	_, err := merged(tb, m, r, pr)
	wantErr(tb, "MergeCommit", err, forge.ErrConflict)
	pr.Number += 1000
	_, err = merged(tb, m, r, pr)
	wantErr(tb, "MergeCommit of an absent pull request", err, forge.ErrNotFound)
}

func checkComment(tb TB, f Fixture) {
	c, _ := forge.As[forge.Commenter](f.Forge)
	r := f.Repo(tb, "repo")
	f.Commit(tb, r, "main", map[string]File{"a": {Content: "1"}})
	pr := f.PullRequest(tb, r, map[string]File{"a": {Content: "2"}})
	for i, tc := range []struct {
		key, text string
		want      []string
	}{
		{"one", "the *first*", []string{"the *first*"}},
		{"two", "the second", []string{"the *first*", "the second"}},
		{"one", "once more\n\nin two paragraphs", []string{"once more\n\nin two paragraphs", "the second"}},
		{"one-more", "a third", []string{"once more\n\nin two paragraphs", "the second", "a third"}},
	} {
		must(tb, "Comment", c.Comment(tb.Context(), r, pr.Number, tc.key, tc.text))
		got := f.Comments(tb, r, pr.Number)
		all := strings.ReplaceAll(strings.Join(got, "\x00"), "\r\n", "\n")
		if len(got) != len(tc.want) {
			tb.Errorf("after comment %d there are %q, want %q", i, got, tc.want)
		}
		for _, want := range tc.want {
			if strings.Count(all, want) != 1 { // beside what the driver recognises it by
				tb.Errorf("after comment %d there are %q, want %q", i, got, tc.want)
			}
		}
	}
	for _, key := range []string{"", "a b", "a\nb", "-->", "ä"} {
		wantErr(tb, fmt.Sprintf("Comment with key %q", key), c.Comment(tb.Context(), r, pr.Number, key, "text"), forge.ErrInvalid)
	}
	wantErr(tb, "Comment at an absent pull request", c.Comment(tb.Context(), r, pr.Number+1000, "one", "text"), forge.ErrNotFound)
}

func checkMayApprove(tb TB, f Fixture) {
	p, _ := forge.As[forge.Permissions](f.Forge)
	r := f.Repo(tb, "repo")
	f.Commit(tb, r, "main", map[string]File{"a": {}})
	yes, no := f.User(tb, r, true), f.User(tb, r, false)
	for _, tc := range []struct {
		what string
		user forge.User
		want bool
	}{
		{"who may", yes, true},
		{"who may not", no, false},
		{"known by ID only", forge.User{ID: yes.ID}, true},
		{"who calls himself like one who may", forge.User{ID: no.ID, Login: yes.Login}, false},
	} {
		if got, err := p.MayApprove(tb.Context(), r, tc.user); err != nil || got != tc.want {
			tb.Errorf("MayApprove of a user %s: %v, %v, want %v", tc.what, got, err, tc.want)
		}
	}
	for what, u := range map[string]forge.User{
		"no ID": {Login: yes.Login}, "nobody": {}, "an unknown ID": {ID: "987654321", Login: yes.Login}, "what is no ID": {ID: "../" + yes.ID, Login: yes.Login},
	} {
		if got, err := p.MayApprove(tb.Context(), r, u); got {
			tb.Errorf("MayApprove of %s: %v, %v", what, got, err)
		}
	}
	if got, _ := p.MayApprove(tb.Context(), forge.Repo{Owner: r.Owner, Name: "absent"}, yes); got {
		tb.Errorf("MayApprove in an absent repository")
	}
}

func checkForgetStatuses(tb TB, f Fixture) {
	s, _ := forge.As[forge.StatusForgetter](f.Forge)
	r := f.Repo(tb, "repo")
	first := f.Commit(tb, r, "main", map[string]File{"a": {}})
	second := f.Commit(tb, r, "main", map[string]File{"a": {Content: "2"}})
	kept := status(1, forge.StatusSuccess)
	report(tb, f, r, first, status(1, forge.StatusFailure))
	report(tb, f, r, second, kept)
	for range 2 {
		must(tb, "ForgetStatuses", s.ForgetStatuses(tb.Context(), r, first))
		if got := f.Statuses(tb, r, first); len(got) != 0 {
			tb.Errorf("after ForgetStatuses there are %+v", got)
		}
	}
	wantStatus(tb, f, r, second, kept)
	must(tb, "ForgetStatuses of an absent repository", s.ForgetStatuses(tb.Context(), forge.Repo{Owner: r.Owner, Name: "absent"}, first))
}
