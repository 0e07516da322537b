package forgetest

import (
	"bytes"
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strings"
)

// Git is a bare repository on disk that a fixture fills, with the git program.
type Git struct{ Dir string }

// Run runs git in the repository, with an environment of its own, and gives what it
// printed, without the last line break.
func (g Git) Run(tb TB, stdin string, args ...string) string {
	tb.Helper()
	cmd := exec.CommandContext(tb.Context(), "git", args...)
	cmd.Dir, cmd.Stdin = g.Dir, strings.NewReader(stdin)
	cmd.Env = []string{
		"GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_TERMINAL_PROMPT=0", "HOME=/nonexistent", "PATH=/usr/local/bin:/usr/bin:/bin",
		"GIT_AUTHOR_NAME=A", "GIT_AUTHOR_EMAIL=a@example.org", "GIT_COMMITTER_NAME=A", "GIT_COMMITTER_EMAIL=a@example.org",
		"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*",
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		tb.Fatalf("git %s: %v: %s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return strings.TrimSuffix(stdout.String(), "\n")
}

// Init makes the repository.
func (g Git) Init(tb TB) {
	tb.Helper()
	Git{}.Run(tb, "", "init", "-q", "--bare", "-b", "main", "--", g.Dir)
}

// quoted are the characters that a quoted name of git-fast-import(1) escapes.
var quoted = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// Commit is Fixture.Commit; ref is a branch's name, or a full one.
func (g Git) Commit(tb TB, ref string, files map[string]File) string {
	tb.Helper()
	if !strings.HasPrefix(ref, "refs/") {
		ref = "refs/heads/" + ref
	}
	return g.commit(tb, ref, g.Run(tb, "", "for-each-ref", "--format=%(objectname)", ref), files)
}

// Branch makes a ref with one commit whose parent is another's tip.
func (g Git) Branch(tb TB, ref, from string, files map[string]File) string {
	tb.Helper()
	return g.commit(tb, ref, g.Run(tb, "", "rev-parse", "--verify", "-q", from+"^{commit}"), files)
}

func (g Git) commit(tb TB, ref, parent string, files map[string]File) string {
	tb.Helper()
	var in strings.Builder // for git fast-import, so that any name will do
	const seconds = 1_700_000_000
	fmt.Fprintf(&in, "commit %s\nmark :1\ncommitter A <a@example.org> %d +0000\ndata %d\n%s\n", ref, seconds, len(ref), ref)
	if parent != "" {
		fmt.Fprintf(&in, "from %s\n", parent)
	}
	in.WriteString("deleteall\n")
	for _, name := range slices.Sorted(maps.Keys(files)) {
		file := files[name]
		if file.Mode == "" {
			file.Mode = Regular
		}
		fmt.Fprintf(&in, "M %s inline \"%s\"\ndata %d\n%s\n", file.Mode, quoted.Replace(name), len(file.Content), file.Content)
	}
	in.WriteString("get-mark :1\n")
	return g.Run(tb, in.String(), "fast-import", "--quiet", "--date-format=raw")
}

// Tag is Fixture.Tag.
func (g Git) Tag(tb TB, name, commit string, annotated bool) {
	tb.Helper()
	if annotated {
		g.Run(tb, "", "tag", "-a", "-m", "a tag", "--", name, commit)
	} else {
		g.Run(tb, "", "tag", "--", name, commit)
	}
}
