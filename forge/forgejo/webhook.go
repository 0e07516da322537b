package forgejo

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/internal/hook"
)

// Headers with a signature, and what stands before the hex digits; the forge
// sends all that it knows (services/webhook/deliver.go of Gitea).
var signatures = []struct{ header, prefix string }{
	{"X-Forgejo-Signature", ""}, {"X-Gitea-Signature", ""}, {"X-Hub-Signature-256", "sha256="},
}

// first gives the header of Forgejo, or that of Gitea.
func first(h http.Header, name string) string {
	if v := h.Get("X-Forgejo-" + name); v != "" {
		return v
	}
	return h.Get("X-Gitea-" + name)
}

// payload has what is needed of all events (modules/structs/hook.go of Gitea).
type payload struct {
	Action      string       `json:"action"`
	Ref         string       `json:"ref"`
	Before      string       `json:"before"`
	After       string       `json:"after"`
	HeadCommit  *commit      `json:"head_commit"`
	Commits     []commit     `json:"commits"`
	Number      int          `json:"number"`
	PullRequest *pullRequest `json:"pull_request"`
	Repository  repository   `json:"repository"`
	Pusher      user         `json:"pusher"`
	Sender      user         `json:"sender"`
}

type commit struct {
	ID      string `json:"id"`
	Message string `json:"message"`
}

type pullRequest struct {
	Number  int    `json:"number"`
	Title   string `json:"title"`
	HTMLURL string `json:"html_url"`
	Draft   bool   `json:"draft"`
	User    user   `json:"user"`
	Base    side   `json:"base"`
	Head    side   `json:"head"`
}

type side struct {
	Ref  string      `json:"ref"`
	SHA  string      `json:"sha"`
	Repo *repository `json:"repo"` // null where it is gone
}

// ParseWebhook implements forge.Forge. Pushes of branches and tags, and pull
// requests become events. A tag that is made is announced twice: the event
// create is ignored, and push taken.
func (f *Forge) ParseWebhook(ctx context.Context, r *http.Request, secretOf forge.SecretFunc) (forge.Event, error) {
	if err := ctx.Err(); err != nil {
		return forge.Event{}, err
	}
	body, err := hook.Body(r)
	if err != nil {
		return forge.Event{}, err
	}
	// Decoded before it is verified, and believed after: until then the name is
	// but the question for the secret.
	var p payload
	decodeErr := unmarshal(body, &p)
	repo, repoErr := hook.Repo(p.Repository.FullName)
	name := ""
	if decodeErr == nil && repoErr == nil {
		name = repo.FullName()
	}
	secret, err := hook.Secret(secretOf(ctx, name))
	if err != nil {
		return forge.Event{}, err
	}
	if err := verify(r.Header, body, secret); err != nil {
		return forge.Event{}, err
	}
	event := first(r.Header, "Event")
	switch {
	case decodeErr != nil:
		return forge.Event{}, hook.Invalid("forgejo: event %.40q: %v", event, decodeErr)
	case event == "":
		return forge.Event{}, hook.Invalid("forgejo: a webhook without X-Forgejo-Event or X-Gitea-Event: make one of type Forgejo or Gitea")
	}
	e := forge.Event{Delivery: hook.Delivery(first(r.Header, "Delivery")), Sender: p.Sender.user()}
	switch event {
	case "push":
		err = push(&e, p)
	case "pull_request", "pull_request_sync":
		err = pull(&e, p)
	case "create":
		err = hook.Ignored("a create event: its push event says the same")
	default:
		err = hook.Ignored("event %.40q", event)
	}
	if err != nil {
		return forge.Event{}, err
	}
	if repoErr != nil {
		return forge.Event{}, fmt.Errorf("forgejo: event %s: %w", event, repoErr)
	}
	e.Repo = p.Repository.repo()
	if err := e.Validate(); err != nil {
		return forge.Event{}, fmt.Errorf("forgejo: event %s: %w", event, err)
	}
	return e, nil
}

// verify wants at least one signature, and each that is there to be right.
func verify(h http.Header, body, secret []byte) error {
	mac := hmac.New(sha256.New, secret)
	mac.Write(body)
	want := mac.Sum(nil)
	found := 0
	for _, s := range signatures {
		for _, v := range h.Values(s.header) {
			digits, ok := strings.CutPrefix(v, s.prefix)
			got, err := hex.DecodeString(digits)
			if !ok || err != nil || !hmac.Equal(got, want) {
				return fmt.Errorf("%w: %s (is the secret the one configured at the forge?)", forge.ErrSignature, s.header)
			}
			found++
		}
	}
	if found == 0 {
		return fmt.Errorf("%w: it has none: set a secret at the forge", forge.ErrSignature)
	}
	return nil
}

func (u user) user() forge.User { return forge.User{ID: hook.ID(u.ID), Login: hook.Line(u.Login)} }

func (r repository) repo() forge.Repo {
	repo, err := hook.Repo(r.FullName)
	if err != nil {
		return forge.Repo{}
	}
	repo.ID, repo.URL, repo.DefaultBranch, repo.Private = hook.ID(r.ID), hook.WebURL(r.HTMLURL), hook.Line(r.DefaultBranch), r.Private
	repo.CloneURL = hook.WebURL(r.CloneURL) // to be shown; CloneInfo says where to clone
	return repo
}

func push(e *forge.Event, p payload) error {
	e.Kind, e.Ref, e.Before, e.Commit = forge.KindPush, p.Ref, p.Before, p.After
	if e.Sender.ID == "" {
		e.Sender = p.Pusher.user()
	}
	if hook.Zeros(p.After) {
		return hook.Ignored("%.80s was deleted", p.Ref)
	}
	switch {
	case strings.HasPrefix(p.Ref, "refs/heads/"):
	case strings.HasPrefix(p.Ref, "refs/tags/"):
		e.Kind = forge.KindTag
		if p.HeadCommit != nil { // "after" is the tag's object where it has one
			e.Commit = p.HeadCommit.ID
		}
	default:
		return hook.Ignored("a push to %.80q, which is neither a branch nor a tag", p.Ref)
	}
	if p.HeadCommit != nil { // old versions have it in the list alone
		p.Commits = append(p.Commits, *p.HeadCommit)
	}
	for _, c := range p.Commits {
		if c.ID == e.Commit {
			e.Title, e.Message = hook.Line(c.Message), hook.Text(c.Message, hook.MaxMessage)
		}
	}
	return nil
}

func pull(e *forge.Event, p payload) error {
	switch p.Action {
	case "opened", "reopened", "closed", "synchronized":
		e.Action = p.Action
	case "synchronize":
		e.Action = "synchronized"
	default:
		return hook.Ignored("action %.40q of a pull request", p.Action)
	}
	if p.PullRequest == nil {
		return hook.Invalid("forgejo: a pull_request event without pull_request")
	}
	pr := p.PullRequest
	e.Kind, e.Title = forge.KindPullRequest, hook.Line(pr.Title)
	e.Ref, e.Commit = fmt.Sprintf("refs/pull/%d/head", p.Number), pr.Head.SHA
	e.PullRequest = &forge.PullRequest{
		Number: p.Number, Title: e.Title, URL: hook.WebURL(pr.HTMLURL), HeadRef: pr.Head.Ref, HeadCommit: pr.Head.SHA,
		BaseRef: pr.Base.Ref, BaseCommit: pr.Base.SHA, Author: pr.User.user(), Draft: pr.Draft, Fork: true,
	}
	if head := pr.Head.Repo; head != nil {
		e.PullRequest.HeadRepo = head.repo()
		// One made by pushing to refs/for/… (AGit) names the base as its head's
		// repository, though who made it may not write there; its head is no branch.
		e.PullRequest.Fork = head.ID == 0 || head.ID != p.Repository.ID || strings.HasPrefix(pr.Head.Ref, "refs/")
	}
	return nil
}
