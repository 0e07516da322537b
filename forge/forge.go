// Package forge connects to the places where repositories live: GitHub,
// Forgejo, Gitea, GitLab, or a bare repository on disk.
//
// The interface is what a driver implements: webhooks in, files and source
// access at a commit, statuses out. Drivers: forge/localgit, forge/github,
// forge/forgejo, forge/gitlab, forge/remoteforge (any gRPC server).
// forge/forgetest is the conformance suite that a driver has to pass.
package forge

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"
	"unicode/utf8"
)

// Errors that callers act on; drivers wrap them, callers use errors.Is.
var (
	// ErrSignature: the webhook is not from the forge.
	ErrSignature = errors.New("forge: webhook signature does not verify")
	// ErrIgnored: a genuine webhook that needs no action; the error says why.
	ErrIgnored = errors.New("forge: event ignored")
	// ErrNotFound: no such repository, commit or file.
	ErrNotFound = errors.New("forge: not found")
	// ErrPermission: the forge refuses our credentials for this.
	ErrPermission = errors.New("forge: permission denied")
	// ErrInvalid: a malformed argument or payload, or a path that is not a
	// regular file.
	ErrInvalid = errors.New("forge: invalid argument")
	// ErrTooLarge: the file is over MaxFileBytes, the webhook over MaxWebhookBytes.
	ErrTooLarge = errors.New("forge: file is too large")
	// ErrConflict: a pull request that cannot be merged.
	ErrConflict = errors.New("forge: pull request has conflicts")
	// ErrUnavailable: the forge cannot be reached or is overloaded; retry, and not
	// before what a [RetryError] says.
	ErrUnavailable = errors.New("forge: unavailable")
)

// RetryError is an ErrUnavailable whose forge said when to come again.
type RetryError struct {
	After time.Duration
	Err   error
}

// Error implements error.
func (e *RetryError) Error() string { return e.Err.Error() }

// Unwrap gives ErrUnavailable and what was the reason.
func (e *RetryError) Unwrap() []error { return []error{ErrUnavailable, e.Err} }

// MaxFileBytes is the largest file that ReadFile gives: 1 MiB.
const MaxFileBytes = 1 << 20

// Repo names a repository on one forge.
type Repo struct {
	Owner         string `json:"owner"` // may have slashes (GitLab groups); empty for a local repository
	Name          string `json:"name"`
	ID            string `json:"id,omitempty"`  // the forge's own, where it has one
	URL           string `json:"url,omitempty"` // for people
	CloneURL      string `json:"clone_url,omitempty"`
	DefaultBranch string `json:"default_branch,omitempty"`
	Private       bool   `json:"private,omitempty"`
}

// FullName is "owner/name", or the name alone.
func (r Repo) FullName() string {
	if r.Owner == "" {
		return r.Name
	}
	return r.Owner + "/" + r.Name
}

// Validate reports whether the name is one that a forge could have given:
// components without control characters, backslash or colon, none empty, "."
// or "..", none with a leading dash. It wraps ErrInvalid.
func (r Repo) Validate() error {
	full := r.FullName()
	if strings.Contains(r.Name, "/") || len(full) > 1024 {
		return fmt.Errorf("%w: repository name %.80q", ErrInvalid, full)
	}
	for part := range strings.SplitSeq(full, "/") {
		if part == "" || part == "." || part == ".." || part[0] == '-' || !utf8.ValidString(part) ||
			strings.ContainsFunc(part, func(c rune) bool { return c < ' ' || c == 0x7f || c == '\\' || c == ':' }) {
			return fmt.Errorf("%w: repository name %.80q", ErrInvalid, full)
		}
	}
	return nil
}

// User is an account on a forge.
type User struct {
	ID    string `json:"id,omitempty"` // what trust is decided on
	Login string `json:"login,omitempty"`
}

// Kind of an event.
type Kind string

// Kinds of events.
const (
	KindPush         Kind = "push"
	KindTag          Kind = "tag"
	KindPullRequest  Kind = "pull_request" // Action: opened, synchronized, reopened, closed
	KindManual       Kind = "manual"
	KindRerun        Kind = "rerun"        // Action: all, failed; of what ExternalID says
	KindCancel       Kind = "cancel"       // of what ExternalID says
	KindApprove      Kind = "approve"      // of what ExternalID says, by Sender
	KindInstallation Kind = "installation" // Action: added, removed; Repos says which
	KindPing         Kind = "ping"
)

// Event is what happened on a forge, as data.
type Event struct {
	Kind        Kind         `json:"kind"`
	Action      string       `json:"action,omitempty"`
	Delivery    string       `json:"delivery,omitempty"` // the forge's ID of the webhook
	Repo        Repo         `json:"repo"`
	Ref         string       `json:"ref,omitempty"`    // full: refs/heads/main
	Commit      string       `json:"commit,omitempty"` // what to test; hex object name
	Before      string       `json:"before,omitempty"` // of a push: the ref's old commit
	Sender      User         `json:"sender,omitzero"`
	Title       string       `json:"title,omitempty"`   // first line of the commit message, or the pull request's title
	Message     string       `json:"message,omitempty"` // of the head commit
	PullRequest *PullRequest `json:"pull_request,omitempty"`
	// ChangedPaths is nil where they are not known.
	ChangedPaths []string `json:"changed_paths,omitempty"`
	// ExternalID is that of the status whose button was pressed.
	ExternalID string `json:"external_id,omitempty"`
	// Repos are those that an installation was given or has lost.
	Repos []Repo    `json:"repos,omitempty"`
	Time  time.Time `json:"time,omitzero"`
}

// PullRequest is the part of an event that is about one.
type PullRequest struct {
	Number     int    `json:"number"`
	Title      string `json:"title,omitempty"`
	URL        string `json:"url,omitempty"`
	HeadRef    string `json:"head_ref,omitempty"` // branch name
	HeadCommit string `json:"head_commit,omitempty"`
	HeadRepo   Repo   `json:"head_repo,omitzero"`
	BaseRef    string `json:"base_ref,omitempty"`
	BaseCommit string `json:"base_commit,omitempty"`
	MergeRef   string `json:"merge_ref,omitempty"`
	Author     User   `json:"author,omitzero"`
	Fork       bool   `json:"fork,omitempty"` // the head is in another repository
	Draft      bool   `json:"draft,omitempty"`
}

// SecretFunc gives the webhook secret for a repository ("owner/name"; empty
// when the payload names none). It is asked before anything in the payload is
// believed: also for events that are ignored.
type SecretFunc func(ctx context.Context, repo string) ([]byte, error)

// CloneOptions qualifies CloneInfo; the zero value asks for read access.
type CloneOptions struct{}

// Clone says how to read a repository's objects. Exactly one of Dir and URL is
// set. It never leaves the orchestrator: guests clone through it.
type Clone struct {
	Dir       string            // a repository on this machine
	URL       string            // https URL without credentials
	Header    map[string]string // request headers that authorise, secret
	ExpiresAt time.Time         // of the credentials; zero: they do not expire
	// Revoke, when not nil, ends the credentials early.
	Revoke func(ctx context.Context) error
}

// StatusState is what a commit status says.
type StatusState string

// States of a status. Drivers map them to what their forge knows.
const (
	StatusPending   StatusState = "pending"
	StatusRunning   StatusState = "running"
	StatusSuccess   StatusState = "success"
	StatusFailure   StatusState = "failure"
	StatusError     StatusState = "error"
	StatusCancelled StatusState = "cancelled"
	StatusSkipped   StatusState = "skipped"
)

// Terminal reports whether the state is final.
func (s StatusState) Terminal() bool { return s != StatusPending && s != StatusRunning }

// Status is one line beside a commit.
type Status struct {
	// Key identifies the status at the commit ("solstice/test (go 1.26)"); a
	// newer report for the same key replaces the older.
	Key string `json:"key"`
	// Version, from 1, orders reports for one key; drivers ignore one that is
	// not higher than the last they reported.
	Version     int64       `json:"version"`
	State       StatusState `json:"state"`
	Description string      `json:"description,omitempty"` // one line, drivers cut it to what fits
	TargetURL   string      `json:"target_url,omitempty"`
	// ExternalID comes back in Event.ExternalID where the forge has buttons.
	ExternalID string    `json:"external_id,omitempty"`
	StartedAt  time.Time `json:"started_at,omitzero"`
	FinishedAt time.Time `json:"finished_at,omitzero"`

	// What follows is shown where the forge has a place for it, and left out
	// elsewhere.
	Summary     string       `json:"summary,omitempty"` // Markdown
	Annotations []Annotation `json:"annotations,omitempty"`
	Actions     []Action     `json:"actions,omitempty"` // buttons
}

// Action is what a person may be offered beside a status.
type Action string

// Actions; each comes back as the event of its kind. A rerun is offered by
// forges by themselves.
const (
	ActionCancel  Action = "cancel"
	ActionApprove Action = "approve"
)

// Level of an annotation.
type Level string

// Levels of annotations.
const (
	LevelNotice  Level = "notice"
	LevelWarning Level = "warning"
	LevelFailure Level = "failure"
)

// Annotation is a remark at a line of a file of the commit.
type Annotation struct {
	Path    string `json:"path"`
	Line    int    `json:"line"` // from 1
	Column  int    `json:"column,omitempty"`
	Level   Level  `json:"level"`
	Message string `json:"message"`
}

// MaxStatusKeyBytes is the longest Key of a Status that every driver accepts.
const MaxStatusKeyBytes = 255

// Validate reports whether the status can be reported: a key of one line, a
// known state, a version of at least 1. It wraps ErrInvalid.
func (s Status) Validate() error {
	switch s.State {
	case StatusPending, StatusRunning, StatusSuccess, StatusFailure, StatusError, StatusCancelled, StatusSkipped:
	default:
		return fmt.Errorf("%w: status state %q", ErrInvalid, s.State)
	}
	if s.Key == "" || len(s.Key) > MaxStatusKeyBytes || !utf8.ValidString(s.Key) ||
		strings.ContainsFunc(s.Key, func(c rune) bool { return c < ' ' || c == 0x7f }) {
		return fmt.Errorf("%w: status key %.80q", ErrInvalid, s.Key)
	}
	if s.Version < 1 {
		return fmt.Errorf("%w: status version %d", ErrInvalid, s.Version)
	}
	return nil
}

// Capabilities are what a driver does more or less well.
type Capabilities struct {
	Webhooks bool // ParseWebhook works; otherwise it wraps errors.ErrUnsupported
	Statuses bool // ReportStatus reaches something; otherwise it is a no-op
	// StatusKeysFold: keys that differ in upper and lower case alone are one status.
	StatusKeysFold bool
}

// Forge is implemented by drivers; all methods are safe for concurrent use and
// honour ctx. A repository that does not exist wraps ErrNotFound, one whose name
// cannot exist ErrInvalid or ErrNotFound. A commit is a full object name in
// lower-case hex, anything else wraps ErrInvalid; a path is relative to the
// root of the tree, in its shortest form, with slashes.
type Forge interface {
	// ParseWebhook verifies the signature over the raw body, then reads the
	// event, which is valid (Event.Validate). It wraps ErrSignature, ErrIgnored or
	// ErrInvalid; ErrTooLarge where the body is over MaxWebhookBytes, which it reads
	// no further; and what SecretFunc fails with. An empty secret is an error, with
	// which nothing is accepted. The same request gives the same event again.
	ParseWebhook(ctx context.Context, r *http.Request, s SecretFunc) (Event, error)
	// Resolve gives the full object name of the commit that a branch, tag, full
	// ref name or object name names; an annotated tag gives its commit. Absent
	// wraps ErrNotFound, what cannot be a name ErrInvalid.
	Resolve(ctx context.Context, repo Repo, ref string) (commit string, err error)
	// ReadFile gives a regular file's content at a commit, byte for byte.
	// Absent (file or commit) wraps ErrNotFound, over MaxFileBytes ErrTooLarge,
	// a symbolic link, submodule or directory ErrInvalid: none is followed.
	ReadFile(ctx context.Context, repo Repo, commit, path string) ([]byte, error)
	// ListFiles gives the names, without the directory, of the regular files
	// directly in a directory ("" is the root) at a commit, sorted by bytes; an
	// absent directory gives none, an absent commit wraps ErrNotFound.
	ListFiles(ctx context.Context, repo Repo, commit, dir string) ([]string, error)
	// CloneInfo gives read access to the repository's objects.
	CloneInfo(ctx context.Context, repo Repo, o CloneOptions) (Clone, error)
	// ReportStatus makes s what stands beside the commit under its key, unless a
	// report of the same or a higher version was made before: then it does
	// nothing and gives nil. See Status.Validate.
	ReportStatus(ctx context.Context, repo Repo, commit string, s Status) error
	Capabilities() Capabilities
	Close() error
}

// ChangedPaths is implemented by drivers that can compare commits.
type ChangedPaths interface {
	// ChangedPaths lists the paths that differ between two commits, sorted by
	// bytes, at most limit; more is reported by truncated. Of a rename both
	// names are listed. A base of zeros only is the empty tree (a new branch).
	ChangedPaths(ctx context.Context, repo Repo, base, head string, limit int) (paths []string, truncated bool, err error)
}

// Permissions is implemented by drivers that know who may do what.
type Permissions interface {
	// MayApprove reports whether the user (by User.ID) may let strangers' code run.
	MayApprove(ctx context.Context, repo Repo, u User) (bool, error)
}

// Merger is implemented by drivers whose forge merges pull requests for tests.
type Merger interface {
	// MergeCommit gives the commit that the head of a pull request, as it is in pr,
	// merged into its base would be. ErrConflict: it can't be merged.
	// ErrUnavailable: not known yet; try again.
	MergeCommit(ctx context.Context, repo Repo, pr PullRequest) (commit string, err error)
}

// Commenter is implemented by drivers that can write to a pull request.
type Commenter interface {
	// Comment writes text (Markdown), or replaces what was written under the same
	// key (one line of ASCII letters, digits and -).
	Comment(ctx context.Context, repo Repo, pullRequest int, key, text string) error
}

// HeadLister is implemented by drivers that can list heads, so that missed
// webhooks are found.
type HeadLister interface {
	// Heads gives the commit of every branch and tag by full ref name.
	Heads(ctx context.Context, repo Repo) (map[string]string, error)
}

// PullRequestLister is implemented by drivers that can list pull requests, for the
// same reason.
type PullRequestLister interface {
	// PullRequests gives the open ones as a webhook would, those that changed last
	// first, at most limit.
	PullRequests(ctx context.Context, repo Repo, limit int) ([]PullRequest, error)
}

// CheckOptions say what a Checker looks at.
type CheckOptions struct {
	// Repos whose access and webhooks are looked at; their names do.
	Repos []Repo
	// WebhookURL is where webhooks should go; empty: they are not looked for.
	WebhookURL string
}

// Finding is what a Checker has to say about one thing.
type Finding struct {
	Level  Level  // LevelNotice: it is as it should be
	What   string // a sentence without a full stop
	Advice string // what to do about it; empty where nothing is to be done
}

// Checker is implemented by drivers that can say whether their forge is set up.
type Checker interface {
	// Check looks at credentials, permissions and webhooks, and changes nothing. What
	// is wrong is a Finding, also that the forge cannot be reached; the error is
	// ctx's.
	Check(ctx context.Context, o CheckOptions) ([]Finding, error)
}

// StatusForgetter is implemented by drivers that keep statuses themselves.
type StatusForgetter interface {
	// ForgetStatuses removes what stands beside a commit; nothing there is no
	// error, nor is a repository that is gone.
	ForgetStatuses(ctx context.Context, repo Repo, commit string) error
}

// As returns f as the optional interface T. A wrapper answers for what it
// wraps through a method As(target any) bool, which gets a *T to fill in.
func As[T any](f Forge) (T, bool) {
	if w, ok := f.(interface{ As(target any) bool }); ok {
		var t T
		return t, w.As(&t)
	}
	t, ok := f.(T)
	return t, ok
}
