package main

import (
	"encoding/base64"
	"fmt"
	"log/slog"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/solstice-ci/solstice-go/blobstore/memblob"
	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	"github.com/solstice-ci/solstice-go/queue/memqueue"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
)

const remoteWorkflow = `
name: check
on:
  push: {}
  manual: { inputs: { word: { default: hello } } }
checkout: false
jobs:
  good:
    env: { WORD: "${{ inputs.word }}" }
    steps: [{ run: "printf '%s\\n\\033[2Jraw\\377\\000 end' \"$WORD\"" }]
  bad:
    matrix: { n: [1, 2] }
    steps: [{ name: unit, run: "echo oops; exit 3" }]
`

// goodLog is what the job good prints.
const goodLog = "hello\n\x1b[2Jraw\xff\x00 end"

const stuckWorkflow = `
name: stuck
checkout: false
jobs:
  first: { runs-on: nowhere, steps: [{ run: "true" }] }
  then: { needs: first, steps: [{ run: "true" }] }
`

// TestRuns goes through the life of runs, as people and as programs see it.
func TestRuns(t *testing.T) {
	t.Parallel()
	s := serve(t)
	dir := workflowRepo(t, remoteWorkflow)
	u := s.user(dir)
	head := git(t, dir, "rev-parse", "HEAD")

	r := u.solstice("enqueue", "--follow")
	has(t, "follow", r.stdout, "check (.solstice/workflow.yaml at "+head[:12], "▸ unit", "| oops", "✗ check failed in ", "✓ good", `bad (n 1): step "unit" failed, exit status 3`)
	r.want(t, 1)
	list := decoded[runList](t, u.ok("status", "--json"))
	if len(list.Runs) != 1 || list.Next != "" {
		t.Fatalf("runs %+v", list)
	}
	run := list.Runs[0]
	if run.State != solstice.RunFailed || run.Commit != head || run.Ref != "refs/heads/main" || run.Event != forge.KindManual || "/"+run.Repo.FullName() != dir {
		t.Errorf("run %+v", run)
	}

	t.Run("status", func(t *testing.T) {
		has(t, "list", u.ok("status"), "RUN", "STATE", run.ID[:13], "failed", "check", head[:12], "main")
		out := u.ok("status", run.ID[:13])
		has(t, "run", out, "✗ check failed", run.ID, head[:12]+", refs/heads/main", "✓  good", "✗  bad (n 1)", "bad (n 2), attempt 1: user: step \"unit\": exit status 3")
		full := decoded[runDetails](t, u.ok("status", "--json", run.ID))
		bad := full.Jobs[1]
		if full.ID != run.ID || len(full.Jobs) != 3 || bad.Class != solstice.ClassUser || len(bad.AttemptList) != 1 || bad.AttemptList[0].Steps[0].ExitCode != 3 {
			t.Errorf("details %+v", full)
		}
		r := u.solstice("status", "--watch", run.ID)
		has(t, "watch", r.stdout, "good  succeeded", "check failed")
		r.want(t, 1)
		r = u.solstice("status", "--watch", "--json", run.ID)
		all := documents[solstice.Run](t, r.stdout)
		if last := all[len(all)-1]; last.State != solstice.RunFailed || len(last.Jobs) != 3 {
			t.Errorf("last line %+v", last)
		}
		r.want(t, 1)
	})

	t.Run("logs", func(t *testing.T) {
		good := job(t, decoded[solstice.Run](t, documentOf(t, u, run.ID)), "good")
		for _, c := range []struct {
			name string
			args []string
			want string
		}{
			{"run and job", []string{run.ID[:13], "good"}, goodLog},
			{"following what is over", []string{"-f", run.ID, "good"}, goodLog},
			{"job", []string{good.ID}, goodLog},
			{"beginning of a job", []string{good.ID[:len(good.ID)-1]}, goodLog},
			{"attempt", []string{good.AttemptID}, goodLog},
			{"beginning of an attempt", []string{good.AttemptID[:len(good.AttemptID)-1]}, goodLog},
			{"offset", []string{"--from", "7", good.ID}, goodLog[7:]},
			{"offset, following", []string{"--from", "7", "-f", good.ID}, goodLog[7:]},
			{"offset in an attempt", []string{"--from", "7", "--attempt", "1", good.ID}, goodLog[7:]},
			{"no such attempt", []string{"--attempt", "2", good.ID}, ""},
			{"one of a matrix", []string{run.ID, "bad (n 1)"}, "oops\n"},
			{"all of a matrix", []string{run.ID, "bad"}, "bad (n 1) | oops\nbad (n 2) | oops\n"},
			{"all of a run", []string{run.ID}, "good      | hello\ngood      | raw\ufffd end\nbad (n 1) | oops\nbad (n 2) | oops\n"},
		} {
			r := u.solstice(append([]string{"logs"}, c.args...)...)
			if r.stdout != c.want || r.stderr != "" {
				t.Errorf("%s: got %q and %q, want %q", c.name, r.stdout, r.stderr, c.want)
			}
			r.want(t, 0)
		}
		stamp := `\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z `
		if out := u.ok("logs", "--timestamps", run.ID, "good"); !regexp.MustCompile(`^(?s)` + stamp + `hello\n` + stamp + `\x1b\[2Jraw.*end$`).MatchString(out) {
			t.Errorf("with times: %q", out)
		}
		var bytes []byte
		for _, p := range documents[struct {
			Job     string `json:"job_id"`
			Attempt string `json:"attempt_id"`
			Offset  int
			Time    string
			Step    int
			FD      int `json:"fd"`
			Data    string
		}](t, u.ok("logs", "--json", good.ID)) {
			data, err := base64.StdEncoding.DecodeString(p.Data)
			if err != nil || p.Job != good.ID || p.Attempt != good.AttemptID || p.Offset != len(bytes) || p.FD != 1 || p.Time == "" {
				t.Errorf("piece %+v, %v", p, err)
			}
			bytes = append(bytes, data...)
		}
		if string(bytes) != goodLog {
			t.Errorf("JSON holds %q", bytes)
		}
		for _, c := range []struct {
			args   []string
			code   int
			stderr []string
		}{
			{[]string{run.ID, "nope"}, 1, []string{`no job "nope"`, "good, bad (n 1), bad (n 2)"}},
			{[]string{"00000000-0000"}, 1, []string{"no run, job or attempt 00000000-0000", "solstice status"}},
			{[]string{"short"}, 2, []string{"at least 8 characters"}},
			{[]string{"--from", "1000", run.ID, "good", "-f"}, 1, []string{"beyond the end"}},
			{[]string{"--from=-1", run.ID}, 2, []string{"negative"}},
			{[]string{"--from", "3", run.ID}, 2, []string{"3 jobs are meant", "solstice logs RUN JOB"}},
		} {
			r := u.solstice(append([]string{"logs"}, c.args...)...)
			has(t, "stderr", r.stderr, c.stderr...)
			r.want(t, c.code)
		}
	})

	t.Run("rerun", func(t *testing.T) {
		r := u.solstice("rerun", "--failed", "--idempotency-key", "k", "--follow", run.ID[:13])
		has(t, "follow", r.stdout, "✗ check failed")
		r.want(t, 1)
		again := decoded[solstice.Run](t, u.ok("rerun", "--failed", "--idempotency-key", "k", "--json", run.ID))
		if again.RerunOf != run.ID || job(t, again, "good").CopiedFrom == "" {
			t.Errorf("the rerun of before is %+v", again)
		}
		has(t, "status", u.ok("status", again.ID), "again after "+run.ID, "kept from the run before")
		if out := u.ok("logs", again.ID, "good"); out != goodLog {
			t.Errorf("log of a job that was kept: %q", out)
		}
	})

	t.Run("what waits", func(t *testing.T) {
		stuck := s.user(workflowRepo(t, stuckWorkflow))
		waits := stuck.enqueue("--priority", "5", "--idempotency-key", "once")
		if again := stuck.enqueue("--priority", "5", "--idempotency-key", "once"); again.ID != waits.ID {
			t.Errorf("the same key made run %s, and then %s", waits.ID, again.ID)
		}
		has(t, "status", stuck.ok("status", waits.ID), `no orchestrator that is there has a pool for the label "nowhere"`, "waits for first")
		full := decoded[runDetails](t, stuck.ok("status", "--json", waits.ID))
		if w := full.Jobs[0].Waiting; w == nil || w.Reason != solstice.WaitNoPool {
			t.Errorf("waits: %+v", w)
		}
		r := stuck.solstice("logs", waits.ID, "first")
		has(t, "stderr", r.stderr, "first has no log: it is queued, no orchestrator")
		r.want(t, 0)
		r = stuck.solstice("rerun", waits.ID)
		has(t, "stderr", r.stderr, "cancel it first")
		r.want(t, 1)

		follower := stuck.start("enqueue", "--follow", "--idempotency-key", "once")
		follower.says("stuck (.solstice")
		follower.signal(syscall.SIGINT)
		if code := follower.end(); code != exitInterrupted {
			t.Errorf("an interrupted follower: exit status %d", code)
		}
		<-follower.eof
		has(t, "output", follower.output(), "the run goes on", "solstice cancel "+waits.ID)

		cancelled := decoded[solstice.Run](t, stuck.ok("cancel", "--reason", "not needed", "--json", waits.ID[:18]))
		if cancelled.State != solstice.RunCancelled || cancelled.Reason != "not needed" {
			t.Errorf("cancelled: %+v", cancelled)
		}
		r = stuck.solstice("cancel", waits.ID)
		has(t, "stderr", r.stderr, "over already")
		r.want(t, 0)
		stuck.solstice("status", "--watch", waits.ID).want(t, 1)
	})

	t.Run("lists", func(t *testing.T) {
		first := decoded[runList](t, u.ok("status", "--json", "--limit", "1"))
		if len(first.Runs) != 1 || first.Next != first.Runs[0].ID {
			t.Fatalf("first page %+v", first)
		}
		r := u.solstice("status", "--limit", "1")
		has(t, "stderr", r.stderr, "--page "+first.Next)
		second := decoded[runList](t, u.ok("status", "--json", "--page", first.Next, "--state", "failed", "--repo", dir, "--ref", "refs/heads/main", "--commit", head))
		if len(second.Runs) != 2 || second.Runs[1].ID != run.ID {
			t.Errorf("failed runs before it: %+v", second)
		}
		if none := u.ok("status", "--state", "errored,planning"); none != "no runs\n" {
			t.Errorf("no runs are %q", none)
		}
		u.solstice("status", run.ID, "--state", "failed").want(t, 2)
		u.solstice("status", "--state", "fialed").want(t, 2)
		u.solstice("status", "--limit", "0").want(t, 2)
	})
}

// documentOf is a run as JSON without what only status adds.
func documentOf(t *testing.T, u *user, id string) string {
	t.Helper()
	out := u.solstice("status", "--json", "--watch", id).stdout
	lines := slices.Collect(strings.Lines(out))
	return lines[len(lines)-1]
}

// TestEnqueue: which repository, commit and workflow.
func TestEnqueue(t *testing.T) {
	t.Parallel()
	s := serve(t)
	dir := workflowRepo(t, remoteWorkflow)
	first := git(t, dir, "rev-parse", "HEAD")
	write(t, dir, map[string]string{".solstice/workflows/other.yaml": "name: other\njobs: { a: { runs-on: nowhere, steps: [{ run: 'true' }] } }\n"})
	commit(t, dir)
	git(t, dir, "tag", "v1")
	head := git(t, dir, "rev-parse", "HEAD")
	u := s.user(filepath.Join(dir, ".solstice"))
	for _, c := range []struct {
		name        string
		args        []string
		commit, ref string
		jobs        int
	}{
		{"below the top", []string{"--workflow", "other"}, head, "refs/heads/main", 1},
		{"by the path of the file", []string{"--workflow", ".solstice/workflow.yaml"}, head, "refs/heads/main", 3},
		{"one job, and an input", []string{"--workflow", "check", "--job", "good", "--input", "word=x=y"}, head, "refs/heads/main", 1},
		{"a tag", []string{"--workflow", "other", "--ref", "v1"}, head, "refs/tags/v1", 1},
		{"a commit before", []string{"--ref", first}, first, "", 3},
		{"another directory", []string{"--workflow", "other", "-C", dir}, head, "refs/heads/main", 1},
		{"by name", []string{"--workflow", "other", "--repo", dir, "--forge", "local"}, head, "", 1},
		{"by name and branch", []string{"--workflow", "other", "--repo", strings.TrimPrefix(dir, "/"), "--ref", "main"}, head, "main", 1},
		{"by name and commit", []string{"--repo", dir, "--ref", first}, first, "", 3},
	} {
		run := u.enqueue(c.args...)
		if run.Commit != c.commit || run.Ref != c.ref || len(run.Jobs) != c.jobs || "/"+run.Repo.FullName() != dir {
			t.Errorf("%s: %+v", c.name, run)
		}
	}
	if r := u.solstice("enqueue", "--workflow", "other"); !regexp.MustCompile(`^[0-9a-f-]{36}  queued  other\n$`).MatchString(r.stdout) {
		t.Errorf("printed %q", r.stdout)
	}

	unborn := t.TempDir()
	git(t, unborn, "init", "-q")
	for _, c := range []struct {
		name, dir string
		args      []string
		stderr    []string
	}{
		{"broken workflow", workflowRepo(t, "jobs:\n  a:\n    stepz: []\n"), nil, []string{workflowFile + ":3:5: error:", "nothing was run"}},
		{"no repository", t.TempDir(), nil, []string{"not in a git repository", "--repo NAME"}},
		{"no commit", unborn, nil, []string{"no commits yet"}},
		{"no workflow", repository(t, map[string]string{"README": ""}), nil, []string{"there is nothing to run", "docs/workflows.md"}},
		{"nothing concerned", workflowRepo(t, "on: { tag: {} }\njobs: { a: { steps: [{ run: echo }] } }\n"), nil, []string{"a push to refs/heads/main", "--workflow"}},
		{"unknown workflow", dir, []string{"--workflow", "nope"}, []string{`"nope"`, "other"}},
		{"unknown job", dir, []string{"--workflow", "check", "--job", "godo"}, []string{`"godo"`, "good"}},
		{"unknown input", dir, []string{"--workflow", "check", "--input", "x=y"}, []string{`"x"`}},
		{"unknown ref", dir, []string{"--ref", "nope"}, []string{"cannot find nope"}},
		{"unknown repository", dir, []string{"--repo", "a/b"}, []string{"a/b", "check --repo"}},
		{"unknown forge", dir, []string{"--forge", "hub"}, []string{`no forge "hub"`, "local"}},
		{"priority", dir, []string{"--priority", "1001"}, []string{"between -1000 and 1000"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := s.user(c.dir).solstice(append([]string{"enqueue"}, c.args...)...)
			has(t, "stderr", r.stderr, c.stderr...)
			if r.stdout != "" {
				t.Errorf("stdout: %s", r.stdout)
			}
			r.want(t, 2)
		})
	}
}

// TestApprove: only the commit that was looked at is let in.
func TestApprove(t *testing.T) {
	t.Parallel()
	s := serve(t)
	dir := workflowRepo(t, remoteWorkflow)
	u := s.user(dir)
	id := awaiting(t, s.dir, dir)
	has(t, "status", u.ok("status", id), "awaiting approval", "a stranger's")
	head := git(t, dir, "rev-parse", "HEAD")
	for _, c := range []struct {
		commit, stderr string
		code           int
	}{{head[:6], "too short", 2}, {strings.Repeat("a", 40), "another commit: " + head, 1}} {
		r := u.solstice("approve", id, c.commit)
		has(t, "stderr", r.stderr, c.stderr)
		r.want(t, c.code)
	}
	has(t, "stdout", u.ok("approve", id[:18], head[:7]), id)
	if code := u.over(id); code != 1 { // one of its jobs fails
		t.Errorf("the run that was approved ended with %d", code)
	}
	r := u.solstice("approve", id, head)
	has(t, "stderr", r.stderr, "does not await approval")
	r.want(t, 1)
}

// awaiting makes a run that awaits approval, as a forge would, beside the
// orchestrator on the same state.
func awaiting(t *testing.T, state, repo string) string {
	t.Helper()
	db, err := storage.Database{DBPoolMaxSize: 4, DBPoolTimeoutMS: 30_000}.Open(t.Context(), state, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = db.Close() }()
	root, err := localgit.Open(t.Context(), localgit.Config{Root: "/", StatusDir: filepath.Join(state, "statuses")})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = root.Close() }()
	q := memqueue.New()
	defer func() { _ = q.Close() }()
	eng, err := solstice.New(solstice.Config{DB: db, Queue: q, Blobs: memblob.New(), Forges: map[string]forge.Forge{"local": root}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = eng.Close() }()
	owner, name := filepath.Split(strings.TrimPrefix(repo, "/"))
	runs, err := eng.Submit(t.Context(), solstice.RunRequest{
		Repo: forge.Repo{Owner: strings.TrimSuffix(owner, "/"), Name: name}, AwaitApproval: "a stranger's",
	})
	if err != nil || len(runs) != 1 {
		t.Fatalf("%d runs, %v", len(runs), err)
	}
	return runs[0].ID
}

// TestRoles: what each verb needs, and what is said to those who lack it.
func TestRoles(t *testing.T) {
	t.Parallel()
	s := serve(t)
	admin := s.user(workflowRepo(t, stuckWorkflow))
	run := admin.enqueue()
	as := map[string]*user{"admin": admin}
	for _, role := range []string{"read", "write"} {
		u := s.user(admin.dir)
		u.env = append(u.env, "SOLSTICE_TOKEN="+strings.TrimSpace(admin.ok("token", "create", "for-"+role, "--role", role, "--ttl", "1h")))
		as[role] = u
	}
	for _, c := range []struct {
		needs string
		args  []string
	}{
		{"read", []string{"status"}},
		{"read", []string{"status", run.ID}},
		{"read", []string{"logs", run.ID, "first"}},
		{"read", []string{"pools"}},
		{"read", []string{"machines"}},
		{"write", []string{"enqueue"}},
		{"write", []string{"cancel", run.ID}},
		{"write", []string{"rerun", run.ID}},
		{"admin", []string{"token", "list"}},
		{"admin", []string{"token", "create", "new", "--role", "read"}},
		{"admin", []string{"token", "revoke", "new"}},
	} {
		rank := []string{"read", "write", "admin"}
		for i, role := range rank {
			r := as[role].solstice(c.args...)
			if i >= slices.Index(rank, c.needs) {
				if r.code != 0 {
					t.Errorf("%q as %s: exit status %d: %s", c.args, role, r.code, r.stderr)
				}
				continue
			}
			has(t, fmt.Sprintf("%q as %s", c.args, role), r.stderr, "this needs role "+c.needs+", yours is "+role, "a larger role")
			r.want(t, 2)
		}
	}
}

// TestOperate: pools, machines and tokens.
func TestOperate(t *testing.T) {
	t.Parallel()
	s := serve(t, "--capacity-map=host=3,debian-12=2")
	gate := filepath.Join(t.TempDir(), "gate")
	u := s.user(workflowRepo(t, fmt.Sprintf("checkout: false\njobs: { w: { steps: [{ run: 'echo up; while ! test -e %s; do sleep 0.1; done' }] } }\n", gate)))
	run := u.enqueue()
	follower := u.start("logs", "-f", run.ID)
	follower.says("up")

	has(t, "pools", u.ok("pools"), "POOL", "debian-12  debian-12", "0/2", "host       host", "1/3")
	pools := decoded[struct{ Pools []solstice.PoolInfo }](t, u.ok("pools", "--json")).Pools
	if len(pools) != 2 || pools[1].Name != "host" || pools[1].Busy != 1 || pools[1].Capacity != 3 {
		t.Errorf("pools %+v", pools)
	}
	has(t, "machines", u.ok("machines"), "MACHINE", "host", "bound")
	machines := decoded[struct{ Machines []solstice.Machine }](t, u.ok("machines", "--json")).Machines
	if len(machines) != 1 || machines[0].State != "bound" || machines[0].AttemptID == "" || machines[0].OS == "" {
		t.Errorf("machines %+v", machines)
	}
	if out := u.ok("machines", "--pool", "debian-12", "--json"); len(decoded[struct{ Machines []solstice.Machine }](t, out).Machines) != 0 {
		t.Errorf("machines of a pool without: %s", out)
	}
	write(t, filepath.Dir(gate), map[string]string{"gate": ""})
	if code := follower.end(); code != 0 {
		t.Errorf("a follower of a job that is over: %d", code)
	}

	made := decoded[token](t, u.ok("token", "create", "robot", "--role", "write", "--json"))
	if made.Role != "write" || made.Secret == "" || !made.ExpiresAt.IsZero() {
		t.Errorf("token %+v", made)
	}
	r := u.solstice("token", "create", "short", "--role", "read", "--ttl", "1h")
	if !regexp.MustCompile(`^sol_\w+\n$`).MatchString(r.stdout) {
		t.Errorf("stdout has more than the token: %q", r.stdout)
	}
	has(t, "stderr", r.stderr, "token short, role read, expires 2")
	out := u.ok("token", "list")
	has(t, "list", out, "NAME", "admin", "robot  write", "does not expire", "never")
	if strings.Contains(out, made.Secret) {
		t.Error("the list shows a token")
	}
	r = u.solstice("token", "create", "robot", "--role", "read")
	has(t, "stderr", r.stderr, "robot")
	r.want(t, 1)
	u.solstice("token", "create", "x", "--role", "king").want(t, 2)
	u.solstice("token", "create", "a b", "--role", "read").want(t, 2)
	u.solstice("token", "create", "x", "--role", "read", "--ttl=-1h").want(t, 2)
	revoked := decoded[struct{ Revoked string }](t, u.ok("token", "revoke", made.ID, "--json"))
	if revoked.Revoked != made.ID {
		t.Errorf("revoked %+v", revoked)
	}
	r = u.solstice("token", "revoke", "robot")
	has(t, "stderr", r.stderr, `token "robot"`)
	r.want(t, 1)
	robot := s.user(u.dir)
	robot.env = append(robot.env, "SOLSTICE_TOKEN="+made.Secret)
	r = robot.solstice("pools")
	has(t, "stderr", r.stderr, "revoked", "--token-file")
	r.want(t, 2)
}
