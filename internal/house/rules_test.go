package house

import (
	"slices"
	"strings"
	"testing"
	"testing/fstest"
)

func wantExactly(t *testing.T, got []string, want ...string) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("got %q, want findings about %q", got, want)
		return
	}
	for i, w := range want {
		if !strings.Contains(got[i], w) {
			t.Errorf("finding %q does not say %q", got[i], w)
		}
	}
}

func TestUndocumentedBites(t *testing.T) {
	wantExactly(t, Undocumented([]Package{
		{ImportPath: "a", Doc: "Package a …", GoFiles: []string{"a.go"}},
		{ImportPath: "b", GoFiles: []string{"b.go"}},
		{ImportPath: "only/tests"},
	}), "b has no package comment")
}

func TestBannedDepsBite(t *testing.T) {
	p := Package{ImportPath: "queue", Deps: []string{"context", "database/sql", "database/sqlish", "github.com/jackc/pgx/v5"}}
	wantExactly(t, BannedDeps(p, []string{"database/sql", "github.com/jackc"}), "database/sql", "pgx")
	if !slices.Contains(heavy, "runtime/cgo") || !slices.Contains(heavy, "database/sql") {
		t.Error("the list of heavy dependencies lost its core")
	}
}

func TestOnlyStdlibBites(t *testing.T) {
	p := Package{ImportPath: "queuetest", Imports: []string{"testing", "net/http", Module + "/queue", Module + "/blobstore", "pgregory.net/rapid", "C"}}
	wantExactly(t, OnlyStdlibAnd(p, Module+"/queue"), "blobstore", "rapid", "imports C")
}

func TestInternalImportsBite(t *testing.T) {
	p := Package{ImportPath: "examples/x", Imports: []string{Module + "/internal/store", Module + "/solstice/internal/x", Module + "/queue", "internal/abi", "other.org/internal/x"}}
	wantExactly(t, InternalImports(p), "internal/store", "solstice/internal/x")
}

func TestParseList(t *testing.T) {
	got, err := ParseList(strings.NewReader("{\"ImportPath\":\"a\"}\n{\"ImportPath\":\"b\",\"Deps\":[\"c\"]}"))
	if err != nil || len(got) != 2 || got[1].Deps[0] != "c" {
		t.Errorf("ParseList = %v, %v", got, err)
	}
	if _, err := ParseList(strings.NewReader("{")); err == nil {
		t.Error("a truncated list was accepted")
	}
}

func TestEnvironmentUseBites(t *testing.T) {
	src := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }
	tree := fstest.MapFS{
		"a/a.go":             src("package a\nimport \"os\"\nvar _ = os.Getenv(\"X\")\n"),
		"b/b.go":             src("package b\nimport o \"os\"\nvar f = o.LookupEnv\n"),
		"c/c.go":             src("package c\nimport . \"os\"\n"),
		"d/d.go":             src("package d\nimport \"syscall\"\nvar _, _ = syscall.Getenv(\"X\")\n"),
		"e/ok.go":            src("package e\nimport \"os\"\nvar _ = os.Args\ntype t struct{ os int }\n"),
		"e/own.go":           src("package e\nvar os2 struct{ Getenv func() }\nvar _ = os2.Getenv\n"),
		"e/e_test.go":        src("package e\nimport \"os\"\nvar _ = os.Environ()\n"),
		"e/testdata/t.go":    src("package t\nimport \"os\"\nvar _ = os.Environ()\n"),
		"daemon/d.go":        src("package daemon\nimport \"os\"\nvar _ = os.Environ()\n"),
		"daemonesque/not.go": src("package x\nimport \"os\"\nvar _ = os.Environ()\n"),
	}
	got, err := EnvironmentUse(tree, "daemon")
	if err != nil {
		t.Fatal(err)
	}
	wantExactly(t, got, "a/a.go:3", "b/b.go:3", "c/c.go imports os with a dot", "d/d.go:3", "daemonesque/not.go:3")
}

func TestMachinePathsBite(t *testing.T) {
	tree := fstest.MapFS{
		"bad.md":  {Data: []byte("fine\nsee /root/go/pkg\n`/work/main` and\n\"/home/jdoe/src\"\n")},
		"good.md": {Data: []byte("/usr/lib/x, https://example.com/root/x, ./work/x, a/root/b, /home/user/src, /work, $HOME/work/x\n")},
		"bin":     {Data: []byte("\x00 /root/x")},
	}
	got, err := MachinePaths(tree, []string{"bad.md", "good.md", "bin"})
	if err != nil {
		t.Fatal(err)
	}
	wantExactly(t, got, "bad.md:2", "bad.md:3", "bad.md:4")
}

func TestReplacesBite(t *testing.T) {
	wantExactly(t, Replaces("module m\n\nrequire (\n\ta v1 // replace this\n)\n"))
	wantExactly(t, Replaces("module m\nreplace a => ../a\nreplace (\n\tb => c v1\n)\nrequire d v1\n"), "go.mod:2", "go.mod:4")
}

func TestInventedBites(t *testing.T) {
	sources := []string{"package a\n\nfunc f() {\n\tone()\n\ttwo()\n\tthree()\n}\n", "package b\n"}
	text := "# T\n\n```go\none()\ntwo()\n```\n\n```go\nfunc f() {\n…\n\tthree()\n}\n```\n\n```sh\nanything\n```\n\n" +
		"```go\none()\nthree()\n```\n\n```go\nthree()\n…\none()\n```\n\n```go\ntwo\n```\n"
	wantExactly(t, Invented(text, []string{"go"}, sources), `"one()"`, `"three()"`, `"two"`)
	wantExactly(t, Invented(text, []string{"sh"}, sources), `"anything"`)
}
