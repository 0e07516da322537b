package github

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// authenticate tells who calls: the App by its JWT at its own paths, elsewhere
// the token's user or an installation.
func (s *Server) authenticate(c *call) error {
	kind, text, _ := strings.Cut(c.Header.Get("Authorization"), " ")
	if !strings.EqualFold(kind, "bearer") && !strings.EqualFold(kind, "token") {
		return unauthorized
	}
	path := strings.TrimPrefix(c.URL.Path, API)
	if path == "/app" || strings.HasPrefix(path, "/app/") || strings.HasSuffix(path, "/installation") {
		return s.checkJWT(text)
	}
	if text == Token {
		if s.Setup.Expired {
			return unauthorized
		}
		c.user = User{1, "robot"}
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.tokens[text]
	switch {
	case g == nil || !time.Now().Before(g.expires):
		return unauthorized
	case c.repo == "":
		if path == "/user" { // an installation is no user
			return problem{http.StatusForbidden, "Resource not accessible by integration"}
		}
	case !g.reads(c.repo):
		return notFound
	case g.read && (c.Method != http.MethodGet || !strings.Contains(path, "/git/")):
		return problem{http.StatusForbidden, "Resource not accessible by integration"}
	}
	c.user = User{BotID, bot}
	return nil
}

func (g *grant) reads(repo string) bool {
	owner, name, _ := strings.Cut(repo, "/")
	return owner == g.owner && (g.repos == nil || slices.Contains(g.repos, name))
}

// mayRead: a git client with that password.
func (s *Server) mayRead(token, repo string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	g := s.tokens[token]
	return token == Token || g != nil && time.Now().Before(g.expires) && g.reads(repo)
}

// checkJWT: RS256, from the App, for ten minutes at most. See
// https://docs.github.com/apps/creating-github-apps/authenticating-with-a-github-app/generating-a-json-web-token-jwt-for-a-github-app
func (s *Server) checkJWT(text string) error {
	bad := problem{http.StatusUnauthorized, "A JSON web token could not be decoded"}
	key, err := appKey()
	parts := strings.Split(text, ".")
	if err != nil || len(parts) != 3 {
		return bad
	}
	sum := sha256.Sum256([]byte(parts[0] + "." + parts[1]))
	signature, err := base64.RawURLEncoding.DecodeString(parts[2])
	if err != nil || rsa.VerifyPKCS1v15(&key.PublicKey, crypto.SHA256, sum[:], signature) != nil {
		return bad
	}
	raw, err := base64.RawURLEncoding.DecodeString(parts[1])
	var claims struct {
		Iss      string
		Iat, Exp int64
	}
	if err != nil || json.Unmarshal(raw, &claims) != nil {
		return bad
	}
	now := time.Now().Add(s.Setup.Ahead).Unix()
	if claims.Iss != strconv.Itoa(AppID) || claims.Exp < now || claims.Exp > now+600 || claims.Iat > now+60 {
		return bad
	}
	return nil
}

func (s *Server) getInstallation(c call) (int, any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	owner := c.PathValue("owner")
	if s.installs[owner] == 0 {
		s.nextID++
		s.installs[owner] = s.nextID
	}
	return http.StatusOK, s.installation(owner), nil
}

func (s *Server) postToken(c call) (int, any, error) {
	var in struct {
		Repositories []string          `json:"repositories"`
		Permissions  map[string]string `json:"permissions"`
	}
	if len(c.body) > 0 && json.Unmarshal(c.body, &in) != nil {
		return 0, nil, problem{http.StatusBadRequest, "Problems parsing JSON"}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	g := &grant{repos: in.Repositories, read: in.Permissions != nil, expires: time.Now().Add(time.Hour)}
	for owner, id := range s.installs {
		if id == c.number("id") {
			g.owner = owner
		}
	}
	if g.owner == "" {
		return 0, nil, notFound
	}
	for _, name := range g.repos {
		if _, err := s.Repos.Dir(g.owner + "/" + name); err != nil {
			return 0, nil, invalid("There is at least one repository that does not exist or is not accessible to the parent installation.")
		}
	}
	if s.TokenLife != 0 {
		g.expires = time.Now().Add(s.TokenLife)
	}
	s.nextID++
	text := fmt.Sprintf("ghs_%036d", s.nextID)
	s.tokens[text] = g
	return http.StatusCreated, map[string]any{"token": text, "expires_at": g.expires.UTC().Format(time.RFC3339)}, nil
}
