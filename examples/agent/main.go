// Command agent is the program that a machine downloads and starts: it runs one
// job and, with --poweroff, turns the machine off.
package main

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"github.com/solstice-ci/solstice-go/solstice/agent"
)

type cli struct {
	Bootstrap string           `required:"" placeholder:"FILE" help:"JSON with contacts, CA and enrolment token; deleted once enrolled."`
	Poweroff  bool             `help:"Turn the machine off at the end, whatever became of the job."`
	Version   kong.VersionFlag `help:"Print the version and exit."`
}

func main() {
	version := "devel"
	if b, ok := debug.ReadBuildInfo(); ok {
		version = b.Main.Version
	}
	var c cli
	kong.Parse(&c, kong.Name("agent"), kong.Description("The Solstice agent of a machine."), kong.Vars{"version": version})
	os.Exit(run(c))
}

func run(c cli) (status int) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil)) // the machine's console
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := agent.RunBootstrap(ctx, c.Bootstrap, log); err != nil {
		log.Error("agent failed", "error", err)
		status = 1
	}
	if !c.Poweroff {
		return status
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if err := agent.PowerOff(ctx); err != nil {
		log.Error("machine stays on", "error", err)
		status = 1
	}
	return status
}
