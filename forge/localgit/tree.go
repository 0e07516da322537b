package localgit

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// maxObject is the largest commit or tree that is read: a directory of a
// million files.
const maxObject = 64 << 20

// entry is one line of a tree (git's "Git Objects" book chapter has the format).
type entry struct {
	mode, name, object string
}

func (e entry) regular() bool { return e.mode == "100644" || e.mode == "100755" }

// tree reads a tree by its object name.
func (f *Forge) tree(ctx context.Context, repo repository, object string) ([]entry, error) {
	kind, data, err := f.objects(repo).Read(ctx, object, maxObject)
	if err == nil && kind != "tree" {
		err = fmt.Errorf("%s is a %s", object, kind)
	}
	if err != nil {
		return nil, fmt.Errorf("localgit: read tree: %w", err)
	}
	var entries []entry
	for raw := len(object) / 2; len(data) > 0; {
		head, rest, ok := bytes.Cut(data, []byte{0})
		mode, name, ok2 := strings.Cut(string(head), " ")
		if !ok || !ok2 || len(rest) < raw {
			return nil, fmt.Errorf("localgit: tree %s is damaged", object)
		}
		entries = append(entries, entry{mode, name, hex.EncodeToString(rest[:raw])})
		data = rest[raw:]
	}
	return entries, nil
}

// find gives the entry of a path below a tree; ok is false where there is none.
func (f *Forge) find(ctx context.Context, repo repository, tree, name string) (e entry, ok bool, err error) {
	for part := range strings.SplitSeq(name, "/") {
		if tree == "" {
			return entry{}, false, nil // below what is no directory
		}
		entries, err := f.tree(ctx, repo, tree)
		if err != nil {
			return entry{}, false, err
		}
		i := slices.IndexFunc(entries, func(e entry) bool { return e.name == part })
		if i < 0 {
			return entry{}, false, nil
		}
		e, tree = entries[i], ""
		if e.directory() {
			tree = e.object
		}
	}
	return e, true, nil
}

func (e entry) directory() bool { return e.mode == "40000" }

// ReadFile implements forge.Forge.
func (f *Forge) ReadFile(ctx context.Context, r forge.Repo, commit, name string) ([]byte, error) {
	if err := gitcmd.CheckPath(name); err != nil {
		return nil, fmt.Errorf("%w: %w", forge.ErrInvalid, err)
	}
	repo, tree, err := f.commit(ctx, r, commit)
	if err != nil {
		return nil, err
	}
	e, ok, err := f.find(ctx, repo, tree, name)
	switch {
	case err != nil:
		return nil, err
	case !ok:
		return nil, fmt.Errorf("%w: %q at %s", forge.ErrNotFound, name, commit)
	case e.mode == "120000":
		return nil, fmt.Errorf("%w: %q is a symbolic link, which is not followed", forge.ErrInvalid, name)
	case !e.regular():
		return nil, fmt.Errorf("%w: %q is not a regular file", forge.ErrInvalid, name)
	}
	_, data, err := f.objects(repo).Read(ctx, e.object, forge.MaxFileBytes)
	if errors.Is(err, gitcmd.ErrTooLarge) {
		return nil, fmt.Errorf("%w: %q: %w", forge.ErrTooLarge, name, err)
	}
	if err != nil {
		return nil, fmt.Errorf("localgit: read %q: %w", name, err)
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
	repo, tree, err := f.commit(ctx, r, commit)
	if err != nil {
		return nil, err
	}
	if dir != "" {
		e, ok, err := f.find(ctx, repo, tree, dir)
		if err != nil {
			return nil, err
		}
		if !ok || !e.directory() {
			return nil, nil
		}
		tree = e.object
	}
	entries, err := f.tree(ctx, repo, tree)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.regular() {
			names = append(names, e.name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// Heads implements forge.HeadLister. Tags of other things than commits are left out.
func (f *Forge) Heads(ctx context.Context, r forge.Repo) (map[string]string, error) {
	repo, err := f.open(ctx, r)
	if err != nil {
		return nil, err
	}
	in := repo.in()
	in.MaxOutput = 256 << 20
	out, err := f.git.Output(ctx, in, "for-each-ref",
		"--format=%(refname) %(objecttype) %(objectname) %(*objecttype) %(*objectname)", "refs/heads/", "refs/tags/")
	if err != nil {
		return nil, fmt.Errorf("localgit: list refs: %w", err)
	}
	heads := make(map[string]string)
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		switch {
		case len(fields) >= 3 && fields[1] == "commit":
			heads[fields[0]] = fields[2]
		case len(fields) == 5 && fields[3] == "commit":
			heads[fields[0]] = fields[4]
		case len(fields) == 5 && fields[3] == "tag": // a tag of a tag
			commit, err := f.resolve(ctx, repo, fields[4])
			if errors.Is(err, forge.ErrNotFound) {
				continue
			}
			if err != nil {
				return nil, err
			}
			heads[fields[0]] = commit
		}
	}
	return heads, nil
}

// ChangedPaths implements forge.ChangedPaths.
func (f *Forge) ChangedPaths(ctx context.Context, r forge.Repo, base, head string, limit int) ([]string, bool, error) {
	if limit < 0 {
		return nil, false, fmt.Errorf("%w: limit %d", forge.ErrInvalid, limit)
	}
	repo, _, err := f.commit(ctx, r, head)
	if err != nil {
		return nil, false, err
	}
	in := repo.in()
	if strings.Trim(base, "0") == "" && len(base) == len(head) {
		out, err := f.git.Output(ctx, in, "hash-object", "-t", "tree", "--stdin") // of nothing
		if err != nil {
			return nil, false, fmt.Errorf("localgit: empty tree: %w", err)
		}
		base = strings.TrimSuffix(string(out), "\n")
	} else if _, _, err := f.commit(ctx, r, base); err != nil {
		return nil, false, err
	}
	paths := pathCollector{limit: limit}
	in.Stdout = &paths
	err = f.git.Run(ctx, in, "diff-tree", "-r", "-z", "--name-only", "--no-renames", "--no-ext-diff", "--no-textconv", base, head)
	if err != nil && !(paths.truncated && ctx.Err() == nil) {
		return nil, false, fmt.Errorf("localgit: compare: %w", err)
	}
	return paths.paths, paths.truncated, nil
}

// pathCollector splits NUL-terminated paths, and fails the write after the last
// one wanted, which ends the command.
type pathCollector struct {
	limit     int
	paths     []string
	rest      []byte
	truncated bool
}

func (c *pathCollector) Write(p []byte) (int, error) {
	for _, b := range p {
		if b != 0 {
			c.rest = append(c.rest, b)
			continue
		}
		if len(c.paths) == c.limit {
			c.truncated = true
			return 0, io.ErrShortWrite
		}
		c.paths = append(c.paths, string(c.rest))
		c.rest = c.rest[:0]
	}
	return len(p), nil
}
