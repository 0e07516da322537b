package github

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	gh "github.com/google/go-github/v88/github"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/internal/hook"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

func isNotFound(err error) bool { return errors.Is(err, forge.ErrNotFound) }

// MayApprove implements forge.Permissions: who may push may approve. GitHub asks
// for a login, which may have changed hands: the answer has to be about the same
// ID.
func (f *Forge) MayApprove(ctx context.Context, r forge.Repo, u forge.User) (bool, error) {
	id, err := strconv.ParseInt(u.ID, 10, 64)
	if err != nil || id <= 0 {
		return false, fmt.Errorf("%w: GitHub's users have numbers, not the ID %.40q", forge.ErrInvalid, u.ID)
	}
	repo, err := f.open(ctx, r)
	if err != nil {
		return false, err
	}
	user, _, err := repo.Users.GetByID(ctx, id)
	if err = fail(ctx, err, "look for user %d", id); err != nil {
		if isNotFound(err) {
			return false, nil
		}
		return false, err
	}
	login := user.GetLogin()
	if user.GetID() != id || !isName(strings.TrimSuffix(login, "[bot]")) {
		return false, fmt.Errorf("%w: github: asked for user %d, got %d, %.80q", forge.ErrUnavailable, id, user.GetID(), login)
	}
	level, _, err := repo.Repositories.GetPermissionLevel(ctx, repo.owner, repo.name, login)
	if err = fail(ctx, err, "ask what %s may do in %s", login, r.FullName()); err != nil {
		return false, err
	}
	if got := level.GetUser().GetID(); got != id {
		return false, fmt.Errorf("%w: github: %s was user %d, and is user %d now", forge.ErrUnavailable, login, id, got)
	}
	// The four levels that there always were; "maintain" is said as "write".
	return level.GetPermission() == "admin" || level.GetPermission() == "write", nil
}

// MergeCommit implements forge.Merger. GitHub makes the commit in the background,
// also when it is asked.
func (f *Forge) MergeCommit(ctx context.Context, r forge.Repo, pr forge.PullRequest) (string, error) {
	if pr.Number <= 0 {
		return "", fmt.Errorf("%w: pull request %d", forge.ErrInvalid, pr.Number)
	}
	repo, err := f.open(ctx, r)
	if err != nil {
		return "", err
	}
	what := fmt.Sprintf("pull request %d of %s", pr.Number, r.FullName())
	found, _, err := repo.PullRequests.Get(ctx, repo.owner, repo.name, pr.Number)
	if err != nil {
		return "", fail(ctx, err, "read %s", what)
	}
	switch {
	case found.GetState() != "open":
		return "", fmt.Errorf("%w: github: %s is closed: there is nothing to merge", forge.ErrInvalid, what)
	case found.GetHead().GetSHA() != pr.HeadCommit:
		return "", fmt.Errorf("%w: github: the head of %s is %.40q, not %s", forge.ErrUnavailable, what, found.GetHead().GetSHA(), pr.HeadCommit)
	case found.Mergeable == nil:
		return "", fmt.Errorf("%w: github: %s has no merge commit yet", forge.ErrUnavailable, what)
	case !found.GetMergeable():
		return "", fmt.Errorf("%w: github: %s", forge.ErrConflict, what)
	}
	merge := found.GetMergeCommitSHA()
	if gitcmd.CheckObject(merge) != nil {
		return "", fmt.Errorf("%w: github: %s has no merge commit yet", forge.ErrUnavailable, what)
	}
	commit, _, err := repo.Git.GetCommit(ctx, repo.owner, repo.name, merge)
	if err = fail(ctx, err, "read the merge commit of %s", what); isNotFound(err) {
		return "", fmt.Errorf("%w: it is not there yet: %w", forge.ErrUnavailable, err)
	}
	if err != nil {
		return "", err
	}
	if len(commit.Parents) != 2 || commit.Parents[1].GetSHA() != pr.HeadCommit {
		return "", fmt.Errorf("%w: github: the merge commit of %s is of an older head", forge.ErrUnavailable, what)
	}
	return merge, nil
}

// maxComment is the longest text of a comment, in bytes: GitHub takes 65,536
// characters.
const maxComment = 65000

// Comment implements forge.Commenter. The key is a line that nobody sees.
func (f *Forge) Comment(ctx context.Context, r forge.Repo, pullRequest int, key, text string) error {
	mark, err := hook.Marker(key)
	if err != nil {
		return err
	}
	if pullRequest <= 0 {
		return fmt.Errorf("%w: pull request %d", forge.ErrInvalid, pullRequest)
	}
	repo, err := f.open(ctx, r)
	if err != nil {
		return err
	}
	unlock, err := f.comments.Lock(ctx, fmt.Sprintf("%s %d %s", repo.key(), pullRequest, key))
	if err != nil {
		return err
	}
	defer unlock()
	body := mark + "\n" + cut(text, maxComment)
	mine, err := f.findComment(ctx, repo, pullRequest, mark)
	if err != nil {
		return fail(ctx, err, "list the comments on pull request %d of %s", pullRequest, r.FullName())
	}
	switch {
	case mine == nil:
		_, _, err = repo.Issues.CreateComment(ctx, repo.owner, repo.name, pullRequest, &gh.IssueComment{Body: &body})
	case mine.GetBody() != body:
		_, _, err = repo.Issues.EditComment(ctx, repo.owner, repo.name, mine.GetID(), &gh.IssueComment{Body: &body})
	}
	return fail(ctx, err, "write to pull request %d of %s", pullRequest, r.FullName())
}

// findComment looks for our own comment with the mark: anybody can write the mark.
func (f *Forge) findComment(ctx context.Context, repo repository, number int, mark string) (mine *gh.IssueComment, err error) {
	self, err := f.selfID(ctx, repo)
	if err != nil {
		return nil, err
	}
	err = pages(func(o gh.ListOptions) (*gh.Response, error) {
		comments, resp, err := repo.Issues.ListComments(ctx, repo.owner, repo.name, number, &gh.IssueListCommentsOptions{ListOptions: o})
		for _, c := range comments {
			if mine == nil && strings.HasPrefix(c.GetBody(), mark) && c.GetUser().GetID() == self {
				mine = c
			}
		}
		return resp, err
	})
	return mine, err
}

// selfID is the user whose comments are ours: the token's, or the App's bot.
func (f *Forge) selfID(ctx context.Context, repo repository) (int64, error) {
	if id, ok := f.self.Get(""); ok {
		return id, nil
	}
	login := "" // whose the token is
	if f.app != nil {
		app, _, err := f.asApp.Apps.Get(ctx, "")
		if err != nil {
			return 0, err
		}
		login = app.GetSlug() + "[bot]"
	}
	user, _, err := repo.Users.Get(ctx, login)
	if err != nil {
		return 0, err
	}
	f.self.Put("", user.GetID(), 1)
	return user.GetID(), nil
}

// cut shortens a text to n bytes at most, between characters.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	const more = "…"
	return strings.ToValidUTF8(s[:n-len(more)], "") + more
}

// PullRequests implements forge.PullRequestLister.
func (f *Forge) PullRequests(ctx context.Context, r forge.Repo, limit int) ([]forge.PullRequest, error) {
	if limit < 0 {
		return nil, fmt.Errorf("%w: limit %d", forge.ErrInvalid, limit)
	}
	repo, err := f.open(ctx, r)
	if err != nil || limit == 0 {
		return nil, err
	}
	var all []forge.PullRequest
	seen := map[int]bool{} // what changes meanwhile moves the others to the next page
	size := min(limit, perPage)
	err = pages(func(o gh.ListOptions) (*gh.Response, error) {
		// Not by the library's method, whose pull requests are not those of webhooks.
		req, err := repo.NewRequest(ctx, http.MethodGet, fmt.Sprintf(
			"repos/%s/%s/pulls?state=open&sort=updated&direction=desc&per_page=%d&page=%d", repo.owner, repo.name, size, max(o.Page, 1)), nil)
		if err != nil {
			return nil, err
		}
		var found []pullPayload
		resp, err := repo.Do(req, &found)
		if err != nil {
			return nil, err
		}
		for i := range found {
			e := forge.Event{Kind: forge.KindPullRequest, Action: "opened", Repo: r}
			if base := found[i].Base.Repo; base != nil {
				e.Repo.ID = hook.ID(base.ID)
			}
			// What a webhook would be refused for is left out.
			if err := found[i].event(&e); err == nil && e.Validate() == nil && !seen[found[i].Number] && len(all) < limit {
				seen[found[i].Number] = true
				all = append(all, *e.PullRequest)
			}
		}
		if len(all) == limit {
			resp.NextPage = 0
		}
		return resp, nil
	})
	return all, fail(ctx, err, "list the pull requests of %s", r.FullName())
}
