package gitlab

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/internal/hook"
)

// signingPrefix is what a signing token begins with; another secret is one that
// comes back as it is.
const signingPrefix = "whsec_"

// payload has what is needed of all events
// (https://docs.gitlab.com/user/project/integrations/webhook_events/).
type payload struct {
	Kind        string        `json:"object_kind"`
	Ref         string        `json:"ref"`
	Before      string        `json:"before"`
	After       string        `json:"after"`
	CheckoutSHA string        `json:"checkout_sha"`
	UserID      int64         `json:"user_id"`
	Username    string        `json:"user_username"`
	Commits     []commit      `json:"commits"`
	Project     hookedProject `json:"project"`
	User        user          `json:"user"`
	Attributes  *mergeRequest `json:"object_attributes"`
}

type commit struct {
	ID      string `json:"id"`
	Message string `json:"message"`
}

type hookedProject struct {
	ID            int64  `json:"id"`
	Path          string `json:"path_with_namespace"`
	WebURL        string `json:"web_url"`
	HTTPURL       string `json:"git_http_url"`
	DefaultBranch string `json:"default_branch"`
	Visibility    int    `json:"visibility_level"` // 0: private, 10: internal, 20: public
}

type mergeRequest struct {
	IID             int            `json:"iid"`
	Action          string         `json:"action"`
	OldRev          string         `json:"oldrev"`
	Title           string         `json:"title"`
	URL             string         `json:"url"`
	AuthorID        int64          `json:"author_id"`
	SourceBranch    string         `json:"source_branch"`
	TargetBranch    string         `json:"target_branch"`
	SourceProjectID int64          `json:"source_project_id"`
	TargetProjectID int64          `json:"target_project_id"`
	Source          *hookedProject `json:"source"` // null where it is gone
	LastCommit      commit         `json:"last_commit"`
	Draft           bool           `json:"draft"`
	WorkInProgress  bool           `json:"work_in_progress"` // before GitLab 14
}

// ParseWebhook implements forge.Forge. Pushes of branches and tags, and merge
// requests become events. The secret is the webhook's signing token where it
// begins with "whsec_", and its secret token otherwise.
func (f *Forge) ParseWebhook(ctx context.Context, r *http.Request, secretOf forge.SecretFunc) (forge.Event, error) {
	if err := ctx.Err(); err != nil {
		return forge.Event{}, err
	}
	body, err := hook.Body(r)
	if err != nil {
		return forge.Event{}, err
	}
	// Decoded before it is verified, and believed after: until then the path is
	// but the question for the secret.
	var p payload
	decodeErr := json.Unmarshal(body, &p)
	repo, repoErr := hook.Repo(p.Project.Path)
	name := ""
	if decodeErr == nil && repoErr == nil {
		name = repo.FullName()
	}
	secret, err := hook.Secret(secretOf(ctx, name))
	if err != nil {
		return forge.Event{}, err
	}
	if err := f.verify(r.Header, body, secret, time.Now()); err != nil {
		return forge.Event{}, err
	}
	if decodeErr != nil {
		return forge.Event{}, hook.Invalid("gitlab: %.40q: %v", r.Header.Get("X-Gitlab-Event"), decodeErr)
	}
	e := forge.Event{Delivery: delivery(r.Header, body)}
	// The body says what it is; the header X-Gitlab-Event is not signed.
	switch p.Kind {
	case "push", "tag_push":
		err = push(&e, p)
	case "merge_request":
		err = merge(&e, p)
	case "":
		err = hook.Invalid("gitlab: a webhook without object_kind")
	default:
		err = hook.Ignored("event %.40q", p.Kind)
	}
	if err != nil {
		return forge.Event{}, err
	}
	if repoErr != nil {
		return forge.Event{}, fmt.Errorf("gitlab: event %s: %w", p.Kind, repoErr)
	}
	e.Repo = p.Project.repo()
	if err := e.Validate(); err != nil {
		return forge.Event{}, fmt.Errorf("gitlab: event %s: %w", p.Kind, err)
	}
	return e, nil
}

func (f *Forge) verify(h http.Header, body, secret []byte, now time.Time) error {
	if encoded, ok := strings.CutPrefix(string(secret), signingPrefix); ok {
		key, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil || len(key) == 0 {
			return fmt.Errorf("the webhook's signing token is %s and then no base64: copy it once more from the forge", signingPrefix)
		}
		return verifySigned(h, body, key, now, f.maxAge)
	}
	got := h.Values("X-Gitlab-Token")
	if len(got) != 1 || got[0] == "" {
		return fmt.Errorf("%w: it has no X-Gitlab-Token: set a secret token at the forge", forge.ErrSignature)
	}
	// Of hashes, which are of one length.
	a, b := sha256.Sum256([]byte(got[0])), sha256.Sum256(secret)
	if subtle.ConstantTimeCompare(a[:], b[:]) != 1 {
		return fmt.Errorf("%w: X-Gitlab-Token (is the secret the one configured at the forge?)", forge.ErrSignature)
	}
	return nil
}

// verifySigned checks a webhook by the specification of Standard Webhooks
// (https://www.standardwebhooks.com), which GitLab follows.
func verifySigned(h http.Header, body, key []byte, now time.Time, maxAge time.Duration) error {
	id, stamp := h.Get("Webhook-Id"), h.Get("Webhook-Timestamp")
	seconds, err := strconv.ParseInt(stamp, 10, 64)
	if err != nil || id == "" {
		return fmt.Errorf("%w: it is not signed: make a signing token at the forge", forge.ErrSignature)
	}
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s.%s.", id, stamp)
	mac.Write(body)
	want := []byte("v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil)))
	ok := 0
	for got := range strings.SplitSeq(h.Get("Webhook-Signature"), " ") { // more than one while keys change
		ok |= subtle.ConstantTimeCompare([]byte(got), want)
	}
	if ok != 1 {
		return fmt.Errorf("%w: webhook-signature (is the signing token the one of the forge?)", forge.ErrSignature)
	}
	if age := now.Sub(time.Unix(seconds, 0)); age.Abs() > maxAge {
		return fmt.Errorf("%w: it was signed at %s, which is %s from now (a replay, or a clock that is wrong)",
			forge.ErrSignature, time.Unix(seconds, 0).UTC().Format(time.RFC3339), age.Abs().Round(time.Second))
	}
	return nil
}

// delivery identifies one. X-Gitlab-Event-UUID is that of what caused it, and so
// the same for all branches of a push: the body makes the difference.
func delivery(h http.Header, body []byte) string {
	for _, name := range []string{"Webhook-Id", "Idempotency-Key"} {
		if id := hook.Delivery(h.Get(name)); id != "" {
			return id
		}
	}
	id := hook.Delivery(h.Get("X-Gitlab-Event-UUID"))
	if id == "" {
		return ""
	}
	sum := sha256.Sum256(body)
	return id + "-" + hex.EncodeToString(sum[:8])
}

func (p hookedProject) repo() forge.Repo {
	r, err := hook.Repo(p.Path)
	if err != nil {
		return forge.Repo{}
	}
	r.ID, r.URL, r.DefaultBranch = hook.ID(p.ID), hook.WebURL(p.WebURL), hook.Line(p.DefaultBranch)
	r.CloneURL = hook.WebURL(p.HTTPURL) // to be shown; CloneInfo says where to clone
	r.Private = p.Visibility < 20
	return r
}

func push(e *forge.Event, p payload) error {
	e.Kind, e.Ref, e.Before, e.Commit = forge.KindPush, p.Ref, p.Before, p.After
	e.Sender = forge.User{ID: hook.ID(p.UserID), Login: hook.Line(p.Username)}
	if hook.Zeros(p.After) {
		return hook.Ignored("%.80s was deleted", p.Ref)
	}
	if p.Kind == "tag_push" {
		e.Kind = forge.KindTag
		if p.CheckoutSHA != "" { // "after" is the tag's object where it has one
			e.Commit = p.CheckoutSHA
		}
	}
	for _, c := range p.Commits {
		if c.ID == e.Commit {
			e.Title, e.Message = hook.Line(c.Message), hook.Text(c.Message, hook.MaxMessage)
		}
	}
	return nil
}

func merge(e *forge.Event, p payload) error {
	m := p.Attributes
	if m == nil {
		return hook.Invalid("gitlab: a merge_request event without object_attributes")
	}
	switch {
	case m.Action == "open":
		e.Action = "opened"
	case m.Action == "reopen":
		e.Action = "reopened"
	case m.Action == "close" || m.Action == "merge":
		e.Action = "closed"
	case m.Action == "update" && m.OldRev != "":
		e.Action = "synchronized"
	case m.Action == "update":
		return hook.Ignored("an update of a merge request without new commits")
	default:
		return hook.Ignored("action %.40q of a merge request", m.Action)
	}
	e.Kind, e.Title, e.Message = forge.KindPullRequest, hook.Line(m.Title), hook.Text(m.LastCommit.Message, hook.MaxMessage)
	e.Sender = forge.User{ID: hook.ID(p.User.ID), Login: hook.Line(p.User.Username)}
	e.Ref, e.Commit = fmt.Sprintf("refs/merge-requests/%d/head", m.IID), m.LastCommit.ID
	pr := &forge.PullRequest{
		Number: m.IID, Title: e.Title, URL: hook.WebURL(m.URL), HeadRef: m.SourceBranch, HeadCommit: e.Commit, BaseRef: m.TargetBranch,
		MergeRef: fmt.Sprintf("refs/merge-requests/%d/merge", m.IID), Author: forge.User{ID: hook.ID(m.AuthorID)},
		Fork: m.Source == nil || m.SourceProjectID == 0 || m.SourceProjectID != m.TargetProjectID, Draft: m.Draft || m.WorkInProgress,
	}
	if m.AuthorID == p.User.ID {
		pr.Author.Login = e.Sender.Login
	}
	if m.Source != nil {
		pr.HeadRepo = m.Source.repo()
		pr.HeadRepo.ID = hook.ID(m.SourceProjectID) // which is not in the project here
	}
	e.PullRequest = pr
	return nil
}
