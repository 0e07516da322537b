package main

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/solstice-ci/solstice-go/forge"
	"github.com/solstice-ci/solstice-go/forge/localgit"
	"github.com/solstice-ci/solstice-go/solstice"
	pb "github.com/solstice-ci/solstice-go/solstice/api/orchestratorv1"
	"github.com/solstice-ci/solstice-go/solstice/daemon"
	"github.com/solstice-ci/solstice-go/solstice/logtext"
	"github.com/solstice-ci/solstice-go/solstice/orchestrator/client"
	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

type hookCmd struct {
	Install     hookInstallCmd     `cmd:"" help:"Have pushes to a repository on this machine start runs."`
	PostReceive hookPostReceiveCmd `cmd:"" help:"What the hook runs: start runs for what git says was pushed to the repository it is in."`
}

// hook are the flags of the hook, which its installation writes down.
type hook struct {
	Forge    string        `default:"local" placeholder:"NAME" help:"The orchestrator's forge that has the repository (${default})."`
	RepoRoot string        `env:"REPO_ROOT" default:"/" placeholder:"DIR" help:"Directory of that forge, the orchestrator's --repo-root (${default})."`
	Wait     time.Duration `default:"10s" placeholder:"TIME" help:"For how long a push waits for an orchestrator that is not there (${default})."`
	MaxRefs  int           `default:"100" placeholder:"N" help:"How many branches and tags of one push start runs (${default})."`

	connection
}

type hookInstallCmd struct {
	Repo    string `arg:"" default:"." type:"existingdir" help:"The repository: its directory (${default})."`
	Program string `type:"existingfile" placeholder:"FILE" help:"The solstice that the hook runs. Default: this one."`

	hook
}

// Help is kong's.
func (hookInstallCmd) Help() string {
	return `Writes the repository's post-receive hook, or writes it anew, with the flags given here. A token is not written there: give --token-file, a file that everybody can read who may push, or push as the orchestrator's user. Another program's hook is not touched: then you are told the line to add to it.`
}

// Run is kong's.
func (c *hookInstallCmd) Run(e *env) error {
	command, err := c.command()
	if err != nil {
		return err
	}
	path, err := localgit.InstallHook(e.ctx, c.Repo, localgit.HookOptions{Command: command})
	if other, ok := errors.AsType[*localgit.HookError](err); ok {
		return unable("the repository has a hook of its own", err, "add this line to it, with what it gets as its standard input:\n"+other.Line)
	}
	if err != nil {
		return unable("cannot install the hook", err, "run this as who may write to the repository")
	}
	newScreen(os.Stdout, false, nil).printf("%s: pushes start runs at %s", path, c.Server)
	return nil
}

// command is what the hook runs: with everything said, since whoever pushes has an
// environment of their own.
func (c *hookInstallCmd) command() ([]string, error) {
	if c.Token != "" {
		return nil, unable("a token is not written into a hook, which others can read", nil, "give a file with --token-file instead of --token or SOLSTICE_TOKEN")
	}
	if c.Wait <= 0 || c.MaxRefs < 1 {
		return nil, unable("--wait or --max-refs is not positive", nil, "correct it")
	}
	cl, err := c.dial() // for what it says of the flags
	if err != nil {
		return nil, err
	}
	_ = cl.Close()
	program := c.Program
	if program == "" {
		if program, err = os.Executable(); err != nil {
			return nil, unable("cannot find this program", err, "give --program")
		}
		if strings.Contains(program, "/go-build") {
			return nil, unable("this program is gone when go run is over", nil, "build it and run that, or give --program")
		}
	}
	words := []string{
		program, "hook", "post-receive", "--server=" + c.Server, "--forge=" + c.Forge,
		"--wait=" + c.Wait.String(), fmt.Sprint("--max-refs=", c.MaxRefs),
	}
	paths := []struct{ flag, path string }{{"--repo-root=", c.RepoRoot}, {"--token-file=", c.TokenFile}, {"--ca=", c.CA}, {"--client-cert=", c.ClientCert}, {"--client-key=", c.ClientKey}}
	if c.local() {
		paths = append(paths, struct{ flag, path string }{"--state-dir=", c.StateDir})
	}
	for _, p := range paths {
		if p.path == "" {
			continue
		}
		abs, err := filepath.Abs(p.path)
		if err != nil {
			return nil, couldNot(err)
		}
		words = append(words, p.flag+abs)
	}
	words[0], err = filepath.Abs(program)
	return words, couldNot(err)
}

type hookPostReceiveCmd struct {
	hook
}

// Help is kong's.
func (hookPostReceiveCmd) Help() string {
	return `Reads git's lines "OLD NEW REF" from standard input, in the git directory. It waits for no run, and its exit status is 0 whatever happened, since a push that is over cannot be refused: what was not started is said, with the command that starts it.`
}

// Run is kong's.
func (c *hookPostReceiveCmd) Run(e *env) error {
	signal.Ignore(syscall.SIGPIPE) // runs are started also when the pusher has gone
	if err := c.run(e.ctx); err != nil {
		c.failed(err)
	}
	return nil
}

func (c *hookPostReceiveCmd) run(ctx context.Context) error {
	push, err := localgit.PostReceive(ctx, ".", os.Stdin, localgit.PostReceiveOptions{Root: c.RepoRoot, MaxEvents: c.MaxRefs})
	if err != nil {
		return problem("nothing was started for this push", err, "start it by hand: solstice enqueue")
	}
	for _, i := range push.Ignored {
		say("%s", plain(i))
	}
	if push.More > 0 {
		say("%d more branches and tags were pushed: a push starts the runs of the first %d", push.More, len(push.Events)+len(push.Ignored))
	}
	if len(push.Events) == 0 {
		return nil
	}
	cl, err := c.dial()
	if err != nil {
		c.failed(err)
		c.left(push.Events, "")
		return nil
	}
	defer func() { _ = cl.Close() }()
	// The same push can be sent again: what was accepted is found by its key.
	id := "push/" + rand.Text() + "/"
	for i, ev := range push.Events {
		key := fmt.Sprint(id, i)
		runs, err := c.submit(ctx, cl, ev, key)
		switch {
		case err == nil:
			started(ev, runs)
		case errors.Is(err, client.ErrState):
			say("%s: %s", plain(ev.Ref), plain(err.Error()))
		case transient(err) || ctx.Err() != nil, errors.Is(err, client.ErrUnauthenticated), errors.Is(err, client.ErrPermission):
			c.failed(c.explain("runs were not started", err))
			c.left(push.Events[i:], key)
			return nil
		default:
			c.failed(c.explain(plain(ev.Ref)+": runs were not started", err))
		}
	}
	return nil
}

// submit tries for as long as a push may wait.
func (c *hookPostReceiveCmd) submit(ctx context.Context, cl *client.Client, ev forge.Event, key string) ([]solstice.Run, error) {
	req := &pb.SubmitRequest{
		IdempotencyKey: key, Forge: c.Forge, Commit: ev.Commit, Ref: ev.Ref,
		Repo:  &pb.Repo{Owner: ev.Repo.Owner, Name: ev.Repo.Name, DefaultBranch: ev.Repo.DefaultBranch},
		Event: &pb.Event{Kind: string(ev.Kind), Before: ev.Before, Title: ev.Title, Message: ev.Message, Sender: ev.Sender.Login, Time: timestamppb.New(ev.Time)},
	}
	ctx, cancel := context.WithTimeout(ctx, c.Wait)
	defer cancel()
	var last error
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		resp, err := cl.Submit(ctx, req)
		if err == nil {
			var runs []solstice.Run
			for _, r := range resp.GetRuns() {
				runs = append(runs, runOf(r))
			}
			return runs, nil
		}
		first := last == nil
		if first || ctx.Err() == nil { // the end of the time says less than what was before it
			last = err
		}
		if !transient(err) || hopeless(err) || ctx.Err() != nil {
			return nil, last
		}
		if first {
			say("the orchestrator at %s is not available, waiting up to %s for it", plain(c.Server), c.Wait)
		}
		select {
		case <-ctx.Done():
			return nil, last
		case <-time.After(pause):
		}
	}
}

// hopeless reports whether there is no connection for a reason that stays.
func hopeless(err error) bool {
	_, unknown := errors.AsType[x509.UnknownAuthorityError](err)
	return unknown || errors.Is(err, client.ErrNotTLS) || errors.Is(err, client.ErrRefused)
}

// maxNamed bounds what is listed for the pusher.
const maxNamed = 8

// started says which runs there are, or what is wrong with the workflow file.
func started(ev forge.Event, runs []solstice.Run) {
	if len(runs) == 0 {
		say("%s: no workflow is concerned", plain(ev.Ref))
	}
	for _, r := range runs {
		for l := range strings.Lines(workflow.Diagnostics(r.Diagnostics).String()) {
			say("%s", logtext.Line(strings.TrimSuffix(l, "\n"), false))
		}
		var names []string
		for _, j := range r.Jobs[:min(len(r.Jobs), maxNamed)] {
			names = append(names, plain(j.Name))
		}
		if n := len(r.Jobs) - maxNamed; n > 0 {
			names = append(names, fmt.Sprint(n, " more"))
		}
		jobs := prefixed(": ", strings.Join(names, ", "))
		if r.State == solstice.RunErrored {
			jobs = ": nothing is run"
		}
		say("%s  run %s  %s %s%s", plain(ev.Ref), r.ID, plain(r.Workflow), words(string(r.State)), jobs)
	}
}

// left says how to start what was not. The first was sent under the key, where there
// is one, and it may be that the orchestrator took it.
func (c *hookPostReceiveCmd) left(events []forge.Event, key string) {
	for i, ev := range events[:min(len(events), maxNamed)] {
		command := fmt.Sprintf("solstice enqueue --server %s --forge %s --repo %s --ref %s", quoted(c.Server), quoted(c.Forge), quoted(ev.Repo.FullName()), quoted(ev.Ref))
		if key != "" && i == 0 {
			command += " --idempotency-key " + quoted(key)
		}
		say("not started; later: %s", plain(command))
	}
	if n := len(events) - maxNamed; n > 0 {
		say("and %d more", n)
	}
}

func (c *hookPostReceiveCmd) failed(err error) { daemon.Render(os.Stderr, err) }

// say tells the pusher.
func say(format string, args ...any) {
	newScreen(os.Stdout, false, nil).printf("solstice: "+format, args...)
}

// quoted is a word for sh.
func quoted(s string) string {
	if strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:@+,") == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
