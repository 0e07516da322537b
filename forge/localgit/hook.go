package localgit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
)

// hookMark is how a hook of ours begins, by which it is known.
const hookMark = "#!/bin/sh\n# Made by Solstice, which replaces it as a whole: do not change it.\n"

// HookOptions says what a hook does.
type HookOptions struct {
	// Command is the program, by an absolute path, and its arguments. It is run in
	// the git directory, with git's lines on its standard input. Whoever reads the
	// repository reads it: there are no secrets in it.
	Command []string
	// Git is the git program; empty: looked for in the search path.
	Git string
}

// HookError says that the repository has a post-receive hook that is not ours.
type HookError struct {
	Path string
	Line string // of sh, to be added to it, with what git wrote as its standard input
}

// Error implements error.
func (e *HookError) Error() string {
	return fmt.Sprintf("localgit: %s is there already, and is not Solstice's", e.Path)
}

// InstallHook makes the post-receive hook of the repository that dir is in, or
// replaces the one that it made before, at once as a whole; its path is where git
// looks for hooks by the repository's own configuration (core.hooksPath). It gives a
// *HookError rather than replace another hook, and wraps forge.ErrInvalid and
// forge.ErrNotFound.
func InstallHook(ctx context.Context, dir string, o HookOptions) (path string, err error) {
	if len(o.Command) == 0 || !filepath.IsAbs(o.Command[0]) {
		return "", fmt.Errorf("%w: the hook's program needs an absolute path", forge.ErrInvalid)
	}
	var words []string
	for _, w := range o.Command {
		if strings.ContainsFunc(w, func(c rune) bool { return c < ' ' || c == 0x7f }) {
			return "", fmt.Errorf("%w: control characters in the hook's command: %.80q", forge.ErrInvalid, w)
		}
		words = append(words, "'"+strings.ReplaceAll(w, "'", `'\''`)+"'")
	}
	line := strings.Join(words, " ")
	git, err := findGit(ctx, o.Git)
	if err != nil {
		return "", err
	}
	at, err := locate(ctx, git, dir)
	if err != nil {
		return "", err
	}
	hooks, err := (&snapshot{git: git, from: at}).ask(ctx, "config", "--local", "--includes", "--get", "core.hooksPath")
	switch {
	case err != nil:
		return "", err
	case hooks == "":
		hooks = "hooks"
	case hooks[0] == '~' || hooks[0] == '%':
		return "", fmt.Errorf("%w: core.hooksPath is %q: only an absolute path, or one from the git directory, is the same for everybody", forge.ErrInvalid, hooks)
	}
	if !filepath.IsAbs(hooks) {
		hooks = filepath.Join(at.commonDir, hooks)
	}
	path = filepath.Join(hooks, "post-receive")
	if err := writeHook(path, hookMark+"exec "+line+"\n"); errors.Is(err, errForeign) {
		return "", &HookError{Path: path, Line: line}
	} else if err != nil {
		return "", fmt.Errorf("localgit: install the hook: %w", err)
	}
	return path, nil
}

var errForeign = errors.New("another hook is there")

// writeHook makes the file, or replaces one of ours.
func writeHook(path, script string) error {
	ours, err := isOurs(path)
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, ".post-receive-")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(tmp.Name()) }()
	_, err = tmp.WriteString(script)
	if err := errors.Join(err, tmp.Chmod(0o755), tmp.Sync(), tmp.Close()); err != nil { //nolint:gosec // a program
		return err
	}
	if ours {
		err = os.Rename(tmp.Name(), path)
	} else if err = os.Link(tmp.Name(), path); errors.Is(err, fs.ErrExist) { // made meanwhile
		err = errForeign
	}
	return errors.Join(err, syncDir(dir))
}

// isOurs is false where there is no hook; another's wraps errForeign.
func isOurs(path string) (bool, error) {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if !st.Mode().IsRegular() {
		return false, errForeign
	}
	data, err := os.ReadFile(path)
	if err == nil && !strings.HasPrefix(string(data), hookMark) {
		err = errForeign
	}
	return err == nil, err
}
