// Package github is a fake of GitHub: the part of its REST API that package
// forge/github uses, on top of bare repositories. Paths, status codes, field
// names, pagination, rate limit headers, ETags and oddities are those of
// https://docs.github.com/rest.
package github

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/solstice-ci/solstice-go/internal/fakeforge"
)

// API is the path of the REST API, as at GitHub Enterprise Server.
const API = "/api/v3"

// AppID is the ID of the only App, and BotID that of the user it writes as.
const (
	AppID = 4711
	BotID = 9000
	bot   = "solstice-fake[bot]"
)

// Token is that of user 1, "robot", who may do everything.
const Token = "ghp_0123456789abcdefghijABCDEFGHIJ456789"

// Server is the forge; set its fields before it is used.
type Server struct {
	Repos  *fakeforge.Repos
	Faults fakeforge.Faults
	// TokenLife is how long installation tokens live; 0: an hour, as at GitHub.
	TokenLife time.Duration
	// MaxFiles is how many files a comparison lists, MaxTree how many entries a
	// tree; 0: 300 and 100,000, as at GitHub.
	MaxFiles, MaxTree int
	// StaleMerges: a merge commit stays that of an older head.
	StaleMerges bool
	// Setup is what people set up; New makes everything right.
	Setup Setup
	// Observe, when not nil, sees each request to the API with a body, which was
	// carried out.
	Observe func(method, pattern string, body []byte)

	mu          sync.Mutex
	users       map[int64]string
	permissions map[string]map[string]string // by repository, by login
	tokens      map[string]*grant
	installs    map[string]int64 // by owner
	statuses    map[string][]Status
	checks      []*CheckRun
	comments    map[string][]*Comment // by "owner/name#number"
	pulls       map[string]*Pull
	renamed     map[string]string
	unchanged   int
	nextID      int64
}

// grant is an installation token.
type grant struct {
	owner   string
	repos   []string // nil: all
	read    bool     // contents only
	expires time.Time
}

// User as the API gives it.
type User struct {
	ID    int64  `json:"id"`
	Login string `json:"login"`
}

// Status is a commit status as the API gives it.
type Status struct {
	ID          int64  `json:"id"`
	State       string `json:"state"`
	TargetURL   string `json:"target_url"`
	Description string `json:"description"`
	Context     string `json:"context"`
}

// CheckRun as the API takes and gives it.
type CheckRun struct {
	Repo        string  `json:"-"`
	ID          int64   `json:"id"`
	Name        string  `json:"name"`
	HeadSHA     string  `json:"head_sha"`
	DetailsURL  string  `json:"details_url"`
	ExternalID  string  `json:"external_id"`
	Status      string  `json:"status"`
	Conclusion  *string `json:"conclusion"`
	StartedAt   *string `json:"started_at"`
	CompletedAt *string `json:"completed_at"`
	Output      Output  `json:"output"`
	App         struct {
		ID int64 `json:"id"`
	} `json:"app"`
	Actions     []Action     `json:"-"`
	Annotations []Annotation `json:"-"`
}

// Output of a check run.
type Output struct {
	Title            *string `json:"title"`
	Summary          *string `json:"summary"`
	AnnotationsCount int     `json:"annotations_count"`
}

// Annotation of a check run.
type Annotation struct {
	Path            string `json:"path"`
	StartLine       int    `json:"start_line"`
	EndLine         int    `json:"end_line"`
	StartColumn     *int   `json:"start_column"`
	EndColumn       *int   `json:"end_column"`
	AnnotationLevel string `json:"annotation_level"`
	Message         string `json:"message"`
}

// Action is a button.
type Action struct {
	Label       string `json:"label"`
	Description string `json:"description"`
	Identifier  string `json:"identifier"`
}

// Comment as the API gives it.
type Comment struct {
	ID   int64  `json:"id"`
	Body string `json:"body"`
	User User   `json:"user"`
}

// Pull is a pull request within a repository.
type Pull struct {
	Number     int
	State      string // open, closed
	Head, Base string // branches
	Fork       string // the head's repository; empty: the base's
	Draft      bool
	Author     User

	tried string // the head and base that the merge commit below is of
	merge string // empty: they have conflicts
}

// New makes a forge with the user of the token.
func New(ctx context.Context, dir string) (*Server, error) {
	repos, err := fakeforge.NewRepos(ctx, dir)
	if err != nil {
		return nil, err
	}
	return &Server{
		Repos: repos, users: map[int64]string{1: "robot", BotID: bot}, permissions: map[string]map[string]string{},
		tokens: map[string]*grant{}, installs: map[string]int64{}, statuses: map[string][]Status{}, comments: map[string][]*Comment{},
		pulls: map[string]*Pull{}, renamed: map[string]string{}, nextID: 100, Setup: goodSetup(),
	}, nil
}

// Small, for it is made in every process of a fuzz test.
var appKey = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 1024) }) //nolint:gosec // proves nothing

// AppKey is the App's private key, PEM.
func AppKey() ([]byte, error) {
	key, err := appKey()
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}), nil
}

// SetUser gives a user its login, which may be new.
func (s *Server) SetUser(id int64, login string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.users[id] = login
}

// SetPermission says what a user may do: admin, write, read, none.
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

// RevokeTokens ends all installation tokens.
func (s *Server) RevokeTokens() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.tokens)
}

// Reinstall gives the App a new installation at an owner.
func (s *Server) Reinstall(owner string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.installs, owner)
	maps.DeleteFunc(s.tokens, func(_ string, g *grant) bool { return g.owner == owner })
}

// Unchanged is how many answers were that nothing has changed.
func (s *Server) Unchanged() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.unchanged
}

// Statuses are the latest commit statuses, one per context, which GitHub tells
// apart whatever their case.
func (s *Server) Statuses(repo, commit string) (latest []Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, st := range s.statuses[repo+"@"+commit] {
		latest = slices.DeleteFunc(latest, func(o Status) bool { return strings.EqualFold(o.Context, st.Context) })
		latest = append(latest, st)
	}
	return latest
}

// StatusCount is how many commit statuses there are, old ones too.
func (s *Server) StatusCount(repo, commit string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.statuses[repo+"@"+commit])
}

// CheckRuns are those of a commit, in order; with latest the last of each name.
func (s *Server) CheckRuns(repo, commit string, latest bool) (all []CheckRun) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.checks {
		if c.Repo != repo || c.HeadSHA != commit {
			continue
		}
		if latest {
			all = slices.DeleteFunc(all, func(o CheckRun) bool { return o.Name == c.Name })
		}
		all = append(all, *c)
	}
	return all
}

// Comments are those of a pull request, in order.
func (s *Server) Comments(repo string, number int) (all []Comment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.comments[key(repo, number)] {
		all = append(all, *c)
	}
	return all
}

// AddComment makes a comment by someone.
func (s *Server) AddComment(repo string, number int, by User, body string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.comment(repo, number, by, body)
}

func (s *Server) comment(repo string, number int, by User, body string) *Comment {
	s.nextID++
	c := &Comment{ID: s.nextID, Body: body, User: by}
	s.comments[key(repo, number)] = append(s.comments[key(repo, number)], c)
	return c
}

func key(repo string, number int) string { return repo + "#" + strconv.Itoa(number) }

// OpenPull opens a pull request from a branch into another.
func (s *Server) OpenPull(repo, head, base string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nextID++
	number := int(s.nextID)
	s.pulls[key(repo, number)] = &Pull{Number: number, State: "open", Head: head, Base: base, Author: User{1, "robot"}}
	return number
}

// ChangePull changes one.
func (s *Server) ChangePull(repo string, number int, change func(*Pull)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s.pulls[key(repo, number)])
}

// ClosePull closes one.
func (s *Server) ClosePull(repo string, number int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pulls[key(repo, number)].State = "closed"
}

// problem is an answer that is an error.
type problem struct {
	code    int
	message string
}

func (p problem) Error() string { return p.message }

var (
	notFound     = problem{http.StatusNotFound, "Not Found"}
	unauthorized = problem{http.StatusUnauthorized, "Bad credentials"}
)

func invalid(format string, args ...any) error {
	return problem{http.StatusUnprocessableEntity, fmt.Sprintf(format, args...)}
}

// call is a request with what its path says and who makes it.
type call struct {
	*http.Request
	repo string
	user User
	body []byte
}

func (c call) number(name string) int64 {
	n, _ := strconv.ParseInt(c.PathValue(name), 10, 64)
	return n
}

// Handler is the forge as people and programs reach it.
func (s *Server) Handler() http.Handler {
	api := http.NewServeMux()
	handle := func(pattern string, h func(c call) (int, any, error)) {
		method, path, _ := strings.Cut(pattern, " ")
		api.HandleFunc(method+" "+API+path, func(w http.ResponseWriter, r *http.Request) {
			c := call{Request: r}
			if r.PathValue("owner") != "" {
				c.repo = r.PathValue("owner") + "/" + r.PathValue("repo")
			}
			s.answer(w, c, pattern, h)
		})
	}
	for pattern, h := range map[string]func(c call) (int, any, error){
		"GET /app":                                                   s.getApp,
		"GET /app/hook/config":                                       s.getAppHook,
		"GET /app/hook/deliveries":                                   s.getDeliveries,
		"GET /repos/{owner}/{repo}/hooks":                            s.getHooks,
		"GET /repos/{owner}/{repo}/pulls":                            s.getPulls,
		"POST /app/installations/{id}/access_tokens":                 s.postToken,
		"GET /repos/{owner}/{repo}/installation":                     s.getInstallation,
		"GET /user":                                                  func(c call) (int, any, error) { return http.StatusOK, c.user, nil },
		"GET /user/{id}":                                             s.getUser,
		"GET /users/{login}":                                         s.getUser,
		"GET /repos/{owner}/{repo}":                                  s.getRepo,
		"GET /repos/{owner}/{repo}/git/commits/{sha}":                s.getCommit,
		"GET /repos/{owner}/{repo}/git/trees/{sha}":                  s.getTree,
		"GET /repos/{owner}/{repo}/git/blobs/{sha}":                  s.getBlob,
		"GET /repos/{owner}/{repo}/git/tags/{sha}":                   s.getTag,
		"GET /repos/{owner}/{repo}/git/ref/{ref...}":                 s.getRef,
		"GET /repos/{owner}/{repo}/branches":                         s.getHeads,
		"GET /repos/{owner}/{repo}/tags":                             s.getHeads,
		"GET /repos/{owner}/{repo}/compare/{basehead}":               s.getComparison,
		"POST /repos/{owner}/{repo}/statuses/{sha}":                  s.postStatus,
		"GET /repos/{owner}/{repo}/commits/{sha}/check-runs":         s.getCheckRuns,
		"POST /repos/{owner}/{repo}/check-runs":                      s.postCheckRun,
		"PATCH /repos/{owner}/{repo}/check-runs/{id}":                s.patchCheckRun,
		"GET /repos/{owner}/{repo}/check-runs/{id}/annotations":      s.getAnnotations,
		"GET /repos/{owner}/{repo}/pulls/{number}":                   s.getPull,
		"GET /repos/{owner}/{repo}/collaborators/{login}/permission": s.getPermission,
		"GET /repos/{owner}/{repo}/issues/{number}/comments":         s.getComments,
		"POST /repos/{owner}/{repo}/issues/{number}/comments":        s.postComment,
		"PATCH /repos/{owner}/{repo}/issues/comments/{id}":           s.patchComment,
	} {
		handle(pattern, h)
	}
	return s.Faults.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, ok := fakeforge.IsGit(r)
		if !ok {
			api.ServeHTTP(w, r)
			return
		}
		user, password, _ := r.BasicAuth()
		if user != "x-access-token" || !s.mayRead(password, name) {
			w.Header().Set("WWW-Authenticate", `Basic realm="GitHub"`)
			http.Error(w, "Unauthorized", http.StatusUnauthorized)
			return
		}
		s.Repos.ServeGit(w, r)
	}))
}

// Start serves the forge at a free port of this machine.
func (s *Server) Start() *httptest.Server { return httptest.NewServer(s.Handler()) }

func (s *Server) answer(w http.ResponseWriter, c call, pattern string, h func(c call) (int, any, error)) {
	code, body, err := s.carryOut(&c, pattern, h)
	if err != nil {
		var p problem
		if errors.Is(err, fakeforge.ErrNotFound) {
			p = notFound
		} else if !errors.As(err, &p) {
			p = problem{http.StatusInternalServerError, err.Error()}
		}
		code, body = p.code, map[string]string{"message": p.message, "documentation_url": "https://docs.github.com/rest"}
	}
	text, raw := body.([]byte)
	w.Header().Set("Content-Type", "application/octet-stream")
	if !raw {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		if list, ok := body.(page); ok {
			body = list.items
			if list.next > 0 {
				next := *c.URL
				q := next.Query()
				q.Set("page", strconv.Itoa(list.next))
				next.RawQuery = q.Encode()
				w.Header().Set("Link", fmt.Sprintf(`<http://%s%s>; rel="next"`, c.Host, next.RequestURI()))
			}
		}
		if text, err = json.Marshal(body); err != nil {
			code, text = http.StatusInternalServerError, nil
		}
	}
	s.Setup.header(w.Header(), c.Request)
	w.Header().Set("X-RateLimit-Limit", "5000")
	w.Header().Set("X-RateLimit-Remaining", "4999")
	w.Header().Set("X-RateLimit-Reset", strconv.FormatInt(time.Now().Add(time.Hour).Unix(), 10))
	if code == http.StatusOK && c.Method == http.MethodGet {
		sum := sha256.Sum256(text)
		etag := `W/"` + hex.EncodeToString(sum[:]) + `"`
		w.Header().Set("ETag", etag)
		if c.Header.Get("If-None-Match") == etag {
			s.mu.Lock()
			s.unchanged++
			s.mu.Unlock()
			w.WriteHeader(http.StatusNotModified)
			return
		}
	}
	w.WriteHeader(code)
	_, _ = w.Write(text)
}

func (s *Server) carryOut(c *call, pattern string, h func(c call) (int, any, error)) (int, any, error) {
	if err := s.authenticate(c); err != nil {
		return 0, nil, err
	}
	if c.repo != "" {
		s.mu.Lock()
		to, moved := s.renamed[c.repo]
		s.mu.Unlock()
		if moved {
			c.repo = to // GitHub redirects to a URL by ID first; see Faults for redirects
		}
		if _, err := s.Repos.Dir(c.repo); err != nil {
			return 0, nil, err
		}
	}
	var err error
	if c.body, err = io.ReadAll(c.Request.Body); err != nil {
		return 0, nil, err
	}
	code, body, err := h(*c)
	if err == nil && s.Observe != nil && len(c.body) > 0 {
		s.Observe(c.Method, pattern, c.body)
	}
	return code, body, err
}

// page is one page of a list.
type page struct {
	items any
	next  int // 0: it is the last
}

// paged cuts the page that is asked for out of a list.
func paged[T any](c call, all []T) page {
	number, _ := strconv.Atoi(c.URL.Query().Get("page"))
	size, _ := strconv.Atoi(c.URL.Query().Get("per_page"))
	number = max(number, 1)
	if size <= 0 {
		size = 30
	}
	size = min(size, 100)
	p := page{items: append([]T{}, fakeforge.Page(all, number, size)...)}
	if number*size < len(all) {
		p.next = number + 1
	}
	return p
}
