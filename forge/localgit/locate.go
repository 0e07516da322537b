package localgit

import (
	"context"
	"errors"
	"fmt"
)

// Located is a repository on this machine, and where it is at.
type Located struct {
	// Path is absolute: below Config.Root, a [Forge] has the repository under
	// the rest of it as its name. Of a linked work tree it is the main one's.
	Path   string
	Name   string // of the directory, or of the bare repository without ".git"; what [Open] calls it
	Commit string // what HEAD is
	Ref    string // full name of the branch that HEAD is on; empty: detached
	Origin string // URL of the remote "origin", for people: without user and password
}

// Locate finds the repository that dir is in, and writes nothing to it. It
// wraps ErrNoCommits, forge.ErrNotFound (no repository) and forge.ErrInvalid.
func Locate(ctx context.Context, dir string) (Located, error) {
	git, err := findGit(ctx, "")
	if err != nil {
		return Located{}, err
	}
	from, err := locate(ctx, git, dir)
	if err != nil {
		return Located{}, err
	}
	s := snapshot{git: git, from: from}
	l := Located{Path: from.path(), Name: from.name()}
	l.Commit, err = resolve(ctx, git, from.in(), "HEAD")
	if errors.Is(err, errNoRevision) {
		err = fmt.Errorf("%w: %s", ErrNoCommits, from.gitDir)
	}
	if err != nil {
		return Located{}, err
	}
	if l.Ref, err = s.ask(ctx, "symbolic-ref", "--quiet", "HEAD"); err != nil {
		return Located{}, err
	}
	if l.Origin, err = s.ask(ctx, "config", "--get", "remote.origin.url"); err != nil {
		return Located{}, err
	}
	l.Origin = forPeople(l.Origin)
	return l, nil
}
