package forgejo

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
)

// Request is a delivery as Forgejo makes it (services/webhook/deliver.go,
// https://forgejo.org/docs/latest/user/webhooks/); Gitea's has no header with
// Forgejo in its name.
func Request(ctx context.Context, url, event, delivery string, body, secret []byte) (*http.Request, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	mac := hmac.New(sha256.New, secret)
	mac.Write(body)
	signature := hex.EncodeToString(mac.Sum(nil))
	r.Header.Set("Content-Type", "application/json")
	for _, forge := range []string{"Forgejo", "Gitea", "Gogs"} {
		r.Header.Set("X-"+forge+"-Delivery", delivery)
		r.Header.Set("X-"+forge+"-Event", event)
		r.Header.Set("X-"+forge+"-Event-Type", event)
		r.Header.Set("X-"+forge+"-Signature", signature)
	}
	r.Header.Set("X-Hub-Signature-256", "sha256="+signature)
	r.Header.Set("X-GitHub-Delivery", delivery)
	r.Header.Set("X-GitHub-Event", event)
	return r, nil
}
