package daemon

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"runtime/debug"
	"strings"

	"github.com/alecthomas/kong"
)

// Program says what is parsed and where from.
type Program struct {
	// Name of the program, also its default service name in telemetry.
	Name string
	// StateName is the directory of ${state_dir}; empty: solstice.
	StateName string
	// Description is the first paragraph of --help.
	Description string
	// Args are the arguments without the program's name. Nil: the process's.
	Args []string
	// Environ is the environment as "NAME=value". Nil: the process's, which is
	// read here and nowhere else.
	Environ []string
	// Stdout gets --help and --version. Nil: the process's.
	Stdout io.Writer
}

// Parse fills flags, a pointer to a struct as kong describes it
// (https://github.com/alecthomas/kong), from the arguments, the variables that
// its env tags name, the file of --config, and defaults: the first of these that
// has a value wins, and an empty variable is none. --help names the variables;
// --config and --version are added.
//
// The file is YAML: a mapping of flag names, without dashes in front, to values.
// Unknown keys are errors with file and line.
//
// Parse returns an [*ExitError] that a main should return: code 0 after --help
// and --version, [ExitUsage] for everything a user did wrong. The variables
// ${state_dir} (the user's XDG state directory for Solstice, may be empty) and
// ${program} can be used in tags, and further kong options added.
func Parse(flags any, p Program, options ...kong.Option) (*kong.Context, error) {
	if p.Args == nil {
		p.Args = os.Args[1:]
	}
	if p.Environ == nil {
		p.Environ = os.Environ()
	}
	if p.Stdout == nil {
		p.Stdout = os.Stdout
	}
	src := &sources{env: environ(p.Environ), names: map[*kong.Value][]string{}}
	var common struct {
		Config  configFlag       `placeholder:"FILE" help:"Read flags from this YAML file, whose keys are their names."`
		Version kong.VersionFlag `help:"Print the version and exit."`
	}
	all := append([]kong.Option{
		kong.Name(p.Name), kong.Description(p.Description), kong.Writers(p.Stdout, io.Discard),
		kong.Exit(func(code int) { panic(exitRequest(code)) }),
		kong.Embed(&common),
		kong.PostBuild(src.takeEnvTags),
		kong.ValueFormatter(src.help),
		kong.Resolvers(src),
		kong.Bind(src),
		kong.Vars{"version": Version(), "program": p.Name, "state_dir": stateDir(src.env, cmp.Or(p.StateName, "solstice"))},
	}, options...)
	parser, err := kong.New(flags, all...)
	if err != nil {
		return nil, fmt.Errorf("daemon: flags of %s: %w", p.Name, err)
	}
	ctx, err := parse(parser, p.Args)
	if err == nil {
		return ctx, nil
	}
	if exit, ok := errors.AsType[*ExitError](err); ok {
		return nil, exit
	}
	problem, ok := errors.AsType[*Problem](err)
	if !ok {
		problem = &Problem{What: err.Error(), Advice: "see " + p.Name + " --help"}
	}
	return nil, &ExitError{Code: ExitUsage, Err: problem}
}

// exitRequest is how --help and --version leave the parser.
type exitRequest int

func parse(parser *kong.Kong, args []string) (ctx *kong.Context, err error) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case exitRequest:
			err = &ExitError{Code: int(r)}
		default:
			panic(r)
		}
	}()
	return parser.Parse(args)
}

// sources resolves flags that were not given, first from the environment, then
// from the file.
type sources struct {
	env   map[string]string
	file  *configFile
	names map[*kong.Value][]string // variables by flag
}

// takeEnvTags takes the variables' names away from kong, which would look them
// up in the process's environment.
func (s *sources) takeEnvTags(k *kong.Kong) error {
	return kong.Visit(k.Model, func(node kong.Visitable, next kong.Next) error {
		value := (*kong.Value)(nil)
		switch n := node.(type) {
		case *kong.Flag:
			value = n.Value
		case *kong.Value:
			value = n
		}
		if value != nil && value.Tag != nil && len(value.Tag.Envs) > 0 {
			s.names[value] = value.Tag.Envs
			value.Tag.Envs = nil
		}
		return next(nil)
	})
}

func (s *sources) help(v *kong.Value) string {
	names := s.names[v]
	if len(names) == 0 {
		return v.Help
	}
	return strings.TrimSuffix(v.Help, ".") + " ($" + strings.Join(names, ", $") + ")."
}

// Validate is kong's.
func (s *sources) Validate(*kong.Application) error { return nil }

// Resolve is kong's. It tries the value out, so that the error can say where a
// value comes from.
func (s *sources) Resolve(_ *kong.Context, _ *kong.Path, flag *kong.Flag) (any, error) {
	for _, name := range s.names[flag.Value] {
		if v := s.env[name]; v != "" {
			return v, try(flag, v, "environment variable "+name)
		}
	}
	if s.file != nil {
		if v, ok := s.file.values[flag.Name]; ok {
			return v.value, try(flag, v.value, fmt.Sprintf("%s:%d", s.file.path, v.line))
		}
	}
	return nil, nil
}

func try(flag *kong.Flag, v any, source string) error {
	scan := kong.Scan().PushTyped(v, kong.FlagValueToken)
	if err := flag.Parse(scan, reflect.New(flag.Target.Type()).Elem()); err != nil {
		return fmt.Errorf("%s: %w", source, err)
	}
	return nil
}

func environ(list []string) map[string]string {
	m := make(map[string]string, len(list))
	for _, kv := range list {
		if k, v, ok := strings.Cut(kv, "="); ok {
			m[k] = v
		}
	}
	return m
}

// stateDir follows the XDG Base Directory Specification
// (https://specifications.freedesktop.org/basedir-spec/).
func stateDir(env map[string]string, name string) string {
	// The specification says to ignore relative paths.
	if d := env["XDG_STATE_HOME"]; filepath.IsAbs(d) {
		return filepath.Join(d, name)
	}
	if d := env["HOME"]; filepath.IsAbs(d) {
		return filepath.Join(d, ".local", "state", name)
	}
	return ""
}

// Version is the program's module version and commit, from its build
// information: "v1.2.0 (1a148b5c0ffe)", or "(devel)" where nothing is known.
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "(devel)"
	}
	return version(info)
}

func version(info *debug.BuildInfo) string {
	v := info.Main.Version
	if v == "" {
		v = "(devel)"
	}
	revision, dirty := "", ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			revision = s.Value[:min(12, len(s.Value))]
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = ", modified"
		}
	}
	if revision == "" {
		return v
	}
	return fmt.Sprintf("%s (%s%s)", v, revision, dirty)
}
