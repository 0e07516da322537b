// Command solstice runs and checks workflows, and talks to orchestrators. It is
// thin: everything it does is in the packages it imports, none of them internal,
// so it can be copied.
package main

import (
	"context"

	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
)

type cli struct {
	Run  runCmd  `cmd:"" group:"On this machine" help:"Run this repository's workflow on this machine."`
	Lint lintCmd `cmd:"" group:"On this machine" help:"Check workflow files and report every problem at once."`

	Enqueue  enqueueCmd  `cmd:"" group:"At an orchestrator" help:"Have an orchestrator run this repository's workflow."`
	Status   statusCmd   `cmd:"" group:"At an orchestrator" help:"List runs, or show one with its jobs."`
	Logs     logsCmd     `cmd:"" group:"At an orchestrator" help:"Print the log of a job, an attempt or a run."`
	Cancel   cancelCmd   `cmd:"" group:"At an orchestrator" help:"End a run."`
	Rerun    rerunCmd    `cmd:"" group:"At an orchestrator" help:"Make a new run of one that is over."`
	Approve  approveCmd  `cmd:"" group:"At an orchestrator" help:"Let a run begin that awaits approval."`
	Pools    poolsCmd    `cmd:"" group:"At an orchestrator" help:"List the pools, and what is in use."`
	Machines machinesCmd `cmd:"" group:"At an orchestrator" help:"List the machines."`
	Token    tokenCmd    `cmd:"" group:"At an orchestrator" help:"Make, list and revoke tokens."`
	Hook     hookCmd     `cmd:"" group:"At an orchestrator" help:"Have pushes to a repository on this machine start runs."`

	Image       imageCmd       `cmd:"" group:"For operators" help:"Base images of virtual machines: list, pull, verify or remove them."`
	Migrate     migrateCmd     `cmd:"" group:"For operators" help:"Change the schema of a database."`
	Refresh     refreshCmd     `cmd:"" group:"For operators" help:"For development: empty a database."`
	DLQ         dlqCmd         `cmd:"" name:"dlq" group:"For operators" help:"Messages that could not be handled: list, replay or drop them."`
	Deliveries  deliveriesCmd  `cmd:"" group:"For operators" help:"Webhooks that came: list, show or replay them."`
	RunnerServe runnerServeCmd `cmd:"" group:"For operators" help:"Serve agents for guests to download."`

	Completion completionCmd `cmd:"" help:"Print a script that completes this program's commands in a shell."`
	Complete   completeCmd   `cmd:"" hidden:"" name:"__complete"`
}

// env is what commands get besides their flags.
type env struct{ ctx context.Context }

// Exit codes.
const (
	exitFailed      = daemon.ExitFailure // a job did, or there is no such thing
	exitCouldNotRun = daemon.ExitUsage   // nothing was done, or it is not known what was
	exitInterrupted = daemon.ExitInterrupted
)

func main() {
	agent.Hook() // the process pool starts this program again as its agent
	sweepHook()
	daemon.Main(func(ctx context.Context) error {
		var flags cli
		cmd, err := daemon.Parse(&flags, daemon.Program{
			Name:        "solstice",
			Description: "CI jobs on throw-away machines: run a workflow here, or at an orchestrator.",
		})
		if err != nil {
			return err
		}
		cmd.BindTo(ctx, (*context.Context)(nil))
		return cmd.Run(&env{ctx: ctx})
	})
}

// problem is an error before any job ran.
func problem(what string, err error, advice string) error {
	return &daemon.Problem{What: what, Err: err, Advice: advice}
}
