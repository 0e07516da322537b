package forgetest_test

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/forgetest"
)

var _ = flag.Bool("update", false, "write golden events")

// bug is a deviation in what follows; empty: none.
type bug string

func sum(body, secret []byte) string {
	mac := hmac.New(sha256.New, secret)
	mac.Write(body)
	return "sha256=" + hex.EncodeToString(mac.Sum(nil))
}

// payload is the body of a webhook of the model.
type payload struct {
	Repo   string `json:"repo"`
	Ref    string `json:"ref"`
	Commit string `json:"commit"`
	Title  any    `json:"title"`

	PullRequest *forge.PullRequest `json:"pull_request,omitempty"`
}

func (m *model) webhooks() *forgetest.Webhooks {
	const commit = "89e495e7941cf9e40e6980d14a16bf023ccd4c91"
	return &forgetest.Webhooks{
		Request: func(tb forgetest.TB, event string, body, secret []byte) *http.Request {
			r, err := http.NewRequestWithContext(tb.Context(), http.MethodPost, "http://localhost/", bytes.NewReader(body))
			if err != nil {
				tb.Fatalf("%v", err)
			}
			r.Header.Set("X-Event", event)
			r.Header.Set("X-Delivery", "4711")
			r.Header.Set("X-Signature", sum(body, secret))
			return r
		},
		PullRequest: func(tb forgetest.TB, r forge.Repo, number int) (string, []byte) {
			body, err := json.Marshal(payload{Repo: r.FullName(), PullRequest: &m.repos[r.FullName()].pulls[number-1].said})
			if err != nil {
				tb.Fatalf("%v", err)
			}
			return "pull", body
		},
		Deliveries: []forgetest.Delivery{
			{
				Name: "push", Event: "push", Repo: "team/app", Golden: "testdata/push.json",
				Body: []byte(`{"repo":"team/app","ref":"refs/heads/main","commit":"` + commit + `","title":"a"}`),
			},
			{Name: "tag", Event: "push", Repo: "team/app", Err: forge.ErrIgnored, Body: []byte(`{"repo":"team/app","ref":"refs/tags/v1","commit":"` + commit + `"}`)},
			{Name: "star", Event: "star", Repo: "team/app", Err: forge.ErrIgnored, Body: []byte(`{"repo":"team/app"}`)},
			{Name: "malformed", Event: "push", Err: forge.ErrInvalid, Body: []byte(`{"repo":`)},
			{Name: "no commit", Event: "push", Repo: "team/app", Err: forge.ErrInvalid, Body: []byte(`{"repo":"team/app","ref":"refs/heads/main"}`)},
		},
	}
}

func (m *model) ParseWebhook(ctx context.Context, r *http.Request, s forge.SecretFunc) (forge.Event, error) {
	var none forge.Event
	is := func(b bug) bool { return m.fault.bug == b }
	if m.fault.webhook != nil {
		return none, m.fault.webhook
	}
	if err := ctx.Err(); err != nil && !m.fault.deaf {
		return none, err
	}
	if is("takes a broken body for its end") {
		all, _ := io.ReadAll(r.Body)
		r.Body = io.NopCloser(bytes.NewReader(all))
	}
	body, err := forge.ReadWebhook(r)
	switch {
	case is("cuts the body"):
		err = swap(err, forge.ErrTooLarge, nil)
	case is("reads on"):
		_, _ = io.CopyN(io.Discard, r.Body, 8<<20)
	}
	if err != nil {
		return none, err
	}
	var p payload
	malformed := json.Unmarshal(body, &p)
	if malformed != nil && is("ignores what is malformed") {
		return none, fmt.Errorf("%w: no JSON", forge.ErrIgnored)
	}
	if is("ignores before it verifies") && r.Header.Get("X-Event") != "push" {
		return none, fmt.Errorf("%w: %s", forge.ErrIgnored, r.Header.Get("X-Event"))
	}
	if is("asks for the name") {
		_, p.Repo, _ = strings.Cut(p.Repo, "/")
	}
	secret, err := s(ctx, p.Repo)
	if err != nil && is("keeps the error") {
		return none, forge.ErrSignature
	}
	if err != nil {
		return none, fmt.Errorf("secret: %w", err)
	}
	if len(secret) == 0 && !is("takes an empty secret") {
		return none, errors.New("the secret is empty")
	}
	signed := body
	if is("trims the body") {
		signed = bytes.TrimSpace(body)
	}
	got, want := r.Header.Get("X-Signature"), sum(signed, secret)
	if is("compares a prefix") {
		want = want[:min(len(want), len(got))]
	}
	if !hmac.Equal([]byte(got), []byte(want)) && !is("verifies nothing") && (got != "" || !is("needs no signature")) {
		return none, forge.ErrSignature
	}
	if title, ok := p.Title.(string); is("panics") && malformed == nil && !ok {
		panic(title)
	}
	switch {
	case malformed != nil:
		return none, fmt.Errorf("%w: %w", forge.ErrInvalid, malformed)
	case is("gives no reason"):
		return none, forge.ErrIgnored
	case r.Header.Get("X-Event") == "pull" && p.PullRequest != nil:
		owner, name, _ := strings.Cut(p.Repo, "/")
		e := forge.Event{
			Kind: forge.KindPullRequest, Action: "opened", Repo: forge.Repo{Owner: owner, Name: name},
			Ref: fmt.Sprintf("refs/pull/%d/head", p.PullRequest.Number), Commit: p.PullRequest.HeadCommit, PullRequest: p.PullRequest,
		}
		return e, e.Validate()
	case r.Header.Get("X-Event") != "push":
		return none, fmt.Errorf("%w: %s", forge.ErrIgnored, r.Header.Get("X-Event"))
	case !strings.HasPrefix(p.Ref, "refs/heads/") && !is("ignores nothing"):
		return none, fmt.Errorf("%w: ref %q is no branch", forge.ErrIgnored, p.Ref)
	}
	owner, name, _ := strings.Cut(p.Repo, "/")
	e := forge.Event{Kind: forge.KindPush, Delivery: r.Header.Get("X-Delivery"), Repo: forge.Repo{Owner: owner, Name: name}, Ref: p.Ref, Commit: p.Commit}
	switch {
	case is("another commit"):
		e.Commit = strings.Repeat("0", len(e.Commit))
	case is("another repository"):
		e.Repo.Name = "other"
	case is("makes up a delivery"):
		m.mu.Lock()
		m.made++
		e.Delivery = fmt.Sprint(m.made)
		m.mu.Unlock()
	case is("does not validate"):
		return e, nil
	}
	return e, e.Validate()
}

// pull is a pull request.
type pull struct {
	base, head map[string]forgetest.File
	asked      bool // MergeCommit was, and said that it is not known yet
	said       forge.PullRequest
}

func (m *model) pullRequest(_ forgetest.TB, r forge.Repo, files map[string]forgetest.File) forge.PullRequest {
	found := m.repos[r.FullName()]
	base := found.refs["refs/heads/main"]
	n := len(found.pulls) + 1
	head := found.commit(fmt.Sprintf("refs/pull/%d/head", n), files)
	pr := forge.PullRequest{Number: n, HeadCommit: head, BaseCommit: base, BaseRef: "main", Author: forge.User{ID: "7"}}
	found.pulls = append(found.pulls, pull{base: found.commits[base], head: found.commits[head], said: pr})
	return pr
}

// numbered gives a pull request.
func (m *model) numbered(ctx context.Context, r forge.Repo, n int) (*repo, *pull, error) {
	found, err := m.open(ctx, r)
	switch {
	case err != nil:
		return nil, nil, err
	case m.fault.bug == "any pull request":
		return found, &found.pulls[0], nil
	case n < 1 || n > len(found.pulls):
		return nil, nil, forge.ErrNotFound
	}
	return found, &found.pulls[n-1], nil
}

func (m *model) MergeCommit(ctx context.Context, r forge.Repo, pr forge.PullRequest) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	found, p, err := m.numbered(ctx, r, pr.Number)
	if err != nil {
		return "", err
	}
	if !p.asked {
		p.asked = true
		return "", forge.ErrUnavailable
	}
	ours := found.commits[found.refs["refs/heads/main"]]
	switch m.fault.bug {
	case "merges nothing":
		return pr.HeadCommit, nil
	case "takes the old base":
		ours = p.base
	}
	result := maps.Clone(ours)
	for name, file := range p.head {
		switch {
		case file == p.base[name]:
		case ours[name] != p.base[name] && ours[name] != file && m.fault.bug != "settles conflicts":
			return "", forge.ErrConflict
		default:
			result[name] = file
		}
	}
	return found.commit(fmt.Sprintf("refs/pull/%d/merge", pr.Number), result), nil
}

func (m *model) Comment(ctx context.Context, r forge.Repo, n int, key, text string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	found, _, err := m.numbered(ctx, r, n)
	if err != nil {
		return err
	}
	if m.fault.bug != "takes any key" && (key == "" || strings.Trim(key, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" || strings.Contains(key, "--")) {
		return forge.ErrInvalid
	}
	all := found.comments[n]
	at := slices.IndexFunc(all, func(c [2]string) bool {
		return c[0] == key || m.fault.bug == "takes a prefix of the key" && strings.HasPrefix(key, c[0])
	})
	if at < 0 || m.fault.bug == "adds" {
		found.comments[n] = append(all, [2]string{key, text})
	} else {
		all[at][1] = text
	}
	return nil
}

func (m *model) commentsOf(_ forgetest.TB, r forge.Repo, n int) (all []string) {
	for _, c := range m.repos[r.FullName()].comments[n] {
		all = append(all, c[1]+"\n<!-- "+c[0]+" -->")
	}
	return all
}

func (m *model) user(_ forgetest.TB, r forge.Repo, mayApprove bool) forge.User {
	users := m.repos[r.FullName()].users
	id := fmt.Sprint(len(users) + 1)
	users[id] = mayApprove
	return forge.User{ID: id, Login: "login " + id}
}

func (m *model) MayApprove(ctx context.Context, r forge.Repo, u forge.User) (bool, error) {
	found, err := m.open(ctx, r)
	if err != nil {
		return false, err
	}
	may, known := found.users[u.ID]
	switch {
	case m.fault.bug == "goes by login":
		return found.users[strings.TrimPrefix(u.Login, "login ")], nil
	case !known && m.fault.bug == "trusts strangers":
		return true, nil
	}
	return may, nil
}

func (m *model) ForgetStatuses(ctx context.Context, r forge.Repo, commit string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	found, err := m.open(ctx, r)
	if errors.Is(err, forge.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	switch {
	case m.fault.bug == "forgets all":
		clear(found.statuses)
	case m.fault.bug == "forgets once" && found.statuses[commit] == nil:
		return forge.ErrNotFound
	case m.fault.bug != "forgets nothing":
		delete(found.statuses, commit)
	}
	return nil
}

func (m *model) PullRequests(ctx context.Context, r forge.Repo, limit int) ([]forge.PullRequest, error) {
	found, err := m.open(ctx, r)
	if m.fault.bug == "lists what is absent" && err != nil {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []forge.PullRequest
	for _, p := range slices.Backward(found.pulls) {
		switch m.fault.bug {
		case "lists nobody":
			p.said.Author = forge.User{}
		case "lists the base":
			p.said.HeadCommit = p.said.BaseCommit
		}
		all = append(all, p.said)
	}
	switch m.fault.bug {
	case "lists the oldest first":
		slices.Reverse(all)
	case "lists all":
		return all, nil
	case "lists none":
		return nil, nil
	}
	return all[:min(limit, len(all))], nil
}

func (m *model) Check(ctx context.Context, o forge.CheckOptions) ([]forge.Finding, error) {
	is := func(b bug) bool { return m.fault.bug == b }
	if err := ctx.Err(); err != nil && !is("takes its time") {
		return nil, err
	}
	if is("says an error") {
		return nil, errors.New("it is not set up")
	}
	if is("says nothing") {
		return nil, nil
	}
	all := []forge.Finding{{Level: forge.LevelNotice, What: "the model is there"}}
	warn := func(what string) {
		x := forge.Finding{Level: forge.LevelWarning, What: what, Advice: "do something"}
		switch {
		case is("praises"):
			x.Level = forge.LevelNotice
		case is("knows no advice"):
			x.Advice = ""
		}
		all = append(all, x)
	}
	if o.WebhookURL != "" && o.WebhookURL != "https://ci.example.org/webhooks/model" && !is("looks for no webhook") || is("complains") {
		warn("webhooks go elsewhere")
	}
	if is("sighs") {
		all = append(all, forge.Finding{Level: "sigh", What: "it is set up"})
	}
	for _, r := range o.Repos {
		if _, err := m.open(context.WithoutCancel(ctx), r); err != nil {
			warn("there is no " + r.FullName())
		}
	}
	return all, nil
}
