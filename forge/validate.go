package forge

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"unicode/utf8"
)

// MaxWebhookBytes is the largest body of a webhook that ParseWebhook reads: 25 MiB,
// which is GitHub's own bound.
const MaxWebhookBytes = 25 << 20

// ReadWebhook reads the body of a webhook up to MaxWebhookBytes, for drivers; more
// wraps ErrTooLarge, and is not read where the request says how much it is.
func ReadWebhook(r *http.Request) ([]byte, error) {
	if r.ContentLength > MaxWebhookBytes {
		return nil, fmt.Errorf("%w: a webhook of %d bytes", ErrTooLarge, r.ContentLength)
	}
	if r.Body == nil {
		return nil, nil
	}
	var b bytes.Buffer // which grows by doubling
	switch n, err := io.Copy(&b, io.LimitReader(r.Body, MaxWebhookBytes+1)); {
	case err != nil:
		return nil, fmt.Errorf("read webhook: %w", err)
	case n > MaxWebhookBytes:
		return nil, fmt.Errorf("%w: a webhook of more than %d bytes", ErrTooLarge, MaxWebhookBytes)
	}
	return b.Bytes(), nil
}

// actions that events of a kind have; kinds without a list have none.
var actions = map[Kind][]string{
	KindPullRequest:  {"opened", "synchronized", "reopened", "closed"},
	KindRerun:        {"all", "failed"},
	KindInstallation: {"added", "removed"},
}

// Validate reports whether the event is one that a driver may give: what its kind
// needs is there, and names, refs and commits are what git and forges could have
// made. Drivers call it last, since all of it comes from outside. It wraps
// ErrInvalid.
func (e Event) Validate() error {
	if e.Repo.FullName() != "" || e.Kind != KindPing && e.Kind != KindInstallation {
		if err := e.Repo.Validate(); err != nil {
			return err
		}
	}
	for _, r := range e.Repos {
		if err := r.Validate(); err != nil {
			return err
		}
	}
	if a := actions[e.Kind]; e.Action != "" && a == nil || a != nil && !slices.Contains(a, e.Action) {
		return fmt.Errorf("%w: action %.80q of a %s event", ErrInvalid, e.Action, e.Kind)
	}
	for what, text := range map[string]string{"delivery": e.Delivery, "sender": e.Sender.ID, "external ID": e.ExternalID} {
		if len(text) > 1024 || !oneLine(text) {
			return fmt.Errorf("%w: %s %.80q", ErrInvalid, what, text)
		}
	}
	prefix, needsRef, needsCommit := "refs/", false, false
	switch e.Kind {
	case KindPush:
		prefix, needsRef, needsCommit = "refs/heads/", true, true
	case KindTag:
		prefix, needsRef, needsCommit = "refs/tags/", true, true
	case KindPullRequest:
		needsRef, needsCommit = true, true
		if e.PullRequest == nil {
			return fmt.Errorf("%w: a pull_request event without a pull request", ErrInvalid)
		}
	case KindManual:
		needsCommit = true
	case KindRerun, KindCancel, KindApprove:
		needsCommit = e.ExternalID == ""
	case KindInstallation, KindPing:
	default:
		return fmt.Errorf("%w: kind of event %.80q", ErrInvalid, e.Kind)
	}
	if (needsRef || e.Ref != "") && (!strings.HasPrefix(e.Ref, prefix) || !IsRef(e.Ref)) {
		return fmt.Errorf("%w: ref %.80q", ErrInvalid, e.Ref)
	}
	if (needsCommit || e.Commit != "") && !IsCommit(e.Commit) {
		return fmt.Errorf("%w: commit %.80q", ErrInvalid, e.Commit)
	}
	if e.Before != "" && !IsCommit(e.Before) {
		return fmt.Errorf("%w: commit %.80q", ErrInvalid, e.Before)
	}
	if e.PullRequest != nil {
		return e.PullRequest.Validate()
	}
	return nil
}

// Validate reports whether the pull request is one that a driver may give, as
// [Event.Validate] does. It wraps ErrInvalid.
func (p PullRequest) Validate() error {
	if p.Number < 1 {
		return fmt.Errorf("%w: pull request %d", ErrInvalid, p.Number)
	}
	for _, c := range []string{p.HeadCommit, p.BaseCommit} {
		if c != "" && !IsCommit(c) {
			return fmt.Errorf("%w: commit %.80q of pull request %d", ErrInvalid, c, p.Number)
		}
	}
	for _, branch := range []string{p.HeadRef, p.BaseRef} {
		if branch != "" && !IsRef("refs/heads/"+branch) {
			return fmt.Errorf("%w: branch %.80q of pull request %d", ErrInvalid, branch, p.Number)
		}
	}
	if p.MergeRef != "" && !IsRef(p.MergeRef) {
		return fmt.Errorf("%w: ref %.80q of pull request %d", ErrInvalid, p.MergeRef, p.Number)
	}
	if !oneLine(p.Author.ID) {
		return fmt.Errorf("%w: author %.80q of pull request %d", ErrInvalid, p.Author.ID, p.Number)
	}
	if p.HeadRepo.FullName() == "" { // it is gone
		return nil
	}
	return p.HeadRepo.Validate()
}

// IsCommit reports whether s is a full object name, of SHA-1 or SHA-256, in lower-case hex.
func IsCommit(s string) bool {
	return (len(s) == 40 || len(s) == 64) && strings.Trim(s, "0123456789abcdef") == ""
}

// IsRef reports whether s is a full ref name by the rules of git-check-ref-format(1).
func IsRef(s string) bool {
	if !strings.HasPrefix(s, "refs/") || len(s) > 1024 || !oneLine(s) || strings.ContainsAny(s, " ~^:?*[\\") ||
		strings.Contains(s, "..") || strings.Contains(s, "@{") || strings.HasSuffix(s, ".") {
		return false
	}
	for part := range strings.SplitSeq(s, "/") {
		if part == "" || part[0] == '.' || strings.HasSuffix(part, ".lock") {
			return false
		}
	}
	return true
}

func oneLine(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c == 0x7f })
}
