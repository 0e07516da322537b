package gitlab

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/internal/hook"
	"github.com/solstice-ci/solstice-go/forge/internal/rest"
)

// States as the forge knows them (https://docs.gitlab.com/api/commits/#set-commit-pipeline-status).
var states = map[forge.StatusState]string{
	forge.StatusPending: "pending", forge.StatusRunning: "running", forge.StatusSuccess: "success",
	forge.StatusFailure: "failed", forge.StatusError: "failed",
	forge.StatusCancelled: "canceled", forge.StatusSkipped: "skipped",
}

// The longest description and URL that are taken.
const (
	maxDescription = 255
	maxTargetURL   = 255
)

// ReportStatus implements forge.Forge. Statuses are jobs of a pipeline, which
// the forge makes for a commit that has none.
func (f *Forge) ReportStatus(ctx context.Context, r forge.Repo, commit string, s forge.Status) error {
	if err := s.Validate(); err != nil {
		return err
	}
	if err := f.commit(ctx, r, commit); err != nil { // whose absence looks like that of a ref
		return err
	}
	// Names of repositories that differ in case are one.
	return f.statuses.Do(ctx, strings.ToLower(r.FullName())+"@"+commit+" "+s.Key, s.Version, func() error {
		body := map[string]any{
			"name": s.Key, "state": states[s.State], "description": rest.Cut(hook.Line(s.Description), maxDescription),
		}
		if u := hook.WebURL(s.TargetURL); u != "" && len(u) <= maxTargetURL {
			body["target_url"] = u
		}
		err := f.post(ctx, r, commit, body)
		if errors.Is(err, forge.ErrInvalid) && s.State == forge.StatusSkipped { // which older versions don't know
			body["state"] = "success"
			err = f.post(ctx, r, commit, body)
		}
		if errors.Is(err, forge.ErrInvalid) && !s.State.Terminal() {
			// In older versions a job can't get the state that it has, nor go back.
			if state, lookErr := f.stands(ctx, r, commit, s.Key); lookErr == nil && slices.Contains([]string{"created", "pending", "running"}, state) {
				return nil
			}
		}
		return err
	})
}

// post reports to the pipeline where the commit's statuses are, or to the one
// that the forge finds, or, for a commit that is on no branch, as those of forks
// are not, under the ref of its merge request.
func (f *Forge) post(ctx context.Context, r forge.Repo, commit string, body map[string]any) error {
	key := r.FullName() + "@" + commit
	try := func(where string, value any) error {
		delete(body, "pipeline_id")
		delete(body, "ref")
		if where != "" {
			body[where] = value
		}
		var made struct {
			Pipeline int64 `json:"pipeline_id"`
		}
		_, err := f.api.Do(ctx, rest.Call{Method: http.MethodPost, Path: in(r, "statuses", commit), Body: body, Out: &made})
		if rest.Status(err) == http.StatusConflict { // another update is under way
			return fmt.Errorf("%w: %w", forge.ErrUnavailable, err)
		}
		if err == nil && made.Pipeline > 0 {
			f.pipelines.Put(key, made.Pipeline, 1)
		}
		return err
	}
	if pipeline, ok := f.pipelines.Get(key); ok {
		if err := try("pipeline_id", pipeline); !errors.Is(err, forge.ErrNotFound) {
			return err
		}
		f.pipelines.Delete(key)
	}
	err := try("", nil)
	if !errors.Is(err, forge.ErrNotFound) {
		return err
	}
	var requests []struct {
		IID int64 `json:"iid"`
	}
	if lookErr := f.get(ctx, &requests, nil, in(r, "repository", "commits", commit, "merge_requests")...); lookErr != nil || len(requests) == 0 {
		return errors.Join(err, lookErr)
	}
	return try("ref", fmt.Sprintf("refs/merge-requests/%d/head", requests[0].IID))
}

// stands gives the state that the forge shows under a name.
func (f *Forge) stands(ctx context.Context, r forge.Repo, commit, name string) (string, error) {
	var all []struct {
		ID     int64  `json:"id"`
		Status string `json:"status"`
	}
	if err := f.get(ctx, &all, url.Values{"name": {name}}, in(r, "repository", "commits", commit, "statuses")...); err != nil {
		return "", err
	}
	last, state := int64(0), ""
	for _, s := range all {
		if s.ID > last {
			last, state = s.ID, s.Status
		}
	}
	return state, nil
}

// developer is the access level of the role (https://docs.gitlab.com/api/members/#roles).
const developer = 30

// MayApprove implements forge.Permissions: whoever is a Developer or more in
// the project, by himself or through a group.
func (f *Forge) MayApprove(ctx context.Context, r forge.Repo, u forge.User) (bool, error) {
	if err := check(r); err != nil {
		return false, err
	}
	id, err := strconv.ParseInt(u.ID, 10, 64)
	if err != nil || id < 1 {
		return false, fmt.Errorf("%w: user ID %.40q", forge.ErrInvalid, u.ID)
	}
	var member struct {
		ID    int64  `json:"id"`
		Level int    `json:"access_level"`
		State string `json:"state"`
	}
	err = f.get(ctx, &member, nil, in(r, "members", "all", strconv.FormatInt(id, 10))...)
	if errors.Is(err, forge.ErrNotFound) {
		// Whether the user or the project.
		return false, f.get(ctx, nil, nil, in(r)...)
	}
	return err == nil && member.ID == id && member.Level >= developer && member.State == "active", err
}

// MergeCommit implements forge.Merger.
func (f *Forge) MergeCommit(ctx context.Context, r forge.Repo, pr forge.PullRequest) (string, error) {
	if err := check(r); err != nil {
		return "", err
	}
	if pr.Number < 1 {
		return "", fmt.Errorf("%w: merge request %d", forge.ErrInvalid, pr.Number)
	}
	request := in(r, "merge_requests", strconv.Itoa(pr.Number))
	var ref struct {
		Commit string `json:"commit_id"`
	}
	err := f.get(ctx, &ref, nil, append(slices.Clone(request), "merge_ref")...)
	if errors.Is(err, forge.ErrInvalid) {
		var m struct {
			Status string `json:"detailed_merge_status"`
			Old    string `json:"merge_status"` // before GitLab 15.6
		}
		if err := f.get(ctx, &m, nil, request...); err != nil {
			return "", err
		}
		for _, s := range []string{m.Status, m.Old} {
			if slices.Contains([]string{"checking", "unchecked", "preparing", "approvals_syncing", "cannot_be_merged_recheck"}, s) {
				return "", fmt.Errorf("%w: gitlab: whether merge request %d can be merged is not known yet (%s)", forge.ErrUnavailable, pr.Number, s)
			}
		}
		return "", fmt.Errorf("%w: gitlab: merge request %d (%s): %w", forge.ErrConflict, pr.Number, m.Status+m.Old, err)
	}
	if err != nil {
		return "", err
	}
	c, err := f.lookUp(ctx, r, ref.Commit)
	if err != nil {
		return "", err
	}
	if !slices.Contains(c.Parents, pr.HeadCommit) {
		return "", fmt.Errorf("%w: gitlab: the merge commit of merge request %d is not of %s", forge.ErrUnavailable, pr.Number, pr.HeadCommit)
	}
	return c.ID, nil
}

// Comment implements forge.Commenter.
func (f *Forge) Comment(ctx context.Context, r forge.Repo, pullRequest int, key, text string) error {
	if err := check(r); err != nil {
		return err
	}
	marker, err := hook.Marker(key)
	if err != nil {
		return err
	}
	if pullRequest < 1 {
		return fmt.Errorf("%w: merge request %d", forge.ErrInvalid, pullRequest)
	}
	self, err := f.whoAmI(ctx)
	if err != nil {
		return err
	}
	notes := in(r, "merge_requests", strconv.Itoa(pullRequest), "notes")
	type note struct {
		ID     int64  `json:"id"`
		Body   string `json:"body"`
		Author user   `json:"author"`
	}
	old := int64(0)
	err = pages(ctx, f, url.Values{"sort": {"asc"}}, func(list []note) bool {
		for _, n := range list {
			if n.Author.ID == self && strings.HasPrefix(n.Body, marker) { // others may write the marker too
				old = n.ID
				return false
			}
		}
		return true
	}, notes...)
	if err != nil {
		return err
	}
	call := rest.Call{Method: http.MethodPost, Path: notes, Body: map[string]string{"body": marker + "\n" + text}}
	if old != 0 {
		call.Method, call.Path = http.MethodPut, append(notes, strconv.FormatInt(old, 10))
	}
	_, err = f.api.Do(ctx, call)
	return err
}

type user struct {
	ID       int64  `json:"id"`
	Username string `json:"username"`
}

// whoAmI gives our user's ID; tokens of projects and groups have users too.
func (f *Forge) whoAmI(ctx context.Context) (int64, error) {
	f.mu.Lock()
	self := f.self
	f.mu.Unlock()
	if self != 0 {
		return self, nil
	}
	var me user
	if err := f.get(ctx, &me, nil, "user"); err != nil {
		return 0, err
	}
	f.mu.Lock()
	f.self = me.ID
	f.mu.Unlock()
	return me.ID, nil
}
