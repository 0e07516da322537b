// Package gitcmd runs the git program so that nothing around it can change
// what it does.
//
// Every command gets an environment built from nothing: no GIT_* variable of
// this process, no configuration of the machine or the user, no terminal, no
// credential helper, no hook, no file system monitor, and no transport but
// those the caller names. What remains in force is the configuration of the
// repository itself, so callers use plumbing commands that run no program a
// repository could name (filters, external diffs), and put "--" or
// "--end-of-options" before what comes from outside. Names and URLs from
// outside go through [CheckRef], [CheckObject] and [CheckURL] first.
//
// Settings, which may hold credentials, travel by environment and never in
// arguments. A cancelled context kills git and the programs it started.
package gitcmd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Errors that callers act on.
var (
	// ErrNoGit: there is no git on this machine, or it is older than 2.31.
	ErrNoGit = errors.New("gitcmd: no usable git")
	// ErrTooLarge: the output is over the caller's bound.
	ErrTooLarge = errors.New("gitcmd: output is too large")
	// ErrInvalid: a name or URL that git must not be given.
	ErrInvalid = errors.New("gitcmd: invalid argument")
)

// DefaultMaxOutput bounds what [Git.Output] collects: 16 MiB.
const DefaultMaxOutput = 16 << 20

const (
	stderrTail = 4 << 10
	// How long pipes may stay open after git's death: descendants that left its
	// process group may hold them.
	waitDelay = 2 * time.Second
	// Settings by environment came with 2.31 (GIT_CONFIG_COUNT, see git-config(1)).
	minMajor, minMinor = 2, 31
)

// Where git is looked for after the search path of this process (which is
// short in a booting guest), and what git may run programs from.
var wellKnown = []string{
	"/usr/local/bin", "/usr/bin", "/bin", "/usr/pkg/bin", "/opt/local/bin",
	"/opt/ooce/bin", "/opt/homebrew/bin", "/usr/sbin", "/sbin",
}

// Git is one git program; safe for concurrent use.
type Git struct {
	exe     string
	path    string
	version string
}

// Find looks for git in the search path of this process, then where systems
// usually put it. It wraps ErrNoGit.
func Find(ctx context.Context) (*Git, error) {
	if exe, err := exec.LookPath("git"); err == nil {
		return New(ctx, exe)
	}
	for _, dir := range wellKnown {
		if exe, err := exec.LookPath(filepath.Join(dir, "git")); err == nil {
			return New(ctx, exe)
		}
	}
	return nil, fmt.Errorf("%w: not in the search path", ErrNoGit)
}

// New uses the program at exe. It wraps ErrNoGit.
func New(ctx context.Context, exe string) (*Git, error) {
	exe, err := filepath.Abs(exe)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoGit, err)
	}
	dirs := append([]string{filepath.Dir(exe)}, wellKnown...)
	g := &Git{exe: exe, path: strings.Join(dirs, string(os.PathListSeparator))}
	out, err := g.Output(ctx, Options{MaxOutput: 4 << 10}, "version")
	if err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %s: %w", ErrNoGit, exe, err)
	}
	version, major, minor, ok := parseVersion(string(out))
	if !ok {
		return nil, fmt.Errorf("%w: %s does not tell its version", ErrNoGit, exe)
	}
	if major < minMajor || major == minMajor && minor < minMinor {
		return nil, fmt.Errorf("%w: %s is git %s, need %d.%d", ErrNoGit, exe, version, minMajor, minMinor)
	}
	g.version = version
	return g, nil
}

// Path is the program's absolute path.
func (g *Git) Path() string { return g.exe }

// Version is what git calls itself, such as "2.39.5".
func (g *Git) Version() string { return g.version }

func parseVersion(s string) (version string, major, minor int, ok bool) {
	fields := strings.Fields(s)
	if len(fields) < 3 || fields[0] != "git" || fields[1] != "version" {
		return "", 0, 0, false
	}
	parts := strings.Split(fields[2], ".")
	if len(parts) < 2 {
		return "", 0, 0, false
	}
	major, err1 := strconv.Atoi(parts[0])
	minor, err2 := strconv.Atoi(parts[1])
	return fields[2], major, minor, err1 == nil && err2 == nil
}

// Options says how one command runs; the zero value runs it in the root
// directory, without a transport.
type Options struct {
	Dir      string // working directory; empty: the root directory, which is no repository
	GitDir   string // the repository; empty: found from Dir upwards
	WorkTree string // of GitDir, where the command needs one
	// SafeDirectory is a repository that git uses although another user owns it.
	SafeDirectory string
	// Protocols are the transports that may be used ("https", "file"); none
	// where empty.
	Protocols []string
	// Config are settings, "section.key=value", that take precedence over the
	// repository's own; they may be secret. What this package sets stays set.
	Config []string
	// Env are further variables, "NAME=value".
	Env []string

	Stdin  io.Reader // nil: empty
	Stdout io.Writer // of Run; nil: discarded
	// Stderr gets a copy of what git says, beside the tail that errors carry.
	Stderr io.Writer
	// MaxOutput bounds what Output collects, in bytes; 0: DefaultMaxOutput.
	MaxOutput int64
}

// Error is a git command that did not succeed.
type Error struct {
	Command  string // the subcommand alone: arguments may come from outside
	ExitCode int    // -1: killed, or never started
	Stderr   string // the last 4 KiB at most
	Err      error  // the context's error when that ended the command
}

func (e *Error) Error() string {
	msg := fmt.Sprintf("git %s: %v", e.Command, e.Err)
	if tail := strings.TrimSpace(e.Stderr); tail != "" {
		msg += ": " + tail
	}
	return msg
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// ExitCode gives the exit status of the git command that failed with err; ok
// is false when err is none, or git did not exit by itself.
func ExitCode(err error) (code int, ok bool) {
	var e *Error
	if errors.As(err, &e) && e.ExitCode >= 0 {
		return e.ExitCode, true
	}
	return 0, false
}

// Output runs a command and gives what it printed, at most MaxOutput. It wraps
// ErrTooLarge, or gives an *Error.
func (g *Git) Output(ctx context.Context, o Options, args ...string) ([]byte, error) {
	limit := o.MaxOutput
	if limit <= 0 {
		limit = DefaultMaxOutput
	}
	out := &limitedBuffer{left: limit}
	o.Stdout = out
	err := g.Run(ctx, o, args...)
	if out.over && ctx.Err() == nil {
		return nil, fmt.Errorf("%w: git %s: over %d bytes", ErrTooLarge, command(args), limit)
	}
	if err != nil {
		return nil, err
	}
	return out.buf.Bytes(), nil
}

// Run runs a command to its end. It gives an *Error; an error of Stdin or
// Stdout is wrapped in it.
func (g *Git) Run(ctx context.Context, o Options, args ...string) error {
	cmd := exec.CommandContext(ctx, g.exe, slices.Concat(g.flags(o), args)...)
	cmd.Env = g.environ(o)
	cmd.Dir = o.Dir
	if cmd.Dir == "" {
		cmd.Dir = string(filepath.Separator)
	}
	cmd.Stdin = o.Stdin
	cmd.Stdout = o.Stdout
	tail := &tailBuffer{max: stderrTail}
	cmd.Stderr = tail
	if o.Stderr != nil {
		cmd.Stderr = io.MultiWriter(tail, o.Stderr)
	}
	cmd.WaitDelay = waitDelay
	ownGroup(cmd)
	err := cmd.Run()
	if err == nil {
		return nil
	}
	e := &Error{Command: command(args), ExitCode: -1, Stderr: tail.String(), Err: err}
	if cmd.ProcessState != nil {
		e.ExitCode = cmd.ProcessState.ExitCode()
	}
	if cause := context.Cause(ctx); cause != nil {
		e.ExitCode = -1
		e.Err = ctx.Err()
		if !errors.Is(cause, e.Err) {
			e.Err = fmt.Errorf("%w: %w", e.Err, cause)
		}
	}
	return e
}

// flags are what stands before the subcommand.
func (g *Git) flags(o Options) []string {
	flags := []string{
		"-c", "protocol.ext.allow=never",
		"-c", "core.hooksPath=" + os.DevNull,
		"-c", "core.fsmonitor=false",
		"-c", "core.alternateRefsCommand=true",
		"-c", "core.askPass=",
		"-c", "credential.helper=",
		"-c", "gc.auto=0",
		"-c", "maintenance.auto=false",
		"-c", "commit.gpgSign=false",
		"-c", "advice.detachedHead=false",
		"--no-pager",
		"--no-optional-locks",
		"--literal-pathspecs",
		"--no-replace-objects",
	}
	if o.SafeDirectory != "" {
		flags = append(flags, "-c", "safe.directory="+o.SafeDirectory)
	}
	if o.GitDir != "" {
		flags = append(flags, "--git-dir="+o.GitDir)
	}
	if o.WorkTree != "" {
		flags = append(flags, "--work-tree="+o.WorkTree)
	}
	return flags
}

// environ is the whole environment of a command; nothing is inherited.
func (g *Git) environ(o Options) []string {
	env := []string{
		"PATH=" + g.path,
		"HOME=/nonexistent",
		"LC_ALL=C",
		"GIT_CONFIG_NOSYSTEM=1",
		"GIT_CONFIG_SYSTEM=" + os.DevNull,
		"GIT_CONFIG_GLOBAL=" + os.DevNull,
		"GIT_ATTR_NOSYSTEM=1",
		"GIT_TERMINAL_PROMPT=0",
		"GIT_NO_LAZY_FETCH=1",
		"GIT_ALLOW_PROTOCOL=" + strings.Join(o.Protocols, ":"),
		"GIT_SSH_COMMAND=ssh -o BatchMode=yes",
		"GIT_CONFIG_COUNT=" + strconv.Itoa(len(o.Config)),
	}
	for i, setting := range o.Config {
		key, value, _ := strings.Cut(setting, "=")
		env = append(env, fmt.Sprintf("GIT_CONFIG_KEY_%d=%s", i, key), fmt.Sprintf("GIT_CONFIG_VALUE_%d=%s", i, value))
	}
	return append(env, o.Env...)
}

func command(args []string) string {
	if len(args) == 0 {
		return ""
	}
	return args[0]
}

// limitedBuffer fails the write that passes its bound, which ends the command.
type limitedBuffer struct {
	buf  bytes.Buffer
	left int64
	over bool
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	if int64(len(p)) > b.left {
		b.over = true
		return 0, ErrTooLarge
	}
	b.left -= int64(len(p))
	return b.buf.Write(p)
}

// tailBuffer keeps the last max bytes.
type tailBuffer struct {
	buf []byte
	max int
}

func (b *tailBuffer) Write(p []byte) (int, error) {
	b.buf = append(b.buf, p...)
	if over := len(b.buf) - b.max; over > 0 {
		b.buf = slices.Delete(b.buf, 0, over)
	}
	return len(p), nil
}

func (b *tailBuffer) String() string { return strings.ToValidUTF8(string(b.buf), "\uFFFD") }
