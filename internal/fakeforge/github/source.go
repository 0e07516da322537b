package github

import (
	"encoding/base64"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// repoID is the one of a repository's name.
func repoID(repo string) (id int64) {
	for _, c := range repo {
		id = (id*31 + int64(c)) % 1_000_003
	}
	return id + 1
}

// Repository is the JSON of a repository, as far as anybody reads it.
func Repository(base, repo string) map[string]any {
	owner, name, _ := strings.Cut(repo, "/")
	return map[string]any{
		"id": repoID(repo), "owner": map[string]any{"id": 7, "login": owner}, "name": name, "full_name": repo,
		"private": true, "html_url": base + "/" + repo, "clone_url": base + "/" + repo + ".git", "default_branch": "main",
	}
}

func (s *Server) getRepo(c call) (int, any, error) {
	r := Repository("http://"+c.Host, c.repo)
	r["permissions"] = s.Setup.Role
	return http.StatusOK, r, nil
}

// object is the object that the path names, which has to be of a type.
func (s *Server) object(c call, sha, kind string) ([]byte, error) {
	if gitcmd.CheckObject(sha) != nil {
		return nil, invalid("The sha parameter must be exactly 40 characters and contain only [0-9a-f].")
	}
	got, data, err := s.Repos.Object(c.Context(), c.repo, sha)
	if err == nil && got != kind {
		err = notFound
	}
	return data, err
}

func (s *Server) getCommit(c call) (int, any, error) {
	data, err := s.object(c, c.PathValue("sha"), "commit")
	if err != nil {
		return 0, nil, err
	}
	head, message, _ := strings.Cut(string(data), "\n\n")
	out := map[string]any{"sha": c.PathValue("sha"), "message": message}
	parents := []map[string]string{}
	for line := range strings.Lines(head) {
		switch word, rest, _ := strings.Cut(strings.TrimSpace(line), " "); word {
		case "tree":
			out["tree"] = map[string]string{"sha": rest}
		case "parent":
			parents = append(parents, map[string]string{"sha": rest})
		}
	}
	out["parents"] = parents
	return http.StatusOK, out, nil
}

func (s *Server) getTree(c call) (int, any, error) {
	entries, err := s.Repos.Tree(c.Context(), c.repo, c.PathValue("sha"), c.URL.Query().Get("recursive") != "")
	if err != nil {
		return 0, nil, err
	}
	limit := s.MaxTree
	if limit == 0 {
		limit = 100_000
	}
	list := []map[string]any{}
	for _, e := range entries[:min(limit, len(entries))] {
		entry := map[string]any{"path": e.Path, "mode": e.Mode, "type": e.Type, "sha": e.Object}
		if e.Type == "blob" {
			entry["size"] = e.Size
		}
		list = append(list, entry)
	}
	return http.StatusOK, map[string]any{"sha": c.PathValue("sha"), "tree": list, "truncated": len(entries) > limit}, nil
}

func (s *Server) getBlob(c call) (int, any, error) {
	data, err := s.object(c, c.PathValue("sha"), "blob")
	if err != nil || strings.Contains(c.Header.Get("Accept"), "raw") {
		return http.StatusOK, data, err
	}
	return http.StatusOK, map[string]any{"encoding": "base64", "content": base64.StdEncoding.EncodeToString(data), "size": len(data)}, nil
}

func (s *Server) getTag(c call) (int, any, error) {
	data, err := s.object(c, c.PathValue("sha"), "tag")
	if err != nil {
		return 0, nil, err
	}
	target := map[string]string{}
	for line := range strings.Lines(string(data)) {
		switch word, rest, _ := strings.Cut(strings.TrimSpace(line), " "); word {
		case "object":
			target["sha"] = rest
		case "type":
			target["type"] = rest
		}
	}
	return http.StatusOK, map[string]any{"sha": c.PathValue("sha"), "object": target}, nil
}

func (s *Server) getRef(c call) (int, any, error) {
	name := "refs/" + c.PathValue("ref")
	refs, err := s.Repos.Refs(c.Context(), c.repo, name)
	if err != nil {
		return 0, nil, err
	}
	for _, r := range refs {
		if r.Name == name {
			return http.StatusOK, map[string]any{"ref": r.Name, "object": map[string]string{"type": r.Type, "sha": r.Object}}, nil
		}
	}
	return 0, nil, notFound
}

// getHeads lists branches or tags.
func (s *Server) getHeads(c call) (int, any, error) {
	prefix := "refs/heads/"
	if strings.HasSuffix(c.URL.Path, "/tags") {
		prefix = "refs/tags/"
	}
	refs, err := s.Repos.Refs(c.Context(), c.repo, prefix)
	if err != nil {
		return 0, nil, err
	}
	var list []map[string]any
	for _, r := range refs {
		list = append(list, map[string]any{"name": strings.TrimPrefix(r.Name, prefix), "commit": map[string]string{"sha": r.Commit}})
	}
	return http.StatusOK, paged(c, list), nil
}

// getComparison compares the head with the merge base, and lists 300 files at
// most, on the first page.
func (s *Server) getComparison(c call) (int, any, error) {
	base, head, ok := strings.Cut(c.PathValue("basehead"), "...")
	if !ok {
		return 0, nil, notFound
	}
	common, err := s.Repos.Git(c.Context(), c.repo, "", "merge-base", base, head)
	if err != nil {
		return 0, nil, err
	}
	common = strings.TrimSpace(common)
	status := "diverged"
	switch {
	case base == head:
		status = "identical"
	case common == base:
		status = "ahead"
	case common == head:
		status = "behind"
	}
	limit := s.MaxFiles
	if limit == 0 {
		limit = 300
	}
	out, err := s.Repos.Git(c.Context(), c.repo, "", "diff-tree", "-r", "-z", "-M", "--name-status", common, head)
	if err != nil {
		return 0, nil, err
	}
	files := []map[string]any{}
	fields := strings.Split(strings.TrimSuffix(out, "\x00"), "\x00")
	for len(fields) >= 2 && len(files) < limit {
		kind, name := fields[0], fields[1]
		file := map[string]any{"filename": name, "status": map[byte]string{'A': "added", 'D': "removed"}[kind[0]]}
		fields = fields[2:]
		if kind[0] == 'R' {
			file["previous_filename"], file["filename"], file["status"] = name, fields[0], "renamed"
			fields = fields[1:]
		} else if file["status"] == "" {
			file["status"] = "modified"
		}
		files = append(files, file)
	}
	body := map[string]any{"status": status, "merge_base_commit": map[string]string{"sha": common}, "commits": []any{}}
	if n := c.URL.Query().Get("page"); n == "" || n == "1" {
		body["files"] = files
	}
	return http.StatusOK, body, nil
}

func (s *Server) getUser(c call) (int, any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, login := range s.users {
		if c.PathValue("id") == strconv.FormatInt(id, 10) || c.PathValue("login") != "" && strings.EqualFold(login, c.PathValue("login")) {
			return http.StatusOK, User{id, login}, nil
		}
	}
	return 0, nil, notFound
}

func (s *Server) getPermission(c call) (int, any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, login := range s.users {
		if login == c.PathValue("login") {
			level := s.permissions[c.repo][login]
			if level == "" {
				level = "none"
			}
			return http.StatusOK, map[string]any{"permission": level, "role_name": level, "user": User{id, login}}, nil
		}
	}
	return 0, nil, notFound
}

// getPull makes the merge commit in the background: who asks first is told that
// it is not known.
func (s *Server) getPull(c call) (int, any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pulls[key(c.repo, int(c.number("number")))]
	if p == nil {
		return 0, nil, notFound
	}
	head, err := s.head(c.Context(), c.repo, p)
	if err != nil {
		return 0, nil, err
	}
	base, err := s.Repos.Resolve(c.Context(), c.repo, "refs/heads/"+p.Base)
	if err != nil {
		return 0, nil, err
	}
	out := map[string]any{
		"number": p.Number, "state": p.State, "mergeable": nil, "merge_commit_sha": nil,
		"head": map[string]any{"ref": p.Head, "sha": head}, "base": map[string]any{"ref": p.Base, "sha": base},
	}
	if p.merge != "" {
		out["merge_commit_sha"] = p.merge // an old one too
	}
	switch {
	case p.State != "open":
	case p.tried == base+head || s.StaleMerges && p.merge != "":
		out["mergeable"] = p.merge != ""
	default:
		p.tried, p.merge = base+head, ""
		tree, err := s.Repos.Git(c.Context(), c.repo, "", "merge-tree", "--write-tree", base, head)
		if err != nil {
			break // they have conflicts
		}
		merge, err := s.Repos.Git(c.Context(), c.repo, "merge\n", "commit-tree", "-p", base, "-p", head, strings.TrimSpace(tree))
		if err != nil {
			return 0, nil, err
		}
		p.merge = strings.TrimSpace(merge)
	}
	return http.StatusOK, out, nil
}

func (s *Server) getComments(c call) (int, any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	number := int(c.number("number"))
	if s.pulls[key(c.repo, number)] == nil {
		return 0, nil, notFound
	}
	return http.StatusOK, paged(c, slices.Clone(s.comments[key(c.repo, number)])), nil
}
