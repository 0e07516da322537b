// Package rig has what the tests of drivers do with the fake of their forge:
// fixtures of payloads, and repositories for forge/forgetest.
package rig

import (
	"context"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/forgetest"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	"github.com/solstice-ci/solstice-go/internal/fakeforge"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// Payload reads a payload and changes values in it, each named by its place:
// "pull_request.head.sha". A value of nil is null, Absent removes it.
func Payload(tb forgetest.TB, file string, changes map[string]any) []byte {
	tb.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", file))
	if err != nil {
		tb.Fatalf("%v", err)
	}
	if len(changes) == 0 {
		return data
	}
	var all map[string]any
	if err := json.Unmarshal(data, &all); err != nil {
		tb.Fatalf("%s: %v", file, err)
	}
	for place, value := range changes {
		at := all
		parts := strings.Split(place, ".")
		for _, part := range parts[:len(parts)-1] {
			at, _ = at[part].(map[string]any)
		}
		last := parts[len(parts)-1]
		if at == nil {
			tb.Fatalf("%s has no %s", file, place)
		}
		if value == Absent {
			delete(at, last)
		} else {
			at[last] = value
		}
	}
	data, err = json.MarshalIndent(all, "", "  ")
	if err != nil {
		tb.Fatalf("%v", err)
	}
	return data
}

// Absent stands for a value that is not there.
var Absent any = new(int)

// Fill sets what a fixture does with repositories; name gives a repository's
// name at the fake.
func Fill(f *forgetest.Fixture, repos *fakeforge.Repos, owner string) {
	f.Repo = func(tb forgetest.TB, name string) forge.Repo {
		r := forge.Repo{Owner: owner, Name: name}
		if err := repos.Create(tb.Context(), r.FullName()); err != nil {
			tb.Fatalf("%v", err)
		}
		return r
	}
	f.Commit = func(tb forgetest.TB, r forge.Repo, branch string, files map[string]forgetest.File) string {
		commit, err := repos.Commit(tb.Context(), r.FullName(), branch, Files(files))
		if err != nil {
			tb.Fatalf("%v", err)
		}
		return commit
	}
	f.Tag = func(tb forgetest.TB, r forge.Repo, name, commit string, annotated bool) {
		args := []string{"tag", "--", name, commit}
		if annotated {
			args = []string{"tag", "-a", "-m", "a tag", "--", name, commit}
		}
		if _, err := repos.Git(tb.Context(), r.FullName(), "", args...); err != nil {
			tb.Fatalf("%v", err)
		}
	}
	f.Fetch = func(tb forgetest.TB, c forge.Clone, commit, path string) (string, error) {
		return Fetch(tb.Context(), tb.TempDir(), c, commit, path)
	}
}

// Files are files as the fakes have them.
func Files(files map[string]forgetest.File) map[string]fakeforge.File {
	all := make(map[string]fakeforge.File, len(files))
	for name, file := range maps.All(files) {
		all[name] = fakeforge.File{Mode: string(file.Mode), Content: file.Content}
	}
	return all
}

// Fetch fetches a commit with git, and gives a file in it.
func Fetch(ctx context.Context, tmp string, c forge.Clone, commit, path string) (string, error) {
	git, err := gitcmd.Find(ctx)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(tmp, "clone.git")
	if _, err := localgit.Mirror(ctx, c.URL, dir, localgit.MirrorOptions{
		Ref: commit, Depth: 1, Schemes: []string{"http", "https"}, Header: c.Header,
	}); err != nil {
		return "", err
	}
	out, err := git.Output(ctx, gitcmd.Options{GitDir: dir}, "cat-file", "blob", commit+":"+path)
	return string(out), err
}
