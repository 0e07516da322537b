package forgejo

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/internal/rest"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// maxPages bounds what is read page by page.
const maxPages = 1000

func unmarshal(data []byte, v any) error { return json.Unmarshal(data, v) }

func pageQuery(page int, size string, n int) url.Values {
	return url.Values{"page": {strconv.Itoa(page)}, size: {strconv.Itoa(n)}}
}

// entry is one line of a tree (modules/structs/git_tree.go of Gitea).
type entry struct {
	Path string `json:"path"`
	Mode string `json:"mode"`
	Size int64  `json:"size"`
	SHA  string `json:"sha"`
}

func (e entry) regular() bool   { return e.Mode == "100644" || e.Mode == "100755" }
func (e entry) directory() bool { return e.Mode == "040000" }

// key under which trees are compared: git sorts directories as if they had a
// slash at their end, which is also the order of the paths below them.
func (e entry) key() string {
	if e.directory() {
		return e.Path + "/"
	}
	return e.Path
}

type commitInfo struct {
	SHA    string `json:"sha"`
	Commit struct {
		Tree object `json:"tree"`
	} `json:"commit"`
}

// lookUp asks for a commit by its name, or that of a tag's object.
func (f *Forge) lookUp(ctx context.Context, r forge.Repo, name string) (commitInfo, error) {
	var c commitInfo
	// Without what is expensive and not wanted.
	q := url.Values{"stat": {"false"}, "verification": {"false"}, "files": {"false"}}
	if err := f.get(ctx, &c, q, in(r, "git", "commits", name)...); err != nil {
		return c, err
	}
	if gitcmd.CheckObject(c.SHA) != nil || gitcmd.CheckObject(c.Commit.Tree.SHA) != nil {
		return c, fmt.Errorf("%w: forgejo: the answer for commit %s names no commit and tree", forge.ErrUnavailable, name)
	}
	return c, nil
}

// tree gives the name of a commit's tree, and with that whether there is one.
func (f *Forge) tree(ctx context.Context, r forge.Repo, commit string) (string, error) {
	if err := check(r); err != nil {
		return "", err
	}
	if err := gitcmd.CheckObject(commit); err != nil {
		return "", fmt.Errorf("%w: %w", forge.ErrInvalid, err)
	}
	if err := ctx.Err(); err != nil {
		return "", err
	}
	key := r.FullName() + "@" + commit
	if tree, ok := f.commits.Get(key); ok {
		return tree, nil
	}
	c, err := f.lookUp(ctx, r, commit)
	if err != nil {
		return "", err
	}
	if c.SHA != commit {
		return "", fmt.Errorf("%w: %s is no commit", forge.ErrNotFound, commit)
	}
	f.commits.Put(key, c.Commit.Tree.SHA, 1)
	return c.Commit.Tree.SHA, nil
}

// entries reads one tree.
func (f *Forge) entries(ctx context.Context, r forge.Repo, tree string) ([]entry, error) {
	key := r.FullName() + "@" + tree
	if all, ok := f.trees.Get(key); ok {
		return all, nil
	}
	var all []entry
	for page := 1; ; page++ {
		var answer struct {
			Tree      []entry `json:"tree"`
			Truncated bool    `json:"truncated"`
		}
		if err := f.get(ctx, &answer, pageQuery(page, "per_page", 1000), in(r, "git", "trees", tree)...); err != nil {
			return nil, err
		}
		all = append(all, answer.Tree...)
		if !answer.Truncated || len(answer.Tree) == 0 {
			f.trees.Put(key, all, len(all)+1)
			return all, nil
		}
		if page == maxPages {
			return nil, fmt.Errorf("%w: forgejo: a directory of more than %d entries", forge.ErrTooLarge, len(all))
		}
	}
}

// find gives the entry of a path below a tree; ok is false where there is none.
func (f *Forge) find(ctx context.Context, r forge.Repo, tree, name string) (e entry, ok bool, err error) {
	for part := range strings.SplitSeq(name, "/") {
		if tree == "" {
			return entry{}, false, nil // below what is no directory
		}
		all, err := f.entries(ctx, r, tree)
		if err != nil {
			return entry{}, false, err
		}
		i := slices.IndexFunc(all, func(e entry) bool { return e.Path == part })
		if i < 0 {
			return entry{}, false, nil
		}
		e, tree = all[i], ""
		if e.directory() {
			tree = e.SHA
		}
	}
	return e, true, nil
}

// ReadFile implements forge.Forge.
func (f *Forge) ReadFile(ctx context.Context, r forge.Repo, commit, name string) ([]byte, error) {
	if err := gitcmd.CheckPath(name); err != nil {
		return nil, fmt.Errorf("%w: %w", forge.ErrInvalid, err)
	}
	tree, err := f.tree(ctx, r, commit)
	if err != nil {
		return nil, err
	}
	e, ok, err := f.find(ctx, r, tree, name)
	switch {
	case err != nil:
		return nil, err
	case !ok:
		return nil, fmt.Errorf("%w: %q at %s", forge.ErrNotFound, name, commit)
	case e.Mode == "120000":
		return nil, fmt.Errorf("%w: %q is a symbolic link, which is not followed", forge.ErrInvalid, name)
	case !e.regular():
		return nil, fmt.Errorf("%w: %q is not a regular file", forge.ErrInvalid, name)
	case e.Size > forge.MaxFileBytes:
		return nil, fmt.Errorf("%w: %q has %d bytes", forge.ErrTooLarge, name, e.Size)
	}
	var blob struct {
		Content  string `json:"content"`
		Encoding string `json:"encoding"`
		Size     int64  `json:"size"`
	}
	_, err = f.api.Do(ctx, rest.Call{Path: in(r, "git", "blobs", e.SHA), Out: &blob, Max: forge.MaxFileBytes * 2})
	if err != nil {
		return nil, err
	}
	if blob.Size > forge.MaxFileBytes {
		return nil, fmt.Errorf("%w: %q has %d bytes", forge.ErrTooLarge, name, blob.Size)
	}
	data, err := base64.StdEncoding.DecodeString(blob.Content)
	if err != nil || blob.Encoding != "base64" && blob.Size != 0 || int64(len(data)) != blob.Size {
		return nil, fmt.Errorf("%w: forgejo: %d bytes of %q came, of %d, encoded as %.20q (is the server's DEFAULT_MAX_BLOB_SIZE below 1 MiB?)",
			forge.ErrUnavailable, len(data), name, blob.Size, blob.Encoding)
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
	tree, err := f.tree(ctx, r, commit)
	if err != nil {
		return nil, err
	}
	if dir != "" {
		e, ok, err := f.find(ctx, r, tree, dir)
		if err != nil || !ok || !e.directory() {
			return nil, err
		}
		tree = e.SHA
	}
	all, err := f.entries(ctx, r, tree)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range all {
		if e.regular() {
			names = append(names, e.Path)
		}
	}
	slices.Sort(names)
	return names, nil
}

// maxTrees bounds the trees that one comparison reads.
const maxTrees = 2000

// errEnough ends a comparison.
var errEnough = errors.New("enough")

// ChangedPaths implements forge.ChangedPaths. It compares trees and reads only
// those that differ: what the API's comparison lists are the commits between
// the two, which says nothing after a force push.
func (f *Forge) ChangedPaths(ctx context.Context, r forge.Repo, base, head string, limit int) ([]string, bool, error) {
	if limit < 0 {
		return nil, false, fmt.Errorf("%w: limit %d", forge.ErrInvalid, limit)
	}
	to, err := f.tree(ctx, r, head)
	if err != nil {
		return nil, false, err
	}
	from := ""
	if strings.Trim(base, "0") != "" || len(base) != len(head) {
		if from, err = f.tree(ctx, r, base); err != nil {
			return nil, false, err
		}
	}
	c := comparison{f: f, repo: r, limit: limit, left: maxTrees}
	if from != to {
		err = c.compare(ctx, "", from, to)
	}
	if err != nil && !errors.Is(err, errEnough) {
		return nil, false, err
	}
	return c.paths, err != nil, nil
}

type comparison struct {
	f     *Forge
	repo  forge.Repo
	limit int
	left  int // trees that may still be read
	paths []string
}

func (c *comparison) entries(ctx context.Context, tree string) ([]entry, error) {
	if tree == "" {
		return nil, nil
	}
	if c.left--; c.left < 0 {
		return nil, errEnough
	}
	return c.f.entries(ctx, c.repo, tree)
}

// compare goes through two trees side by side, in the order of their paths;
// "" is the empty one.
func (c *comparison) compare(ctx context.Context, prefix, from, to string) error {
	old, err := c.entries(ctx, from)
	if err != nil {
		return err
	}
	now, err := c.entries(ctx, to)
	if err != nil {
		return err
	}
	type pair struct{ old, now entry }
	pairs := map[string]pair{}
	for _, e := range old {
		pairs[e.key()] = pair{old: e}
	}
	for _, e := range now {
		pairs[e.key()] = pair{pairs[e.key()].old, e}
	}
	keys := make([]string, 0, len(pairs))
	for key, p := range pairs {
		if p.old.SHA != p.now.SHA || p.old.Mode != p.now.Mode {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	for _, key := range keys {
		p := pairs[key]
		if strings.HasSuffix(key, "/") {
			if err := c.compare(ctx, prefix+key, p.old.SHA, p.now.SHA); err != nil {
				return err
			}
			continue
		}
		if len(c.paths) == c.limit {
			return errEnough
		}
		c.paths = append(c.paths, prefix+key)
	}
	return nil
}
