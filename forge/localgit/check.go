package localgit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/internal/checkup"
)

// Check implements forge.Checker.
func (f *Forge) Check(ctx context.Context, o forge.CheckOptions) ([]forge.Finding, error) {
	var l checkup.List
	l.Fine("git is %s, version %s", f.git.Path(), f.git.Version())
	if f.root != nil {
		if d, err := f.root.Open("."); err == nil {
			_, err = d.Readdirnames(1)
			_ = d.Close()
			if err != nil {
				l.Unseen("", "there is nothing in %s", f.root.Name())
			} else {
				l.Fine("the repositories are in %s", f.root.Name())
			}
		} else {
			l.Fail("let this user read the directory", "%s cannot be read: %v", f.root.Name(), err)
		}
	}
	if f.statusDir != "" {
		checkStatusDir(&l, f.statusDir)
	}
	if o.WebhookURL != "" {
		l.Unseen("", "repositories on this machine have no webhooks")
	}
	for _, r := range o.Repos {
		f.checkRepo(ctx, &l, r)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return l, nil
}

func (f *Forge) checkRepo(ctx context.Context, l *checkup.List, r forge.Repo) {
	name := r.FullName()
	repo, err := f.open(ctx, r)
	if err != nil {
		l.Fail("name one that is there, and that this user may read", "%s cannot be opened: %v", name, err)
		return
	}
	refs, err := f.git.Output(ctx, repo.in(), "for-each-ref", "--count=1", "--format=%(refname)")
	switch {
	case err != nil:
		l.Fail("see that this user may read all of "+repo.common+", and that git fsck finds nothing", "%s cannot be read: %v", name, err)
		return
	case len(refs) == 0:
		l.Unseen("push something", "%s is empty", name)
	default:
		l.Fine("%s is in %s", name, repo.common)
	}
	if f.statusDir == "" {
		checkStatusDir(l, filepath.Join(repo.common, "solstice", "statuses"))
	}
	hook := filepath.Join(repo.common, "hooks", "post-receive")
	switch st, err := os.Stat(hook); {
	case errors.Is(err, fs.ErrNotExist):
		l.Unseen("", "%s has no post-receive hook, so nothing says at once that it was pushed to", name)
	case err != nil:
		l.Warn("let this user read it", "%v", err)
	case st.Mode()&0o111 == 0 && runtime.GOOS != "windows":
		l.Warn("chmod +x "+hook, "git does not run the post-receive hook of %s, which may not be executed", name)
	default:
		l.Fine("%s has a post-receive hook", name)
	}
}

// checkStatusDir sees whether statuses can be written, by making an empty file
// that is gone again: permissions are not all that may forbid it.
func checkStatusDir(l *checkup.List, dir string) {
	at, err := existing(dir)
	if err == nil {
		var probe *os.File
		if probe, err = os.CreateTemp(at, ".solstice-check-*"); err == nil {
			err = errors.Join(probe.Close(), os.Remove(probe.Name()))
		}
	}
	if err != nil {
		l.Fail("let this user write there, or name another directory", "statuses cannot be written to %s: %v", dir, err)
		return
	}
	l.Fine("statuses are written to %s", dir)
}

// existing is the directory, or the one above it in which it would be made.
func existing(dir string) (string, error) {
	for {
		st, err := os.Stat(dir)
		switch {
		case err == nil && st.IsDir():
			return dir, nil
		case err == nil:
			return "", fmt.Errorf("%s is no directory", dir)
		case !errors.Is(err, fs.ErrNotExist) || filepath.Dir(dir) == dir:
			return "", err
		}
		dir = filepath.Dir(dir)
	}
}
