// Package house holds the rules that keep this module in order, as functions on
// file trees and package lists; its tests apply them to the module and to
// planted violations. Nothing imports it.
package house

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strings"
)

// Module is this module's path.
const Module = "github.com/solstice-ci/solstice-go"

// Package is what `go list -json` says of a package, as far as the rules need
// it.
type Package struct {
	ImportPath   string
	Doc          string
	Standard     bool
	Imports      []string
	Deps         []string
	CgoFiles     []string
	GoFiles      []string
	TestGoFiles  []string
	XTestGoFiles []string
}

// ParseList reads the output of `go list -json`.
func ParseList(r io.Reader) ([]Package, error) {
	var list []Package
	for dec := json.NewDecoder(r); ; {
		var p Package
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return list, nil
		} else if err != nil {
			return nil, err
		}
		list = append(list, p)
	}
}

// Undocumented lists the packages without a package comment. Generated code is
// left out by the caller.
func Undocumented(list []Package) []string {
	var bad []string
	for _, p := range list {
		if p.Doc == "" && len(p.GoFiles) > 0 {
			bad = append(bad, p.ImportPath+" has no package comment")
		}
	}
	return bad
}

// BannedDeps lists what p needs, directly or not, that matches one of the
// import paths in banned: a path stands for itself and everything below it.
func BannedDeps(p Package, banned []string) []string {
	var bad []string
	for _, d := range p.Deps {
		for _, b := range banned {
			if d == b || strings.HasPrefix(d, b+"/") {
				bad = append(bad, p.ImportPath+" depends on "+d)
			}
		}
	}
	return bad
}

// OnlyStdlibAnd lists the imports of p beyond the standard library and the
// packages named.
func OnlyStdlibAnd(p Package, allowed ...string) []string {
	var bad []string
	for _, i := range p.Imports {
		if !isStdlib(i) && !slices.Contains(allowed, i) {
			bad = append(bad, p.ImportPath+" imports "+i)
		}
	}
	return bad
}

// InternalImports lists the imports of p from internal directories of this
// module.
func InternalImports(p Package) []string {
	var bad []string
	for _, i := range p.Imports {
		if strings.HasPrefix(i, Module+"/") && strings.Contains(i+"/", "/internal/") {
			bad = append(bad, p.ImportPath+" imports "+i)
		}
	}
	return bad
}

// isStdlib: the first element of a path of the standard library has no dot.
func isStdlib(importPath string) bool {
	first, _, _ := strings.Cut(importPath, "/")
	return importPath != "C" && !strings.Contains(first, ".")
}

// environment are the functions of package os that read or change the
// environment.
var environment = []string{"Getenv", "LookupEnv", "Environ", "Setenv", "Unsetenv", "Clearenv", "ExpandEnv"}

// EnvironmentUse lists the uses of the environment in the Go files of a tree,
// tests left out, except below the directories allowed. A package that is
// imported under another name is seen through.
func EnvironmentUse(tree fs.FS, allowed ...string) ([]string, error) {
	return eachGoFile(tree, func(name string, fset *token.FileSet, file *ast.File) (bad []string) {
		if strings.HasSuffix(name, "_test.go") || below(name, allowed) {
			return nil
		}
		local := map[string]bool{}
		for _, i := range file.Imports {
			p := strings.Trim(i.Path.Value, `"`)
			if p != "os" && p != "syscall" {
				continue
			}
			local[p] = i.Name == nil
			if i.Name != nil {
				local[i.Name.Name] = true
				if i.Name.Name == "." {
					bad = append(bad, fmt.Sprintf("%s imports %s with a dot", name, p))
				}
			}
		}
		ast.Inspect(file, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if x, ok := sel.X.(*ast.Ident); ok && local[x.Name] && slices.Contains(environment, sel.Sel.Name) {
				bad = append(bad, fmt.Sprintf("%s uses %s.%s", fset.Position(n.Pos()), x.Name, sel.Sel.Name))
			}
			return true
		})
		return bad
	})
}

func below(name string, dirs []string) bool {
	return slices.ContainsFunc(dirs, func(d string) bool { return strings.HasPrefix(name, d+"/") })
}

// eachGoFile parses the Go files of a tree; test data and hidden directories
// are left out.
func eachGoFile(tree fs.FS, check func(string, *token.FileSet, *ast.File) []string) (bad []string, err error) {
	err = fs.WalkDir(tree, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if base := path.Base(name); name != "." && (base[0] == '.' || base[0] == '_' || base == "testdata" || base == "node_modules") {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") {
			return nil
		}
		src, err := fs.ReadFile(tree, name)
		if err != nil {
			return err
		}
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, name, src, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		bad = append(bad, check(name, fset, file)...)
		return nil
	})
	return bad, err
}

// machinePath matches absolute paths that exist on one developer's machine
// only: home directories and scratch checkouts.
var machinePath = regexp.MustCompile(`(^|[^\w./-])/(root|work|workspace|Users/\w+|home/\w+)/[\w.-]+`)

// exampleHomes are home directories in documentation and tests that stand for
// anyone's.
var exampleHomes = regexp.MustCompile(`/home/(u|user|me|alice|bob|git|runner|ci)\b`)

// MachinePaths lists the lines of text files that name a path of somebody's
// machine.
func MachinePaths(tree fs.FS, files []string) ([]string, error) {
	var bad []string
	for _, name := range files {
		data, err := fs.ReadFile(tree, name)
		if err != nil {
			return nil, err
		}
		if bytes.IndexByte(data, 0) >= 0 {
			continue
		}
		for i, line := range strings.Split(string(data), "\n") {
			if m := machinePath.FindString(line); m != "" && !exampleHomes.MatchString(m) {
				bad = append(bad, fmt.Sprintf("%s:%d names a path of one machine: %s", name, i+1, strings.TrimSpace(m)))
			}
		}
	}
	return bad, nil
}

// Replaces lists the replace directives of a go.mod file.
func Replaces(gomod string) []string {
	var bad []string
	block := ""
	for i, line := range strings.Split(gomod, "\n") {
		line, _, _ = strings.Cut(line, "//")
		f := strings.Fields(line)
		switch {
		case len(f) == 0:
		case f[0] == ")":
			block = ""
		case len(f) == 2 && f[1] == "(":
			block = f[0]
		case block == "replace" || f[0] == "replace":
			bad = append(bad, fmt.Sprintf("go.mod:%d replaces a module: %s", i+1, strings.TrimSpace(line)))
		}
	}
	return bad
}

// Invented lists the blocks of a Markdown text in one of the languages that occur
// in none of the sources. Indentation does not count; a line with "…" stands for
// any number of lines.
func Invented(text string, languages, sources []string) []string {
	lines := func(s string) string { // each trimmed, with a newline before and after
		all := strings.Split(s, "\n")
		for i := range all {
			all[i] = strings.TrimSpace(all[i])
		}
		return "\n" + strings.Join(all, "\n") + "\n"
	}
	trimmed := make([]string, len(sources))
	for i, s := range sources {
		trimmed[i] = lines(s)
	}
	var bad []string
	for i, block := range strings.Split("\n"+text, "\n```") {
		language, code, _ := strings.Cut(block, "\n")
		if i%2 == 0 || !slices.Contains(languages, language) {
			continue
		}
		parts := strings.Split(lines(code), "\n…\n")
		if !slices.ContainsFunc(trimmed, func(s string) bool {
			for _, part := range parts {
				_, rest, found := strings.Cut(s, lines(strings.TrimSpace(part)))
				if !found {
					return false
				}
				s = "\n" + rest
			}
			return true
		}) {
			first, _, _ := strings.Cut(strings.TrimSpace(code), "\n")
			bad = append(bad, fmt.Sprintf("the block that begins with %q is in no source", first))
		}
	}
	return bad
}
