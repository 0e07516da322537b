// Package hook has what drivers share in reading webhooks.
package hook

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/solstice-ci/solstice-go/forge"
)

// Body reads a POST's JSON. It wraps forge.ErrTooLarge, forge.ErrInvalid or
// what reading ended with.
func Body(r *http.Request) ([]byte, error) {
	if r.Method != http.MethodPost {
		return nil, fmt.Errorf("%w: a webhook is a POST, not a %.20q: set its method to POST", forge.ErrInvalid, r.Method)
	}
	// A form's signature is not over the body, and it brings nothing.
	if t, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";"); !strings.EqualFold(strings.TrimSpace(t), "application/json") {
		return nil, fmt.Errorf("%w: a webhook of content type %.80q: set it to application/json", forge.ErrInvalid, t)
	}
	if r.ContentLength > forge.MaxWebhookBytes {
		return nil, fmt.Errorf("%w: webhook of %d bytes", forge.ErrTooLarge, r.ContentLength)
	}
	var b bytes.Buffer // which doubles; io.ReadAll copies a large body many times
	_, err := b.ReadFrom(io.LimitReader(r.Body, forge.MaxWebhookBytes+1))
	body := b.Bytes()
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge) || len(body) > forge.MaxWebhookBytes:
		return nil, fmt.Errorf("%w: webhook of more than %d bytes", forge.ErrTooLarge, forge.MaxWebhookBytes)
	case err != nil:
		return nil, fmt.Errorf("read webhook: %w", err)
	}
	return body, nil
}

// Ignored is forge.ErrIgnored with a reason.
func Ignored(format string, args ...any) error {
	return fmt.Errorf("%w: %s", forge.ErrIgnored, fmt.Sprintf(format, args...))
}

// Invalid is forge.ErrInvalid with a reason.
func Invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %s", forge.ErrInvalid, fmt.Sprintf(format, args...))
}

// Secret makes sure that there is one to check against.
func Secret(secret []byte, err error) ([]byte, error) {
	if err != nil {
		return nil, fmt.Errorf("webhook secret: %w", err)
	}
	if len(secret) == 0 {
		return nil, errors.New("the webhook secret is empty: configure one here and the same at the forge")
	}
	return secret, nil
}

// Repo splits a full name at its last slash, and validates it.
func Repo(full string) (forge.Repo, error) {
	i := strings.LastIndexByte(full, '/')
	if i < 1 {
		return forge.Repo{}, Invalid("repository name %.80q", full)
	}
	r := forge.Repo{Owner: full[:i], Name: full[i+1:]}
	return r, r.Validate()
}

// Delivery is a header that identifies a delivery, or "" where it is none that
// can be kept.
func Delivery(id string) string {
	if len(id) > 200 || strings.ContainsFunc(id, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return ""
	}
	return id
}

// ID is a numeric ID as text; 0 is none.
func ID(id int64) string {
	if id == 0 {
		return ""
	}
	return strconv.FormatInt(id, 10)
}

// Line is the first line of a text from outside, at most 1,000 bytes long.
func Line(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	return Text(strings.TrimSpace(s), 1000)
}

// Text is valid UTF-8 of at most n bytes.
func Text(s string, n int) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	for len(s) > n {
		s = s[:n]
		for !utf8.ValidString(s) {
			s = s[:len(s)-1]
		}
	}
	return s
}

// WebURL lets only http and https pass: links in pages and statuses lead there.
func WebURL(s string) string {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil || len(s) > 2000 {
		return ""
	}
	return s
}

// Zeros reports whether an object name stands for none.
func Zeros(name string) bool { return name != "" && strings.Trim(name, "0") == "" }

// MaxMessage bounds what is kept of a commit message, in bytes.
const MaxMessage = 64 << 10

// Marker is the comment in Markdown by which a driver finds what it wrote under
// a key. A key that is none wraps forge.ErrInvalid.
func Marker(key string) (string, error) {
	if key == "" || len(key) > 200 || strings.ContainsFunc(key, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-'
	}) {
		return "", Invalid("comment key %.80q", key)
	}
	return "<!-- solstice: " + key + " -->", nil
}
