package workflow_test

import (
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

// withOn parses a workflow with this value under on; empty: no such key.
func withOn(t *testing.T, on string) *workflow.Workflow {
	t.Helper()
	src := "jobs:\n  test:\n    steps:\n      - run: make test\n"
	if on != "" {
		src += "on: " + on + "\n"
	}
	w, diags := workflow.Parse(workflow.File, []byte(src))
	if len(diags) > 0 {
		t.Fatalf("%s:\n%s", on, diags)
	}
	return w
}

func TestMatch(t *testing.T) {
	push := func(branch string, paths ...string) workflow.Trigger {
		return workflow.Trigger{Kind: workflow.Push, Ref: "refs/heads/" + branch, ChangedPaths: paths}
	}
	tag := func(name string) workflow.Trigger {
		return workflow.Trigger{Kind: workflow.Tag, Ref: "refs/tags/" + name}
	}
	pr := func(base string, paths ...string) workflow.Trigger {
		return workflow.Trigger{Kind: workflow.PullRequest, Ref: "refs/pull/1/head", BaseRef: base, ChangedPaths: paths}
	}
	manual := workflow.Trigger{Kind: workflow.Manual, Ref: "refs/heads/x"}
	for _, c := range []struct {
		on   string
		t    workflow.Trigger
		want bool
		why  string
	}{
		{"", push("main"), true, `branch "main"`},
		{"", pr("main"), true, `target branch "main"`},
		{"", manual, true, "manual"},
		{"", tag("v1"), false, "tag is not listed"},
		{"push", push("x/y"), true, ""},
		{"push", pr("main"), false, "pull_request is not listed"},
		{"push", manual, false, "manual is not listed"},
		{"push", workflow.Trigger{Kind: workflow.Push, Ref: "refs/tags/v1"}, false, "tag is not listed"},
		{"[push, tag]", workflow.Trigger{Kind: workflow.Push, Ref: "refs/tags/v1"}, true, `tag "v1"`},
		{"{push: }", push("main"), true, ""},
		{"{push: {branches: main}}", push("main"), true, ""},
		{"{push: {branches: main}}", push("maintenance"), false, "matches no pattern"},
		{"{push: {branches: [release/*]}}", push("release/1"), true, ""},
		{"{push: {branches: [release/*]}}", push("release/1/2"), false, ""},
		{"{push: {branches: [release/**]}}", push("release/1/2"), true, ""},
		{"{push: {branches: ['**', '!old/**', old/keep]}}", push("old/x"), false, "excluded by !old/**"},
		{"{push: {branches: ['**', '!old/**', old/keep]}}", push("old/keep"), true, ""},
		{"{push: {branches: ['!wip/**']}}", push("main"), true, ""},
		{"{push: {branches: ['!wip/**']}}", push("wip/x"), false, ""},
		{"{push: {branches: ['v[0-9]', '{a,b}x']}}", push("v2"), true, ""},
		{"{push: {branches: ['v[0-9]', '{a,b}x']}}", push("bx"), true, ""},
		{"{push: {branches: ['v[0-9]', '{a,b}x']}}", push("cx"), false, ""},
		{"{push: {paths: ['**.go', '!vendor/**']}}", push("main", "README.md", "a.go"), true, `path "a.go"`},
		{"{push: {paths: ['**/*.go', '!vendor/**']}}", push("main", "a/b/c.go"), true, ""},
		{"{push: {paths: ['**/*.go', '!vendor/**']}}", push("main", "vendor/c.go", "README.md"), false, "none of 2"},
		{"{push: {paths: ['!docs/**']}}", push("main", "docs/a.md"), false, ""},
		{"{push: {paths: ['!docs/**']}}", push("main", "docs/a.md", "x"), true, ""},
		{"{push: {paths: ['**.go']}}", push("main"), true, ""}, // unknown
		{"{push: {paths: ['**.go']}}", workflow.Trigger{Kind: workflow.Push, Ref: "refs/heads/main", ChangedPaths: []string{}}, false, "none of 0"},
		{"{push: {branches: main, paths: a}}", push("x", "a"), false, "matches no pattern"},
		{"{pull_request: {branches: main}}", pr("main"), true, ""},
		{"{pull_request: {branches: main}}", pr("refs/heads/main"), true, ""},
		{"{pull_request: {branches: main}}", pr("dev"), false, `target branch "dev"`},
		{"{pull_request: {paths: src/**}}", pr("dev", "doc/x"), false, ""},
		{"{tag: {tags: ['v*', '!v0*']}}", tag("v1.0"), true, ""},
		{"{tag: {tags: ['v*', '!v0*']}}", tag("v0.1"), false, "excluded"},
		{"{manual: {inputs: {x: {}}}}", manual, true, ""},
		{"push", workflow.Trigger{Kind: "comet"}, false, "not a kind of event"},
	} {
		ok, why := withOn(t, c.on).Match(c.t)
		if ok != c.want || !strings.Contains(why, c.why) || why == "" {
			t.Errorf("on: %s, %+v: %v (%s), want %v (%s)", c.on, c.t, ok, why, c.want, c.why)
		}
	}
}

// TestMatchBroken: a file with errors still says which events it is for.
func TestMatchBroken(t *testing.T) {
	w, diags := workflow.Parse(workflow.File, []byte("on: tag\njobs:\n  test:\n    stepz: []\n"))
	if !diags.HasErrors() {
		t.Fatal("no error")
	}
	if ok, _ := w.Match(workflow.Trigger{Kind: workflow.Tag, Ref: "refs/tags/v1"}); !ok {
		t.Error("does not match a tag")
	}
	if ok, _ := w.Match(workflow.Trigger{Kind: workflow.Push, Ref: "refs/heads/main"}); ok {
		t.Error("matches a push")
	}
	w, _ = workflow.Parse(workflow.File, []byte("jobs: ["))
	if ok, _ := w.Match(workflow.Trigger{Kind: workflow.Push, Ref: "refs/heads/main"}); !ok {
		t.Error("a file that cannot be read matches what one without on does, so that its errors are seen")
	}
}

func TestIsFile(t *testing.T) {
	for p, want := range map[string]bool{
		".solstice/workflow.yaml": true, ".solstice/workflow.yml": false, ".solstice/workflows/a.yml": true, ".solstice/workflows/a.yaml": true,
		".solstice/workflows/.a.yaml": false, ".solstice/workflows/x/a.yaml": false, ".solstice/workflows/a.json": false, "workflow.yaml": false,
		"x/.solstice/workflow.yaml": false,
	} {
		if got := workflow.IsFile(p); got != want {
			t.Errorf("%s: %v", p, got)
		}
	}
}
