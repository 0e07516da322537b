package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/internal/gitcmd"
	"github.com/solstice-ci/solstice-go/solstice/api/agentv1"
)

// How often a source that cannot be reached is tried: for about a minute, which
// an orchestrator needs to restart or another to take over.
const sourceTries = 8

// checkoutStep brings the commit into the work tree.
func (j *job) checkoutStep(ctx context.Context, w *watch, i int, st *agentv1.Step) outcome {
	ctx, cancel := w.context(ctx, st.GetTimeout().AsDuration(), j.stopping != notStopping)
	defer cancel()
	c := &checkout{
		a: j.a, src: j.spec.GetSource(), opt: j.spec.GetCheckout(),
		out: logWriter{j.journal, int32(i), agentv1.Fd_FD_STDOUT},
		err: logWriter{j.journal, int32(i), agentv1.Fd_FD_STDERR},
	}
	err := c.run(ctx)
	if err == nil {
		return outcome{result: agentv1.Result_RESULT_SUCCEEDED}
	}
	j.procs.escaped = true // git ran outside any control group, and may have been cut short
	var timeout *stepTimeout
	switch cause := context.Cause(ctx); {
	case errors.As(cause, &timeout):
		return failed(cause)
	case cause != nil:
		j.stop(w.poll())
		return j.stoppedOutcome(fmt.Errorf("%w: %s", errStopped, j.stopWhy))
	}
	fmt.Fprintf(c.err, "[solstice] checkout failed: %s\n", clean(err.Error()))
	return failed(err)
}

// A checkout fetches one commit through the agent endpoint.
type checkout struct {
	a        *agent
	src      *agentv1.Source
	opt      *agentv1.Checkout
	prog     *gitcmd.Git // nil where there is none
	out, err io.Writer   // the step's log
}

func (c *checkout) run(ctx context.Context) error {
	if c.a.gitPath != "" {
		var err error
		if c.prog, err = gitcmd.New(ctx, c.a.gitPath); err != nil {
			if ctx.Err() != nil {
				return err
			}
			fmt.Fprintf(c.err, "[solstice] git is not used: %s\n", clean(err.Error()))
		}
	}
	if err := c.validate(); err != nil {
		return err
	}
	client := c.a.sourceClient()
	defer client.CloseIdleConnections()
	retry := backoff{first: 500 * time.Millisecond, limit: 15 * time.Second}
	for try := 1; ; try++ {
		err := emptyDir(c.a.cfg.WorkDir)
		switch {
		case err != nil:
			return infra(err)
		case c.prog != nil:
			err = c.fetch(ctx, client)
		default:
			err = c.unpack(ctx, client)
		}
		if err == nil || ctx.Err() != nil || !isInfra(err) || try == c.a.cfg.sourceTries {
			return err
		}
		fmt.Fprintf(c.err, "[solstice] source not reachable, trying again: %s\n", clean(err.Error()))
		if err := retry.wait(ctx); err != nil {
			return err
		}
	}
}

func (c *checkout) validate() error {
	if err := gitcmd.CheckObject(c.src.GetCommit()); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	if ref := c.src.GetRef(); ref != "" {
		if err := gitcmd.CheckRef(ref); err != nil {
			return fmt.Errorf("ref: %w", err)
		}
	}
	if p := c.src.GetPath(); !strings.HasPrefix(p, "/") || path.Clean(p) != p || strings.ContainsAny(p, "?#%\\\x00 ") {
		return fmt.Errorf("source path %q is malformed", p)
	}
	if c.opt.GetDepth() < 0 {
		return fmt.Errorf("checkout depth %d is negative", c.opt.GetDepth())
	}
	if c.prog == nil && (c.opt.GetSubmodules() || c.opt.GetLfs()) {
		return errors.New("submodules and lfs need git, which this machine has not")
	}
	return nil
}

// fetch uses git, through a proxy that lives as long.
func (c *checkout) fetch(ctx context.Context, client *http.Client) error {
	proxy, err := startProxy(ctx, client, c.src.GetPath())
	if err != nil {
		return infra(err)
	}
	defer proxy.close()
	if err := c.git(ctx, nil, "init", "--quiet", "--template=", "--", c.a.cfg.WorkDir); err != nil {
		return infra(err)
	}
	args := []string{"fetch", "--quiet", "--no-tags", "--force", "--no-recurse-submodules"}
	if d := c.opt.GetDepth(); d > 0 {
		args = append(args, fmt.Sprintf("--depth=%d", d))
	}
	args = append(append(args, "--", proxy.url), c.refspecs()...)
	if err := c.git(ctx, []string{"http"}, args...); err != nil {
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case proxy.refusal() != "":
			return fmt.Errorf("commit %s is not in the repository: %s", c.src.GetCommit(), proxy.refusal())
		case proxy.failure() != nil:
			return infra(fmt.Errorf("fetch the source: %w", proxy.failure()))
		}
		return infra(err)
	}
	if err := c.git(ctx, nil, "checkout", "--detach", "--force", c.src.GetCommit(), "--"); err != nil {
		return infra(err)
	}
	if err := c.remote(ctx); err != nil {
		return err
	}
	if c.opt.GetSubmodules() {
		if err := c.submodules(ctx); err != nil {
			return err
		}
	}
	if c.opt.GetLfs() {
		return c.lfs(ctx)
	}
	return nil
}

// refspecs fetch the commit, with a name where there is one, and for a whole
// history also what describes it.
func (c *checkout) refspecs() []string {
	commit, ref := c.src.GetCommit(), c.src.GetRef()
	branch, isBranch := strings.CutPrefix(ref, "refs/heads/")
	isTag := strings.HasPrefix(ref, "refs/tags/")
	specs := []string{commit}
	if c.opt.GetDepth() == 0 {
		specs = append(specs, "+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*")
		if isBranch || isTag {
			return specs
		}
	}
	other, isOther := strings.CutPrefix(ref, "refs/")
	switch {
	case isBranch:
		specs = append(specs, "+"+commit+":refs/remotes/origin/"+branch)
	case isTag:
		specs = append(specs, "+"+commit+":"+ref)
	case isOther:
		specs = append(specs, "+"+commit+":refs/remotes/"+other)
	}
	return specs
}

// remote makes origin what people know the repository by.
func (c *checkout) remote(ctx context.Context) error {
	u := c.src.GetRepoUrl()
	if u == "" {
		return nil
	}
	if err := gitcmd.CheckURL(u, "https", "http", "ssh", "git", "file"); err != nil {
		fmt.Fprintf(c.err, "[solstice] no remote is set: %s\n", clean(err.Error()))
		return nil
	}
	return infra(c.git(ctx, nil, "remote", "add", "--", "origin", u))
}

// submodules come from where the repository says, straight from there.
func (c *checkout) submodules(ctx context.Context) error {
	args := []string{"submodule", "update", "--init", "--recursive", "--force"}
	if d := c.opt.GetDepth(); d > 0 {
		args = append(args, fmt.Sprintf("--depth=%d", d))
	}
	return c.git(ctx, []string{"https", "http"}, args...)
}

// lfs fetches large files from the repository's own server, without
// credentials: the agent endpoint has git's objects alone.
func (c *checkout) lfs(ctx context.Context) error {
	if _, err := c.prog.Output(ctx, gitcmd.Options{Dir: c.a.cfg.WorkDir}, "lfs", "version"); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return errors.New("the workflow asks for lfs, and git-lfs is not installed on this machine")
	}
	if err := c.git(ctx, nil, "lfs", "install", "--local", "--skip-repo"); err != nil {
		return err
	}
	err := c.git(ctx, []string{"https", "http"}, "lfs", "pull")
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("large files are fetched from %s without credentials, which did not work: %w", c.lfsServer(), err)
	}
	return err
}

func (c *checkout) lfsServer() string {
	if u := c.src.GetRepoUrl(); u != "" {
		return u
	}
	return "the repository's own server, which the job does not name,"
}

// git runs a git command in the work tree, with its output in the step's log.
// An error has only the last line of it.
func (c *checkout) git(ctx context.Context, protocols []string, args ...string) error {
	err := c.prog.Run(ctx, gitcmd.Options{
		Dir: c.a.cfg.WorkDir, Protocols: protocols, Stdout: c.out, Stderr: c.err,
		Config: []string{"protocol.version=2", "init.defaultBranch=main", "http.proxy="},
		Env:    []string{machineVar + "=" + c.a.machineID}, // what outlives the agent is found
	}, args...)
	if e, ok := errors.AsType[*gitcmd.Error](err); ok {
		said := strings.TrimSpace(e.Stderr)
		e.Stderr = said[strings.LastIndexByte(said, '\n')+1:]
	}
	return err
}

// unpack fetches the commit as a tar.
func (c *checkout) unpack(ctx context.Context, client *http.Client) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+ServerName+c.src.GetPath()+".tar", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return infra(fmt.Errorf("fetch the source: %w", err))
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound:
		return fmt.Errorf("commit %s is not in the repository", c.src.GetCommit())
	default:
		return infra(fmt.Errorf("fetch the source: the endpoint answered %s", resp.Status))
	}
	root, err := os.OpenRoot(c.a.cfg.WorkDir)
	if err != nil {
		return infra(err)
	}
	defer root.Close()
	files, err := untar(resp.Body, root, c.src.GetCommit())
	if err != nil {
		return err
	}
	fmt.Fprintf(c.out, "%d files at %s\n", files, c.src.GetCommit())
	return nil
}

// emptyDir removes what is in dir.
func emptyDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}
