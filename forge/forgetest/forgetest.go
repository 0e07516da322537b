// Package forgetest is the conformance suite for drivers of package forge. A
// driver's test calls Run with a Harness:
//
//	func TestConformance(t *testing.T) {
//		forgetest.Run(t, forgetest.Harness{New: func(tb forgetest.TB) forgetest.Fixture { … }})
//	}
//
// The suite asks for what the driver's Capabilities declare and for the
// optional interfaces that forge.As finds.
package forgetest

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"testing"

	"github.com/solstice-ci/solstice-go/forge"
)

// TB is the part of testing.TB that checks use. Fatalf must not return.
type TB interface {
	Helper()
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Cleanup(func())
	TempDir() string
	Context() context.Context
}

// Mode of a file in a tree.
type Mode string

// Modes, as git writes them.
const (
	Regular    Mode = "100644"
	Executable Mode = "100755"
	Symlink    Mode = "120000" // Content is the target
)

// File is one file of a tree.
type File struct {
	Mode    Mode // empty: Regular
	Content string
}

// Harness makes the forges under test.
type Harness struct {
	// New makes a forge and what the suite needs to fill it. The suite closes
	// the forge; whatever else is to be released goes to tb.Cleanup.
	New func(tb TB) Fixture
}

// Fixture is a forge and the back door to its content.
type Fixture struct {
	Forge forge.Forge
	// Repo makes an empty repository whose default branch is "main"; name is
	// one component.
	Repo func(tb TB, name string) forge.Repo
	// Commit adds a commit to a branch that exists or not: its tree is files,
	// by path, its parent the branch's tip. It gives the commit's object name.
	Commit func(tb TB, r forge.Repo, branch string, files map[string]File) string
	// Tag makes a tag of the commit, with a tag object where annotated.
	Tag func(tb TB, r forge.Repo, name, commit string, annotated bool)
	// Fetch fetches the commit with a git client and what CloneInfo gave, and
	// gives the content of the file at path in what it got.
	Fetch func(tb TB, c forge.Clone, commit, path string) (string, error)
	// Statuses gives what people see beside the commit. Required when the
	// driver's Capabilities have Statuses; what the forge can't represent
	// (Version, ExternalID, times) may be left out.
	Statuses func(tb TB, r forge.Repo, commit string) []forge.Status
	// Shown is what the forge makes of a state, where it knows fewer; nil: it
	// knows all. What is final stays final.
	Shown func(forge.StatusState) forge.StatusState
	// Webhooks is required when the driver's Capabilities have Webhooks.
	Webhooks *Webhooks

	// What follows is optional: without it optional interfaces are not checked.

	// PullRequest opens one into main. Its head is a new branch with one commit,
	// whose tree is files and whose parent main's tip is as it is now. One that is
	// opened later has changed later. For forge.Merger, forge.Commenter and
	// forge.PullRequestLister.
	PullRequest func(tb TB, r forge.Repo, files map[string]File) forge.PullRequest
	// Comments gives the texts beside a pull request. For forge.Commenter.
	Comments func(tb TB, r forge.Repo, pullRequest int) []string
	// User makes a user who may approve, or may not, in the repository. For
	// forge.Permissions.
	User func(tb TB, r forge.Repo, mayApprove bool) forge.User
	// WebhookURL is where the forge is set up to send the webhooks of every
	// repository; empty: where that is cannot be seen. For forge.Checker.
	WebhookURL string
}

// Webhooks are what a forge sends.
type Webhooks struct {
	// Request is a delivery of an event's body as the forge would send it, with its
	// headers, among them a signature or token made with secret. The same arguments
	// give the same headers, with the exception of SignedBy.
	Request func(tb TB, event string, body, secret []byte) *http.Request
	// SignedBy names the headers that authenticate a request. It may be nil where
	// they are those that differ when only the secret does.
	SignedBy []string
	// Secret is set where the forge has the secret and asks no SecretFunc, as with
	// forge/remoteforge: it is that secret.
	Secret []byte
	// Deliveries are of the forge itself, from its documentation or its source.
	Deliveries []Delivery
	// PullRequest is the delivery for a pull request of Fixture.PullRequest that was
	// opened. Optional, for forge.PullRequestLister.
	PullRequest func(tb TB, r forge.Repo, number int) (event string, body []byte)
}

// Delivery is a webhook and what it has to become.
type Delivery struct {
	Name  string // of the subtest
	Event string // as the forge calls it
	Body  []byte
	// Repo is what the secret is asked for, "owner/name".
	Repo string
	// Golden is the file with the event as indented JSON. It is written when the
	// test has a boolean flag "update" and -update is given. Empty: the delivery is
	// an error that wraps Err.
	Golden string
	Err    error // forge.ErrIgnored or forge.ErrInvalid
}

// Check is one promise of package forge.
type Check struct {
	Name string
	// Needs says whether the promise is made by the driver, and whether the fixture
	// has what it takes to check it; nil: always.
	Needs func(f Fixture) bool
	Run   func(tb TB, f Fixture)
}

// Run runs every check that applies as a subtest of t, each on a new fixture.
func Run(t *testing.T, h Harness) {
	for _, c := range Checks() {
		t.Run(c.Name, func(t *testing.T) {
			f := h.New(t)
			t.Cleanup(func() {
				if err := f.Forge.Close(); err != nil {
					t.Errorf("Close: %v", err)
				}
			})
			if c.Needs != nil && !c.Needs(f) {
				t.Logf("does not apply to this driver, or to this fixture: %s", c.Name)
				return
			}
			c.Run(t, f)
		})
	}
}

func statuses(f Fixture) bool { return f.Forge.Capabilities().Statuses }
func webhooks(f Fixture) bool { return f.Forge.Capabilities().Webhooks }
func secrets(f Fixture) bool  { return webhooks(f) && (f.Webhooks == nil || f.Webhooks.Secret == nil) }
func merges(f Fixture) bool   { return optional[forge.Merger](f) && f.PullRequest != nil }
func comments(f Fixture) bool {
	return optional[forge.Commenter](f) && f.PullRequest != nil && f.Comments != nil
}
func lists(f Fixture) bool { return optional[forge.PullRequestLister](f) && f.PullRequest != nil }
func listsAsWebhooks(f Fixture) bool {
	return lists(f) && webhooks(f) && f.Webhooks != nil && f.Webhooks.PullRequest != nil
}
func permits(f Fixture) bool { return optional[forge.Permissions](f) && f.User != nil }
func forgets(f Fixture) bool { return optional[forge.StatusForgetter](f) && f.Statuses != nil }

func optional[T any](f Fixture) bool {
	_, ok := forge.As[T](f.Forge)
	return ok
}

// Checks lists the promises, for those who run them in another way than Run.
func Checks() []Check {
	return []Check{
		{"Resolve", nil, checkResolve},
		{"ResolveRefuses", nil, checkResolveRefuses},
		{"ReadFile", nil, checkReadFile},
		{"ReadFileAtCommit", nil, checkReadFileAtCommit},
		{"ReadFileOddNames", nil, checkOddNames},
		{"ReadFileBound", nil, checkBound},
		{"ReadFileAbsent", nil, checkAbsent},
		{"ReadFileNotRegular", nil, checkNotRegular},
		{"ReadFileInvalid", nil, checkInvalidArguments},
		{"ListFiles", nil, checkListFiles},
		{"ListFilesAbsent", nil, checkListFilesAbsent},
		{"UnknownRepo", nil, checkUnknownRepo},
		{"InvalidRepo", nil, checkInvalidRepo},
		{"Clone", nil, checkClone},
		{"Context", nil, checkContext},
		{"WebhooksUnsupported", func(f Fixture) bool { return !webhooks(f) }, checkWebhooksUnsupported},
		{"WebhookEvents", webhooks, checkWebhookEvents},
		{"WebhookErrors", webhooks, checkWebhookErrors},
		{"WebhookForged", webhooks, checkWebhookForged},
		{"WebhookSecret", secrets, checkWebhookSecret},
		{"WebhookReplay", webhooks, checkWebhookReplay},
		{"WebhookTruncated", webhooks, checkWebhookTruncated},
		{"WebhookOversized", webhooks, checkWebhookOversized},
		{"WebhookContext", webhooks, checkWebhookContext},
		{"WebhookHostile", webhooks, checkWebhookHostile},
		{"Statuses", statuses, checkStatuses},
		{"StatusIdempotent", statuses, checkStatusIdempotent},
		{"StatusOrder", statuses, checkStatusOrder},
		{"StatusKeys", statuses, checkStatusKeys},
		{"StatusRace", statuses, checkStatusRace},
		{"StatusInvalid", statuses, checkStatusInvalid},
		{"Heads", optional[forge.HeadLister], checkHeads},
		{"ChangedPaths", optional[forge.ChangedPaths], checkChangedPaths},
		{"ChangedPathsLimit", optional[forge.ChangedPaths], checkChangedPathsLimit},
		{"Merge", merges, checkMerge},
		{"MergeConflict", merges, checkMergeConflict},
		{"Comment", comments, checkComment},
		{"MayApprove", permits, checkMayApprove},
		{"ForgetStatuses", forgets, checkForgetStatuses},
		{"PullRequests", lists, checkPullRequests},
		{"PullRequestsAsWebhooks", listsAsWebhooks, checkPullRequestsAsWebhooks},
		{"Check", optional[forge.Checker], checkSetUp},
		{"CheckFinds", optional[forge.Checker], checkSetUpBadly},
	}
}

func wantErr(tb TB, what string, err error, targets ...error) {
	tb.Helper()
	if !slices.ContainsFunc(targets, func(t error) bool { return errors.Is(err, t) }) {
		tb.Errorf("%s: error %v, want one that wraps %v", what, err, targets)
	}
}

func must(tb TB, what string, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatalf("%s: %v", what, err)
	}
}
