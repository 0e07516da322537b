package github

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha1" //nolint:gosec // GitHub sends it still
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
)

// Webhook is a delivery as GitHub sends it, with both signatures.
func Webhook(ctx context.Context, url, event string, body, secret []byte) (*http.Request, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(append([]byte(event), body...))
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("User-Agent", "GitHub-Hookshot/044aadd")
	r.Header.Set("X-GitHub-Event", event)
	r.Header.Set("X-GitHub-Delivery", fmt.Sprintf("%x-%x-%x-%x-%x", sum[:4], sum[4:6], sum[6:8], sum[8:10], sum[10:16]))
	strong, weak := hmac.New(sha256.New, secret), hmac.New(sha1.New, secret)
	strong.Write(body)
	weak.Write(body)
	r.Header.Set("X-Hub-Signature-256", "sha256="+hex.EncodeToString(strong.Sum(nil)))
	r.Header.Set("X-Hub-Signature", "sha1="+hex.EncodeToString(weak.Sum(nil)))
	return r, nil
}

// Push is the payload of a push to a ref.
func Push(base, repo, ref, before, after string, by User) map[string]any {
	return map[string]any{
		"ref": ref, "before": before, "after": after, "deleted": false, "created": false, "forced": false,
		"repository": Repository(base, repo), "sender": by, "commits": []any{},
		"head_commit": map[string]any{"id": after, "message": "a commit\n", "timestamp": "2026-01-02T03:04:05Z"},
	}
}

// PullRequest is the payload of an action of a pull request; fork is the head's
// repository, or empty.
func PullRequest(base, repo, fork, action string, number int, head, headSHA, into, intoSHA string, by User) map[string]any {
	if fork == "" {
		fork = repo
	}
	return map[string]any{
		"action": action, "number": number, "repository": Repository(base, repo), "sender": by,
		"pull_request": map[string]any{
			"number": number, "title": "a pull request", "html_url": fmt.Sprintf("%s/%s/pull/%d", base, repo, number),
			"draft": false, "user": by, "updated_at": "2026-01-02T03:04:05Z", "state": "open",
			"head": map[string]any{"ref": head, "sha": headSHA, "repo": Repository(base, fork)},
			"base": map[string]any{"ref": into, "sha": intoSHA, "repo": Repository(base, repo)},
		},
	}
}

// Button is the payload of a button beside a check run: its identifier, or
// "rerequested" for GitHub's own.
func Button(base string, run CheckRun, button string, by User) map[string]any {
	p := map[string]any{"action": "rerequested", "check_run": run, "repository": Repository(base, run.Repo), "sender": by}
	if button != "rerequested" {
		p["action"], p["requested_action"] = "requested_action", map[string]string{"identifier": button}
	}
	return p
}
