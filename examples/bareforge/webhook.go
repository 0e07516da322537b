package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
)

// signatureHeader is sha256= and the HMAC-SHA256 of the body in hex. Everything else
// is in the body, so that all of it is signed.
const signatureHeader = "X-Bareforge-Signature"

// webhook is the body.
type webhook struct {
	Event    string    `json:"event"` // update of a ref, or ping
	Delivery string    `json:"delivery"`
	Repo     string    `json:"repo"` // owner/name
	Ref      string    `json:"ref,omitempty"`
	Before   string    `json:"before,omitempty"` // zeros: it is new
	After    string    `json:"after,omitempty"`  // zeros: it is deleted
	Commit   string    `json:"commit,omitempty"` // that After is, or tags; empty: none
	Message  string    `json:"message,omitempty"`
	UserID   string    `json:"user_id,omitempty"`
	User     string    `json:"user,omitempty"`
	Time     time.Time `json:"time"`
}

func sign(body, secret []byte) string {
	mac := hmac.New(sha256.New, secret)
	mac.Write(body)
	return "sha256=" + hex.EncodeToString(mac.Sum(nil))
}

// ParseWebhook implements forge.Forge.
func (f *Forge) ParseWebhook(ctx context.Context, r *http.Request, secrets forge.SecretFunc) (forge.Event, error) {
	if err := ctx.Err(); err != nil {
		return forge.Event{}, err
	}
	body, err := forge.ReadWebhook(r)
	if err != nil {
		return forge.Event{}, err
	}
	var w webhook
	if err := json.Unmarshal(body, &w); err != nil { // there is nothing to verify
		return forge.Event{}, fmt.Errorf("%w: webhook: %w", forge.ErrInvalid, err)
	}
	secret, err := secrets(ctx, w.Repo)
	if err != nil {
		return forge.Event{}, fmt.Errorf("secret of webhooks: %w", err)
	}
	if len(secret) == 0 { // with which anybody could sign
		return forge.Event{}, fmt.Errorf("the secret of the webhooks of %.80q is empty", w.Repo)
	}
	if !hmac.Equal([]byte(r.Header.Get(signatureHeader)), []byte(sign(body, secret))) {
		return forge.Event{}, fmt.Errorf("%w: of %.80q", forge.ErrSignature, w.Repo)
	}
	e, err := w.event()
	if err != nil {
		return forge.Event{}, err
	}
	return e, e.Validate()
}

// event is what a webhook means, once it is known to be genuine.
func (w webhook) event() (forge.Event, error) {
	e := forge.Event{
		Kind: forge.KindPing, Delivery: w.Delivery, Repo: repoOf(w.Repo),
		Sender: forge.User{ID: w.UserID, Login: w.User}, Time: w.Time,
	}
	if w.Event == "ping" {
		return e, nil
	}
	if w.Event != "update" {
		return forge.Event{}, fmt.Errorf("%w: event %.80q", forge.ErrIgnored, w.Event)
	}
	switch {
	case strings.HasPrefix(w.Ref, "refs/heads/"):
		e.Kind = forge.KindPush
	case strings.HasPrefix(w.Ref, "refs/tags/"):
		e.Kind = forge.KindTag
	default:
		return forge.Event{}, fmt.Errorf("%w: %.80q is neither branch nor tag", forge.ErrIgnored, w.Ref)
	}
	switch {
	case w.After != "" && strings.Trim(w.After, "0") == "":
		return forge.Event{}, fmt.Errorf("%w: %.80q was deleted", forge.ErrIgnored, w.Ref)
	case w.Commit == "" && e.Kind == forge.KindTag:
		return forge.Event{}, fmt.Errorf("%w: %.80q tags no commit", forge.ErrIgnored, w.Ref)
	}
	e.Ref, e.Before, e.Commit, e.Message = w.Ref, w.Before, w.Commit, w.Message
	e.Title, _, _ = strings.Cut(w.Message, "\n")
	return e, nil
}

// Secret is a forge.SecretFunc: the file bareforge/secret of each repository. For one
// that is not there nobody can have signed.
func (f *Forge) Secret(ctx context.Context, name string) ([]byte, error) {
	repo, err := f.open(ctx, repoOf(name))
	if errors.Is(err, forge.ErrNotFound) || errors.Is(err, forge.ErrInvalid) {
		return nil, fmt.Errorf("%w: %w", forge.ErrSignature, err)
	}
	if err != nil {
		return nil, err
	}
	secret, err := os.ReadFile(repo.own("secret"))
	return bytes.TrimSpace(secret), err
}
