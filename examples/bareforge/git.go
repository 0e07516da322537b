package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
)

// repository is one on disk.
type repository struct {
	name string // owner/name
	dir  string
}

// repoOf is of owner/name.
func repoOf(full string) forge.Repo {
	owner, name := path.Split(full)
	return forge.Repo{Owner: strings.TrimSuffix(owner, "/"), Name: name}
}

// own is a file of the forge itself, in the repository's directory.
func (r repository) own(name ...string) string {
	return filepath.Join(append([]string{r.dir, "bareforge"}, name...)...)
}

// environment is all that git gets: nothing of whoever started this process, which
// may be a git itself, and no configuration but the repository's own.
var environment = []string{
	"PATH=/usr/local/bin:/usr/bin:/bin", "HOME=/nonexistent", "LC_ALL=C", "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null",
	"GIT_TERMINAL_PROMPT=0", "GIT_NO_REPLACE_OBJECTS=1", "GIT_LITERAL_PATHSPECS=1", "GIT_OPTIONAL_LOCKS=0",
}

// git runs it and gives what it printed. Where ctx ended, that is the error.
func (r repository) git(ctx context.Context, args ...string) ([]byte, error) {
	// The repositories may be another user's.
	args = append([]string{"-c", "safe.directory=*", "-c", "core.fsmonitor=false", "--git-dir=" + r.dir}, args...)
	cmd := exec.CommandContext(ctx, "git", args...)
	cmd.Env = environment
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("git in %s: %w: %s", r.name, err, bytes.TrimSpace(said.Bytes()))
	}
	return out.Bytes(), nil
}

// commit gives the commit that a checked name names; a tag object's is what it tags.
func (r repository) commit(ctx context.Context, name string) (string, error) {
	out, err := r.git(ctx, "rev-parse", "--verify", "--quiet", "--end-of-options", name+"^{commit}")
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 1 {
		return "", fmt.Errorf("%w: %q in %s", forge.ErrNotFound, name, r.name)
	}
	return strings.TrimSpace(string(out)), err
}

// entry is a line of git ls-tree.
type entry struct {
	mode, object, path string
	size               int64
}

func (e entry) regular() bool { return e.mode == "100644" || e.mode == "100755" }

// list gives what stands at a path in a commit; with a slash at its end, or empty, in
// a directory.
func (r repository) list(ctx context.Context, commit, path string) ([]entry, error) {
	args := []string{"ls-tree", "-z", "--long", "--full-tree", commit, "--"}
	if path != "" {
		args = append(args, path)
	}
	out, err := r.git(ctx, args...)
	if err != nil {
		return nil, err
	}
	var all []entry
	for line := range strings.SplitSeq(string(out), "\x00") {
		head, name, ok := strings.Cut(line, "\t")
		fields := strings.Fields(head) // mode, type, object, size or "-"
		if !ok || len(fields) != 4 {
			continue
		}
		size, _ := strconv.ParseInt(fields[3], 10, 64)
		all = append(all, entry{mode: fields[0], object: fields[2], path: name, size: size})
	}
	return all, nil
}
