// Command solstice runs and checks workflows. It is thin: everything it does is
// in the packages it imports, none of them internal, so it can be copied.
package main

import (
	"context"

	"github.com/solstice-ci/solstice-go/solstice/agent"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
)

type cli struct {
	Run  runCmd  `cmd:"" help:"Run this repository's workflow on this machine."`
	Lint lintCmd `cmd:"" help:"Check workflow files and report every problem at once."`
}

// env is what commands get besides their flags.
type env struct{ ctx context.Context }

// Exit codes.
const (
	exitFailed      = daemon.ExitFailure
	exitCouldNotRun = daemon.ExitUsage
	exitInterrupted = daemon.ExitInterrupted
)

func main() {
	agent.Hook() // the process pool starts this program again as its agent
	sweepHook()
	daemon.Main(func(ctx context.Context) error {
		var flags cli
		cmd, err := daemon.Parse(&flags, daemon.Program{
			Name:        "solstice",
			Description: "CI jobs on throw-away machines: run a workflow here, or check one.",
		})
		if err != nil {
			return err
		}
		return cmd.Run(&env{ctx: ctx})
	})
}

// problem is an error before any job ran.
func problem(what string, err error, advice string) error {
	return &daemon.Problem{What: what, Err: err, Advice: advice}
}
