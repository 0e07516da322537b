package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
)

// pushed is a bare repository whose hook tells an orchestrator, and a work tree
// that pushes to it.
type pushed struct {
	t        testing.TB
	bare     string // with the hook
	plain    string // without
	work     string
	statuses *localgit.Forge
	dir      string // of the statuses' files
	client   pb.OrchestratorServiceClient
	ctx      context.Context
}

// embedded is an orchestrator on its defaults.
func embedded(t testing.TB) *pushed {
	o := start(t, filepath.Join(t.TempDir(), "state"))
	p := &pushed{t: t}
	p.client, p.ctx = o.client()
	p.open(o.dir, "--server="+o.grpc, "--state-dir="+o.dir)
	return p
}

// onServers is one on PostgreSQL, RabbitMQ and a bucket.
func onServers(t testing.TB) *pushed {
	exe, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	f := newFleet(t, exe, 1)
	f.launch(0).Await()
	ctx, cancel := context.WithTimeout(t.Context(), 20*patience)
	t.Cleanup(cancel)
	p := &pushed{t: t}
	p.client, p.ctx = f.client(ctx, 0)
	p.open(f.dirs[0], "--server="+f.addrs[0], "--ca="+f.trust, "--token-file="+filepath.Join(f.dirs[0], "admin.token"))
	return p
}

func (p *pushed) open(state string, flags ...string) {
	p.t.Helper()
	base := p.t.TempDir()
	p.bare, p.plain, p.work = filepath.Join(base, "app.git"), filepath.Join(base, "plain.git"), filepath.Join(base, "work")
	for _, dir := range []string{p.bare, p.plain} {
		p.git(base, "init", "-q", "--bare", "-b", "main", dir)
	}
	p.git(base, "init", "-q", "-b", "main", p.work)
	exe, err := commandLine()
	if err != nil {
		p.t.Fatal(err)
	}
	if out, err := commandOf(exe, append([]string{"hook", "install", p.bare, "--wait=3m"}, flags...)...).CombinedOutput(); err != nil {
		p.t.Fatalf("hook install: %v\n%s", err, out)
	}
	p.dir = filepath.Join(state, "statuses")
	if p.statuses, err = localgit.Open(p.t.Context(), localgit.Config{Root: "/", StatusDir: p.dir}); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = p.statuses.Close() })
}

func (p *pushed) git(dir string, args ...string) string {
	p.t.Helper()
	cmd := exec.Command("git", append([]string{"-C", dir, "-c", "user.name=u", "-c", "user.email=u@example.com"}, args...)...)
	cmd.Env = []string{"PATH=" + daemon.Environment("PATH")["PATH"], "HOME=" + scratch, "GIT_CONFIG_NOSYSTEM=1"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		p.t.Fatalf("git %q: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// commit makes one with the workflow.
func (p *pushed) commit(workflow string) string {
	p.t.Helper()
	file := filepath.Join(p.work, ".solstice", "workflow.yaml")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(workflow), 0o644); err != nil {
		p.t.Fatal(err)
	}
	p.git(p.work, "add", ".")
	p.git(p.work, "commit", "-q", "--allow-empty", "-m", "Change it")
	return p.git(p.work, "rev-parse", "HEAD")
}

var runLine = regexp.MustCompile(`solstice: refs/heads/main  run ([0-9a-f-]{36})  (.*)`)

// push gives the run that the pusher is told of.
func (p *pushed) push() (run, about string) {
	p.t.Helper()
	out := p.git(p.work, "push", "-q", p.bare, "main")
	m := runLine.FindStringSubmatch(out)
	if m == nil {
		p.t.Fatalf("the pusher was told %q", out)
	}
	return m[1], strings.TrimSpace(m[2])
}

// over waits until every status of a commit is terminal, of which there are n.
func (p *pushed) over(commit string, n int) []forge.Status {
	p.t.Helper()
	repo := forge.Repo{Owner: strings.Trim(filepath.Dir(p.bare), "/"), Name: filepath.Base(p.bare)}
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		all, err := p.statuses.Statuses(p.ctx, repo, commit)
		if err != nil {
			p.t.Fatal(err)
		}
		if len(all) == n && !slices.ContainsFunc(all, func(s forge.Status) bool { return !s.State.Terminal() }) {
			return all
		}
		if time.Since(began) > patience {
			p.t.Fatalf("in vain for the end of %+v", all)
		}
	}
}

// overhead is the time from the new value of the branch to the last status, by the
// times of both files, without that of the only job's own step: the checkout counts.
func (p *pushed) overhead(run, commit string) time.Duration {
	p.t.Helper()
	files, err := filepath.Glob(filepath.Join(p.dir, "*", commit+".jsonl"))
	if err != nil || len(files) != 1 {
		p.t.Fatalf("%v, %v", files, err)
	}
	ref, err := os.Stat(filepath.Join(p.bare, "refs", "heads", "main"))
	if err != nil {
		p.t.Fatal(err)
	}
	last, err := os.Stat(files[0])
	if err != nil {
		p.t.Fatal(err)
	}
	r, err := p.client.GetRun(p.ctx, &pb.GetRunRequest{RunId: run})
	if err != nil {
		p.t.Fatal(err)
	}
	j, err := p.client.GetJob(p.ctx, &pb.GetJobRequest{JobId: r.GetRun().GetJobs()[0].GetId()})
	if err != nil {
		p.t.Fatal(err)
	}
	steps := j.GetAttempts()[0].GetSteps()
	own := steps[len(steps)-1]
	return last.ModTime().Sub(ref.ModTime()) - own.GetFinishedAt().AsTime().Sub(own.GetStartedAt().AsTime())
}

const (
	step     = "test -s .solstice/workflow.yaml"
	oneStep  = "name: check\non: { push: {} }\njobs: { test: { steps: [{ run: '" + step + "' }] } }\n"
	twoKinds = "name: check\non: { push: { paths: ['.solstice/**'] } }\njobs:\n  test: { matrix: { n: [1, 2] }, steps: [{ run: '" + step + "' }] }\n  fails: { steps: [{ run: 'exit 3' }] }\n"
)

// TestPush: a push to a bare repository becomes a run, and what becomes of it stands
// beside the commit.
func TestPush(t *testing.T) {
	for name, open := range map[string]func(testing.TB) *pushed{"embedded": embedded, "servers": onServers} {
		t.Run(name, func(t *testing.T) {
			p := open(t)
			commit := p.commit(oneStep)
			run, about := p.push()
			if !strings.HasPrefix(about, "check queued: test") {
				t.Errorf("the pusher was told %q", about)
			}
			for _, s := range p.over(commit, 2) {
				if s.State != forge.StatusSuccess || s.Key != "solstice/check" && s.Key != "solstice/check/test" {
					t.Errorf("%+v", s)
				}
			}
			got, err := p.client.GetRun(p.ctx, &pb.GetRunRequest{RunId: run})
			if err != nil || got.GetRun().GetEvent() != "push" || got.GetRun().GetRef() != "refs/heads/main" || got.GetRun().GetCommit() != commit {
				t.Errorf("run %v, %v", got, err)
			}
			t.Logf("from the push to the last status, without the step: %s", p.overhead(run, commit))

			// What a push has changed is known, and one that fails is seen too.
			commit = p.commit(twoKinds)
			p.push()
			states := map[string]forge.StatusState{}
			for _, s := range p.over(commit, 4) {
				states[s.Key] = s.State
			}
			if want := fmt.Sprint(map[string]forge.StatusState{
				"solstice/check": forge.StatusFailure, "solstice/check/fails": forge.StatusFailure,
				"solstice/check/test (n 1)": forge.StatusSuccess, "solstice/check/test (n 2)": forge.StatusSuccess,
			}); fmt.Sprint(states) != want {
				t.Errorf("states %v", states)
			}
			if err := os.WriteFile(filepath.Join(p.work, "unrelated"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			p.commit(twoKinds)
			if out := p.git(p.work, "push", "-q", p.bare, "main"); !strings.Contains(out, "refs/heads/main: no workflow is concerned") {
				t.Errorf("of another path: %s", out)
			}
		})
	}
}

// BenchmarkPushToStatus measures what there is between a push and the last status of
// its run, besides the step, next to a push without a hook and the step alone.
func BenchmarkPushToStatus(b *testing.B) {
	for _, c := range []struct {
		name string
		open func(testing.TB) *pushed
	}{{"embedded", embedded}, {"servers", onServers}} {
		b.Run(c.name, func(b *testing.B) {
			p := c.open(b)
			var over []time.Duration
			var bare, push, whole time.Duration
			took := func(f func()) time.Duration {
				began := time.Now()
				f()
				return time.Since(began)
			}
			for b.Loop() {
				commit := p.commit(oneStep)
				bare += took(func() {
					p.git(p.work, "push", "-q", p.plain, "main")
					cmd := exec.Command("sh", "-c", step)
					cmd.Dir = p.work
					if out, err := cmd.CombinedOutput(); err != nil {
						b.Fatalf("%v: %s", err, bytes.TrimSpace(out))
					}
				})
				var run string
				whole += took(func() {
					push += took(func() { run, _ = p.push() })
					p.over(commit, 2)
				})
				over = append(over, p.overhead(run, commit))
			}
			slices.Sort(over)
			n := float64(len(over))
			b.ReportMetric(float64(over[len(over)/2].Microseconds())/1000, "overhead-p50-ms")
			b.ReportMetric(float64(over[len(over)-1].Microseconds())/1000, "overhead-max-ms")
			b.ReportMetric(float64(push.Microseconds())/1000/n, "push-ms")
			b.ReportMetric(float64(bare.Microseconds())/1000/n, "bare-ms")
			b.ReportMetric(whole.Seconds()/bare.Seconds(), "x-bare")
		})
	}
}
