package telemetry

import (
	"log/slog"
	"math"
	"slices"
	"strings"
)

// modulePath is what package names in a filter are relative to.
const modulePath = "github.com/solstice-ci/solstice-go/"

// levels are the names a filter may use; off is above everything.
var levels = map[string]slog.Level{
	"trace": slog.LevelDebug - 4,
	"debug": slog.LevelDebug,
	"info":  slog.LevelInfo,
	"warn":  slog.LevelWarn,
	"error": slog.LevelError,
	"off":   math.MaxInt,
}

// Filter decides which records of which packages are logged. The zero value
// lets everything at info and above through.
type Filter struct {
	base  slog.Level
	rules []rule // longest package first
}

type rule struct {
	pkg   string
	level slog.Level
}

// ParseFilter reads a comma-separated list of directives, such as
// "info,queue=debug,vmprovider/processvm=warn". A bare level (trace, debug,
// info, warn, error, off) is for every package that no other directive names.
// PACKAGE=LEVEL is for a package and those below it; the longest match wins.
// Packages of this module are named by their path in it ("queue", "solstice",
// "main" for the program itself), others by their import path.
func ParseFilter(s string) (Filter, error) {
	f := Filter{base: slog.LevelInfo}
	bare := false
	for d := range strings.SplitSeq(s, ",") {
		d = strings.TrimSpace(d)
		pkg, name, scoped := strings.Cut(d, "=")
		if !scoped {
			pkg, name = "", d
		}
		pkg = strings.TrimSpace(pkg)
		level, ok := levels[strings.ToLower(strings.TrimSpace(name))]
		switch {
		case !ok:
			return Filter{}, wrapf("log level %q in %q: use trace, debug, info, warn, error or off, or PACKAGE=LEVEL", name, s)
		case scoped && pkg == "":
			return Filter{}, wrapf("log level %q in %q has no package before the =", d, s)
		case scoped:
			pkg = strings.TrimPrefix(pkg, modulePath)
			if slices.ContainsFunc(f.rules, func(r rule) bool { return r.pkg == pkg }) {
				return Filter{}, wrapf("log level for package %q is given twice in %q", pkg, s)
			}
			f.rules = append(f.rules, rule{pkg, level})
		case bare:
			return Filter{}, wrapf("%q has more than one log level for all packages", s)
		default:
			f.base, bare = level, true
		}
	}
	slices.SortStableFunc(f.rules, func(a, b rule) int { return len(b.pkg) - len(a.pkg) })
	return f, nil
}

// Level is the lowest level that is logged for a package, named as in
// [ParseFilter] or by its import path.
func (f Filter) Level(pkg string) slog.Level {
	pkg = strings.TrimPrefix(pkg, modulePath)
	for _, r := range f.rules {
		if rest, ok := strings.CutPrefix(pkg, r.pkg); ok && (rest == "" || rest[0] == '/') {
			return r.level
		}
	}
	return f.base
}

// lowest is the lowest level logged for any package.
func (f Filter) lowest() slog.Level {
	l := f.base
	for _, r := range f.rules {
		l = min(l, r.level)
	}
	return l
}

// packageOf returns the import path in a function's full name as the runtime
// gives it, "import/path.(*Type).method": escapes are undone, and paths in this
// module are made relative to it.
func packageOf(function string) string {
	slash := strings.LastIndexByte(function, '/') + 1
	pkg := function
	if dot := strings.IndexByte(function[slash:], '.'); dot >= 0 {
		pkg = function[:slash+dot]
	}
	pkg = strings.ReplaceAll(pkg, "%2e", ".")
	return strings.TrimPrefix(pkg, modulePath)
}
