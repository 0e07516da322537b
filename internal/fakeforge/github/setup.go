package github

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"time"
)

// HookURL is where the webhooks of a good setup go.
const HookURL = "https://ci.example.org/webhooks/github"

// Setup is what people set up at GitHub.
type Setup struct {
	Permissions map[string]string // of the App
	Accepted    map[string]string // of its installations; nil: the same
	Events      []string          // of the App
	Hook        map[string]string // of the App, empty: none
	Deliveries  []map[string]any  // of the App, from the newest on
	Suspended   bool              // the installations

	Expired     bool            // the token
	Ends        time.Time       // of the token; zero: never
	Scopes      []string        // of a classic token; nil: it is a fine-grained one
	Role        map[string]bool // of the token's user in each repository
	Hooks       []map[string]any
	HooksHidden bool // from the token

	Ahead time.Duration // GitHub's clock
}

func goodSetup() Setup {
	config := func() map[string]string {
		return map[string]string{"url": HookURL, "content_type": "json", "insecure_ssl": "0", "secret": "********"}
	}
	return Setup{
		Permissions: map[string]string{"checks": "write", "contents": "read", "metadata": "read", "pull_requests": "write"},
		Events:      []string{"check_run", "check_suite", "pull_request", "push"},
		Hook:        config(),
		Deliveries:  []map[string]any{Delivery(2, "push", "OK", 200), Delivery(1, "ping", "OK", 200)},
		Scopes:      []string{"repo"},
		Role:        map[string]bool{"admin": true, "maintain": true, "push": true, "triage": true, "pull": true},
		Hooks: []map[string]any{{
			"type": "Repository", "id": 12, "name": "web", "active": true, "events": []string{"push", "pull_request"}, "config": config(),
			"last_response": map[string]any{"code": 202, "status": "active", "message": "OK"},
		}},
	}
}

// Delivery is one of a webhook; a repeated one has the number of the first.
func Delivery(n int, event, status string, code int) map[string]any {
	return map[string]any{
		"id": 1000 + n, "guid": "58474f00-b361-11eb-836d-0e4f3503ccb" + string(rune('0'+n)), "delivered_at": "2026-01-02T03:04:05Z",
		"redelivery": false, "duration": 0.27, "status": status, "status_code": code, "event": event, "action": nil,
		"installation_id": 123, "repository_id": 456,
	}
}

// header of every answer.
func (s Setup) header(h http.Header, r *http.Request) {
	if s.Ahead != 0 {
		h.Set("Date", time.Now().Add(s.Ahead).UTC().Format(http.TimeFormat))
	}
	if !strings.HasSuffix(r.Header.Get("Authorization"), Token) {
		return
	}
	if s.Scopes != nil {
		h.Set("X-OAuth-Scopes", strings.Join(s.Scopes, ", "))
	}
	if !s.Ends.IsZero() {
		h.Set("GitHub-Authentication-Token-Expiration", s.Ends.UTC().Format("2006-01-02 15:04:05 MST"))
	}
}

func (s *Server) getApp(call) (int, any, error) {
	return http.StatusOK, map[string]any{
		"id": AppID, "slug": strings.TrimSuffix(bot, "[bot]"), "name": "Solstice (fake)", "owner": map[string]any{"id": 7, "login": "team", "type": "Organization"},
		"permissions": s.Setup.Permissions, "events": s.Setup.Events, "installations_count": 1,
	}, nil
}

func (s *Server) installation(owner string) map[string]any {
	i := map[string]any{
		"id": s.installs[owner], "app_id": AppID, "permissions": s.Setup.Permissions, "events": s.Setup.Events, "suspended_at": nil,
	}
	if s.Setup.Accepted != nil {
		i["permissions"] = s.Setup.Accepted
	}
	if s.Setup.Suspended {
		i["suspended_at"] = "2026-01-02T03:04:05Z"
	}
	return i
}

func (s *Server) getAppHook(call) (int, any, error) {
	return http.StatusOK, s.Setup.Hook, nil
}

func (s *Server) getDeliveries(call) (int, any, error) {
	return http.StatusOK, append([]map[string]any{}, s.Setup.Deliveries...), nil
}

func (s *Server) getHooks(c call) (int, any, error) {
	if s.Setup.HooksHidden || c.user.ID != 1 {
		return 0, nil, notFound
	}
	return http.StatusOK, paged(c, s.Setup.Hooks), nil
}

// head is the commit of a pull request's head.
func (s *Server) head(ctx context.Context, repo string, p *Pull) (string, error) {
	if p.Fork != "" {
		repo = p.Fork
	}
	return s.Repos.Resolve(ctx, repo, "refs/heads/"+p.Head)
}

// PullRequest is the payload of an action of a pull request that there is.
func (s *Server) PullRequest(ctx context.Context, base, repo string, number int, action string) (map[string]any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pullRequest(ctx, base, repo, s.pulls[key(repo, number)], action)
}

func (s *Server) pullRequest(ctx context.Context, base, repo string, p *Pull, action string) (map[string]any, error) {
	head, err := s.head(ctx, repo, p)
	if err != nil {
		return nil, err
	}
	into, err := s.Repos.Resolve(ctx, repo, "refs/heads/"+p.Base)
	if err != nil {
		return nil, err
	}
	all := PullRequest(base, repo, p.Fork, action, p.Number, p.Head, head, p.Base, into, p.Author)
	all["pull_request"].(map[string]any)["draft"] = p.Draft
	return all, nil
}

// getPulls lists the open ones, the newest first.
func (s *Server) getPulls(c call) (int, any, error) {
	if q := c.URL.Query(); q.Get("state") != "open" || q.Get("sort") != "updated" || q.Get("direction") != "desc" {
		return 0, nil, problem{http.StatusNotImplemented, "the fake lists the open ones only, those that changed last first"}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	list := []any{}
	for name, p := range s.pulls {
		if name != key(c.repo, p.Number) || p.State != "open" {
			continue
		}
		one, err := s.pullRequest(c.Context(), "http://"+c.Host, c.repo, p, "")
		if err != nil {
			return 0, nil, err
		}
		list = append(list, one["pull_request"])
	}
	slices.SortFunc(list, func(a, b any) int { return b.(map[string]any)["number"].(int) - a.(map[string]any)["number"].(int) })
	return http.StatusOK, paged(c, list), nil
}
