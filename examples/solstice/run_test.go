package main

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const green = `
name: check
on:
  push: {}
  manual:
    inputs:
      level: { type: choice, options: [quick, full], default: quick }
      count: { type: number, default: 3 }
jobs:
  build:
    steps:
      - name: compile
        run: echo compiled
      - name: silent
        run: "true"
      - id: v
        name: version
        env: { LEVEL: "${{ inputs.level }}", COUNT: "${{ inputs.count }}" }
        run: |
          echo "level $LEVEL count $COUNT"
          echo "version=1.2" >> "$SOLSTICE_OUTPUT"
      - name: no line break
        run: printf partial
    outputs:
      version: ${{ steps.v.outputs.version }}
  test:
    needs: build
    matrix: { os: [one, two] }
    env: { NAME: "${{ matrix.os }}", VERSION: "${{ needs.build.outputs.version }}" }
    steps:
      - name: unit
        run: echo "testing $VERSION on $NAME"
  report:
    needs: [build, test]
    checkout: false
    steps:
      - name: say
        run: echo all is well
`

func TestGreen(t *testing.T) {
	t.Parallel()
	r := newUser(t, workflowRepo(t, green)).solstice("run", "--input", "level=full", "--input", "count=7")
	has(t, "stdout", r.stdout, "testing 1.2 on one", "testing 1.2 on two", "✓ check succeeded in ", "✓ report")
	if strings.Contains(r.stdout, "\x1b") {
		t.Error("escape sequences in a pipe")
	}
	want := []string{
		"▸ checkout", "*", "· checkout succeeded",
		"▸ compile", "compiled", "· compile succeeded",
		"▸ silent", "· silent succeeded",
		"▸ version", "level full count 7", "· version succeeded",
		"▸ no line break", "partial", "· no line break succeeded",
	}
	got := linesOf(r.stdout, "build")
	if i := slices.Index(got, "· checkout succeeded"); i > 0 { // what git says is git's affair
		got = slices.Replace(got, 1, i, "*")
	}
	if !slices.Equal(got, want) {
		t.Errorf("job build printed\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if got := linesOf(r.stdout, "report"); !slices.Equal(got, []string{"▸ say", "all is well", "· say succeeded"}) {
		t.Errorf("job report printed %q", got)
	}
	if r.stderr != "" {
		t.Errorf("stderr: %s", r.stderr)
	}
	r.want(t, 0)
}

func TestFailingStep(t *testing.T) {
	t.Parallel()
	r := newUser(t, workflowRepo(t, `
jobs:
  good: { checkout: false, steps: [{ name: fine, run: echo fine }] }
  bad:
    checkout: false
    steps:
      - { name: before, run: echo not this }
      - { name: tolerated, run: exit 9, continue-on-error: true }
      - { name: unit tests, run: "for i in $(seq 30); do echo line $i; done; echo 'assert: 1 is not 2'; exit 3" }
      - { name: after, if: always(), run: echo nor this }
      - { name: never, run: echo never }
  killed: { checkout: false, steps: [{ name: suicide, run: kill -KILL $$ }] }
  dependent: { needs: bad, steps: [{ run: echo never }] }
`)).solstice("run")
	_, summary, _ := strings.Cut(r.stdout, "\n\n")
	has(t, "summary", summary, "✗ workflow failed in ", "✓ good", "✗ bad", "- dependent",
		"bad: step \"unit tests\" failed, exit status 3\n    line 12\n", "    assert: 1 is not 2\n", "killed: step \"suicide\" failed, ended by SIGKILL")
	if strings.Contains(summary, "this") || strings.Contains(summary, "line 11\n") {
		t.Errorf("the summary has more than the last lines of the step:\n%s", summary)
	}
	has(t, "stdout", r.stdout, "· tolerated failed in", "the job goes on", "nor this")
	if strings.Contains(r.stdout, "echo never") || slices.Contains(linesOf(r.stdout, "bad"), "never") {
		t.Error("a step ran after a failure")
	}
	r.want(t, 1)
}

// TestWhySkipped: a condition that is true as it reads, and one that is not.
func TestWhySkipped(t *testing.T) {
	t.Parallel()
	dir := workflowRepo(t, `
checkout: false
jobs:
  a: { steps: [{ run: exit 1 }] }
  implicit: { needs: a, if: needs.a.result == 'failure', steps: [{ run: echo }] }
  untrue: { needs: a, if: "always() && needs.a.result == 'success'", steps: [{ run: echo }] }
  asked: { needs: a, if: "failure() && needs.a.result == 'failure'", steps: [{ run: echo }] }
`)
	r := newUser(t, dir).solstice("run")
	has(t, "stdout", r.stdout, "asks for success(): needs.a.result == 'failure'\n", "its condition is false: always() && needs.a.result == 'success'\n", "✓ asked ")
	r.want(t, 1)
}

func TestCouldNotRun(t *testing.T) {
	t.Parallel()
	broken := workflowRepo(t, "jobs:\n  a:\n    needs: b\n    stepz: []\n")
	fine := workflowRepo(t, green)
	labelled := workflowRepo(t, "jobs:\n  a: { runs-on: illumos, checkout: false, steps: [{ run: echo on illumos }] }\n")
	tagged := workflowRepo(t, "on: { tag: {} }\njobs:\n  a: { steps: [{ run: echo }] }\n")
	unborn := t.TempDir()
	git(t, unborn, "init", "-q")
	full := t.TempDir()
	write(t, full, map[string]string{"kept": ""})
	for _, c := range []struct {
		name, dir string
		args      []string
		stderr    []string
	}{
		{"broken workflow", broken, nil, []string{workflowFile + ":4:5: error:", " 4 |     stepz: []\n   |     ^^^^^\n", `"b"`, "nothing was run"}},
		{"no repository", t.TempDir(), nil, []string{"not in a git repository", "--repo URL"}},
		{"no commit", unborn, nil, []string{"no commits yet", "--dirty"}},
		{"no workflow", repository(t, map[string]string{"README": ""}), nil, []string{"there is nothing to run", "docs/workflows.md"}},
		{"nothing concerned", tagged, nil, []string{"a push to refs/heads/main"}},
		{"unmapped label", labelled, nil, []string{`job a runs on "illumos"`, "--pool illumos=process"}},
		{"unknown provider", labelled, []string{"--pool", "illumos=kvm"}, []string{`no provider "kvm"`, "LABEL=process"}},
		{"pool without provider", labelled, []string{"--pool", "illumos"}, []string{"--pool", `"<key>=<value>"`}},
		{"unknown flag", fine, []string{"--bogus"}, []string{"--bogus", "--help"}},
		{"variable not set", fine, []string{"--env", "NOT_SET_AT_ALL"}, []string{"NOT_SET_AT_ALL", "no such variable"}},
		{"variable with a value", fine, []string{"--env", "A=b"}, []string{"--env takes a name"}},
		{"input of another type", fine, []string{"--input", "count=many"}, []string{"count", `"many"`, "^"}},
		{"unknown input", fine, []string{"--input", "x=y"}, []string{`"x"`, "level"}},
		{"unknown job", fine, []string{"--job", "biuld"}, []string{`"biuld"`, "build"}},
		{"unknown workflow", fine, []string{"nope"}, []string{`"nope"`, workflowFile}},
		{"name of a broken workflow", repository(t, map[string]string{
			".solstice/workflows/a.yaml": "name: wanted\njobs: [\n", ".solstice/workflows/b.yaml": "name: other\njobs: {}\n", ".solstice/workflows/c.yml": green,
		}), []string{"wanted"}, []string{"a.yaml (which has errors)", "c.yml (check)"}},
		{"stem of a broken workflow", repository(t, map[string]string{".solstice/workflows/a.yaml": "name: wanted\njobs: [\n"}), []string{"a"}, []string{"a.yaml:2:", "nothing was run"}},
		{"unknown ref", fine, []string{"--ref", "nope"}, []string{"nope"}},
		{"unreachable repository", fine, []string{"--repo", filepath.Join(fine, "nowhere")}, []string{"cannot fetch"}},
		{"relative repository", fine, []string{"--repo", "./x"}, []string{"cannot fetch ./x", "an absolute path"}},
		{"unknown ref of a repository", fine, []string{"--repo", fine, "--ref", "nope"}, []string{`"nope"`, "give a --ref"}},
		{"state in the work tree", fine, []string{"--state-dir", "state"}, []string{"inside the work tree", "outside of it"}},
		{"dirty with ref", fine, []string{"--dirty", "--ref", "main"}, []string{"exclude each other"}},
		{"used state directory", fine, []string{"--state-dir", full}, []string{"not empty"}},
		{"log level", fine, []string{"--log-level", "loud"}, []string{"--log-level"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newUser(t, c.dir).solstice(append([]string{"run"}, c.args...)...)
			has(t, "stderr", r.stderr, c.stderr...)
			if r.stdout != "" {
				t.Errorf("stdout: %s", r.stdout)
			}
			r.want(t, 2)
		})
	}
	t.Run("mapped label", func(t *testing.T) {
		r := newUser(t, labelled).solstice("run", "--pool", "illumos=process")
		has(t, "stdout", r.stdout, "on illumos")
		r.want(t, 0)
	})
}

func TestOneJobAndWhatItNeeds(t *testing.T) {
	t.Parallel()
	r := newUser(t, workflowRepo(t, `
jobs:
  a: { checkout: false, steps: [{ run: echo this is a }] }
  b: { needs: a, checkout: false, steps: [{ run: echo this is b }] }
  c: { needs: b, checkout: false, steps: [{ run: echo this is c }] }
  d: { checkout: false, steps: [{ run: echo this is d }] }
`)).solstice("run", "--job", "b")
	has(t, "stdout", r.stdout, "this is a", "this is b")
	if strings.Contains(r.stdout, "this is c") || strings.Contains(r.stdout, "this is d") {
		t.Errorf("more ran than was asked for:\n%s", r.stdout)
	}
	r.want(t, 0)
}

const cat = "jobs:\n  a: { steps: [{ run: 'cat tracked; if [ -e new ]; then cat new; fi; if [ -e ignored ]; then echo IGNORED; fi' }] }\n"

func TestDirtyLeavesTheRepositoryAlone(t *testing.T) {
	t.Parallel()
	dir := repository(t, map[string]string{workflowFile: cat, "tracked": "committed\n", ".gitignore": "ignored\n"})
	write(t, dir, map[string]string{"tracked": "changed\n", "new": "untracked\n", "ignored": "x"})
	before := contents(t, filepath.Join(dir, ".git"))
	u := newUser(t, dir)

	r := u.solstice("run", "--dirty")
	has(t, "stdout", r.stdout, "| changed\n", "| untracked\n")
	if strings.Contains(r.stdout, "IGNORED") {
		t.Error("an ignored file was taken along")
	}
	r.want(t, 0)

	r = u.solstice("run")
	has(t, "stdout", r.stdout, "| committed\n")
	if strings.Contains(r.stdout, "| untracked\n") {
		t.Error("an untracked file was taken along without --dirty")
	}
	r.want(t, 0)
	if after := contents(t, filepath.Join(dir, ".git")); after != before {
		t.Error("the repository was changed")
	}
	if status := git(t, dir, "status", "--porcelain"); status != "M tracked\n?? new" {
		t.Errorf("status: %q", status)
	}
}

// contents is a digest of all names and files below dir.
func contents(t *testing.T, dir string) string {
	t.Helper()
	h := sha256.New()
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(name)
		fmt.Fprintf(h, "%s %x\n", name, sha256.Sum256(b))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

func TestRepoAndRef(t *testing.T) {
	t.Parallel()
	dir := repository(t, map[string]string{workflowFile: cat, "tracked": "first\n"})
	git(t, dir, "tag", "v1")
	git(t, dir, "checkout", "-q", "-b", "topic")
	write(t, dir, map[string]string{"tracked": "second\n"})
	commit(t, dir)
	second := git(t, dir, "rev-parse", "HEAD")
	git(t, dir, "checkout", "-q", "main")
	elsewhere := newUser(t, t.TempDir())
	here := newUser(t, dir)
	for _, c := range []struct {
		u    *user
		args []string
		want string
	}{
		{elsewhere, []string{"--repo", dir}, "first"},
		{elsewhere, []string{"--repo", "file://" + dir, "--ref", "topic"}, "second"},
		{elsewhere, []string{"--repo", dir, "--ref", "v1"}, "first"},
		{elsewhere, []string{"--repo", dir, "--ref", second}, "second"},
		{here, []string{"--ref", "topic"}, "second"},
		{here, []string{"--ref", second}, "second"},
	} {
		r := c.u.solstice(append([]string{"run"}, c.args...)...)
		has(t, fmt.Sprintf("run %q", c.args), r.stdout, "| "+c.want+"\n")
		r.want(t, 0)
	}
}

func TestStepsSeeWhatIsPassedOn(t *testing.T) {
	t.Parallel()
	u := newUser(t, workflowRepo(t, "jobs:\n  a: { checkout: false, steps: [{ run: 'echo \"[$GIVEN] [$WITHHELD]\"' }] }\n"))
	cmd := u.command("run", "--env", "GIVEN")
	cmd.Env = append(cmd.Env, "GIVEN=yes", "WITHHELD=secret")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Error(err)
	}
	has(t, "output", string(out), "| [yes] []")
}

func TestStateIsKept(t *testing.T) {
	t.Parallel()
	state := filepath.Join(t.TempDir(), "new", "state")
	r := newUser(t, workflowRepo(t, green)).solstice("run", "--job", "build", "--state-dir", state)
	r.want(t, 0)
	found := false
	err := filepath.WalkDir(filepath.Join(state, "logs"), func(name string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			b, readErr := os.ReadFile(name)
			found, err = found || strings.Contains(string(b), "compiled"), readErr
		}
		return err
	})
	if err != nil || !found {
		t.Errorf("no log in the state directory (%v)", err)
	}
}
