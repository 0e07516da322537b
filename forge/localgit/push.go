package localgit

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// DefaultMaxEvents is how many events of one push PostReceive gives if not told
// otherwise.
const DefaultMaxEvents = 100

const (
	maxUpdate  = 128 << 10 // bytes of a line of git's; its own bound is half of that
	maxTags    = 10        // tags of tags that are looked through
	maxTitle   = 1 << 10
	maxMessage = 16 << 10
	maxSender  = 1 << 10
)

// PostReceiveOptions qualifies PostReceive; the zero value is for a Forge of all
// repositories of this machine.
type PostReceiveOptions struct {
	// Root is Config.Root of the Forge that has the repository, whose name there
	// the events carry; empty: "/".
	Root string
	// MaxEvents bounds the events; 0: DefaultMaxEvents.
	MaxEvents int
	// Git is the git program; empty: looked for in the search path.
	Git string
}

// Push is what one push did, as far as it may start runs.
type Push struct {
	Repo forge.Repo // named as Root has it
	// Events are those of branches (KindPush) and tags (KindTag), in git's order;
	// an annotated tag's commit is what it tags. Sender is the commit's author, as
	// the commit has it, so without an ID. What has changed the forge can be asked.
	Events []forge.Event
	// Ignored says of refs, at most MaxEvents, why they give no event.
	Ignored []string
	// More are the refs beyond MaxEvents, which were not looked at.
	More int
}

// PostReceive reads what git gives a post-receive hook on its standard input, see
// githooks(5), for the repository that dir is: a line "OLD NEW REF" for each ref
// that was pushed. Deletions, and refs that are neither branches nor tags, give
// nothing. It wraps forge.ErrInvalid where that is not what git writes, or the
// repository is not below Root, and forge.ErrNotFound where dir is no repository.
func PostReceive(ctx context.Context, dir string, updates io.Reader, o PostReceiveOptions) (Push, error) {
	limit := o.MaxEvents
	if limit <= 0 {
		limit = DefaultMaxEvents
	}
	pushed, more, err := parseUpdates(updates, limit)
	if err != nil {
		return Push{}, err
	}
	git, err := findGit(ctx, o.Git)
	if err != nil {
		return Push{}, err
	}
	at, err := locate(ctx, git, dir)
	if err != nil {
		return Push{}, err
	}
	p := Push{More: more}
	if p.Repo, err = at.below(o.Root); err != nil {
		return Push{}, err
	}
	s := snapshot{git: git, from: at}
	head, err := s.ask(ctx, "symbolic-ref", "--quiet", "HEAD")
	if err != nil {
		return Push{}, err
	}
	p.Repo.DefaultBranch, _ = strings.CutPrefix(head, "refs/heads/")
	objects := git.Objects(at.in())
	defer objects.Close()
	for _, u := range pushed {
		e, err := u.event(ctx, objects)
		if errors.Is(err, forge.ErrIgnored) || errors.Is(err, forge.ErrInvalid) {
			p.Ignored = append(p.Ignored, fmt.Sprintf("%.200q: %v", u.ref, err))
			continue
		}
		if err != nil {
			return Push{}, err
		}
		e.Repo = p.Repo
		p.Events = append(p.Events, e)
	}
	return p, nil
}

// below is the repository as a Forge of root names it.
func (l location) below(root string) (forge.Repo, error) {
	if root == "" {
		root = string(filepath.Separator)
	}
	root, err := filepath.Abs(root)
	if err != nil {
		return forge.Repo{}, fmt.Errorf("localgit: %w", err)
	}
	path := l.path()
	name, err := filepath.Rel(realPath(root), realPath(path))
	if err != nil || name == "." || name == ".." || strings.HasPrefix(name, ".."+string(filepath.Separator)) {
		return forge.Repo{}, fmt.Errorf("%w: the repository %s is not below %s", forge.ErrInvalid, path, root)
	}
	owner, base := filepath.Split(name)
	r := forge.Repo{Owner: strings.Trim(filepath.ToSlash(owner), "/"), Name: base}
	return r, r.Validate()
}

// path is where people say that the repository is: of a linked work tree the main one.
func (l location) path() string {
	if filepath.Base(l.commonDir) == ".git" {
		return filepath.Dir(l.commonDir)
	}
	return l.commonDir
}

// update is one line of git's.
type update struct{ before, after, ref string }

// parseUpdates gives the first branches and tags that are there after the push, and
// how many more there are.
func parseUpdates(r io.Reader, limit int) (pushed []update, more int, err error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxUpdate)
	for lines.Scan() {
		var u update
		fields := strings.SplitN(lines.Text(), " ", 3)
		if len(fields) == 3 {
			u = update{fields[0], fields[1], fields[2]}
		}
		if !forge.IsCommit(u.before) || !forge.IsCommit(u.after) || len(u.before) != len(u.after) || u.ref == "" {
			return nil, 0, fmt.Errorf("%w: %.80q is no line of a post-receive hook", forge.ErrInvalid, lines.Text())
		}
		if strings.Trim(u.after, "0") == "" || !strings.HasPrefix(u.ref, "refs/heads/") && !strings.HasPrefix(u.ref, "refs/tags/") {
			continue
		}
		if len(pushed) == limit {
			more++
			continue
		}
		pushed = append(pushed, u)
	}
	if errors.Is(lines.Err(), bufio.ErrTooLong) {
		return nil, 0, fmt.Errorf("%w: a line of more than %d bytes", forge.ErrInvalid, maxUpdate)
	}
	if err := lines.Err(); err != nil {
		return nil, 0, fmt.Errorf("localgit: read what was pushed: %w", err)
	}
	return pushed, more, nil
}

// event wraps forge.ErrIgnored where there is no commit, and forge.ErrInvalid
// where the ref's name is one that git takes and others would not.
func (u update) event(ctx context.Context, objects *gitcmd.Objects) (forge.Event, error) {
	e := forge.Event{Kind: forge.KindPush, Ref: u.ref, Before: u.before, Time: time.Now().UTC()}
	if strings.HasPrefix(u.ref, "refs/tags/") {
		e.Kind, e.Before = forge.KindTag, "" // which may have been no commit
	}
	if !forge.IsRef(u.ref) {
		return e, fmt.Errorf("%w: name of a ref", forge.ErrInvalid)
	}
	name := u.after
	for range maxTags {
		kind, data, err := objects.Read(ctx, name, maxObject)
		switch {
		case errors.Is(err, gitcmd.ErrTooLarge), errors.Is(err, gitcmd.ErrNoObject):
			return e, fmt.Errorf("%w: it is not a commit that can be read", forge.ErrIgnored)
		case err != nil:
			return e, fmt.Errorf("localgit: read what was pushed: %w", err)
		case kind == "commit":
			e.Commit = name
			describe(&e, data)
			return e, nil
		case kind != "tag":
			return e, fmt.Errorf("%w: it is a %s, no commit", forge.ErrIgnored, kind)
		}
		line, _, _ := bytes.Cut(data, []byte("\n"))
		tagged, ok := strings.CutPrefix(string(line), "object ")
		if !ok || gitcmd.CheckObject(tagged) != nil {
			break
		}
		name = tagged
	}
	return e, fmt.Errorf("%w: it tags no commit", forge.ErrIgnored)
}

// describe takes title, message and author from a commit object.
func describe(e *forge.Event, commit []byte) {
	head, message, _ := bytes.Cut(commit, []byte("\n\n"))
	for line := range bytes.Lines(head) {
		if author, ok := bytes.CutPrefix(line, []byte("author ")); ok {
			name, _, _ := bytes.Cut(author, []byte(" <"))
			e.Sender.Login = text(name, maxSender)
		}
	}
	message = bytes.TrimLeft(message, "\n")
	title, _, _ := bytes.Cut(message, []byte("\n"))
	e.Title, e.Message = text(title, maxTitle), text(message, maxMessage)
}

// text is at most limit bytes of UTF-8.
func text(b []byte, limit int) string {
	s := strings.ToValidUTF8(string(b), "\uFFFD")
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "")
	}
	return s
}
