package forgejo

import (
	"context"
	"fmt"

	"github.com/solstice-ci/solstice-go/forge"
)

// PullRequests implements forge.PullRequestLister.
func (f *Forge) PullRequests(ctx context.Context, r forge.Repo, limit int) ([]forge.PullRequest, error) {
	if err := check(r); err != nil {
		return nil, err
	}
	if limit < 0 {
		return nil, fmt.Errorf("%w: limit %d", forge.ErrInvalid, limit)
	}
	var all []forge.PullRequest
	seen := map[int]bool{} // what changes meanwhile moves the others to the next page
	for page := 1; page <= maxPages && len(all) < limit; page++ {
		query := pageQuery(page, "limit", 50) // the most by default
		query.Set("state", "open")
		query.Set("sort", "recentupdate")
		var found []pullRequest
		if err := f.get(ctx, &found, query, in(r, "pulls")...); err != nil {
			return nil, err
		}
		if len(found) == 0 {
			return all, ctx.Err()
		}
		for i := range found {
			p := payload{Action: "opened", Number: found[i].Number, PullRequest: &found[i]}
			if base := found[i].Base.Repo; base != nil {
				p.Repository = *base
			}
			e := forge.Event{Repo: r}
			// What a webhook would be refused for is left out.
			if err := pull(&e, p); err == nil && e.Validate() == nil && !seen[p.Number] && len(all) < limit {
				seen[p.Number] = true
				all = append(all, *e.PullRequest)
			}
		}
	}
	return all, nil
}
