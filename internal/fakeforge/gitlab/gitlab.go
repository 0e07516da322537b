// Package gitlab is a fake of GitLab: its API, as far as package forge/gitlab
// and people need it, on top of bare repositories. Paths, status codes, field
// names, pagination and oddities are those of GitLab's documentation (doc/api)
// and source (lib/api, app/services).
package gitlab

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
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
	Repos  *fakeforge.Repos
	Faults fakeforge.Faults
	Token  string // the one that is accepted; its user is "bot", 1
	// Strict: a status can't get the state that it has, nor be skipped, as in older
	// versions (gitlab-org/gitlab!198626 and !168350 changed that).
	Strict bool
	// Checking: whether merge requests can be merged is not known yet.
	Checking bool
	// Setup is what people set up; New makes everything right.
	Setup Setup
	// PageSize bounds pages; 0: 100, as by default.
	PageSize int
	// MaxDiffs is how many files a comparison has at most; 0: 1,000, as by default.
	MaxDiffs int

	mu       sync.Mutex
	users    map[int64]string         // names by ID
	levels   map[string]map[int64]int // access levels by project, by user
	statuses map[string][]*Status     // by "group/project@sha", in order
	notes    map[string][]*Note       // by "group/project!number", in order
	requests map[string][]*request    // by project
	nextID   int64
}

// User as the API gives it.
type User struct {
	ID       int64  `json:"id"`
	Username string `json:"username"`
}

// Status as the API gives it.
type Status struct {
	ID          int64  `json:"id"`
	SHA         string `json:"sha"`
	Ref         string `json:"ref"`
	Pipeline    int64  `json:"pipeline_id"`
	State       string `json:"status"`
	Name        string `json:"name"`
	TargetURL   string `json:"target_url"`
	Description string `json:"description"`
}

// Note as the API gives it.
type Note struct {
	ID     int64  `json:"id"`
	Body   string `json:"body"`
	Author User   `json:"author"`
}

// request is a merge request; source is the project of its head.
type request struct {
	head, target, source, branch string
	author                       int64
	draft, closed                bool
}

// New makes a forge with the user bot and its token.
func New(ctx context.Context, dir string) (*Server, error) {
	repos, err := fakeforge.NewRepos(ctx, dir)
	if err != nil {
		return nil, err
	}
	return &Server{
		Repos: repos, Token: "glpat-0123456789abcdefghij", users: map[int64]string{1: "bot"}, levels: map[string]map[int64]int{},
		statuses: map[string][]*Status{}, notes: map[string][]*Note{}, requests: map[string][]*request{}, nextID: 100, Setup: goodSetup(),
	}, nil
}

// SetMember gives a user a name, and an access level in a project.
func (s *Server) SetMember(project string, u User, level int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users[u.ID] = u.Username
	if s.levels[project] == nil {
		s.levels[project] = map[int64]int{}
	}
	s.levels[project][u.ID] = level
}

// Statuses are all jobs of a commit's pipelines, in the order in which they
// were made.
func (s *Server) Statuses(project, commit string) []Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Status
	for _, st := range s.statuses[project+"@"+commit] {
		all = append(all, *st)
	}
	return all
}

// Notes are those of a merge request, in order.
func (s *Server) Notes(project string, number int) []Note {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Note
	for _, n := range s.notes[project+"!"+strconv.Itoa(number)] {
		all = append(all, *n)
	}
	return all
}

// AddNote makes a note by someone.
func (s *Server) AddNote(project string, number int, by User, body string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.note(project+"!"+strconv.Itoa(number), by, body)
}

func (s *Server) note(key string, by User, body string) *Note {
	s.nextID++
	n := &Note{s.nextID, body, by}
	s.notes[key] = append(s.notes[key], n)
	return n
}

// OpenRequest opens a merge request into a branch for a commit that is in the
// project's repository, and gives its number.
func (s *Server) OpenRequest(ctx context.Context, project, head, target string) (int, error) {
	s.mu.Lock()
	s.requests[project] = append(s.requests[project], &request{head: head, target: target, source: project, branch: "topic", author: 1})
	number := len(s.requests[project])
	s.mu.Unlock()
	_, err := s.Repos.Git(ctx, project, "", "update-ref", fmt.Sprintf("refs/merge-requests/%d/head", number), head)
	return number, err
}

// problem is an answer that is an error.
type problem struct {
	code    int
	message string
}

func (p problem) Error() string { return p.message }

func notFound(what string) problem {
	return problem{http.StatusNotFound, "404 " + what + " Not Found"}
}

// handler answers with JSON or an error; next is the number of the next page.
type handler func(w http.ResponseWriter, r *http.Request, project string) (code int, body any, err error)

// Handler is the forge as people and programs reach it.
func (s *Server) Handler() http.Handler {
	api := http.NewServeMux()
	handle := func(pattern string, h handler) {
		method, path, _ := strings.Cut(pattern, " ")
		api.HandleFunc(method+" /api/v4"+path, func(w http.ResponseWriter, r *http.Request) { s.answer(w, r, h) })
	}
	handle("GET /user", func(http.ResponseWriter, *http.Request, string) (int, any, error) {
		u := s.user(1)
		return http.StatusOK, map[string]any{"id": u.ID, "username": u.Username, "is_admin": s.Setup.Admin}, nil
	})
	handle("GET /personal_access_tokens/self", s.getSelf)
	const project, request = "/projects/{project}", "/projects/{project}/merge_requests/{iid}"
	handle("GET "+project, func(_ http.ResponseWriter, r *http.Request, p string) (int, any, error) {
		return http.StatusOK, s.listed("http://"+r.Host, p), nil
	})
	handle("GET "+project+"/repository/commits/{sha}", s.getCommit)
	handle("GET "+project+"/repository/commits/{sha}/statuses", s.getStatuses)
	handle("GET "+project+"/repository/commits/{sha}/merge_requests", s.getRequestsOf)
	handle("GET "+project+"/repository/branches", s.list("refs/heads/"))
	handle("GET "+project+"/repository/branches/{name}", s.one("refs/heads/", "Branch"))
	handle("GET "+project+"/repository/tags", s.list("refs/tags/"))
	handle("GET "+project+"/repository/tags/{name}", s.one("refs/tags/", "Tag"))
	handle("GET "+project+"/repository/tree", s.getTree)
	handle("GET "+project+"/repository/blobs/{sha}", s.getBlob)
	handle("GET "+project+"/repository/compare", s.compare)
	handle("POST "+project+"/statuses/{sha}", s.postStatus)
	handle("GET "+project+"/members/all/{user}", s.getMember)
	handle("GET "+project+"/hooks", s.getHooks)
	handle("GET "+project+"/merge_requests", s.getRequests)
	handle("GET "+request, s.getRequest)
	handle("GET "+request+"/merge_ref", s.getMergeRef)
	handle("GET "+request+"/notes", s.getNotes)
	handle("POST "+request+"/notes", s.postNote)
	handle("PUT "+request+"/notes/{note}", s.putNote)
	return s.Faults.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, ok := fakeforge.IsGit(r); !ok {
			api.ServeHTTP(w, r)
			return
		}
		if _, password, ok := r.BasicAuth(); !ok || password != s.Token {
			w.Header().Set("WWW-Authenticate", `Basic realm="GitLab"`)
			http.Error(w, "HTTP Basic: Access denied.", http.StatusUnauthorized)
			return
		}
		s.Repos.ServeGit(w, r)
	}))
}

func (s *Server) answer(w http.ResponseWriter, r *http.Request, h handler) {
	project := s.named(r.PathValue("project"))
	var code int
	var body any
	var err error
	if s.Setup.Expired || r.Header.Get("Private-Token") != s.Token && r.Header.Get("Authorization") != "Bearer "+s.Token {
		err = problem{http.StatusUnauthorized, "401 Unauthorized"}
	} else if project != "" {
		if _, absent := s.Repos.Dir(project); absent != nil {
			err = notFound("Project")
		}
	}
	if err == nil {
		code, body, err = h(w, r, project)
	}
	if err != nil {
		var p problem
		if errors.Is(err, fakeforge.ErrNotFound) {
			p = notFound("Commit")
		} else if !errors.As(err, &p) {
			p = problem{http.StatusInternalServerError, err.Error()}
		}
		code, body = p.code, map[string]string{"message": p.message}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body)
}

// page cuts out the page that is asked for, and says which is the next
// (https://docs.gitlab.com/api/rest/#pagination).
func page[T any](s *Server, w http.ResponseWriter, r *http.Request, all []T) []T {
	most := 100
	if s.PageSize > 0 {
		most = s.PageSize
	}
	size, _ := strconv.Atoi(r.URL.Query().Get("per_page"))
	if size <= 0 {
		size = 20
	}
	size = min(size, most)
	n, _ := strconv.Atoi(r.URL.Query().Get("page"))
	n = max(n, 1)
	next := ""
	if n*size < len(all) {
		next = strconv.Itoa(n + 1)
	}
	w.Header().Set("X-Page", strconv.Itoa(n))
	w.Header().Set("X-Per-Page", strconv.Itoa(size))
	w.Header().Set("X-Next-Page", next)
	return append([]T{}, fakeforge.Page(all, n, size)...)
}

func (s *Server) user(id int64) User {
	s.mu.Lock()
	defer s.mu.Unlock()
	return User{id, s.users[id]}
}

// Project is the JSON of a project, as the API and webhooks have it.
func (s *Server) Project(base, project string) map[string]any {
	i := strings.LastIndexByte(project, '/')
	return map[string]any{
		"id": projectID(project), "name": project[i+1:], "path_with_namespace": project, "namespace": project[:max(i, 0)],
		"web_url": base + "/" + project, "git_http_url": base + "/" + project + ".git", "default_branch": "main", "visibility_level": 0,
	}
}

func projectID(project string) (id int64) {
	for _, c := range project {
		id = (id*31 + int64(c)) % 1_000_003
	}
	return id + 1
}

func (s *Server) getCommit(_ http.ResponseWriter, r *http.Request, project string) (int, any, error) {
	if gitcmd.CheckRef(r.PathValue("sha")) != nil {
		return 0, nil, notFound("Commit")
	}
	c, err := s.Repos.Info(r.Context(), project, r.PathValue("sha"))
	if err != nil {
		return 0, nil, err
	}
	return http.StatusOK, map[string]any{"id": c.Name, "short_id": c.Name[:8], "parent_ids": append([]string{}, c.Parents...)}, nil
}

func ref(r fakeforge.Ref, prefix string) map[string]any {
	return map[string]any{
		"name": strings.TrimPrefix(r.Name, prefix), "target": r.Object, "commit": map[string]any{"id": r.Commit},
	}
}

func (s *Server) list(prefix string) handler {
	return func(w http.ResponseWriter, r *http.Request, project string) (int, any, error) {
		refs, err := s.Repos.Refs(r.Context(), project, prefix)
		if err != nil {
			return 0, nil, err
		}
		all := []map[string]any{}
		for _, found := range page(s, w, r, refs) {
			all = append(all, ref(found, prefix))
		}
		return http.StatusOK, all, nil
	}
}

func (s *Server) one(prefix, what string) handler {
	return func(_ http.ResponseWriter, r *http.Request, project string) (int, any, error) {
		refs, err := s.Repos.Refs(r.Context(), project, prefix+r.PathValue("name"))
		if err != nil || len(refs) != 1 || refs[0].Name != prefix+r.PathValue("name") {
			return 0, nil, notFound(what)
		}
		return http.StatusOK, ref(refs[0], prefix), nil
	}
}

// getTree lists the directory of "path"; one that is not there is a 404.
func (s *Server) getTree(w http.ResponseWriter, r *http.Request, project string) (int, any, error) {
	q := r.URL.Query()
	path := q.Get("path")
	entries, err := s.Repos.Tree(r.Context(), project, q.Get("ref")+":"+path, q.Get("recursive") == "true")
	if err != nil {
		return 0, nil, notFound("Tree")
	}
	all := []map[string]any{}
	for _, e := range page(s, w, r, entries) {
		full := e.Path
		if path != "" {
			full = path + "/" + e.Path
		}
		all = append(all, map[string]any{
			"id": e.Object, "name": full[strings.LastIndexByte(full, '/')+1:], "type": e.Type, "path": full, "mode": e.Mode,
		})
	}
	return http.StatusOK, all, nil
}

func (s *Server) getBlob(_ http.ResponseWriter, r *http.Request, project string) (int, any, error) {
	kind, data, err := s.Repos.Object(r.Context(), project, r.PathValue("sha"))
	if err != nil || kind != "blob" {
		return 0, nil, notFound("Blob")
	}
	return http.StatusOK, map[string]any{
		"sha": r.PathValue("sha"), "size": len(data), "encoding": "base64", "content": base64.StdEncoding.EncodeToString(data),
	}, nil
}

// compare finds renames, and cuts the list off where it gets long.
func (s *Server) compare(_ http.ResponseWriter, r *http.Request, project string) (int, any, error) {
	q := r.URL.Query()
	if q.Get("straight") != "true" {
		return 0, nil, problem{http.StatusNotImplemented, "the fake compares straight only"}
	}
	out, err := s.Repos.Git(r.Context(), project, "", "diff-tree", "-r", "-z", "-M", "--raw", q.Get("from"), q.Get("to"))
	if err != nil {
		return 0, nil, notFound("Ref")
	}
	diffs, overflow := []map[string]any{}, false
	most := s.MaxDiffs
	if most == 0 {
		most = 1000
	}
	fields := strings.Split(out, "\x00")
	for len(fields) > 1 {
		head := strings.Fields(strings.TrimPrefix(fields[0], ":")) // modes, objects, what happened
		old, now := fields[1], fields[1]
		fields = fields[2:]
		if head[4][0] == 'R' {
			now, fields = fields[0], fields[1:]
		}
		if overflow = len(diffs) == most; overflow {
			break
		}
		diffs = append(diffs, map[string]any{
			"old_path": old, "new_path": now, "a_mode": head[0], "b_mode": head[1], "diff": "",
			"new_file": head[4] == "A", "renamed_file": head[4][0] == 'R', "deleted_file": head[4] == "D",
		})
	}
	return http.StatusOK, map[string]any{"diffs": diffs, "compare_timeout": overflow, "compare_same_ref": false}, nil
}

// postStatus adds or changes a job (app/services/ci/create_commit_status_service.rb):
// one that is over stays, and the next of its name is a new one.
func (s *Server) postStatus(_ http.ResponseWriter, r *http.Request, project string) (int, any, error) {
	var in struct {
		State       string `json:"state"`
		Ref         string `json:"ref"`
		Name        string `json:"name"`
		TargetURL   string `json:"target_url"`
		Description string `json:"description"`
		Pipeline    int64  `json:"pipeline_id"`
	}
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		return 0, nil, problem{http.StatusBadRequest, err.Error()}
	}
	known := []string{"pending", "running", "success", "failed", "canceled", "skipped"}
	if s.Strict {
		known = known[:5]
	}
	if !slices.Contains(known, in.State) {
		return 0, nil, problem{http.StatusBadRequest, "state does not have a valid value"}
	}
	if len(in.TargetURL) > 255 {
		return 0, nil, problem{http.StatusBadRequest, "target_url is too long (maximum is 255 characters)"}
	}
	sha := r.PathValue("sha")
	if _, err := s.Repos.Info(r.Context(), project, sha); err != nil {
		return 0, nil, notFound("Commit")
	}
	branches, err := s.Repos.Git(r.Context(), project, "", "for-each-ref", "--format=%(refname:short)", "--contains="+sha, "refs/heads")
	if err != nil {
		return 0, nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	key := project + "@" + sha
	all := s.statuses[key]
	if in.Pipeline == 0 && len(all) > 0 && (in.Ref == "" || in.Ref == all[len(all)-1].Ref) {
		in.Pipeline, in.Ref = all[len(all)-1].Pipeline, all[len(all)-1].Ref
	} else if i := slices.IndexFunc(all, func(st *Status) bool { return st.Pipeline == in.Pipeline }); in.Pipeline != 0 && i < 0 {
		return 0, nil, notFound("Pipeline for pipeline_id, sha and ref")
	} else if in.Pipeline != 0 {
		in.Ref = all[i].Ref
	}
	if in.Ref == "" {
		in.Ref, _, _ = strings.Cut(branches, "\n")
	}
	if in.Ref == "" {
		return 0, nil, notFound("References for commit")
	}
	if in.Pipeline == 0 {
		s.nextID++
		in.Pipeline = s.nextID
	}
	var st *Status
	for _, old := range all {
		if old.Name == in.Name && old.Pipeline == in.Pipeline && (old.State == "pending" || old.State == "running") {
			st = old
		}
	}
	switch {
	case st == nil:
		s.nextID++
		st = &Status{ID: s.nextID, SHA: sha, Ref: in.Ref, Pipeline: in.Pipeline, Name: in.Name}
		s.statuses[key] = append(all, st)
	case s.Strict && (st.State == in.State || in.State == "pending"):
		return 0, nil, problem{http.StatusBadRequest, "Cannot transition status via :run from :" + st.State}
	}
	st.State, st.TargetURL, st.Description = in.State, in.TargetURL, in.Description
	return http.StatusCreated, st, nil
}

// DeletePipelines forgets all jobs of a commit.
func (s *Server) DeletePipelines(project, commit string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.statuses, project+"@"+commit)
}

func (s *Server) getStatuses(w http.ResponseWriter, r *http.Request, project string) (int, any, error) {
	byName := map[string]Status{} // the last of a name; others are retried
	for _, st := range s.Statuses(project, r.PathValue("sha")) {
		if name := r.URL.Query().Get("name"); name == "" || name == st.Name {
			byName[st.Name] = st
		}
	}
	var all []Status
	for _, st := range byName {
		all = append(all, st)
	}
	return http.StatusOK, page(s, w, r, all), nil
}

func (s *Server) getMember(_ http.ResponseWriter, r *http.Request, project string) (int, any, error) {
	id, _ := strconv.ParseInt(r.PathValue("user"), 10, 64)
	s.mu.Lock()
	defer s.mu.Unlock()
	level, ok := s.levels[project][id]
	if id == 1 && !ok {
		level, ok = s.Setup.Level, s.Setup.Level > 0
	}
	if !ok {
		return 0, nil, problem{http.StatusNotFound, "404 Not found"}
	}
	return http.StatusOK, map[string]any{"id": id, "username": s.users[id], "access_level": level, "state": "active"}, nil
}

// find gives a merge request and its number.
func (s *Server) find(r *http.Request, project string) (*request, int, error) {
	n, _ := strconv.Atoi(r.PathValue("iid"))
	s.mu.Lock()
	defer s.mu.Unlock()
	if n < 1 || n > len(s.requests[project]) {
		return nil, 0, problem{http.StatusNotFound, "404 Not found"}
	}
	return s.requests[project][n-1], n, nil
}

func (s *Server) getRequestsOf(w http.ResponseWriter, r *http.Request, project string) (int, any, error) {
	s.mu.Lock()
	var all []map[string]any
	for i, m := range s.requests[project] {
		if m.head == r.PathValue("sha") {
			all = append(all, map[string]any{"iid": i + 1})
		}
	}
	s.mu.Unlock()
	return http.StatusOK, page(s, w, r, all), nil
}

func (s *Server) getRequest(_ http.ResponseWriter, r *http.Request, project string) (int, any, error) {
	m, n, err := s.find(r, project)
	if err != nil {
		return 0, nil, err
	}
	status := "mergeable"
	if s.Checking {
		status = "checking"
	} else if _, err := s.merged(r.Context(), project, m); err != nil {
		status = "conflict"
	}
	return http.StatusOK, map[string]any{"iid": n, "sha": m.head, "target_branch": m.target, "detailed_merge_status": status}, nil
}

// merged gives the tree of the head merged into its target.
func (s *Server) merged(ctx context.Context, project string, m *request) (string, error) {
	tree, err := s.Repos.Git(ctx, project, "", "merge-tree", "--write-tree", "refs/heads/"+m.target, m.head)
	return strings.TrimSpace(tree), err
}

// getMergeRef makes the merge commit (lib/api/merge_requests.rb).
func (s *Server) getMergeRef(_ http.ResponseWriter, r *http.Request, project string) (int, any, error) {
	m, n, err := s.find(r, project)
	if err != nil {
		return 0, nil, err
	}
	tree, err := s.merged(r.Context(), project, m)
	if err != nil || s.Checking {
		return 0, nil, problem{http.StatusBadRequest, "Merge request is not mergeable"}
	}
	commit, err := s.Repos.Git(r.Context(), project, "", "commit-tree", "-m", "merge", "-p", "refs/heads/"+m.target, "-p", m.head, tree)
	if err != nil {
		return 0, nil, err
	}
	commit = strings.TrimSpace(commit)
	_, err = s.Repos.Git(r.Context(), project, "", "update-ref", fmt.Sprintf("refs/merge-requests/%d/merge", n), commit)
	return http.StatusOK, map[string]any{"commit_id": commit}, err
}

func (s *Server) getNotes(w http.ResponseWriter, r *http.Request, project string) (int, any, error) {
	_, n, err := s.find(r, project)
	if err != nil {
		return 0, nil, err
	}
	all := s.Notes(project, n)
	if r.URL.Query().Get("sort") != "asc" {
		slices.Reverse(all)
	}
	return http.StatusOK, page(s, w, r, all), nil
}

func noteBody(r *http.Request) (string, error) {
	var in struct {
		Body string `json:"body"`
	}
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil || in.Body == "" {
		return "", problem{http.StatusBadRequest, "body is missing"}
	}
	return in.Body, nil
}

func (s *Server) postNote(_ http.ResponseWriter, r *http.Request, project string) (int, any, error) {
	_, n, err := s.find(r, project)
	if err != nil {
		return 0, nil, err
	}
	text, err := noteBody(r)
	if err != nil {
		return 0, nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return http.StatusCreated, s.note(project+"!"+strconv.Itoa(n), User{1, s.users[1]}, text), nil
}

func (s *Server) putNote(_ http.ResponseWriter, r *http.Request, project string) (int, any, error) {
	_, n, err := s.find(r, project)
	if err != nil {
		return 0, nil, err
	}
	text, err := noteBody(r)
	if err != nil {
		return 0, nil, err
	}
	id, _ := strconv.ParseInt(r.PathValue("note"), 10, 64)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, note := range s.notes[project+"!"+strconv.Itoa(n)] {
		if note.ID == id {
			note.Body = text
			return http.StatusOK, note, nil
		}
	}
	return 0, nil, notFound("Note")
}

// Push is the body of the webhook for a ref that moved.
func (s *Server) Push(ctx context.Context, base, project, ref, before, after string) ([]byte, error) {
	kind := "push"
	if strings.HasPrefix(ref, "refs/tags/") {
		kind = "tag_push"
	}
	commit, err := s.Repos.Resolve(ctx, project, after+"^{commit}")
	if err != nil {
		return nil, err
	}
	bot := s.user(1)
	return json.MarshalIndent(map[string]any{
		"object_kind": kind, "event_name": kind, "before": before, "after": after, "ref": ref, "checkout_sha": commit,
		"user_id": bot.ID, "user_username": bot.Username, "project_id": projectID(project), "project": s.Project(base, project),
		"commits": []any{map[string]any{"id": commit, "message": "commit\n"}}, "total_commits_count": 1,
	}, "", "  ")
}

// MergeRequest is the body of the webhook for a merge request from one project's
// branch to main of another; oldrev is of an update with new commits.
func (s *Server) MergeRequest(base, action, project string, number int, source, branch, head, oldrev string, author int64) ([]byte, error) {
	attributes := map[string]any{
		"iid": number, "action": action, "title": "a merge request", "url": fmt.Sprintf("%s/%s/-/merge_requests/%d", base, project, number),
		"author_id": author, "source_branch": branch, "target_branch": "main",
		"source_project_id": projectID(source), "target_project_id": projectID(project),
		"source": s.Project(base, source), "target": s.Project(base, project), "last_commit": map[string]any{"id": head, "message": "commit\n"},
	}
	if oldrev != "" {
		attributes["oldrev"] = oldrev
	}
	return json.MarshalIndent(map[string]any{
		"object_kind": "merge_request", "event_type": "merge_request", "user": s.user(author),
		"project": s.Project(base, project), "object_attributes": attributes,
	}, "", "  ")
}

// Request is a delivery as GitLab makes it (app/services/web_hook_service.rb).
// A secret that begins with "whsec_" is a signing token, whose signature is of
// the time given, and another one a secret token.
func Request(ctx context.Context, url, event, delivery string, at time.Time, body, secret []byte) (*http.Request, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("User-Agent", "GitLab/18.4.0")
	r.Header.Set("Idempotency-Key", delivery)
	r.Header.Set("X-Gitlab-Event", event)
	r.Header.Set("X-Gitlab-Event-UUID", "13792a34-cac6-4fda-95a8-c58e00a3954e")
	r.Header.Set("X-Gitlab-Webhook-UUID", "1d9b5f6c-6a5e-4a3c-9b1f-0d2f3c4b5a69")
	encoded, ok := strings.CutPrefix(string(secret), "whsec_")
	if !ok {
		r.Header.Set("X-Gitlab-Token", string(secret))
		return r, nil
	}
	key, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		return nil, err
	}
	stamp := strconv.FormatInt(at.Unix(), 10)
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s.%s.%s", delivery, stamp, body)
	r.Header.Set("Webhook-Id", delivery)
	r.Header.Set("Webhook-Timestamp", stamp)
	r.Header.Set("Webhook-Signature", "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil)))
	return r, nil
}
