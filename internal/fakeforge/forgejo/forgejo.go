// Package forgejo is a fake of Forgejo and Gitea: their API, as far as package
// forge/forgejo and people need it, on top of bare repositories. Paths, status
// codes, field names, pagination and oddities are those of Gitea's source
// (routers/api/v1, modules/structs, services/convert).
package forgejo

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/internal/fakeforge"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// Server is the forge; set its fields before it is used.
type Server struct {
	Repos   *fakeforge.Repos
	Faults  fakeforge.Faults
	Token   string // the one that is accepted; its user is "bot", 1
	Version string // "1.25.0" is Gitea, "12.0.0+gitea-1.22.0" Forgejo
	// Setup is what people set up; New makes everything right.
	Setup Setup
	// PageSize bounds pages of lists and trees; 0: 50 and 1,000, as by default.
	PageSize int

	mu          sync.Mutex
	users       map[int64]string             // logins by ID
	permissions map[string]map[string]string // by repository, by login
	statuses    map[string][]Status          // by "owner/name@sha", in order
	comments    map[string][]*Comment        // by "owner/name#number"
	renamed     map[string]string
	pulls       map[string][]*Pull // by repository, in order
	nextID      int64
}

// User as the API gives it.
type User struct {
	ID    int64  `json:"id"`
	Login string `json:"login"`
}

// Status as the API gives it.
type Status struct {
	ID          int64  `json:"id"`
	State       string `json:"status"`
	TargetURL   string `json:"target_url"`
	Description string `json:"description"`
	Context     string `json:"context"`
}

// Comment as the API gives it.
type Comment struct {
	ID   int64  `json:"id"`
	Body string `json:"body"`
	User User   `json:"user"`
}

// New makes a forge with the user bot and its token.
func New(ctx context.Context, dir string) (*Server, error) {
	repos, err := fakeforge.NewRepos(ctx, dir)
	if err != nil {
		return nil, err
	}
	return &Server{
		Repos: repos, Token: "0123456789abcdef0123456789abcdef01234567", Version: "1.25.0",
		users: map[int64]string{1: "bot"}, permissions: map[string]map[string]string{}, statuses: map[string][]Status{},
		comments: map[string][]*Comment{}, renamed: map[string]string{}, pulls: map[string][]*Pull{}, nextID: 100, Setup: goodSetup(),
	}, nil
}

// SetUser gives a user its login, which may be new.
func (s *Server) SetUser(id int64, login string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users[id] = login
}

// SetPermission says what a user may do: owner, admin, write, read, none.
func (s *Server) SetPermission(repo, login, permission string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.permissions[repo] == nil {
		s.permissions[repo] = map[string]string{}
	}
	s.permissions[repo][login] = permission
}

// Rename makes the API redirect from an old name.
func (s *Server) Rename(from, to string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.renamed[from] = to
}

// Statuses are all that was reported for a commit, in order.
func (s *Server) Statuses(repo, commit string) []Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.statuses[repo+"@"+commit])
}

// issue checks that a pull request exists.
func (s *Server) issue(r *http.Request, repo string) (key string, err error) {
	n, _ := strconv.Atoi(r.PathValue("number"))
	if n < 1 || n > len(s.pulls[repo]) {
		return "", notFound
	}
	return repo + "#" + strconv.Itoa(n), nil
}

// Comments are those of a pull request, in order.
func (s *Server) Comments(repo string, number int) []Comment {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Comment
	for _, c := range s.comments[repo+"#"+strconv.Itoa(number)] {
		all = append(all, *c)
	}
	return all
}

// AddComment makes a comment by someone.
func (s *Server) AddComment(repo string, number int, by User, body string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.comment(repo+"#"+strconv.Itoa(number), by, body)
}

func (s *Server) comment(key string, by User, body string) *Comment {
	s.nextID++
	c := &Comment{ID: s.nextID, Body: body, User: by}
	s.comments[key] = append(s.comments[key], c)
	return c
}

// problem is an answer that is an error.
type problem struct {
	code    int
	message string
}

func (p problem) Error() string { return p.message }

var notFound = problem{http.StatusNotFound, "The target couldn't be found."}

// handler answers with JSON or an error.
type handler func(r *http.Request, repo string) (code int, body any, err error)

// Handler is the forge as people and programs reach it.
func (s *Server) Handler() http.Handler {
	api := http.NewServeMux()
	plain := func(pattern string, h handler) {
		method, path, _ := strings.Cut(pattern, " ")
		api.HandleFunc(method+" /api/v1"+path, func(w http.ResponseWriter, r *http.Request) { s.answer(w, r, "", h) })
	}
	repo := func(pattern string, h handler) {
		method, path, _ := strings.Cut(pattern, " ")
		api.HandleFunc(method+" /api/v1/repos/{owner}/{repo}"+path, func(w http.ResponseWriter, r *http.Request) {
			name := r.PathValue("owner") + "/" + r.PathValue("repo")
			s.mu.Lock()
			to, moved := s.renamed[name]
			s.mu.Unlock()
			if moved { // services/context.RedirectToRepo
				http.Redirect(w, r, strings.Replace(r.URL.String(), "/repos/"+name, "/repos/"+to, 1), http.StatusTemporaryRedirect)
				return
			}
			s.answer(w, r, name, h)
		})
	}
	plain("GET /version", func(*http.Request, string) (int, any, error) {
		return http.StatusOK, map[string]string{"version": s.Version}, nil
	})
	plain("GET /user", func(*http.Request, string) (int, any, error) {
		return http.StatusOK, s.user(1), s.scope("read:user")
	})
	plain("GET /users/search", s.searchUsers)
	repo("GET ", s.getRepo)
	repo("GET /hooks", s.getHooks)
	repo("GET /pulls", s.getPulls)
	repo("GET /issues", s.getIssues)
	repo("GET /git/commits/{sha}", s.getCommit)
	repo("GET /git/trees/{sha}", s.getTree)
	repo("GET /git/blobs/{sha}", s.getBlob)
	repo("GET /git/tags/{sha}", s.getTag)
	repo("GET /git/refs/{ref...}", s.getRefs)
	repo("GET /tags", s.getTags)
	repo("POST /statuses/{sha}", s.postStatus)
	repo("GET /commits/{sha}/statuses", s.getStatuses)
	repo("GET /collaborators/{login}/permission", s.getPermission)
	repo("GET /issues/{number}/comments", s.getComments)
	repo("POST /issues/{number}/comments", s.postComment)
	repo("PATCH /issues/comments/{id}", s.patchComment)
	return s.Faults.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, ok := fakeforge.IsGit(r); !ok {
			api.ServeHTTP(w, r)
			return
		}
		// A token may be the user name or the password (services/auth/basic.go).
		if user, password, ok := r.BasicAuth(); !ok || password != s.Token && (user != s.Token || password != "" && password != "x-oauth-basic") {
			w.Header().Set("WWW-Authenticate", `Basic realm="Gitea"`)
			http.Error(w, "Unauthorized", http.StatusUnauthorized)
			return
		}
		s.Repos.ServeGit(w, r)
	}))
}

func (s *Server) answer(w http.ResponseWriter, r *http.Request, repo string, h handler) {
	kind, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	var code int
	var body any
	var err error
	switch {
	case r.URL.Path != "/api/v1/version" && (s.Setup.Deleted || token != s.Token || !strings.EqualFold(kind, "token") && !strings.EqualFold(kind, "bearer")):
		err = problem{http.StatusUnauthorized, "token is required"}
	case repo != "":
		if _, err = s.Repos.Dir(repo); err != nil {
			break
		}
		fallthrough
	default:
		code, body, err = h(r, repo)
	}
	if err != nil {
		var p problem
		if errors.Is(err, fakeforge.ErrNotFound) {
			p = notFound
		} else if !errors.As(err, &p) {
			p = problem{http.StatusInternalServerError, err.Error()}
		}
		code, body = p.code, map[string]string{"message": p.message, "url": "https://gitea.example.org/api/swagger"}
	}
	w.Header().Set("Content-Type", "application/json;charset=utf-8")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body)
}

func (s *Server) user(id int64) User {
	s.mu.Lock()
	defer s.mu.Unlock()
	return User{id, s.users[id]}
}

// searchUsers: uid finds at most one (routers/api/v1/user/user.go).
func (s *Server) searchUsers(r *http.Request, _ string) (int, any, error) {
	id, _ := strconv.ParseInt(r.URL.Query().Get("uid"), 10, 64)
	found := []User{}
	if u := s.user(id); u.Login != "" {
		found = append(found, u)
	}
	return http.StatusOK, map[string]any{"ok": true, "data": found}, nil
}

// Repository is the JSON of a repository, as far as anybody reads it.
func (s *Server) Repository(base, repo string) map[string]any {
	owner, name, _ := strings.Cut(repo, "/")
	return map[string]any{
		"id": repoID(repo), "owner": map[string]any{"id": 7, "login": owner}, "name": name, "full_name": repo,
		"private": true, "html_url": base + "/" + repo, "clone_url": base + "/" + repo + ".git", "default_branch": "main",
	}
}

func repoID(repo string) (id int64) {
	for _, c := range repo {
		id = (id*31 + int64(c)) % 1_000_003
	}
	return id + 1
}

func base(r *http.Request) string { return "http://" + r.Host }

func (s *Server) getRepo(r *http.Request, repo string) (int, any, error) {
	found := s.Repository(base(r), repo)
	found["permissions"] = s.Setup.Role
	return http.StatusOK, found, s.scope("read:repository")
}

// getCommit takes names of refs as well, and peels tags.
func (s *Server) getCommit(r *http.Request, repo string) (int, any, error) {
	sha := r.PathValue("sha")
	if gitcmd.CheckRef(sha) != nil {
		return 0, nil, problem{http.StatusUnprocessableEntity, "no valid ref or sha: " + sha}
	}
	c, err := s.Repos.Info(r.Context(), repo, sha)
	if err != nil {
		return 0, nil, err
	}
	return http.StatusOK, map[string]any{"sha": c.Name, "commit": map[string]any{"tree": map[string]any{"sha": c.Tree}}}, nil
}

// getTree answers 400 for what is not there (routers/api/v1/repo/tree.go).
func (s *Server) getTree(r *http.Request, repo string) (int, any, error) {
	sha, q := r.PathValue("sha"), r.URL.Query()
	entries, err := s.Repos.Tree(r.Context(), repo, sha, q.Get("recursive") == "true" || q.Get("recursive") == "1")
	if err != nil {
		return 0, nil, problem{http.StatusBadRequest, "sha not found [" + sha + "]"}
	}
	size, page := s.page(q.Get("per_page"), q.Get("page"), 1000)
	list := []map[string]any{}
	for _, e := range fakeforge.Page(entries, page, size) {
		list = append(list, map[string]any{"path": e.Path, "mode": e.Mode, "type": e.Type, "size": e.Size, "sha": e.Object})
	}
	return http.StatusOK, map[string]any{
		"sha": sha, "tree": list, "truncated": page*size < len(entries), "page": page, "total_count": len(entries),
	}, nil
}

func (s *Server) page(size, page string, most int) (int, int) {
	if s.PageSize > 0 {
		most = s.PageSize
	}
	n, _ := strconv.Atoi(size)
	if n <= 0 || n > most {
		n = most
	}
	p, _ := strconv.Atoi(page)
	return n, max(p, 1)
}

func (s *Server) getBlob(r *http.Request, repo string) (int, any, error) {
	kind, data, err := s.Repos.Object(r.Context(), repo, r.PathValue("sha"))
	if err != nil || kind != "blob" {
		return 0, nil, problem{http.StatusBadRequest, "not a blob"}
	}
	return http.StatusOK, map[string]any{
		"sha": r.PathValue("sha"), "size": len(data), "encoding": "base64", "content": base64.StdEncoding.EncodeToString(data),
	}, nil
}

func (s *Server) getTag(r *http.Request, repo string) (int, any, error) {
	kind, data, err := s.Repos.Object(r.Context(), repo, r.PathValue("sha"))
	if err != nil || kind != "tag" {
		return 0, nil, notFound
	}
	object := map[string]any{}
	for line := range strings.Lines(string(data)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok && (name == "object" || name == "type") {
			object[map[string]string{"object": "sha", "type": "type"}[name]] = value
		} else if line == "\n" {
			break
		}
	}
	return http.StatusOK, map[string]any{"sha": r.PathValue("sha"), "object": object}, nil
}

// getRefs gives a list, and the ref alone where only it matches exactly, as
// Gitea did before 1.13 (routers/api/v1/repo/git_ref.go); versions from 1.25 here
// always give a list.
func (s *Server) getRefs(r *http.Request, repo string) (int, any, error) {
	filter := "refs/" + r.PathValue("ref")
	refs, err := s.Repos.Refs(r.Context(), repo, filter)
	if err != nil {
		return 0, nil, err
	}
	if len(refs) == 0 {
		return 0, nil, notFound
	}
	list := []map[string]any{}
	for _, ref := range refs {
		list = append(list, map[string]any{"ref": ref.Name, "object": map[string]any{"type": ref.Type, "sha": ref.Object}})
	}
	if len(list) == 1 && refs[0].Name == filter && s.Version == "1.12.0" {
		return http.StatusOK, list[0], nil
	}
	return http.StatusOK, list, nil
}

func (s *Server) getTags(r *http.Request, repo string) (int, any, error) {
	refs, err := s.Repos.Refs(r.Context(), repo, "refs/tags")
	if err != nil {
		return 0, nil, err
	}
	size, page := s.page(r.URL.Query().Get("limit"), r.URL.Query().Get("page"), 50)
	list := []map[string]any{}
	for _, ref := range fakeforge.Page(refs, page, size) {
		list = append(list, map[string]any{
			"name": strings.TrimPrefix(ref.Name, "refs/tags/"), "id": ref.Object, "commit": map[string]any{"sha": ref.Commit},
		})
	}
	return http.StatusOK, list, nil
}

// postStatus adds a row; the newest of a context is shown. A commit that is not
// there gives 500 (services/repository/commitstatus).
func (s *Server) postStatus(r *http.Request, repo string) (int, any, error) {
	var in struct {
		State       string `json:"state"`
		TargetURL   string `json:"target_url"`
		Description string `json:"description"`
		Context     string `json:"context"`
	}
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		return 0, nil, problem{http.StatusUnprocessableEntity, err.Error()}
	}
	known := []string{"pending", "success", "error", "failure", "warning"}
	if s.Version >= "1.25" {
		known = append(known, "skipped")
	}
	if !slices.Contains(known, in.State) {
		return 0, nil, problem{http.StatusUnprocessableEntity, "unknown state " + in.State}
	}
	sha := r.PathValue("sha")
	if _, err := s.Repos.Info(r.Context(), repo, sha); err != nil {
		return 0, nil, fmt.Errorf("GetCommit[%s]: object does not exist", sha)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nextID++
	status := Status{s.nextID, in.State, in.TargetURL, in.Description, in.Context}
	s.statuses[repo+"@"+sha] = append(s.statuses[repo+"@"+sha], status)
	return http.StatusCreated, status, nil
}

func (s *Server) getStatuses(r *http.Request, repo string) (int, any, error) {
	all := s.Statuses(repo, r.PathValue("sha"))
	slices.Reverse(all)
	size, page := s.page(r.URL.Query().Get("limit"), r.URL.Query().Get("page"), 50)
	return http.StatusOK, append([]Status{}, fakeforge.Page(all, page, size)...), nil
}

func (s *Server) getPermission(r *http.Request, repo string) (int, any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, login := range s.users {
		if strings.EqualFold(login, r.PathValue("login")) {
			p := s.permissions[repo][login]
			if p == "" {
				p = "none"
			}
			return http.StatusOK, map[string]any{"permission": p, "role_name": p, "user": User{id, login}}, nil
		}
	}
	return 0, nil, notFound
}

func (s *Server) getComments(r *http.Request, repo string) (int, any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key, err := s.issue(r, repo)
	return http.StatusOK, append([]*Comment{}, s.comments[key]...), err
}

func body(r *http.Request) (string, error) {
	var in struct {
		Body string `json:"body"`
	}
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil || in.Body == "" {
		return "", problem{http.StatusUnprocessableEntity, "[Body]: Required"}
	}
	return in.Body, nil
}

func (s *Server) postComment(r *http.Request, repo string) (int, any, error) {
	text, err := body(r)
	if err != nil {
		return 0, nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	key, err := s.issue(r, repo)
	if err != nil {
		return 0, nil, err
	}
	return http.StatusCreated, s.comment(key, User{1, s.users[1]}, text), nil
}

func (s *Server) patchComment(r *http.Request, repo string) (int, any, error) {
	text, err := body(r)
	if err != nil {
		return 0, nil, err
	}
	id, _ := strconv.ParseInt(r.PathValue("id"), 10, 64)
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, all := range s.comments {
		for _, c := range all {
			if c.ID == id && strings.HasPrefix(key, repo+"#") {
				c.Body = text
				return http.StatusOK, c, nil
			}
		}
	}
	return 0, nil, notFound
}

// Push is the body of the webhook for a ref that moved.
func (s *Server) Push(ctx context.Context, base, repo, ref, before, after string) ([]byte, error) {
	commit, err := s.Repos.Resolve(ctx, repo, after+"^{commit}")
	if err != nil {
		return nil, err
	}
	return json.MarshalIndent(map[string]any{
		"ref": ref, "before": before, "after": after, "commits": []any{},
		"head_commit": map[string]any{"id": commit, "message": "commit\n", "timestamp": time.Unix(1700000000, 0).UTC()},
		"repository":  s.Repository(base, repo), "pusher": s.user(1), "sender": s.user(1),
	}, "", "  ")
}

// PullRequest is the body of the webhook for a pull request from one
// repository's branch to main of another.
func (s *Server) PullRequest(base, action, repo string, number int, headRepo, headRef, head, baseCommit string, author int64) ([]byte, error) {
	return json.MarshalIndent(map[string]any{
		"action": action, "number": number,
		"pull_request": s.pull(base, repo, number, headRepo, headRef, head, baseCommit, author),
		"repository":   s.Repository(base, repo), "sender": s.user(author),
	}, "", "  ")
}

// pull is a pull request as the API and webhooks have it (services/convert/pull.go).
func (s *Server) pull(base, repo string, number int, headRepo, headRef, head, baseCommit string, author int64) map[string]any {
	return map[string]any{
		"id": 1000 + number, "number": number, "user": s.user(author), "title": "a pull request", "state": "open",
		"html_url": fmt.Sprintf("%s/%s/pulls/%d", base, repo, number),
		"base":     map[string]any{"label": "main", "ref": "main", "sha": baseCommit, "repo_id": repoID(repo), "repo": s.Repository(base, repo)},
		"head":     map[string]any{"label": headRef, "ref": headRef, "sha": head, "repo_id": repoID(headRepo), "repo": s.Repository(base, headRepo)},
	}
}
