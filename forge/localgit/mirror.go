package localgit

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// MirrorOptions qualifies Mirror; the zero value fetches the history of the
// remote's HEAD over https.
type MirrorOptions struct {
	// Ref is a branch, a tag, a full ref name or a full object name; empty: HEAD.
	// Where a branch and a tag share a name the tag wins, as it does in git.
	Ref string
	// Depth cuts the history; 0: all of it, with the tags in it.
	Depth int
	// Schemes are the transports that may be used; empty: https alone. "file"
	// also allows an absolute path.
	Schemes []string
	// Header are request headers that authorise; they are secret.
	Header map[string]string
	// Env are further variables for the transport, "NAME=value", such as
	// SSH_AUTH_SOCK or a proxy; nothing is inherited.
	Env []string
	// Git is the git program; empty: looked for in the search path.
	Git string
}

// Mirrored is what Mirror fetched.
type Mirrored struct {
	Commit string
	Ref    string // full name; empty where Ref was an object name, or HEAD is detached
}

// Mirror fetches one ref or commit of a URL into a new bare repository at dest,
// which must not exist or be empty, and has HEAD there. HTTP redirects are not
// followed. It wraps forge.ErrInvalid for what git must not be given,
// forge.ErrNotFound when the remote has no such ref or commit, and
// forge.ErrUnavailable when the remote cannot be reached or refuses.
func Mirror(ctx context.Context, url, dest string, o MirrorOptions) (Mirrored, error) {
	m := mirror{url: url, schemes: o.Schemes}
	if len(m.schemes) == 0 {
		m.schemes = []string{"https"}
	}
	if err := gitcmd.CheckURL(url, m.schemes...); err != nil {
		return Mirrored{}, fmt.Errorf("%w: %w", forge.ErrInvalid, err)
	}
	isCommit := gitcmd.CheckObject(o.Ref) == nil
	if o.Ref != "" && !isCommit {
		if err := gitcmd.CheckRef(o.Ref); err != nil {
			return Mirrored{}, fmt.Errorf("%w: %w", forge.ErrInvalid, err)
		}
	}
	if o.Depth < 0 {
		return Mirrored{}, fmt.Errorf("%w: depth %d", forge.ErrInvalid, o.Depth)
	}
	var err error
	if m.git, err = findGit(ctx, o.Git); err != nil {
		return Mirrored{}, err
	}
	if m.dest, err = newDir(dest); err != nil {
		return Mirrored{}, err
	}
	m.remote = gitcmd.Options{Protocols: m.schemes, Config: []string{"http.followRedirects=false"}, Env: o.Env}
	for name, value := range o.Header {
		if strings.ContainsAny(name+value, "\r\n\x00") {
			return Mirrored{}, fmt.Errorf("%w: header with a line break", forge.ErrInvalid)
		}
		m.remote.Config = append(m.remote.Config, "http.extraHeader="+name+": "+value)
	}
	var got Mirrored
	if isCommit {
		got, err = m.fetchCommit(ctx, o.Ref, o.Depth)
	} else {
		got, err = m.fetchRef(ctx, o.Ref, o.Depth)
	}
	if err != nil {
		return Mirrored{}, err
	}
	return got, m.setHead(ctx, got)
}

type mirror struct {
	git       *gitcmd.Git
	url, dest string
	schemes   []string
	remote    gitcmd.Options
}

func (m *mirror) local() gitcmd.Options { return gitcmd.Options{GitDir: m.dest} }

func (m *mirror) fetchRef(ctx context.Context, ref string, depth int) (Mirrored, error) {
	commit, name, err := m.find(ctx, ref)
	if err != nil {
		return Mirrored{}, err
	}
	if err := m.init(ctx, len(commit)); err != nil {
		return Mirrored{}, err
	}
	source, target := name, name
	if name == "" { // a detached HEAD
		source, target = "HEAD", "refs/solstice/head"
	}
	if err := m.fetch(ctx, depth, "+"+source+":"+target); err != nil {
		return Mirrored{}, err
	}
	// The ref may have moved since it was found: what was fetched counts.
	commit, err = resolve(ctx, m.git, m.local(), target)
	if err != nil {
		return Mirrored{}, fmt.Errorf("%w: %s is not a commit: %w", forge.ErrInvalid, source, err)
	}
	return Mirrored{Commit: commit, Ref: name}, nil
}

func (m *mirror) fetchCommit(ctx context.Context, commit string, depth int) (Mirrored, error) {
	if err := m.init(ctx, len(commit)); err != nil {
		return Mirrored{}, err
	}
	err := m.fetch(ctx, depth, "+"+commit+":refs/solstice/head")
	if err != nil && ctx.Err() == nil {
		// Not every server gives a commit that no ref points at.
		err = m.fetch(ctx, 0, "+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*")
	}
	if err != nil {
		return Mirrored{}, err
	}
	if _, err := resolve(ctx, m.git, m.local(), commit); err != nil {
		if ctx.Err() != nil {
			return Mirrored{}, err
		}
		return Mirrored{}, fmt.Errorf("%w: commit %s", forge.ErrNotFound, commit)
	}
	return Mirrored{Commit: commit}, nil
}

// find asks the remote for the ref; name is empty for a detached HEAD.
func (m *mirror) find(ctx context.Context, ref string) (object, name string, err error) {
	candidates := []string{"refs/tags/" + ref, "refs/heads/" + ref}
	switch {
	case ref == "" || ref == "HEAD":
		candidates = []string{"HEAD"}
	case strings.HasPrefix(ref, "refs/"):
		candidates = []string{ref}
	}
	out, err := m.git.Output(ctx, m.remote, slices.Concat([]string{"ls-remote", "--symref", "--", m.url}, candidates)...)
	if err != nil {
		return "", "", m.unavailable(ctx, err)
	}
	objects, symref := map[string]string{}, ""
	for line := range strings.Lines(string(out)) {
		left, right, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
		if target, ok := strings.CutPrefix(left, "ref: "); ok {
			if right == "HEAD" {
				symref = target
			}
			continue
		}
		if gitcmd.CheckObject(left) == nil {
			objects[right] = left
		}
	}
	for _, c := range candidates {
		object, ok := objects[c]
		switch {
		case !ok:
		case c != "HEAD":
			return object, c, nil
		case symref == "" || gitcmd.CheckRef(symref) == nil:
			return object, symref, nil
		}
	}
	return "", "", fmt.Errorf("%w: ref %q at the remote", forge.ErrNotFound, ref)
}

func (m *mirror) init(ctx context.Context, hexLen int) error {
	return initBare(ctx, m.git, m.dest, objectFormat(hexLen))
}

func (m *mirror) fetch(ctx context.Context, depth int, refspecs ...string) error {
	in := m.remote
	in.GitDir = m.dest
	args := []string{"fetch", "--quiet", "--no-write-fetch-head", "--no-recurse-submodules"}
	if depth > 0 {
		args = append(args, "--no-tags", "--depth="+strconv.Itoa(depth))
	}
	args = append(args, "--", m.url)
	if err := m.git.Run(ctx, in, append(args, refspecs...)...); err != nil {
		return m.unavailable(ctx, err)
	}
	return nil
}

func (m *mirror) unavailable(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return err
	}
	return fmt.Errorf("%w: %w", forge.ErrUnavailable, err)
}

func (m *mirror) setHead(ctx context.Context, got Mirrored) error {
	return setHead(ctx, m.git, m.local(), got.Commit, got.Ref)
}

// setHead points HEAD at the branch, or at the commit where ref is none.
func setHead(ctx context.Context, git *gitcmd.Git, in gitcmd.Options, commit, ref string) error {
	args := []string{"update-ref", "--no-deref", "HEAD", commit}
	if strings.HasPrefix(ref, "refs/heads/") {
		args = []string{"symbolic-ref", "HEAD", ref}
	}
	if err := git.Run(ctx, in, args...); err != nil {
		return fmt.Errorf("localgit: set HEAD: %w", err)
	}
	return nil
}

func objectFormat(hexLen int) string {
	if hexLen == 64 {
		return "sha256"
	}
	return "sha1"
}

func initBare(ctx context.Context, git *gitcmd.Git, dest, format string) error {
	// Newer versions of git may prefer other ref formats, which older ones in
	// guests and on other hosts can't read.
	in := gitcmd.Options{Env: []string{"GIT_DEFAULT_REF_FORMAT=files"}}
	if err := git.Run(ctx, in, "init", "--quiet", "--bare", "--template=", "--object-format="+format,
		"--initial-branch=main", "--", dest); err != nil {
		return fmt.Errorf("localgit: make a repository: %w", err)
	}
	return nil
}

// newDir gives the absolute path of a directory that does not exist or is empty.
func newDir(dest string) (string, error) {
	abs, err := filepath.Abs(dest)
	if err != nil {
		return "", fmt.Errorf("localgit: %w", err)
	}
	entries, err := os.ReadDir(abs)
	switch {
	case err == nil && len(entries) > 0:
		return "", fmt.Errorf("%w: %s is not empty", forge.ErrInvalid, abs)
	case err != nil && !os.IsNotExist(err):
		return "", fmt.Errorf("%w: %w", forge.ErrInvalid, err)
	}
	return abs, nil
}
