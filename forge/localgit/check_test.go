package localgit_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	"github.com/solstice-ci/solstice-go/internal/fakeforge/rig"
)

func TestCheck(t *testing.T) {
	want := func(level forge.Level, says ...string) rig.Setup { return rig.Setup{Level: level, Says: says} }
	root := t.TempDir()
	open := func(statuses string) *localgit.Forge {
		f, err := localgit.Open(t.Context(), localgit.Config{Root: root, StatusDir: statuses})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		return f
	}
	f := open("")
	want(forge.LevelNotice, "git is", "there is nothing in").Check(t, f, forge.CheckOptions{WebhookURL: "https://ci.example.org"})

	dir := filepath.Join(root, "app.git")
	gitIn(t, root)("", "init", "-q", "--bare", "-b", "main", "--template=", "--", dir)
	o := forge.CheckOptions{Repos: []forge.Repo{{Name: "app"}}}
	want(forge.LevelNotice, "app is empty", "statuses are written to "+dir, "no post-receive hook").Check(t, f, o)
	gitIn(t, dir)("blob\nmark :1\ndata 0\ncommit refs/heads/main\ncommitter A <a@example.org> 1 +0000\ndata 0\nM 100644 :1 a\n", "fast-import", "--quiet")
	hook := filepath.Join(dir, "hooks", "post-receive")
	if err := os.MkdirAll(filepath.Dir(hook), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(hook, []byte("#!/bin/sh\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	want(forge.LevelWarning, "may not be executed", "chmod +x "+hook).Check(t, f, o)
	if err := os.Chmod(hook, 0o700); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	want(forge.LevelNotice, "app is in "+dir, "has a post-receive hook").Check(t, f, o)
	want(forge.LevelNotice, "statuses are written to").Check(t, open(filepath.Join(t.TempDir(), "not", "yet")), o)
	if all, _ := filepath.Glob(filepath.Join(dir, ".solstice*")); len(all) > 0 {
		t.Errorf("left behind: %s", all)
	}

	want(forge.LevelFailure, "cannot be written").Check(t, open(filepath.Join(hook, "statuses")), o)
	want(forge.LevelFailure, "absent cannot be opened").Check(t, f, forge.CheckOptions{Repos: []forge.Repo{{Name: "absent"}}})
	if err := os.WriteFile(filepath.Join(dir, "config"), []byte("[core"), 0o600); err != nil {
		t.Fatal(err)
	}
	want(forge.LevelFailure, "app cannot be read", "git fsck").Check(t, f, o)
}
