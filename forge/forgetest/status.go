package forgetest

import (
	"fmt"
	"strings"
	"sync"

	"github.com/solstice-ci/solstice-go/forge"
)

func report(tb TB, f Fixture, r forge.Repo, commit string, s forge.Status) {
	tb.Helper()
	if err := f.Forge.ReportStatus(tb.Context(), r, commit, s); err != nil {
		tb.Errorf("ReportStatus(%q, version %d): %v", s.Key, s.Version, err)
	}
}

// wantStatus checks that one status stands beside the commit for the key.
func wantStatus(tb TB, f Fixture, r forge.Repo, commit string, want forge.Status) {
	tb.Helper()
	if f.Shown != nil {
		shown := f.Shown(want.State)
		if shown.Terminal() != want.State.Terminal() {
			tb.Errorf("%s is shown as %s", want.State, shown)
		}
		want.State = shown
	}
	var found []forge.Status
	for _, s := range f.Statuses(tb, r, commit) {
		if s.Key == want.Key {
			found = append(found, s)
		}
	}
	if len(found) != 1 || found[0].State != want.State || found[0].Description != want.Description || found[0].TargetURL != want.TargetURL {
		tb.Errorf("beside the commit stands %+v, want %+v", found, want)
	}
}

func status(version int64, state forge.StatusState) forge.Status {
	return forge.Status{
		Key: "solstice/test", Version: version, State: state,
		Description: fmt.Sprintf("version %d", version), TargetURL: fmt.Sprintf("https://ci.example.org/runs/%d", version),
	}
}

func checkStatuses(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	first := f.Commit(tb, r, "main", map[string]File{"a": {}})
	second := f.Commit(tb, r, "main", map[string]File{"a": {Content: "2"}})
	for i, state := range []forge.StatusState{
		forge.StatusPending, forge.StatusRunning, forge.StatusSuccess, forge.StatusFailure,
		forge.StatusError, forge.StatusCancelled, forge.StatusSkipped,
	} {
		s := status(int64(i+1), state)
		report(tb, f, r, first, s)
		wantStatus(tb, f, r, first, s)
	}
	if got := f.Statuses(tb, r, second); len(got) != 0 {
		tb.Errorf("another commit has statuses: %+v", got)
	}
}

func checkStatusIdempotent(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	commit := f.Commit(tb, r, "main", map[string]File{"a": {}})
	s := status(3, forge.StatusSuccess)
	report(tb, f, r, commit, s)
	report(tb, f, r, commit, s)
	wantStatus(tb, f, r, commit, s)
	other := s
	other.State, other.Description = forge.StatusFailure, "the same version again"
	report(tb, f, r, commit, other)
	wantStatus(tb, f, r, commit, s)
}

func checkStatusOrder(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	commit := f.Commit(tb, r, "main", map[string]File{"a": {}})
	done := status(10, forge.StatusSuccess)
	report(tb, f, r, commit, done)
	report(tb, f, r, commit, status(2, forge.StatusRunning)) // late
	report(tb, f, r, commit, status(9, forge.StatusFailure))
	wantStatus(tb, f, r, commit, done)
	again := status(11, forge.StatusPending) // a rerun
	report(tb, f, r, commit, again)
	wantStatus(tb, f, r, commit, again)
}

func checkStatusKeys(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	commit := f.Commit(tb, r, "main", map[string]File{"a": {}})
	var all []forge.Status
	for i, key := range []string{"a", "A", "a/b", "../a", "test (go 1.26, linux)", "tést", "a.json", "-x", strings.Repeat("k", forge.MaxStatusKeyBytes)} {
		if key == "A" && f.Forge.Capabilities().StatusKeysFold {
			continue
		}
		s := status(int64(i+1), forge.StatusSuccess)
		s.Key = key
		report(tb, f, r, commit, s)
		all = append(all, s)
	}
	for _, s := range all {
		wantStatus(tb, f, r, commit, s)
	}
	if got := f.Statuses(tb, r, commit); len(got) != len(all) {
		tb.Errorf("%d statuses, want %d", len(got), len(all))
	}
}

// Reports that overtake each other end with the highest version.
func checkStatusRace(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	commit := f.Commit(tb, r, "main", map[string]File{"a": {}})
	const reports = 16
	var wg sync.WaitGroup
	for v := range int64(reports) {
		wg.Go(func() { report(tb, f, r, commit, status(v+1, forge.StatusRunning)) })
	}
	wg.Wait()
	wantStatus(tb, f, r, commit, status(reports, forge.StatusRunning))
}

func checkStatusInvalid(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	commit := f.Commit(tb, r, "main", map[string]File{"a": {}})
	for _, change := range []func(*forge.Status){
		func(s *forge.Status) { s.Key = "" },
		func(s *forge.Status) { s.Key = "a\nb" },
		func(s *forge.Status) { s.Key = strings.Repeat("k", forge.MaxStatusKeyBytes+1) },
		func(s *forge.Status) { s.Version = 0 },
		func(s *forge.Status) { s.Version = -1 },
		func(s *forge.Status) { s.State = "" },
		func(s *forge.Status) { s.State = "finished" },
	} {
		s := status(1, forge.StatusSuccess)
		change(&s)
		wantErr(tb, fmt.Sprintf("ReportStatus(%.40q, %d, %q)", s.Key, s.Version, s.State), f.Forge.ReportStatus(tb.Context(), r, commit, s), forge.ErrInvalid)
	}
	good := status(1, forge.StatusSuccess)
	wantErr(tb, "ReportStatus at an absent commit", f.Forge.ReportStatus(tb.Context(), r, absentCommit, good), forge.ErrNotFound)
	wantErr(tb, "ReportStatus at what is no commit", f.Forge.ReportStatus(tb.Context(), r, "main", good), forge.ErrInvalid)
	if got := f.Statuses(tb, r, commit); len(got) != 0 {
		tb.Errorf("a refused report is seen: %+v", got)
	}
}
