package forgetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
)

const absentCommit = "00000000000000000000000000000000deadbeef"

func checkResolve(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	first := f.Commit(tb, r, "main", map[string]File{"a": {Content: "1"}})
	second := f.Commit(tb, r, "main", map[string]File{"a": {Content: "2"}})
	other := f.Commit(tb, r, "feature/x", map[string]File{"a": {Content: "3"}})
	f.Tag(tb, r, "v1", first, false)
	f.Tag(tb, r, "v2", second, true)
	for ref, want := range map[string]string{
		"main": second, "refs/heads/main": second, "feature/x": other, "refs/heads/feature/x": other,
		"v1": first, "refs/tags/v1": first, "v2": second, "refs/tags/v2": second, first: first,
	} {
		if got, err := f.Forge.Resolve(tb.Context(), r, ref); err != nil || got != want {
			tb.Errorf("Resolve(%q) = %q, %v, want %q", ref, got, err, want)
		}
	}
}

func checkResolveRefuses(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	f.Commit(tb, r, "main", map[string]File{"a": {Content: "1"}})
	for _, ref := range []string{"absent", "refs/heads/absent", absentCommit} {
		_, err := f.Forge.Resolve(tb.Context(), r, ref)
		wantErr(tb, fmt.Sprintf("Resolve(%q)", ref), err, forge.ErrNotFound)
	}
	for _, ref := range []string{"", "--all", "-n1", "main..main", "main:a", "a b", "a\nb", "a\x00b", "main^{/x}"} {
		_, err := f.Forge.Resolve(tb.Context(), r, ref)
		wantErr(tb, fmt.Sprintf("Resolve(%q)", ref), err, forge.ErrInvalid)
	}
}

// wantFile checks one file's content.
func wantFile(tb TB, f Fixture, r forge.Repo, commit, name, want string) {
	tb.Helper()
	got, err := f.Forge.ReadFile(tb.Context(), r, commit, name)
	if err != nil || string(got) != want {
		tb.Errorf("ReadFile(%q) gave %d bytes %.40q, %v, want %d bytes %.40q", name, len(got), got, err, len(want), want)
	}
}

func checkReadFile(tb TB, f Fixture) {
	binary := make([]byte, 0, 512)
	for i := range 512 {
		binary = append(binary, byte(i))
	}
	files := map[string]File{
		"empty": {}, "text": {Content: "line\n"}, "crlf": {Content: "a\r\nb\r\n"}, "no newline": {Content: "x"},
		"binary": {Content: string(binary)}, "run.sh": {Mode: Executable, Content: "#!/bin/sh\n"},
		".solstice/workflow.yaml": {Content: "jobs: {}\n"}, "deep/er/still/file": {Content: "deep"},
	}
	r := f.Repo(tb, "repo")
	commit := f.Commit(tb, r, "main", files)
	for name, file := range files {
		wantFile(tb, f, r, commit, name, file.Content)
	}
}

// A branch that moves on, or has another name, does not change what a commit holds.
func checkReadFileAtCommit(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	first := f.Commit(tb, r, "main", map[string]File{"a": {Content: "1"}, "gone": {Content: "x"}})
	second := f.Commit(tb, r, "main", map[string]File{"a": {Content: "2"}})
	side := f.Commit(tb, r, "side", map[string]File{"a": {Content: "3"}})
	for commit, want := range map[string]string{first: "1", second: "2", side: "3"} {
		wantFile(tb, f, r, commit, "a", want)
	}
	wantFile(tb, f, r, first, "gone", "x")
	_, err := f.Forge.ReadFile(tb.Context(), r, second, "gone")
	wantErr(tb, "ReadFile of a deleted file", err, forge.ErrNotFound)
}

func checkOddNames(tb TB, f Fixture) {
	files := map[string]File{}
	for _, name := range []string{
		"with space", "-dash", "--output=x", "ünïcode/文", "quote\"'`", "star*", "qu?stion", "[a]", "new\nline", "tab\t",
		"percent%2e", "hash#", "a&b=c+d", "dollar$HOME", ":colon", ":(glob)x", "back\\slash", "..dots", "semi;colon", "~tilde",
	} {
		files[name] = File{Content: "content of " + name}
	}
	files["a"], files["starry"] = File{Content: "the wrong one"}, File{Content: "the wrong one"}
	r := f.Repo(tb, "repo")
	commit := f.Commit(tb, r, "main", files)
	for name, file := range files {
		wantFile(tb, f, r, commit, name, file.Content)
	}
}

func checkBound(tb TB, f Fixture) {
	files := map[string]File{
		"most": {Content: strings.Repeat("m", forge.MaxFileBytes)},
		"over": {Content: strings.Repeat("o", forge.MaxFileBytes+1)},
	}
	r := f.Repo(tb, "repo")
	commit := f.Commit(tb, r, "main", files)
	wantFile(tb, f, r, commit, "most", files["most"].Content)
	_, err := f.Forge.ReadFile(tb.Context(), r, commit, "over")
	wantErr(tb, "ReadFile of MaxFileBytes + 1", err, forge.ErrTooLarge)
}

func checkAbsent(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	commit := f.Commit(tb, r, "main", map[string]File{"dir/a": {Content: "1"}})
	for _, name := range []string{"absent", "a", "dir/b", "absent/a", "dir/a/b"} {
		_, err := f.Forge.ReadFile(tb.Context(), r, commit, name)
		wantErr(tb, fmt.Sprintf("ReadFile(%q)", name), err, forge.ErrNotFound)
	}
	_, err := f.Forge.ReadFile(tb.Context(), r, absentCommit, "dir/a")
	wantErr(tb, "ReadFile at an absent commit", err, forge.ErrNotFound)
}

func checkNotRegular(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	commit := f.Commit(tb, r, "main", map[string]File{
		"target": {Content: "t"}, "dir/a": {Content: "1"}, "link": {Mode: Symlink, Content: "target"},
		"escape": {Mode: Symlink, Content: "/etc/passwd"}, "dirlink": {Mode: Symlink, Content: "dir"},
	})
	for _, name := range []string{"link", "escape", "dir", "dirlink"} {
		_, err := f.Forge.ReadFile(tb.Context(), r, commit, name)
		wantErr(tb, fmt.Sprintf("ReadFile(%q)", name), err, forge.ErrInvalid)
	}
	_, err := f.Forge.ReadFile(tb.Context(), r, commit, "dirlink/a")
	wantErr(tb, "ReadFile through a link", err, forge.ErrNotFound, forge.ErrInvalid)
}

func checkInvalidArguments(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	commit := f.Commit(tb, r, "main", map[string]File{"a": {Content: "1"}, "d/b": {Content: "2"}})
	for _, name := range []string{"", ".", "..", "../a", "/a", "a/", "./a", "d//b", "d/../a", "d/./b", "a\x00", ".git/config"} {
		_, err := f.Forge.ReadFile(tb.Context(), r, commit, name)
		wantErr(tb, fmt.Sprintf("ReadFile(%q)", name), err, forge.ErrInvalid)
		if name == "" {
			continue // the root
		}
		_, err = f.Forge.ListFiles(tb.Context(), r, commit, name)
		wantErr(tb, fmt.Sprintf("ListFiles(%q)", name), err, forge.ErrInvalid)
	}
	for _, c := range []string{"", "main", "--all", commit[:10], strings.ToUpper(commit), commit + "^", commit + "\n"} {
		if c == commit {
			continue // no letters in it
		}
		_, err := f.Forge.ReadFile(tb.Context(), r, c, "a")
		wantErr(tb, fmt.Sprintf("ReadFile at commit %q", c), err, forge.ErrInvalid)
	}
}

func checkListFiles(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	commit := f.Commit(tb, r, "main", map[string]File{
		"b": {}, "a": {Mode: Executable}, "B": {}, "link": {Mode: Symlink, Content: "a"},
		"d/z": {}, "d/ä": {}, "d/with space": {}, "d/-x": {}, "d/new\nline": {}, "d/sub/deep": {}, "d*/other": {}, "dd/x": {},
	})
	for dir, want := range map[string][]string{
		"": {"B", "a", "b"}, "d": {"-x", "new\nline", "with space", "z", "ä"}, "d/sub": {"deep"}, "d*": {"other"},
	} {
		got, err := f.Forge.ListFiles(tb.Context(), r, commit, dir)
		if err != nil || !slices.Equal(got, want) {
			tb.Errorf("ListFiles(%q) = %q, %v, want %q", dir, got, err, want)
		}
	}
}

func checkListFilesAbsent(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	commit := f.Commit(tb, r, "main", map[string]File{"a": {}, "d/sub/x": {}})
	for _, dir := range []string{"absent", "d/absent", "d"} {
		if got, err := f.Forge.ListFiles(tb.Context(), r, commit, dir); err != nil || len(got) != 0 {
			tb.Errorf("ListFiles(%q) = %q, %v, want none", dir, got, err)
		}
	}
	_, err := f.Forge.ListFiles(tb.Context(), r, absentCommit, "")
	wantErr(tb, "ListFiles at an absent commit", err, forge.ErrNotFound)
}

// everyCall makes each call about a repository, with otherwise good arguments.
func everyCall(ctx context.Context, f forge.Forge, r forge.Repo, commit string) map[string]error {
	errs := map[string]error{}
	_, errs["Resolve"] = f.Resolve(ctx, r, "main")
	_, errs["ReadFile"] = f.ReadFile(ctx, r, commit, "a")
	_, errs["ListFiles"] = f.ListFiles(ctx, r, commit, "")
	_, errs["CloneInfo"] = f.CloneInfo(ctx, r, forge.CloneOptions{})
	if f.Capabilities().Statuses {
		errs["ReportStatus"] = f.ReportStatus(ctx, r, commit, forge.Status{Key: "k", Version: 1, State: forge.StatusPending})
	}
	if h, ok := forge.As[forge.HeadLister](f); ok {
		_, errs["Heads"] = h.Heads(ctx, r)
	}
	if c, ok := forge.As[forge.ChangedPaths](f); ok {
		_, _, errs["ChangedPaths"] = c.ChangedPaths(ctx, r, commit, commit, 1)
	}
	return errs
}

func checkUnknownRepo(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	commit := f.Commit(tb, r, "main", map[string]File{"a": {}})
	for call, err := range everyCall(tb.Context(), f.Forge, forge.Repo{Owner: r.Owner, Name: "absent"}, commit) {
		wantErr(tb, call+" of an absent repository", err, forge.ErrNotFound)
	}
}

func checkInvalidRepo(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	commit := f.Commit(tb, r, "main", map[string]File{"a": {}})
	for _, bad := range []forge.Repo{
		{},
		{Name: ".."},
		{Name: "."},
		{Owner: "..", Name: r.Name},
		{Name: "../" + r.Name},
		{Name: "/" + r.Name},
		{Name: "-x"},
		{Owner: "-x", Name: "y"},
		{Name: r.Name + "/."},
		{Name: r.Name + "\x00"},
		{Name: "a\nb"},
		{Owner: "/", Name: r.Name},
		{Name: r.Name + "/../" + r.Name},
		{Name: `..\x`},
		{Name: strings.Repeat("a", 5000)},
		{Owner: r.FullName(), Name: ".git"},
	} {
		for call, err := range everyCall(tb.Context(), f.Forge, bad, commit) {
			wantErr(tb, fmt.Sprintf("%s of %.40q", call, bad.FullName()), err, forge.ErrInvalid, forge.ErrNotFound)
		}
	}
}

func checkClone(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	first := f.Commit(tb, r, "main", map[string]File{"a": {Content: "1"}})
	second := f.Commit(tb, r, "main", map[string]File{"a": {Content: "2"}})
	for commit, want := range map[string]string{first: "1", second: "2"} {
		c, err := f.Forge.CloneInfo(tb.Context(), r, forge.CloneOptions{})
		must(tb, "CloneInfo", err)
		if (c.Dir == "") == (c.URL == "") {
			tb.Fatalf("CloneInfo gives directory %q and URL %q, want one of them", c.Dir, c.URL)
		}
		if got, err := f.Fetch(tb, c, commit, "a"); err != nil || got != want {
			tb.Errorf("fetching %s gave %q, %v, want %q", commit, got, err, want)
		}
		if c.Revoke != nil {
			must(tb, "Revoke", c.Revoke(tb.Context()))
			if _, err := f.Fetch(tb, c, commit, "a"); err == nil {
				tb.Errorf("the credentials still work after Revoke")
			}
		}
	}
}

func checkContext(tb TB, f Fixture) {
	r := f.Repo(tb, "repo")
	commit := f.Commit(tb, r, "main", map[string]File{"a": {}})
	ctx, cancel := context.WithCancel(tb.Context())
	cancel()
	for call, err := range everyCall(ctx, f.Forge, r, commit) {
		wantErr(tb, call+" with a cancelled context", err, context.Canceled)
	}
}

func checkWebhooksUnsupported(tb TB, f Fixture) {
	req, err := http.NewRequestWithContext(tb.Context(), http.MethodPost, "http://localhost/", strings.NewReader("{}"))
	must(tb, "request", err)
	_, err = f.Forge.ParseWebhook(tb.Context(), req, func(context.Context, string) ([]byte, error) {
		return nil, errors.New("there is no secret")
	})
	wantErr(tb, "ParseWebhook", err, errors.ErrUnsupported)
}

func checkHeads(tb TB, f Fixture) {
	h, _ := forge.As[forge.HeadLister](f.Forge)
	r := f.Repo(tb, "repo")
	first := f.Commit(tb, r, "main", map[string]File{"a": {Content: "1"}})
	second := f.Commit(tb, r, "main", map[string]File{"a": {Content: "2"}})
	side := f.Commit(tb, r, "feature/x", map[string]File{"a": {Content: "3"}})
	f.Tag(tb, r, "v1", first, false)
	f.Tag(tb, r, "v2", second, true)
	want := map[string]string{
		"refs/heads/main": second, "refs/heads/feature/x": side, "refs/tags/v1": first, "refs/tags/v2": second,
	}
	if got, err := h.Heads(tb.Context(), r); err != nil || !maps.Equal(got, want) {
		tb.Errorf("Heads = %v, %v, want %v", got, err, want)
	}
}

func checkChangedPaths(tb TB, f Fixture) {
	c, _ := forge.As[forge.ChangedPaths](f.Forge)
	r := f.Repo(tb, "repo")
	same := File{Content: strings.Repeat("moved as it is\n", 20)}
	first := f.Commit(tb, r, "main", map[string]File{"kept": {}, "changed": {Content: "1"}, "old/name": same, "gone": {Content: "g"}, "mode": {Content: "m"}})
	second := f.Commit(tb, r, "main", map[string]File{
		"kept": {}, "changed": {Content: "2"}, "new/näme\n": same, "added": {Content: "a"}, "mode": {Content: "m", Mode: Executable},
	})
	for _, tc := range []struct {
		name, base, head string
		want             []string
	}{
		{"forward", first, second, []string{"added", "changed", "gone", "mode", "new/näme\n", "old/name"}},
		{"backward", second, first, []string{"added", "changed", "gone", "mode", "new/näme\n", "old/name"}},
		{"the same", first, first, nil},
		{"a new branch", strings.Repeat("0", len(first)), first, []string{"changed", "gone", "kept", "mode", "old/name"}},
	} {
		got, truncated, err := c.ChangedPaths(tb.Context(), r, tc.base, tc.head, 100)
		if err != nil || truncated || !slices.Equal(got, tc.want) {
			tb.Errorf("%s: ChangedPaths = %q, %v, %v, want %q", tc.name, got, truncated, err, tc.want)
		}
	}
	_, _, err := c.ChangedPaths(tb.Context(), r, absentCommit, second, 100)
	wantErr(tb, "ChangedPaths from an absent commit", err, forge.ErrNotFound)
	_, _, err = c.ChangedPaths(tb.Context(), r, "main", "--all", 100)
	wantErr(tb, "ChangedPaths of what is no commit", err, forge.ErrInvalid)
}

func checkChangedPathsLimit(tb TB, f Fixture) {
	c, _ := forge.As[forge.ChangedPaths](f.Forge)
	r := f.Repo(tb, "repo")
	files := map[string]File{}
	for i := range 50 {
		files[fmt.Sprintf("f%02d", i)] = File{}
	}
	first := f.Commit(tb, r, "main", map[string]File{"x": {}})
	files["x"] = File{}
	second := f.Commit(tb, r, "main", files)
	for limit, cut := range map[int]bool{1: true, 49: true, 50: false, 51: false} {
		got, truncated, err := c.ChangedPaths(tb.Context(), r, first, second, limit)
		if err != nil || truncated != cut || len(got) != min(limit, 50) || got[0] != "f00" {
			tb.Errorf("limit %d: %d paths, truncated %v, %v", limit, len(got), truncated, err)
		}
	}
}
