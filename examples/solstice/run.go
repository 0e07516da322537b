package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	"github.com/solstice-ci/solstice-go/solstice"
	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/daemon/pools"
	"github.com/solstice-ci/solstice-go/solstice/daemon/storage"
	"github.com/solstice-ci/solstice-go/solstice/logstream/filelog"
	"github.com/solstice-ci/solstice-go/vmprovider/processvm"
)

type runCmd struct {
	Workflow string            `arg:"" optional:"" help:"Workflow to run, by path or name. Default: all that a manual start, or else a push, concerns."`
	Dir      string            `short:"C" default:"." type:"existingdir" placeholder:"DIR" help:"Directory in the work tree of the repository (${default})."`
	Repo     string            `placeholder:"URL" help:"Run the workflow of this repository instead: https, ssh, or an absolute path."`
	Ref      string            `placeholder:"REF" help:"Branch, tag or commit to run. Default: HEAD."`
	Dirty    bool              `help:"Run the uncommitted tree: changes to tracked files, and new files that are not ignored."`
	Job      []string          `placeholder:"ID" help:"Run this job and what it needs; may be repeated."`
	Input    map[string]string `placeholder:"K=V" mapsep:"none" help:"Input of a manual start; may be repeated."`
	Pool     map[string]string `placeholder:"LABEL=PROVIDER" mapsep:"none" help:"Serve another runs-on label; the provider is 'process', which isolates nothing. May be repeated."`
	Pools    string            `env:"POOLS" placeholder:"FILE" help:"YAML file of pools, such as ones of virtual machines, which serve their labels; see docs/pools.md."`
	Jobs     int               `short:"j" placeholder:"N" help:"Jobs at once. Default: the number of CPUs."`
	Env      []string          `placeholder:"NAME" help:"Pass this variable of your environment on to the steps, or with a * at the end all that begin so; may be repeated."`
	StateDir string            `placeholder:"DIR" help:"Keep state and logs in this directory, new or empty. Default: a temporary one that is removed."`
	Plain    bool              `help:"No colours, also on a terminal."`
	NoColor  string            `hidden:"" env:"NO_COLOR"` // https://no-color.org: anything but empty

	RunnerDir string `env:"RUNNER_DIR" placeholder:"DIR" help:"Directory with the agents that virtual machines download, named agent-OS-ARCH. Default: runner beside this program."`
	Catalogue string `env:"IMAGE_CATALOGUE" placeholder:"FILE" help:"The catalogue of images, where --pools names none; see docs/images.md."`
	ImageDir  string `env:"IMAGE_DIR" placeholder:"DIR" help:"Directory of downloaded images, which the hypervisor's user has to be able to read. Default: images in the user's state directory."`

	UserState string `hidden:"" name:"__user-state" default:"${state_dir}"`

	daemon.Telemetry
}

// Help is kong's: what follows the flags' summary.
func (runCmd) Help() string {
	return `Jobs run as processes of this machine, with your rights: nothing is isolated. Those whose label a pool of --pools serves run on its machines.

The exit status is 0 when all jobs succeeded, 1 when one did not, 2 when the workflow could not be run, 130 after an interrupt. An interrupt cancels the jobs: they get SIGTERM, 10 seconds later SIGKILL, then their clean-up steps run. A second one leaves at once; what still runs is then ended in the background, within about a second.`
}

// Run is kong's.
func (c *runCmd) Run(e *env) error {
	code, err := c.inStateDir(e.ctx)
	switch {
	case e.ctx.Err() != nil:
		code = exitInterrupted
		if errors.Is(err, context.Canceled) {
			err = nil
		}
	case err != nil:
		code = exitCouldNotRun
	}
	if code == 0 {
		return nil
	}
	return &daemon.ExitError{Code: code, Err: err}
}

// check finds what is wrong with the flags, before anything is done.
func (c *runCmd) check() error {
	switch {
	case c.Dirty && c.Repo != "":
		return problem("--dirty and --repo exclude each other", nil, "clone the repository and run there")
	case c.Dirty && c.Ref != "":
		return problem("--dirty and --ref exclude each other", nil, "check the ref out, or leave one away")
	case c.Jobs < 0:
		return problem(fmt.Sprintf("--jobs is %d", c.Jobs), nil, "give how many jobs may run at once")
	}
	for label, kind := range c.Pool {
		if label == "" || kind != "process" {
			return problem(fmt.Sprintf("--pool %s=%s: there is no provider %q", label, kind, kind), nil,
				"give --pool LABEL=process, which runs the label's jobs as processes of this machine")
		}
	}
	for _, name := range c.Env {
		if strings.Contains(name, "=") {
			return problem("--env takes a name, not a value: "+name, nil, "set the variable, and give its name")
		}
		if len(daemon.Environment(name)) == 0 {
			return problem(fmt.Sprintf("--env %s: your environment has no such variable", name), nil, "set it, or leave the flag away")
		}
	}
	return nil
}

func (c *runCmd) inStateDir(ctx context.Context) (code int, err error) {
	if err := c.check(); err != nil {
		return 0, err
	}
	// The console shows the job; our own log only when asked for.
	if c.LogLevel == "info" {
		c.LogLevel = "warn"
	}
	c.ServiceName = "solstice-run"
	shutdown, err := c.Telemetry.Init(ctx)
	if err != nil {
		return 0, err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		err = errors.Join(err, shutdown(ctx))
	}()
	state, then, err := c.makeStateDir()
	if err != nil {
		return 0, err
	}
	left, err := startSweeper(state, then)
	if err != nil {
		return 0, problem("cannot start the process that cleans up", err, "")
	}
	defer func() {
		if then == removeState {
			err = errors.Join(err, os.RemoveAll(state))
		}
		err = errors.Join(err, left.dismiss())
	}()
	return c.run(ctx, state)
}

// makeStateDir gives the absolute path of an empty directory, and what the
// sweeper does with it.
func (c *runCmd) makeStateDir() (dir, then string, err error) {
	if c.StateDir == "" {
		dir, err := os.MkdirTemp("", "solstice-run-")
		if err != nil {
			return "", "", problem("cannot make a temporary directory", err, "")
		}
		return dir, removeState, nil
	}
	if dir, err = filepath.Abs(c.StateDir); err == nil {
		err = os.MkdirAll(dir, 0o700)
	}
	if err != nil {
		return "", "", problem("cannot make the state directory", err, "")
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", "", problem("cannot read the state directory", err, "")
	}
	if len(entries) > 0 {
		return "", "", problem("the state directory "+dir+" is not empty", nil, "give one of its own to each run")
	}
	return dir, keepState, nil
}

func (c *runCmd) run(ctx context.Context, state string) (code int, err error) {
	dir := filepath.Join(state, "source.git")
	src, err := c.source(ctx, dir)
	if err != nil {
		return 0, err
	}
	repo, err := localgit.Open(ctx, localgit.Config{Dir: dir, Name: src.name, StatusDir: filepath.Join(state, "statuses")})
	if err != nil {
		return 0, problem("cannot open the repository", err, "")
	}
	defer func() { err = errors.Join(err, repo.Close()) }()
	db, err := (storage.Database{DBPoolMaxSize: 8, DBPoolTimeoutMS: 30_000}).Open(ctx, state, slog.Default())
	if err != nil {
		return 0, problem("cannot open the state", err, "")
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	if err := solstice.Migrate(ctx, db); err != nil {
		return 0, problem("cannot prepare the state", err, "")
	}
	q, err := storage.Broker{}.Open(ctx, db, slog.Default())
	if err != nil {
		return 0, problem("cannot open the queue", err, "")
	}
	defer func() { err = errors.Join(err, q.Close()) }()
	logs, err := filelog.Open(filepath.Join(state, "logs"), filelog.Options{})
	if err != nil {
		return 0, problem("cannot open the logs", err, "")
	}
	defer func() { err = errors.Join(err, logs.Close()) }()
	provider, err := processvm.New(processvm.Config{
		Root: machinesDir(state), Command: agent.Command(), StepEnv: daemon.StepEnvironment(c.Env...), Logger: slog.Default(),
	})
	if err != nil {
		return 0, problem("cannot make machines here", err, "")
	}
	defer func() { err = errors.Join(err, provider.Close()) }()

	cfg := solstice.Config{
		DB: db, Queue: q, Logs: logs, Logger: slog.Default(), MaxConcurrency: c.Jobs,
		Forges: map[string]forge.Forge{"local": repo},
	}
	machines, err := c.machines(ctx, &cfg, state, pools.Machines{Provider: provider, Host: "local"})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, machines.Close()) }()
	labels := []string{solstice.DefaultLabel}
	for label := range c.Pool {
		if label != solstice.DefaultLabel {
			labels = append(labels, label)
		}
	}
	cfg.Pools = append(cfg.Pools, solstice.Pool{Name: "process", Labels: slices.DeleteFunc(slices.Clone(labels), machines.serves), Provider: provider, Host: "local"})
	labels = append(labels, machines.labels...)
	eng, err := solstice.New(cfg)
	if err != nil {
		return 0, problem("cannot start the engine", err, "")
	}
	if err := machines.own(c, state, eng.Installation()); err != nil {
		return 0, errors.Join(problem("cannot write to the state directory", err, ""), eng.Close())
	}
	runs, err := c.submit(ctx, eng, src, labels)
	if err != nil {
		return 0, errors.Join(err, eng.Close())
	}

	// The engine outlives an interrupt: jobs are cancelled, their machines
	// destroyed, and only then it stops. Nor does output stop: the person sees
	// how it ends.
	engCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	watch, unwatch := context.WithCancel(engCtx)
	stopped := make(chan error, 1)
	go func() {
		defer unwatch() // should it end by itself
		stopped <- eng.Run(engCtx)
	}()
	code, err = c.follow(ctx, watch, eng, runs)
	stop()
	return code, errors.Join(err, <-stopped, destroyAll(provider), machines.destroyAll())
}

// submit accepts the runs, before any job can start.
func (c *runCmd) submit(ctx context.Context, eng *solstice.Engine, src source, labels []string) ([]solstice.Run, error) {
	req := solstice.RunRequest{
		Forge: "local", Repo: forge.Repo{Name: src.name, URL: src.url}, Commit: src.commit, Ref: src.ref,
		Workflow: c.Workflow, Jobs: c.Job, Inputs: c.Input,
	}
	what := "a manual start"
	runs, err := eng.Submit(ctx, req)
	if err == nil && len(runs) == 0 && len(c.Input) == 0 {
		what += ", or a push to " + src.place()
		req.Event = forge.Event{Kind: forge.KindPush}
		runs, err = eng.Submit(ctx, req)
	}
	switch {
	case errors.Is(err, solstice.ErrNoWorkflow):
		return nil, problem("there is nothing to run", err, "write a workflow file, see docs/workflows.md; commit it, or use --dirty")
	case err != nil:
		return nil, problem("cannot plan the workflow", err, "")
	case len(runs) == 0:
		return nil, problem("no workflow is concerned by "+what, nil, "name one: solstice run WORKFLOW")
	}
	if err := refused(runs); err != nil {
		return nil, err
	}
	var unmapped, flags []string
	for _, r := range runs {
		for _, j := range r.Jobs {
			if !slices.Contains(labels, j.Label) {
				unmapped = append(unmapped, fmt.Sprintf("job %s runs on %q", plain(j.Name), j.Label))
				if flag := "--pool " + plain(j.Label) + "=process"; !slices.Contains(flags, flag) {
					flags = append(flags, flag)
				}
			}
		}
	}
	if len(unmapped) > 0 {
		return nil, problem("no pool here has the label of every job", errors.New(strings.Join(unmapped, "\n")),
			strings.Join(flags, " ")+" runs them as processes of this machine; --pools FILE may have a pool for them")
	}
	return runs, nil
}
