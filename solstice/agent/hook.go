package agent

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"sync"
	"syscall"
)

// HookArg as the first argument turns a program that calls Hook into an agent.
const HookArg = "__solstice-agent"

// Hook is the first line of the main of a program that serves as the agent of
// its own process pool. Unless the program was started as one (see Command) it
// returns at once; otherwise it runs the agent and exits: 0 after a job whose
// end was acknowledged, 1 after a failure, 2 where it was started wrongly. Logs
// go to standard error, which is the machine's console.
func Hook() {
	if len(os.Args) < 2 || os.Args[1] != HookArg {
		return
	}
	os.Exit(hookMain(os.Args[2:], os.Stderr))
}

// Command starts this program again as an agent; the caller appends
// "--bootstrap" and a file for LoadBootstrap.
func Command() []string {
	exe, err := os.Executable()
	if err != nil {
		exe = os.Args[0] // the system cannot tell
	}
	return []string{exe, HookArg}
}

func hookMain(args []string, console io.Writer) int {
	flags := flag.NewFlagSet(HookArg, flag.ContinueOnError)
	flags.SetOutput(console)
	file := flags.String("bootstrap", "", "bootstrap `FILE`, as agent.LoadBootstrap reads it")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if *file == "" || flags.NArg() > 0 {
		fmt.Fprintf(console, "usage: %s --bootstrap FILE\n", HookArg)
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := RunBootstrap(ctx, *file, slog.New(slog.NewTextHandler(console, nil))); err != nil {
		fmt.Fprintln(console, err)
		return 1
	}
	return 0
}

// RunBootstrap is Run for a process that is an agent and nothing else, with the
// configuration of a bootstrap file (LoadBootstrap).
func RunBootstrap(ctx context.Context, file string, logger *slog.Logger) error {
	cfg, err := LoadBootstrap(file)
	if err != nil {
		return err
	}
	cfg.Logger = logger
	cfg.Dedicated = true
	collectLate()
	cfg.Version = buildVersion()
	return Run(ctx, cfg)
}

// collectLate puts the first garbage collection off, which most jobs then never
// come to; after it collections come as usual.
func collectLate() {
	usual := debug.SetGCPercent(400)
	runtime.AddCleanup(new(struct{ _ *int }), func(usual int) { debug.SetGCPercent(usual) }, usual)
}

// buildVersion is the version of this program, empty where it has none.
var buildVersion = sync.OnceValue(func() string {
	if b, ok := debug.ReadBuildInfo(); ok {
		return b.Main.Version
	}
	return ""
})
