package gitlab

import (
	"net/http"
	"slices"
	"strconv"
)

// HookURL is where the webhooks of a good setup go.
const HookURL = "https://ci.example.org/webhooks/gitlab"

// Setup is what people set up at the forge.
type Setup struct {
	Expired bool     // the token
	OAuth   bool     // it is one of an application
	Scopes  []string // of the token
	Ends    string   // day; empty: never
	Admin   bool     // the token's user administrates the instance
	Level   int      // of the token's user in each project, unless another is set; 0: none
	Hooks   []map[string]any
}

func goodSetup() Setup {
	return Setup{
		Scopes: []string{"api"}, Level: 40,
		Hooks: []map[string]any{{ // https://docs.gitlab.com/api/project_webhooks/
			"id": 1, "url": HookURL, "push_events": true, "tag_push_events": true, "merge_requests_events": true, "enable_ssl_verification": true,
			"alert_status": "executable", "disabled_until": nil, "token_present": true, "signing_token_present": false,
		}},
	}
}

// getSelf is not for tokens of OAuth (lib/api/personal_access_tokens/self_information.rb).
func (s *Server) getSelf(http.ResponseWriter, *http.Request, string) (int, any, error) {
	if s.Setup.OAuth {
		return 0, nil, problem{http.StatusBadRequest, "This endpoint requires token type to be a personal access token"}
	}
	self := map[string]any{"id": 1, "name": "solstice", "revoked": false, "scopes": s.Setup.Scopes, "user_id": 1, "active": true, "expires_at": nil}
	if s.Setup.Ends != "" {
		self["expires_at"] = s.Setup.Ends
	}
	return http.StatusOK, self, nil
}

func (s *Server) getHooks(w http.ResponseWriter, r *http.Request, _ string) (int, any, error) {
	if s.Setup.Level < 40 && !s.Setup.Admin {
		return 0, nil, problem{http.StatusForbidden, "403 Forbidden"}
	}
	return http.StatusOK, page(s, w, r, s.Setup.Hooks), nil
}

// listed is a project as the API has it.
func (s *Server) listed(base, project string) map[string]any {
	p := s.Project(base, project)
	p["http_url_to_repo"], p["visibility"] = p["git_http_url"], "private"
	delete(p, "git_http_url")
	delete(p, "visibility_level")
	return p
}

// named is the path of a project, which its number names as well.
func (s *Server) named(project string) string {
	if id, err := strconv.ParseInt(project, 10, 64); err == nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, all := range s.requests {
			for _, m := range all {
				if projectID(m.source) == id {
					return m.source
				}
			}
		}
	}
	return project
}

// ChangeRequest makes a merge request one from another project, of somebody
// else, that may be a draft.
func (s *Server) ChangeRequest(project string, number int, source, branch string, author int64, draft bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.requests[project][number-1]
	m.source, m.branch, m.author, m.draft = source, branch, author, draft
}

// CloseRequest closes one.
func (s *Server) CloseRequest(project string, number int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests[project][number-1].closed = true
}

// MergeRequestOf is the body of the webhook for a merge request that there is.
func (s *Server) MergeRequestOf(base, action, project string, number int) ([]byte, error) {
	s.mu.Lock()
	m := *s.requests[project][number-1]
	s.mu.Unlock()
	return s.MergeRequest(base, action, project, number, m.source, m.branch, m.head, "", m.author)
}

// getRequests lists the open ones, the newest first.
func (s *Server) getRequests(w http.ResponseWriter, r *http.Request, project string) (int, any, error) {
	if q := r.URL.Query(); q.Get("state") != "opened" || q.Get("order_by") != "updated_at" || q.Get("sort") != "desc" {
		return 0, nil, problem{http.StatusNotImplemented, "the fake lists the open ones only, those that changed last first"}
	}
	base := "http://" + r.Host
	s.mu.Lock()
	defer s.mu.Unlock()
	all := []map[string]any{}
	for i, m := range s.requests[project] {
		if m.closed {
			continue
		}
		one := map[string]any{ // https://docs.gitlab.com/api/merge_requests/
			"iid": i + 1, "state": "opened", "title": "a merge request", "web_url": base + "/" + project + "/-/merge_requests/" + strconv.Itoa(i+1),
			"author": User{m.author, s.users[m.author]}, "source_branch": m.branch, "target_branch": m.target, "sha": m.head, "draft": m.draft,
			"source_project_id": projectID(m.source), "target_project_id": projectID(project),
		}
		if m.source == "" { // it is gone
			one["source_project_id"] = nil
		}
		all = append(all, one)
	}
	slices.Reverse(all)
	return http.StatusOK, page(s, w, r, all), nil
}
