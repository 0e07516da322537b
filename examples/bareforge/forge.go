package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
)

// Forge is a directory of bare repositories: team/app is ROOT/team/app.git. It keeps
// nothing in memory, so that several processes may serve one root.
type Forge struct{ root string }

var (
	_ forge.Forge           = (*Forge)(nil)
	_ forge.HeadLister      = (*Forge)(nil)
	_ forge.ChangedPaths    = (*Forge)(nil)
	_ forge.Permissions     = (*Forge)(nil)
	_ forge.StatusForgetter = (*Forge)(nil)
	_ forge.Checker         = (*Forge)(nil)
)

// Open is of a directory that exists.
func Open(root string) (*Forge, error) {
	abs, err := filepath.Abs(root)
	if err == nil {
		abs, err = filepath.EvalSymlinks(abs)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", forge.ErrInvalid, err)
	}
	return &Forge{root: abs}, nil
}

// Capabilities implements forge.Forge.
func (f *Forge) Capabilities() forge.Capabilities {
	return forge.Capabilities{Webhooks: true, Statuses: true}
}

// Close implements forge.Forge.
func (f *Forge) Close() error { return nil }

// open gives a repository's directory. Every call begins here.
func (f *Forge) open(ctx context.Context, r forge.Repo) (repository, error) {
	if err := ctx.Err(); err != nil {
		return repository{}, err
	}
	if err := r.Validate(); err != nil {
		return repository{}, err
	}
	for part := range strings.SplitSeq(r.Owner, "/") {
		if strings.HasSuffix(strings.ToLower(part), ".git") { // within a repository
			return repository{}, fmt.Errorf("%w: repository %q", forge.ErrInvalid, r.FullName())
		}
	}
	dir := filepath.Join(f.root, filepath.FromSlash(r.FullName())+".git")
	if real, err := filepath.EvalSymlinks(dir); err != nil || real != dir { // absent, or a link to elsewhere
		return repository{}, fmt.Errorf("%w: repository %q", forge.ErrNotFound, r.FullName())
	}
	for _, name := range []string{"HEAD", "objects", "refs"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err != nil {
			return repository{}, fmt.Errorf("%w: repository %q", forge.ErrNotFound, r.FullName())
		}
	}
	return repository{name: r.FullName(), dir: dir}, nil
}

// at opens a repository that has the commit.
func (f *Forge) at(ctx context.Context, r forge.Repo, commit string) (repository, error) {
	repo, err := f.open(ctx, r)
	if err != nil {
		return repository{}, err
	}
	if !forge.IsCommit(commit) {
		return repository{}, fmt.Errorf("%w: commit %.80q", forge.ErrInvalid, commit)
	}
	_, err = repo.commit(ctx, commit)
	return repo, err
}

// Resolve implements forge.Forge.
func (f *Forge) Resolve(ctx context.Context, r forge.Repo, ref string) (string, error) {
	repo, err := f.open(ctx, r)
	if err != nil {
		return "", err
	}
	names := []string{"refs/tags/" + ref, "refs/heads/" + ref}
	switch {
	case forge.IsCommit(ref), forge.IsRef(ref):
		names = []string{ref}
	case !forge.IsRef(names[0]) || ref[0] == '-': // which git would take for an option, or an expression
		return "", fmt.Errorf("%w: ref %.80q", forge.ErrInvalid, ref)
	}
	for _, name := range names {
		commit, err := repo.commit(ctx, name)
		if !errors.Is(err, forge.ErrNotFound) {
			return commit, err
		}
	}
	return "", fmt.Errorf("%w: %q in %s", forge.ErrNotFound, ref, repo.name)
}

// checkPath refuses what is not a path in its shortest form, or leads to git's own.
func checkPath(path string) error {
	for part := range strings.SplitSeq(path, "/") {
		if part == "" || part == "." || part == ".." || strings.EqualFold(part, ".git") || strings.ContainsRune(part, 0) {
			return fmt.Errorf("%w: path %.80q", forge.ErrInvalid, path)
		}
	}
	return nil
}

// ReadFile implements forge.Forge.
func (f *Forge) ReadFile(ctx context.Context, r forge.Repo, commit, path string) ([]byte, error) {
	if err := checkPath(path); err != nil {
		return nil, err
	}
	repo, err := f.at(ctx, r, commit)
	if err != nil {
		return nil, err
	}
	found, err := repo.list(ctx, commit, path)
	switch {
	case err != nil:
		return nil, err
	case len(found) == 0:
		return nil, fmt.Errorf("%w: %q at %s", forge.ErrNotFound, path, commit)
	case !found[0].regular():
		return nil, fmt.Errorf("%w: %q is no regular file", forge.ErrInvalid, path)
	case found[0].size > forge.MaxFileBytes:
		return nil, fmt.Errorf("%w: %q has %d bytes", forge.ErrTooLarge, path, found[0].size)
	}
	return repo.git(ctx, "cat-file", "blob", found[0].object)
}

// ListFiles implements forge.Forge.
func (f *Forge) ListFiles(ctx context.Context, r forge.Repo, commit, dir string) ([]string, error) {
	if dir != "" {
		if err := checkPath(dir); err != nil {
			return nil, err
		}
		dir += "/"
	}
	repo, err := f.at(ctx, r, commit)
	if err != nil {
		return nil, err
	}
	found, err := repo.list(ctx, commit, dir)
	if err != nil {
		return nil, err
	}
	var names []string // git has them sorted
	for _, e := range found {
		if e.regular() {
			names = append(names, strings.TrimPrefix(e.path, dir))
		}
	}
	return names, nil
}

// CloneInfo implements forge.Forge: the directory, for orchestrators of this machine.
func (f *Forge) CloneInfo(ctx context.Context, r forge.Repo, _ forge.CloneOptions) (forge.Clone, error) {
	repo, err := f.open(ctx, r)
	if err != nil {
		return forge.Clone{}, err
	}
	return forge.Clone{Dir: repo.dir}, nil
}

// Heads implements forge.HeadLister.
func (f *Forge) Heads(ctx context.Context, r forge.Repo) (map[string]string, error) {
	repo, err := f.open(ctx, r)
	if err != nil {
		return nil, err
	}
	// Of an annotated tag the second name is the commit's.
	out, err := repo.git(ctx, "for-each-ref", "--format=%(refname) %(objectname) %(*objectname)", "refs/heads/", "refs/tags/")
	if err != nil {
		return nil, err
	}
	heads := map[string]string{}
	for line := range strings.Lines(string(out)) {
		if fields := strings.Fields(line); len(fields) > 1 {
			heads[fields[0]] = fields[len(fields)-1]
		}
	}
	return heads, nil
}

// ChangedPaths implements forge.ChangedPaths.
func (f *Forge) ChangedPaths(ctx context.Context, r forge.Repo, base, head string, limit int) (paths []string, truncated bool, err error) {
	repo, err := f.at(ctx, r, head)
	if err != nil {
		return nil, false, err
	}
	var out []byte
	if forge.IsCommit(base) && strings.Trim(base, "0") == "" { // a new branch: everything
		out, err = repo.git(ctx, "ls-tree", "-r", "-z", "--full-tree", "--name-only", head)
	} else if _, err = f.at(ctx, r, base); err == nil {
		out, err = repo.git(ctx, "diff-tree", "-r", "-z", "--no-renames", "--name-only", base, head)
	}
	if err != nil {
		return nil, false, err
	}
	for path := range strings.SplitSeq(string(out), "\x00") {
		if path == "" { // after the last one
			continue
		}
		if len(paths) == limit {
			return paths, true, nil
		}
		paths = append(paths, path)
	}
	return paths, false, nil
}

// MayApprove implements forge.Permissions: the file bareforge/approvers of a
// repository has one user's number per line.
func (f *Forge) MayApprove(ctx context.Context, r forge.Repo, u forge.User) (bool, error) {
	repo, err := f.open(ctx, r)
	if err != nil {
		return false, err
	}
	data, err := os.ReadFile(repo.own("approvers"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, err
	}
	for line := range strings.Lines(string(data)) {
		if id := strings.TrimSpace(line); id != "" && id == u.ID {
			return true, nil
		}
	}
	return false, nil
}

// Check implements forge.Checker: whether repositories are there, and where their
// webhooks go.
func (f *Forge) Check(ctx context.Context, o forge.CheckOptions) (found []forge.Finding, err error) {
	for _, r := range o.Repos {
		x := forge.Finding{Level: forge.LevelNotice, What: r.FullName() + " is there"}
		repo, err := f.open(ctx, r)
		script, _ := os.ReadFile(filepath.Join(repo.dir, "hooks", "post-receive"))
		switch {
		case err != nil:
			x = forge.Finding{
				Level: forge.LevelFailure, What: fmt.Sprintf("%s cannot be opened: %v", r.FullName(), err), Advice: "make it with bareforge init",
			}
		case o.WebhookURL != "" && !strings.Contains(string(script), quote(o.WebhookURL)):
			x = forge.Finding{
				Level: forge.LevelWarning, What: fmt.Sprintf("%s sends no webhooks to %s", r.FullName(), o.WebhookURL),
				Advice: "correct the URL in " + filepath.Join(repo.dir, "hooks", "post-receive"),
			}
		}
		found = append(found, x)
	}
	return found, ctx.Err()
}
