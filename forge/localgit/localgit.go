// Package localgit is the forge driver for git repositories on this machine: a
// directory full of them, or a single one. It needs the git program, and runs
// no hook, filter or other program that a repository's configuration names.
//
// [Snapshot] turns a work tree, with its uncommitted changes if wanted, into a
// repository that the driver serves, and leaves the original untouched;
// [Mirror] does the same for a URL.
//
// There are no webhooks: a post-receive hook ([InstallHook]) runs a program when
// somebody has pushed, and [PostReceive] makes events of what git tells it.
//
// Statuses are lines of JSON in one file per commit beside the repository: they
// need neither a lock nor an object in the repository that git would have to
// collect, and any tool reads them.
package localgit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// Config says where the repositories are; exactly one of Root and Dir is set.
type Config struct {
	// Root is a directory of repositories, at any depth, bare or with a work
	// tree; forge.Repo "team/app" is Root/team/app or Root/team/app.git.
	// Symbolic links that leave Root are not followed.
	Root string
	// Dir is the only repository; any directory in its work tree will do.
	Dir string
	// Name is what forge.Repo calls Dir; empty: the last element of Dir, without ".git".
	Name string
	// StatusDir holds the statuses of all repositories; empty: the directory
	// solstice/statuses inside each repository's git directory.
	StatusDir string
	// Git is the git program; empty: looked for in the search path.
	Git string
}

// Forge is the driver; safe for concurrent use, also by several processes.
type Forge struct {
	git       *gitcmd.Git
	root      *os.Root // nil: single is the only repository
	single    repository
	name      string
	statusDir string

	mu      sync.Mutex
	readers map[string]*gitcmd.Objects // by git directory
}

// maxReaders bounds the repositories for which a git is kept running.
const maxReaders = 16

var (
	_ forge.Forge        = (*Forge)(nil)
	_ forge.ChangedPaths = (*Forge)(nil)
	_ forge.HeadLister   = (*Forge)(nil)
	_ forge.Checker      = (*Forge)(nil)
)

// repository is where one is on disk; dir and common differ in linked work trees.
type repository struct {
	id     string // unique in this Forge; a path relative to the root
	dir    string // the git directory
	common string // what its work trees share: objects, refs
}

// Open checks the configuration and finds git. It wraps forge.ErrInvalid,
// forge.ErrNotFound, or says that git is missing.
func Open(ctx context.Context, c Config) (*Forge, error) {
	if (c.Root == "") == (c.Dir == "") {
		return nil, fmt.Errorf("%w: localgit needs one of Root and Dir", forge.ErrInvalid)
	}
	git, err := findGit(ctx, c.Git)
	if err != nil {
		return nil, err
	}
	f := &Forge{git: git}
	if c.StatusDir != "" {
		if f.statusDir, err = filepath.Abs(c.StatusDir); err != nil {
			return nil, fmt.Errorf("localgit: %w", err)
		}
	}
	if c.Root != "" {
		abs, err := filepath.Abs(c.Root)
		if err != nil {
			return nil, fmt.Errorf("localgit: %w", err)
		}
		if f.root, err = os.OpenRoot(abs); err != nil {
			return nil, fmt.Errorf("%w: %w", forge.ErrNotFound, err)
		}
		return f, nil
	}
	l, err := locate(ctx, git, c.Dir)
	if err != nil {
		return nil, err
	}
	f.name = c.Name
	if f.name == "" {
		f.name = l.name()
	}
	f.single = repository{id: f.name, dir: l.gitDir, common: l.commonDir}
	return f, nil
}

func findGit(ctx context.Context, exe string) (*gitcmd.Git, error) {
	var g *gitcmd.Git
	var err error
	if exe == "" {
		g, err = gitcmd.Find(ctx)
	} else {
		g, err = gitcmd.New(ctx, exe)
	}
	if err != nil {
		return nil, fmt.Errorf("localgit: %w", err)
	}
	return g, nil
}

// Close releases the root directory, and ends what was kept running.
func (f *Forge) Close() error {
	f.mu.Lock()
	readers := f.readers
	f.readers = nil
	f.mu.Unlock()
	for _, r := range readers {
		r.Close()
	}
	if f.root == nil {
		return nil
	}
	return f.root.Close()
}

// Capabilities implements forge.Forge.
func (f *Forge) Capabilities() forge.Capabilities {
	return forge.Capabilities{Webhooks: false, Statuses: true}
}

// ParseWebhook implements forge.Forge; it wraps errors.ErrUnsupported.
func (f *Forge) ParseWebhook(context.Context, *http.Request, forge.SecretFunc) (forge.Event, error) {
	return forge.Event{}, fmt.Errorf("localgit: webhooks: %w", errors.ErrUnsupported)
}

// CloneInfo implements forge.Forge: the git directory, without credentials.
func (f *Forge) CloneInfo(ctx context.Context, r forge.Repo, _ forge.CloneOptions) (forge.Clone, error) {
	repo, err := f.open(ctx, r)
	if err != nil {
		return forge.Clone{}, err
	}
	return forge.Clone{Dir: repo.common}, nil
}

// open finds the repository of that name.
func (f *Forge) open(ctx context.Context, r forge.Repo) (repository, error) {
	if err := ctx.Err(); err != nil {
		return repository{}, err
	}
	if err := r.Validate(); err != nil {
		return repository{}, err
	}
	full := r.FullName()
	if f.root == nil {
		if full != f.name {
			return repository{}, fmt.Errorf("%w: repository %q; there is only %q", forge.ErrNotFound, full, f.name)
		}
		return f.single, nil
	}
	for part := range strings.SplitSeq(full, "/") {
		if strings.EqualFold(part, ".git") {
			return repository{}, fmt.Errorf("%w: repository name %.80q", forge.ErrInvalid, full)
		}
	}
	for _, id := range []string{full, full + ".git"} {
		for _, dir := range []string{id, id + "/.git"} {
			if f.isGitDir(dir) {
				abs := filepath.Join(f.root.Name(), filepath.FromSlash(dir))
				return repository{id: id, dir: abs, common: abs}, nil
			}
		}
	}
	return repository{}, fmt.Errorf("%w: repository %q", forge.ErrNotFound, full)
}

// isGitDir recognises what git does (see gitrepository-layout(5)); os.Root
// refuses links that leave the root.
func (f *Forge) isGitDir(dir string) bool {
	for name, wantDir := range map[string]bool{"HEAD": false, "objects": true, "refs": true} {
		st, err := f.root.Stat(filepath.Join(filepath.FromSlash(dir), name))
		if err != nil || st.IsDir() != wantDir {
			return false
		}
	}
	return true
}

// in are the options of a command in the repository. Naming the directory
// explicitly stops git from looking for another one above it.
func (r repository) in() gitcmd.Options {
	return gitcmd.Options{GitDir: r.dir, SafeDirectory: "*"}
}

// Resolve implements forge.Forge. It also takes revisions such as "main~3".
// Where a branch and a tag share a name the tag wins, as it does in git.
func (f *Forge) Resolve(ctx context.Context, r forge.Repo, ref string) (string, error) {
	repo, err := f.open(ctx, r)
	if err != nil {
		return "", err
	}
	if err := gitcmd.CheckRevision(ref); err != nil {
		return "", fmt.Errorf("%w: %w", forge.ErrInvalid, err)
	}
	return f.resolve(ctx, repo, ref)
}

func (f *Forge) resolve(ctx context.Context, repo repository, rev string) (string, error) {
	commit, err := resolve(ctx, f.git, repo.in(), rev)
	if errors.Is(err, errNoRevision) {
		return "", fmt.Errorf("%w: %q in repository %q", forge.ErrNotFound, rev, repo.id)
	}
	return commit, err
}

var errNoRevision = errors.New("localgit: no such revision")

// resolve gives the commit of a checked revision; absent wraps errNoRevision.
func resolve(ctx context.Context, git *gitcmd.Git, in gitcmd.Options, rev string) (string, error) {
	out, err := git.Output(ctx, in, "rev-parse", "--verify", "--quiet", "--end-of-options", rev+"^{commit}")
	if code, ok := gitcmd.ExitCode(err); ok && code == 1 {
		return "", errNoRevision
	}
	if err != nil {
		return "", fmt.Errorf("localgit: resolve: %w", err)
	}
	commit := strings.TrimSuffix(string(out), "\n")
	if err := gitcmd.CheckObject(commit); err != nil {
		return "", fmt.Errorf("localgit: resolve: %w", err)
	}
	return commit, nil
}

// objects is the reader of a repository's objects.
func (f *Forge) objects(repo repository) *gitcmd.Objects {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r := f.readers[repo.dir]; r != nil {
		return r
	}
	if f.readers == nil {
		f.readers = map[string]*gitcmd.Objects{}
	}
	for dir, r := range f.readers { // any one: it is started again when it is wanted
		if len(f.readers) < maxReaders {
			break
		}
		delete(f.readers, dir)
		go r.Close()
	}
	r := f.git.Objects(repo.in())
	f.readers[repo.dir] = r
	return r
}

// commit opens the repository and gives the root tree of a commit in it.
func (f *Forge) commit(ctx context.Context, r forge.Repo, commit string) (repo repository, tree string, err error) {
	if repo, err = f.open(ctx, r); err != nil {
		return repository{}, "", err
	}
	if err := gitcmd.CheckObject(commit); err != nil {
		return repository{}, "", fmt.Errorf("%w: %w", forge.ErrInvalid, err)
	}
	kind, data, err := f.objects(repo).Read(ctx, commit, maxObject)
	if errors.Is(err, gitcmd.ErrNoObject) || err == nil && kind != "commit" {
		return repository{}, "", fmt.Errorf("%w: commit %s in repository %q", forge.ErrNotFound, commit, repo.id)
	}
	if err != nil {
		return repository{}, "", fmt.Errorf("localgit: read commit: %w", err)
	}
	head, _, _ := bytes.Cut(data, []byte("\n"))
	tree, ok := strings.CutPrefix(string(head), "tree ")
	if !ok {
		return repository{}, "", fmt.Errorf("localgit: commit %s has no tree", commit)
	}
	return repo, tree, nil
}
