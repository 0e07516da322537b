package remoteforge

import (
	"fmt"
	"math"
	"net/http"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/solstice-ci/solstice-go/forge"
	pb "github.com/solstice-ci/solstice-go/solstice/api/forgev1"
)

// clean is text for people, which may have come from anywhere, as protobuf has it.
func clean(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

func toTime(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func fromTime(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func toInt32(n int) int32 { return int32(max(math.MinInt32, min(n, math.MaxInt32))) } //nolint:gosec // it is bounded

func toBytes(all []string) [][]byte {
	out := make([][]byte, 0, len(all))
	for _, s := range all {
		out = append(out, []byte(s))
	}
	return out
}

func toStrings(all [][]byte) (out []string) {
	for _, b := range all {
		out = append(out, string(b))
	}
	return out
}

func toHeaders(h http.Header) (all []*pb.Header) {
	for name, values := range h {
		all = append(all, &pb.Header{Name: clean(name), Values: toBytes(values)})
	}
	return all
}

func fromHeaders(all []*pb.Header) http.Header {
	h := http.Header{}
	for _, header := range all {
		for _, v := range header.GetValues() {
			h.Add(header.GetName(), string(v))
		}
	}
	return h
}

func toRepo(r forge.Repo) *pb.Repo {
	return &pb.Repo{
		Owner: clean(r.Owner), Name: clean(r.Name), Id: clean(r.ID), Url: clean(r.URL), CloneUrl: clean(r.CloneURL),
		DefaultBranch: clean(r.DefaultBranch), Private: r.Private,
	}
}

func fromRepo(r *pb.Repo) forge.Repo {
	return forge.Repo{
		Owner: r.GetOwner(), Name: r.GetName(), ID: r.GetId(), URL: r.GetUrl(), CloneURL: r.GetCloneUrl(),
		DefaultBranch: r.GetDefaultBranch(), Private: r.GetPrivate(),
	}
}

func toUser(u forge.User) *pb.User { return &pb.User{Id: clean(u.ID), Login: clean(u.Login)} }

func fromUser(u *pb.User) forge.User { return forge.User{ID: u.GetId(), Login: u.GetLogin()} }

func toPullRequest(p *forge.PullRequest) *pb.PullRequest {
	if p == nil {
		return nil
	}
	return &pb.PullRequest{
		Number: int64(p.Number), Title: clean(p.Title), Url: clean(p.URL),
		HeadRef: clean(p.HeadRef), HeadCommit: clean(p.HeadCommit), HeadRepo: toRepo(p.HeadRepo),
		BaseRef: clean(p.BaseRef), BaseCommit: clean(p.BaseCommit), MergeRef: clean(p.MergeRef),
		Author: toUser(p.Author), Fork: p.Fork, Draft: p.Draft,
	}
}

func fromPullRequest(p *pb.PullRequest) *forge.PullRequest {
	if p == nil {
		return nil
	}
	return &forge.PullRequest{
		Number: int(p.GetNumber()), Title: p.GetTitle(), URL: p.GetUrl(),
		HeadRef: p.GetHeadRef(), HeadCommit: p.GetHeadCommit(), HeadRepo: fromRepo(p.GetHeadRepo()),
		BaseRef: p.GetBaseRef(), BaseCommit: p.GetBaseCommit(), MergeRef: p.GetMergeRef(),
		Author: fromUser(p.GetAuthor()), Fork: p.GetFork(), Draft: p.GetDraft(),
	}
}

func toEvent(e forge.Event) *pb.Event {
	out := &pb.Event{
		Kind: clean(string(e.Kind)), Action: clean(e.Action), Delivery: clean(e.Delivery), Repo: toRepo(e.Repo), Ref: clean(e.Ref),
		Commit: clean(e.Commit), Before: clean(e.Before), Sender: toUser(e.Sender), Title: clean(e.Title), Message: clean(e.Message),
		PullRequest: toPullRequest(e.PullRequest), ChangedPaths: toBytes(e.ChangedPaths), ChangedPathsKnown: e.ChangedPaths != nil,
		ExternalId: clean(e.ExternalID), Time: toTime(e.Time),
	}
	for _, r := range e.Repos {
		out.Repos = append(out.Repos, toRepo(r))
	}
	return out
}

func fromEvent(e *pb.Event) forge.Event {
	out := forge.Event{
		Kind: forge.Kind(e.GetKind()), Action: e.GetAction(), Delivery: e.GetDelivery(), Repo: fromRepo(e.GetRepo()), Ref: e.GetRef(),
		Commit: e.GetCommit(), Before: e.GetBefore(), Sender: fromUser(e.GetSender()), Title: e.GetTitle(), Message: e.GetMessage(),
		PullRequest: fromPullRequest(e.GetPullRequest()), ChangedPaths: toStrings(e.GetChangedPaths()),
		ExternalID: e.GetExternalId(), Time: fromTime(e.GetTime()),
	}
	if e.GetChangedPathsKnown() && out.ChangedPaths == nil {
		out.ChangedPaths = []string{}
	}
	for _, r := range e.GetRepos() {
		out.Repos = append(out.Repos, fromRepo(r))
	}
	return out
}

func toState(s forge.Status) *pb.Status {
	out := &pb.Status{
		Key: clean(s.Key), Version: s.Version, State: clean(string(s.State)), Description: clean(s.Description), TargetUrl: clean(s.TargetURL),
		ExternalId: clean(s.ExternalID), StartedAt: toTime(s.StartedAt), FinishedAt: toTime(s.FinishedAt), Summary: clean(s.Summary),
	}
	for _, a := range s.Annotations {
		out.Annotations = append(out.Annotations, &pb.Annotation{
			Path: []byte(a.Path), Line: toInt32(a.Line), Column: toInt32(a.Column), Level: clean(string(a.Level)), Message: clean(a.Message),
		})
	}
	for _, a := range s.Actions {
		out.Actions = append(out.Actions, clean(string(a)))
	}
	return out
}

func fromState(s *pb.Status) forge.Status {
	out := forge.Status{
		Key: s.GetKey(), Version: s.GetVersion(), State: forge.StatusState(s.GetState()), Description: s.GetDescription(), TargetURL: s.GetTargetUrl(),
		ExternalID: s.GetExternalId(), StartedAt: fromTime(s.GetStartedAt()), FinishedAt: fromTime(s.GetFinishedAt()), Summary: s.GetSummary(),
	}
	for _, a := range s.GetAnnotations() {
		out.Annotations = append(out.Annotations, forge.Annotation{
			Path: string(a.GetPath()), Line: int(a.GetLine()), Column: int(a.GetColumn()), Level: forge.Level(a.GetLevel()), Message: a.GetMessage(),
		})
	}
	for _, a := range s.GetActions() {
		out.Actions = append(out.Actions, forge.Action(a))
	}
	return out
}

func toFinding(x forge.Finding) *pb.Finding {
	return &pb.Finding{Level: clean(string(x.Level)), What: clean(x.What), Advice: clean(x.Advice)}
}

func fromFinding(x *pb.Finding) forge.Finding {
	level := forge.Level(x.GetLevel())
	if level != forge.LevelNotice && level != forge.LevelWarning {
		level = forge.LevelFailure
	}
	return forge.Finding{Level: level, What: x.GetWhat(), Advice: x.GetAdvice()}
}

// fromClone checks what becomes arguments and configuration of git.
func fromClone(r *pb.CloneInfoResponse) (forge.Clone, error) {
	c := forge.Clone{Dir: r.GetDir(), URL: r.GetUrl(), Header: r.GetHeaders(), ExpiresAt: fromTime(r.GetExpiresAt())}
	if (c.Dir == "") == (c.URL == "") {
		return forge.Clone{}, fmt.Errorf("%w: the plugin gave not exactly one of directory and URL", forge.ErrInvalid)
	}
	if c.URL != "" && !strings.HasPrefix(c.URL, "https://") && !strings.HasPrefix(c.URL, "http://") {
		return forge.Clone{}, fmt.Errorf("%w: the plugin gave a URL that is neither https nor http", forge.ErrInvalid)
	}
	for name, value := range c.Header {
		if strings.ContainsAny(name+value, "\r\n\x00") {
			return forge.Clone{}, fmt.Errorf("%w: the plugin gave a header of several lines", forge.ErrInvalid)
		}
	}
	return c, nil
}
