// Package remoteforge is a forge behind a plugin: any gRPC server of
// solstice.forge.v1, in any language, on this computer or another one. It is also
// what a plugin in Go is made of: NewServer serves any forge.Forge, and Serve is
// most of a main.
//
// A plugin is reached on a Unix socket, whose directory decides who may, or by TCP
// with TLS and certificates on both sides (Open), or it is a command that is
// started, and started again when it ends (Start). Where a plugin is away calls wrap
// forge.ErrUnavailable, and it is tried again with growing pauses.
package remoteforge

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/internal/plugin"
	pb "github.com/solstice-ci/solstice-go/solstice/api/forgev1"
)

// maxMessage is the most bytes that either side takes: webhooks have up to
// forge.MaxWebhookBytes.
const maxMessage = 32 << 20

var wraps = plugin.Errors{Invalid: forge.ErrInvalid, Unavailable: forge.ErrUnavailable}

// Config says where a plugin is.
type Config struct {
	// Target is unix:PATH, or HOST:PORT with TLS; required.
	Target string
	// TLS verifies a plugin at HOST:PORT, and has the certificate to show it.
	TLS *tls.Config
	// ConnectTimeout bounds the wait for the plugin at first; 0: 10 s.
	ConnectTimeout time.Duration
	// CallTimeout bounds calls whose context has no deadline; 0: 1 min.
	CallTimeout time.Duration
}

// Forge is a forge.Forge. Which of the optional interfaces it has is the plugin's:
// ask forge.As.
type Forge struct {
	cfg   Config
	rpc   pb.ForgeServiceClient
	info  *pb.InfoResponse
	ended context.Context //nolint:containedctx // it ends with Close
	end   context.CancelFunc
	close func() error // once
}

var _ forge.Forge = (*Forge)(nil)

// Open connects to a plugin, which has to be there. Errors wrap forge.ErrInvalid
// (the configuration) or forge.ErrUnavailable.
func Open(ctx context.Context, cfg Config) (*Forge, error) {
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = 10 * time.Second
	}
	if cfg.CallTimeout == 0 {
		cfg.CallTimeout = time.Minute
	}
	conn, err := plugin.Connect(cfg.Target, cfg.TLS, wraps,
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)))
	if err != nil {
		return nil, err
	}
	f := &Forge{cfg: cfg, rpc: pb.NewForgeServiceClient(conn), close: sync.OnceValue(conn.Close)}
	f.ended, f.end = context.WithCancel(context.Background())
	ictx, cancel := context.WithTimeout(ctx, cfg.ConnectTimeout)
	defer cancel()
	if f.info, err = f.rpc.Info(ictx, &pb.InfoRequest{}, grpc.WaitForReady(true)); err != nil {
		f.end()
		_ = conn.Close()
		if cause := ctx.Err(); cause != nil {
			return nil, cause
		}
		return nil, fmt.Errorf("%w: plugin %s: %w", forge.ErrUnavailable, cfg.Target, err)
	}
	return f, nil
}

// Command is a plugin that Start starts.
type Command struct {
	// Argv is the program and its arguments; "--listen" and "unix:PATH" are
	// appended, and it has to serve there. Required.
	Argv []string
	// Env is all of its environment, NAME=VALUE; nil: only PATH, as it is usual.
	Env []string
	// Output gets what it prints; nil: nobody.
	Output io.Writer
	// Logger is told when it ends and is started again; nil: nobody.
	Logger *slog.Logger
	// Dir is where the directory of its socket is made, which this process leaves
	// there only when it is killed; empty: the system's for temporary files.
	Dir string

	ConnectTimeout, CallTimeout time.Duration // as in Config
}

// Start starts a plugin, and starts it again, with growing pauses, whenever it
// ends. Its standard input is a pipe that ends with this process, however that
// ends, and the plugin should do so then.
func Start(ctx context.Context, c Command) (*Forge, error) {
	f, stop, err := plugin.Start(ctx, plugin.Command{Argv: c.Argv, Env: c.Env, Output: c.Output, Logger: c.Logger, Dir: c.Dir}, wraps,
		func(ctx context.Context, target string) (*Forge, error) {
			return Open(ctx, Config{Target: target, ConnectTimeout: c.ConnectTimeout, CallTimeout: c.CallTimeout})
		})
	if err != nil {
		return nil, err
	}
	disconnect := f.close
	f.close = sync.OnceValue(func() error { return errors.Join(disconnect(), stop()) })
	return f, nil
}

// Name of the plugin and its version, for people.
func (f *Forge) Name() (name, version string) { return f.info.GetName(), f.info.GetVersion() }

// Capabilities implements forge.Forge.
func (f *Forge) Capabilities() forge.Capabilities {
	c := f.info.GetCapabilities()
	return forge.Capabilities{Webhooks: c.GetWebhooks(), Statuses: c.GetStatuses(), StatusKeysFold: c.GetStatusKeysFold()}
}

// Close implements forge.Forge. A plugin that Start started ends, others go on.
func (f *Forge) Close() error {
	f.end()
	return f.close()
}

// call makes a call, which has an end. What goes into it as text has to be some.
func call[Q, R any](ctx context.Context, f *Forge, op string, rpc func(context.Context, Q, ...grpc.CallOption) (R, error), q Q, text ...string) (R, error) {
	var none R
	if err := ctx.Err(); err != nil {
		return none, fmt.Errorf("remoteforge: %s: %w", op, err)
	}
	for _, s := range text {
		if !utf8.ValidString(s) {
			return none, fmt.Errorf("remoteforge: %s: %w: %.80q is not UTF-8", op, forge.ErrInvalid, s)
		}
	}
	in, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(f.ended, cancel)()
	if _, ok := ctx.Deadline(); !ok {
		in, cancel = context.WithTimeout(in, f.cfg.CallTimeout)
		defer cancel()
	}
	r, err := rpc(in, q)
	if err == nil {
		return r, nil
	}
	if f.ended.Err() != nil && ctx.Err() == nil {
		return none, fmt.Errorf("remoteforge: %s: %w: it was closed", op, forge.ErrUnavailable)
	}
	return none, fmt.Errorf("remoteforge: %s: %w", op, fromStatus(ctx, err))
}

// ParseWebhook implements forge.Forge. The secret is the plugin's, and the function
// is not asked.
func (f *Forge) ParseWebhook(ctx context.Context, r *http.Request, _ forge.SecretFunc) (forge.Event, error) {
	if !f.Capabilities().Webhooks {
		return forge.Event{}, fmt.Errorf("remoteforge: webhooks: %w", errors.ErrUnsupported)
	}
	body, err := forge.ReadWebhook(r)
	if err != nil {
		return forge.Event{}, err
	}
	a, err := call(ctx, f, "parse webhook", f.rpc.ParseWebhook, &pb.ParseWebhookRequest{Headers: toHeaders(r.Header), RawBody: body})
	if err != nil {
		return forge.Event{}, err
	}
	switch result := a.GetResult().(type) {
	case *pb.ParseWebhookResponse_Ignored:
		return forge.Event{}, &answer{text: result.Ignored, is: []error{forge.ErrIgnored}}
	case *pb.ParseWebhookResponse_Event:
		e := fromEvent(result.Event)
		return e, e.Validate()
	}
	return forge.Event{}, fmt.Errorf("remoteforge: parse webhook: %w: the plugin gave no event", forge.ErrInvalid)
}

// Resolve implements forge.Forge.
func (f *Forge) Resolve(ctx context.Context, repo forge.Repo, ref string) (string, error) {
	r, err := call(ctx, f, "resolve", f.rpc.Resolve, &pb.ResolveRequest{Repo: toRepo(repo), Ref: ref}, repo.FullName(), ref)
	return r.GetCommit(), err
}

// ReadFile implements forge.Forge.
func (f *Forge) ReadFile(ctx context.Context, repo forge.Repo, commit, path string) ([]byte, error) {
	r, err := call(ctx, f, "read file", f.rpc.ReadFile, &pb.ReadFileRequest{Repo: toRepo(repo), Commit: commit, Path: []byte(path)}, repo.FullName(), commit)
	return r.GetContent(), err
}

// ListFiles implements forge.Forge.
func (f *Forge) ListFiles(ctx context.Context, repo forge.Repo, commit, dir string) ([]string, error) {
	r, err := call(ctx, f, "list files", f.rpc.ListFiles, &pb.ListFilesRequest{Repo: toRepo(repo), Commit: commit, Dir: []byte(dir)}, repo.FullName(), commit)
	return toStrings(r.GetNames()), err
}

// CloneInfo implements forge.Forge. A directory is one of the plugin's machine.
// Credentials of a plugin that was restarted since can't be revoked any more: that
// wraps forge.ErrNotFound.
func (f *Forge) CloneInfo(ctx context.Context, repo forge.Repo, _ forge.CloneOptions) (forge.Clone, error) {
	r, err := call(ctx, f, "clone info", f.rpc.CloneInfo, &pb.CloneInfoRequest{Repo: toRepo(repo)}, repo.FullName())
	if err != nil {
		return forge.Clone{}, err
	}
	c, err := fromClone(r)
	if err != nil {
		return forge.Clone{}, fmt.Errorf("remoteforge: clone info: %w", err)
	}
	if handle := r.GetRevokeHandle(); handle != "" {
		c.Revoke = func(ctx context.Context) error {
			_, err := call(ctx, f, "revoke", f.rpc.RevokeClone, &pb.RevokeCloneRequest{Handle: handle})
			return err
		}
	}
	return c, nil
}

// ReportStatus implements forge.Forge.
func (f *Forge) ReportStatus(ctx context.Context, repo forge.Repo, commit string, s forge.Status) error {
	if err := s.Validate(); err != nil {
		return err
	}
	_, err := call(ctx, f, "report status", f.rpc.ReportStatus, &pb.ReportStatusRequest{Repo: toRepo(repo), Commit: commit, Status: toState(s)}, repo.FullName(), commit)
	return err
}

// As gives the optional interfaces that the plugin has; see forge.As.
func (f *Forge) As(target any) bool {
	for _, v := range f.info.GetVerbs() {
		switch t := target.(type) {
		case *forge.ChangedPaths:
			if v == pb.Verb_VERB_CHANGED_PATHS {
				*t = optional{f}
				return true
			}
		case *forge.Permissions:
			if v == pb.Verb_VERB_MAY_APPROVE {
				*t = optional{f}
				return true
			}
		case *forge.Merger:
			if v == pb.Verb_VERB_MERGE_COMMIT {
				*t = optional{f}
				return true
			}
		case *forge.Commenter:
			if v == pb.Verb_VERB_COMMENT {
				*t = optional{f}
				return true
			}
		case *forge.HeadLister:
			if v == pb.Verb_VERB_HEADS {
				*t = optional{f}
				return true
			}
		case *forge.StatusForgetter:
			if v == pb.Verb_VERB_FORGET_STATUSES {
				*t = optional{f}
				return true
			}
		case *forge.PullRequestLister:
			if v == pb.Verb_VERB_PULL_REQUESTS {
				*t = optional{f}
				return true
			}
		case *forge.Checker:
			if v == pb.Verb_VERB_CHECK {
				*t = optional{f}
				return true
			}
		}
	}
	return false
}

// optional has the verbs that a plugin may have.
type optional struct{ f *Forge }

// ChangedPaths implements forge.ChangedPaths.
func (o optional) ChangedPaths(ctx context.Context, repo forge.Repo, base, head string, limit int) ([]string, bool, error) {
	r, err := call(ctx, o.f, "changed paths", o.f.rpc.ChangedPaths,
		&pb.ChangedPathsRequest{Repo: toRepo(repo), Base: base, Head: head, Limit: toInt32(limit)}, repo.FullName(), base, head)
	return toStrings(r.GetPaths()), r.GetTruncated(), err
}

// MayApprove implements forge.Permissions.
func (o optional) MayApprove(ctx context.Context, repo forge.Repo, u forge.User) (bool, error) {
	r, err := call(ctx, o.f, "may approve", o.f.rpc.MayApprove, &pb.MayApproveRequest{Repo: toRepo(repo), User: toUser(u)}, repo.FullName(), u.ID)
	return r.GetMay(), err
}

// MergeCommit implements forge.Merger.
func (o optional) MergeCommit(ctx context.Context, repo forge.Repo, pr forge.PullRequest) (string, error) {
	r, err := call(ctx, o.f, "merge commit", o.f.rpc.MergeCommit, &pb.MergeCommitRequest{Repo: toRepo(repo), PullRequest: toPullRequest(&pr)}, repo.FullName())
	return r.GetCommit(), err
}

// Comment implements forge.Commenter.
func (o optional) Comment(ctx context.Context, repo forge.Repo, pullRequest int, key, text string) error {
	_, err := call(ctx, o.f, "comment", o.f.rpc.Comment,
		&pb.CommentRequest{Repo: toRepo(repo), PullRequest: int64(pullRequest), Key: key, Text: clean(text)}, repo.FullName(), key)
	return err
}

// Heads implements forge.HeadLister.
func (o optional) Heads(ctx context.Context, repo forge.Repo) (map[string]string, error) {
	r, err := call(ctx, o.f, "heads", o.f.rpc.Heads, &pb.HeadsRequest{Repo: toRepo(repo)}, repo.FullName())
	if err != nil {
		return nil, err
	}
	heads := make(map[string]string, len(r.GetHeads()))
	for _, h := range r.GetHeads() {
		heads[string(h.GetRef())] = h.GetCommit()
	}
	return heads, nil
}

// ForgetStatuses implements forge.StatusForgetter.
func (o optional) ForgetStatuses(ctx context.Context, repo forge.Repo, commit string) error {
	_, err := call(ctx, o.f, "forget statuses", o.f.rpc.ForgetStatuses, &pb.ForgetStatusesRequest{Repo: toRepo(repo), Commit: commit}, repo.FullName(), commit)
	return err
}

// PullRequests implements forge.PullRequestLister.
func (o optional) PullRequests(ctx context.Context, repo forge.Repo, limit int) ([]forge.PullRequest, error) {
	r, err := call(ctx, o.f, "pull requests", o.f.rpc.PullRequests, &pb.PullRequestsRequest{Repo: toRepo(repo), Limit: toInt32(limit)}, repo.FullName())
	if err != nil {
		return nil, err
	}
	var all []forge.PullRequest
	for _, p := range r.GetPullRequests() {
		// One that no webhook could have is left out.
		if pr := *fromPullRequest(p); pr.Validate() == nil && forge.IsCommit(pr.HeadCommit) && len(all) < limit {
			all = append(all, pr)
		}
	}
	return all, nil
}

// Check implements forge.Checker. A plugin that is away is a finding, too.
func (o optional) Check(ctx context.Context, options forge.CheckOptions) ([]forge.Finding, error) {
	q := &pb.CheckRequest{WebhookUrl: clean(options.WebhookURL)}
	for _, repo := range options.Repos {
		q.Repos = append(q.Repos, toRepo(repo))
	}
	r, err := call(ctx, o.f, "check", o.f.rpc.Check, q)
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil:
		return []forge.Finding{{
			Level: forge.LevelFailure, What: fmt.Sprintf("the plugin %s cannot be asked: %v", o.f.cfg.Target, err), Advice: "see that it runs, and what it logs",
		}}, nil
	}
	all := []forge.Finding{{Level: forge.LevelNotice, What: fmt.Sprintf("the plugin is %s, version %s", o.f.info.GetName(), o.f.info.GetVersion())}}
	for _, x := range r.GetFindings() {
		all = append(all, fromFinding(x))
	}
	return all, nil
}
