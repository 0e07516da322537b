package localgit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// ErrNoCommits: the work tree's branch has no commit yet.
var ErrNoCommits = errors.New("localgit: the repository has no commits yet")

// SnapshotOptions says what to take a snapshot of.
type SnapshotOptions struct {
	// WorkTree is any directory in a work tree, or a bare repository.
	WorkTree string
	// Dest is where the snapshot's repository is made: a directory that does
	// not exist or is empty, outside the work tree.
	Dest string
	// Dirty takes the work tree as it is, rather than the commit it is at:
	// changes, deletions, and untracked files that are not ignored. Submodules
	// count with the commit that is checked out in them.
	Dirty bool
	// ExcludesFile is the user's own ignore file (core.excludesFile), which git
	// would find through the environment; may be empty or absent.
	ExcludesFile string
	// Git is the git program; empty: looked for in the search path.
	Git string
}

// Snapshotted is a snapshot's repository: Dest, bare.
type Snapshotted struct {
	Commit string
	Ref    string // full name of the branch that the work tree is on; empty: detached
	Base   string // the commit that the work tree is at; empty: none yet
	Dirty  bool   // Commit holds uncommitted changes, on top of Base
	Origin string // URL of the remote "origin", for people: without user and password
	Name   string // of the directory, or of the bare repository without ".git"
	Top    string // the work tree's root; empty: bare
}

// Snapshot makes a bare repository at Dest that has the work tree's commit,
// branch and tags, and shares the objects of the original through
// objects/info/alternates, so that it takes no time or space; the original must
// stay where it is. Nothing is written to the original: no object, ref or index
// (git renews the times of objects that the snapshot uses too, so that none is
// pruned early).
//
// No program that the original's configuration names is run. So clean filters
// are not: a changed file under a filter (Git LFS, say) is taken as it is in
// the work tree, an unchanged one, as far as file times tell, as it was
// committed. Line endings are converted as usual. Git repositories inside the work tree that are not
// submodules are left out.
//
// It wraps ErrNoCommits, forge.ErrNotFound (no repository) and
// forge.ErrInvalid.
func Snapshot(ctx context.Context, o SnapshotOptions) (Snapshotted, error) {
	git, err := findGit(ctx, o.Git)
	if err != nil {
		return Snapshotted{}, err
	}
	from, err := locate(ctx, git, o.WorkTree)
	if err != nil {
		return Snapshotted{}, err
	}
	dest, err := newDir(o.Dest)
	if err != nil {
		return Snapshotted{}, err
	}
	if from.top != "" && inside(from.top, dest) {
		return Snapshotted{}, fmt.Errorf("%w: %s is inside the work tree %s", forge.ErrInvalid, dest, from.top)
	}
	s := snapshot{git: git, from: from, dest: dest, o: o}
	return s.make(ctx)
}

type snapshot struct {
	git  *gitcmd.Git
	from location
	dest string
	o    SnapshotOptions
}

func (s *snapshot) in() gitcmd.Options { return gitcmd.Options{GitDir: s.dest} }

func (s *snapshot) make(ctx context.Context) (Snapshotted, error) {
	got := Snapshotted{Name: s.from.name(), Top: s.from.top}
	var err error
	if got.Base, err = resolve(ctx, s.git, s.from.in(), "HEAD"); err != nil && !errors.Is(err, errNoRevision) {
		return Snapshotted{}, err
	}
	got.Commit = got.Base
	if got.Ref, err = s.ask(ctx, "symbolic-ref", "--quiet", "HEAD"); err != nil {
		return Snapshotted{}, err
	}
	if got.Origin, err = s.ask(ctx, "config", "--get", "remote.origin.url"); err != nil {
		return Snapshotted{}, err
	}
	got.Origin = forPeople(got.Origin)
	if err := s.share(ctx); err != nil {
		return Snapshotted{}, err
	}
	if s.o.Dirty {
		if s.from.top == "" {
			return Snapshotted{}, fmt.Errorf("%w: %s is bare, it has no uncommitted changes", forge.ErrInvalid, s.from.gitDir)
		}
		if got.Commit, err = s.commitWorkTree(ctx, got); err != nil {
			return Snapshotted{}, err
		}
		got.Dirty = got.Commit != got.Base
	}
	if got.Commit == "" {
		return Snapshotted{}, fmt.Errorf("%w: %s", ErrNoCommits, s.from.gitDir)
	}
	return got, s.refs(ctx, got)
}

// ask gives one line from the original, or nothing where git exits with 1.
func (s *snapshot) ask(ctx context.Context, args ...string) (string, error) {
	out, err := s.git.Output(ctx, s.from.in(), args...)
	if code, ok := gitcmd.ExitCode(err); ok && code == 1 {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("localgit: %w", err)
	}
	return strings.TrimSuffix(string(out), "\n"), nil
}

// share makes the repository, with the original's objects.
func (s *snapshot) share(ctx context.Context) error {
	if err := initBare(ctx, s.git, s.dest, s.from.format); err != nil {
		return err
	}
	info := filepath.Join(s.dest, "objects", "info")
	if err := os.MkdirAll(info, 0o755); err != nil {
		return fmt.Errorf("localgit: snapshot: %w", err)
	}
	objects := filepath.Join(s.from.commonDir, "objects")
	if err := os.WriteFile(filepath.Join(info, "alternates"), []byte(objects+"\n"), 0o644); err != nil {
		return fmt.Errorf("localgit: snapshot: %w", err)
	}
	// Without it a shallow clone would seem to be damaged.
	if err := copyFile(filepath.Join(s.from.commonDir, "shallow"), filepath.Join(s.dest, "shallow")); err != nil {
		return fmt.Errorf("localgit: snapshot: %w", err)
	}
	return nil
}

// refs gives the snapshot the branch, HEAD and the original's tags.
func (s *snapshot) refs(ctx context.Context, got Snapshotted) error {
	in := s.from.in()
	in.MaxOutput = 256 << 20
	tags, err := s.git.Output(ctx, in, "for-each-ref", "--format=create %(refname) %(objectname)", "refs/tags/")
	if err != nil {
		return fmt.Errorf("localgit: snapshot: %w", err)
	}
	// A detached commit gets a ref too: some clients can only fetch what has one.
	name := got.Ref
	if name == "" {
		name = "refs/solstice/head"
	}
	in = s.in()
	in.Stdin = strings.NewReader(string(tags) + "create " + name + " " + got.Commit + "\n")
	if err := s.git.Run(ctx, in, "update-ref", "--stdin"); err != nil {
		return fmt.Errorf("localgit: snapshot: %w", err)
	}
	return setHead(ctx, s.git, s.in(), got.Commit, got.Ref)
}

// commitWorkTree gives the commit of the work tree's content: Base itself
// where nothing differs.
func (s *snapshot) commitWorkTree(ctx context.Context, got Snapshotted) (string, error) {
	tree, err := s.writeTree(ctx)
	if err != nil {
		return "", fmt.Errorf("localgit: uncommitted changes: %w", err)
	}
	in := s.in()
	args := []string{"commit-tree", tree, "-F", "-"}
	on := got.Ref
	if got.Base != "" {
		base, err := s.git.Output(ctx, in, "rev-parse", "--verify", "--end-of-options", got.Base+"^{tree}")
		if err != nil {
			return "", fmt.Errorf("localgit: uncommitted changes: %w", err)
		}
		if strings.TrimSuffix(string(base), "\n") == tree {
			return got.Base, nil
		}
		args = append(args, "-p", got.Base)
		if on == "" {
			on = got.Base
		}
	}
	in.Stdin = strings.NewReader("Uncommitted changes on " + strings.TrimPrefix(on, "refs/heads/") + "\n")
	in.Env = []string{
		"GIT_AUTHOR_NAME=Solstice", "GIT_AUTHOR_EMAIL=solstice@localhost",
		"GIT_COMMITTER_NAME=Solstice", "GIT_COMMITTER_EMAIL=solstice@localhost",
	}
	out, err := s.git.Output(ctx, in, args...)
	if err != nil {
		return "", fmt.Errorf("localgit: uncommitted changes: %w", err)
	}
	return strings.TrimSuffix(string(out), "\n"), nil
}

// How the original compares and converts files; nothing in it names a program.
const workTreeSettings = `^core\.(autocrlf|eol|filemode|symlinks|ignorecase|precomposeunicode|trustctime|checkstat|safecrlf)$`

// writeTree makes the tree of the work tree's content, with a copy of the
// index: its file times tell what is unchanged, so that only changed files are
// read, and unchanged files under a clean filter stay as they were committed.
func (s *snapshot) writeTree(ctx context.Context) (string, error) {
	if err := s.copyIndex(); err != nil {
		return "", err
	}
	settings, err := s.git.Output(ctx, s.from.in(), "config", "--null", "--get-regexp", workTreeSettings)
	if code, ok := gitcmd.ExitCode(err); err != nil && (!ok || code != 1) {
		return "", err
	}
	in := s.in()
	in.WorkTree, in.Dir = s.from.top, s.from.top
	in.MaxOutput = 256 << 20
	in.Config = []string{"core.bare=false"}
	for setting := range strings.SplitSeq(strings.TrimSuffix(string(settings), "\x00"), "\x00") {
		key, value, ok := strings.Cut(setting, "\n")
		if !ok {
			value = "true" // a key alone, see git-config(1)
		}
		if key != "" {
			in.Config = append(in.Config, key+"="+value)
		}
	}
	if s.o.ExcludesFile != "" {
		in.Config = append(in.Config, "core.excludesFile="+s.o.ExcludesFile)
	}
	changed, err := s.git.Output(ctx, in, "diff-files", "--name-only", "-z", "--ignore-submodules=dirty")
	if err != nil {
		return "", err
	}
	untracked, err := s.git.Output(ctx, in, "ls-files", "--others", "--exclude-standard", "-z")
	if err != nil {
		return "", err
	}
	update := in
	update.Stdin = strings.NewReader(string(changed) + string(untracked))
	if err := s.git.Run(ctx, update, "update-index", "-z", "--add", "--remove", "--replace", "--stdin"); err != nil {
		return "", err
	}
	tree, err := s.git.Output(ctx, in, "write-tree")
	return strings.TrimSuffix(string(tree), "\n"), err
}

func (s *snapshot) copyIndex() error {
	if err := copyFile(filepath.Join(s.from.gitDir, "index"), filepath.Join(s.dest, "index")); err != nil {
		return err
	}
	// A split index has its larger part in these.
	shared, err := filepath.Glob(filepath.Join(globEscape(s.from.gitDir), "sharedindex.*"))
	if err != nil {
		return err
	}
	for _, name := range shared {
		if err := copyFile(name, filepath.Join(s.dest, filepath.Base(name))); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Join(s.dest, "info"), 0o755); err != nil {
		return err
	}
	for _, name := range []string{"exclude", "attributes"} {
		if err := copyFile(filepath.Join(s.from.commonDir, "info", name), filepath.Join(s.dest, "info", name)); err != nil {
			return err
		}
	}
	return nil
}

// location is a repository on disk, as git finds it.
type location struct {
	gitDir, commonDir string
	top               string // empty: bare
	format            string // of objects
}

func (l location) in() gitcmd.Options {
	return gitcmd.Options{GitDir: l.gitDir, SafeDirectory: "*"}
}

func (l location) name() string {
	if l.top != "" {
		return filepath.Base(l.top)
	}
	return strings.TrimSuffix(filepath.Base(strings.TrimSuffix(l.gitDir, string(filepath.Separator)+".git")), ".git")
}

// locate asks git for the repository that dir is in.
func locate(ctx context.Context, git *gitcmd.Git, dir string) (location, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return location{}, fmt.Errorf("localgit: %w", err)
	}
	if st, err := os.Stat(abs); err != nil {
		return location{}, fmt.Errorf("%w: %w", forge.ErrNotFound, err)
	} else if !st.IsDir() {
		return location{}, fmt.Errorf("%w: %s is not a directory", forge.ErrInvalid, abs)
	}
	in := gitcmd.Options{Dir: abs, SafeDirectory: "*"}
	out, err := git.Output(ctx, in, "rev-parse", "--path-format=absolute",
		"--git-dir", "--git-common-dir", "--show-object-format", "--is-inside-work-tree")
	if _, ok := gitcmd.ExitCode(err); ok {
		return location{}, fmt.Errorf("%w: %s is not in a git repository: %w", forge.ErrNotFound, abs, err)
	}
	if err != nil {
		return location{}, fmt.Errorf("localgit: %w", err)
	}
	lines := strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
	if len(lines) != 4 {
		return location{}, fmt.Errorf("%w: the path %q has a line break", forge.ErrInvalid, abs)
	}
	l := location{gitDir: lines[0], commonDir: lines[1], format: lines[2]}
	if lines[3] == "true" {
		top, err := git.Output(ctx, in, "rev-parse", "--show-toplevel")
		if err != nil {
			return location{}, fmt.Errorf("localgit: %w", err)
		}
		l.top = strings.TrimSuffix(string(top), "\n")
	}
	return l, nil
}

// forPeople takes user and password out of a remote's URL.
func forPeople(remote string) string {
	u, err := url.Parse(remote)
	if err != nil || u.Scheme == "" || u.Host == "" {
		if strings.Contains(remote, "://") {
			return "" // not a URL, and no telling what is in it
		}
		return remote // a path, or host:path
	}
	u.User = nil
	return u.String()
}

// inside tells whether name is in dir, whatever links lead there.
func inside(dir, name string) bool {
	dir, name = realPath(dir), realPath(name)
	rel, err := filepath.Rel(dir, name)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, ".."+string(filepath.Separator))
}

// realPath resolves the links in the part of name that exists.
func realPath(name string) string {
	real, err := filepath.EvalSymlinks(name)
	if err == nil || name == filepath.Dir(name) {
		return real
	}
	return filepath.Join(realPath(filepath.Dir(name)), filepath.Base(name))
}

// copyFile copies a file with its modification time, by which git tells
// entries of an index that need a closer look; nothing where it is absent.
func copyFile(from, to string) error {
	src, err := os.Open(from)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer src.Close()
	st, err := src.Stat()
	if err != nil {
		return err
	}
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	if _, err := io.Copy(dst, src); err != nil {
		return errors.Join(err, dst.Close())
	}
	return errors.Join(dst.Close(), os.Chtimes(to, st.ModTime(), st.ModTime()))
}

func globEscape(s string) string {
	var b strings.Builder
	for _, r := range s {
		if strings.ContainsRune(`*?[\`, r) {
			b.WriteByte('\\')
		}
		b.WriteRune(r)
	}
	return b.String()
}
