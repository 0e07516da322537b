package solstice

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

// subject is what a request comes to.
type subject struct {
	commit    string // to be tested
	head      string // beside which statuses stand; empty: commit
	workflows string // the commit whose workflow files say what is done
	awaits    string // not empty: why somebody has to approve it first
	note      string // what people should know, one line
}

// mergePatience is how long a forge that is just making a test merge is waited
// for, and mergeEvery how often it is asked.
const (
	mergePatience = 10 * time.Second
	mergeEvery    = time.Second
)

// subjectOf finds what of a pull request is tested, and by whose word; of
// everything else it is the commit, by its own.
func (e *Engine) subjectOf(ctx context.Context, f forge.Forge, r RunRequest) (subject, error) {
	s := subject{commit: r.Commit, workflows: r.Commit, awaits: r.AwaitApproval}
	pr := r.Event.PullRequest
	if r.Event.Kind != forge.KindPullRequest || pr == nil {
		return s, nil
	}
	if r.Commit == pr.HeadCommit {
		s.head = pr.HeadCommit
		var err error
		if s.commit, s.note, err = mergeOf(ctx, f, r.Repo, *pr); err != nil {
			return s, err
		}
		s.workflows = s.commit
	}
	trusted, err := e.trusts(ctx, f, r.Repo, *pr)
	if err != nil || trusted {
		return s, err
	}
	if s.awaits == "" {
		s.awaits = fmt.Sprintf("%s, who made it from a fork, may not write to %s; who may, may approve it", firstOf(pr.Author.Login, "its author"), r.Repo.FullName())
	}
	// A stranger does not say what is done with a stranger's change.
	if s.workflows, err = f.Resolve(ctx, r.Repo, "refs/heads/"+strings.TrimPrefix(pr.BaseRef, "refs/heads/")); err != nil {
		return s, fmt.Errorf("solstice: the workflow files of %q: %w", pr.BaseRef, err)
	}
	return s, nil
}

// mergeOf is the commit to test for a pull request: the merge of its head, or the
// head alone where there is none, and why.
func mergeOf(ctx context.Context, f forge.Forge, repo forge.Repo, pr forge.PullRequest) (commit, note string, err error) {
	m, ok := forge.As[forge.Merger](f)
	if !ok {
		return pr.HeadCommit, "", nil
	}
	for until := time.Now().Add(mergePatience); ; {
		commit, err = m.MergeCommit(ctx, repo, pr)
		switch {
		case err == nil:
			return commit, "", nil
		case errors.Is(err, forge.ErrConflict):
			return pr.HeadCommit, fmt.Sprintf("it conflicts with %s: its head is tested alone", pr.BaseRef), nil
		case errors.Is(err, errors.ErrUnsupported):
			return pr.HeadCommit, "", nil
		case !errors.Is(err, forge.ErrUnavailable):
			return "", "", fmt.Errorf("solstice: merge of pull request %d: %w", pr.Number, err)
		case time.Now().After(until):
			return pr.HeadCommit, fmt.Sprintf("the forge has not merged it into %s yet: its head is tested alone", pr.BaseRef), nil
		}
		select {
		case <-ctx.Done():
			return "", "", ctx.Err()
		case <-time.After(mergeEvery):
		}
	}
}

// trusts reports whether a pull request may begin at once: it is from the
// repository itself, or by somebody who may write to it, whom the forge is asked
// about by ID, since names change hands.
func (e *Engine) trusts(ctx context.Context, f forge.Forge, repo forge.Repo, pr forge.PullRequest) (bool, error) {
	if !pr.Fork {
		return true, nil
	}
	return mayApprove(ctx, f, repo, pr.Author)
}

func mayApprove(ctx context.Context, f forge.Forge, repo forge.Repo, u forge.User) (bool, error) {
	p, ok := forge.As[forge.Permissions](f)
	if !ok || u.ID == "" {
		return false, nil
	}
	may, err := p.MayApprove(ctx, repo, u)
	switch {
	case errors.Is(err, forge.ErrNotFound), errors.Is(err, forge.ErrPermission), errors.Is(err, errors.ErrUnsupported): // gone, or not to be known
		return false, nil
	case err != nil:
		return false, fmt.Errorf("solstice: the rights of user %s at %s: %w", u.ID, repo.FullName(), err)
	}
	return may, nil
}

var skipCI = regexp.MustCompile(`(?i)\[(skip ci|ci skip|no ci|skip solstice)\]`)

// unwanted says why an event starts nothing, whatever workflow files say; empty:
// it may.
func unwanted(ev forge.Event) string {
	switch {
	case ev.Kind == forge.KindPullRequest && ev.Action == "closed":
		return "the pull request was closed"
	case ev.Kind == forge.KindPush && skipCI.MatchString(ev.Message):
		return "its commit message says " + skipCI.FindString(ev.Message)
	case ev.Kind == forge.KindInstallation, ev.Kind == forge.KindPing:
		return "it is of kind " + string(ev.Kind)
	}
	return ""
}

// maxChangedPaths is how many changed paths are looked at: with more, path filters
// let everything through.
const maxChangedPaths = 3000

// changedPaths asks the forge what an event changed, where it did not say; nil:
// not to be known.
func changedPaths(ctx context.Context, f forge.Forge, r RunRequest, s subject) ([]string, error) {
	if r.Event.ChangedPaths != nil {
		return r.Event.ChangedPaths, nil
	}
	c, ok := forge.As[forge.ChangedPaths](f)
	base := r.Event.Before
	if pr := r.Event.PullRequest; pr != nil {
		base = pr.BaseCommit
	}
	if !ok || base == "" {
		return nil, nil
	}
	if strings.Trim(base, "0") == "" && r.Repo.DefaultBranch != "" { // a new branch: what it adds
		commit, err := f.Resolve(ctx, r.Repo, "refs/heads/"+r.Repo.DefaultBranch)
		if err != nil && !errors.Is(err, forge.ErrNotFound) {
			return nil, fmt.Errorf("solstice: changed paths: %w", err)
		}
		if err == nil && commit != s.commit {
			base = commit
		}
	}
	paths, truncated, err := c.ChangedPaths(ctx, r.Repo, base, s.commit, maxChangedPaths)
	switch {
	case errors.Is(err, forge.ErrNotFound), errors.Is(err, errors.ErrUnsupported): // of a branch that was pushed over
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("solstice: changed paths: %w", err)
	case truncated:
		return nil, nil
	case paths == nil:
		return []string{}, nil
	}
	return paths, nil
}

// asksForPaths reports whether a workflow has a filter of paths for an event.
func asksForPaths(w *workflow.Workflow, kind forge.Kind) bool {
	switch kind {
	case forge.KindPush:
		return w.On.Push != nil && w.On.Push.Paths != nil
	case forge.KindPullRequest:
		return w.On.PullRequest != nil && w.On.PullRequest.Paths != nil
	}
	return false
}
