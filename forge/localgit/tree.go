package localgit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// entry is one line of git ls-tree -l.
type entry struct {
	mode, kind, object string
	size               int64
	name               string // from the root of the tree
}

func (e entry) regular() bool { return e.mode == "100644" || e.mode == "100755" }

// list gives the entries that git ls-tree finds for the path: the entry
// itself, or what is in it where it ends with a slash; "" is the root.
func (f *Forge) list(ctx context.Context, repo repository, commit, name string) ([]entry, error) {
	args := []string{"ls-tree", "-l", "-z", "--full-tree", commit, "--"}
	if name != "" {
		args = append(args, name)
	}
	out, err := f.git.Output(ctx, repo.in(), args...)
	if err != nil {
		return nil, fmt.Errorf("localgit: list tree: %w", err)
	}
	var entries []entry
	for line := range strings.SplitSeq(strings.TrimSuffix(string(out), "\x00"), "\x00") {
		if line == "" {
			continue
		}
		meta, name, ok := strings.Cut(line, "\t")
		fields := strings.Fields(meta)
		if !ok || len(fields) != 4 {
			return nil, fmt.Errorf("localgit: list tree: unexpected line %.80q", line)
		}
		size, err := strconv.ParseInt(fields[3], 10, 64)
		if err != nil {
			size = 0 // "-": not a blob
		}
		entries = append(entries, entry{fields[0], fields[1], fields[2], size, name})
	}
	return entries, nil
}

// ReadFile implements forge.Forge.
func (f *Forge) ReadFile(ctx context.Context, r forge.Repo, commit, name string) ([]byte, error) {
	if err := gitcmd.CheckPath(name); err != nil {
		return nil, fmt.Errorf("%w: %w", forge.ErrInvalid, err)
	}
	repo, err := f.commit(ctx, r, commit)
	if err != nil {
		return nil, err
	}
	entries, err := f.list(ctx, repo, commit, name)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(entries, func(e entry) bool { return e.name == name })
	switch {
	case i < 0:
		return nil, fmt.Errorf("%w: %q at %s", forge.ErrNotFound, name, commit)
	case entries[i].mode == "120000":
		return nil, fmt.Errorf("%w: %q is a symbolic link, which is not followed", forge.ErrInvalid, name)
	case !entries[i].regular():
		return nil, fmt.Errorf("%w: %q is not a regular file", forge.ErrInvalid, name)
	case entries[i].size > forge.MaxFileBytes:
		return nil, fmt.Errorf("%w: %q has %d bytes", forge.ErrTooLarge, name, entries[i].size)
	}
	in := repo.in()
	in.MaxOutput = forge.MaxFileBytes
	out, err := f.git.Output(ctx, in, "cat-file", "blob", entries[i].object)
	if err != nil {
		return nil, fmt.Errorf("localgit: read %q: %w", name, err)
	}
	return out, nil
}

// ListFiles implements forge.Forge.
func (f *Forge) ListFiles(ctx context.Context, r forge.Repo, commit, dir string) ([]string, error) {
	name := ""
	if dir != "" {
		if err := gitcmd.CheckPath(dir); err != nil {
			return nil, fmt.Errorf("%w: %w", forge.ErrInvalid, err)
		}
		name = dir + "/"
	}
	repo, err := f.commit(ctx, r, commit)
	if err != nil {
		return nil, err
	}
	entries, err := f.list(ctx, repo, commit, name)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.regular() && strings.HasPrefix(e.name, name) {
			names = append(names, path.Base(e.name))
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
	repo, err := f.commit(ctx, r, head)
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
	} else if _, err := f.commit(ctx, r, base); err != nil {
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
