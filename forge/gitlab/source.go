package gitlab

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"path"
	"slices"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/internal/rest"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// entry is one line of a tree as the API gives it.
type entry struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	Type string `json:"type"`
	Path string `json:"path"`
	Mode string `json:"mode"`
}

func (e entry) regular() bool { return e.Mode == "100644" || e.Mode == "100755" }

// dir lists a directory at a commit that there is; one that is not there has
// nothing, whether the API says 404 or gives an empty list.
func (f *Forge) dir(ctx context.Context, r forge.Repo, commit, name string) ([]entry, error) {
	key := r.FullName() + "@" + commit + ":" + name
	if all, ok := f.dirs.Get(key); ok {
		return all, nil
	}
	query := url.Values{"ref": {commit}}
	if name != "" {
		query.Set("path", name)
	}
	var all []entry
	err := pages(ctx, f, query, func(list []entry) bool {
		all = append(all, list...)
		return true
	}, in(r, "repository", "tree")...)
	if err != nil && !errors.Is(err, forge.ErrNotFound) {
		return nil, err
	}
	f.dirs.Put(key, all, len(all)+1)
	return all, nil
}

// ReadFile implements forge.Forge.
func (f *Forge) ReadFile(ctx context.Context, r forge.Repo, commit, name string) ([]byte, error) {
	if err := gitcmd.CheckPath(name); err != nil {
		return nil, fmt.Errorf("%w: %w", forge.ErrInvalid, err)
	}
	if err := f.commit(ctx, r, commit); err != nil {
		return nil, err
	}
	// The API's own way to a file says nothing of symbolic links.
	parent, base := path.Split(name)
	all, err := f.dir(ctx, r, commit, strings.TrimSuffix(parent, "/"))
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(all, func(e entry) bool { return e.Name == base })
	switch {
	case i < 0:
		return nil, fmt.Errorf("%w: %q at %s", forge.ErrNotFound, name, commit)
	case all[i].Mode == "120000":
		return nil, fmt.Errorf("%w: %q is a symbolic link, which is not followed", forge.ErrInvalid, name)
	case !all[i].regular():
		return nil, fmt.Errorf("%w: %q is not a regular file", forge.ErrInvalid, name)
	}
	var blob struct {
		Content  string `json:"content"`
		Encoding string `json:"encoding"`
		Size     int64  `json:"size"`
	}
	if _, err = f.api.Do(ctx, rest.Call{
		Path: in(r, "repository", "blobs", all[i].ID), Out: &blob, Max: 2 * forge.MaxFileBytes,
	}); err != nil {
		return nil, err
	}
	if blob.Size > forge.MaxFileBytes {
		return nil, fmt.Errorf("%w: %q has %d bytes", forge.ErrTooLarge, name, blob.Size)
	}
	data, err := base64.StdEncoding.DecodeString(blob.Content)
	if err != nil || blob.Encoding != "base64" || int64(len(data)) != blob.Size {
		return nil, fmt.Errorf("%w: gitlab: %d bytes of %q came, of %d, encoded as %.20q", forge.ErrUnavailable, len(data), name, blob.Size, blob.Encoding)
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
	if err := f.commit(ctx, r, commit); err != nil {
		return nil, err
	}
	all, err := f.dir(ctx, r, commit, dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range all {
		if e.regular() {
			names = append(names, e.Name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// ChangedPaths implements forge.ChangedPaths. What the forge cuts off (for its
// limits of diffs) is reported as truncated, as is an answer that is too large.
func (f *Forge) ChangedPaths(ctx context.Context, r forge.Repo, base, head string, limit int) ([]string, bool, error) {
	if limit < 0 {
		return nil, false, fmt.Errorf("%w: limit %d", forge.ErrInvalid, limit)
	}
	if err := f.commit(ctx, r, head); err != nil {
		return nil, false, err
	}
	if strings.Trim(base, "0") == "" && len(base) == len(head) {
		return f.allPaths(ctx, r, head, limit)
	}
	if err := f.commit(ctx, r, base); err != nil || base == head {
		return nil, false, err
	}
	var c struct {
		Diffs []struct {
			Old string `json:"old_path"`
			New string `json:"new_path"`
		} `json:"diffs"`
		Overflow bool `json:"compare_timeout"` // more than the forge shows
	}
	// Straight: from one to the other, and not from where they parted.
	err := f.get(ctx, &c, url.Values{"from": {base}, "to": {head}, "straight": {"true"}}, in(r, "repository", "compare")...)
	if errors.Is(err, forge.ErrTooLarge) {
		return nil, true, nil
	}
	if err != nil {
		return nil, false, err
	}
	var paths []string
	for _, d := range c.Diffs {
		paths = append(paths, d.Old, d.New)
	}
	slices.Sort(paths)
	paths = slices.Compact(paths)
	if len(paths) > limit {
		return paths[:limit], true, nil
	}
	return paths, c.Overflow, nil
}

// allPaths lists what is in a commit, which is in the order of paths.
func (f *Forge) allPaths(ctx context.Context, r forge.Repo, commit string, limit int) ([]string, bool, error) {
	var paths []string
	err := pages(ctx, f, url.Values{"ref": {commit}, "recursive": {"true"}}, func(list []entry) bool {
		for _, e := range list {
			if e.Type != "tree" {
				paths = append(paths, e.Path)
			}
		}
		return len(paths) <= limit
	}, in(r, "repository", "tree")...)
	if err != nil && !errors.Is(err, forge.ErrTooLarge) {
		return nil, false, err
	}
	slices.Sort(paths)
	if len(paths) > limit {
		return paths[:limit], true, nil
	}
	return paths, err != nil, nil
}
