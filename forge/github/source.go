package github

import (
	"context"
	"fmt"
	"slices"
	"strings"

	gh "github.com/google/go-github/v88/github"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

const (
	perPage = 100
	// maxCompared is how many files a comparison lists at most:
	// https://docs.github.com/rest/commits/commits#compare-two-commits
	maxCompared = 300
	maxPages    = 1000 // of one list: 100,000 entries
	maxPeel     = 5    // tags of tags
)

// Resolve implements forge.Forge. Where a branch and a tag share a name the tag
// wins, as it does in git.
func (f *Forge) Resolve(ctx context.Context, r forge.Repo, ref string) (string, error) {
	repo, err := f.open(ctx, r)
	if err != nil {
		return "", err
	}
	if err := gitcmd.CheckRef(ref); err != nil {
		return "", fmt.Errorf("%w: %w", forge.ErrInvalid, err)
	}
	if gitcmd.CheckObject(ref) == nil {
		if _, _, err = repo.Git.GetCommit(ctx, repo.owner, repo.name, ref); err == nil {
			return ref, nil
		}
		if err = fail(ctx, err, "look for commit %s in %s", ref, r.FullName()); !isNotFound(err) {
			return "", err
		}
		return repo.peel(ctx, "tag", ref)
	}
	names := []string{ref}
	if !strings.HasPrefix(ref, "refs/") {
		names = []string{"refs/tags/" + ref, "refs/heads/" + ref}
	}
	for _, name := range names {
		found, _, err := repo.Git.GetRef(ctx, repo.owner, repo.name, name)
		if err == nil && found.GetRef() == name {
			return repo.peel(ctx, found.GetObject().GetType(), found.GetObject().GetSHA())
		}
		if err = fail(ctx, err, "look for %s in %s", name, r.FullName()); err != nil && !isNotFound(err) {
			return "", err
		}
	}
	return "", fmt.Errorf("%w: %q in %s, or the repository is not to be seen with these credentials", forge.ErrNotFound, ref, r.FullName())
}

// peel gives the commit that an object is, or is a tag of.
func (r repository) peel(ctx context.Context, kind, object string) (string, error) {
	for range maxPeel {
		if kind != "tag" {
			break
		}
		tag, _, err := r.Git.GetTag(ctx, r.owner, r.name, object)
		if err != nil {
			return "", fail(ctx, err, "read tag %s of %s/%s", object, r.owner, r.name)
		}
		kind, object = tag.GetObject().GetType(), tag.GetObject().GetSHA()
	}
	if kind != "commit" || gitcmd.CheckObject(object) != nil {
		return "", fmt.Errorf("%w: a commit; it is a %.20q", forge.ErrNotFound, kind)
	}
	return object, nil
}

// tree gives the object name of a commit's root.
func (r repository) tree(ctx context.Context, commit string) (string, error) {
	if err := gitcmd.CheckObject(commit); err != nil {
		return "", fmt.Errorf("%w: %w", forge.ErrInvalid, err)
	}
	c, _, err := r.Git.GetCommit(ctx, r.owner, r.name, commit)
	if err == nil {
		err = gitcmd.CheckObject(c.GetTree().GetSHA())
	}
	return c.GetTree().GetSHA(), fail(ctx, err, "read commit %s of %s/%s", commit, r.owner, r.name)
}

// entries lists one tree. The contents API would be fewer requests, but follows
// symbolic links.
func (r repository) entries(ctx context.Context, tree string) (*gh.Tree, error) {
	t, _, err := r.Git.GetTree(ctx, r.owner, r.name, tree, false)
	if err != nil {
		return nil, fail(ctx, err, "read tree %s of %s/%s", tree, r.owner, r.name)
	}
	return t, nil
}

// find gives the entry of a path below a tree; nil where there is none.
func (r repository) find(ctx context.Context, tree, name string) (*gh.TreeEntry, error) {
	for {
		part, rest, more := strings.Cut(name, "/")
		t, err := r.entries(ctx, tree)
		if err != nil {
			return nil, err
		}
		i := slices.IndexFunc(t.Entries, func(e *gh.TreeEntry) bool { return e.GetPath() == part })
		switch {
		case i < 0 && t.GetTruncated():
			return nil, fmt.Errorf("%w: the directory of %q has more files than GitHub lists", forge.ErrTooLarge, part)
		case i < 0:
			return nil, nil
		case !more:
			return t.Entries[i], nil
		case t.Entries[i].GetType() != "tree":
			return nil, nil // below what is no directory
		}
		tree, name = t.Entries[i].GetSHA(), rest
	}
}

func regular(e *gh.TreeEntry) bool {
	return e.GetType() == "blob" && strings.HasPrefix(e.GetMode(), "100")
}

// ReadFile implements forge.Forge.
func (f *Forge) ReadFile(ctx context.Context, r forge.Repo, commit, name string) ([]byte, error) {
	if err := gitcmd.CheckPath(name); err != nil {
		return nil, fmt.Errorf("%w: %w", forge.ErrInvalid, err)
	}
	repo, err := f.open(ctx, r)
	if err != nil {
		return nil, err
	}
	tree, err := repo.tree(ctx, commit)
	if err != nil {
		return nil, err
	}
	e, err := repo.find(ctx, tree, name)
	switch {
	case err != nil:
		return nil, err
	case e == nil:
		return nil, fmt.Errorf("%w: %q at %s in %s", forge.ErrNotFound, name, commit, r.FullName())
	case e.GetMode() == "120000":
		return nil, fmt.Errorf("%w: %q is a symbolic link, which is not followed", forge.ErrInvalid, name)
	case !regular(e):
		return nil, fmt.Errorf("%w: %q is not a regular file", forge.ErrInvalid, name)
	case e.GetSize() > forge.MaxFileBytes:
		return nil, fmt.Errorf("%w: %q has %d bytes", forge.ErrTooLarge, name, e.GetSize())
	}
	data, _, err := repo.Git.GetBlobRaw(ctx, repo.owner, repo.name, e.GetSHA())
	if err != nil {
		return nil, fail(ctx, err, "read %q of %s", name, r.FullName())
	}
	if len(data) > forge.MaxFileBytes {
		return nil, fmt.Errorf("%w: %q has %d bytes", forge.ErrTooLarge, name, len(data))
	}
	return data, nil
}

// ListFiles implements forge.Forge.
func (f *Forge) ListFiles(ctx context.Context, r forge.Repo, commit, dir string) ([]string, error) {
	if dir != "" {
		if err := gitcmd.CheckPath(dir); err != nil {
			return nil, fmt.Errorf("%w: %w", forge.ErrInvalid, err)
		}
	}
	repo, err := f.open(ctx, r)
	if err != nil {
		return nil, err
	}
	tree, err := repo.tree(ctx, commit)
	if err != nil {
		return nil, err
	}
	if dir != "" {
		e, err := repo.find(ctx, tree, dir)
		if err != nil || e == nil || e.GetType() != "tree" {
			return nil, err
		}
		tree = e.GetSHA()
	}
	t, err := repo.entries(ctx, tree)
	if err != nil {
		return nil, err
	}
	if t.GetTruncated() {
		return nil, fmt.Errorf("%w: the directory %q has more files than GitHub lists", forge.ErrTooLarge, dir)
	}
	var names []string
	for _, e := range t.Entries {
		if regular(e) {
			names = append(names, e.GetPath())
		}
	}
	slices.Sort(names)
	return names, nil
}

// pages calls list for every page there is.
func pages(list func(gh.ListOptions) (*gh.Response, error)) error {
	for o := (gh.ListOptions{PerPage: perPage}); ; {
		resp, err := list(o)
		if err != nil {
			return err
		}
		if resp.NextPage <= o.Page {
			return nil
		}
		if resp.NextPage > maxPages {
			return fmt.Errorf("%w: a list of more than %d entries", forge.ErrTooLarge, maxPages*perPage)
		}
		o.Page = resp.NextPage
	}
}

// Heads implements forge.HeadLister. Tags of other things than commits are left out.
func (f *Forge) Heads(ctx context.Context, r forge.Repo) (map[string]string, error) {
	repo, err := f.open(ctx, r)
	if err != nil {
		return nil, err
	}
	heads := map[string]string{}
	// These lists have the commits of annotated tags, which that of refs has not.
	err = pages(func(o gh.ListOptions) (*gh.Response, error) {
		branches, resp, err := repo.Repositories.ListBranches(ctx, repo.owner, repo.name, &gh.BranchListOptions{ListOptions: o})
		for _, b := range branches {
			heads["refs/heads/"+b.GetName()] = b.GetCommit().GetSHA()
		}
		return resp, err
	})
	if err == nil {
		err = pages(func(o gh.ListOptions) (*gh.Response, error) {
			tags, resp, err := repo.Repositories.ListTags(ctx, repo.owner, repo.name, &o)
			for _, t := range tags {
				heads["refs/tags/"+t.GetName()] = t.GetCommit().GetSHA()
			}
			return resp, err
		})
	}
	if err != nil {
		return nil, fail(ctx, err, "list the heads of %s", r.FullName())
	}
	for ref, commit := range heads {
		if gitcmd.CheckRef(ref) != nil || gitcmd.CheckObject(commit) != nil {
			delete(heads, ref)
		}
	}
	return heads, nil
}

// ChangedPaths implements forge.ChangedPaths. GitHub's comparison is one with the
// merge base and ends after 300 files: where it does not say everything, both
// trees are read.
func (f *Forge) ChangedPaths(ctx context.Context, r forge.Repo, base, head string, limit int) ([]string, bool, error) {
	if limit < 0 {
		return nil, false, fmt.Errorf("%w: limit %d", forge.ErrInvalid, limit)
	}
	repo, err := f.open(ctx, r)
	if err != nil {
		return nil, false, err
	}
	for _, c := range []string{base, head} {
		if err := gitcmd.CheckObject(c); err != nil {
			return nil, false, fmt.Errorf("%w: %w", forge.ErrInvalid, err)
		}
	}
	paths := map[string]bool{}
	empty := strings.Trim(base, "0") == ""
	if !empty {
		whole, err := repo.compare(ctx, base, head, paths)
		if err != nil && !isNotFound(err) { // which is also said of histories without a common commit
			return nil, false, err
		}
		if whole {
			changed, cut := first(paths, limit)
			return changed, cut, nil
		}
	}
	before, after := map[string]string{}, map[string]string{}
	whole := true
	if !empty {
		if whole, err = repo.list(ctx, base, before); err != nil {
			return nil, false, err
		}
	}
	wholeToo, err := repo.list(ctx, head, after)
	if err != nil {
		return nil, false, err
	}
	if !whole || !wholeToo { // then what is missing is not known to be gone
		if empty {
			for name := range after {
				paths[name] = true
			}
		}
		changed, _ := first(paths, limit)
		return changed, true, nil
	}
	clear(paths)
	for name, e := range before {
		if after[name] != e {
			paths[name] = true
		}
	}
	for name := range after {
		if _, ok := before[name]; !ok {
			paths[name] = true
		}
	}
	changed, cut := first(paths, limit)
	return changed, cut, nil
}

// first gives the first of the paths.
func first(paths map[string]bool, limit int) (changed []string, cut bool) {
	for name := range paths {
		changed = append(changed, name)
	}
	slices.Sort(changed)
	return changed[:min(limit, len(changed))], len(changed) > limit
}

// compare adds what GitHub says has changed, and whether that is the difference
// of the two and all of it.
func (r repository) compare(ctx context.Context, base, head string, paths map[string]bool) (whole bool, err error) {
	// Files are all on the first page; its commits are not wanted.
	c, _, err := r.Repositories.CompareCommits(ctx, r.owner, r.name, base, head, &gh.ListOptions{PerPage: 1})
	if err != nil {
		return false, fail(ctx, err, "compare %s with %s in %s/%s", base, head, r.owner, r.name)
	}
	if c.GetStatus() == "behind" || c.GetStatus() == "diverged" {
		return false, nil
	}
	for _, file := range c.Files {
		paths[file.GetFilename()] = true
		if file.GetStatus() == "renamed" {
			paths[file.GetPreviousFilename()] = true
		}
	}
	return len(c.Files) < maxCompared, nil
}

// list adds every file of a commit, and whether that is all; GitHub stops at
// 100,000 entries or 7 MB.
func (r repository) list(ctx context.Context, commit string, files map[string]string) (whole bool, err error) {
	tree, err := r.tree(ctx, commit)
	if err != nil {
		return false, err
	}
	t, _, err := r.Git.GetTree(ctx, r.owner, r.name, tree, true)
	if err != nil {
		return false, fail(ctx, err, "list the files of %s in %s/%s", commit, r.owner, r.name)
	}
	for _, e := range t.Entries {
		if e.GetType() != "tree" {
			files[e.GetPath()] = e.GetMode() + e.GetSHA()
		}
	}
	return !t.GetTruncated(), nil
}
