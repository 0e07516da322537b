package forgejo

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/internal/hook"
	"github.com/solstice-ci/solstice-go/forge/internal/rest"
)

// States as the forge knows them: pending, success, error, failure, warning
// (modules/commitstatus of Gitea), and skipped from Gitea 1.25 on.
var states = map[forge.StatusState]string{
	forge.StatusPending: "pending", forge.StatusRunning: "pending", forge.StatusSuccess: "success",
	forge.StatusFailure: "failure", forge.StatusError: "error",
	forge.StatusCancelled: "error",   // it has no verdict
	forge.StatusSkipped:   "success", // it is in nobody's way
}

// maxDescription is what pages show of a description, in bytes.
const maxDescription = 255

// ReportStatus implements forge.Forge. Each report is a new row at the forge,
// which shows the last of a context.
func (f *Forge) ReportStatus(ctx context.Context, r forge.Repo, commit string, s forge.Status) error {
	if err := s.Validate(); err != nil {
		return err
	}
	// Known first: the API answers 500 for a commit that it does not have.
	if _, err := f.tree(ctx, r, commit); err != nil {
		return err
	}
	// Names of repositories that differ in case are one.
	return f.statuses.Do(ctx, strings.ToLower(r.FullName())+"@"+commit+" "+s.Key, s.Version, func() error {
		state := states[s.State]
		if s.State == forge.StatusSkipped {
			skipped, err := f.knowsSkipped(ctx)
			if err != nil {
				return err
			}
			if skipped {
				state = "skipped"
			}
		}
		_, err := f.api.Do(ctx, rest.Call{Method: http.MethodPost, Path: in(r, "statuses", commit), Body: map[string]string{
			"state": state, "context": s.Key, "target_url": hook.WebURL(s.TargetURL),
			"description": rest.Cut(hook.Line(s.Description), maxDescription),
		}})
		return err
	})
}

// knowsSkipped asks the server for its version, once.
func (f *Forge) knowsSkipped(ctx context.Context) (bool, error) {
	f.mu.Lock()
	version := f.version
	f.mu.Unlock()
	if version == "" {
		var answer struct {
			Version string `json:"version"`
		}
		if err := f.get(ctx, &answer, nil, "version"); errors.Is(err, forge.ErrUnavailable) || ctx.Err() != nil {
			return false, err
		}
		version = answer.Version // unknown where it is not told to everybody
		f.mu.Lock()
		f.version = version
		f.mu.Unlock()
	}
	return skippedSince(version), nil
}

// skippedSince reads "1.25.3", "1.26.0+dev-12-gabc", and Forgejo's
// "12.0.1+gitea-1.22.0", whose API is that of the Gitea it names.
func skippedSince(version string) bool {
	if _, gitea, ok := strings.Cut(version, "+gitea-"); ok {
		version = gitea
	}
	parts := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
	if len(parts) < 2 {
		return false
	}
	major, err1 := strconv.Atoi(parts[0])
	minor, err2 := strconv.Atoi(parts[1])
	return err1 == nil && err2 == nil && (major > 1 || major == 1 && minor >= 25)
}

// MayApprove implements forge.Permissions: who may write. The API asks by login,
// which may have a new owner by now, so the answer counts only for the ID.
func (f *Forge) MayApprove(ctx context.Context, r forge.Repo, u forge.User) (bool, error) {
	if err := check(r); err != nil {
		return false, err
	}
	id, err := strconv.ParseInt(u.ID, 10, 64)
	if err != nil || id < 1 {
		return false, fmt.Errorf("%w: user ID %.40q", forge.ErrInvalid, u.ID)
	}
	if may, known, err := f.mayWrite(ctx, r, id, u.Login); known || err != nil {
		return may, err
	}
	var found struct {
		Data []user `json:"data"`
	}
	if err := f.get(ctx, &found, url.Values{"uid": {u.ID}}, "users", "search"); err != nil {
		return false, err
	}
	for _, now := range found.Data {
		if now.ID == id {
			may, _, err := f.mayWrite(ctx, r, id, now.Login)
			return may, err
		}
	}
	return false, nil // gone
}

// mayWrite asks for a login; known is false where it is not that of the ID.
func (f *Forge) mayWrite(ctx context.Context, r forge.Repo, id int64, login string) (may, known bool, err error) {
	if login == "" || login == "." || login == ".." || len(login) > 255 {
		return false, false, nil
	}
	var answer struct {
		Permission string `json:"permission"`
		User       *user  `json:"user"`
	}
	err = f.get(ctx, &answer, nil, in(r, "collaborators", login, "permission")...)
	if errors.Is(err, forge.ErrNotFound) {
		// Whether the user or the repository.
		return false, false, f.get(ctx, nil, nil, in(r)...)
	}
	if err != nil || answer.User == nil || answer.User.ID != id {
		return false, false, err
	}
	switch answer.Permission {
	case "owner", "admin", "write":
		return true, true, nil
	}
	return false, true, nil
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
		return fmt.Errorf("%w: pull request %d", forge.ErrInvalid, pullRequest)
	}
	self, err := f.whoAmI(ctx)
	if err != nil {
		return err
	}
	comments := in(r, "issues", strconv.Itoa(pullRequest), "comments")
	var all []struct {
		ID   int64  `json:"id"`
		Body string `json:"body"`
		User user   `json:"user"`
	}
	if err := f.get(ctx, &all, nil, comments...); err != nil {
		return err
	}
	body := map[string]string{"body": marker + "\n" + text}
	for _, c := range all {
		if c.User.ID == self && strings.HasPrefix(c.Body, marker) { // others may write the marker too
			_, err := f.api.Do(ctx, rest.Call{
				Method: http.MethodPatch, Path: in(r, "issues", "comments", strconv.FormatInt(c.ID, 10)), Body: body,
			})
			return err
		}
	}
	_, err = f.api.Do(ctx, rest.Call{Method: http.MethodPost, Path: comments, Body: body})
	return err
}

// whoAmI gives our user's ID.
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
