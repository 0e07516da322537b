package forgejo

import (
	"context"
	"fmt"
	"net/http"
	"slices"

	"github.com/solstice-ci/solstice-go/internal/fakeforge"
)

// HookURL is where the webhooks of a good setup go.
const HookURL = "https://ci.example.org/webhooks/forgejo"

// Setup is what people set up at the forge.
type Setup struct {
	Deleted bool            // the token
	Lacks   []string        // scopes that the token has not: "read:user"
	Role    map[string]bool // permissions of the token's user in each repository
	Hooks   []map[string]any
}

func goodSetup() Setup {
	return Setup{
		Role: map[string]bool{"admin": true, "push": true, "pull": true},
		Hooks: []map[string]any{{ // services/webhook/general.go, ToHook
			"id": 1, "type": "forgejo", "active": true, "branch_filter": "*", "authorization_header": "Bearer hunter2",
			"events": []string{"push", "pull_request", "pull_request_sync"}, "config": map[string]string{"url": HookURL, "content_type": "json"},
		}},
	}
}

// scope makes sure that the token has one (routers/api/v1/api.go, tokenRequiresScopes).
func (s *Server) scope(name string) error {
	if slices.Contains(s.Setup.Lacks, name) {
		return problem{http.StatusForbidden, fmt.Sprintf("token does not have at least one of required scope(s): [%s]", name)}
	}
	return nil
}

// getHooks is for who may administrate.
func (s *Server) getHooks(r *http.Request, _ string) (int, any, error) {
	if !s.Setup.Role["admin"] {
		return 0, nil, problem{http.StatusForbidden, "user should be an owner or a collaborator with admin write of a repository"}
	}
	size, page := s.page(r.URL.Query().Get("limit"), r.URL.Query().Get("page"), 50)
	return http.StatusOK, append([]map[string]any{}, fakeforge.Page(s.Setup.Hooks, page, size)...), nil
}

func (s *Server) getIssues(*http.Request, string) (int, any, error) {
	return http.StatusOK, []any{}, s.scope("read:issue")
}

// Pull is a pull request into main.
type Pull struct {
	Number        int
	HeadRepo      string
	HeadRef, Head string // branch and commit
	Author        int64
	Draft, Closed bool
	HeadIsGone    bool
}

// OpenPull opens a pull request for a commit that is in the repository, and gives
// its number.
func (s *Server) OpenPull(ctx context.Context, repo, head string) (int, error) {
	s.mu.Lock()
	number := len(s.pulls[repo]) + 1
	s.pulls[repo] = append(s.pulls[repo], &Pull{Number: number, HeadRepo: repo, HeadRef: "topic", Head: head, Author: 1})
	s.mu.Unlock()
	_, err := s.Repos.Git(ctx, repo, "", "update-ref", fmt.Sprintf("refs/pull/%d/head", number), head)
	return number, err
}

// ChangePull changes one.
func (s *Server) ChangePull(repo string, number int, change func(*Pull)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s.pulls[repo][number-1])
}

// PullRequestOf is the body of the webhook for a pull request that there is.
func (s *Server) PullRequestOf(ctx context.Context, base, action, repo string, number int) ([]byte, error) {
	tip, err := s.Repos.Resolve(ctx, repo, "refs/heads/main")
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	p := *s.pulls[repo][number-1]
	s.mu.Unlock()
	return s.PullRequest(base, action, repo, number, p.HeadRepo, p.HeadRef, p.Head, tip, p.Author)
}

// getPulls lists the open ones, the newest first.
func (s *Server) getPulls(r *http.Request, repo string) (int, any, error) {
	q := r.URL.Query()
	if q.Get("state") != "open" || q.Get("sort") != "recentupdate" {
		return 0, nil, problem{http.StatusNotImplemented, "the fake lists the open ones only, those that changed last first"}
	}
	tip, err := s.Repos.Resolve(r.Context(), repo, "refs/heads/main")
	if err != nil {
		return 0, nil, err
	}
	s.mu.Lock()
	var open []Pull
	for _, p := range slices.Backward(s.pulls[repo]) {
		if !p.Closed {
			open = append(open, *p)
		}
	}
	s.mu.Unlock()
	size, page := s.page(q.Get("limit"), q.Get("page"), 50)
	list := []any{}
	for _, p := range fakeforge.Page(open, page, size) {
		one := s.pull(base(r), repo, p.Number, p.HeadRepo, p.HeadRef, p.Head, tip, p.Author)
		one["draft"] = p.Draft
		if p.HeadIsGone {
			one["head"].(map[string]any)["repo"] = nil
		}
		list = append(list, one)
	}
	return http.StatusOK, list, nil
}
