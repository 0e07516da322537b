package localgit_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
)

// workTree makes a repository with one commit: files kept, changed, gone and
// filtered, and an ignore file.
func workTree(t *testing.T, format string) (dir string, git func(stdin string, args ...string) string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "project [1]")
	gitIn(t, t.TempDir())("", "init", "-q", "-b", "trunk", "--object-format="+format, "--", dir)
	git = gitIn(t, dir)
	for name, content := range map[string]string{
		"kept": "kept\n", "changed": "1\n", "gone": "x\n", "dir/filtered": "pointer\n",
		".gitignore": "*.log\n", ".gitattributes": "filtered filter=evil\n",
	} {
		put(t, dir, name, content)
	}
	git("", "add", "--", ".")
	git("", "commit", "-q", "-m", "first")
	git("", "tag", "v1")
	git("", "remote", "add", "origin", "https://user:s3cret@example.org/team/project.git")
	return dir, git
}

func put(t *testing.T, dir, name, content string) {
	t.Helper()
	name = filepath.Join(dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(content), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// fingerprint is everything in a directory: names, modes, content, and times
// but those of objects.
func fingerprint(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		all[name] = st.Mode().String()
		if d.IsDir() || !strings.Contains(name, "/objects/") {
			all[name] += st.ModTime().String()
		}
		if st.Mode().IsRegular() {
			data, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			all[name] += fmt.Sprintf(" %x", sha256.Sum256(data))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func snapshot(t *testing.T, dir string, dirty bool) (localgit.Snapshotted, string) {
	t.Helper()
	before := fingerprint(t, dir)
	dest := filepath.Join(t.TempDir(), "snapshot.git")
	got, err := localgit.Snapshot(t.Context(), localgit.SnapshotOptions{WorkTree: dir, Dest: dest, Dirty: dirty})
	if err != nil {
		t.Fatal(err)
	}
	after := fingerprint(t, dir)
	for name, was := range before {
		if after[name] != was {
			t.Errorf("%s was changed: %s, now %s", name, was, after[name])
		}
	}
	if len(after) != len(before) {
		t.Errorf("files appeared: %d, now %d", len(before), len(after))
	}
	return got, dest
}

func TestSnapshotOfCommit(t *testing.T) {
	for _, format := range []string{"sha1", "sha256"} {
		t.Run(format, func(t *testing.T) {
			dir, git := workTree(t, format)
			put(t, dir, "changed", "2\n")
			got, dest := snapshot(t, filepath.Join(dir, "dir"), false)
			head := git("", "rev-parse", "HEAD")
			want := localgit.Snapshotted{
				Commit: head, Base: head, Ref: "refs/heads/trunk", Origin: "https://example.org/team/project.git", Name: "project [1]", Top: dir,
			}
			if got != want {
				t.Errorf("got %+v\nwant %+v", got, want)
			}
			f, err := localgit.Open(t.Context(), localgit.Config{Dir: dest, Name: got.Name})
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			r := forge.Repo{Name: got.Name}
			for _, ref := range []string{"HEAD", "trunk", "v1"} {
				if commit, err := f.Resolve(t.Context(), r, ref); err != nil || commit != head {
					t.Errorf("Resolve(%s) = %s, %v", ref, commit, err)
				}
			}
			if content, err := f.ReadFile(t.Context(), r, head, "changed"); err != nil || string(content) != "1\n" {
				t.Errorf("ReadFile: %q, %v", content, err)
			}
		})
	}
}

func TestSnapshotOfUncommitted(t *testing.T) {
	dir, git := workTree(t, "sha1")
	// A submodule whose commit is not the one that was recorded.
	sub := filepath.Join(dir, "sub")
	gitIn(t, dir)("", "init", "-q", "-b", "main", "--", sub)
	put(t, sub, "a", "1")
	subGit := gitIn(t, sub)
	subGit("", "add", "--", "a")
	subGit("", "commit", "-q", "-m", "1")
	git("", "update-index", "--add", "--cacheinfo", "160000,"+subGit("", "rev-parse", "HEAD")+",sub")
	git("", "commit", "-q", "-m", "with a submodule")
	subGit("", "commit", "-q", "--allow-empty", "-m", "2")

	if err := os.Remove(filepath.Join(dir, "gone")); err != nil {
		t.Fatal(err)
	}
	put(t, dir, "changed", "2\n")
	put(t, dir, "staged", "staged\n")
	git("", "add", "--", "staged")
	put(t, dir, "new dir/ü\nx", "new\n")
	put(t, dir, "dir/filtered", "real content\n")
	put(t, dir, "ignored.log", "secret\n")
	put(t, dir, ".git/info/exclude", "private\n")
	put(t, dir, "private", "secret\n")

	head := git("", "rev-parse", "HEAD")
	marker := filepath.Join(t.TempDir(), "marker")
	for _, key := range []string{"filter.evil.clean", "filter.evil.process", "core.fsmonitor", "core.hooksPath"} {
		git("", "config", key, "touch '"+marker+"'; cat")
	}
	git("", "config", "filter.evil.required", "true")
	put(t, dir, ".git/hooks/post-index-change", "#!/bin/sh\ntouch "+marker+"\n")
	got, dest := snapshot(t, dir, true)
	if !got.Dirty || got.Commit == got.Base || got.Base != head {
		t.Errorf("%+v", got)
	}
	snap := gitIn(t, dest)
	want := map[string]string{
		".gitattributes": "filtered filter=evil", ".gitignore": "*.log", "changed": "2", "kept": "kept",
		"dir/filtered": "real content", "new dir/ü\nx": "new", "staged": "staged",
	}
	names := strings.Split(strings.TrimSuffix(snap("", "ls-tree", "-r", "-z", "--name-only", got.Commit), "\x00"), "\x00")
	if len(names) != len(want)+1 {
		t.Errorf("the tree has %q", names)
	}
	for name, content := range want {
		if have := snap("", "cat-file", "blob", got.Commit+":"+name); have != content {
			t.Errorf("%s: %q, want %q", name, have, content)
		}
	}
	if link := snap("", "rev-parse", got.Commit+":sub"); link != subGit("", "rev-parse", "HEAD") {
		t.Errorf("submodule at %s", link)
	}
	if parent := snap("", "rev-parse", got.Commit+"^"); parent != got.Base {
		t.Errorf("parent %s", parent)
	}
	if _, err := os.Stat(marker); !errors.Is(err, os.ErrNotExist) {
		t.Error("a program of the configuration ran")
	}
}

// Files that did not change stay as a clean filter left them, and no change is
// no commit.
func TestSnapshotUnchanged(t *testing.T) {
	for _, split := range []string{"false", "true"} {
		dir, git := workTree(t, "sha1")
		git("", "config", "filter.evil.clean", "echo pointer")
		put(t, dir, "dir/filtered", "smudged, of another length\n")
		// Were it as young as the index, git would have to compare the content.
		past := time.Unix(1_700_000_000, 0)
		if err := os.Chtimes(filepath.Join(dir, "dir/filtered"), past, past); err != nil {
			t.Fatal(err)
		}
		git("", "config", "core.splitIndex", split)
		git("", "add", "--", ".") // the filter runs here
		if left := git("", "status", "--porcelain"); left != "" {
			t.Fatalf("not clean: %s", left)
		}
		got, _ := snapshot(t, dir, true)
		if got.Dirty || got.Commit != got.Base {
			t.Errorf("split index %s: %+v", split, got)
		}
	}
}

func TestSnapshotElsewhere(t *testing.T) {
	dir, git := workTree(t, "sha1")
	head := git("", "rev-parse", "HEAD")
	linked := filepath.Join(t.TempDir(), "linked")
	git("", "worktree", "add", "-q", "--detach", "--", linked)
	put(t, linked, "extra", "x\n")
	got, dest := snapshot(t, linked, true)
	if !got.Dirty || got.Ref != "" || got.Base != head || got.Top != linked {
		t.Errorf("linked work tree: %+v", got)
	}
	if have := gitIn(t, dest)("", "cat-file", "blob", "HEAD:extra"); have != "x" {
		t.Errorf("extra: %q", have)
	}

	second := git("2", "commit-tree", "-p", head, head+"^{tree}")
	git("", "update-ref", "refs/heads/trunk", second)
	shallow := filepath.Join(t.TempDir(), "shallow")
	gitIn(t, dir)("", "clone", "-q", "--depth=1", "--", "file://"+dir, shallow)
	got, dest = snapshot(t, shallow, false)
	if n := gitIn(t, dest)("", "rev-list", "--count", "HEAD"); got.Commit != second || n != "1" {
		t.Errorf("shallow: %s commits, %+v", n, got)
	}

	bare := filepath.Join(t.TempDir(), "bare.git")
	gitIn(t, dir)("", "clone", "-q", "--bare", "--", dir, bare)
	if got, _ := snapshot(t, bare, false); got.Commit != second || got.Name != "bare" || got.Top != "" {
		t.Errorf("bare: %+v", got)
	}
}

func TestSnapshotRefuses(t *testing.T) {
	dir, _ := workTree(t, "sha1")
	empty := filepath.Join(t.TempDir(), "empty")
	gitIn(t, dir)("", "init", "-q", "--", empty)
	full := t.TempDir()
	put(t, full, "file", "x")
	for name, tc := range map[string]struct {
		o    localgit.SnapshotOptions
		want error
	}{
		"no commits":    {localgit.SnapshotOptions{WorkTree: empty, Dest: filepath.Join(t.TempDir(), "d")}, localgit.ErrNoCommits},
		"no repository": {localgit.SnapshotOptions{WorkTree: t.TempDir(), Dest: filepath.Join(t.TempDir(), "d")}, forge.ErrNotFound},
		"absent":        {localgit.SnapshotOptions{WorkTree: "/nonexistent", Dest: filepath.Join(t.TempDir(), "d")}, forge.ErrNotFound},
		"full":          {localgit.SnapshotOptions{WorkTree: dir, Dest: full}, forge.ErrInvalid},
		"inside":        {localgit.SnapshotOptions{WorkTree: dir, Dest: filepath.Join(dir, "a", "b")}, forge.ErrInvalid},
		"in .git":       {localgit.SnapshotOptions{WorkTree: dir, Dest: filepath.Join(dir, ".git", "x")}, forge.ErrInvalid},
	} {
		if _, err := localgit.Snapshot(t.Context(), tc.o); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMirror(t *testing.T) {
	for _, format := range []string{"sha1", "sha256"} {
		dir, git := workTree(t, format)
		first := git("", "rev-parse", "HEAD")
		tip := git("2", "commit-tree", "-p", first, first+"^{tree}")
		git("", "update-ref", "refs/heads/trunk", tip)
		git("", "tag", "-a", "-m", "x", "v2", tip)
		for ref, want := range map[string]localgit.Mirrored{
			"": {Commit: tip, Ref: "refs/heads/trunk"}, "trunk": {Commit: tip, Ref: "refs/heads/trunk"}, "refs/heads/trunk": {Commit: tip, Ref: "refs/heads/trunk"},
			"v1": {Commit: first, Ref: "refs/tags/v1"}, "v2": {Commit: tip, Ref: "refs/tags/v2"}, first: {Commit: first},
		} {
			for depth, count := range map[int]string{0: "", 1: "1"} {
				dest := filepath.Join(t.TempDir(), "m")
				got, err := localgit.Mirror(t.Context(), "file://"+dir, dest, localgit.MirrorOptions{Ref: ref, Depth: depth, Schemes: []string{"file"}})
				if err != nil || got != want {
					t.Errorf("Mirror(%q, depth %d) = %+v, %v, want %+v", ref, depth, got, err, want)
					continue
				}
				if n := gitIn(t, dest)("", "rev-list", "--count", "HEAD"); count != "" && n != count {
					t.Errorf("Mirror(%q, depth %d): %s commits", ref, depth, n)
				}
			}
		}
	}
}

func TestMirrorRefuses(t *testing.T) {
	dir, git := workTree(t, "sha1")
	blob := git("x", "hash-object", "-w", "--stdin")
	git("", "tag", "blob", blob)
	for _, tc := range []struct {
		name, url, ref string
		want           error
	}{
		{"scheme", dir, "", forge.ErrInvalid},
		{"ext", "ext::sh -c true", "", forge.ErrInvalid},
		{"option", "--upload-pack=x", "", forge.ErrInvalid},
		{"ref", "file://" + dir, "--all", forge.ErrInvalid},
		{"absent ref", "file://" + dir, "absent", forge.ErrNotFound},
		{"absent commit", "file://" + dir, strings.Repeat("a", 40), forge.ErrNotFound},
		{"not a commit", "file://" + dir, "blob", forge.ErrInvalid},
		{"no repository", "file:///nonexistent", "", forge.ErrUnavailable},
	} {
		o := localgit.MirrorOptions{Ref: tc.ref}
		if strings.HasPrefix(tc.url, "file:") {
			o.Schemes = []string{"file"}
		}
		if _, err := localgit.Mirror(t.Context(), tc.url, filepath.Join(t.TempDir(), "m"), o); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
	}
}

func TestLocate(t *testing.T) {
	dir, git := workTree(t, "sha1")
	before := fingerprint(t, dir)
	head := git("", "rev-parse", "HEAD")
	for _, from := range []string{dir, filepath.Join(dir, "dir")} {
		got, err := localgit.Locate(t.Context(), from)
		want := localgit.Located{Path: dir, Name: filepath.Base(dir), Commit: head, Ref: "refs/heads/trunk", Origin: "https://example.org/team/project.git"}
		if err != nil || got != want {
			t.Errorf("Locate(%s) = %+v, %v; want %+v", from, got, err, want)
		}
	}
	if after := fingerprint(t, dir); !maps.Equal(before, after) {
		t.Errorf("the repository changed from %v to %v", before, after)
	}
	// The same repository under the name that a Forge has it by.
	f, err := localgit.Open(t.Context(), localgit.Config{Root: filepath.Dir(dir)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if got, err := f.Resolve(t.Context(), forge.Repo{Name: filepath.Base(dir)}, "HEAD"); err != nil || got != head {
		t.Errorf("Resolve = %q, %v", got, err)
	}

	linked := filepath.Join(t.TempDir(), "linked")
	git("", "worktree", "add", "-q", "-b", "side", linked)
	gitIn(t, linked)("", "commit", "-q", "--allow-empty", "-m", "second")
	got, err := localgit.Locate(t.Context(), linked)
	if err != nil || got.Path != dir || got.Name != "linked" || got.Commit == head || got.Ref != "refs/heads/side" {
		t.Errorf("a linked work tree: %+v, %v", got, err)
	}
	git("", "checkout", "-q", "--detach")
	if got, err := localgit.Locate(t.Context(), dir); err != nil || got.Ref != "" || got.Commit != head {
		t.Errorf("detached: %+v, %v", got, err)
	}

	empty := t.TempDir()
	if _, err := localgit.Locate(t.Context(), empty); !errors.Is(err, forge.ErrNotFound) {
		t.Errorf("no repository: %v", err)
	}
	gitIn(t, empty)("", "init", "-q")
	if _, err := localgit.Locate(t.Context(), empty); !errors.Is(err, localgit.ErrNoCommits) {
		t.Errorf("no commits: %v", err)
	}
}
