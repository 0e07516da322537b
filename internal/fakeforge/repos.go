// Package fakeforge has what the fakes of forges share: real bare repositories
// served by git itself, and faults to inject. The packages below it speak one
// forge's API each.
package fakeforge

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/cgi"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// ErrNotFound: no such repository, object or ref.
var ErrNotFound = errors.New("fakeforge: not found")

// Repos are bare repositories below one directory; safe for concurrent use.
type Repos struct {
	git     *gitcmd.Git
	root    string
	commits atomic.Int64
	objects sync.Map // of *gitcmd.Objects, by directory: to start a git for each takes long
}

// File is one file of a tree.
type File struct {
	Mode    string // as git writes it; empty: 100644
	Content string
}

// findGit asks for git's version once.
var findGit = sync.OnceValues(func() (*gitcmd.Git, error) { return gitcmd.Find(context.Background()) })

// NewRepos finds git.
func NewRepos(_ context.Context, root string) (*Repos, error) {
	git, err := findGit()
	if err != nil {
		return nil, err
	}
	return &Repos{git: git, root: root}, nil
}

// Dir is where the repository "owner/name" is.
func (r *Repos) Dir(name string) (string, error) {
	dir := filepath.Join(r.root, name+".git")
	if !filepath.IsLocal(name) || filepath.Clean(name) != name {
		return "", fmt.Errorf("%w: repository %q", ErrNotFound, name)
	}
	if _, err := os.Stat(filepath.Join(dir, "HEAD")); err != nil {
		return "", fmt.Errorf("%w: repository %q", ErrNotFound, name)
	}
	return dir, nil
}

// Create makes an empty repository whose default branch is main. It is what git
// init makes, without starting it.
func (r *Repos) Create(_ context.Context, name string) error {
	dir := filepath.Join(r.root, name+".git")
	for _, sub := range []string{"objects/info", "objects/pack", "refs/heads", "refs/tags"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return err
		}
	}
	const config = "[core]\n\trepositoryformatversion = 0\n\tbare = true\n" +
		"[uploadpack]\n\tallowAnySHA1InWant = true\n" // as forges do
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "config"), []byte(config), 0o600),
		os.WriteFile(filepath.Join(dir, "HEAD"), []byte("ref: refs/heads/main\n"), 0o600),
	)
}

// tip reads a ref that git has not packed, which these repositories never do.
func (r *Repos) tip(name, ref string) (string, error) {
	dir, err := r.Dir(name)
	if err != nil {
		return "", err
	}
	data, err := os.ReadFile(filepath.Join(dir, filepath.FromSlash(ref)))
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return strings.TrimSpace(string(data)), nil
}

// Git runs git in a repository and gives what it printed.
func (r *Repos) Git(ctx context.Context, name, stdin string, args ...string) (string, error) {
	dir, err := r.Dir(name)
	if err != nil {
		return "", err
	}
	out, err := r.git.Output(ctx, gitcmd.Options{GitDir: dir, Stdin: strings.NewReader(stdin), MaxOutput: 64 << 20, Env: []string{
		"GIT_COMMITTER_NAME=A", "GIT_COMMITTER_EMAIL=a@example.org", "GIT_AUTHOR_NAME=A", "GIT_AUTHOR_EMAIL=a@example.org",
	}}, args...)
	if _, exited := gitcmd.ExitCode(err); exited {
		err = fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return string(out), err
}

// Commit adds a commit to a ref or branch that exists or not: its tree is
// files, by path, its first parent the ref's tip, parents the others. It gives
// the commit's name.
func (r *Repos) Commit(ctx context.Context, name, ref string, files map[string]File, parents ...string) (string, error) {
	if !strings.HasPrefix(ref, "refs/") {
		ref = "refs/heads/" + ref
	}
	var in strings.Builder
	message := fmt.Sprintf("commit %d\n", r.commits.Add(1))
	fmt.Fprintf(&in, "commit %s\ncommitter A <a@example.org> 1700000000 +0000\ndata %d\n%s\n", ref, len(message), message)
	if _, err := r.tip(name, ref); err == nil {
		fmt.Fprintf(&in, "from %s^0\n", ref)
	} else if len(parents) > 0 {
		fmt.Fprintf(&in, "from %s\n", parents[0])
		parents = parents[1:]
	}
	for _, p := range parents {
		fmt.Fprintf(&in, "merge %s\n", p)
	}
	in.WriteString("deleteall\n")
	quote := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)
	for path, f := range files {
		if f.Mode == "" {
			f.Mode = "100644"
		}
		fmt.Fprintf(&in, "M %s inline \"%s\"\ndata %d\n%s\n", f.Mode, quote.Replace(path), len(f.Content), f.Content)
	}
	if _, err := r.Git(ctx, name, in.String(), "fast-import", "--quiet", "--force"); err != nil {
		return "", err
	}
	return r.tip(name, ref)
}

// Resolve gives the name of the object that a revision names.
func (r *Repos) Resolve(ctx context.Context, name, rev string) (string, error) {
	if strings.HasPrefix(rev, "refs/heads/") && gitcmd.CheckRef(rev) == nil {
		if tip, err := r.tip(name, rev); err == nil { // without starting git
			return tip, nil
		}
	}
	out, err := r.Git(ctx, name, "", "rev-parse", "-q", "--verify", "--end-of-options", rev)
	return strings.TrimSpace(out), err
}

// Object gives an object's type and content.
func (r *Repos) Object(ctx context.Context, name, object string) (kind string, data []byte, err error) {
	dir, err := r.Dir(name)
	if err != nil {
		return "", nil, err
	}
	reader, _ := r.objects.LoadOrStore(dir, r.git.Objects(gitcmd.Options{GitDir: dir}))
	kind, data, err = reader.(*gitcmd.Objects).Read(ctx, object, 64<<20)
	if errors.Is(err, gitcmd.ErrNoObject) {
		err = fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return kind, data, err
}

// CommitInfo is what a commit object says.
type CommitInfo struct {
	Name, Tree string
	Parents    []string
}

// Info reads the commit that a revision names, through tags.
func (r *Repos) Info(ctx context.Context, name, rev string) (CommitInfo, error) {
	c := CommitInfo{Name: rev}
	var kind string
	var data []byte
	var err error
	if gitcmd.CheckObject(rev) == nil {
		kind, data, err = r.Object(ctx, name, rev)
	}
	if err == nil && kind != "commit" {
		if c.Name, err = r.Resolve(ctx, name, rev+"^{commit}"); err == nil {
			_, data, err = r.Object(ctx, name, c.Name)
		}
	}
	if err != nil {
		return c, err
	}
	head, _, _ := strings.Cut(string(data), "\n\n")
	for line := range strings.Lines(head) {
		switch key, value, _ := strings.Cut(strings.TrimSpace(line), " "); key {
		case "tree":
			c.Tree = value
		case "parent":
			c.Parents = append(c.Parents, value)
		}
	}
	return c, nil
}

// Entry is one line of a tree; Path is whole in a recursive listing.
type Entry struct {
	Mode, Type, Object, Path string
	Size                     int64
}

// Tree lists a tree, or the one of a commit: its entries, or all files below it.
func (r *Repos) Tree(ctx context.Context, name, object string, recursive bool) ([]Entry, error) {
	args := []string{"ls-tree", "-z", "-l"}
	if recursive {
		args = append(args, "-r", "-t")
	}
	out, err := r.Git(ctx, name, "", append(args, object)...)
	if err != nil {
		return nil, err
	}
	var all []Entry
	for line := range strings.SplitSeq(strings.TrimSuffix(out, "\x00"), "\x00") {
		head, path, ok := strings.Cut(line, "\t")
		fields := strings.Fields(head)
		if !ok || len(fields) != 4 {
			continue // of an empty tree
		}
		size, _ := strconv.ParseInt(fields[3], 10, 64)
		all = append(all, Entry{fields[0], fields[1], fields[2], path, size})
	}
	return all, nil
}

// Ref is a ref, with the commit behind it.
type Ref struct{ Name, Type, Object, Commit string }

// Refs lists refs below a prefix such as "refs/tags", or that one.
func (r *Repos) Refs(ctx context.Context, name, prefix string) ([]Ref, error) {
	out, err := r.Git(ctx, name, "", "for-each-ref", "--format=%(refname) %(objecttype) %(objectname) %(*objectname)", "--", prefix)
	if err != nil {
		return nil, err
	}
	var all []Ref
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		all = append(all, Ref{f[0], f[1], f[2], f[len(f)-1]})
	}
	return all, nil
}

// Changed lists the paths that differ between two commits, of a rename both.
func (r *Repos) Changed(ctx context.Context, name, base, head string) ([]string, error) {
	out, err := r.Git(ctx, name, "", "diff-tree", "-r", "-z", "--name-only", "--no-renames", base, head)
	if err != nil || out == "" {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(out, "\x00"), "\x00"), nil
}

// IsGit reports whether a request is of a git client that fetches, and of which
// repository.
func IsGit(r *http.Request) (name string, ok bool) {
	for _, suffix := range []string{".git/info/refs", ".git/git-upload-pack"} {
		if name, ok := strings.CutSuffix(r.URL.Path, suffix); ok {
			return strings.TrimPrefix(name, "/"), true
		}
	}
	return "", false
}

// ServeGit answers a request that IsGit told.
func (r *Repos) ServeGit(w http.ResponseWriter, req *http.Request) {
	name, _ := IsGit(req)
	if _, err := r.Dir(name); err != nil {
		http.NotFound(w, req)
		return
	}
	body, err := io.ReadAll(io.LimitReader(req.Body, 16<<20)) // CGI needs its length
	if err != nil {
		return
	}
	req = req.Clone(req.Context())
	req.Body, req.ContentLength, req.TransferEncoding = io.NopCloser(bytes.NewReader(body)), int64(len(body)), nil
	env := []string{"GIT_PROJECT_ROOT=" + r.root, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_NOSYSTEM=1", "HOME=/nonexistent"}
	if v := req.Header.Get("Git-Protocol"); v != "" && !strings.ContainsAny(v, "\x00\n") {
		env = append(env, "GIT_PROTOCOL="+v)
	}
	h := cgi.Handler{Path: r.git.Path(), Args: []string{"http-backend"}, Dir: r.root, Env: env, Stderr: io.Discard}
	h.ServeHTTP(w, req)
}

// Page cuts one page out of a list; page counts from 1.
func Page[T any](all []T, page, size int) []T {
	from := min(max(page-1, 0)*size, len(all))
	return slices.Clone(all[from:min(from+size, len(all))])
}
