package main

import (
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/solstice-ci/solstice-go/forge/remoteforge"
	"github.com/solstice-ci/solstice-go/internal/fakeforge"                     //nolint:depguard // the test is not part of the main that is copied
	fakeforgejo "github.com/solstice-ci/solstice-go/internal/fakeforge/forgejo" //nolint:depguard // the same
	fakegithub "github.com/solstice-ci/solstice-go/internal/fakeforge/github"   //nolint:depguard // the same
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
	"github.com/solstice-ci/solstice-go/solstice/integration"
)

// faults of a forge while it is told: refused twice, led elsewhere, taken and not
// answered or by half.
func faults(method, path string) []fakeforge.Fault {
	return []fakeforge.Fault{
		{Method: method, Path: path, Status: http.StatusBadGateway},
		{Method: method, Path: path, Lose: true},
		{Method: method, Path: path, Slow: true},
		{Method: method, Path: path, Redirect: "http://127.0.0.1:9/elsewhere"},
		{Method: method, Path: path, Status: http.StatusTooManyRequests, Header: map[string]string{"Retry-After": "1"}},
	}
}

// TestIntegrations: forges whose credentials two daemons hold, and an orchestrator
// that reaches them through these alone.
func TestIntegrations(t *testing.T) {
	f := newFleet(t)
	t.Run("forgejo", f.testForgejo)
	t.Run("github", f.testGitHub)
}

const hello = "jobs: { test: { matrix: { n: [1, 2] }, steps: [{ run: 'cat hello' }] } }\n"

func (f *fleet) testForgejo(t *testing.T) {
	t.Parallel()
	contexts := []string{"solstice/workflow", "solstice/workflow/test (n 1)", "solstice/workflow/test (n 2)"}
	// states are those that people saw beside a commit for a context, in order.
	states := func(commit, context string) (states []string, last fakeforgejo.Status) {
		for _, s := range f.forgejo.Statuses("acme/widget", commit) {
			if s.Context == context {
				states, last = append(states, s.State), s
			}
		}
		return states, last
	}
	succeeds := func(commit string) {
		t.Helper()
		for _, context := range contexts {
			eventually(t, "success of "+context, func() bool { _, s := states(commit, context); return s.State == "success" })
			if all, _ := states(commit, context); slices.ContainsFunc(all[slices.Index(all, "success"):], func(s string) bool { return s != "success" }) {
				t.Errorf("%s: %v", context, all)
			}
		}
		if runs := f.runs(t, "codeberg", commit); len(runs) != 1 || runs[0].GetEvent() != "push" {
			t.Errorf("runs: %v", runs)
		}
	}
	push := func(text string) string {
		t.Helper()
		c := commit(t, f.forgejo.Repos, "main", map[string]string{".solstice/workflow.yaml": hello, "hello": text})
		f.pushToForgejo(t, c)
		return c
	}
	o := f.owners.forgejo

	for _, fault := range faults(http.MethodPost, "/statuses/") {
		f.forgejo.Faults.Add(fault)
	}
	first := push("hello, forge\n")
	succeeds(first)
	if n := f.forgejo.Faults.Pending(); n > 0 {
		t.Errorf("%d faults did not happen", n)
	}
	for path, want := range map[string]string{"/healthz": "ok", "/readyz": "ok", "/metrics": "solstice_webhooks"} {
		if code, text := get(t, "http://"+o.http+path); code != http.StatusOK || !strings.Contains(text, want) {
			t.Errorf("%s: %d %.200s", path, code, text)
		}
	}

	// The orchestrator takes none of its webhooks; whoever reaches the socket may
	// have one looked at.
	body, err := f.forgejo.Push(t.Context(), f.web.forgejo.URL, "acme/widget", "refs/heads/main", strings.Repeat("0", 40), first)
	if err != nil {
		t.Fatal(err)
	}
	request := func(to string) *http.Request {
		t.Helper()
		r, err := fakeforgejo.Request(t.Context(), "http://"+to+"/webhooks/codeberg", "push", "asked", body, []byte("s3cret"))
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if code, text := answered(t, request(f.orchestrator.Said("http_addr")), nil); code != http.StatusNotFound {
		t.Errorf("a webhook to the orchestrator: %d %s", code, text)
	}
	remote, err := remoteforge.Open(t.Context(), remoteforge.Config{Target: "unix:" + filepath.Join(filepath.Dir(o.dir), "codeberg.sock")})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = remote.Close() }()
	if ev, err := remote.ParseWebhook(t.Context(), request("x"), nil); err != nil || ev.Commit != first {
		t.Errorf("a webhook by the socket: %+v, %v", ev, err)
	}

	// Killed as soon as it has taken a webhook; and ended in good order, by which
	// time the queue has what was asked for.
	second := push("after a crash\n")
	o.Stop(syscall.SIGKILL)
	o.start(t)
	succeeds(second)
	third := push("after a stop\n")
	o.stop(t)
	o.start(t)
	succeeds(third)

	t.Run("commands", func(t *testing.T) { f.testCommands(t, third) })
}

// testCommands: those of forge-integration, beside the daemon.
func (f *fleet) testCommands(t *testing.T, last string) {
	o := f.owners.forgejo
	do := func(want int, args ...string) (string, string) {
		t.Helper()
		stdout, stderr, code := said(t, o.program, append(args, o.args...)...)
		if code != want {
			t.Fatalf("%v: %d, not %d\n%s%s", args, code, want, stdout, stderr)
		}
		return stdout, stderr
	}

	var list struct{ Deliveries []integration.Delivery }
	stdout, _ := do(0, "deliveries", "list", "--json")
	if err := json.Unmarshal([]byte(stdout), &list); err != nil || len(list.Deliveries) != 3 || list.Deliveries[0].State != "accepted" {
		t.Fatalf("%v: %s", err, stdout)
	}
	if stdout, _ = do(0, "deliveries", "show", list.Deliveries[0].ID); !strings.Contains(stdout, last) {
		t.Errorf("show: %s", stdout)
	}
	do(0, "deliveries", "replay", list.Deliveries[0].ID)
	eventually(t, "the run of a replay", func() bool { return len(f.runs(t, "codeberg", last)) == 2 })

	clone := filepath.Join(t.TempDir(), "clone")
	dir, err := f.forgejo.Repos.Dir("acme/widget")
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"clone", "-q", "-b", "main", dir, clone},
		{"-C", clone, "remote", "set-url", "origin", f.web.forgejo.URL + "/acme/widget.git"},
	} {
		if out, err := exec.Command("git", args...).CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v\n%s", args, err, out)
		}
	}
	for range 2 { // a repeat starts nothing more
		if stdout, _ = do(0, "enqueue", "-C", clone, "--idempotency-key", "once"); !strings.HasPrefix(stdout, "sent to runrequest: codeberg acme/widget refs/heads/main "+last) {
			t.Errorf("enqueue: %s", stdout)
		}
	}
	do(0, "enqueue", "--repo", "acme/widget", "--ref", "main", "--idempotency-key", "another")
	manual := func() (n int) {
		for _, r := range f.runs(t, "codeberg", last) {
			if r.GetEvent() == "manual" {
				n++
			}
		}
		return n
	}
	eventually(t, "the runs of enqueue", func() bool { return manual() >= 2 })
	if n := manual(); n != 2 {
		t.Errorf("%d runs of enqueue", n)
	}
	if out, err := exec.Command("git", "-C", clone, "-c", "user.name=u", "-c", "user.email=u@example.com", "commit", "-q", "--allow-empty", "-m", "here only").CombinedOutput(); err != nil {
		t.Fatalf("git: %v\n%s", err, out)
	}
	if _, stderr := do(1, "enqueue", "-C", clone); !strings.Contains(stderr, "push it first") {
		t.Errorf("enqueue of what is here only: %s", stderr)
	}

	stdout, stderr, _ := said(t, o.program, append([]string{"check", "--json"}, o.args...)...)
	var report struct {
		Findings []struct{ Forge, Level, What string }
	}
	if err := json.Unmarshal([]byte(stdout), &report); err != nil {
		t.Fatalf("%v: %s%s", err, stdout, stderr)
	}
	for _, want := range []string{"the database is there", "the queue is there", "the last webhook came at "} {
		if i := strings.Index(stdout, want); i < 0 {
			t.Errorf("check does not say that %s: %s", want, stdout)
		}
	}
}

func (f *fleet) testGitHub(t *testing.T) {
	t.Parallel()
	repos, base := f.github.Repos, f.web.github.URL
	alice, mallory := fakegithub.User{ID: 8, Login: "alice"}, fakegithub.User{ID: 7, Login: "mallory"}
	f.github.SetUser(alice.ID, alice.Login)
	f.github.SetUser(mallory.ID, mallory.Login)
	f.github.SetPermission("acme/widget", alice.Login, "write")
	check := func(commit, name string) (run fakegithub.CheckRun) {
		for _, c := range f.github.CheckRuns("acme/widget", commit, true) {
			if c.Name == name {
				run = c
			}
		}
		return run
	}
	ends := func(commit, name, conclusion string) fakegithub.CheckRun {
		t.Helper()
		eventually(t, conclusion+" of "+name, func() bool {
			c := check(commit, name).Conclusion
			return c != nil && *c == conclusion
		})
		return check(commit, name)
	}
	push := func(branch string, files map[string]string) string {
		t.Helper()
		c := commit(t, repos, branch, files)
		f.tellGitHub(t, "push", fakegithub.Push(base, "acme/widget", "refs/heads/"+branch, strings.Repeat("0", 40), c, alice))
		return c
	}
	// seen is what GitHub was told of each name, in order.
	var mu sync.Mutex
	seen := map[string][]string{}
	f.github.Observe = func(_, pattern string, body []byte) {
		var c struct{ Name, Status, Conclusion string }
		if strings.Contains(pattern, "/check-runs") && json.Unmarshal(body, &c) == nil {
			mu.Lock()
			defer mu.Unlock()
			seen[c.Name] = append(seen[c.Name], c.Status+c.Conclusion)
		}
	}

	// It fails, and not when it is run again by GitHub's own button.
	gate := filepath.Join(t.TempDir(), "gate")
	for _, fault := range faults("", "/check-runs") {
		f.github.Faults.Add(fault)
	}
	main := push("main", map[string]string{".solstice/workflow.yaml": "jobs: { test: { steps: [{ run: 'test -e " + gate + "' }] } }\n"})
	const job, whole = "solstice/workflow/test", "solstice/workflow"
	ends(main, job, "failure")
	failed := ends(main, whole, "failure")
	if n := f.github.Faults.Pending(); n > 0 {
		t.Errorf("%d faults did not happen", n)
	}
	mu.Lock()
	for _, name := range []string{job, whole} {
		ended := slices.Index(seen[name], "completedfailure")
		if ended < 0 || slices.ContainsFunc(seen[name][ended:], func(s string) bool { return s != "completedfailure" }) {
			t.Errorf("%s: %v", name, seen[name])
		}
		if all := f.github.CheckRuns("acme/widget", main, false); len(all) != 2 {
			t.Errorf("%d check runs for two names", len(all))
		}
	}
	mu.Unlock()
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f.tellGitHub(t, "check_run", fakegithub.Button(base, failed, "rerequested", alice))
	ends(main, job, "success")
	ends(main, whole, "success")
	if runs := f.runs(t, "github", main); len(runs) != 2 {
		t.Errorf("runs: %v", runs)
	}

	// One that does not end is cancelled by its button.
	forever := push("forever", map[string]string{".solstice/workflow.yaml": "jobs: { test: { steps: [{ run: 'while :; do sleep 0.1; done' }] } }\n"})
	eventually(t, "a job under way", func() bool {
		return check(forever, job).Status == "in_progress" && len(check(forever, whole).Actions) > 0
	})
	f.tellGitHub(t, "check_run", fakegithub.Button(base, check(forever, whole), "cancel", alice))
	ends(forever, job, "cancelled")
	ends(forever, whole, "cancelled")

	// A broken workflow is said at its line.
	broken := push("broken", map[string]string{".solstice/workflow.yaml": "jobs: { test: { stesp: [] } }\n"})
	if c := ends(broken, whole, "failure"); len(c.Annotations) == 0 || c.Annotations[0].Path != ".solstice/workflow.yaml" || c.Annotations[0].StartLine != 1 {
		t.Errorf("annotations: %+v", c.Annotations)
	}

	// A stranger's pull request waits for the button, which is not for strangers.
	head := commit(t, repos, "change", map[string]string{".solstice/workflow.yaml": "jobs: { evil: { steps: [{ run: 'true' }] } }\n"}, main)
	number := f.github.OpenPull("acme/widget", "change", "main")
	f.tellGitHub(t, "pull_request", fakegithub.PullRequest(base, "acme/widget", "mallory/widget", "opened", number, "change", head, "main", main, mallory))
	waits := ends(head, whole, "action_required")
	f.tellGitHub(t, "check_run", fakegithub.Button(base, waits, "approve", mallory))
	f.tellGitHub(t, "check_run", fakegithub.Button(base, waits, "approve", alice))
	ends(head, job, "success")
	ends(head, whole, "success")
	if c := check(head, "solstice/workflow/evil"); c.ID != 0 {
		t.Errorf("a stranger's workflow ran: %+v", c)
	}
	if runs := f.runs(t, "github", ""); slices.ContainsFunc(runs, func(r *pb.Run) bool { return r.GetCommit() == "" }) || len(runs) != 5 {
		t.Errorf("runs: %v", runs)
	}
	f.owners.github.stop(t)
}

// TestStart: what is wrong is said before anything begins.
func TestStart(t *testing.T) {
	dir := written(t, map[string]string{
		"token": "t", "empty": "",
		"ok.yaml":    "forges: { a: { driver: forgejo, url: 'http://127.0.0.1:1', token_file: token } }\n",
		"tcp.yaml":   "forges: { a: { driver: forgejo, url: 'http://127.0.0.1:1', token_file: token, serve: '127.0.0.1:0' } }\n",
		"owned.yaml": "forges: { a: { driver: forgejo, url: 'http://127.0.0.1:1', token_file: token, owned_elsewhere: true } }\n",
	})
	in := func(name string) string { return filepath.Join(dir, name) }
	closed := "amqp://127.0.0.1:1/"
	for name, c := range map[string]struct {
		program string
		args    []string
		code    int
		want    string
	}{
		"no queue":            {"forge-integration", []string{"--forges", in("ok.yaml")}, 2, "--amqp-url"},
		"queue away":          {"forge-integration", []string{"--forges", in("ok.yaml"), "--amqp-url", closed}, 1, "no RabbitMQ answers"},
		"TCP without TLS":     {"forge-integration", []string{"--forges", in("tcp.yaml"), "--amqp-url", closed}, 2, "needs certificates on both sides"},
		"no forges":           {"forge-integration", []string{"enqueue", "--repo", "a/b"}, 2, "--forges"},
		"owned elsewhere":     {"forge-integration", []string{"check", "--forges", in("owned.yaml")}, 2, "is owned elsewhere"},
		"no deliveries yet":   {"forge-integration", []string{"deliveries", "list"}, 2, "there is no database"},
		"nothing to match":    {"forge-integration", []string{"enqueue", "-C", dir, "--forges", in("ok.yaml")}, 2, "give --repo"},
		"retention":           {"forge-integration", []string{"--forges", in("ok.yaml"), "--retain-deliveries", "1m"}, 2, "at least an hour"},
		"no credentials":      {"github-integration", []string{"check"}, 2, "--github-token-file"},
		"half an App":         {"github-integration", []string{"check", "--github-app-id=1"}, 2, "--github-app-key-file"},
		"two credentials":     {"github-integration", []string{"check", "--github-token=t", "--github-token-file", in("token")}, 2, "both given"},
		"an empty secret":     {"github-integration", []string{"check", "--github-token=t", "--webhook-secret-file", in("empty")}, 1, "is empty"},
		"a name with a slash": {"github-integration", []string{"check", "--github-token=t", "--name=a/b"}, 2, "no name of a forge"},
		"nowhere":             {"github-integration", []string{"check", "--github-token=t", "--listen=x"}, 2, "unix:PATH or HOST:PORT"},
	} {
		state := filepath.Join(t.TempDir(), "state")
		_, stderr, code := said(t, c.program, append(c.args, "--state-dir", state)...)
		if code != c.code || !strings.Contains(stderr, c.want) {
			t.Errorf("%s: %d\n%s", name, code, stderr)
		}
	}

	// Check says all of it.
	stdout, _, code := said(t, "forge-integration", "check", "--state-dir", in("none"), "--forges", in("ok.yaml"), "--amqp-url", closed)
	if code != 1 {
		t.Errorf("check: %d", code)
	}
	for _, want := range []string{"there is no database", "the queue cannot be used", "there is no secret of webhooks", "the allow-list is empty"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("check does not say %q:\n%s", want, stdout)
		}
	}
}
