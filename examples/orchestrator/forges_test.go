package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/internal/fakeforge"              //nolint:depguard // the test is not part of the main that is copied
	fake "github.com/solstice-ci/solstice-go/internal/fakeforge/forgejo" //nolint:depguard // the same
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
)

// forgejo is a forge, and an orchestrator that has it.
type forgejo struct {
	*process
	t      *testing.T
	server *fake.Server
	web    *httptest.Server
	args   []string
	sent   int
}

func newForgejo(t *testing.T, repos ...string) *forgejo {
	t.Helper()
	server, err := fake.New(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	f := &forgejo{t: t, server: server, web: httptest.NewServer(server.Handler())}
	t.Cleanup(f.web.Close)
	for _, repo := range repos {
		if err := server.Repos.Create(t.Context(), repo); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	for name, text := range map[string]string{
		"token": server.Token + "\n", "secret": "s3cret\n",
		"forges.yaml": "forges: { codeberg: { driver: forgejo, url: '" + f.web.URL + "', token_file: token, webhook_secret_file: secret, allow: [acme] } }\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f.args = []string{"--forges", filepath.Join(dir, "forges.yaml"), "--public-url", publicURL}
	return f
}

// configure writes the file of forges, with one more key.
func (f *forgejo) configure(more string) {
	f.t.Helper()
	text := "forges: { codeberg: { driver: forgejo, url: '" + f.web.URL + "', token_file: token, webhook_secret_file: secret, allow: [acme], " + more + " } }\n"
	if err := os.WriteFile(f.args[1], []byte(text), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

func (f *forgejo) commit(ref string, files map[string]string) string {
	f.t.Helper()
	tree := map[string]fakeforge.File{}
	for name, content := range files {
		tree[name] = fakeforge.File{Content: content}
	}
	c, err := f.server.Repos.Commit(f.t.Context(), "acme/widget", ref, tree)
	if err != nil {
		f.t.Fatal(err)
	}
	return c
}

// post delivers a webhook.
func (f *forgejo) post(event, delivery string, body []byte, secret string) (int, string) {
	f.t.Helper()
	r, err := fake.Request(f.t.Context(), "http://"+f.http+"/webhooks/codeberg", event, delivery, body, []byte(secret))
	if err != nil {
		f.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		f.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		f.t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

func (f *forgejo) push(commit string) []byte {
	f.t.Helper()
	body, err := f.server.Push(f.t.Context(), f.web.URL, "acme/widget", "refs/heads/main", strings.Repeat("0", 40), commit)
	if err != nil {
		f.t.Fatal(err)
	}
	return body
}

func (f *forgejo) deliver(event string, body []byte) {
	f.t.Helper()
	f.sent++
	if code, text := f.post(event, fmt.Sprintf("delivery-%d", f.sent), body, "s3cret"); code != http.StatusAccepted || !strings.HasPrefix(text, "accepted") {
		f.t.Fatalf("%s: %d %s", event, code, text)
	}
}

// states are those that people saw beside a commit for a context, in order.
func (f *forgejo) states(commit, context string) (states []string, last fake.Status) {
	for _, s := range f.server.Statuses("acme/widget", commit) {
		if s.Context == context {
			states, last = append(states, s.State), s
		}
	}
	return states, last
}

func (f *forgejo) eventually(what string, ok func() bool) {
	f.t.Helper()
	for began := time.Now(); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Since(began) > patience {
			f.t.Fatalf("in vain: %s", what)
		}
	}
}

// publicURL is what statuses link to.
const publicURL = "https://ci.example.org"

// linked is what is behind a status' link.
func (f *forgejo) linked(s fake.Status) string {
	f.t.Helper()
	path, ok := strings.CutPrefix(s.TargetURL, publicURL)
	if !ok {
		f.t.Fatalf("%s links to %q", s.Context, s.TargetURL)
	}
	r, err := http.NewRequestWithContext(f.t.Context(), http.MethodGet, "http://"+f.http+path, nil)
	if err != nil {
		f.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		f.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		f.t.Fatalf("%s: %s, %v", s.TargetURL, resp.Status, err)
	}
	return string(text)
}

const hello = "jobs: { test: { matrix: { n: [1, 2] }, steps: [{ run: 'cat hello' }] } }\n"

// TestForge: pushes and pull requests at a forge become runs, whose results stand
// beside the commits, in order and once, whatever goes wrong in between.
func TestForge(t *testing.T) {
	f := newForgejo(t, "acme/widget")
	f.process = start(t, t.TempDir(), f.args...)
	c, ctx := f.client()
	runs := func() []*pb.Run {
		t.Helper()
		resp, err := c.ListRuns(ctx, &pb.ListRunsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetRuns()
	}

	// The forge answers some reports with errors, and one not at all.
	for _, fault := range []fakeforge.Fault{
		{Method: http.MethodPost, Path: "/statuses/", Status: http.StatusBadGateway},
		{Method: http.MethodPost, Path: "/statuses/", Lose: true},
		{Method: http.MethodPost, Path: "/statuses/", Status: http.StatusTooManyRequests, Header: map[string]string{"Retry-After": "1"}},
	} {
		f.server.Faults.Add(fault)
	}
	commit := f.commit("main", map[string]string{".solstice/workflow.yaml": hello, "hello": "hello, forge\n"})
	body := f.push(commit)
	f.deliver("push", body)
	if code, text := f.post("push", "delivery-1", body, "s3cret"); code != http.StatusAccepted || !strings.HasPrefix(text, "duplicate") {
		t.Errorf("the same again: %d %s", code, text)
	}
	if code, _ := f.post("push", "forged", body, "another secret"); code != http.StatusUnauthorized {
		t.Errorf("forged: %d", code)
	}
	contexts := []string{"solstice/workflow", "solstice/workflow/test (n 1)", "solstice/workflow/test (n 2)"}
	for _, context := range contexts {
		f.eventually("success of "+context, func() bool { _, s := f.states(commit, context); return s.State == "success" })
		states, last := f.states(commit, context)
		if i := slices.Index(states, "success"); i < 0 || slices.ContainsFunc(states[i:], func(s string) bool { return s != "success" }) {
			t.Errorf("%s: %v", context, states)
		}
		if !strings.HasPrefix(last.Description, "Succeeded") {
			t.Errorf("%s: %+v", context, last)
		}
	}
	_, page := f.states(commit, contexts[0])
	_, log := f.states(commit, contexts[1])
	if html, text := f.linked(page), f.linked(log); !strings.Contains(html, "test (n 2)") || !strings.Contains(text, "hello, forge\n=== succeeded ===") {
		t.Errorf("the links lead to %s\nand %s", html, text)
	}
	if n := f.server.Faults.Pending(); n > 0 {
		t.Errorf("%d faults did not happen", n)
	}
	all := runs()
	if len(all) != 1 || all[0].GetCommit() != commit || all[0].GetForge() != "codeberg" || all[0].GetEvent() != "push" {
		t.Fatalf("runs: %v", all)
	}
	job := over(ctx, t, c, all[0].GetId()).GetJobs()[0]
	if log := tail(ctx, t, c, &pb.TailLogRequest{Of: &pb.TailLogRequest_AttemptId{AttemptId: job.GetAttemptId()}}, nil); !strings.Contains(string(log), "hello, forge") {
		t.Errorf("log: %s", log)
	}

	// Whether all is set up is said beside the running orchestrator.
	check := func(want int) string {
		t.Helper()
		cmd := command(t, "--forges", f.args[1], "--state-dir", f.dir, "check", "--webhook-url", publicURL)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != want {
			t.Errorf("check: %v\n%s", err, out)
		}
		return string(out)
	}
	if out := check(0); !strings.Contains(out, "the last webhook came at") {
		t.Errorf("check says %s", out)
	}
	token := filepath.Join(filepath.Dir(f.args[1]), "token")
	if err := os.WriteFile(token, []byte("another\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := check(1); !strings.Contains(out, "failure") || strings.Contains(out, "another") {
		t.Errorf("check of a token that is refused says %s", out)
	}
	if err := os.WriteFile(token, []byte(f.server.Token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}

	// A stranger's pull request waits for somebody who may write, and follows the
	// workflow of the base.
	f.server.SetUser(7, "mallory")
	f.server.SetUser(8, "alice")
	f.server.SetPermission("acme/widget", "alice", "write")
	pull := func(number int, author int64, workflow string) string {
		t.Helper()
		head := f.commit(fmt.Sprintf("refs/pull/%d/head", number), map[string]string{".solstice/workflow.yaml": workflow, "hello": "of a fork\n"})
		b, err := f.server.PullRequest(f.web.URL, "opened", "acme/widget", number, "mallory/widget", "change", head, commit, author)
		if err != nil {
			t.Fatal(err)
		}
		f.deliver("pull_request", b)
		return head
	}
	evil := "jobs: { steal: { steps: [{ run: 'cat hello' }] } }\n"
	head := pull(1, 7, evil)
	f.eventually("a run that waits", func() bool {
		_, s := f.states(head, "solstice/workflow")
		return s.State == "pending" && strings.Contains(s.Description, "Awaits approval: mallory")
	})
	all = runs()
	if len(all) != 2 || all[0].GetState() != pb.RunState_RUN_STATE_AWAITING_APPROVAL {
		t.Fatalf("runs: %v", all)
	}
	if _, err := c.ApproveRun(ctx, &pb.ApproveRunRequest{RunId: all[0].GetId(), Commit: head}); err != nil {
		t.Fatal(err)
	}
	f.eventually("the base's jobs", func() bool { _, s := f.states(head, "solstice/workflow/test (n 1)"); return s.State == "success" })
	if states, _ := f.states(head, "solstice/workflow/steal"); len(states) > 0 {
		t.Errorf("a stranger's workflow ran: %v", states)
	}
	// One who may write needs nobody.
	head = pull(2, 8, strings.Replace(evil, "steal", "own", 1))
	f.eventually("a collaborator's own jobs", func() bool { _, s := f.states(head, "solstice/workflow/own"); return s.State == "success" })

	// A broken workflow is said beside the commit.
	broken := f.commit("main", map[string]string{".solstice/workflow.yaml": "jobs: { test: { stesp: [] } }\n"})
	f.deliver("push", f.push(broken))
	f.eventually("an error", func() bool {
		_, s := f.states(broken, "solstice/workflow")
		return s.State == "error" && strings.Contains(s.Description, "workflow.yaml:1:")
	})

	// Killed as soon as it has taken a webhook, it does what was asked, once.
	last := f.commit("main", map[string]string{".solstice/workflow.yaml": hello, "hello": "after a crash\n"})
	f.deliver("push", f.push(last))
	f.Stop(syscall.SIGKILL)
	f.configure("poll: 1s")
	f.process = start(t, f.dir, f.args...)
	for _, context := range contexts {
		f.eventually("success after a crash of "+context, func() bool { _, s := f.states(last, context); return s.State == "success" })
	}
	c, ctx = f.client()
	once := func(commit string) {
		t.Helper()
		if n := len(slices.DeleteFunc(runs(), func(r *pb.Run) bool { return r.GetCommit() != commit })); n != 1 {
			t.Errorf("%d runs of a push", n)
		}
	}
	once(last)

	// A push whose webhook does not come is found; when it comes after all, it is late.
	missed := f.commit("main", map[string]string{".solstice/workflow.yaml": hello, "hello": "unheard\n"})
	for _, context := range contexts {
		f.eventually("success without a webhook of "+context, func() bool { _, s := f.states(missed, context); return s.State == "success" })
	}
	if code, text := f.post("push", "late", f.push(missed), "s3cret"); code != http.StatusAccepted || !strings.HasPrefix(text, "duplicate") {
		t.Errorf("a late webhook: %d %s", code, text)
	}
	once(missed)
}

// TestForgesFile: a file that cannot be used is said before anything begins.
func TestForgesFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "forges.yaml")
	if err := os.WriteFile(file, []byte("forges: { local: { driver: local, root: '.' } }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ file, want string }{
		"another's name": {file, "the forge local of --forges has the name of the repositories on this machine"},
		"no file":        {file + "x", "no such file"},
	} {
		out, err := command(t, "--state-dir", t.TempDir(), "--grpc-addr=127.0.0.1:0", "--http-addr=127.0.0.1:0", "--agent-addr=127.0.0.1:0", "--runner-addr=127.0.0.1:0", "--forges", c.file).CombinedOutput()
		if err == nil || !strings.Contains(string(out), c.want) {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}
