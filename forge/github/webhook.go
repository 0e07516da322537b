package github

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/internal/hook"
	"github.com/solstice-ci/solstice-go/internal/gitcmd"
)

// ParseWebhook implements forge.Forge. See
// https://docs.github.com/webhooks/webhook-events-and-payloads.
func (f *Forge) ParseWebhook(ctx context.Context, r *http.Request, s forge.SecretFunc) (forge.Event, error) {
	if err := ctx.Err(); err != nil {
		return forge.Event{}, err
	}
	body, err := hook.Body(r)
	if err != nil {
		return forge.Event{}, err
	}
	var about struct {
		Repository *struct {
			FullName string `json:"full_name"`
		} `json:"repository"`
	}
	if err := json.Unmarshal(body, &about); err != nil {
		return forge.Event{}, hook.Invalid("webhook: %v", err)
	}
	repo := forge.Repo{}
	if about.Repository != nil {
		if repo, err = hook.Repo(about.Repository.FullName); err != nil {
			return forge.Event{}, err
		}
	}
	secret, err := hook.Secret(s(ctx, repo.FullName()))
	if err != nil {
		return forge.Event{}, err
	}
	if err := verify(r.Header.Values("X-Hub-Signature-256"), body, secret); err != nil {
		return forge.Event{}, err
	}
	var p payload
	if err := json.Unmarshal(body, &p); err != nil {
		return forge.Event{}, hook.Invalid("webhook: %v", err)
	}
	e, err := f.event(r.Header.Get("X-GitHub-Event"), &p)
	if err != nil {
		return forge.Event{}, err
	}
	if e.Repo.FullName() != repo.FullName() {
		return forge.Event{}, hook.Invalid("webhook: the repository is %.80q and %.80q", repo.FullName(), e.Repo.FullName())
	}
	e.Delivery = hook.Delivery(r.Header.Get("X-GitHub-Delivery"))
	e.Sender = p.Sender.user()
	if err := e.Validate(); err != nil {
		return forge.Event{}, err
	}
	return e, nil
}

// verify checks the signature over the body. SHA-1 alone, the header X-Hub-Signature, is
// refused.
func verify(signatures []string, body, secret []byte) error {
	const prefix = "sha256="
	if len(signatures) != 1 {
		return fmt.Errorf("%w: %d headers X-Hub-Signature-256; is there a secret in the webhook's settings at GitHub?", forge.ErrSignature, len(signatures))
	}
	hexed, ok := strings.CutPrefix(signatures[0], prefix)
	got, err := hex.DecodeString(hexed)
	mac := hmac.New(sha256.New, secret)
	mac.Write(body)
	if !ok || err != nil || !hmac.Equal(got, mac.Sum(nil)) {
		return fmt.Errorf("%w: the secret here and in the webhook's settings at GitHub are not the same", forge.ErrSignature)
	}
	return nil
}

// payload is what is read of any event.
type payload struct {
	Action       string        `json:"action"`
	Sender       *account      `json:"sender"`
	Repository   *repoPayload  `json:"repository"`
	Repositories []repoPayload `json:"repositories"`
	Added        []repoPayload `json:"repositories_added"`
	Removed      []repoPayload `json:"repositories_removed"`

	Ref        string         `json:"ref"`
	Before     string         `json:"before"`
	After      string         `json:"after"`
	Deleted    bool           `json:"deleted"`
	HeadCommit *commitPayload `json:"head_commit"`

	PullRequest *pullPayload  `json:"pull_request"`
	CheckRun    *checkPayload `json:"check_run"`
	CheckSuite  *checkPayload `json:"check_suite"`
	Requested   *struct {
		Identifier string `json:"identifier"`
	} `json:"requested_action"`
}

type account struct {
	ID    int64  `json:"id"`
	Login string `json:"login"`
}

func (a *account) user() forge.User {
	if a == nil || a.ID <= 0 {
		return forge.User{}
	}
	return forge.User{ID: hook.ID(a.ID), Login: hook.Line(a.Login)}
}

type repoPayload struct {
	ID            int64  `json:"id"`
	FullName      string `json:"full_name"`
	HTMLURL       string `json:"html_url"`
	CloneURL      string `json:"clone_url"`
	DefaultBranch string `json:"default_branch"`
	Private       bool   `json:"private"`
}

func (r *repoPayload) repo() (forge.Repo, error) {
	if r == nil {
		return forge.Repo{}, nil
	}
	repo, err := hook.Repo(r.FullName)
	repo.ID, repo.Private = hook.ID(r.ID), r.Private
	repo.URL, repo.CloneURL = hook.WebURL(r.HTMLURL), hook.WebURL(r.CloneURL)
	if gitcmd.CheckRef(r.DefaultBranch) == nil {
		repo.DefaultBranch = r.DefaultBranch
	}
	return repo, err
}

type commitPayload struct {
	ID        string    `json:"id"`
	Message   string    `json:"message"`
	Timestamp time.Time `json:"timestamp"`
}

type pullPayload struct {
	Number    int        `json:"number"`
	Title     string     `json:"title"`
	HTMLURL   string     `json:"html_url"`
	Draft     bool       `json:"draft"`
	User      *account   `json:"user"`
	Head      headOfPull `json:"head"`
	Base      headOfPull `json:"base"`
	UpdatedAt time.Time  `json:"updated_at"`
}

type headOfPull struct {
	Ref  string       `json:"ref"`
	SHA  string       `json:"sha"`
	Repo *repoPayload `json:"repo"`
}

// checkPayload is a check run, or a check suite.
type checkPayload struct {
	HeadSHA    string `json:"head_sha"`
	ExternalID string `json:"external_id"`
	App        struct {
		ID int64 `json:"id"`
	} `json:"app"`
}

func (f *Forge) event(name string, p *payload) (forge.Event, error) {
	repo, err := p.Repository.repo()
	if err != nil {
		return forge.Event{}, err
	}
	e := forge.Event{Repo: repo}
	switch name {
	case "":
		err = hook.Invalid("webhook: no header X-GitHub-Event")
	case "ping":
		e.Kind = forge.KindPing
	case "push":
		err = p.push(&e)
	case "pull_request":
		err = p.pullRequest(&e)
	case "check_run":
		err = f.checkRun(p, &e)
	case "check_suite":
		err = f.checkSuite(p, &e)
	case "installation":
		err = p.installation(&e, map[string]string{"created": "added", "deleted": "removed"}[p.Action], p.Repositories)
	case "installation_repositories":
		all := p.Added
		if p.Action == "removed" {
			all = p.Removed
		}
		err = p.installation(&e, map[string]string{"added": "added", "removed": "removed"}[p.Action], all)
	default:
		err = hook.Ignored("nothing follows from the event %.80q", name)
	}
	return e, err
}

func (p *payload) push(e *forge.Event) error {
	switch {
	case strings.HasPrefix(p.Ref, "refs/heads/"):
		e.Kind = forge.KindPush
	case strings.HasPrefix(p.Ref, "refs/tags/"):
		e.Kind = forge.KindTag
	default:
		return hook.Ignored("%.80q is neither a branch nor a tag", p.Ref)
	}
	if p.Deleted || hook.Zeros(p.After) {
		return hook.Ignored("%.80q was deleted", p.Ref)
	}
	e.Ref, e.Before, e.Commit = p.Ref, p.Before, p.After
	if c := p.HeadCommit; c != nil {
		if e.Kind == forge.KindTag {
			e.Commit = c.ID // After is the tag object of an annotated tag
		}
		e.Title, e.Message, e.Time = hook.Line(c.Message), hook.Text(c.Message, hook.MaxMessage), c.Timestamp
	}
	return nil
}

func (p *payload) pullRequest(e *forge.Event) error {
	switch p.Action {
	case "opened", "reopened", "closed":
		e.Action = p.Action
	case "synchronize":
		e.Action = "synchronized"
	default:
		return hook.Ignored("nothing follows from a pull request that was %.80q", p.Action)
	}
	if p.PullRequest == nil {
		return hook.Invalid("a pull_request event without a pull request")
	}
	return p.PullRequest.event(e)
}

// event fills what an event has of a pull request.
func (pr *pullPayload) event(e *forge.Event) error {
	head, err := pr.Head.Repo.repo()
	if err != nil {
		return err
	}
	e.Kind = forge.KindPullRequest
	e.Ref = fmt.Sprintf("refs/pull/%d/head", pr.Number)
	e.Commit, e.Title, e.Time = pr.Head.SHA, hook.Line(pr.Title), pr.UpdatedAt
	e.PullRequest = &forge.PullRequest{
		Number: pr.Number, Title: e.Title, URL: hook.WebURL(pr.HTMLURL),
		HeadRef: pr.Head.Ref, HeadCommit: pr.Head.SHA, HeadRepo: head,
		BaseRef: pr.Base.Ref, BaseCommit: pr.Base.SHA, MergeRef: fmt.Sprintf("refs/pull/%d/merge", pr.Number),
		Author: pr.User.user(), Draft: pr.Draft,
		// A repository that is gone cannot be told from one of a stranger.
		Fork: head.ID == "" || head.ID != e.Repo.ID,
	}
	return nil
}

// ours makes sure that a check is one that this App made.
func (f *Forge) ours(c *checkPayload) error {
	if c == nil {
		return hook.Invalid("an event about a check without one")
	}
	if f.app == nil || c.App.ID != f.app.ID {
		return hook.Ignored("the check is of another App, with the ID %d", c.App.ID)
	}
	return nil
}

func (f *Forge) checkRun(p *payload, e *forge.Event) error {
	switch p.Action {
	case "rerequested":
		e.Kind, e.Action = forge.KindRerun, "all"
	case "requested_action":
		identifier := ""
		if p.Requested != nil {
			identifier = p.Requested.Identifier
		}
		switch forge.Action(identifier) {
		case forge.ActionCancel:
			e.Kind = forge.KindCancel
		case forge.ActionApprove:
			e.Kind = forge.KindApprove
		default:
			return hook.Ignored("there is no button %.80q", identifier)
		}
	default:
		return hook.Ignored("nothing follows from a check run that was %.80q", p.Action)
	}
	if err := f.ours(p.CheckRun); err != nil {
		return err
	}
	version, id := splitExternalID(p.CheckRun.ExternalID)
	if version == 0 || id == "" {
		return hook.Ignored("the check run was not reported by Solstice: its external ID is %.80q", p.CheckRun.ExternalID)
	}
	e.Commit, e.ExternalID = p.CheckRun.HeadSHA, id
	return nil
}

// checkSuite is about all that was reported at a commit, so it has no ExternalID.
func (f *Forge) checkSuite(p *payload, e *forge.Event) error {
	if p.Action != "rerequested" {
		return hook.Ignored("nothing follows from a check suite that was %.80q", p.Action)
	}
	if err := f.ours(p.CheckSuite); err != nil {
		return err
	}
	e.Kind, e.Action, e.Commit = forge.KindRerun, "all", p.CheckSuite.HeadSHA
	return nil
}

func (p *payload) installation(e *forge.Event, action string, repos []repoPayload) error {
	if action == "" {
		return hook.Ignored("nothing follows from an installation that was %.80q", p.Action)
	}
	e.Kind, e.Action = forge.KindInstallation, action
	for i := range repos {
		r, err := repos[i].repo()
		if err != nil {
			return err
		}
		e.Repos = append(e.Repos, r)
	}
	return nil
}
