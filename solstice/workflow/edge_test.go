package workflow_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/solstice-ci/solstice-go/solstice/workflow"
)

const minimal = "jobs:\n  test:\n    steps:\n      - run: make test\n"

// TestBytes: what is about bytes rather than YAML, and does not survive an
// editor in a test file.
func TestBytes(t *testing.T) {
	deep := strings.Repeat("[", 100_000)
	for _, c := range []struct {
		name, src string
		line, col int // 0: no diagnostics
		want      string
	}{
		{"byte order mark", "\ufeff" + minimal, 0, 0, ""},
		{"CRLF", strings.ReplaceAll(minimal, "\n", "\r\n"), 0, 0, ""},
		{"CR", strings.ReplaceAll(minimal, "\n", "\r"), 0, 0, ""},
		{"no line end", strings.TrimSuffix(minimal, "\n"), 0, 0, ""},
		{"document end", "---\n" + minimal + "...\n", 0, 0, ""},
		{"mark and CRLF with an error", "\ufeff" + strings.ReplaceAll("name: x\nnope: y\n"+minimal, "\n", "\r\n"), 2, 1, `unknown key "nope"`},
		{"empty", "", 1, 1, "is empty"},
		{"only white space", " \n\n", 1, 1, "is empty"},
		{"only null", "~\n", 1, 1, "is empty"},
		{"a text", "make test\n", 1, 1, "must be a mapping, not text"},
		{"NUL", "name: a\n" + "nul: b\x00c\n", 2, 7, "U+0000"},
		{"escape", "name: \x1b[31m\n", 1, 7, "U+001B"},
		{"not UTF-8", "name: é\nx: \xff\n", 2, 4, "not valid UTF-8"},
		{"UTF-16", "\xff\xfej\x00o\x00b\x00s\x00", 1, 1, "not valid UTF-8"},
		{"mark in the middle", "name: a\ufeffb\n", 1, 8, "U+FEFF"},
		{"too large", strings.Repeat("#", workflow.MaxFileSize) + "\n", 1, 1, "at most 524288"},
		{"long text", "env:\n  A: " + strings.Repeat("x", workflow.MaxScalar+1) + "\n" + minimal, 2, 6, "at most 65536"},
		{"brackets", "a: " + deep, 1, 0, ""},
		{"anchor in anchor", "a: &a [*a]\n", 1, 8, "part of"},
		{"deep through aliases", "a: &a [[[[[[[[[[[[1]]]]]]]]]]]]\nb: &b [[[[[[[[[[[[*a]]]]]]]]]]]]\nc: [[[[[[[[[[[[*b]]]]]]]]]]]]\n", 3, 16, "nested more than 32"},
		{"many nodes", "jobs:\n  a:\n    matrix:\n      include: [" + strings.Repeat("{a: 1},", 26_000) + "]\n", 4, 0, "more than 50000 values"},
		{"second document is broken", minimal + "---\na: [\n", 0, 0, "not valid YAML"},
		{"wide", "jobs: {a: {steps: [{run: x}]}, b: {steps: [{run: x, " + strings.Repeat("x", 500) + ": 1}]}}\n", 1, 53, "unknown key"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, diags := workflow.Parse("w.yaml", []byte(c.src))
			if w == nil {
				t.Fatal("no workflow")
			}
			if c.line == 0 && c.want == "" {
				if len(diags) > 0 {
					t.Fatal(diags)
				}
				return
			}
			if !diags.HasErrors() {
				t.Fatal("no error")
			}
			d := diags[0]
			if c.line != 0 && d.Line != c.line || c.col != 0 && d.Column != c.col || !strings.Contains(d.Message, c.want) {
				t.Errorf("got %d:%d %s, want %d:%d …%s…", d.Line, d.Column, d.Message, c.line, c.col, c.want)
			}
			if text := diags.String(); len(text) > 4096 || strings.ContainsAny(text, "\x00\x1b\r") {
				t.Errorf("%d bytes of text: %.200q", len(text), text)
			}
		})
	}
}

func TestManyErrorsAreBounded(t *testing.T) {
	var b strings.Builder
	b.WriteString("jobs:\n  a:\n    steps:\n")
	for i := range 5000 {
		fmt.Fprintf(&b, "      - rum: %d\n", i)
	}
	_, diags := workflow.Parse("w.yaml", []byte(b.String()))
	if len(diags) < 100 || len(diags) > 1000 {
		t.Errorf("%d diagnostics", len(diags))
	}
}

// TestWarningsHideNoError: however many warnings come first.
func TestWarningsHideNoError(t *testing.T) {
	src := "jobs:\n  a:\n    matrix:\n      x: [1]\n      exclude:\n" + strings.Repeat("        - x: 2\n", 1000) + "    needs: nobody\n    steps: [{run: x}]\n"
	_, diags := workflow.Parse("w.yaml", []byte(src))
	if !diags.HasErrors() || len(diags) > 200 {
		t.Errorf("%d diagnostics, errors: %v", len(diags), diags.HasErrors())
	}
}

// TestAliasesAreReportedOnce: a mistake behind an alias is one mistake.
func TestAliasesAreReportedOnce(t *testing.T) {
	_, diags := workflow.Parse("w.yaml", []byte("jobs:\n  a:\n    steps: &s\n      - run: echo ${{ nope.x }}\n  b:\n    steps: *s\n"))
	if len(diags) != 1 || diags[0].Line != 4 {
		t.Errorf("got:\n%s", diags)
	}
}

func TestLimits(t *testing.T) {
	steps := func(n int) string {
		return "jobs:\n  a:\n    steps:\n" + strings.Repeat("      - run: x\n", n)
	}
	jobs := func(n int) string {
		var b strings.Builder
		b.WriteString("jobs:\n")
		for i := range n {
			fmt.Fprintf(&b, "  j%d: {steps: [{run: x}]}\n", i)
		}
		return b.String()
	}
	for _, c := range []struct {
		name, src, want string
	}{
		{"most steps", steps(workflow.MaxSteps), ""},
		{"too many steps", steps(workflow.MaxSteps + 1), "at most 256"},
		{"most jobs", jobs(workflow.MaxJobs), ""},
		{"too many jobs", jobs(workflow.MaxJobs + 1), "at most 512"},
		{"longest name", "jobs:\n  " + strings.Repeat("x", 64) + ": {steps: [{run: x}]}\n", ""},
		{"too long a name", "jobs:\n  " + strings.Repeat("x", 65) + ": {steps: [{run: x}]}\n", "is not a name"},
		{"longest timeout", "jobs:\n  a: {timeout: 168h, steps: [{run: x, timeout: 10080}]}\n", ""},
		{"too long a timeout", "jobs:\n  a: {timeout: 10081, steps: [{run: x}]}\n", "at most 168h"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, diags := workflow.Parse("w.yaml", []byte(c.src))
			if c.want == "" && len(diags) > 0 || !strings.Contains(diags.String(), c.want) {
				t.Errorf("want %q, got:\n%s", c.want, diags)
			}
		})
	}
}

func TestDiagnosticsErr(t *testing.T) {
	_, diags := workflow.Parse("dir/w.yaml", []byte("nope: 1\nnoper: 2\n"+minimal))
	err := diags.Err()
	var de *workflow.DiagnosticsError
	if !errors.Is(err, workflow.ErrInvalid) || !errors.As(err, &de) || len(de.Diagnostics) != 2 {
		t.Fatalf("%v", err)
	}
	if got, want := err.Error(), `dir/w.yaml:1:1: unknown key "nope" in the workflow (and 1 more)`; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	_, diags = workflow.Parse("w.yaml", []byte("jobs:\n  a:\n    matrix: {x: [1], exclude: [{x: 2}]}\n    steps: [{run: x}]\n"))
	if len(diags) != 1 || diags.HasErrors() || diags.Err() != nil || diags[0].Severity != workflow.SeverityWarning {
		t.Errorf("a warning: %+v", diags)
	}
	b, err := json.Marshal(diags)
	if err != nil {
		t.Fatal(err)
	}
	var back workflow.Diagnostics
	if err := json.Unmarshal(b, &back); err != nil || len(back) != 1 || back[0].Message != diags[0].Message {
		t.Errorf("%s: %v, %v", b, back, err)
	}
}

// TestCaret: the caret stands under what it means, also behind tabs, wide
// characters and in long lines.
func TestCaret(t *testing.T) {
	d := workflow.Diagnostic{Path: "w", Line: 3, Column: 4, EndColumn: 6, Severity: workflow.SeverityError, Message: "m", Source: "\taébc"}
	if got, want := d.String(), "w:3:4: error: m\n 3 | \taébc\n   | \t  ^^\n"; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	d.Source, d.Column, d.EndColumn = strings.Repeat("x", 1000)+"HERE"+strings.Repeat("y", 1000), 1001, 1005
	lines := strings.Split(d.String(), "\n")
	src, caret := []rune(lines[1]), []rune(lines[2])
	at := strings.IndexRune(string(caret), '^')
	if len(src) > 200 || string(src[at:at+4]) != "HERE" || strings.Count(lines[2], "^") != 4 {
		t.Errorf("got\n%s", d)
	}
	d.Source, d.Column, d.EndColumn = "a\x1b[31m\u009b", 1, 2
	if strings.ContainsAny(d.String(), "\x1b\u009b") {
		t.Errorf("control characters reach the terminal: %q", d.String())
	}
}

func BenchmarkParse(b *testing.B) {
	src := files(b, "good")["full"]
	b.SetBytes(int64(len(src)))
	for b.Loop() {
		if _, diags := workflow.Parse("w.yaml", src); diags.HasErrors() {
			b.Fatal(diags)
		}
	}
}
