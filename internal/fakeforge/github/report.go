package github

import (
	"encoding/json"
	"net/http"
	"strings"
	"unicode/utf8"

	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// commit makes sure that there is one.
func (s *Server) commit(c call, sha string) error {
	if gitcmd.CheckObject(sha) == nil {
		if _, err := s.object(c, sha, "commit"); err == nil {
			return nil
		}
	}
	return invalid("No commit found for SHA: %s", sha)
}

func (s *Server) postStatus(c call) (int, any, error) {
	var in Status
	if json.Unmarshal(c.body, &in) != nil {
		return 0, nil, problem{http.StatusBadRequest, "Problems parsing JSON"}
	}
	sha := c.PathValue("sha")
	if err := s.commit(c, sha); err != nil {
		return 0, nil, err
	}
	switch in.State {
	case "error", "failure", "pending", "success":
	default:
		return 0, nil, invalid("Validation Failed: state")
	}
	if utf8.RuneCountInString(in.Description) > 140 {
		return 0, nil, invalid("Validation Failed: description is too long (maximum is 140 characters)")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.statuses[c.repo+"@"+sha]
	same := 0
	for _, st := range all {
		if strings.EqualFold(st.Context, in.Context) {
			same++
		}
	}
	if same >= 1000 {
		return 0, nil, invalid("Validation Failed: This SHA and context has reached the maximum number of statuses.")
	}
	s.nextID++
	in.ID = s.nextID
	s.statuses[c.repo+"@"+sha] = append(all, in)
	return http.StatusCreated, in, nil
}

// checkRunInput are the parameters of both requests; absent ones change nothing.
type checkRunInput struct {
	Name        *string `json:"name"`
	HeadSHA     *string `json:"head_sha"`
	DetailsURL  *string `json:"details_url"`
	ExternalID  *string `json:"external_id"`
	Status      *string `json:"status"`
	Conclusion  *string `json:"conclusion"`
	StartedAt   *string `json:"started_at"`
	CompletedAt *string `json:"completed_at"`
	Output      *struct {
		Title       *string      `json:"title"`
		Summary     *string      `json:"summary"`
		Annotations []Annotation `json:"annotations"`
	} `json:"output"`
	Actions *[]Action `json:"actions"`
}

func set[T any](to *T, from *T) {
	if from != nil {
		*to = *from
	}
}

func (s *Server) apply(c call, in checkRunInput, to *CheckRun) error {
	if c.user.ID != BotID {
		return problem{http.StatusForbidden, "You must authenticate via a GitHub App."}
	}
	set(&to.Name, in.Name)
	set(&to.DetailsURL, in.DetailsURL)
	set(&to.ExternalID, in.ExternalID)
	set(&to.Status, in.Status)
	switch to.Status {
	case "queued", "in_progress":
		to.Conclusion = nil
	case "completed":
	default:
		return invalid("Invalid request. status")
	}
	if in.Conclusion != nil {
		to.Conclusion, to.Status = in.Conclusion, "completed"
	}
	if to.Status == "completed" && to.Conclusion == nil {
		return invalid("Invalid request. conclusion is missing")
	}
	if in.StartedAt != nil {
		to.StartedAt = in.StartedAt
	}
	if in.CompletedAt != nil {
		to.CompletedAt = in.CompletedAt
	}
	if in.Actions != nil {
		if len(*in.Actions) > 3 {
			return invalid("Invalid request. No more than 3 items are allowed")
		}
		for _, a := range *in.Actions {
			if len(a.Label) > 20 || len(a.Description) > 40 || len(a.Identifier) > 20 {
				return invalid("Invalid request. actions")
			}
		}
		to.Actions = *in.Actions
	}
	if o := in.Output; o != nil {
		if o.Title == nil || o.Summary == nil || utf8.RuneCountInString(*o.Summary) > 65535 {
			return invalid("Invalid request. output")
		}
		if len(o.Annotations) > 50 {
			return invalid("Invalid request. No more than 50 items are allowed; %d were supplied.", len(o.Annotations))
		}
		for _, a := range o.Annotations {
			if a.Path == "" || a.StartLine < 1 || a.EndLine < a.StartLine || a.Message == "" {
				return invalid("Invalid request. annotations")
			}
		}
		to.Output.Title, to.Output.Summary = o.Title, o.Summary
		to.Annotations = append(to.Annotations, o.Annotations...)
		to.Output.AnnotationsCount = len(to.Annotations)
	}
	return nil
}

func (s *Server) postCheckRun(c call) (int, any, error) {
	var in checkRunInput
	if json.Unmarshal(c.body, &in) != nil || in.Name == nil || in.HeadSHA == nil {
		return 0, nil, invalid("Invalid request.")
	}
	if err := s.commit(c, *in.HeadSHA); err != nil {
		return 0, nil, err
	}
	made := &CheckRun{Repo: c.repo, HeadSHA: *in.HeadSHA, Status: "queued"}
	if err := s.apply(c, in, made); err != nil {
		return 0, nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nextID++
	made.ID, made.App.ID = s.nextID, AppID
	s.checks = append(s.checks, made)
	return http.StatusCreated, *made, nil
}

func (s *Server) checkRun(c call) (*CheckRun, error) {
	for _, run := range s.checks {
		if run.Repo == c.repo && run.ID == c.number("id") {
			return run, nil
		}
	}
	return nil, notFound
}

func (s *Server) patchCheckRun(c call) (int, any, error) {
	var in checkRunInput
	if json.Unmarshal(c.body, &in) != nil {
		return 0, nil, invalid("Invalid request.")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	run, err := s.checkRun(c)
	if err != nil {
		return 0, nil, err
	}
	changed := *run
	if err := s.apply(c, in, &changed); err != nil {
		return 0, nil, err
	}
	*run = changed
	return http.StatusOK, changed, nil
}

func (s *Server) getCheckRuns(c call) (int, any, error) {
	if err := s.commit(c, c.PathValue("sha")); err != nil {
		return 0, nil, err
	}
	q := c.URL.Query()
	found := []CheckRun{}
	for _, run := range s.CheckRuns(c.repo, c.PathValue("sha"), q.Get("filter") != "all") {
		if q.Get("check_name") == "" || run.Name == q.Get("check_name") {
			found = append(found, run)
		}
	}
	return http.StatusOK, map[string]any{"total_count": len(found), "check_runs": found}, nil
}

func (s *Server) getAnnotations(c call) (int, any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	run, err := s.checkRun(c)
	if err != nil {
		return 0, nil, err
	}
	return http.StatusOK, paged(c, run.Annotations), nil
}

func (s *Server) postComment(c call) (int, any, error) {
	var in struct{ Body string }
	if json.Unmarshal(c.body, &in) != nil || in.Body == "" || utf8.RuneCountInString(in.Body) > 65536 {
		return 0, nil, invalid("Validation Failed")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	number := int(c.number("number"))
	if s.pulls[key(c.repo, number)] == nil {
		return 0, nil, notFound
	}
	return http.StatusCreated, *s.comment(c.repo, number, c.user, in.Body), nil
}

func (s *Server) patchComment(c call) (int, any, error) {
	var in struct{ Body string }
	if json.Unmarshal(c.body, &in) != nil || in.Body == "" {
		return 0, nil, invalid("Validation Failed")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, all := range s.comments {
		for _, comment := range all {
			if repo, _, _ := strings.Cut(name, "#"); repo == c.repo && comment.ID == c.number("id") {
				comment.Body = in.Body
				return http.StatusOK, *comment, nil
			}
		}
	}
	return 0, nil, notFound
}
