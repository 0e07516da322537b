package forgetest_test

import (
	"context"
	"crypto/sha1"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/forgetest"
)

// model is a forge in memory that keeps every promise, unless a fault replaces
// one of its methods.
type model struct {
	mu    sync.Mutex
	repos map[string]*repo
	fault fault
	made  int // deliveries
}

type repo struct {
	commits  map[string]map[string]forgetest.File
	refs     map[string]string
	statuses map[string]map[string]forge.Status
	pulls    []pull
	comments map[int][][2]string // key and text
	users    map[string]bool     // by ID: may approve
}

// fault is one deviation; the functions see the arguments and the right answer.
type fault struct {
	resolve   func(ref, got string, err error) (string, error)
	readFile  func(m *model, r *repo, commit, name string, got []byte, err error) ([]byte, error)
	listFiles func(r *repo, commit, dir string, got []string, err error) ([]string, error)
	clone     func(c forge.Clone) forge.Clone
	report    func(r *repo, commit string, s forge.Status) (handled bool, err error)
	heads     func(map[string]string) map[string]string
	changed   func(base string, limit int, got []string, cut bool, err error) ([]string, bool, error)
	webhook   error
	bug       bug
	open      func(m *model, name string, err error) (*repo, error)
	deaf      bool // to a cancelled context
}

func (m *model) open(ctx context.Context, r forge.Repo) (*repo, error) {
	if err := ctx.Err(); err != nil && !m.fault.deaf {
		return nil, err
	}
	err := r.Validate()
	found := m.repos[r.FullName()]
	if err == nil && found == nil {
		err = forge.ErrNotFound
	}
	if m.fault.open != nil {
		return m.fault.open(m, r.FullName(), err)
	}
	return found, err
}

func isCommit(s string) bool {
	_, err := hex.DecodeString(s)
	return err == nil && len(s) == 40 && strings.ToLower(s) == s
}

func (m *model) at(ctx context.Context, r forge.Repo, commit string) (*repo, error) {
	found, err := m.open(ctx, r)
	switch {
	case err != nil:
		return nil, err
	case !isCommit(commit):
		return nil, forge.ErrInvalid
	case found.commits[commit] == nil:
		return found, forge.ErrNotFound
	}
	return found, nil
}

func (m *model) Resolve(ctx context.Context, r forge.Repo, ref string) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	found, err := m.open(ctx, r)
	if err != nil {
		return "", err
	}
	got, err := "", forge.ErrNotFound
	if ref == "" || ref[0] == '-' || strings.ContainsAny(ref, " \n\x00:^") || strings.Contains(ref, "..") {
		err = forge.ErrInvalid
	}
	for _, name := range []string{ref, "refs/tags/" + ref, "refs/heads/" + ref} {
		if c := found.refs[name]; c != "" {
			got, err = c, nil
		}
	}
	if found.commits[ref] != nil {
		got, err = ref, nil
	}
	if m.fault.resolve != nil {
		return m.fault.resolve(ref, got, err)
	}
	return got, err
}

func validPath(name string) bool {
	return name != "" && name != "." && path.Clean("/"+name) == "/"+name && !strings.ContainsRune(name, 0) && !strings.HasPrefix(name, ".git/")
}

func (m *model) ReadFile(ctx context.Context, r forge.Repo, commit, name string) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	found, err := m.at(ctx, r, commit)
	var got []byte
	if err == nil {
		got, err = read(found.commits[commit], name)
	}
	if m.fault.readFile != nil && found != nil {
		return m.fault.readFile(m, found, commit, name, got, err)
	}
	return got, err
}

func read(files map[string]forgetest.File, name string) ([]byte, error) {
	file, ok := files[name]
	switch {
	case !validPath(name):
		return nil, forge.ErrInvalid
	case ok && file.Mode == forgetest.Symlink:
		return nil, forge.ErrInvalid
	case len(file.Content) > forge.MaxFileBytes:
		return nil, forge.ErrTooLarge
	case ok:
		return []byte(file.Content), nil
	}
	for other := range files {
		if strings.HasPrefix(other, name+"/") {
			return nil, forge.ErrInvalid
		}
	}
	return nil, forge.ErrNotFound
}

func (m *model) ListFiles(ctx context.Context, r forge.Repo, commit, dir string) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	found, err := m.at(ctx, r, commit)
	if err == nil && dir != "" && !validPath(dir) {
		err = forge.ErrInvalid
	}
	var got []string
	if err == nil {
		for name, file := range found.commits[commit] {
			in, base := path.Split(name)
			if strings.TrimSuffix(in, "/") == dir && file.Mode != forgetest.Symlink {
				got = append(got, base)
			}
		}
		slices.Sort(got)
	}
	if m.fault.listFiles != nil && found != nil {
		return m.fault.listFiles(found, commit, dir, got, err)
	}
	return got, err
}

func (m *model) CloneInfo(ctx context.Context, r forge.Repo, _ forge.CloneOptions) (forge.Clone, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, err := m.open(ctx, r); err != nil {
		return forge.Clone{}, err
	}
	revoked := false
	c := forge.Clone{URL: "https://model/" + r.FullName(), Header: map[string]string{"valid": "yes"}}
	c.Revoke = func(context.Context) error {
		revoked = true
		c.Header["valid"] = fmt.Sprint(!revoked)
		return nil
	}
	if m.fault.clone != nil {
		c = m.fault.clone(c)
	}
	return c, nil
}

func (m *model) ReportStatus(ctx context.Context, r forge.Repo, commit string, s forge.Status) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	found, err := m.at(ctx, r, commit)
	if err == nil {
		err = s.Validate()
	}
	if m.fault.report != nil && found != nil {
		if handled, err := m.fault.report(found, commit, s); handled {
			return err
		}
	}
	if err == nil && s.Version > found.statuses[commit][s.Key].Version {
		found.put(commit, s.Key, s)
	}
	return err
}

func (r *repo) put(commit, key string, s forge.Status) {
	if r.statuses[commit] == nil {
		r.statuses[commit] = map[string]forge.Status{}
	}
	r.statuses[commit][key] = s
}

func (m *model) Heads(ctx context.Context, r forge.Repo) (map[string]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	found, err := m.open(ctx, r)
	if err != nil {
		return nil, err
	}
	heads := maps.Clone(found.refs)
	if m.fault.heads != nil {
		heads = m.fault.heads(heads)
	}
	return heads, nil
}

func (m *model) ChangedPaths(ctx context.Context, r forge.Repo, base, head string, limit int) ([]string, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	found, err := m.at(ctx, r, head)
	if err == nil && strings.Trim(base, "0") != "" {
		_, err = m.at(ctx, r, base)
	}
	var got []string
	if err == nil {
		a, b := found.commits[base], found.commits[head]
		for name := range a {
			if b[name] != a[name] {
				got = append(got, name)
			}
		}
		for name := range b {
			if _, ok := a[name]; !ok {
				got = append(got, name)
			}
		}
		slices.Sort(got)
		got = slices.Compact(got)
	}
	cut := len(got) > limit
	full := got
	if cut {
		got = got[:limit]
	}
	if m.fault.changed != nil {
		return m.fault.changed(base, limit, full, cut, err)
	}
	return got, cut, err
}

func (m *model) Capabilities() forge.Capabilities {
	return forge.Capabilities{Statuses: true, Webhooks: m.fault.webhook == nil}
}
func (m *model) Close() error { return nil }

func fixture(f fault) forgetest.Fixture {
	m := &model{repos: map[string]*repo{}, fault: f}
	return forgetest.Fixture{
		Forge: m,
		Repo: func(_ forgetest.TB, name string) forge.Repo {
			m.repos["team/"+name] = empty()
			return forge.Repo{Owner: "team", Name: name}
		},
		Commit: func(_ forgetest.TB, r forge.Repo, branch string, files map[string]forgetest.File) string {
			return m.repos[r.FullName()].commit("refs/heads/"+branch, files)
		},
		Tag: func(_ forgetest.TB, r forge.Repo, name, commit string, _ bool) {
			m.repos[r.FullName()].refs["refs/tags/"+name] = commit
		},
		Fetch: func(_ forgetest.TB, c forge.Clone, commit, name string) (string, error) {
			if c.Header["valid"] != "yes" {
				return "", forge.ErrPermission
			}
			data, err := read(m.repos[strings.TrimPrefix(c.URL, "https://model/")].commits[commit], name)
			return string(data), err
		},
		Statuses: func(_ forgetest.TB, r forge.Repo, commit string) []forge.Status {
			m.mu.Lock()
			defer m.mu.Unlock()
			return slices.Collect(maps.Values(m.repos[r.FullName()].statuses[commit]))
		},
		Webhooks:    m.webhooks(),
		PullRequest: m.pullRequest,
		WebhookURL:  "https://ci.example.org/webhooks/model",
		Comments:    m.commentsOf,
		User:        m.user,
	}
}

func (r *repo) commit(ref string, files map[string]forgetest.File) string {
	files = maps.Clone(files)
	for name, file := range files {
		if file.Mode == "" {
			file.Mode = forgetest.Regular
		}
		files[name] = file
	}
	sum := sha1.Sum(fmt.Append(nil, ref, len(r.commits)))
	commit := hex.EncodeToString(sum[:])
	r.commits[commit] = files
	r.refs[ref] = commit
	return commit
}

func TestModel(t *testing.T) {
	for name, f := range map[string]fault{"webhooks": {}, "no webhooks": {webhook: errors.ErrUnsupported}} {
		t.Run(name, func(t *testing.T) {
			forgetest.Run(t, forgetest.Harness{New: func(forgetest.TB) forgetest.Fixture { return fixture(f) }})
		})
	}
}

// recorder is a TB that keeps failures to itself.
type recorder struct {
	*testing.T
	mu     sync.Mutex
	failed bool
}

func (r *recorder) Errorf(string, ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed = true
}

func (r *recorder) Fatalf(string, ...any) {
	r.Errorf("")
	runtime.Goexit()
}

// faults are at least one broken driver per check.
var faults = map[string][]fault{
	"Resolve": {{resolve: func(ref, got string, err error) (string, error) {
		if ref == "v2" { // the tag object's name
			return strings.Repeat("b", 40), nil
		}
		return got, err
	}}},
	"ResolveRefuses": {
		{resolve: func(_, got string, err error) (string, error) { return got, swap(err, forge.ErrInvalid, nil) }},
		{resolve: func(_, got string, err error) (string, error) { return got, swap(err, forge.ErrNotFound, nil) }},
	},
	"ReadFile": {{readFile: func(_ *model, _ *repo, _, _ string, got []byte, err error) ([]byte, error) {
		return []byte(strings.ReplaceAll(string(got), "\r\n", "\n")), err
	}}},
	"ReadFileAtCommit": {{readFile: func(_ *model, r *repo, _, name string, _ []byte, _ error) ([]byte, error) {
		return read(r.commits[r.refs["refs/heads/main"]], name)
	}}},
	"ReadFileOddNames": {{readFile: func(_ *model, r *repo, commit, name string, got []byte, err error) ([]byte, error) {
		for other, file := range r.commits[commit] { // names taken for patterns
			if ok, _ := path.Match(name, other); ok && other != name {
				return []byte(file.Content), nil
			}
		}
		return got, err
	}}},
	"ReadFileBound": {
		{readFile: func(_ *model, r *repo, commit, name string, _ []byte, _ error) ([]byte, error) {
			return []byte(r.commits[commit][name].Content), nil
		}},
		{readFile: func(_ *model, _ *repo, _, _ string, got []byte, err error) ([]byte, error) {
			return got[:min(len(got), 1000)], err
		}},
	},
	"ReadFileAbsent": {{readFile: func(_ *model, _ *repo, _, _ string, got []byte, err error) ([]byte, error) {
		return got, swap(err, forge.ErrNotFound, nil)
	}}},
	"ReadFileNotRegular": {{readFile: func(_ *model, r *repo, commit, name string, got []byte, err error) ([]byte, error) {
		if file := r.commits[commit][name]; file.Mode == forgetest.Symlink {
			return []byte(r.commits[commit][file.Content].Content), nil
		}
		return got, err
	}}},
	"ReadFileInvalid": {{readFile: func(_ *model, r *repo, commit, name string, got []byte, err error) ([]byte, error) {
		if errors.Is(err, forge.ErrInvalid) {
			return read(r.commits[commit], strings.TrimPrefix(path.Clean("/"+name), "/"))
		}
		return got, err
	}}},
	"ListFiles": {
		{listFiles: func(r *repo, commit, dir string, got []string, err error) ([]string, error) {
			slices.Reverse(got)
			return got, err
		}},
		{listFiles: func(r *repo, commit, dir string, got []string, err error) ([]string, error) {
			for i, name := range got {
				got[i] = path.Join(dir, name)
			}
			return got, err
		}},
	},
	"ListFilesAbsent": {{listFiles: func(_ *repo, _, _ string, got []string, err error) ([]string, error) {
		if len(got) == 0 && err == nil {
			return nil, forge.ErrNotFound
		}
		return got, err
	}}},
	"UnknownRepo": {{open: func(_ *model, _ string, err error) (*repo, error) { return empty(), err2nil(err, forge.ErrNotFound) }}},
	"InvalidRepo": {{open: func(m *model, name string, err error) (*repo, error) {
		if r := m.repos[strings.TrimPrefix(path.Clean("/"+name), "/")]; r != nil {
			return r, nil
		}
		return empty(), err2nil(err, forge.ErrInvalid)
	}}},
	"Clone": {
		{clone: func(c forge.Clone) forge.Clone { return forge.Clone{} }},
		{clone: func(c forge.Clone) forge.Clone { c.Header = nil; c.Revoke = nil; return c }},
		{clone: func(c forge.Clone) forge.Clone {
			c.Revoke = func(context.Context) error { return nil }
			return c
		}},
	},
	"Context":             {{deaf: true}},
	"WebhooksUnsupported": {{webhook: forge.ErrInvalid}},
	"Statuses": {
		{report: func(*repo, string, forge.Status) (bool, error) { return true, nil }},
		{report: func(r *repo, commit string, s forge.Status) (bool, error) {
			for c := range r.commits {
				r.put(c, s.Key, s)
			}
			return true, nil
		}},
	},
	"StatusIdempotent": {{report: func(r *repo, commit string, s forge.Status) (bool, error) {
		if s.Version == r.statuses[commit][s.Key].Version {
			r.put(commit, s.Key, s)
		}
		return false, nil
	}}},
	"StatusOrder": {
		{report: func(r *repo, commit string, s forge.Status) (bool, error) { r.put(commit, s.Key, s); return true, nil }},
		{report: func(r *repo, commit string, s forge.Status) (bool, error) { // what is over stays
			return r.statuses[commit][s.Key].State.Terminal() && r.statuses[commit][s.Key].State != "", nil
		}},
	},
	"StatusKeys": {{report: func(r *repo, commit string, s forge.Status) (bool, error) {
		r.put(commit, strings.ToLower(s.Key), s)
		return true, nil
	}}},
	"StatusRace": {{report: func(r *repo, commit string, s forge.Status) (bool, error) {
		return s.Version == 16, nil // the last one is lost
	}}},
	"StatusInvalid": {
		{report: func(r *repo, commit string, s forge.Status) (bool, error) {
			return s.Validate() != nil, nil
		}},
		{report: func(r *repo, commit string, s forge.Status) (bool, error) {
			return r.commits[commit] == nil, nil
		}},
	},
	"Heads": {{heads: func(heads map[string]string) map[string]string {
		maps.DeleteFunc(heads, func(ref, _ string) bool { return strings.HasPrefix(ref, "refs/tags/") })
		return heads
	}}},
	"ChangedPaths": {
		{changed: func(base string, _ int, got []string, cut bool, err error) ([]string, bool, error) {
			if strings.Trim(base, "0") == "" {
				return nil, false, nil
			}
			return got, cut, err
		}},
		{changed: func(_ string, _ int, got []string, cut bool, err error) ([]string, bool, error) {
			return slices.DeleteFunc(got, func(name string) bool { return name == "old/name" }), cut, err
		}},
	},
	"ChangedPathsLimit": {
		{changed: func(_ string, limit int, got []string, _ bool, err error) ([]string, bool, error) {
			return got[:min(limit, len(got))], false, err
		}},
		{changed: func(_ string, limit int, got []string, _ bool, err error) ([]string, bool, error) {
			return got[:min(limit, len(got))], len(got) >= limit, err
		}},
		{changed: func(_ string, _ int, got []string, cut bool, err error) ([]string, bool, error) { return got, cut, err }},
	},
	"WebhookEvents":    {{bug: "another commit"}, {bug: "another repository"}},
	"WebhookErrors":    {{bug: "ignores nothing"}, {bug: "gives no reason"}, {bug: "ignores what is malformed"}},
	"WebhookForged":    {{bug: "verifies nothing"}, {bug: "compares a prefix"}, {bug: "needs no signature"}, {bug: "ignores before it verifies"}, {bug: "trims the body"}},
	"WebhookSecret":    {{bug: "takes an empty secret"}, {bug: "keeps the error"}, {bug: "asks for the name"}, {bug: "ignores before it verifies"}},
	"WebhookReplay":    {{bug: "makes up a delivery"}},
	"WebhookTruncated": {{bug: "ignores what is malformed"}, {bug: "takes a broken body for its end"}},
	"WebhookOversized": {{bug: "cuts the body"}, {bug: "reads on"}},
	"WebhookContext":   {{deaf: true}},
	"WebhookHostile":   {{bug: "panics"}, {bug: "does not validate"}},
	"Merge":            {{bug: "merges nothing"}, {bug: "takes the old base"}},
	"MergeConflict":    {{bug: "settles conflicts"}, {bug: "any pull request"}},
	"Comment":          {{bug: "adds"}, {bug: "takes a prefix of the key"}, {bug: "takes any key"}, {bug: "any pull request"}},
	"MayApprove":       {{bug: "goes by login"}, {bug: "trusts strangers"}},
	"PullRequests":     {{bug: "lists the oldest first"}, {bug: "lists all"}, {bug: "lists none"}, {bug: "lists the base"}, {bug: "lists what is absent"}},

	"PullRequestsAsWebhooks": {{bug: "lists nobody"}},
	"Check":                  {{bug: "complains"}, {bug: "says nothing"}, {bug: "says an error"}, {bug: "sighs"}},
	"CheckFinds":             {{bug: "praises"}, {bug: "knows no advice"}, {bug: "looks for no webhook"}, {bug: "takes its time"}},
	"ForgetStatuses":         {{bug: "forgets all"}, {bug: "forgets once"}, {bug: "forgets nothing"}},
}

// swap replaces an error by another.
func swap(err, from, to error) error {
	if errors.Is(err, from) {
		return to
	}
	return err
}

func err2nil(err, from error) error { return swap(err, from, nil) }

func empty() *repo {
	return &repo{
		commits: map[string]map[string]forgetest.File{}, refs: map[string]string{}, statuses: map[string]map[string]forge.Status{},
		comments: map[int][][2]string{}, users: map[string]bool{},
	}
}

func TestEveryCheckBites(t *testing.T) {
	for _, c := range forgetest.Checks() {
		t.Run(c.Name, func(t *testing.T) {
			if len(faults[c.Name]) == 0 {
				t.Fatal("no broken driver shows that this check bites")
			}
			for i, f := range faults[c.Name] {
				r := &recorder{T: t}
				done := make(chan struct{})
				go func() {
					defer close(done)
					c.Run(r, fixture(f))
				}()
				<-done
				if !r.failed {
					t.Errorf("broken driver %d passes", i)
				}
			}
		})
	}
}
