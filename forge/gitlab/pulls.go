package gitlab

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strconv"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/internal/hook"
)

// visible are the levels of visibility as webhooks have them.
var visible = map[string]int{"private": 0, "internal": 10, "public": 20}

// listedProject is a project as the API has it, which webhooks have in other words.
type listedProject struct {
	ID            int64  `json:"id"`
	Path          string `json:"path_with_namespace"`
	WebURL        string `json:"web_url"`
	HTTPURL       string `json:"http_url_to_repo"`
	DefaultBranch string `json:"default_branch"`
	Visibility    string `json:"visibility"`
}

func (p listedProject) hooked() *hookedProject {
	return &hookedProject{p.ID, p.Path, p.WebURL, p.HTTPURL, p.DefaultBranch, visible[p.Visibility]}
}

// listed is a merge request as the API has it (https://docs.gitlab.com/api/merge_requests/).
type listed struct {
	mergeRequest
	WebURL string `json:"web_url"`
	SHA    string `json:"sha"`
	Author user   `json:"author"`
}

// PullRequests implements forge.PullRequestLister.
func (f *Forge) PullRequests(ctx context.Context, r forge.Repo, limit int) ([]forge.PullRequest, error) {
	if err := check(r); err != nil {
		return nil, err
	}
	if limit < 0 {
		return nil, fmt.Errorf("%w: limit %d", forge.ErrInvalid, limit)
	}
	var found []listed
	seen := map[int]bool{} // what changes meanwhile moves the others to the next page
	query := url.Values{"state": {"opened"}, "order_by": {"updated_at"}, "sort": {"desc"}}
	err := pages(ctx, f, query, func(list []listed) bool {
		for _, m := range list {
			if !seen[m.IID] && len(found) < limit {
				seen[m.IID] = true
				found = append(found, m)
			}
		}
		return len(found) < limit
	}, in(r, "merge_requests")...)
	if err != nil {
		return nil, err
	}
	var all []forge.PullRequest
	sources := map[int64]*hookedProject{}
	for _, m := range found {
		source, known := sources[m.SourceProjectID]
		if !known && m.SourceProjectID != 0 {
			var p listedProject
			err := f.get(ctx, &p, nil, "projects", strconv.FormatInt(m.SourceProjectID, 10))
			switch {
			case err == nil:
				source = p.hooked()
			case !errors.Is(err, forge.ErrNotFound) && !errors.Is(err, forge.ErrPermission): // those are forks that are not to be seen
				return nil, err
			}
			sources[m.SourceProjectID] = source
		}
		m.Action, m.URL, m.AuthorID, m.LastCommit.ID, m.Source = "open", m.WebURL, m.Author.ID, m.SHA, source
		e := forge.Event{Repo: r}
		// What a webhook would be refused for is left out.
		if err := merge(&e, payload{Attributes: &m.mergeRequest, User: m.Author}); err == nil && e.Validate() == nil {
			if source == nil {
				e.PullRequest.HeadRepo.ID = hook.ID(m.SourceProjectID)
			}
			all = append(all, *e.PullRequest)
		}
	}
	return all, ctx.Err()
}
