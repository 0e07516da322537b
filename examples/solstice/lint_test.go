package main

import (
	"encoding/json"
	"testing"

	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

func TestLint(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"good/.solstice/workflow.yaml":        green,
		"good/.solstice/workflows/other.yaml": hostile,
		"bad.yaml":                            "jobs:\n  a:\n    needs: b\n    stepz: []\n",
		"empty/README":                        "",
		"good/sub/sub/README":                 "",
		"good/.git":                           "gitdir: elsewhere\n", // as in a work tree of a work tree
	})
	for _, c := range []struct {
		name, dir string
		args      []string
		code      int
		stdout    string
	}{
		{"files of a repository", "good", nil, 0, "2 workflow files, no problems\n"},
		{"one file", "good", []string{workflowFile}, 0, "1 workflow file, no problems\n"},
		{"broken file", ".", []string{"bad.yaml"}, 1, "bad.yaml:4:5: error:"},
		{"good and broken", ".", []string{"good/" + workflowFile, "bad.yaml"}, 1, "   |     ^^^^^\n"},
		{"below the top of a repository", "good/sub/sub", nil, 0, "2 workflow files, no problems\n"},
		{"absent and broken", ".", []string{"absent.yaml", "bad.yaml"}, 2, "bad.yaml:4:5: error:"},
		{"no files", "empty", nil, 2, ""},
		{"absent file", ".", []string{"absent.yaml"}, 2, ""},
	} {
		r := newUser(t, dir+"/"+c.dir).solstice(append([]string{"lint"}, c.args...)...)
		has(t, c.name, r.stdout, c.stdout)
		if c.code == 2 {
			has(t, c.name, r.stderr, "error: ", "  try: ")
		}
		r.want(t, c.code)
	}

	u := newUser(t, dir)
	r := u.solstice("lint", "--json", "bad.yaml")
	var diags []workflow.Diagnostic
	if err := json.Unmarshal([]byte(r.stdout), &diags); err != nil || len(diags) < 2 {
		t.Fatalf("%v: %s", err, r.stdout)
	}
	for _, d := range diags {
		if d.Path != "bad.yaml" || d.Line == 0 || d.Column == 0 || d.Message == "" {
			t.Errorf("%+v", d)
		}
	}
	r.want(t, 1)
	r = u.solstice("lint", "--json", "good/"+workflowFile)
	if r.stdout != "[]\n" {
		t.Errorf("no diagnostics are %q", r.stdout)
	}
	r.want(t, 0)
}

func TestHelp(t *testing.T) {
	t.Parallel()
	u := newUser(t, t.TempDir())
	r := u.solstice("run", "--help")
	has(t, "help", r.stdout, "--dirty", "--pool=LABEL=PROVIDER", "exit status", "130")
	r.want(t, 0)
	r = u.solstice()
	has(t, "stderr", r.stderr, "run", "lint", "--help")
	r.want(t, 2)
}
